"""Four-bit numbers packed into words: which nibble of which word each element of an unpacked tensor is, and what number it becomes.

Authors unpack in many ways: shifts by a range, in a loop, or from a table; masks before or after them; remainders; an order of nibbles by
index, by reshape or by stack; planes one behind the other. `Reader` runs the computation on *places* instead of numbers. A dimension is a
list of factors, each of which runs through an axis of the words, through the nibbles of a word, or through copies, so that every view,
gather by known indices and concatenation is exact arithmetic on factors. Elementwise arithmetic on a nibble is a table of sixteen numbers,
which PyTorch itself computes. Whatever is not understood is a leaf: nothing is guessed.

The same reading of views, without arithmetic, tells how a scale or zero point is spread over a weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .constants import constant_tensor
from .factors import Dims, Factor, merged, period, regrouped, run
from .torch_private import without_fake
from .view.value import Dim, Value

NIBBLE = 15
NUMBERS = 16
WORD_BITS = {torch.int32: 32, torch.int64: 64, torch.int16: 16, torch.int8: 8, torch.uint8: 8}  # bits of an element
VIEWS = ("reshape", "permute", "expand", "index", "index_select")
LANES = -1
"""The axis of a factor that runs through the nibbles of a word."""

_FILLS = frozenset({"slice_scatter:default", "slice_scatter", "select_scatter"})
_AND = frozenset({"__and__", "bitwise_and", "bitwise_and:Scalar", "bitwise_and:Tensor"})
_RIGHT = frozenset({"__rshift__", "bitwise_right_shift"})
_LEFT = frozenset({"__lshift__", "bitwise_left_shift"})
_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(_AND, torch.bitwise_and),
    **dict.fromkeys(_RIGHT, torch.bitwise_right_shift),
    **dict.fromkeys(_LEFT, torch.bitwise_left_shift),
    **dict.fromkeys(("__or__", "bitwise_or", "bitwise_or:Scalar", "bitwise_or:Tensor"), torch.bitwise_or),
    **dict.fromkeys(("__xor__", "bitwise_xor"), torch.bitwise_xor),
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "remainder": torch.remainder,
    "floor_divide": torch.floor_divide,
    "lt": torch.lt,
    "le": torch.le,
    "where": torch.where,
}


# -------------------------------------------------------------------- places


@dataclass(frozen=True)
class Places:
    """What each element of a tensor is: bits of an element of `leaf`, or a number that depends on four of these.

    The element at some index is made of the word where the index leads (`dims`), and of bits `shifts[lane]` to `tops[lane]` of it. As long
    as `numbers` is None it is that field, times `2 ** low`, continued upwards by its sign where `signed`; where `dirty`, other bits stand
    below. Otherwise the field is a nibble n, and the element is `numbers[n]`.
    """

    leaf: Value
    dims: Dims
    dtype: torch.dtype
    shifts: tuple[int, ...] = (0,)
    tops: tuple[int, ...] = (0,)
    low: int = 0
    signed: bool = False
    dirty: bool = False
    numbers: tuple[float, ...] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(factor.size for factor in dim) for dim in self.dims)

    def moved(self, dims: Iterable[Sequence[Factor]]) -> Places:
        return dataclasses.replace(self, dims=tuple(merged(dim) for dim in dims))

    def same_places(self, other: Places) -> bool:
        return (self.leaf, self.dims, self.shifts) == (other.leaf, other.dims, other.shifts)


# -------------------------------------------------------------------- reading


class Reader:
    """Reads values, each once: `nibbles` understands arithmetic too, `spread` views alone."""

    def nibbles(self, value: Value) -> Places | None:
        """The places of a tensor every element of which is a function of a nibble; None for all others."""
        with without_fake():
            places = self._read(value, arithmetic=True)
        return places if places is not None and places.numbers is not None else None

    def spread(self, value: Value) -> Places | None:
        """How a tensor is made by views of another one, its leaf; None where sizes are symbolic."""
        with without_fake():
            return self._read(value, arithmetic=False)

    def _read(self, value: Value, arithmetic: bool) -> Places | None:
        key = "places after arithmetic" if arithmetic else "places"
        if key not in value.notes:
            moved = self._moved(value, arithmetic)
            if moved is None and arithmetic:
                moved = self._computed(value)
            if moved is not None and moved.sizes != value.shape:
                moved = None
            value.notes[key] = moved or _leaf(value)
        places: Places | None = value.notes[key]
        return places

    # ---------------------------------------------------------------- views

    def _moved(self, value: Value, arithmetic: bool) -> Places | None:
        if arithmetic and value.op in ("cat", "interleave"):
            dim = value.attrs.get("dim", value.ndim - 1)
            return self._joined(value.args, dim, "inside" if value.op == "interleave" else "outside")
        if arithmetic and value.op in _FILLS:
            return self._filled(value)
        if value.op not in VIEWS:
            return None
        inner = self._read(value.args[0], arithmetic)
        return None if inner is None else viewed(inner, value)

    def _joined(self, parts: Sequence[Value], dim: int, how: str) -> Places | None:
        """Parts that differ in their lanes only, one after the other ("outside") or by turns ("inside"), or along a "new" dimension."""
        read = [self._read(part, arithmetic=True) for part in parts]
        first = read[0]
        if first is None or any(r is None or not _are_lanes_of(r, first) for r in read):
            return None
        added = Factor(len(parts), LANES, len(first.shifts))
        old = () if how == "new" else first.dims[dim]
        joined = (*old, added) if how == "inside" else (added, *old)
        tables = {name: tuple(n for r in read for n in getattr(r, name)) for name in ("shifts", "tops")}
        after = first.dims[dim if how == "new" else dim + 1 :]
        return dataclasses.replace(first, **tables).moved([*first.dims[:dim], joined, *after])  # type: ignore[arg-type]

    def _filled(self, value: Value) -> Places | None:
        """A buffer that is written to place by place, as in `out[:, i::8] = part` or `out[..., i] = part`, until nothing of it is left."""
        written: dict[int, Value] = {}
        at, dim, count = value, value.attrs["dim"] % value.ndim, 0
        while at.op == value.op and at.attrs["dim"] % value.ndim == dim:
            size = at.shape[dim]
            start = at.attrs["index"] if at.op == "select_scatter" else at.attrs["start"] or 0
            step = size if at.op == "select_scatter" else at.attrs["step"]
            part, whole = at.args[1], at.op == "select_scatter" or at.attrs["end"] in (None, size) or at.attrs["end"] >= 2**31
            if type(size) is not int or type(step) is not int or count not in (0, step) or not whole or part.dtype != value.dtype:
                return None
            if type(start) is not int or not 0 <= start < step or size % step or len(at.args) != 2:
                return None
            count = step
            written.setdefault(start, part)
            at = at.args[0]
        if len(written) != count:
            return None
        return self._joined([written[i] for i in range(count)], dim, "new" if value.op == "select_scatter" else "inside")

    # ---------------------------------------------------------------- arithmetic

    def _computed(self, value: Value) -> Places | None:
        if value.dtype is None or (value.op != "cast" and value.op not in _ELEMENTWISE):
            return None
        shifts = value.op in _RIGHT or value.op in _LEFT
        constants = [constant_tensor(arg, may_read=shifts and arg is not value.args[0]) for arg in value.args]
        if value.dtype.is_floating_point and sum(constant is None for constant in constants) != 1:
            return None  # a nibble is a number by then, or never
        operands: list[Any] = [self._operand(*pair, value) for pair in zip(value.args, constants, strict=True)]
        operands += [value.attrs[name] for name in ("other",) if name in value.attrs]
        places = next((operand for operand in operands if isinstance(operand, Places)), None)
        if places is None or any(operand is None for operand in operands):
            return None
        if value.op in _AND and operands[0] is not places:
            operands.reverse()
        if places.numbers is None and isinstance(operands[0], Places):
            return _on_field(value, operands[0], operands[1] if len(operands) > 1 else None)
        if any(isinstance(operand, Tensor) for operand in operands):
            return None
        return _on_numbers(value, places, operands)

    def _operand(self, arg: Value, constant: Tensor | None, user: Value) -> Places | Tensor | float | None:
        """An operand as it broadcasts to its user: places, or a constant: a number where it is one."""
        if constant is not None:
            same = constant.numel() > 0 and bool((constant == constant.flatten()[0]).all())
            return constant.flatten()[0].item() if same else constant
        places = self._read(arg, arithmetic=True)
        return None if places is None else expanded(places, user.shape)


def _leaf(value: Value) -> Places | None:
    """The value as it is."""
    if value.dtype is None or not all(type(size) is int for size in value.shape):
        return None
    dims = tuple(merged([Factor(size, axis, 1)]) for axis, size in enumerate(value.shape))
    return Places(value, dims, value.dtype, tops=(WORD_BITS.get(value.dtype, 0),), signed=value.dtype.is_signed)


def viewed(inner: Places, value: Value) -> Places | None:
    """The places of a view (one of `VIEWS`, or a cast) of a tensor that has the places `inner`; None where sizes are symbolic or uneven."""
    if value.op == "cast":
        return inner
    if not all(type(size) is int for size in value.shape):
        return None
    if value.op == "reshape":
        dims = regrouped([factor for dim in inner.dims for factor in dim], value.shape)
        return None if dims is None else inner.moved(dims)
    if value.op == "permute":
        return inner.moved(inner.dims[d] for d in value.attrs["dims"])
    if value.op == "expand":
        return expanded(inner, value.shape)
    with without_fake():
        return _gathered(inner, value)


def _are_lanes_of(part: Places, first: Places) -> bool:
    alike = ("leaf", "dims", "dtype", "low", "signed", "dirty", "numbers")
    return len(part.shifts) == len(first.shifts) and all(getattr(part, name) == getattr(first, name) for name in alike)


def expanded(places: Places, shape: Sequence[Dim]) -> Places | None:
    """The places as they broadcast to a shape."""
    if not all(type(size) is int for size in shape):
        return None
    dims: list[tuple[Factor, ...]] = [()] * (len(shape) - len(places.dims)) + list(places.dims)
    sizes = (1,) * (len(shape) - len(places.dims)) + places.sizes
    if any(size not in (1, wanted) for size, wanted in zip(sizes, shape, strict=True)):
        return None
    spread = zip(dims, sizes, shape, strict=True)
    return places.moved((Factor(int(wanted), None),) if size != wanted else dim for dim, size, wanted in spread)


def _gathered(inner: Places, value: Value) -> Places | None:
    """Elements along one dimension by indices that are known."""
    if value.op == "index_select":
        dim, places = int(value.attrs["dim"]), 1
    else:
        which = value.attrs.get("@indices", ())
        dim, places = (which.index(True), sum(which)) if True in which else (0, 0)
    index = constant_tensor(value.args[1], may_read=True) if places == 1 and len(value.args) == 2 else None
    if index is None or index.dim() != 1 or index.dtype not in WORD_BITS or index.numel() == 0:
        return None
    dim %= len(inner.dims)
    index = torch.where(index < 0, index + inner.sizes[dim], index).long()
    if not bool(((index >= 0) & (index < inner.sizes[dim])).all()):
        return None
    found = _indexed(inner, dim, index)
    return None if found is None else found[0].moved([*inner.dims[:dim], found[1], *inner.dims[dim + 1 :]])


def _indexed(inner: Places, dim: int, index: Tensor) -> tuple[Places, list[Factor]] | None:
    """The dimension that the indices make of dimension `dim`, and the places with the lanes in their order."""
    pieces: list[tuple[int, Factor]] = []  # (step along the new dimension, factor)
    below = inner.sizes[dim]
    for factor in inner.dims[dim]:
        below //= factor.size
        along = index // below % factor.size
        if factor.axis == LANES:
            whole = factor.size == len(inner.shifts) and sum(f.axis == LANES for d in inner.dims for f in d) == 1
            step, table = period(along)
            if not whole:
                return None
            lanes = {name: tuple(getattr(inner, name)[i] for i in table) for name in ("shifts", "tops")}
            inner = dataclasses.replace(inner, **lanes)  # type: ignore[arg-type]
            pieces.append((step, Factor(len(table), LANES, 1)))
        elif factor.axis is not None:
            found = run(along)
            if found is None or found[1] != factor.size:
                return None
            pieces.append((found[0], factor))
    new: list[Factor] = []
    left = index.numel()
    for step, factor in sorted(pieces, key=lambda piece: -piece[0]):
        if left % (step * factor.size):
            return None
        new += [Factor(left // (step * factor.size), None), factor]
        left = step
    return inner, [*new, Factor(left, None)]


# -------------------------------------------------------------------- arithmetic on bits


def _on_field(value: Value, x: Places, other: object) -> Places | None:
    """A field of bits, cast, shifted or masked; None for other arithmetic."""
    width, to = WORD_BITS.get(x.dtype), value.dtype
    if width is None or to is None:
        return None
    if value.op == "cast":
        return _cast(x, to)
    whole = isinstance(other, int) and not isinstance(other, bool)
    if value.op in _RIGHT or value.op in _LEFT or value.op == "floor_divide":
        x = x if x.dtype == to else _cast(x, to) or x
    if value.op in _RIGHT or value.op in _LEFT:
        return _shifted(value, x, other) if x.dtype == to else None
    if value.op == "floor_divide":
        powers = _powers(other)
        return None if powers is None or x.dtype != to else _shifted(value, x, powers)
    if not whole or to != x.dtype:
        return None
    if value.op == "remainder" and other == NUMBERS:
        return _masked(x, NIBBLE, to)
    return _masked(x, int(other) % (1 << WORD_BITS[to]), to) if value.op in _AND else None  # type: ignore[call-overload]


def _powers(of: object) -> Tensor | int | None:
    """By how much a whole power of two shifts; None for other divisors."""
    if not isinstance(of, Tensor | int):
        return None
    divisor = torch.as_tensor(of)
    if divisor.is_floating_point() or not bool((divisor > 0).all()):
        return None
    powers = divisor.double().log2().round().long()
    if not torch.equal(torch.ones_like(powers) << powers, divisor.long()):
        return None
    return powers if divisor.dim() else int(powers)


def _cast(x: Places, to: torch.dtype) -> Places | None:
    width = WORD_BITS.get(to)
    if width is None:
        return None
    tops = tuple(min(top, shift + width - x.low) for shift, top in zip(x.shifts, x.tops, strict=True))
    if width < WORD_BITS[x.dtype] or to.is_signed != x.dtype.is_signed:
        fills = all(top == shift + width - x.low for shift, top in zip(x.shifts, tops, strict=True))
        if fills:
            return _settled(dataclasses.replace(x, dtype=to, tops=tops, signed=to.is_signed))
        if x.signed and not to.is_signed:
            return None
    return dataclasses.replace(x, dtype=to, tops=tops)


def _shifted(value: Value, x: Places, by: object) -> Places | None:
    """Shifted by a number, or by a table along one dimension, which so runs through the lanes."""
    if isinstance(by, Tensor):
        spread = _with_lanes(x, by)
        if spread is None:
            return None
        x, table = spread
    else:
        table = (int(by),) * len(x.shifts)  # type: ignore[call-overload]
    width = WORD_BITS[x.dtype]
    if any(not 0 <= n < width for n in table):
        return None
    if value.op in _LEFT:
        return _left(x, table[0], width) if len(set(table)) == 1 else _left_by_lane(x, table, width)
    down = [n - x.low for n in table]
    if x.low and len(set(down)) != 1:
        return None
    low = max(-down[0], 0) if x.low else 0
    shifts = tuple(shift + max(n, 0) for shift, n in zip(x.shifts, down, strict=True))
    if any(shift >= top for shift, top in zip(shifts, x.tops, strict=True)):
        return None
    return _settled(dataclasses.replace(x, shifts=shifts, low=low, dirty=x.dirty and low > 0))


def _left(x: Places, by: int, width: int) -> Places:
    low = x.low + by
    cut = tuple(shift + width - low for shift in x.shifts)
    tops = tuple(map(min, x.tops, cut))
    fills = all(top >= c for top, c in zip(x.tops, cut, strict=True))
    return dataclasses.replace(x, low=low, tops=tops, signed=x.dtype.is_signed if fills else x.signed)


def _left_by_lane(x: Places, table: Sequence[int], width: int) -> Places | None:
    """Each lane pushed up by another number, as in `(w << (28 - shift)) >> 28`: kept of each are as many of the top bits as all have."""
    tops = tuple(shift + width - x.low - by for shift, by in zip(x.shifts, table, strict=True))
    if x.low or any(top > old for top, old in zip(tops, x.tops, strict=True)):
        return None
    least = min(top - shift for shift, top in zip(x.shifts, tops, strict=True))
    if least < 4:
        return None
    shifts = tuple(top - least for top in tops)
    return dataclasses.replace(x, shifts=shifts, tops=tops, low=width - least, signed=x.dtype.is_signed, dirty=True)


def _with_lanes(x: Places, by: Tensor) -> tuple[Places, tuple[int, ...]] | None:
    """The places with lanes for a table of shifts that varies along one dimension, of whose factors the table's part must be copies."""
    shape = (1,) * (len(x.dims) - by.dim()) + tuple(by.shape)
    varying = [dim for dim, size in enumerate(shape) if size > 1]
    if by.dtype not in WORD_BITS or len(varying) != 1 or len(x.shifts) != 1 or len(shape) != len(x.dims):
        return None
    dim = varying[0]
    step, table = period(by.flatten())
    if shape[dim] != x.sizes[dim]:
        return None
    outer = x.sizes[dim] // (step * len(table))
    apart = regrouped(x.dims[dim], (outer, len(table), step))
    if apart is None or any(factor.axis is not None for factor in apart[1]):
        return None
    lanes = dataclasses.replace(x, shifts=x.shifts * len(table), tops=x.tops * len(table))
    new = [*apart[0], Factor(len(table), LANES, 1), *apart[2]]
    return lanes.moved([*x.dims[:dim], new, *x.dims[dim + 1 :]]), tuple(table)


def _masked(x: Places, mask: int, to: torch.dtype) -> Places | None:
    """A field under a mask: of a nibble's width the numbers of that nibble, of another one a narrower field."""
    if mask == 0:
        return None
    start = (mask & -mask).bit_length() - 1
    length = (mask >> start).bit_length()
    if mask != ((1 << length) - 1) << start or start < x.low or length < 4:
        return None
    shifts = tuple(shift + start - x.low for shift in x.shifts)
    tops = tuple(shift + length for shift in shifts)
    if any(top > old for top, old in zip(tops, x.tops, strict=True)):
        return None
    signed = to.is_signed and start + length == WORD_BITS[to]
    return _settled(dataclasses.replace(x, shifts=shifts, tops=tops, low=start, signed=signed, dirty=False))


def _settled(x: Places) -> Places:
    """A field of four bits is a nibble, and its numbers are known."""
    if x.numbers is not None or x.dirty or any(top - shift != 4 for shift, top in zip(x.shifts, x.tops, strict=True)):
        return x
    plain = range(NUMBERS)
    numbers = tuple(float(((n ^ 8) - 8 if x.signed else n) << x.low) for n in plain)
    return dataclasses.replace(x, numbers=numbers, low=0, signed=False)


def _on_numbers(value: Value, places: Places, operands: Sequence[object]) -> Places | None:
    """Arithmetic on nibbles: computed for the sixteen."""
    given: list[Tensor] = []
    for operand in operands:
        if not isinstance(operand, Places):
            given.append(torch.tensor(operand))
        elif operand.numbers is not None and operand.same_places(places):
            given.append(torch.tensor(operand.numbers, dtype=torch.float64).to(operand.dtype))
        else:
            return None
    result: Tensor = given[0].to(value.dtype) if value.op == "cast" else _ELEMENTWISE[value.op](*given)
    if result.dtype != value.dtype or result.dim() != 1:
        return None
    return dataclasses.replace(places, numbers=tuple(result.double().tolist()), dtype=result.dtype)
