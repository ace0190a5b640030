"""Gated linear units quantised to int8, over the last dimension of [rows, width], also of the int32 sums of an int8 matrix product.

A row's values are `unit(gate, up)` (kernels/glu.py) of what is read: of numbers as they are, or of int32 sums by

    x = (sum + int bias) * scale of the column * scale of the row + float bias

Rows may be in groups (of experts), each with vectors of its own: group i has the rows from the end of group i - 1 on. A row beyond the last
group is not computed: its results are 0. One row is in one dimension: tiles of int8 with few rows take much of an NPU's memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .glu import tile_elements, unit, unit_elements
from .launch import Device, Launch, dividing_block, power_of_2, vector_grid
from .numeric import dtype_of, rounded, to_nearest

_INFINITY: tl.constexpr = tl.constexpr(float("inf"))
_LEAST: tl.constexpr = tl.constexpr(1e-35)  # of a smaller magnitude the inverse would not be finite


# -------------------------------------------------------------------- rows


@triton.jit
def _in_width(column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    return column + tl.arange(0, BLOCK) < WIDTH


@triton.jit
def _load(ptr, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] elements of a row from `column`, zeros beyond its end."""
    at = ptr + column + tl.arange(0, BLOCK)
    if WIDTH % BLOCK == 0:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=_in_width(column, WIDTH, BLOCK), other=0)
    return x


@triton.jit
def _load_pair(gate_ptr, up_ptr, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """[BLOCK] elements of gate and up from `column`, in the layout of kernels/glu.py."""
    if LAYOUT == "interleaved":
        gate, up = tl.split(tl.reshape(_load(gate_ptr, 2 * column, 2 * WIDTH, 2 * BLOCK), (BLOCK, 2)))
    elif LAYOUT == "swapped":
        gate = _load(gate_ptr + WIDTH, column, WIDTH, BLOCK)
        up = _load(up_ptr, column, WIDTH, BLOCK)
    elif LAYOUT == "halves":
        gate = _load(gate_ptr, column, WIDTH, BLOCK)
        up = _load(up_ptr + WIDTH, column, WIDTH, BLOCK)
    else:
        gate = _load(gate_ptr, column, WIDTH, BLOCK)
        up = _load(up_ptr, column, WIDTH, BLOCK)
    return gate, up


@triton.jit
def _row_unit(
    gate_ptr,
    up_ptr,
    weight_scale_ptr,
    bias_ptr,
    token_scale,
    alpha,
    gate_limit,
    up_limit,
    up_offset,
    column,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEQUANT: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """[BLOCK] values from `column` of the row at the pointers, rounded to PRODUCT; 0 beyond its end.

    Where `weight_scale_ptr` is one, the row holds int32 sums, and x is rounded to DEQUANT.
    """
    gate, up = _load_pair(gate_ptr, up_ptr, column, WIDTH, BLOCK, LAYOUT)
    if weight_scale_ptr is not None:
        if bias_ptr is not None:
            gate_bias, up_bias = _load_pair(bias_ptr, bias_ptr, column, WIDTH, BLOCK, LAYOUT)
            if bias_ptr.dtype.element_ty == tl.int32:
                gate += gate_bias
                up += up_bias
        gate_scale, up_scale = _load_pair(weight_scale_ptr, weight_scale_ptr, column, WIDTH, BLOCK, LAYOUT)
        gate = gate.to(tl.float32) * gate_scale.to(tl.float32) * token_scale
        up = up.to(tl.float32) * up_scale.to(tl.float32) * token_scale
        if bias_ptr is not None:
            if bias_ptr.dtype.element_ty != tl.int32:
                gate += gate_bias.to(tl.float32)
                up += up_bias.to(tl.float32)
        gate = rounded(gate, DEQUANT)
        up = rounded(up, DEQUANT)
    y = unit(gate.to(tl.float32), up.to(tl.float32), alpha, gate_limit, up_limit, up_offset, ACTIVATION, ROUND)
    y = rounded(y, PRODUCT)
    if WIDTH % BLOCK != 0:
        y = tl.where(_in_width(column, WIDTH, BLOCK), y, 0.0)
    return y


@triton.jit
def _store(ptr, q, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store whole numbers in [-128, 127] as int8; a NaN is 0."""
    at = ptr + column + tl.arange(0, BLOCK)
    q = tl.where(q == q, q, 0.0).to(tl.int8)
    if WIDTH % BLOCK == 0:
        tl.store(at, q)
    else:
        tl.store(at, q, mask=_in_width(column, WIDTH, BLOCK))
