"""Products of int8 matrices with int32 sums, and what makes numbers of them: scales of rows and of columns, a zero point, a bias.

y = (x W - x_zero * column_sums(W) + bias) * x_scale * weight_scale, or with the bias added at the end. Sums are exact; everything after
them is fp32, rounded once. The weights lie [K, N] or [N, K], as their strides say.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import Device, Launch, cube_grid, power_of_2, product_columns

MOST_INPUTS = (2**31 - 1) // 128**2
"""So many products of int8 add up within int32."""


@triton.jit
def _load_by(ptr, at, size, PER_ITEM: tl.constexpr):
    """The elements `at` of a vector of that size; its one element where it is not PER_ITEM."""
    if PER_ITEM:
        values = tl.load(ptr + at, mask=at < size, other=0)
    else:
        values = tl.load(ptr + at * 0)
    return values


@triton.jit
def int8_matmul_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    x_zero_ptr,
    weight_sum_ptr,
    bias_ptr,
    y_ptr,
    rows,
    x_stride,
    weight_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ALONG_INPUTS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    COLUMN_SCALES: tl.constexpr,
    ROW_ZEROS: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """y [rows, OUTPUTS], contiguous.

    Weights of one column lie side by side ALONG_INPUTS, else those of one input; `weight_stride` is from one column, or input, to the next.
    BAND rows of tiles are dealt out together, so that they share weights.
    """
    columns: tl.constexpr = (OUTPUTS + BLOCK - 1) // BLOCK
    tiles_down = tl.cdiv(rows, ROWS)
    for tile in range(tl.program_id(0), tiles_down * columns, tl.num_programs(0)):
        first = tile // (BAND * columns) * BAND
        height = tl.minimum(tiles_down - first, BAND)
        within = tile % (BAND * columns)
        row = (first + within % height) * ROWS
        column = within // height * BLOCK
        m = row + tl.arange(0, ROWS)
        n = column + tl.arange(0, BLOCK)
        k = tl.arange(0, DEPTH)
        at_x = x_ptr + row.to(tl.int64) * x_stride + (tl.arange(0, ROWS)[:, None] * x_stride + k[None, :])
        if ALONG_INPUTS:
            at_w = weight_ptr + column.to(tl.int64) * weight_stride + (tl.arange(0, BLOCK)[:, None] * weight_stride + k[None, :])
            step = tl.full((), DEPTH, dtype=tl.int64)
        else:
            at_w = weight_ptr + (k[:, None] * weight_stride + n[None, :])
            step = tl.full((), DEPTH, dtype=tl.int64) * weight_stride
        sums = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
        for block in range((INPUTS + DEPTH - 1) // DEPTH):
            known = block * DEPTH + k < INPUTS
            if INPUTS % DEPTH == 0:
                x = tl.load(at_x + block * DEPTH, mask=(m < rows)[:, None], other=0)
            else:
                x = tl.load(at_x + block * DEPTH, mask=(m < rows)[:, None] & known[None, :], other=0)
            if ALONG_INPUTS:
                if INPUTS % DEPTH == 0:
                    w = tl.trans(tl.load(at_w + block * step, mask=(n < OUTPUTS)[:, None], other=0))
                else:
                    w = tl.trans(tl.load(at_w + block * step, mask=(n < OUTPUTS)[:, None] & known[None, :], other=0))
            else:
                if INPUTS % DEPTH == 0:
                    w = tl.load(at_w + block * step, mask=(n < OUTPUTS)[None, :], other=0)
                else:
                    w = tl.load(at_w + block * step, mask=known[:, None] & (n < OUTPUTS)[None, :], other=0)
            sums = tl.dot(x, w, sums, out_dtype=tl.int32)
        if x_zero_ptr is not None:
            zero = _load_by(x_zero_ptr, m, rows, ROW_ZEROS)
            sums -= zero[:, None] * tl.load(weight_sum_ptr + n, mask=n < OUTPUTS, other=0)[None, :]
        if bias_ptr is not None and BIAS_FIRST:
            sums += tl.load(bias_ptr + n, mask=n < OUTPUTS, other=0)[None, :]
        y = sums
        if weight_scale_ptr is not None:
            y = sums.to(tl.float32) * _load_by(weight_scale_ptr, n, OUTPUTS, COLUMN_SCALES).to(tl.float32)[None, :]
            if x_scale_ptr is not None:
                y *= _load_by(x_scale_ptr, m, rows, ROW_SCALES).to(tl.float32)[:, None]
            if bias_ptr is not None and not BIAS_FIRST:
                y += tl.load(bias_ptr + n, mask=n < OUTPUTS, other=0).to(tl.float32)[None, :]
        at = y_ptr + row.to(tl.int64) * OUTPUTS + (tl.arange(0, ROWS)[:, None] * OUTPUTS + n[None, :])
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < OUTPUTS)[None, :])


def int8_matmul_launch(
    rows: int,
    inputs: int,
    outputs: int,
    device: Device,
    *,
    along_inputs: bool,
    row_scales: bool = False,
    column_scales: bool = True,
    row_zeros: bool = False,
    bias_first: bool = False,
) -> Launch:
    """`int8_matmul_kernel` for [rows, inputs] by [inputs, outputs].

    Args:
        along_inputs: whether the weights lie [outputs, inputs].
        row_scales, column_scales, row_zeros: whether x_scale, weight_scale and the zero point are vectors; else they have one element.
        bias_first: whether the bias is int32 and added to the sums.
    """
    tile_rows = min(max(power_of_2(rows), 16), 128)
    options: dict[str, Any] = {}
    if device.kind == "npu":
        block, depth = min(128, max(32, power_of_2(outputs))), 256
    else:
        # Few rows wait for the weights, of which 32 KiB and more should be under way on each multiprocessor.
        block = max(product_columns(-(-rows // tile_rows), outputs, device), 32 if along_inputs else 64)
        depth = 256 if tile_rows < 64 else 128
        options = {"num_warps": max(tile_rows // 16, 4), "num_stages": 5 if tile_rows < 64 else 4}
    depth = min(depth, max(32, power_of_2(inputs)))
    flags = {
        "ALONG_INPUTS": along_inputs,
        "ROW_SCALES": row_scales,
        "COLUMN_SCALES": column_scales,
        "ROW_ZEROS": row_zeros,
        "BIAS_FIRST": bias_first,
    }
    tile = {"ROWS": tile_rows, "BLOCK": block, "DEPTH": depth, "BAND": 8}
    grid = cube_grid(-(-rows // tile_rows) * -(-outputs // block), device)
    return Launch(int8_matmul_kernel, grid, {"INPUTS": inputs, "OUTPUTS": outputs, **flags, **tile}, options)
