"""Normalisations over the last dimension of [rows, hidden]: RMSNorm, residual addition with RMSNorm, LayerNorm, scaling to length 1.

Every kernel takes a tile of ROWS rows. A row that a core can hold is read once; a longer one is walked in blocks, once for its statistics
and again for its result. All compute in fp32, and round where the constants say.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Device, Launch, dividing_block, power_of_2, takes_turns, vector_grid
from .numeric import activate, dtype_of, rounded
from .tile import load_tile, load_vector, store_tile, turns_end, turns_step


@triton.jit
def weighted(
    xhat, weight_ptr, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr, PRODUCT: tl.constexpr
):
    """(OFFSET + weight) * xhat: xhat is rounded to ROUND before it, the factor and the product to PRODUCT."""
    y = rounded(xhat, ROUND)
    if weight_ptr is not None:
        factor = load_vector(weight_ptr, column, WIDTH, BLOCK)
        if OFFSET != 0:
            factor = rounded(factor + OFFSET, PRODUCT)
        y = rounded(y * factor, PRODUCT)
    return y


@triton.jit
def _gated_load(
    x_ptr,
    gate_ptr,
    x_stride,
    gate_stride,
    row,
    rows,
    column,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
):
    x = load_tile(x_ptr, x_stride, row, rows, column, WIDTH, ROWS, BLOCK).to(tl.float32)
    if gate_ptr is not None and GATE_FIRST:
        x *= activate(load_tile(gate_ptr, gate_stride, row, rows, column, WIDTH, ROWS, BLOCK).to(tl.float32), GATE)
    return x


@triton.jit
def _finish(
    x,
    factor,
    weight_ptr,
    gate_ptr,
    y_ptr,
    gate_stride,
    row,
    rows,
    column,
    groups,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Scale a tile by the rows' factors and the weight, gate it, and store it."""
    xhat = x * factor[:, None]
    if weight_ptr is not None and ROWS == 1:
        weight_ptr += (row % groups) * WIDTH
    y = weighted(xhat, weight_ptr, column, WIDTH, BLOCK, OFFSET, ROUND, PRODUCT)
    if gate_ptr is not None and not GATE_FIRST:
        y *= activate(load_tile(gate_ptr, gate_stride, row, rows, column, WIDTH, ROWS, BLOCK).to(tl.float32), GATE)
    store_tile(y_ptr, y, WIDTH, row, rows, column, WIDTH, ROWS, BLOCK)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    gate_ptr,
    y_ptr,
    rows,
    x_stride,
    gate_stride,
    groups,
    eps,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    TURNS: tl.constexpr,
):
    """y = x / sqrt(mean(x^2) + eps) * (OFFSET + weight), with the gate before or after.

    Row i has the weight from `(i % groups) * HIDDEN`, which needs ROWS = 1 where there are several groups.
    """
    for tile in range(tl.program_id(0), turns_end(tl.cdiv(rows, ROWS), TURNS), turns_step(TURNS)):
        row = tile * ROWS
        if BLOCK >= HIDDEN:
            x = _gated_load(x_ptr, gate_ptr, x_stride, gate_stride, row, rows, 0, HIDDEN, ROWS, BLOCK, GATE, GATE_FIRST)
            factor = tl.rsqrt(tl.sum(x * x, axis=1) / HIDDEN + eps)
            _finish(
                x,
                factor,
                weight_ptr,
                gate_ptr,
                y_ptr,
                gate_stride,
                row,
                rows,
                0,
                groups,
                HIDDEN,
                ROWS,
                BLOCK,
                OFFSET,
                GATE,
                GATE_FIRST,
                ROUND,
                PRODUCT,
            )
        else:
            squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for column in range(0, HIDDEN, BLOCK):
                x = _gated_load(x_ptr, gate_ptr, x_stride, gate_stride, row, rows, column, HIDDEN, ROWS, BLOCK, GATE, GATE_FIRST)
                squares += x * x
            factor = tl.rsqrt(tl.sum(squares, axis=1) / HIDDEN + eps)
            for column in range(0, HIDDEN, BLOCK):
                x = _gated_load(x_ptr, gate_ptr, x_stride, gate_stride, row, rows, column, HIDDEN, ROWS, BLOCK, GATE, GATE_FIRST)
                _finish(
                    x,
                    factor,
                    weight_ptr,
                    gate_ptr,
                    y_ptr,
                    gate_stride,
                    row,
                    rows,
                    column,
                    groups,
                    HIDDEN,
                    ROWS,
                    BLOCK,
                    OFFSET,
                    GATE,
                    GATE_FIRST,
                    ROUND,
                    PRODUCT,
                )


@triton.jit
def residual_sum(
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
):
    """x + residual (+ bias), not rounded."""
    total = load_tile(x_ptr, x_stride, row, rows, column, WIDTH, ROWS, BLOCK).to(tl.float32)
    total += load_tile(residual_ptr, residual_stride, row, rows, column, WIDTH, ROWS, BLOCK).to(tl.float32)
    if bias_ptr is not None:
        total += load_vector(bias_ptr, column, WIDTH, BLOCK)
    return total


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
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
    TURNS: tl.constexpr,
):
    """s = x + residual (+ bias), stored; y = s / sqrt(mean(s^2) + eps) * (OFFSET + weight) of the stored s, or of s UNROUNDED."""
    SUM: tl.constexpr = None if UNROUNDED else sum_ptr.dtype.element_ty
    for tile in range(tl.program_id(0), turns_end(tl.cdiv(rows, ROWS), TURNS), turns_step(TURNS)):
        row = tile * ROWS
        if BLOCK >= HIDDEN:
            total = residual_sum(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, 0, HIDDEN, ROWS, BLOCK)
            store_tile(sum_ptr, total, HIDDEN, row, rows, 0, HIDDEN, ROWS, BLOCK)
            total = rounded(total, SUM)
            xhat = total * tl.rsqrt(tl.sum(total * total, axis=1) / HIDDEN + eps)[:, None]
            y = weighted(xhat, weight_ptr, 0, HIDDEN, BLOCK, OFFSET, ROUND, PRODUCT)
            store_tile(y_ptr, y, HIDDEN, row, rows, 0, HIDDEN, ROWS, BLOCK)
        else:
            # The second walk adds again: what a launch writes through one argument it must not read through another.
            squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for column in range(0, HIDDEN, BLOCK):
                total = residual_sum(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, column, HIDDEN, ROWS, BLOCK)
                store_tile(sum_ptr, total, HIDDEN, row, rows, column, HIDDEN, ROWS, BLOCK)
                total = rounded(total, SUM)
                squares += total * total
            factor = tl.rsqrt(tl.sum(squares, axis=1) / HIDDEN + eps)[:, None]
            for column in range(0, HIDDEN, BLOCK):
                total = residual_sum(x_ptr, residual_ptr, bias_ptr, x_stride, residual_stride, row, rows, column, HIDDEN, ROWS, BLOCK)
                y = weighted(rounded(total, SUM) * factor, weight_ptr, column, HIDDEN, BLOCK, OFFSET, ROUND, PRODUCT)
                store_tile(y_ptr, y, HIDDEN, row, rows, column, HIDDEN, ROWS, BLOCK)


@triton.jit
def layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    rows,
    x_stride,
    eps,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    BIASED: tl.constexpr,
    TURNS: tl.constexpr,
):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; the variance is of what is left after the mean, never a difference."""
    for tile in range(tl.program_id(0), turns_end(tl.cdiv(rows, ROWS), TURNS), turns_step(TURNS)):
        row = tile * ROWS
        if BLOCK >= HIDDEN:
            x = load_tile(x_ptr, x_stride, row, rows, 0, HIDDEN, ROWS, BLOCK).to(tl.float32)
            x = _centred(x, tl.sum(x, axis=1) / HIDDEN, 0, HIDDEN, BLOCK)
            xhat = x * tl.rsqrt(tl.sum(x * x, axis=1) / HIDDEN + eps)[:, None]
            _affine(xhat, weight_ptr, bias_ptr, y_ptr, row, rows, 0, HIDDEN, ROWS, BLOCK, ROUND, PRODUCT, BIASED)
        else:
            total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for column in range(0, HIDDEN, BLOCK):
                total += load_tile(x_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK).to(tl.float32)
            mean = tl.sum(total, axis=1) / HIDDEN
            squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for column in range(0, HIDDEN, BLOCK):
                x = load_tile(x_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK).to(tl.float32)
                x = _centred(x, mean, column, HIDDEN, BLOCK)
                squares += x * x
            factor = tl.rsqrt(tl.sum(squares, axis=1) / HIDDEN + eps)[:, None]
            for column in range(0, HIDDEN, BLOCK):
                x = load_tile(x_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK).to(tl.float32)
                xhat = (x - mean[:, None]) * factor
                _affine(xhat, weight_ptr, bias_ptr, y_ptr, row, rows, column, HIDDEN, ROWS, BLOCK, ROUND, PRODUCT, BIASED)


@triton.jit
def _centred(x, mean, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x without its mean; 0 beyond the row's end."""
    x -= mean[:, None]
    if WIDTH % BLOCK != 0:
        x = tl.where((column + tl.arange(0, BLOCK) < WIDTH)[None, :], x, 0.0)
    return x


@triton.jit
def _affine(
    xhat,
    weight_ptr,
    bias_ptr,
    y_ptr,
    row,
    rows,
    column,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Store xhat * weight + bias, which is rounded to BIASED."""
    y = weighted(xhat, weight_ptr, column, WIDTH, BLOCK, 0, ROUND, PRODUCT)
    if bias_ptr is not None:
        y = rounded(y + load_vector(bias_ptr, column, WIDTH, BLOCK), BIASED)
    store_tile(y_ptr, y, WIDTH, row, rows, column, WIDTH, ROWS, BLOCK)


@triton.jit
def l2_norm_kernel(
    x_ptr,
    y_ptr,
    rows,
    x_stride,
    eps,
    scale,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """y = x / sqrt(sum(x^2) + eps) * scale, or with LIMIT x / max(sqrt(sum(x^2)), eps) * scale."""
    for tile in range(tl.program_id(0), turns_end(tl.cdiv(rows, ROWS), TURNS), turns_step(TURNS)):
        row = tile * ROWS
        if BLOCK >= HIDDEN:
            x = load_tile(x_ptr, x_stride, row, rows, 0, HIDDEN, ROWS, BLOCK).to(tl.float32)
            factor = _length_factor(tl.sum(x * x, axis=1), eps, scale, LIMIT)
            store_tile(y_ptr, x * factor, HIDDEN, row, rows, 0, HIDDEN, ROWS, BLOCK)
        else:
            squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for column in range(0, HIDDEN, BLOCK):
                x = load_tile(x_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK).to(tl.float32)
                squares += x * x
            factor = _length_factor(tl.sum(squares, axis=1), eps, scale, LIMIT)
            for column in range(0, HIDDEN, BLOCK):
                x = load_tile(x_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK).to(tl.float32)
                store_tile(y_ptr, x * factor, HIDDEN, row, rows, column, HIDDEN, ROWS, BLOCK)


@triton.jit
def _length_factor(squares, eps, scale, LIMIT: tl.constexpr):
    """What a row [ROWS, 1] is multiplied by."""
    if LIMIT:
        factor = scale / tl.maximum(tl.sqrt(squares), eps, propagate_nan=tl.PropagateNan.ALL)
    else:
        factor = scale * tl.rsqrt(squares + eps)
    return factor[:, None]


# -------------------------------------------------------------------- plans


def row_tiles(
    rows: int, hidden: int, device: Device, *, whole: int, chunk: int, held: int = 16
) -> tuple[int, dict[str, int], dict[str, int]]:
    """How rows are dealt out: the grid, the constants ROWS and BLOCK, and the compiler's options.

    Args:
        whole: the longest row that an NPU's core holds beside what the kernel computes of it.
        chunk: the longest block in which it walks a longer one.
        held: how many elements of a row a GPU's thread holds where there are rows enough to fill the GPU. Where the warps of a row wait
            for each other more than once, 32 are better than 16: while few warps wait those of other rows go on. (4096 rows of 7168 bf16
            elements on an H100: 43.7 and 52.8 us for layer norm, 32.2 and 42.2 for quantising.)
    """
    block = power_of_2(hidden)
    most_rows = power_of_2(-(-rows // device.cores))  # a tile has several rows only where every core has some
    if device.kind == "npu":
        if block > whole:
            block = dividing_block(hidden, min(1024, chunk), chunk)
        tile_rows = min(max(1, chunk // block), most_rows)
        return vector_grid(-(-rows // tile_rows), device), {"ROWS": tile_rows, "BLOCK": block}, {}
    if block > 32768:  # more than the registers of 16 warps hold
        block = dividing_block(hidden, 4096, 16384)
    tile_rows = min(max(1, 1024 // block), most_rows)
    warps = min(max(tile_rows * block // 512, 1), 16)
    if rows >= 4 * device.cores:
        warps = min(warps, max(tile_rows * block // (32 * held), 4))
    return vector_grid(-(-rows // tile_rows), device), {"ROWS": tile_rows, "BLOCK": block}, {"num_warps": warps}


def rms_norm_launch(
    rows: int,
    hidden: int,
    device: Device,
    *,
    groups: int = 1,
    weight_offset: int = 0,
    gate: str | None = None,
    gate_first: bool = False,
    round_to: str | None = None,
    product: str | None = None,
) -> Launch:
    """`rms_norm_kernel` for [rows, hidden].

    Args:
        groups: how many weights [hidden] the rows take turns with.
        weight_offset: 1 scales by `1 + weight`.
        gate: activation of the gate, None without one.
        gate_first: whether x is gated before it is normalised.
        round_to, product: dtypes (`bf16`, ...) to which the normalised x, and its product with the weight, are rounded in between.
    """
    grid, tile, options = row_tiles(rows, hidden, device, whole=4096 if gate is None else 2048, chunk=4096 if gate is None else 2048)
    if groups > 1 and tile["ROWS"] > 1:
        grid, tile = vector_grid(rows, device), {**tile, "ROWS": 1}
    rounding = {"ROUND": dtype_of(round_to), "PRODUCT": dtype_of(product)}
    how = {"OFFSET": weight_offset, "GATE": gate, "GATE_FIRST": gate_first, "TURNS": takes_turns(device)}
    return Launch(rms_norm_kernel, grid, {"HIDDEN": hidden, **tile, **how, **rounding}, options)


def add_rms_norm_launch(
    rows: int,
    hidden: int,
    device: Device,
    *,
    bias: bool = False,
    weight_offset: int = 0,
    unrounded: bool = False,
    round_to: str | None = None,
    product: str | None = None,
) -> Launch:
    """`add_rms_norm_kernel` for [rows, hidden]; `unrounded` normalises the sum before it is rounded, the rest as in `rms_norm_launch`."""
    block = 1024 if bias else 2048  # x, residual, weight and bias are live at once
    grid, tile, options = row_tiles(rows, hidden, device, whole=block, chunk=block)
    rounding = {"ROUND": dtype_of(round_to), "PRODUCT": dtype_of(product)}
    how = {"OFFSET": weight_offset, "UNROUNDED": unrounded, "TURNS": takes_turns(device)}
    return Launch(add_rms_norm_kernel, grid, {"HIDDEN": hidden, **tile, **how, **rounding}, options)


def layer_norm_launch(
    rows: int, hidden: int, device: Device, *, round_to: str | None = None, product: str | None = None, biased: str | None = None
) -> Launch:
    """`layer_norm_kernel` for [rows, hidden].

    Args:
        round_to, product: as in `rms_norm_launch`.
        biased: dtype to which the sum with the bias is rounded in between.
    """
    grid, tile, options = row_tiles(rows, hidden, device, whole=4096, chunk=4096, held=32)
    rounding = {"ROUND": dtype_of(round_to), "PRODUCT": dtype_of(product), "BIASED": dtype_of(biased)}
    return Launch(layer_norm_kernel, grid, {"HIDDEN": hidden, **tile, **rounding, "TURNS": takes_turns(device)}, options)


def l2_norm_launch(rows: int, hidden: int, device: Device, *, limit: bool = False) -> Launch:
    """`l2_norm_kernel` for [rows, hidden]; with `limit` eps is a lower limit of the length."""
    grid, tile, options = row_tiles(rows, hidden, device, whole=4096, chunk=4096)
    return Launch(l2_norm_kernel, grid, {"HIDDEN": hidden, **tile, "LIMIT": limit, "TURNS": takes_turns(device)}, options)
