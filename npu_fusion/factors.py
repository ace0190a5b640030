"""Dimensions as lists of factors: how views, and gathers by known indices, move the elements of a tensor, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    moves = (index != index[0]).nonzero()
    if int(index[0]) != 0 or moves.numel() == 0:
        return None
    step, size = int(moves[0]), int(index.max()) + 1
    wanted = torch.arange(index.numel()) // step % size
    return (step, size) if torch.equal(index, wanted) else None


def period(numbers: Tensor) -> tuple[int, Tensor]:
    """(step, table) of the shortest table for which `numbers[i]` is `table[(i // step) % len(table)]`."""
    count = numbers.numel()
    moves = (numbers != numbers[0]).nonzero()
    if moves.numel() == 0:
        return count, numbers[:1]
    step = int(moves[0])
    for length in range(2, count // step + 1):
        table = numbers[: step * length : step]
        if count % (step * length) == 0 and torch.equal(table[torch.arange(count) // step % length], numbers):
            return step, table
    return 1, numbers
