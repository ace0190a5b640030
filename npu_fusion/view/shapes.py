"""Arithmetic on shapes whose sizes are ints or sympy expressions. Nothing here adds a guard: what is not provably true is false."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch

from .value import Dim, Shape


def to_dim(size: Any) -> Dim:
    """An int or SymInt as an int or sympy expression."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if isinstance(expr, sympy.Integer) else expr
    return int(size)


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
    return bool(sympy.expand(a - b) == 0)


def known_ge(a: Any, b: Any) -> bool:
    """Whether a >= b for every value of the symbols, sizes being non-negative."""
    if type(a) is int and type(b) is int:
        return a >= b
    difference = sympy.expand(a - b)
    if difference.is_number:
        return bool(difference >= 0)
    return all(coefficient >= 0 for coefficient in _coefficients(difference))


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
