"""Integers that the arithmetic of a mask computes at one index, as affine expressions in the query index i and the key index j."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from .view.canon import number_of
from .view.shapes import known_equal
from .view.value import Dim, Shape, Value


@dataclass(frozen=True)
class Affine:
    """`query * i + key * j + constant`."""

    query: int
    key: int
    constant: Dim

    def plus(self, other: Affine) -> Affine:
        return Affine(self.query + other.query, self.key + other.key, self.constant + other.constant)

    def times(self, factor: int) -> Affine:
        return Affine(self.query * factor, self.key * factor, self.constant * factor)

    @property
    def is_constant(self) -> bool:
        return self.query == 0 and self.key == 0


Condition = frozenset[Affine]  # all of them are >= 0
Index = Affine | None  # None: an index about which nothing is known (batch, head)
ALWAYS: Condition = frozenset()
NEVER: Condition = frozenset({Affine(0, 0, -1)})
ZERO, ONE = Affine(0, 0, 0), Affine(0, 0, 1)
QUERY, KEY = Affine(1, 0, 0), Affine(0, 1, 0)


class IntegerReader:
    """Evaluates integer values at one symbolic index."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Value, tuple[Index, ...]], Any] = {}

    def _once(self, kind: str, read: Callable[[Value, tuple[Index, ...]], Any], value: Value, at: tuple[Index, ...]) -> Any:
        key = (kind, value, at)
        if key not in self._known:
            self._known[key] = read(value, at)
        return self._known[key]

    def integer(self, value: Value, at: tuple[Index, ...]) -> Affine | None:
        """The integer at an index, as an affine expression."""
        found: Affine | None = self._once("integer", self._integer, value, at)
        return found

    @abstractmethod
    def condition(self, value: Value, at: tuple[Index, ...]) -> Condition | None:
        """When the boolean at an index is true."""

    def _integer(self, value: Value, at: tuple[Index, ...]) -> Affine | None:
        if value.op == "sym":
            return Affine(0, 0, value.attrs["expr"])
        number = constant_of(value)
        if number is not None:
            return Affine(0, 0, int(number)) if float(number).is_integer() else None
        if value.dtype is None or value.dtype.is_floating_point or value.dtype in (torch.bool, torch.uint8):
            return None
        if value.op == "arange":
            return self._arange(value, at)
        if value.op == "index":
            return self._indexed(value, at)
        if value.op == "cast":
            return self.integer(value.args[0], at) if value.args[0].dtype is not torch.bool else None
        if value.op == "cat":
            return self._concatenated(value, at)
        if value.op == "cumsum":
            return self._running_sum(value)
        if value.op in ("add", "sub", "mul", "neg"):
            operands = [self.integer(arg, operand_index(arg, at)) for arg in value.args]
            return _arithmetic(value.op, [x for x in operands if x is not None]) if None not in operands else None
        inner = through_view(value, at)
        return None if inner is None else self.integer(*inner)

    def _arange(self, value: Value, at: tuple[Index, ...]) -> Affine | None:
        start, step = (self.integer(arg, ()) for arg in value.args)
        if start is None or step is None or not isinstance(step.constant, int) or at[0] is None:
            return None
        return at[0].times(step.constant).plus(start)

    def _concatenated(self, value: Value, at: tuple[Index, ...]) -> Affine | None:
        """Parts that one expression describes: the last part's, if it also gives the one element that each part before it holds."""
        dim = value.attrs["dim"]
        place, *before, last = at[dim], *value.args
        if place is None or abs(place.query) + abs(place.key) != 1 or not all(is_one(part.shape[dim]) for part in before):
            return None
        whole = self.integer(last, (*at[:dim], place.plus(Affine(0, 0, -len(before))), *at[dim + 1 :]))
        if whole is None or not (whole.is_constant or (place.query and not whole.key) or (place.key and not whole.query)):
            return None
        for offset, part in enumerate(before):
            single = self.integer(part, (*at[:dim], ZERO, *at[dim + 1 :]))
            variable = (offset - place.constant) * (place.query + place.key)  # the i or j at which the index is `offset`
            there = whole.constant + (whole.query + whole.key) * variable
            if single is None or not single.is_constant or not known_equal(single.constant, there):
                return None
        return whole

    def _running_sum(self, value: Value) -> Affine | None:
        """A sum of zeros."""
        operand, dim = value.args[0], value.attrs.get("dim")
        if not isinstance(dim, int):
            return None
        everywhere: list[Index] = [None] * operand.ndim
        everywhere[dim] = QUERY
        at = bounded(tuple(everywhere), operand.shape)
        zeros = self.condition(operand, at) == NEVER if operand.dtype is torch.bool else self.integer(operand, at) == ZERO
        return ZERO if zeros else None

    def _indexed(self, value: Value, at: tuple[Index, ...]) -> Affine | None:
        """x[a, b, ...] with an index tensor for every dimension of x."""
        source, *indices = value.args
        if value.attrs.get("@indices") != (True,) * source.ndim or any(index.dtype is torch.bool for index in indices):
            return None
        inner = [self.integer(index, operand_index(index, at)) for index in indices]
        unknown = [x is None or x.query < 0 or x.key < 0 or not at_least(x.constant, 0) for x in inner]
        # A dimension of size 1 holds one element, whatever the index into it.
        places = [ZERO if is_one(size) else None if hidden else x for x, size, hidden in zip(inner, source.shape, unknown, strict=True)]
        return self.integer(source, tuple(places))


def _arithmetic(op: str, operands: list[Affine]) -> Affine | None:
    if op == "neg":
        return operands[0].times(-1)
    a, b = operands
    if op != "mul":
        return a.plus(b if op == "add" else b.times(-1))
    for factor, other in ((a, b), (b, a)):
        if factor.is_constant and isinstance(factor.constant, int):
            return other.times(factor.constant)
    return None


def at_least(a: Any, b: Any) -> bool:
    """Whether a >= b for certain. Unlike a size, a position may be negative: only what the symbol's own assumptions say counts."""
    if isinstance(a, int) and isinstance(b, int):
        return a >= b
    least = sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(a - b)):
        coefficient, rest = term.as_coeff_Mul()
        factors = sympy.Mul.make_args(rest)
        if (coefficient < 0 and rest != 1) or not all(factor.is_nonnegative for factor in factors):
            return False
        if all(factor.is_positive for factor in factors):  # of an integer: at least one
            least += coefficient
    return bool(least >= 0)


# -------------------------------------------------------------------- indices


def constant_of(value: Value) -> float | int | bool | None:
    """The number that a value holds at every index."""
    number = number_of(value)
    if number is None and value.op == "full" and isinstance(value.attrs["value"], (int, float)):
        number = value.attrs["value"]
    return number


def is_one(size: Dim) -> bool:
    return isinstance(size, int) and size == 1


def bounded(at: tuple[Index, ...], shape: Shape) -> tuple[Index, ...]:
    """The index, 0 where there is only one element."""
    return tuple(ZERO if is_one(size) else index for index, size in zip(at, shape, strict=True))


def operand_index(operand: Value, at: tuple[Index, ...]) -> tuple[Index, ...]:
    """The index into an operand that is broadcast."""
    return bounded(at[len(at) - operand.ndim :], operand.shape)


def through_view(value: Value, at: tuple[Index, ...]) -> tuple[Value, tuple[Index, ...]] | None:
    """The value behind a view, and the index into it of what is at `at`."""
    if value.op not in ("reshape", "expand", "permute", "slice"):
        return None
    inner = value.args[0]
    if value.op == "expand":
        return inner, operand_index(inner, at)
    if value.op == "permute":
        places = dict(zip(value.attrs["dims"], at, strict=True))
        return inner, bounded(tuple(places[d] for d in range(inner.ndim)), inner.shape)
    if value.op == "slice":
        return inner, _sliced_index(value, at)
    kept = [index for index, size in zip(at, value.shape, strict=True) if not is_one(size)]
    sizes = [size for size in value.shape if not is_one(size)]
    wanted = [size for size in inner.shape if not is_one(size)]
    if len(sizes) != len(wanted) or not all(known_equal(a, b) for a, b in zip(sizes, wanted, strict=True)):
        return None
    rest = iter(kept)
    return inner, tuple(ZERO if is_one(size) else next(rest) for size in inner.shape)


def _sliced_index(value: Value, at: tuple[Index, ...]) -> tuple[Index, ...]:
    dim, start, step = (value.attrs[name] for name in ("dim", "start", "step"))
    index = at[dim]
    moved = index.times(step).plus(Affine(0, 0, start)) if index is not None and isinstance(step, int) else None
    return (*at[:dim], moved, *at[dim + 1 :])
