"""RMSNorm, and residual addition with RMSNorm, quantised to int8 in the same launch: per token, or with scales that are given.

As in kernels/norm.py a row that a core can hold is read once. A longer one is walked in blocks: for its statistics, and for its result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Device, Launch
from .norm import residual_sum, weighted
from .numeric import dtype_of, rounded
from .quant import (
    int8_tiles,
    magnitude,
    only_element,
    scaled,
    static_quantized,
    store_int8,
    store_of_rows,
    symmetric_int8,
    symmetric_scale,
    unfused,
)
from .tile import load_tile, load_vector, store_tile


@triton.jit
def _input(
    x_ptr,
    residual_ptr,
    bias_ptr,
    x_stride,
    residual_stride,
    row,
    rows,
    column,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    """What is normalised: x, or x + residual (+ bias) rounded to SUM."""
    if residual_ptr is None:
        total = load_tile(x_ptr, x_stride, row, rows, column, WIDTH, ROWS, BLOCK).to(tl.float32)
    else:
        total = residual_sum(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, column, WIDTH, ROWS, BLOCK)
        total = rounded(total, SUM)
    return total


@triton.jit
def _result(
    xhat,
    weight_ptr,
    beta_ptr,
    column,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    NORM: tl.constexpr,
):
    """The norm of a tile, rounded to NORM."""
    y = weighted(xhat, weight_ptr, column, WIDTH, BLOCK, OFFSET, ROUND, PRODUCT)
    if beta_ptr is not None:
        y += load_vector(beta_ptr, column, WIDTH, BLOCK)
    return rounded(y, NORM)


@triton.jit
def _smoothed(y, smooth_ptr, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    if smooth_ptr is not None:
        y *= load_vector(smooth_ptr, column, WIDTH, BLOCK)
    return y


@triton.jit
def norm_dynamic_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    beta_ptr,
    smooth_ptr,
    q_ptr,
    scale_ptr,
    norm_ptr,
    sum_ptr,
    rows,
    x_stride,
    residual_stride,
    eps,
    least,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    UNROUNDED: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    NORM: tl.constexpr,
    DIVIDE: tl.constexpr,
    EARLY: tl.constexpr,
    BITS: tl.constexpr,
):
    """The sum, its norm and the quantised norm: scale = max(|norm * smooth|) / 127 of a row, but at least `least`.

    EARLY finds the largest magnitude of a row in blocks before the row's factor is known, which is right where nothing is rounded or added
    in between: a walk less.
    """
    SUM: tl.constexpr = None if UNROUNDED or sum_ptr is None else sum_ptr.dtype.element_ty
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS
        if BLOCK >= HIDDEN:
            x = _input(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, 0, HIDDEN, ROWS, BLOCK, SUM)
            if sum_ptr is not None:
                store_tile(sum_ptr, x, HIDDEN, row, rows, 0, HIDDEN, ROWS, BLOCK)
            xhat = x * tl.rsqrt(tl.sum(x * x, axis=1) / HIDDEN + eps)[:, None]
            y = _result(xhat, weight_ptr, beta_ptr, 0, HIDDEN, BLOCK, OFFSET, ROUND, PRODUCT, NORM)
            if norm_ptr is not None:
                store_tile(norm_ptr, y, HIDDEN, row, rows, 0, HIDDEN, ROWS, BLOCK)
            y = _smoothed(y, smooth_ptr, 0, HIDDEN, BLOCK)
            scale = symmetric_scale(tl.max(magnitude(y), axis=1), least)
            store_int8(q_ptr, symmetric_int8(scaled(y, scale, DIVIDE), BITS), row, rows, 0, HIDDEN, ROWS, BLOCK, BITS)
        else:
            squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            largest = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
            for column in range(0, HIDDEN, BLOCK):
                x = _input(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, column, HIDDEN, ROWS, BLOCK, SUM)
                if sum_ptr is not None:
                    store_tile(sum_ptr, x, HIDDEN, row, rows, column, HIDDEN, ROWS, BLOCK)
                squares += x * x
                if EARLY:
                    y = weighted(x, weight_ptr, column, HIDDEN, BLOCK, OFFSET, None, None)
                    largest = tl.maximum(largest, magnitude(_smoothed(y, smooth_ptr, column, HIDDEN, BLOCK)))
            factor = tl.rsqrt(tl.sum(squares, axis=1) / HIDDEN + eps)
            if EARLY:
                most = magnitude(tl.max(largest, axis=1).to(tl.float32, bitcast=True) * factor)
            else:
                for column in range(0, HIDDEN, BLOCK):
                    x = _input(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, column, HIDDEN, ROWS, BLOCK, SUM)
                    y = _result(x * factor[:, None], weight_ptr, beta_ptr, column, HIDDEN, BLOCK, OFFSET, ROUND, PRODUCT, NORM)
                    largest = tl.maximum(largest, magnitude(_smoothed(y, smooth_ptr, column, HIDDEN, BLOCK)))
                most = tl.max(largest, axis=1)
            scale = symmetric_scale(most, least)
            for column in range(0, HIDDEN, BLOCK):
                x = _input(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, column, HIDDEN, ROWS, BLOCK, SUM)
                y = _result(x * factor[:, None], weight_ptr, beta_ptr, column, HIDDEN, BLOCK, OFFSET, ROUND, PRODUCT, NORM)
                if norm_ptr is not None:
                    store_tile(norm_ptr, y, HIDDEN, row, rows, column, HIDDEN, ROWS, BLOCK)
                q = symmetric_int8(scaled(_smoothed(y, smooth_ptr, column, HIDDEN, BLOCK), scale, DIVIDE), BITS)
                store_int8(q_ptr, q, row, rows, column, HIDDEN, ROWS, BLOCK, BITS)
        store_of_rows(scale_ptr, scale, row, rows, ROWS)


@triton.jit
def norm_static_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    beta_ptr,
    scale_ptr,
    zero_ptr,
    q_ptr,
    norm_ptr,
    sum_ptr,
    rows,
    x_stride,
    residual_stride,
    eps,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    UNROUNDED: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    NORM: tl.constexpr,
    DIVIDE: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    ONE_ZERO: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """The sum, its norm and the quantised norm: round(norm / scale + zero), or with `norm * scale`."""
    SUM: tl.constexpr = None if UNROUNDED or sum_ptr is None else sum_ptr.dtype.element_ty
    one_scale = only_element(scale_ptr, ONE_SCALE)
    one_zero = only_element(zero_ptr, ONE_ZERO)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS
        if BLOCK >= HIDDEN:
            x = _input(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, 0, HIDDEN, ROWS, BLOCK, SUM)
            if sum_ptr is not None:
                store_tile(sum_ptr, x, HIDDEN, row, rows, 0, HIDDEN, ROWS, BLOCK)
            xhat = x * tl.rsqrt(tl.sum(x * x, axis=1) / HIDDEN + eps)[:, None]
            y = _result(xhat, weight_ptr, beta_ptr, 0, HIDDEN, BLOCK, OFFSET, ROUND, PRODUCT, NORM)
            if norm_ptr is not None:
                store_tile(norm_ptr, y, HIDDEN, row, rows, 0, HIDDEN, ROWS, BLOCK)
            q = static_quantized(y, one_scale, one_zero, scale_ptr, zero_ptr, 0, HIDDEN, BLOCK, ONE_SCALE, ONE_ZERO, DIVIDE, LOWEST)
            store_int8(q_ptr, q, row, rows, 0, HIDDEN, ROWS, BLOCK)
        else:
            squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for column in range(0, HIDDEN, BLOCK):
                x = _input(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, column, HIDDEN, ROWS, BLOCK, SUM)
                if sum_ptr is not None:
                    store_tile(sum_ptr, x, HIDDEN, row, rows, column, HIDDEN, ROWS, BLOCK)
                squares += x * x
            factor = tl.rsqrt(tl.sum(squares, axis=1) / HIDDEN + eps)[:, None]
            for column in range(0, HIDDEN, BLOCK):
                x = _input(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, column, HIDDEN, ROWS, BLOCK, SUM)
                y = _result(x * factor, weight_ptr, beta_ptr, column, HIDDEN, BLOCK, OFFSET, ROUND, PRODUCT, NORM)
                if norm_ptr is not None:
                    store_tile(norm_ptr, y, HIDDEN, row, rows, column, HIDDEN, ROWS, BLOCK)
                q = static_quantized(
                    y, one_scale, one_zero, scale_ptr, zero_ptr, column, HIDDEN, BLOCK, ONE_SCALE, ONE_ZERO, DIVIDE, LOWEST
                )
                store_int8(q_ptr, q, row, rows, column, HIDDEN, ROWS, BLOCK)


# -------------------------------------------------------------------- plans


def norm_dynamic_quantize_launch(
    rows: int,
    hidden: int,
    device: Device,
    *,
    residual: bool = False,
    bias: bool = False,
    beta: bool = False,
    smooth: bool = False,
    returns_norm: bool = False,
    weight_offset: int = 0,
    unrounded: bool = False,
    round_to: str | None = None,
    product: str | None = None,
    norm: str | None = None,
    divide: bool = False,
) -> Launch:
    """`norm_dynamic_quantize_kernel` for [rows, hidden].

    Args:
        residual, bias, beta, smooth: whether there is a residual, a bias of the sum, a bias of the norm, a factor of what is quantised.
        returns_norm: whether the norm is stored, too.
        weight_offset: 1 scales by `1 + weight`.
        unrounded: the sum is normalised before it is rounded.
        round_to, product, norm: dtypes to which the normalised x, its product with the weight, and the norm are rounded in between.
        divide: divides by the scale instead of multiplying by its reciprocal.
    """
    rounds = any((round_to, product, norm))
    operands = 1 + residual + bias + beta + smooth + returns_norm
    # With a residual 16 elements a thread reach 1.10 x what memory allows on an H100; more have not been tried.
    grid, tile, options = _tiles(rows, hidden, device, rounds, operands, held=16 if residual else 32)
    rounding = {"ROUND": dtype_of(round_to), "PRODUCT": dtype_of(product), "NORM": dtype_of(norm)}
    early = not beta and not rounds
    choices = {"OFFSET": weight_offset, "UNROUNDED": unrounded, **rounding, "DIVIDE": divide, "EARLY": early, "BITS": device.kind != "npu"}
    return Launch(norm_dynamic_quantize_kernel, grid, {"HIDDEN": hidden, **tile, **choices}, options)


def _tiles(
    rows: int, hidden: int, device: Device, rounds: bool, operands: int, *, held: int = 16
) -> tuple[int, dict[str, int], dict[str, int]]:
    """`int8_tiles` of blocks that an NPU's core holds beside so many operands, and what is rounded in between."""
    block = 2048 if operands == 0 and not rounds else 1024 if operands + 2 * rounds <= 2 else 512
    return int8_tiles(rows, hidden, device, whole=block, chunk=block, held=held)


def norm_static_quantize_launch(
    rows: int,
    hidden: int,
    device: Device,
    *,
    one_scale: bool,
    one_zero: bool = False,
    residual: bool = False,
    bias: bool = False,
    beta: bool = False,
    zero: bool = False,
    returns_norm: bool = False,
    weight_offset: int = 0,
    unrounded: bool = False,
    round_to: str | None = None,
    product: str | None = None,
    norm: str | None = None,
    divide: bool = True,
    lowest: int = -128,
) -> Launch:
    """`norm_static_quantize_kernel` for [rows, hidden].

    Args:
        one_scale, one_zero: whether there is one for all channels.
        zero: whether there are zero points.
        divide: the norm is divided by the scale, not multiplied.
        lowest: the least result.
        residual, bias, beta, returns_norm, weight_offset, unrounded, round_to, product, norm: as in `norm_dynamic_quantize_launch`.
    """
    rounds = any((round_to, product, norm))
    grid, tile, options = _tiles(rows, hidden, device, rounds, residual + bias + beta + zero + (not one_scale) + returns_norm)
    rounding = {"ROUND": dtype_of(round_to), "PRODUCT": dtype_of(product), "NORM": dtype_of(norm)}
    choices = {"ONE_SCALE": one_scale, "ONE_ZERO": one_zero, "DIVIDE": divide, "LOWEST": float(lowest)}
    constants = {"HIDDEN": hidden, **tile, "OFFSET": weight_offset, "UNROUNDED": unrounded, **rounding, **choices}
    return Launch(norm_static_quantize_kernel, grid, constants, {**options, **unfused(device)})
