"""Normalisations over the last dimension: `rms_norm`, `add_rms_norm`, `layer_norm`, `l2_norm`.

All compute in fp32 (fp64 if an input is fp64) and round where their arguments say. Results are stored in the memory order of `x`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..semantic import semantic_op
from ._common import (
    ACTIVATIONS,
    check_choice,
    check_floating,
    check_floating_dtype,
    check_min_rank,
    check_sizes,
    check_value,
    compute_dtype,
    known_different,
    stored_like,
)

GATE_ACTIVATIONS = ("silu", "sigmoid")
EPS_MODES = ("add", "max")


def _check_norm(op: str, x: Tensor, weight: Tensor | None, round_dtype: torch.dtype | None, out_dtype: torch.dtype | None) -> None:
    check_min_rank(op, 1, x=x)
    check_floating(op, x=x, weight=weight)
    check_floating_dtype(op, "round_dtype", round_dtype)
    check_floating_dtype(op, "out_dtype", out_dtype)
    if weight is not None:
        check_sizes(op, "weight", weight.shape, x.shape[-1:])


def _check_offset(op: str, weight: Tensor | None, weight_offset: int) -> None:
    check_choice(op, "weight_offset", weight_offset, (0, 1))
    check_value(op, weight is not None or weight_offset == 0, "weight_offset needs a weight")


def _normalise(x: Tensor, eps: float, group_size: int = 0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, or over each `group_size` channels of it, in the dtype of `x`."""
    if not group_size:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    return (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)


def _scale(xhat: Tensor, weight: Tensor | None, weight_offset: int, round_dtype: torch.dtype | None) -> Tensor:
    """xhat, rounded to `round_dtype`, times (offset + weight) in the dtype both promote to."""
    if round_dtype is not None:
        xhat = xhat.to(round_dtype)
    if weight is None:
        return xhat
    dtype = torch.promote_types(xhat.dtype, weight.dtype)
    factor = weight.to(dtype) + weight_offset if weight_offset else weight.to(dtype)
    return xhat.to(dtype) * factor


def _check_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    weight_offset: int,
    gate: Tensor | None,
    gate_activation: str,
    gate_first: bool,
    group_size: int,
    round_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> None:
    op = "rms_norm"
    _check_norm(op, x, weight, round_dtype, out_dtype)
    _check_offset(op, weight, weight_offset)
    check_choice(op, "gate_activation", gate_activation, GATE_ACTIVATIONS)
    check_value(op, gate is not None or not gate_first, "gate_first needs a gate")
    check_value(op, group_size >= 0, f"group_size must not be negative: {group_size}")
    if group_size:
        check_value(op, not known_different(x.shape[-1] % group_size, 0), f"group_size {group_size} does not divide the last dimension")
    if gate is not None:
        check_floating(op, gate=gate)
        check_sizes(op, "gate", gate.shape, x.shape)


@semantic_op(
    "norm",
    '(Tensor x, Tensor? weight, float eps, *, int weight_offset=0, Tensor? gate=None, str gate_activation="silu", '
    "bool gate_first=False, int group_size=0, ScalarType? round_dtype=None, ScalarType? out_dtype=None) -> Tensor",
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
) -> Tensor:
    """Root-mean-square normalisation over the last dimension, with an optional weight and an optional gate.

    Maths: `y = x / sqrt(mean(x^2, -1) + eps) * (weight_offset + weight)`; with a gate, `y * act(gate)`, or, with `gate_first`,
    the norm of `x * act(gate)`.

    Args:
        x: [..., H], floating point.
        weight: [H] or None (no scaling).
        eps: added to the mean square.
        weight_offset: 1 scales by `1 + weight` (Gemma), 0 by `weight`.
        gate: the shape of `x`, or None.
        gate_activation: `silu` or `sigmoid`.
        gate_first: the gate multiplies `x` before the norm (Mamba2), not the scaled result (gated delta net).
        group_size: > 0 normalises each contiguous group of that many channels by itself; the weight is still [H].
        round_dtype: dtype to which the normalised x is rounded before the weight; None keeps the internal precision.
        out_dtype: dtype of the result; None is that of `x`.

    Returns:
        [..., H] in `out_dtype`.

    Rounding: fp32 inside (fp64 if `x` or `gate` is). The weight multiplies in the dtype that `round_dtype` (or the internal dtype)
        and the weight's dtype promote to, `weight_offset` being added in that dtype. The gate multiplies in fp32 before the only
        cast to `out_dtype`.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: a shape, activation, offset or group size does not fit.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; gated forms: https://arxiv.org/abs/2405.21060 (Mamba2).
    """
    _check_rms_norm(x, weight, weight_offset, gate, gate_activation, gate_first, group_size, round_dtype, out_dtype)
    dtype = compute_dtype(x, gate)
    value = x.to(dtype)
    activated = None if gate is None else ACTIVATIONS[gate_activation](gate.to(dtype))
    if gate_first and activated is not None:
        value = value * activated
    y = _scale(_normalise(value, eps, group_size), weight, weight_offset, round_dtype)
    if activated is not None and not gate_first:
        y = y * activated
    return stored_like(y.to(x.dtype if out_dtype is None else out_dtype), x)


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
) -> Tensor:
    _check_rms_norm(x, weight, weight_offset, gate, gate_activation, gate_first, group_size, round_dtype, out_dtype)
    return torch.empty_like(x, dtype=out_dtype)


def _sum_dtype(x: Tensor, residual: Tensor, sum_dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(x.dtype, residual.dtype) if sum_dtype is None else sum_dtype


def _check_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_offset: int,
    sum_dtype: torch.dtype | None,
    round_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> None:
    op = "add_rms_norm"
    _check_norm(op, x, weight, round_dtype, out_dtype)
    _check_offset(op, weight, weight_offset)
    check_floating(op, residual=residual, bias=bias)
    check_floating_dtype(op, "sum_dtype", sum_dtype)
    check_sizes(op, "residual", residual.shape, x.shape)
    if bias is not None:
        check_sizes(op, "bias", bias.shape, x.shape[-1:])


@semantic_op(
    "norm",
    "(Tensor x, Tensor residual, Tensor? weight, float eps, *, Tensor? bias=None, int weight_offset=0, bool norm_unrounded=False, "
    "ScalarType? sum_dtype=None, ScalarType? round_dtype=None, ScalarType? out_dtype=None) -> (Tensor, Tensor)",
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
) -> tuple[Tensor, Tensor]:
    """Residual addition and the RMS norm of the sum, both returned.

    Maths: `s = x + residual (+ bias)`; `y = s / sqrt(mean(s^2, -1) + eps) * (weight_offset + weight)`.

    Args:
        x: [..., H], floating point.
        residual: the shape of `x`, floating point, maybe of another dtype.
        weight: [H] or None (no scaling).
        eps: added to the mean square.
        bias: [H] or None, added to the sum.
        weight_offset: 1 scales by `1 + weight`, 0 by `weight`.
        norm_unrounded: normalise the sum as it is before it is rounded to `sum_dtype`.
        sum_dtype: dtype of the returned sum; None is what the dtypes of `x` and `residual` promote to.
        round_dtype: dtype to which the normalised sum is rounded before the weight; None keeps the internal precision.
        out_dtype: dtype of `y`; None is `sum_dtype`.

    Returns:
        `y` [..., H] in `out_dtype`, and the sum [..., H] in `sum_dtype`.

    Rounding: fp32 inside (fp64 if an addend is); the sum is rounded once, to `sum_dtype`, and `y` is taken of the rounded sum unless
        `norm_unrounded`; then as in `rms_norm`.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: a shape or the offset does not fit.

    Source: pre-norm transformer blocks; `npu_add_rms_norm` of torch_npu computes the same.
    """
    _check_add_rms_norm(x, residual, weight, bias, weight_offset, sum_dtype, round_dtype, out_dtype)
    dtype = compute_dtype(x, residual, bias)
    exact = x.to(dtype) + residual.to(dtype)
    if bias is not None:
        exact = exact + bias.to(dtype)
    total = exact.to(_sum_dtype(x, residual, sum_dtype))
    xhat = _normalise(exact if norm_unrounded else total.to(compute_dtype(total)), eps)
    y = _scale(xhat, weight, weight_offset, round_dtype)
    return stored_like(y.to(total.dtype if out_dtype is None else out_dtype), x), stored_like(total, x)


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
) -> tuple[Tensor, Tensor]:
    _check_add_rms_norm(x, residual, weight, bias, weight_offset, sum_dtype, round_dtype, out_dtype)
    total = torch.empty_like(x, dtype=_sum_dtype(x, residual, sum_dtype))
    return torch.empty_like(x, dtype=total.dtype if out_dtype is None else out_dtype), total


def _check_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, round_dtype: torch.dtype | None, out_dtype: torch.dtype | None
) -> None:
    _check_norm("layer_norm", x, weight, round_dtype, out_dtype)
    check_floating("layer_norm", bias=bias)
    if bias is not None:
        check_sizes("layer_norm", "bias", bias.shape, x.shape[-1:])


@semantic_op(
    "norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, *, ScalarType? round_dtype=None, ScalarType? out_dtype=None) -> Tensor",
)
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Layer normalisation over the last dimension, with an optional weight and an optional bias.

    Maths: `y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, `var` being the biased variance over the last dimension.

    Args:
        x: [..., H], floating point.
        weight: [H] or None.
        bias: [H] or None.
        eps: added to the variance.
        round_dtype: dtype to which the normalised x is rounded before weight and bias; None keeps the internal precision.
        out_dtype: dtype of the result; None is that of `x`.

    Returns:
        [..., H] in `out_dtype`.

    Rounding: fp32 inside (fp64 if `x` is). Weight and bias apply in the dtype that `round_dtype` (or the internal dtype) and theirs
        promote to.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: a shape does not fit.

    Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450; `torch.nn.functional.layer_norm` over one dimension.
    """
    _check_layer_norm(x, weight, bias, round_dtype, out_dtype)
    value = x.to(compute_dtype(x))
    centred = value - value.mean(-1, keepdim=True)
    y = _scale(centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps), weight, 0, round_dtype)
    if bias is not None:
        y = y + bias
    return stored_like(y.to(x.dtype if out_dtype is None else out_dtype), x)


@layer_norm.fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_layer_norm(x, weight, bias, round_dtype, out_dtype)
    return torch.empty_like(x, dtype=out_dtype)


def _check_l2_norm(x: Tensor, eps_mode: str, out_dtype: torch.dtype | None) -> None:
    _check_norm("l2_norm", x, None, None, out_dtype)
    check_choice("l2_norm", "eps_mode", eps_mode, EPS_MODES)


@semantic_op("norm", '(Tensor x, float eps, *, str eps_mode="add", float scale=1.0, ScalarType? out_dtype=None) -> Tensor')
def l2_norm(x: Tensor, eps: float, *, eps_mode: str = "add", scale: float = 1.0, out_dtype: torch.dtype | None = None) -> Tensor:
    """Scaling of the last dimension to Euclidean length `scale`.

    Maths: `x / sqrt(sum(x^2, -1) + eps) * scale` with `eps_mode="add"`, `x / max(sqrt(sum(x^2, -1)), eps) * scale` with `"max"`.

    Args:
        x: [..., H], floating point.
        eps: keeps the divisor from 0.
        eps_mode: `add` (gated delta rule) or `max` (`torch.nn.functional.normalize`).
        scale: multiplies the result.
        out_dtype: dtype of the result; None is that of `x`.

    Returns:
        [..., H] in `out_dtype`.

    Rounding: fp32 inside (fp64 if `x` is), one cast at the end.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: an unknown `eps_mode`, or a scalar `x`.

    Source: `torch.nn.functional.normalize`; `l2norm` of flash-linear-attention.
    """
    _check_l2_norm(x, eps_mode, out_dtype)
    value = x.to(compute_dtype(x))
    squares = value.square().sum(-1, keepdim=True)
    y = value * torch.rsqrt(squares + eps) if eps_mode == "add" else value / squares.sqrt().clamp_min(eps)
    return stored_like((y * scale).to(x.dtype if out_dtype is None else out_dtype), x)


@l2_norm.fake
def _(x: Tensor, eps: float, *, eps_mode: str = "add", scale: float = 1.0, out_dtype: torch.dtype | None = None) -> Tensor:
    _check_l2_norm(x, eps_mode, out_dtype)
    return torch.empty_like(x, dtype=out_dtype)
