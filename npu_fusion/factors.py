"""Dimensions as lists of factors: how views, and gathers by known indices, move the elements of a tensor, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

MOST_LANES = 64
"""Of longer tables no period is looked for."""


@dataclass(frozen=True)
class Factor:
    """A factor of a dimension: `size` steps of `stride` along an axis of the leaf, through the lanes, or (axis None) through copies."""

    size: int
    axis: int | None
    stride: int = 0

    def split(self, outer: int) -> tuple[Factor, Factor]:
        inner = self.size // outer
        return Factor(outer, self.axis, self.stride * inner), Factor(inner, self.axis, self.stride)


Dims = tuple[tuple[Factor, ...], ...]


def merged(dim: Sequence[Factor]) -> tuple[Factor, ...]:
    """The dimension with factors joined that run on into one another."""
    merged: list[Factor] = []
    for factor in dim:
        last = merged[-1] if merged else None
        if factor.size == 1:
            continue
        if last is not None and last.axis == factor.axis and (factor.axis is None or last.stride == factor.stride * factor.size):
            merged[-1] = Factor(last.size * factor.size, factor.axis, factor.stride)
        else:
            merged.append(factor)
    return tuple(merged)


def regrouped(factors: Sequence[Factor], shape: Sequence[int]) -> list[list[Factor]] | None:
    """A row-major list of factors as the dimensions of a shape of as many elements; None where a size cuts a factor unevenly."""
    left = list(reversed(factors))
    dims: list[list[Factor]] = []
    for size in shape:
        dim: list[Factor] = []
        while size > 1:
            if not left:
                return None
            factor = left.pop()
            if size % factor.size:
                if factor.size % size:
                    return None
                factor, rest = factor.split(size)
                left.append(rest)
            dim.append(factor)
            size //= factor.size
        dims.append(dim)
    return dims if not left else None


def run(index: Tensor) -> tuple[int, int] | None:
    """(step, size) where `index[i]` is `(i // step) % size` for all i; None for other indices."""
    numbers: list[int] = index.tolist()
    step = _first_other(numbers)
    if numbers[0] != 0 or step == len(numbers):
        return None
    size = max(numbers) + 1
    return (step, size) if size <= len(numbers) // step and _repeats(numbers, list(range(size)), step) else None


def period(table: Tensor) -> tuple[int, list[int]]:
    """(step, shortest) where `table[i]` is `shortest[(i // step) % len(shortest)]`; for longer ones than `MOST_LANES` the table."""
    numbers: list[int] = table.tolist()
    step = _first_other(numbers)
    for length in range(1, min(len(numbers) // step, MOST_LANES) + 1):
        shortest = numbers[: step * length : step]
        if _repeats(numbers, shortest, step):
            return step, shortest
    return 1, numbers


def _first_other(numbers: list[int]) -> int:
    """The first place of another number than the first one; their count where there is none."""
    return next((i for i, number in enumerate(numbers) if number != numbers[0]), len(numbers))


def _repeats(numbers: list[int], table: list[int], step: int) -> bool:
    """Whether the numbers are those of the table, each `step` times, again and again to the end."""
    times, rest = divmod(len(numbers), step * len(table))
    return not rest and [number for number in table for _ in range(step)] * times == numbers
