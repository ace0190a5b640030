"""Gated linear units over the last dimension of [rows, width]: an activation of the gate times up.

Every program takes a tile of ROWS rows and BLOCK columns, so that few rows still keep all cores busy. fp32 inside, rounded where the
constants say. Gate and up are two matrices or one, by LAYOUT: `pair`; or merged to rows of 2 * width as `halves` (gate first), `swapped`
(up first) or `interleaved` (gate at even, up at odd columns).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Device, Launch, dividing_block, power_of_2, vector_grid
from .numeric import activate, dtype_of, rounded
from .tile import load_tile, store_tile


@triton.jit
def unit(gate, up, alpha, gate_limit, up_limit, up_offset, ACTIVATION: tl.constexpr, ROUND: tl.constexpr):
    """act(min(gate, gate_limit)) * (clamp(up, -up_limit, up_limit) + up_offset), the activated gate rounded to ROUND; a NaN stays one.

    Limits that are None are none. `alpha` is the slope in silu's sigmoid, None for 1.
    """
    if gate_limit is not None:
        gate = tl.where(gate > gate_limit, gate_limit, gate)
    if up_limit is not None:
        up = tl.where(up > up_limit, up_limit, tl.where(up < -up_limit, -up_limit, up))
    if up_offset is not None:
        up += up_offset
    if alpha is not None:
        activated = gate * tl.sigmoid(alpha * gate)
    else:
        activated = activate(gate, ACTIVATION)
    return rounded(activated, ROUND) * up


@triton.jit
def glu_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    rows,
    gate_stride,
    up_stride,
    alpha,
    gate_limit,
    up_limit,
    up_offset,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUND: tl.constexpr,
):
    """y = unit(gate, up) of [rows, WIDTH]; of a merged matrix, which `gate_ptr` and `up_ptr` both are."""
    COLUMNS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    GATE: tl.constexpr = WIDTH if LAYOUT == "swapped" else 0
    UP: tl.constexpr = WIDTH if LAYOUT == "halves" else 0
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * COLUMNS, tl.num_programs(0)):
        row = (tile // COLUMNS) * ROWS
        column = (tile % COLUMNS) * BLOCK
        if LAYOUT == "interleaved":
            both = load_tile(gate_ptr, gate_stride, row, rows, 2 * column, 2 * WIDTH, ROWS, 2 * BLOCK)
            gate, up = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
        else:
            gate = load_tile(gate_ptr + GATE, gate_stride, row, rows, column, WIDTH, ROWS, BLOCK)
            up = load_tile(up_ptr + UP, up_stride, row, rows, column, WIDTH, ROWS, BLOCK)
        y = unit(gate.to(tl.float32), up.to(tl.float32), alpha, gate_limit, up_limit, up_offset, ACTIVATION, ROUND)
        store_tile(y_ptr, y, WIDTH, row, rows, column, WIDTH, ROWS, BLOCK)


# -------------------------------------------------------------------- plan

_LONG = ("gelu", "gelu_tanh", "tanh")


def unit_elements(layout: str, activation: str, limited: bool) -> int:
    """Elements that an NPU's core has room for: the steps of a long activation, of splitting and of limits keep tiles of their own."""
    return 4096 >> ((layout == "interleaved") + (activation in _LONG) + limited)


def glu_launch(
    rows: int,
    width: int,
    device: Device,
    *,
    layout: str = "pair",
    activation: str = "silu",
    limited: bool = False,
    round_to: str | None = None,
) -> Launch:
    """`glu_kernel` for a result [rows, width].

    Args:
        layout: `pair`, `halves`, `swapped` or `interleaved`.
        activation: as in `npu_fusion::glu`.
        limited: whether gate or up have a limit or an offset.
        round_to: dtype (`bf16`, ...) to which the activated gate is rounded before the product.
    """
    most = unit_elements(layout, activation, limited) if device.kind == "npu" else 2048
    elements = tile_elements(rows, width, device, most=most)
    longest = min(power_of_2(width), elements)
    block = dividing_block(width, min(256, longest), longest)
    tile_rows = min(elements // block, power_of_2(rows))
    options = {} if device.kind == "npu" else {"num_warps": max(1, tile_rows * block // 256)}
    constants = {"WIDTH": width, "ROWS": tile_rows, "BLOCK": block, "LAYOUT": layout, "ACTIVATION": activation, "ROUND": dtype_of(round_to)}
    return Launch(glu_kernel, vector_grid(-(-rows // tile_rows) * -(-width // block), device), constants, options)


def tile_elements(rows: int, width: int, device: Device, *, most: int) -> int:
    """Elements of a tile, a power of 2: `most` where that leaves work for every core, else less, down to what is worth moving."""
    return min(most, max(1024 if device.kind == "npu" else 256, power_of_2(rows * width // (4 * device.cores))))
