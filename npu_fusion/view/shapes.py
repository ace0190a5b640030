"""Arithmetic on shapes whose sizes are ints or sympy expressions. Nothing here adds a guard: what is not provably true is false."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from ..torch_private import statically_true
from .value import Dim, Shape


def to_dim(size: Any) -> Dim:
    """An int, a SymInt or a sympy expression as an int or sympy expression."""
    expr = size.node.expr if isinstance(size, torch.SymInt) else size
    return expr if isinstance(expr, sympy.Expr) and not expr.is_Integer else int(expr)


def to_shape(sizes: Iterable[Any]) -> Shape:
    return tuple([size if type(size) is int else to_dim(size) for size in sizes])


def known_equal(a: Any, b: Any) -> bool:
    """Whether a == b for every value of the symbols."""
    if type(a) is int and type(b) is int:
        return a == b
    if a is b or a == b:
        return True
    if (type(a) is int and isinstance(b, sympy.Symbol)) or (type(b) is int and isinstance(a, sympy.Symbol)):
        return False
    return bool(sympy.expand(a - b) == 0) or _follows(sympy.Eq(a, b))


def known_ge(a: Any, b: Any) -> bool:
    """Whether a >= b for every value of the symbols, sizes being non-negative."""
    if type(a) is int and type(b) is int:
        return a >= b
    difference = sympy.expand(a - b)
    if difference.is_number:
        return bool(difference >= 0)
    return all(coefficient >= 0 for coefficient in _coefficients(difference)) or _follows(sympy.Ge(a, b))


@dataclass
class _Facts:
    shape_env: Any
    known: dict[Any, bool] = field(default_factory=dict)


_FACTS: ContextVar[_Facts | None] = ContextVar("npu_fusion_size_facts", default=None)


@contextmanager
def size_facts(shape_env: Any) -> Iterator[None]:
    """In the block, what the graph's shape environment knows counts as known: `chunk` into halves of one size means that it is even."""
    token = _FACTS.set(None if shape_env is None else _Facts(shape_env))
    try:
        yield
    finally:
        _FACTS.reset(token)


def _follows(condition: Any) -> bool:
    facts = _FACTS.get()
    if facts is None or condition in (True, False):
        return bool(condition is True or condition == sympy.true)
    if condition not in facts.known:
        facts.known[condition] = statically_true(facts.shape_env, condition)
    return facts.known[condition]


def _coefficients(expr: sympy.Expr) -> Iterable[sympy.Expr]:
    for term in sympy.Add.make_args(expr):
        coefficient, rest = term.as_coeff_Mul()
        if not all(isinstance(factor, sympy.Symbol) or factor.is_nonnegative for factor in sympy.Mul.make_args(rest)):
            yield sympy.Integer(-1)
        yield coefficient


def same_shape(a: Shape, b: Shape) -> bool:
    if a is b:
        return True
    return len(a) == len(b) and all(known_equal(x, y) for x, y in zip(a, b, strict=True))


def broadcast(a: Shape, b: Shape) -> Shape:
    """The broadcast shape. Where two symbolic sizes are not provably equal, the one that is not 1 for certain is taken."""
    if len(a) < len(b):
        a, b = b, a
    out = list(a)
    offset = len(a) - len(b)
    for i, size in enumerate(b):
        if type(out[offset + i]) is int and out[offset + i] == 1:
            out[offset + i] = size
    return tuple(out)


def product(sizes: Iterable[Dim]) -> Dim:
    out: Dim = 1
    for size in sizes:
        out = out * size
    return int(out) if isinstance(out, sympy.Integer) else out


def normal_dim(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim
