"""Products of int8 rows, sorted into groups, with the int8 matrix of each row's group: exact sums, scaled by row and by column.

y[r] = (x[r] W[g]) * row_scale[r] * column_scale[g], where g is the group of row r. How many rows a group has is read on the device, so
that neither sizes nor the number of programs depend on it; a tile of rows lies in one group. Rows behind the last group are not written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .groups import group_lanes, group_tile, group_tiles, tile_of_group
from .launch import Device, Launch, cube_grid, power_of_2, product_columns


@triton.jit
def grouped_int8_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    counts_ptr,
    y_ptr,
    weight_stride,
    group_stride,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ALONG_INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y [rows, OUTPUTS] of x [rows, INPUTS], both contiguous; counts int32 [GROUPS], how many rows each group has.

    Weights of one column lie side by side ALONG_INPUTS, else those of one input; `weight_stride` is from one column, or input, to the next,
    `group_stride` from one matrix to the next. Tiles go by columns first, so that neighbours share weights where a group has many rows.
    """
    columns: tl.constexpr = (OUTPUTS + BLOCK - 1) // BLOCK
    lane, counts, upto, tiles_upto = group_tiles(counts_ptr, GROUPS, LANES, ROWS)
    tiles_down = tl.max(tiles_upto, axis=0)
    for tile in range(tl.program_id(0), tiles_down * columns, tl.num_programs(0)):
        column = tile // tiles_down * BLOCK
        group, row, end = tile_of_group(tile % tiles_down, lane, counts, upto, tiles_upto, ROWS)
        m = row + tl.arange(0, ROWS)
        n = column + tl.arange(0, BLOCK)
        k = tl.arange(0, DEPTH)
        at_x = x_ptr + row.to(tl.int64) * INPUTS + (tl.arange(0, ROWS)[:, None] * INPUTS + k[None, :])
        matrix = weight_ptr + group.to(tl.int64) * group_stride
        if ALONG_INPUTS:
            at_w = matrix + column.to(tl.int64) * weight_stride + (tl.arange(0, BLOCK)[:, None] * weight_stride + k[None, :])
            step = tl.full((), DEPTH, dtype=tl.int64)
        else:
            at_w = matrix + (k[:, None] * weight_stride + n[None, :])
            step = tl.full((), DEPTH, dtype=tl.int64) * weight_stride
        sums = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
        for block in range((INPUTS + DEPTH - 1) // DEPTH):
            known = block * DEPTH + k < INPUTS
            x = tl.load(at_x + block * DEPTH, mask=(m < end)[:, None] & known[None, :], other=0)
            if ALONG_INPUTS:
                w = tl.trans(tl.load(at_w + block * step, mask=(n < OUTPUTS)[:, None] & known[None, :], other=0))
            else:
                w = tl.load(at_w + block * step, mask=known[:, None] & (n < OUTPUTS)[None, :], other=0)
            sums = tl.dot(x, w, sums, out_dtype=tl.int32)
        of_columns = tl.load(weight_scale_ptr + group * OUTPUTS + n, mask=n < OUTPUTS, other=0).to(tl.float32)
        of_rows = tl.load(x_scale_ptr + m, mask=m < end, other=0)
        y = sums.to(tl.float32) * of_columns[None, :] * of_rows[:, None]
        at = y_ptr + row.to(tl.int64) * OUTPUTS + (tl.arange(0, ROWS)[:, None] * OUTPUTS + n[None, :])
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(m < end)[:, None] & (n < OUTPUTS)[None, :])


def grouped_int8_launch(rows: int, groups: int, inputs: int, outputs: int, device: Device, *, along_inputs: bool) -> Launch:
    """`grouped_int8_kernel` for [rows, inputs] by `groups` matrices [inputs, outputs].

    Args:
        along_inputs: whether the matrices lie [outputs, inputs].
    """
    tile_rows, tiles_down = group_tile(rows, groups)
    options: dict[str, Any] = {}
    if device.kind == "npu":
        block, depth = min(128, max(32, power_of_2(outputs))), 256
    else:
        block = max(product_columns(tiles_down, outputs, device), 32 if along_inputs else 64)
        depth = 256 if tile_rows < 64 else 128
        options = {"num_warps": max(tile_rows // 16, 4), "num_stages": 4 if tile_rows < 64 else 3}
    depth = min(depth, max(32, power_of_2(inputs)))
    layer = {"GROUPS": groups, "LANES": group_lanes(groups), "INPUTS": inputs, "OUTPUTS": outputs, "ALONG_INPUTS": along_inputs}
    grid = cube_grid(tiles_down * -(-outputs // block), device)
    return Launch(grouped_int8_kernel, grid, {**layer, "ROWS": tile_rows, "BLOCK": block, "DEPTH": depth}, options)
