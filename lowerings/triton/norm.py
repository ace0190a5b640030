"""Normalisations by Triton: the ops rms_norm, add_rms_norm, layer_norm, l2_norm, and their providers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...kernels import norm as kernels
from ...lower import Arguments, Builder
from ...ops._common import check_choice, check_min_rank, check_sizes, check_type, check_value, known_different
from .checks import FLOATS, as_rows, as_vector, check_cores, check_dtypes, check_row_count, check_row_length, check_together, name_of
from .define import device_for, launch, triton_op
from .provide import provides, require_width

# -------------------------------------------------------------------- ops


def _check(
    op: str, x: Tensor, vectors: dict[str, Tensor | None], matrices: dict[str, Tensor | None], out_dtype: torch.dtype, cores: int
) -> None:
    """What all of the family demand: x [..., H] first, vectors [H], and tensors of the shape of x."""
    check_min_rank(op, 1, x=x)
    check_dtypes(op, FLOATS, x=x, **vectors, **matrices)
    check_float_dtypes(op, out_dtype=out_dtype)
    check_together(op, x=x, **vectors, **matrices)
    check_row_length(op, "x", x.shape[-1])
    check_row_count(op, "x", x)
    check_cores(op, cores)
    for name, vector in vectors.items():
        if vector is not None:
            check_sizes(op, name, vector.shape, x.shape[-1:])
    for name, matrix in matrices.items():
        if matrix is not None:
            check_sizes(op, name, matrix.shape, x.shape)


def check_float_dtypes(op: str, **dtypes: torch.dtype | None) -> None:
    """Raise TypeError unless every given dtype is one of the kernels'."""
    for name, dtype in dtypes.items():
        check_type(op, dtype is None or dtype in FLOATS, f"{name} must be one of float16, bfloat16, float32, not {dtype}")


def product_dtype(rounds: torch.dtype | None, weight: Tensor | None) -> torch.dtype | None:
    """The dtype of a normalised x that was rounded and then multiplied by the weight (or added to the bias); None where neither."""
    return None if rounds is None or weight is None else torch.promote_types(rounds, weight.dtype)


@triton_op(
    "(Tensor x, Tensor? weight, float eps, *, int weight_offset=0, Tensor? gate=None, str gate_activation='silu', bool gate_first=False, "
    "int group_size=0, ScalarType? round_dtype=None, ScalarType? out_dtype=None, int cores) -> Tensor"
)
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: int = 0,
    gate: Tensor | None = None,
    gate_activation: str = "silu",
    gate_first: bool = False,
    group_size: int = 0,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    """`npu_fusion::rms_norm` in one launch; contiguous result.

    Args:
        x: [..., H], fp16, bf16 or fp32; rows may lie apart evenly, what lies otherwise is copied first.
        weight, eps, weight_offset, gate, gate_activation, gate_first, group_size, round_dtype, out_dtype: as there; `gate` [..., H].
        cores: vector cores of the device.

    Rounding: fp32 inside, the normalised x and its product with the weight rounded where `round_dtype` says, one cast at the end.

    Raises:
        TypeError: a dtype is none of the three.
        ValueError: a shape or choice does not fit, tensors lie on several devices, or there are 2^31 rows, or elements in a row, or more.
    """
    dtype = out_dtype or x.dtype
    _check_rms_norm(x, weight, weight_offset, gate, gate_activation, gate_first, group_size, round_dtype, dtype, cores)
    y = x.new_empty(x.shape, dtype=dtype)
    if y.numel() == 0:
        return y
    width = group_size or x.shape[-1]
    groups = x.shape[-1] // width
    xs, gates = as_rows(x, width), None if gate is None else as_rows(gate, width)
    plan = kernels.rms_norm_launch(
        xs.shape[0],
        width,
        device_for(x, cores),
        groups=groups,
        weight_offset=weight_offset,
        gate=None if gate is None else gate_activation,
        gate_first=gate_first,
        round_to=name_of(round_dtype),
        product=name_of(product_dtype(round_dtype, weight)),
    )
    launch(
        plan,
        x,
        x_ptr=xs,
        weight_ptr=as_vector(weight),
        gate_ptr=gates,
        y_ptr=y,
        rows=xs.shape[0],
        x_stride=xs.stride(0),
        gate_stride=0 if gates is None else gates.stride(0),
        groups=groups,
        eps=eps,
    )
    return y


def _check_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    weight_offset: int,
    gate: Tensor | None,
    gate_activation: str,
    gate_first: bool,
    group_size: int,
    round_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    cores: int,
) -> None:
    op = "rms_norm"
    _check(op, x, {"weight": weight}, {"gate": gate}, out_dtype, cores)
    check_float_dtypes(op, round_dtype=round_dtype)
    check_offset(op, weight, weight_offset)
    check_choice(op, "gate_activation", gate_activation, ("silu", "sigmoid"))
    check_value(op, gate is not None or not gate_first, "gate_first needs a gate")
    check_value(op, group_size >= 0, f"group_size must not be negative: {group_size}")
    if group_size:
        check_value(op, not known_different(x.shape[-1] % group_size, 0), f"group_size {group_size} does not divide the last dimension")


def check_offset(op: str, weight: Tensor | None, weight_offset: int) -> None:
    check_choice(op, "weight_offset", weight_offset, (0, 1))
    check_value(op, weight is not None or weight_offset == 0, "weight_offset needs a weight")


@rms_norm.fake
def _(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: int = 0,
    gate: Tensor | None = None,
    gate_activation: str = "silu",
    gate_first: bool = False,
    group_size: int = 0,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    dtype = out_dtype or x.dtype
    _check_rms_norm(x, weight, weight_offset, gate, gate_activation, gate_first, group_size, round_dtype, dtype, cores)
    return x.new_empty(x.shape, dtype=dtype)


@triton_op(
    "(Tensor x, Tensor residual, Tensor? weight, float eps, *, Tensor? bias=None, int weight_offset=0, bool norm_unrounded=False, "
    "ScalarType? sum_dtype=None, ScalarType? round_dtype=None, ScalarType? out_dtype=None, int cores) -> (Tensor, Tensor)"
)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    bias: Tensor | None = None,
    weight_offset: int = 0,
    norm_unrounded: bool = False,
    sum_dtype: torch.dtype | None = None,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> tuple[Tensor, Tensor]:
    """`npu_fusion::add_rms_norm` in one launch; contiguous results.

    Args:
        x, residual: [..., H], fp16, bf16 or fp32; rows may lie apart evenly, what lies otherwise is copied first.
        weight, eps, bias, weight_offset, norm_unrounded, sum_dtype, round_dtype, out_dtype: as there.
        cores: vector cores of the device.

    Rounding: fp32 inside; the sum is rounded once, the rest is as in `rms_norm`.

    Raises:
        as `rms_norm`.
    """
    total_dtype, dtype = _sum_dtypes(x, residual, sum_dtype, out_dtype)
    _check_add_rms_norm(x, residual, weight, bias, weight_offset, total_dtype, round_dtype, dtype, cores)
    y, total = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=total_dtype)
    if y.numel() == 0:
        return y, total
    xs, residuals = as_rows(x), as_rows(residual)
    plan = kernels.add_rms_norm_launch(
        xs.shape[0],
        xs.shape[1],
        device_for(x, cores),
        bias=bias is not None,
        weight_offset=weight_offset,
        unrounded=norm_unrounded,
        round_to=name_of(round_dtype),
        product=name_of(product_dtype(round_dtype, weight)),
    )
    launch(
        plan,
        x,
        x_ptr=xs,
        residual_ptr=residuals,
        weight_ptr=as_vector(weight),
        bias_ptr=as_vector(bias),
        y_ptr=y,
        sum_ptr=total,
        rows=xs.shape[0],
        x_stride=xs.stride(0),
        residual_stride=residuals.stride(0),
        eps=eps,
    )
    return y, total


def _check_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_offset: int,
    sum_dtype: torch.dtype,
    round_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    cores: int,
) -> None:
    op = "add_rms_norm"
    _check(op, x, {"weight": weight, "bias": bias}, {"residual": residual}, out_dtype, cores)
    check_float_dtypes(op, sum_dtype=sum_dtype, round_dtype=round_dtype)
    check_offset(op, weight, weight_offset)


def _sum_dtypes(
    x: Tensor, residual: Tensor, sum_dtype: torch.dtype | None, out_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the sum and of the norm."""
    total = sum_dtype or torch.promote_types(x.dtype, residual.dtype)
    return total, out_dtype or total


@add_rms_norm.fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    bias: Tensor | None = None,
    weight_offset: int = 0,
    norm_unrounded: bool = False,
    sum_dtype: torch.dtype | None = None,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> tuple[Tensor, Tensor]:
    total_dtype, dtype = _sum_dtypes(x, residual, sum_dtype, out_dtype)
    _check_add_rms_norm(x, residual, weight, bias, weight_offset, total_dtype, round_dtype, dtype, cores)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=total_dtype)


@triton_op(
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, *, ScalarType? round_dtype=None, ScalarType? out_dtype=None, int cores) -> Tensor"
)
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    """`npu_fusion::layer_norm` in one launch; contiguous result.

    Args:
        x: [..., H], fp16, bf16 or fp32; rows may lie apart evenly, what lies otherwise is copied first.
        weight, bias, eps, round_dtype, out_dtype: as there.
        cores: vector cores of the device.

    Rounding: fp32 inside, also for the mean and the variance, which is that of the differences from the mean.

    Raises:
        as `rms_norm`.
    """
    dtype = out_dtype or x.dtype
    _check("layer_norm", x, {"weight": weight, "bias": bias}, {}, dtype, cores)
    check_float_dtypes("layer_norm", round_dtype=round_dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    if y.numel() == 0:
        return y
    xs = as_rows(x)
    product = product_dtype(round_dtype, weight)
    biased = product_dtype(product or round_dtype, bias)
    rounding = {"round_to": name_of(round_dtype), "product": name_of(product), "biased": name_of(biased)}
    plan = kernels.layer_norm_launch(xs.shape[0], xs.shape[1], device_for(x, cores), **rounding)
    launch(
        plan, x, x_ptr=xs, weight_ptr=as_vector(weight), bias_ptr=as_vector(bias), y_ptr=y, rows=xs.shape[0], x_stride=xs.stride(0), eps=eps
    )
    return y


@layer_norm.fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    dtype = out_dtype or x.dtype
    _check("layer_norm", x, {"weight": weight, "bias": bias}, {}, dtype, cores)
    check_float_dtypes("layer_norm", round_dtype=round_dtype)
    return x.new_empty(x.shape, dtype=dtype)


@triton_op("(Tensor x, float eps, *, str eps_mode='add', float scale=1.0, ScalarType? out_dtype=None, int cores) -> Tensor")
def l2_norm(
    x: Tensor, eps: float, *, eps_mode: str = "add", scale: float = 1.0, out_dtype: torch.dtype | None = None, cores: int
) -> Tensor:
    """`npu_fusion::l2_norm` in one launch; contiguous result.

    Args:
        x: [..., H], fp16, bf16 or fp32; rows may lie apart evenly, what lies otherwise is copied first.
        eps, eps_mode, scale, out_dtype: as there.
        cores: vector cores of the device.

    Rounding: fp32 inside, one cast at the end.

    Raises:
        as `rms_norm`.
    """
    dtype = out_dtype or x.dtype
    _check_l2_norm(x, eps_mode, dtype, cores)
    y = x.new_empty(x.shape, dtype=dtype)
    if y.numel() == 0:
        return y
    xs = as_rows(x)
    plan = kernels.l2_norm_launch(xs.shape[0], xs.shape[1], device_for(x, cores), limit=eps_mode == "max")
    launch(plan, x, x_ptr=xs, y_ptr=y, rows=xs.shape[0], x_stride=xs.stride(0), eps=eps, scale=scale)
    return y


def _check_l2_norm(x: Tensor, eps_mode: str, out_dtype: torch.dtype, cores: int) -> None:
    _check("l2_norm", x, {}, {}, out_dtype, cores)
    check_choice("l2_norm", "eps_mode", eps_mode, ("add", "max"))


@l2_norm.fake
def _(x: Tensor, eps: float, *, eps_mode: str = "add", scale: float = 1.0, out_dtype: torch.dtype | None = None, cores: int) -> Tensor:
    dtype = out_dtype or x.dtype
    _check_l2_norm(x, eps_mode, dtype, cores)
    return x.new_empty(x.shape, dtype=dtype)


# -------------------------------------------------------------------- providers


def _one_of(b: Builder, **tensors: Node | None) -> None:
    """Refuse dtypes that the kernels do not take."""
    for name, node in tensors.items():
        b.require(node is None or b.val(node).dtype in FLOATS, f"{name} is {None if node is None else b.val(node).dtype}")


def _results(b: Builder, *dtypes: torch.dtype | None) -> None:
    """Refuse dtypes of results that the kernels do not write."""
    for dtype in dtypes:
        b.require(dtype is None or dtype in FLOATS, f"a result is {dtype}")


def _rounding(b: Builder, a: Arguments) -> torch.dtype | None:
    """Where the normalised x is rounded: nowhere, unless the configuration asks for the model's own rounding."""
    rounds: torch.dtype | None = a.round_dtype
    if b.config.rounding != "exact":
        return None
    b.require(rounds is None or rounds in FLOATS, f"the model rounds to {rounds} before the weight: rounding is 'exact'")
    return rounds


@provides("rms_norm", "triton.rms_norm")
def _rms_norm(b: Builder, a: Arguments, cores: int) -> Node:
    _one_of(b, x=a.x, weight=a.weight, gate=a.gate)
    require_width(b, x=a.x)
    _results(b, a.out_dtype)
    gating: dict[str, Any] = {"gate": a.gate, "gate_activation": a.gate_activation, "gate_first": a.gate_first, "group_size": a.group_size}
    rounding = {"round_dtype": _rounding(b, a), "out_dtype": a.out_dtype or b.val(a.x).dtype}
    return b.emit(rms_norm.overload, a.x, a.weight, a.eps, weight_offset=a.weight_offset, **gating, **rounding, cores=cores)


@provides("add_rms_norm", "triton.add_rms_norm")
def _add_rms_norm(b: Builder, a: Arguments, cores: int) -> list[Node]:
    _one_of(b, x=a.x, residual=a.residual, weight=a.weight, bias=a.bias)
    require_width(b, x=a.x)
    _results(b, a.sum_dtype, a.out_dtype)
    call = b.emit(
        add_rms_norm.overload,
        a.x,
        a.residual,
        a.weight,
        a.eps,
        bias=a.bias,
        weight_offset=a.weight_offset,
        norm_unrounded=a.norm_unrounded,
        sum_dtype=a.sum_dtype,
        round_dtype=_rounding(b, a),
        out_dtype=a.out_dtype,
        cores=cores,
    )
    return b.results(call, 2)


@provides("layer_norm", "triton.layer_norm")
def _layer_norm(b: Builder, a: Arguments, cores: int) -> Node:
    _one_of(b, x=a.x, weight=a.weight, bias=a.bias)
    require_width(b, x=a.x)
    _results(b, a.out_dtype)
    return b.emit(layer_norm.overload, a.x, a.weight, a.bias, a.eps, round_dtype=_rounding(b, a), out_dtype=a.out_dtype, cores=cores)


@provides("l2_norm", "triton.l2_norm")
def _l2_norm(b: Builder, a: Arguments, cores: int) -> Node:
    _one_of(b, x=a.x)
    require_width(b, x=a.x)
    _results(b, a.out_dtype)
    return b.emit(l2_norm.overload, a.x, a.eps, eps_mode=a.eps_mode, scale=a.scale, out_dtype=a.out_dtype, cores=cores)
