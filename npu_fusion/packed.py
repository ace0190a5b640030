"""Weights of four-bit numbers in words, laid out as `weight_only_linear` takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .factors import Factor
from .nibbles import LANES, NUMBERS, WORD_BITS, Places
from .view.canon import Canon
from .view.value import Value


def arranged(canon: Canon, places: Places, dims: Sequence[Sequence[Factor]]) -> Value | None:
    """The leaf, by reshape and permute, as a tensor with these dimensions, of factors along its axes; None where they do not make it up."""
    factors = [factor for dim in dims for factor in dim]
    leaf, axes = places.leaf, []
    for axis, size in enumerate(places.leaf.shape):
        own = sorted((factor for factor in factors if factor.axis == axis), key=lambda factor: -factor.stride)
        expected = 1
        for factor in reversed(own):
            if factor.stride != expected:
                return None
            expected *= factor.size
        if expected != size:
            return None
        axes += own
    if len(axes) != len(factors):
        return None
    order = [axes.index(factor) for factor in factors]
    apart = canon.reshape(leaf, tuple(factor.size for factor in axes))
    shape = tuple(math.prod(factor.size for factor in dim) for dim in dims)
    return canon.reshape(canon.permute(apart, order) if order else apart, shape)


@dataclass(frozen=True)
class Packed:
    """A matrix [N, K] of four-bit numbers in words, as `weight_only_linear` takes it.

    Attributes:
        words: [N, K / P] or [N / P, K].
        shifts: how far each of a word's P numbers lies above its lowest bit.
        packs_inputs: whether a word holds numbers of one row, or of one column.
        plane: words from one to the next of which the numbers of a word are apart.
        signed: whether the nibbles are two's complement.
        offset: what is subtracted from them.
    """

    words: Value
    shifts: tuple[int, ...]
    packs_inputs: bool
    plane: int
    signed: bool
    offset: int


def packed_matrix(canon: Canon, places: Places) -> Packed | None:
    """A matrix [N, K] of nibbles, each of which stands in one element; None where some are missing, repeated or not whole numbers."""
    numbers = _meaning(places.numbers or ())
    lanes = [(dim, at) for dim, factors in enumerate(places.dims) for at, factor in enumerate(factors) if factor.axis == LANES]
    bits = WORD_BITS.get(places.leaf.dtype) if places.leaf.dtype is not None else None
    if numbers is None or len(places.dims) != 2 or len(lanes) != 1 or bits not in (8, 32):
        return None
    (dim, at), shifts = lanes[0], places.shifts
    factor = places.dims[dim][at]
    if sorted(shifts) != list(range(0, bits, 4)) or (factor.size, factor.stride) != (len(shifts), 1):
        return None
    inner = places.dims[dim][at + 1 :]
    without = [[f for f in d if f is not factor] for d in places.dims]
    words = arranged(canon, places, without)
    if words is None:
        return None
    return Packed(words, shifts, dim == 1, math.prod(f.size for f in inner), *numbers)


def _meaning(numbers: Sequence[float]) -> tuple[bool, int] | None:
    """(signed, offset) where number n is the nibble n, in two's complement if signed, less the offset."""
    if len(numbers) != NUMBERS or not all(float(n).is_integer() for n in numbers):
        return None
    for signed in (False, True):
        offset = -int(numbers[0])
        if all(number == ((n ^ 8) - 8 if signed else n) - offset for n, number in enumerate(numbers)):
            return signed, offset
    return None
