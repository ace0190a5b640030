"""Rows of gated units: what is read of them, one row in one dimension, with the vectors of the row's group; and int8 written.

A row's values are `unit(gate, up)` (kernels/glu.py) of what is read: of numbers as they are, or of int32 sums by

    x = (sum + int bias) * scale of the column * scale of the row + float bias

Rows may be in groups (of experts), each with vectors of its own: group i has the rows from the end of group i - 1 on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .glu import unit
from .numeric import rounded


@triton.jit
def row_at(ptr, row, stride):
    return ptr + tl.cast(row, tl.int64) * stride


@triton.jit
def in_width(column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    return column + tl.arange(0, BLOCK) < WIDTH


@triton.jit
def load(ptr, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] elements of a row from `column`, zeros beyond its end."""
    at = ptr + column + tl.arange(0, BLOCK)
    if WIDTH % BLOCK == 0:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=in_width(column, WIDTH, BLOCK), other=0)
    return x


@triton.jit
def load_pair(gate_ptr, up_ptr, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """[BLOCK] elements of gate and up from `column`, in the layout of kernels/glu.py."""
    if LAYOUT == "interleaved":
        gate, up = tl.split(tl.reshape(load(gate_ptr, 2 * column, 2 * WIDTH, 2 * BLOCK), (BLOCK, 2)))
    elif LAYOUT == "swapped":
        gate = load(gate_ptr + WIDTH, column, WIDTH, BLOCK)
        up = load(up_ptr, column, WIDTH, BLOCK)
    elif LAYOUT == "halves":
        gate = load(gate_ptr, column, WIDTH, BLOCK)
        up = load(up_ptr + WIDTH, column, WIDTH, BLOCK)
    else:
        gate = load(gate_ptr, column, WIDTH, BLOCK)
        up = load(up_ptr, column, WIDTH, BLOCK)
    return gate, up


@triton.jit
def values(
    gate_ptr,
    up_ptr,
    weight_scale_ptr,
    bias_ptr,
    smooth_ptr,
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
    """[BLOCK] values from `column` of the row at the pointers: the unit, rounded to PRODUCT, times smooth; 0 beyond the row's end.

    Where `weight_scale_ptr` is one, the row holds int32 sums, and x is rounded to DEQUANT.
    """
    gate, up = load_pair(gate_ptr, up_ptr, column, WIDTH, BLOCK, LAYOUT)
    if weight_scale_ptr is not None:
        if bias_ptr is not None:
            gate_bias, up_bias = load_pair(bias_ptr, bias_ptr, column, WIDTH, BLOCK, LAYOUT)
            if bias_ptr.dtype.element_ty == tl.int32:
                gate += gate_bias
                up += up_bias
        gate_scale, up_scale = load_pair(weight_scale_ptr, weight_scale_ptr, column, WIDTH, BLOCK, LAYOUT)
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
    if smooth_ptr is not None:
        y *= load(smooth_ptr, column, WIDTH, BLOCK).to(tl.float32)
    if WIDTH % BLOCK != 0:
        y = tl.where(in_width(column, WIDTH, BLOCK), y, 0.0)
    return y


@triton.jit
def store_int8(ptr, q, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store whole numbers in [-128, 127] as int8; a NaN is 0."""
    at = ptr + column + tl.arange(0, BLOCK)
    q = tl.where(q == q, q, 0.0).to(tl.int8)
    if WIDTH % BLOCK == 0:
        tl.store(at, q)
    else:
        tl.store(at, q, mask=in_width(column, WIDTH, BLOCK))


# -------------------------------------------------------------------- groups


@triton.jit
def group_ends(group_ptr, GROUPS: tl.constexpr, COUNTS: tl.constexpr):
    """The rows at which the groups end, of their ends or their COUNTS; what pads them puts no row into a group."""
    SIZE: tl.constexpr = triton.next_power_of_2(GROUPS)
    at = tl.arange(0, SIZE)
    if COUNTS:
        ends = tl.cumsum(tl.load(group_ptr + at, mask=at < GROUPS, other=0).to(tl.int32), axis=0)
    else:
        ends = tl.load(group_ptr + at, mask=at < GROUPS, other=2147483647).to(tl.int32)
    return ends


@triton.jit
def token_scale_of(ptr, row):
    """The scale of a row, 1 without any."""
    scale = 1.0
    if ptr is not None:
        scale = tl.load(ptr + row).to(tl.float32)
    return scale
