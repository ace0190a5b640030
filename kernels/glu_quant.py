"""Gated linear units quantised to int8, over the last dimension of [rows, width], also of the int32 sums of an int8 matrix product.

What a row's values are, and which group it is of, says kernels/glu_rows.py. A row beyond the last group is not computed: its results are 0.
One row is in one dimension: tiles of int8 with few rows take much of an NPU's memory.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .glu import tile_elements, unit_elements
from .glu_rows import group_ends, load, row_at, store_int8, token_scale_of, values
from .launch import Device, Launch, dividing_block, power_of_2, vector_grid
from .numeric import dtype_of, to_nearest

_INFINITY: tl.constexpr = tl.constexpr(float("inf"))
_LEAST: tl.constexpr = tl.constexpr(1e-35)  # of a smaller magnitude the inverse would not be finite


# -------------------------------------------------------------------- by the largest magnitude of a row


@triton.jit
def _magnitude(y):
    """|y|, infinite where it is a NaN: a maximum may pass over NaN, but sees infinity."""
    size = tl.abs(y)
    return tl.where(size < _INFINITY, size, _INFINITY)


@triton.jit
def _quantise_row(
    gate,
    up,
    weight,
    bias,
    smooth,
    q,
    scale_ptr,
    token_scale,
    alpha,
    gate_limit,
    up_limit,
    up_offset,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEQUANT: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Quantise the row at the pointers: held in two blocks, the second of which may be none, or walked twice."""
    if HEAD + TAIL >= WIDTH:
        head = values(
            gate,
            up,
            weight,
            bias,
            smooth,
            token_scale,
            alpha,
            gate_limit,
            up_limit,
            up_offset,
            0,
            WIDTH,
            HEAD,
            LAYOUT,
            ACTIVATION,
            DEQUANT,
            ROUND,
            PRODUCT,
        )
        if TAIL > 0:
            tail = values(
                gate,
                up,
                weight,
                bias,
                smooth,
                token_scale,
                alpha,
                gate_limit,
                up_limit,
                up_offset,
                HEAD,
                WIDTH,
                TAIL,
                LAYOUT,
                ACTIVATION,
                DEQUANT,
                ROUND,
                PRODUCT,
            )
        largest = tl.max(_magnitude(head), axis=0)
        if TAIL > 0:
            largest = tl.maximum(largest, tl.max(_magnitude(tail), axis=0))
        inverse = _inverse(largest)
        store_int8(q, to_nearest(head * inverse), 0, WIDTH, HEAD)
        if TAIL > 0:
            store_int8(q, to_nearest(tail * inverse), HEAD, WIDTH, TAIL)
    else:
        sizes = tl.zeros((HEAD,), dtype=tl.float32)
        for column in range(0, WIDTH, HEAD):
            y = values(
                gate,
                up,
                weight,
                bias,
                smooth,
                token_scale,
                alpha,
                gate_limit,
                up_limit,
                up_offset,
                column,
                WIDTH,
                HEAD,
                LAYOUT,
                ACTIVATION,
                DEQUANT,
                ROUND,
                PRODUCT,
            )
            sizes = tl.maximum(sizes, _magnitude(y))
        largest = tl.max(sizes, axis=0)
        inverse = _inverse(largest)
        for column in range(0, WIDTH, HEAD):
            y = values(
                gate,
                up,
                weight,
                bias,
                smooth,
                token_scale,
                alpha,
                gate_limit,
                up_limit,
                up_offset,
                column,
                WIDTH,
                HEAD,
                LAYOUT,
                ACTIVATION,
                DEQUANT,
                ROUND,
                PRODUCT,
            )
            store_int8(q, to_nearest(y * inverse), column, WIDTH, HEAD)
    tl.store(scale_ptr, largest / 127.0)


@triton.jit
def _inverse(largest):
    """What a row is multiplied by: 127 over its largest magnitude, 0 for a row that is as good as zero."""
    some = largest > _LEAST
    return tl.where(some, 127.0 / tl.where(some, largest, 1.0), 0.0)


@triton.jit
def glu_quant_kernel(
    gate_ptr,
    up_ptr,
    weight_scale_ptr,
    token_scale_ptr,
    bias_ptr,
    smooth_ptr,
    group_ptr,
    q_ptr,
    scale_ptr,
    rows,
    gate_stride,
    up_stride,
    weight_stride,
    bias_stride,
    smooth_stride,
    alpha,
    gate_limit,
    up_limit,
    up_offset,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEQUANT: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """scale = max|y * smooth| / 127 of each row, q = y * smooth / scale to the nearest, halves to even.

    A row that is all below 1e-35 has q = 0; one with a NaN or an infinity has q = 0 and an infinite scale. A row of at most HEAD + TAIL
    columns is held, a longer one walked twice in blocks of HEAD. The strides of weight, bias and smooth are between groups.
    """
    LAST: tl.constexpr = GROUPS if GROUPS > 0 else 1
    if GROUPS > 0:
        ends = group_ends(group_ptr, GROUPS, COUNTS)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        group = 0
        if GROUPS > 0:
            group = tl.sum((ends <= row).to(tl.int32), axis=0)
        q = row_at(q_ptr, row, WIDTH)
        if group < LAST:
            gate = row_at(gate_ptr, row, gate_stride)
            up = row_at(up_ptr, row, up_stride)
            weight, bias, smooth = weight_scale_ptr, bias_ptr, smooth_ptr
            if weight is not None:
                weight += group * weight_stride
            if bias is not None:
                bias += group * bias_stride
            if smooth is not None:
                smooth += group * smooth_stride
            token_scale = token_scale_of(token_scale_ptr, row)
            _quantise_row(
                gate,
                up,
                weight,
                bias,
                smooth,
                q,
                scale_ptr + row,
                token_scale,
                alpha,
                gate_limit,
                up_limit,
                up_offset,
                WIDTH,
                HEAD,
                TAIL,
                LAYOUT,
                ACTIVATION,
                DEQUANT,
                ROUND,
                PRODUCT,
            )
        else:
            for column in range(0, WIDTH, HEAD):
                store_int8(q, tl.zeros((HEAD,), dtype=tl.float32), column, WIDTH, HEAD)
            tl.store(scale_ptr + row, 0.0)


# -------------------------------------------------------------------- by a given scale


@triton.jit
def glu_static_quant_kernel(
    gate_ptr,
    up_ptr,
    weight_scale_ptr,
    token_scale_ptr,
    bias_ptr,
    scale_ptr,
    offset_ptr,
    group_ptr,
    q_ptr,
    rows,
    gate_stride,
    up_stride,
    weight_stride,
    bias_stride,
    scale_stride,
    alpha,
    gate_limit,
    up_limit,
    up_offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIVIDE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEQUANT: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """q = y * scale + offset (or y / scale + offset) to the nearest, halves to even, within [-128, 127]; a NaN has q = 0.

    `scale` and `offset` are vectors of the row's CHANNELS, or one number each; their stride is between groups.
    """
    COLUMNS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    LAST: tl.constexpr = GROUPS if GROUPS > 0 else 1
    if GROUPS > 0:
        ends = group_ends(group_ptr, GROUPS, COUNTS)
    for block in range(tl.program_id(0), rows * COLUMNS, tl.num_programs(0)):
        row = block // COLUMNS
        column = (block % COLUMNS) * BLOCK
        group = 0
        if GROUPS > 0:
            group = tl.sum((ends <= row).to(tl.int32), axis=0)
        q = row_at(q_ptr, row, WIDTH)
        if group < LAST:
            gate = row_at(gate_ptr, row, gate_stride)
            up = row_at(up_ptr, row, up_stride)
            weight, bias = weight_scale_ptr, bias_ptr
            if weight is not None:
                weight += group * weight_stride
            if bias is not None:
                bias += group * bias_stride
            token_scale = token_scale_of(token_scale_ptr, row)
            y = values(
                gate,
                up,
                weight,
                bias,
                None,
                token_scale,
                alpha,
                gate_limit,
                up_limit,
                up_offset,
                column,
                WIDTH,
                BLOCK,
                LAYOUT,
                ACTIVATION,
                DEQUANT,
                ROUND,
                PRODUCT,
            )
            scale = _load_scale(scale_ptr + group * scale_stride, column, WIDTH, BLOCK, CHANNELS)
            if DIVIDE:
                y /= scale
            else:
                y *= scale
            if offset_ptr is not None:
                y += _load_scale(offset_ptr + group * scale_stride, column, WIDTH, BLOCK, CHANNELS)
            y = tl.where(y > 127.0, 127.0, tl.where(y < -128.0, -128.0, y))
            store_int8(q, to_nearest(y), column, WIDTH, BLOCK)
        else:
            store_int8(q, tl.zeros((BLOCK,), dtype=tl.float32), column, WIDTH, BLOCK)


@triton.jit
def _load_scale(ptr, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    """The [BLOCK] numbers of the columns, or the one of all, in fp32."""
    if CHANNELS:
        scale = load(ptr, column, WIDTH, BLOCK)
    else:
        scale = tl.load(ptr)
    return scale.to(tl.float32)


# -------------------------------------------------------------------- plans


def glu_quant_launch(
    rows: int,
    width: int,
    device: Device,
    *,
    layout: str = "pair",
    activation: str = "silu",
    limited: bool = False,
    dequant: bool = False,
    dequant_to: str | None = None,
    round_to: str | None = None,
    product: str | None = None,
    groups: int = 0,
    counts: bool = False,
) -> Launch:
    """`glu_quant_kernel` for a result [rows, width].

    Args:
        layout, activation, limited, round_to: as in `glu_launch`.
        dequant: whether gate and up are int32 sums.
        dequant_to, product: dtypes (`bf16`, ...) to which dequantised numbers, and the unit's result, are rounded in between.
        groups: how many groups of rows have vectors of their own; 0 for none.
        counts: whether the groups' sizes are given, else their ends.
    """
    head, tail, options = _held(rows, width, device, _room(layout, activation, limited, dequant))
    form = _form(layout, activation, dequant_to, round_to, product, groups, counts)
    return Launch(glu_quant_kernel, vector_grid(rows, device), {"WIDTH": width, "HEAD": head, "TAIL": tail, **form}, options)


_MOST_HELD = 32768  # columns that a multiprocessor's registers hold


def _room(layout: str, activation: str, limited: bool, dequant: bool) -> int:
    """Elements that an NPU's core has room for beside what quantising keeps."""
    return max(512, unit_elements(layout, activation, limited) >> (1 + dequant))


def _held(rows: int, width: int, device: Device, room: int) -> tuple[int, int, dict[str, int]]:
    """The blocks that hold a row, or (the second is 0) in which it is walked, and the compiler's options.

    Two blocks waste less of a core than one: 18432 columns are 16384 and 2048, not 32768.
    """
    if width > (room if device.kind == "npu" else _MOST_HELD):
        most, options = (room // 2, {}) if device.kind == "npu" else (16384, {"num_warps": 32})
        return dividing_block(width, min(1024, most), most), 0, options
    head = power_of_2(width) // 2
    tail = power_of_2(width - head) if width > head else 0
    if width <= 256 or tail == head:
        head, tail = power_of_2(width), 0
    # Elements of a warp: where cores are idle, more warps wait less. (4096 rows of 2048 on an H100: 16.7 and 17.8 us.)
    share = 256 if rows < device.cores or head + tail <= 2048 else 512
    warps = min(power_of_2((head + tail) // share + 1) // 2 or 1, 32)
    return head, tail, {} if device.kind == "npu" else {"num_warps": warps}


def glu_static_quant_launch(
    rows: int,
    width: int,
    device: Device,
    *,
    layout: str = "pair",
    activation: str = "silu",
    limited: bool = False,
    dequant: bool = False,
    dequant_to: str | None = None,
    round_to: str | None = None,
    product: str | None = None,
    groups: int = 0,
    counts: bool = False,
    channels: bool = False,
    divide: bool = False,
) -> Launch:
    """`glu_static_quant_kernel` for a result [rows, width].

    Args:
        layout to counts: as in `glu_quant_launch`.
        channels: whether each column has a scale of its own.
        divide: whether the scale divides.
    """
    most = _room(layout, activation, limited, dequant) >> channels if device.kind == "npu" else 2048
    longest = min(power_of_2(width), tile_elements(rows, width, device, most=most))
    block = dividing_block(width, min(512, longest), longest)
    options = {} if device.kind == "npu" else {"num_warps": max(1, block // 512)}
    form = _form(layout, activation, dequant_to, round_to, product, groups, counts)
    constants = {"WIDTH": width, "BLOCK": block, "CHANNELS": channels, "DIVIDE": divide, **form}
    return Launch(glu_static_quant_kernel, vector_grid(rows * -(-width // block), device), constants, options)


def _form(
    layout: str, activation: str, dequant_to: str | None, round_to: str | None, product: str | None, groups: int, counts: bool
) -> dict[str, Any]:
    rounding = {"DEQUANT": dtype_of(dequant_to), "ROUND": dtype_of(round_to), "PRODUCT": dtype_of(product)}
    return {"LAYOUT": layout, "ACTIVATION": activation, **rounding, "GROUPS": groups, "COUNTS": counts}
