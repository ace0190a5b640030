"""Gated linear units by Triton: the op glu, and its provider."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...kernels import glu as kernels
from ...lower import Arguments, Builder
from ...ops._common import ACTIVATIONS, Size, broadcast_sizes, check_choice, check_min_rank, check_type, check_value, known_different
from ...ops.glu import LAYOUTS
from .checks import FLOATS, as_rows, check_cores, check_dtypes, check_row_length, check_together, name_of
from .define import device_for, launch, triton_op
from .provide import provides, require_width

# -------------------------------------------------------------------- what glu and glu_quant share


def check_unit(op: str, gate: Tensor, up: Tensor | None, activation: str, layout: str, alpha: float, cores: int) -> list[Size]:
    """The shape of the unit's result [..., I]; raises TypeError or ValueError where the unit is none, but for the dtypes of gate and up."""
    check_choice(op, "activation", activation, tuple(ACTIVATIONS))
    check_choice(op, "layout", layout, LAYOUTS)
    check_value(op, activation == "silu" or alpha == 1.0, f"alpha belongs to silu, not to {activation}")
    check_min_rank(op, 1, gate=gate)
    check_together(op, gate=gate, up=up)
    check_cores(op, cores)
    check_row_length(op, "gate", gate.shape[-1])
    if up is None:
        check_value(op, not known_different(gate.shape[-1] % 2, 0), "a merged gate and up needs an even last dimension")
        return [*gate.shape[:-1], gate.shape[-1] // 2]
    check_min_rank(op, 1, up=up)
    check_row_length(op, "up", up.shape[-1])
    return broadcast_sizes(op, gate.shape, up.shape)


def check_float_dtypes(op: str, **dtypes: torch.dtype | None) -> None:
    """Raise TypeError unless every given dtype is one that the kernels compute and round in."""
    for name, dtype in dtypes.items():
        check_type(op, dtype is None or dtype in FLOATS, f"{name} must be one of float16, bfloat16, float32, not {dtype}")


def unit_rows(gate: Tensor, up: Tensor | None, sizes: list[Size]) -> tuple[Tensor, Tensor]:
    """Gate and up as matrices with rows that lie evenly; one and the same of a merged tensor."""
    if up is None:
        merged = as_rows(gate)
        return merged, merged
    return as_rows(gate.expand(sizes)), as_rows(up.expand(sizes))


def unit_numbers(alpha: float, gate_limit: float | None, up_limit: float | None, up_offset: float) -> dict[str, float | None]:
    """The numbers of a unit as the kernels take them: None for what changes nothing."""
    return {
        "alpha": None if alpha == 1.0 else alpha,
        "gate_limit": gate_limit,
        "up_limit": up_limit,
        "up_offset": None if up_offset == 0.0 else up_offset,
    }


def limited(gate_limit: float | None, up_limit: float | None, up_offset: float) -> bool:
    """Whether a unit has a limit or an offset."""
    return gate_limit is not None or up_limit is not None or up_offset != 0.0


# -------------------------------------------------------------------- op


@triton_op(
    "(Tensor gate, Tensor? up, *, str activation='silu', str layout='halves', float alpha=1.0, float? gate_limit=None, "
    "float? up_limit=None, float up_offset=0.0, ScalarType? round_dtype=None, ScalarType? out_dtype=None, int cores) -> Tensor"
)
def glu(
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str = "silu",
    layout: str = "halves",
    alpha: float = 1.0,
    gate_limit: float | None = None,
    up_limit: float | None = None,
    up_offset: float = 0.0,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    """`npu_fusion::glu` in one launch; contiguous result.

    Args:
        gate: [..., I], or merged [..., 2I] without `up`; fp16, bf16 or fp32. Rows may lie apart evenly, what lies otherwise, or is
            broadcast within a row, is copied first.
        up: a shape that broadcasts with `gate`, fp16, bf16 or fp32; or None.
        activation, layout, alpha, gate_limit, up_limit, up_offset, round_dtype, out_dtype: as there.
        cores: vector cores of the device.

    Rounding: fp32 inside, the activated gate rounded to `round_dtype`, one cast at the end.

    Raises:
        TypeError: a dtype is none of the three.
        ValueError: an unknown activation or layout, shapes that do not broadcast, an odd merged dimension, alpha without silu, tensors
            on several devices, or a row of 2^31 elements or more.
    """
    sizes, dtype = _check(gate, up, activation, layout, alpha, round_dtype, out_dtype, cores)
    y = gate.new_empty(sizes, dtype=dtype)
    if y.numel() == 0:
        return y
    gates, ups = unit_rows(gate, up, sizes)
    width = sizes[-1]
    plan = kernels.glu_launch(
        gates.shape[0],
        width,
        device_for(gate, cores),
        layout=layout if up is None else "pair",
        activation=activation,
        limited=limited(gate_limit, up_limit, up_offset),
        round_to=name_of(round_dtype),
    )
    numbers = unit_numbers(alpha, gate_limit, up_limit, up_offset)
    strides = {"gate_stride": gates.stride(0), "up_stride": ups.stride(0)}
    launch(plan, gate, gate_ptr=gates, up_ptr=ups, y_ptr=y, rows=gates.shape[0], **strides, **numbers)
    return y


def _check(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    layout: str,
    alpha: float,
    round_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    cores: int,
) -> tuple[list[Size], torch.dtype]:
    """Shape and dtype of the result."""
    check_dtypes("glu", FLOATS, gate=gate, up=up)
    dtype = out_dtype or (gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype))
    check_float_dtypes("glu", round_dtype=round_dtype, out_dtype=dtype)
    return check_unit("glu", gate, up, activation, layout, alpha, cores), dtype


@glu.fake
def _(
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str = "silu",
    layout: str = "halves",
    alpha: float = 1.0,
    gate_limit: float | None = None,
    up_limit: float | None = None,
    up_offset: float = 0.0,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    sizes, dtype = _check(gate, up, activation, layout, alpha, round_dtype, out_dtype, cores)
    return gate.new_empty(sizes, dtype=dtype)


# -------------------------------------------------------------------- provider


@provides("glu", "triton.glu")
def _glu(b: Builder, a: Arguments, cores: int) -> Node:
    for name, node in (("gate", a.gate), ("up", a.up)):
        b.require(node is None or b.val(node).dtype in FLOATS, f"{name} is {None if node is None else b.val(node).dtype}")
    require_width(b, gate=a.gate, up=a.up)
    rounds: torch.dtype | None = a.round_dtype
    rounds = rounds if b.config.rounding == "exact" else None
    for name, dtype in (("round_dtype", rounds), ("out_dtype", a.out_dtype)):
        b.require(dtype is None or dtype in FLOATS, f"{name} is {dtype}")
    form: dict[str, Any] = {"activation": a.activation, "layout": a.layout, "alpha": a.alpha}
    limits = {"gate_limit": a.gate_limit, "up_limit": a.up_limit, "up_offset": a.up_offset}
    return b.emit(glu.overload, a.gate, a.up, **form, **limits, round_dtype=rounds, out_dtype=a.out_dtype, cores=cores)
