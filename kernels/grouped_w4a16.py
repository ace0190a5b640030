"""Products of rows, sorted into groups, with the four-bit matrix of each row's group; words in the layout of w4a16.py, a stack of them.

W[g, k, n] = (q - zeros[g, k // GROUP, n]) * scales[g, k // GROUP, n], rounded to the dtype of the rows before it multiplies.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .groups import group_lanes, group_tile, group_tiles, tile_of_group
from .launch import Device, Launch, cube_grid, power_of_2, product_columns
from .w4a16 import load_columns, nibble_places, plane_rows


@triton.jit
def grouped_w4a16_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    counts_ptr,
    y_ptr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y [rows, OUTPUTS] of x [rows, INPUTS], both contiguous; counts int32 [GROUPS], how many rows each group has.

    Words [GROUPS, INPUTS / 8, OUTPUTS], scales and zeros [GROUPS, INPUTS / GROUP, OUTPUTS]; without zeros 8 is subtracted. A step
    multiplies by the weights of PLACES nibbles of PLANE words a column. Tiles go by columns first.
    """
    columns: tl.constexpr = (OUTPUTS + BLOCK - 1) // BLOCK
    lane, counts, upto, tiles_upto = group_tiles(counts_ptr, GROUPS, LANES, ROWS)
    tiles_down = tl.max(tiles_upto, axis=0)
    for tile in range(tl.program_id(0), tiles_down * columns, tl.num_programs(0)):
        column = tile // tiles_down * BLOCK
        group, row, end = tile_of_group(tile % tiles_down, lane, counts, upto, tiles_upto, ROWS)
        m = tl.arange(0, ROWS)
        n = column + tl.arange(0, BLOCK)
        j = tl.arange(0, PLANE)
        k = tl.arange(0, PLACES * PLANE)
        at_x = x_ptr + row.to(tl.int64) * INPUTS + (m[:, None] * INPUTS + k[None, :])
        words_of = words_ptr + group.to(tl.int64) * (INPUTS // 8 * OUTPUTS)
        scales_at = group * (INPUTS // GROUP * OUTPUTS)
        known = (row + m < end)[:, None]
        mask, inverse = nibble_places(PLACES)
        sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for block in range(INPUTS // (8 * PLANE)):
            at = block * (PLANE * OUTPUTS) + (j[:, None] * OUTPUTS + n[None, :])
            if OUTPUTS % BLOCK == 0:
                words = tl.load(words_of + at)
            else:
                words = tl.load(words_of + at, mask=n[None, :] < OUTPUTS, other=0)
            scale_at = scales_at + block * (8 * PLANE) // GROUP * OUTPUTS + n
            scale = load_columns(scales_ptr, scale_at, n, OUTPUTS, BLOCK)[None, None, :]
            zero = tl.full((1, 1, 1), 8.0, dtype=tl.float32)
            if zeros_ptr is not None:
                zero = load_columns(zeros_ptr, scale_at, n, OUTPUTS, BLOCK)[None, None, :]
            for part in tl.static_range(8 // PLACES):
                x = tl.load(at_x + block * (8 * PLANE) + part * (PLACES * PLANE), mask=known, other=0.0)
                q = ((words >> (4 * PLACES * part))[None, :, :] & mask).to(tl.float32) * inverse
                w = tl.reshape((q - zero) * scale, (PLACES * PLANE, BLOCK))
                sums = tl.dot(x, w.to(x.dtype), sums)
        at = y_ptr + row.to(tl.int64) * OUTPUTS + (m[:, None] * OUTPUTS + n[None, :])
        tl.store(at, sums.to(y_ptr.dtype.element_ty), mask=known & (n < OUTPUTS)[None, :])


def grouped_w4a16_launch(rows: int, groups: int, inputs: int, outputs: int, group: int, device: Device) -> Launch:
    """`grouped_w4a16_kernel` for [rows, inputs] by `groups` matrices [inputs, outputs], of which `group` inputs share a scale."""
    tile_rows, tiles_down = group_tile(rows, groups)
    options: dict[str, Any] = {}
    if device.kind == "npu":
        block = min(64, max(16, power_of_2(outputs)))
    else:
        block = product_columns(tiles_down, outputs, device)
        options = {"num_warps": 8 if tile_rows == 128 else 4, "num_stages": 4}
    layer = {"GROUPS": groups, "LANES": group_lanes(groups), "INPUTS": inputs, "OUTPUTS": outputs, "GROUP": group}
    tile = {"PLANE": plane_rows(inputs, group), "PLACES": 4, "ROWS": tile_rows, "BLOCK": block}
    return Launch(grouped_w4a16_kernel, cube_grid(tiles_down * -(-outputs // block), device), {**layer, **tile}, options)
