"""Tiles of rows that are sorted into groups: which group, and which of its rows, a tile has. Read on the device, of the groups' counts."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import power_of_2


@triton.jit
def group_tiles(counts_ptr, GROUPS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """For each lane a group: its number, its rows, the rows up to its end, and the tiles of ROWS rows up to its end."""
    lane = tl.arange(0, LANES)
    counts = tl.load(counts_ptr + lane, mask=lane < GROUPS, other=0)
    upto = tl.cumsum(counts, axis=0)
    tiles_upto = tl.cumsum((counts + ROWS - 1) // ROWS, axis=0)
    return lane, counts, upto, tiles_upto


@triton.jit
def _pick(values, lane, at):
    """The element `at` of a vector in registers."""
    return tl.sum(tl.where(lane == at, values, 0), axis=0)


@triton.jit
def tile_of_group(tile, lane, counts, upto, tiles_upto, ROWS: tl.constexpr):
    """The group of a tile, its first row, and the end of the group's rows."""
    group = tl.sum((tiles_upto <= tile).to(tl.int32), axis=0)
    own = (_pick(counts, lane, group) + ROWS - 1) // ROWS
    end = _pick(upto, lane, group)
    within = tile - (_pick(tiles_upto, lane, group) - own)
    return group, end - _pick(counts, lane, group) + within * ROWS, end


def group_lanes(groups: int) -> int:
    """LANES of the kernels."""
    return max(power_of_2(groups), 16)


def group_tile(rows: int, groups: int) -> tuple[int, int]:
    """Rows of a tile, 16 to 128 as the groups have on average, and how many tiles there are at most."""
    tile = min(max(power_of_2(-(-rows // groups)), 16), 128)
    return tile, min(-(-rows // tile) + groups, rows)
