"""What stands before a product of attention heads: repetition of the key and value heads, and numbers multiplied in early."""

from __future__ import annotations

from .pattern import literal_of
from .view.canon import Canon
from .view.shapes import known_equal, same_shape
from .view.value import Dim, Literal, Shape, Value

_VIEWS = frozenset({"reshape", "permute", "expand", "slice"})


def unrepeated(canon: Canon, value: Value, dim: int) -> tuple[Value, Dim]:
    """The value without the repetition of its elements along `dim`, and how often each is repeated.

    Repeated means `repeat_interleave`, in any spelling: element n is element n // repeats of the result. A tiled dimension (n % size) is
    another thing, unless its size is 1.
    """
    if value.op == "cast":
        base, repeats = unrepeated(canon, value.args[0], dim)
        return (canon.cast(base, value.attrs["dtype"]), repeats) if repeats != 1 else (value, 1)
    if value.op == "permute":
        base, repeats = unrepeated(canon, value.args[0], value.attrs["dims"][dim])
        return (canon.permute(base, value.attrs["dims"]), repeats) if repeats != 1 else (value, 1)
    if value.op == "reshape" and value.args[0].op == "expand":
        return _folded_expand(canon, value, value.args[0], dim)
    if value.op == "expand" and known_equal(value.args[0].shape[dim - value.ndim], 1) and value.args[0].ndim == value.ndim:
        return canon.expand(value.args[0], _with(value.shape, dim, 1)), value.shape[dim]
    if value.op == "cat" and value.attrs["dim"] == dim:
        return _repeated_slices(value, dim)
    return value, 1


def _folded_expand(canon: Canon, value: Value, expanded: Value, dim: int) -> tuple[Value, Dim]:
    """[..., G, 1, ...] expanded to [..., G, R, ...] and folded to [..., G * R, ...]."""
    groups = expanded.shape[: dim + 1]
    source = expanded.args[0]
    if expanded.ndim != value.ndim + 1 or source.ndim != expanded.ndim or not known_equal(source.shape[dim + 1], 1):
        return value, 1
    if not same_shape((*groups[:-1], *expanded.shape[dim + 2 :]), (*value.shape[:dim], *value.shape[dim + 1 :])):
        return value, 1
    once = canon.expand(source, _with(expanded.shape, dim + 1, 1))
    return canon.reshape(once, (*groups, *expanded.shape[dim + 2 :])), expanded.shape[dim + 1]


def _repeated_slices(value: Value, dim: int) -> tuple[Value, Dim]:
    """cat(x[0], x[0], x[1], x[1], ...), each a slice of one element."""
    first = value.args[0]
    source = first.args[0] if first.op == "slice" else first
    size, parts = source.shape[dim], len(value.args)
    if not isinstance(size, int) or size == 0 or parts % size or parts == size:
        return value, 1
    repeats = parts // size
    for place, part in enumerate(value.args):
        if part.op != "slice" or part.args[0] is not source or part.attrs["dim"] != dim:
            return value, 1
        if (part.attrs["start"], part.attrs["stop"]) != (place // repeats, place // repeats + 1):
            return value, 1
    return source, repeats


def _with(shape: Shape, dim: int, size: Dim) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])


def unscaled(canon: Canon, value: Value) -> tuple[Value, Literal | None]:
    """The value without a number that all of it was multiplied with, behind views and casts, and the number; None if there is none."""
    if value.op == "cast":
        inner, factor = unscaled(canon, value.args[0])
        return (value, None) if factor is None else (canon.cast(inner, value.attrs["dtype"]), factor)
    if value.op in _VIEWS:
        inner, factor = unscaled(canon, value.args[0])
        return (value, None) if factor is None else (_again(canon, value, inner), factor)
    if value.op == "mul":
        for number, other in (value.args, value.args[::-1]):
            factor = literal_of(number)
            if factor is not None and same_shape(other.shape, value.shape) and other.dtype == value.dtype:
                return other, factor
    return value, None


def _again(canon: Canon, view: Value, x: Value) -> Value:
    """The view, of another value of the same shape."""
    if view.op == "reshape":
        return canon.reshape(x, view.shape)
    if view.op == "expand":
        return canon.expand(x, view.shape)
    if view.op == "permute":
        return canon.permute(x, view.attrs["dims"])
    attrs = view.attrs
    return canon.slice(x, attrs["dim"], attrs["start"], attrs["stop"], attrs["step"], view.shape[attrs["dim"]])


def times(a: Literal, b: Literal) -> Literal | None:
    """The product of two numbers, or None if both are known at run time only."""
    if a.value is not None and b.value is not None:
        return Literal(a.value * a.scale * b.value * b.scale)
    if a.value is None and b.value is None:
        return None
    known, other = (a, b) if a.value is not None else (b, a)
    assert known.value is not None
    return Literal(None, other.source, other.scale * known.value * known.scale)
