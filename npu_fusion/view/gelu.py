"""GELU written out by hand: 0.5 x (1 + erf(x / sqrt 2)), and its tanh approximation 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

What stands inside erf or tanh is compared as a polynomial of x, so that every way to write it is the same: `x * x * x`, `pow(x, 3)`,
factors taken out, the constants multiplied in advance.

Source: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415; the spellings are those of transformers' activations.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .value import Value

Polynomial = dict[int, float]  # power of x to its coefficient

_CUBIC = 0.044715
_INNER: dict[str, tuple[str, Polynomial]] = {
    "erf": ("none", {1: math.sqrt(0.5)}),
    "tanh": ("tanh", {1: math.sqrt(2 / math.pi), 3: _CUBIC * math.sqrt(2 / math.pi)}),
}
_TOLERANCE = 2e-5  # models round the constants (0.7979, 1.4142); more would show in fp32
_MOST_FACTORS = 6
_MOST_DEPTH = 8


def gelu_of(a: Value, b: Value) -> tuple[Value, str] | None:
    """The x and the approximation (`none` or `tanh`) of which `a * b` is the GELU, or None."""
    factors = list(_factors((a, b), _MOST_FACTORS))
    bells = [factor for factor in factors if _bell(factor) is not None]
    if len(bells) != 1:
        return None
    inner = _bell(bells[0])
    assert inner is not None
    rest = [factor for factor in factors if factor is not bells[0]]
    numbers = [n for n in map(_number, rest) if n is not None]
    tensors = [factor for factor in rest if _number(factor) is None]
    if len(tensors) != 1 or not _close(math.prod(numbers), 0.5):
        return None
    approximate, wanted = _INNER[inner.op]
    found = _polynomial(inner.args[0], tensors[0])
    if found is None or found.keys() != wanted.keys() or not all(_close(found[power], wanted[power]) for power in wanted):
        return None
    return tensors[0], approximate


def _factors(values: tuple[Value, ...], most: int) -> Iterator[Value]:
    """The factors of a product, products among them taken apart as long as there are few."""
    for value in values:
        if value.op == "mul" and most > 2:
            yield from _factors(value.args, most - 2)
        else:
            yield value


def _bell(value: Value) -> Value | None:
    """The erf or tanh of `1 + erf(...)` or `1 + tanh(...)`."""
    if value.op != "add":
        return None
    for one, inner in (value.args, value.args[::-1]):
        if inner.op in _INNER and _number(one) == 1:
            return inner
    return None


def _number(value: Value) -> float | None:
    number = value.attrs["value"] if value.op == "const" or (value.op == "full" and value.ndim == 0) else None
    return None if number is None or isinstance(number, bool) else float(number)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE)


def _polynomial(value: Value, x: Value, depth: int = 0) -> Polynomial | None:
    """The value as a polynomial of x, or None where it is none, or one written at great length."""
    number = _number(value)
    if value is x:
        return {1: 1.0}
    if number is not None:
        return {0: number}
    if value.op not in ("add", "mul", "square") or depth > _MOST_DEPTH:
        return None
    left, right = (_polynomial(arg, x, depth + 1) for arg in (value.args[0], value.args[-1]))
    if left is None or right is None:
        return None
    return _sum(left, right) if value.op == "add" else _product(left, right)


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    return {power: a.get(power, 0.0) + b.get(power, 0.0) for power in {*a, *b}}


def _product(a: Polynomial, b: Polynomial) -> Polynomial:
    out: Polynomial = {}
    for p, m in a.items():
        for q, n in b.items():
            out[p + q] = out.get(p + q, 0.0) + m * n
    return out
