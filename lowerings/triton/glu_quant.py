"""Gated linear units quantised to int8, by Triton: glu_quant, glu_static_quant, and the two of int32 sums, dequant_glu_quant and
dequant_glu_static_quant.

The four share the arguments of `npu_fusion::glu`, and groups: with a `group_list` the rows are those of experts, one after another, and a
vector of an argument may be one for each group, [G, size] in place of [size]. Rows beyond the last group are not computed: they are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import glu_quant as kernels
from ...kernels.launch import Launch
from ...ops._common import Size, check_choice, check_index, check_rank, check_sizes, check_value, known_different
from .checks import FLOATS, check_dtypes, check_row_length, check_together, name_of
from .define import device_for, launch, triton_op
from .glu import check_float_dtypes, check_unit, limited, unit_numbers, unit_rows

GROUP_LISTS = ("cumsum", "count")
MOST_GROUPS = 4096

_UNIT = (
    "str activation='silu', str layout='halves', float alpha=1.0, float? gate_limit=None, float? up_limit=None, float up_offset=0.0, "
    "ScalarType? round_dtype=None, ScalarType? product_dtype=None"
)
_GROUPS = "Tensor? group_list=None, str group_list_type='cumsum'"


@dataclass(frozen=True)
class _Unit:
    """The arguments that the four ops have in common."""

    cores: int
    activation: str = "silu"
    layout: str = "halves"
    alpha: float = 1.0
    gate_limit: float | None = None
    up_limit: float | None = None
    up_offset: float = 0.0
    round_dtype: torch.dtype | None = None
    product_dtype: torch.dtype | None = None
    dequant_dtype: torch.dtype | None = None
    group_list: Tensor | None = None
    group_list_type: str = "cumsum"

    def plan(self, merged: bool) -> dict[str, Any]:
        """What the plans of the kernels ask for."""
        return {
            "layout": self.layout if merged else "pair",
            "activation": self.activation,
            "limited": limited(self.gate_limit, self.up_limit, self.up_offset),
            "dequant_to": name_of(self.dequant_dtype),
            "round_to": name_of(self.round_dtype),
            "product": name_of(self.product_dtype),
            "groups": self.groups or 0,
            "counts": self.group_list is not None and self.group_list_type == "count",
        }

    @property
    def groups(self) -> Size | None:
        """How many groups there are; None without a list."""
        return None if self.group_list is None else self.group_list.shape[0]


# -------------------------------------------------------------------- checks


def _check(op: str, gate: Tensor, up: Tensor | None, unit: _Unit, **vectors: Tensor | None) -> list[Size]:
    """The shape of the result [..., I], whatever gate and up hold."""
    rounding = {"round_dtype": unit.round_dtype, "product_dtype": unit.product_dtype, "dequant_dtype": unit.dequant_dtype}
    check_float_dtypes(op, **rounding)
    sizes = check_unit(op, gate, up, unit.activation, unit.layout, unit.alpha, unit.cores)
    check_together(op, gate=gate, group_list=unit.group_list, **vectors)
    check_choice(op, "group_list_type", unit.group_list_type, GROUP_LISTS)
    check_index(op, group_list=unit.group_list)
    check_rank(op, 1, group_list=unit.group_list)
    groups = unit.groups
    wrong = isinstance(groups, int) and not 0 < groups <= MOST_GROUPS
    check_value(op, not wrong, f"group_list must have 1 to {MOST_GROUPS} groups, not {groups}")
    return sizes


def _check_vector(op: str, name: str, vector: Tensor | None, size: Size, unit: _Unit) -> None:
    """Raise ValueError unless a vector is [size] or, for the groups, [G, size]; without groups G is 1."""
    if vector is not None:
        groups = 1 if unit.groups is None else unit.groups
        check_sizes(op, name, vector.shape, [size] if vector.dim() == 1 else [groups, size])
        check_row_length(op, name, vector.numel())


def _check_sums(
    op: str, x: Tensor, weight_scale: Tensor, token_scale: Tensor | None, bias: Tensor | None, unit: _Unit, **more: Tensor | None
) -> list[Size]:
    """What the ops of int32 sums demand; the shape of the result."""
    check_dtypes(op, (torch.int32,), x=x)
    check_dtypes(op, FLOATS, weight_scale=weight_scale, token_scale=token_scale)
    check_dtypes(op, (torch.int32, *FLOATS), bias=bias)
    sizes = _check(op, x, None, unit, weight_scale=weight_scale, token_scale=token_scale, bias=bias, **more)
    _check_vector(op, "weight_scale", weight_scale, x.shape[-1], unit)
    _check_vector(op, "bias", bias, x.shape[-1], unit)
    if token_scale is not None:
        rows = list(x.shape[:-1])
        check_sizes(op, "token_scale", token_scale.shape, rows if token_scale.dim() < x.dim() else [*rows, 1])
    return sizes


def _check_scale(op: str, scale: Tensor, offset: Tensor | None, width: Size, unit: _Unit) -> None:
    """What the ops with a given scale demand of it."""
    check_dtypes(op, FLOATS, scale=scale, offset=offset)
    if scale.dim() > 0:
        _check_vector(op, "scale", scale, width if known_different(scale.shape[-1], 1) else 1, unit)
    if offset is not None:
        check_sizes(op, "offset", offset.shape, scale.shape)


# -------------------------------------------------------------------- launches


def _vector(vector: Tensor | None) -> tuple[Tensor | None, int]:
    """A vector, or one a group, in one piece, and how far those of two groups lie apart."""
    if vector is None:
        return None, 0
    return vector.contiguous(), vector.shape[-1] if vector.dim() > 1 else 0


def _launch(plan: Launch, unit: _Unit, gates: Tensor, ups: Tensor, sums: Sequence[Tensor | None], **arguments: Any) -> None:
    """Launch a kernel on rows of gate and up, with weight scale, token scale and bias as `sums`."""
    weight_scale, token_scale, bias = sums
    weight, weight_stride = _vector(weight_scale)
    bias, bias_stride = _vector(bias)
    launch(
        plan,
        gates,
        gate_ptr=gates,
        up_ptr=ups,
        weight_scale_ptr=weight,
        token_scale_ptr=None if token_scale is None else token_scale.contiguous(),
        bias_ptr=bias,
        group_ptr=None if unit.group_list is None else unit.group_list.contiguous(),
        rows=gates.shape[0],
        gate_stride=gates.stride(0),
        up_stride=ups.stride(0),
        weight_stride=weight_stride,
        bias_stride=bias_stride,
        **unit_numbers(unit.alpha, unit.gate_limit, unit.up_limit, unit.up_offset),
        **arguments,
    )


def _quantise(
    gate: Tensor, up: Tensor | None, sizes: list[Size], unit: _Unit, smooth: Tensor | None, sums: Sequence[Tensor | None] = (None,) * 3
) -> tuple[Tensor, Tensor]:
    """Quantise by the largest magnitude of each row."""
    q, scale = _empty_pair(gate, sizes)
    if q.numel() == 0:
        return q, scale.zero_()
    gates, ups = unit_rows(gate, up, sizes)
    device = device_for(gate, unit.cores)
    plan = kernels.glu_quant_launch(gates.shape[0], sizes[-1], device, dequant=sums[0] is not None, **unit.plan(up is None))
    smooth, smooth_stride = _vector(smooth)
    _launch(plan, unit, gates, ups, sums, smooth_ptr=smooth, smooth_stride=smooth_stride, q_ptr=q, scale_ptr=scale)
    return q, scale


def _empty_pair(gate: Tensor, sizes: list[Size]) -> tuple[Tensor, Tensor]:
    return gate.new_empty(sizes, dtype=torch.int8), gate.new_empty(sizes[:-1], dtype=torch.float32)


def _quantise_by(
    gate: Tensor,
    up: Tensor | None,
    sizes: list[Size],
    unit: _Unit,
    scale: Tensor,
    offset: Tensor | None,
    divide: bool,
    sums: Sequence[Tensor | None] = (None,) * 3,
) -> Tensor:
    """Quantise by a given scale."""
    q = gate.new_empty(sizes, dtype=torch.int8)
    if q.numel() == 0:
        return q
    gates, ups = unit_rows(gate, up, sizes)
    plan = kernels.glu_static_quant_launch(
        gates.shape[0],
        sizes[-1],
        device_for(gate, unit.cores),
        dequant=sums[0] is not None,
        channels=scale.dim() > 0 and scale.shape[-1] != 1,
        divide=divide,
        **unit.plan(up is None),
    )
    scale, scale_stride = scale.contiguous(), _vector(scale)[1]
    offset = None if offset is None else offset.contiguous()
    _launch(plan, unit, gates, ups, sums, scale_ptr=scale, offset_ptr=offset, scale_stride=scale_stride, q_ptr=q)
    return q


# -------------------------------------------------------------------- ops


@triton_op(f"(Tensor gate, Tensor? up, *, Tensor? smooth_scale=None, {_GROUPS}, {_UNIT}, int cores) -> (Tensor, Tensor)")
def glu_quant(gate: Tensor, up: Tensor | None, *, smooth_scale: Tensor | None = None, **unit: Any) -> tuple[Tensor, Tensor]:
    """`npu_fusion::glu`, quantised to int8 by a scale for each row (token), in one launch; contiguous results.

    Maths: `y = glu(gate, up) * smooth_scale`; `scale = max|y| / 127` of a row; `q = y / scale` to the nearest, halves to even.

    Args:
        gate: [..., I], or merged [..., 2I] without `up`; fp16, bf16 or fp32. Rows may lie apart evenly, what lies otherwise is copied.
        up: a shape that broadcasts with `gate`, fp16, bf16 or fp32; or None.
        smooth_scale: [I] or, for groups, [G, I], fp16, bf16 or fp32; None for 1.
        group_list: [G], int32 or int64, or None: where the groups of rows (of all dimensions but the last) end, or how long they are.
        group_list_type: `cumsum` (ends, not falling) or `count`, as torch_npu's 0 and 1.
        activation, layout, alpha, gate_limit, up_limit, up_offset, round_dtype: as in `npu_fusion::glu`.
        product_dtype: dtype to which the unit's result is rounded before it is smoothed and quantised; None keeps fp32.
        cores: vector cores of the device.

    Returns:
        q [..., I] int8, and scale [...] fp32. A row of zeros (below 1e-35) has q = 0, and the scale 0 where it is all 0; a row with a NaN
        or an infinity has q = 0 and an infinite scale; a row beyond the last group has q = 0 and scale = 0.

    Rounding: fp32 inside, rounded where the arguments say.

    Raises:
        TypeError: a dtype that is not among those above.
        ValueError: an unknown activation, layout or type of list, shapes that do not fit, alpha without silu, tensors on several devices,
            or a row of 2^31 elements or more.

    Source: torch_npu's npu_swiglu_quant and npu_dynamic_quant.
    """
    form = _Unit(**unit)
    return _quantise(gate, up, _check_glu_quant(gate, up, smooth_scale, form), form, smooth_scale)


def _check_glu_quant(gate: Tensor, up: Tensor | None, smooth_scale: Tensor | None, unit: _Unit) -> list[Size]:
    check_dtypes("glu_quant", FLOATS, gate=gate, up=up, smooth_scale=smooth_scale)
    sizes = _check("glu_quant", gate, up, unit, smooth_scale=smooth_scale)
    _check_vector("glu_quant", "smooth_scale", smooth_scale, sizes[-1], unit)
    return sizes


@glu_quant.fake
def _(gate: Tensor, up: Tensor | None, *, smooth_scale: Tensor | None = None, **unit: Any) -> tuple[Tensor, Tensor]:
    return _empty_pair(gate, _check_glu_quant(gate, up, smooth_scale, _Unit(**unit)))


@triton_op(f"(Tensor gate, Tensor? up, Tensor scale, Tensor? offset=None, *, bool divide, {_GROUPS}, {_UNIT}, int cores) -> Tensor")
def glu_static_quant(gate: Tensor, up: Tensor | None, scale: Tensor, offset: Tensor | None = None, *, divide: bool, **unit: Any) -> Tensor:
    """`npu_fusion::glu`, quantised to int8 by a given scale, in one launch; contiguous result [..., I].

    Maths: `q = y * scale + offset`, or `y / scale + offset`, to the nearest, halves to even, within [-128, 127]; a NaN has q = 0.

    Args:
        gate, up, group_list and what follows: as in `glu_quant`.
        scale: one number ([] or [1]) or one a channel [I]; for groups [G, 1] or [G, I]. fp16, bf16 or fp32.
        offset: of the shape of `scale`, fp16, bf16 or fp32; None for 0.
        divide: whether the scale divides.

    Rounding: as in `glu_quant`.

    Raises:
        as `glu_quant`.

    Source: torch_npu's npu_swiglu_quant and npu_quantize, the latter's `div_mode` as `divide`.
    """
    form = _Unit(**unit)
    return _quantise_by(gate, up, _check_glu_static_quant(gate, up, scale, offset, form), form, scale, offset, divide)


def _check_glu_static_quant(gate: Tensor, up: Tensor | None, scale: Tensor, offset: Tensor | None, unit: _Unit) -> list[Size]:
    check_dtypes("glu_static_quant", FLOATS, gate=gate, up=up)
    sizes = _check("glu_static_quant", gate, up, unit, scale=scale, offset=offset)
    _check_scale("glu_static_quant", scale, offset, sizes[-1], unit)
    return sizes


@glu_static_quant.fake
def _(gate: Tensor, up: Tensor | None, scale: Tensor, offset: Tensor | None = None, *, divide: bool, **unit: Any) -> Tensor:
    sizes = _check_glu_static_quant(gate, up, scale, offset, _Unit(**unit))
    return gate.new_empty(sizes, dtype=torch.int8)


@triton_op(
    "(Tensor x, Tensor weight_scale, Tensor? token_scale, *, Tensor? bias=None, Tensor? smooth_scale=None, "
    f"ScalarType? dequant_dtype=None, {_GROUPS}, {_UNIT}, int cores) -> (Tensor, Tensor)"
)
def dequant_glu_quant(
    x: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    *,
    bias: Tensor | None = None,
    smooth_scale: Tensor | None = None,
    **unit: Any,
) -> tuple[Tensor, Tensor]:
    """`glu_quant` of the int32 sums of an int8 matrix product, in one launch; contiguous results.

    Maths: `x' = (x + bias) * weight_scale * token_scale` with a bias of int32, `x * weight_scale * token_scale + bias` with one of floats;
    the rest as in `glu_quant` of the merged x'.

    Args:
        x: [..., 2I], int32; rows may lie apart evenly, what lies otherwise is copied first.
        weight_scale: [2I] or, for groups, [G, 2I], fp16, bf16 or fp32, in the layout of x.
        token_scale: [...] or [..., 1], fp16, bf16 or fp32; None for 1.
        bias: [2I] or, for groups, [G, 2I], int32, fp16, bf16 or fp32; None for 0.
        dequant_dtype: dtype to which x' is rounded; None keeps fp32.
        smooth_scale, group_list and what follows: as in `glu_quant`; the layout is always that of a merged tensor.

    Returns:
        as `glu_quant`.

    Rounding: an int32 bias is added exactly, the sum is rounded to fp32; then as in `glu_quant`.

    Raises:
        as `glu_quant`.

    Source: torch_npu's npu_dequant_swiglu_quant, whose `activate_left` is layout `halves`, the contrary `swapped`.
    """
    form = _Unit(**unit)
    sizes = _check_dequant_glu_quant(x, weight_scale, token_scale, bias, smooth_scale, form)
    return _quantise(x, None, sizes, form, smooth_scale, (weight_scale, token_scale, bias))


def _check_dequant_glu_quant(
    x: Tensor, weight_scale: Tensor, token_scale: Tensor | None, bias: Tensor | None, smooth_scale: Tensor | None, unit: _Unit
) -> list[Size]:
    check_dtypes("dequant_glu_quant", FLOATS, smooth_scale=smooth_scale)
    sizes = _check_sums("dequant_glu_quant", x, weight_scale, token_scale, bias, unit, smooth_scale=smooth_scale)
    _check_vector("dequant_glu_quant", "smooth_scale", smooth_scale, sizes[-1], unit)
    return sizes


@dequant_glu_quant.fake
def _(
    x: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    *,
    bias: Tensor | None = None,
    smooth_scale: Tensor | None = None,
    **unit: Any,
) -> tuple[Tensor, Tensor]:
    return _empty_pair(x, _check_dequant_glu_quant(x, weight_scale, token_scale, bias, smooth_scale, _Unit(**unit)))


@triton_op(
    "(Tensor x, Tensor weight_scale, Tensor? token_scale, Tensor scale, Tensor? offset=None, *, bool divide, Tensor? bias=None, "
    f"ScalarType? dequant_dtype=None, {_GROUPS}, {_UNIT}, int cores) -> Tensor"
)
def dequant_glu_static_quant(
    x: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    divide: bool,
    bias: Tensor | None = None,
    **unit: Any,
) -> Tensor:
    """`glu_static_quant` of the int32 sums of an int8 matrix product, in one launch; contiguous result [..., I].

    Args:
        x, weight_scale, token_scale, bias, dequant_dtype: as in `dequant_glu_quant`.
        scale, offset, divide and what follows: as in `glu_static_quant`.

    Rounding: as in `dequant_glu_quant`.

    Raises:
        as `glu_quant`.

    Source: torch_npu's npu_dequant_swiglu_quant with quant_mode 0.
    """
    form = _Unit(**unit)
    sizes = _check_dequant_glu_static_quant(x, weight_scale, token_scale, scale, offset, bias, form)
    return _quantise_by(x, None, sizes, form, scale, offset, divide, (weight_scale, token_scale, bias))


def _check_dequant_glu_static_quant(
    x: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    unit: _Unit,
) -> list[Size]:
    sizes = _check_sums("dequant_glu_static_quant", x, weight_scale, token_scale, bias, unit, scale=scale, offset=offset)
    _check_scale("dequant_glu_static_quant", scale, offset, sizes[-1], unit)
    return sizes


@dequant_glu_static_quant.fake
def _(
    x: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    divide: bool,
    bias: Tensor | None = None,
    **unit: Any,
) -> Tensor:
    sizes = _check_dequant_glu_static_quant(x, weight_scale, token_scale, scale, offset, bias, _Unit(**unit))
    return x.new_empty(sizes, dtype=torch.int8)
