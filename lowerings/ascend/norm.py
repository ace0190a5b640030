"""Normalisations on Ascend: rms_norm, add_rms_norm, layer_norm, l2_norm.

`npu_rms_norm` and `npu_gemma_rms_norm` keep fp32 to the end, `npu_add_rms_norm` rounds the normalised sum before the weight: a model that
does not gets the sum and the norm apart.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from ...lower import Arguments, Builder
from .provide import Npu, keeps_rounding, provides, provides_aten

aten = torch.ops.aten

_HALVES = (torch.float16, torch.bfloat16)


def _filled(b: Builder, like: Node, value: float, dtype: torch.dtype) -> Node:
    """A constant vector as long as the last dimension of `like`."""
    size = b.val(like).shape[-1]
    b.require(isinstance(size, int), "the last dimension is symbolic, and the norm has no weight")
    device = b.val(like).device
    return b.constant(("filled", size, value, dtype, device), lambda: torch.full((int(size),), value, dtype=dtype, device=device))


def weight_or_ones(b: Builder, x: Node, weight: Node | None) -> Node:
    """The weight, or ones; in a dtype that npu_rms_norm takes beside x."""
    dtype = b.val(x).dtype
    if weight is None:
        return _filled(b, x, 1.0, dtype)
    return weight if b.val(weight).dtype == dtype or dtype in _HALVES else b.cast(weight, dtype)


def _rounds_before_weight(a: Arguments, dtype: torch.dtype) -> torch.dtype | None:
    """The 16-bit dtype to which the model rounds the normalised x before the weight, or None.

    With no weight it makes no difference where that is `dtype`, to which the op rounds next.
    """
    rounded = a.round_dtype if a.round_dtype in _HALVES else None
    return None if a.weight is None and rounded == dtype else rounded


def _not_float64(b: Builder, **tensors: Node | None) -> None:
    """Refuse float64, which no norm of the NPU takes and fp32 would cut short."""
    for name, tensor in tensors.items():
        b.require(tensor is None or b.val(tensor).dtype != torch.float64, f"{name} is float64")


def _normalised(b: Builder, a: Arguments, npu: Npu, x: Node, out_dtype: torch.dtype, *, gemma: bool) -> Node:
    """The norm of x by one op, in the wider of the dtypes of x and of the result; a narrower result is rounded after it."""
    b.only_if(a.weight_offset == gemma)
    x = b.cast(x, torch.promote_types(b.val(x).dtype, out_dtype))
    dtype = b.val(x).dtype
    keeps_rounding(b, None, _rounds_before_weight(a, dtype), "the normalised x before the weight")
    if gemma:
        weight = a.weight if dtype in _HALVES else b.cast(a.weight, dtype)
        y, _ = npu("npu::npu_gemma_rms_norm", x, weight, a.eps)
    else:
        y, _ = npu("npu::npu_rms_norm", x, weight_or_ones(b, x, a.weight), a.eps)
    return b.cast(y, out_dtype)


@provides("rms_norm", "npu::npu_rms_norm")
def rms_norm(b: Builder, a: Arguments, npu: Npu) -> Node:
    """x * rsqrt(mean(x^2) + eps) * weight."""
    return _normalised(b, a, npu, a.x, a.out_dtype or b.val(a.x).dtype, gemma=False)


@provides("rms_norm", "npu::npu_gemma_rms_norm")
def gemma_rms_norm(b: Builder, a: Arguments, npu: Npu) -> Node:
    """x * rsqrt(mean(x^2) + eps) * (1 + weight)."""
    return _normalised(b, a, npu, a.x, a.out_dtype or b.val(a.x).dtype, gemma=True)


@provides("rms_norm", "npu::npu_rms_norm", rank=1)
def fp32_rms_norm(b: Builder, a: Arguments, npu: Npu) -> Node:
    """The general form in fp32 around one npu_rms_norm: 1 + weight of another dtype, gates before or after, groups of channels."""
    out_dtype = a.out_dtype or b.val(a.x).dtype
    _not_float64(b, x=a.x, weight=a.weight, gate=a.gate)
    x, weight = b.cast(a.x, torch.float32), a.weight
    keeps_rounding(b, None, _rounds_before_weight(a, out_dtype if a.gate is None else torch.float32), "the normalised x before the weight")
    gate = None if a.gate is None else b.emit(_GATES[a.gate_activation], b.cast(a.gate, torch.float32))
    if gate is not None and a.gate_first:
        x = b.emit(aten.mul.Tensor, x, gate)
    if weight is not None:
        weight = b.cast(weight, torch.float32)
        weight = b.emit(aten.add.Tensor, weight, 1) if a.weight_offset else weight
    y = _grouped(b, x, weight, a, npu) if a.group_size else npu("npu::npu_rms_norm", x, weight_or_ones(b, x, weight), a.eps)[0]
    if gate is not None and not a.gate_first:
        y = b.emit(aten.mul.Tensor, y, gate)
    return b.cast(y, out_dtype)


_GATES = {"silu": aten.silu.default, "sigmoid": aten.sigmoid.default}


def _grouped(b: Builder, x: Node, weight: Node | None, a: Arguments, npu: Npu) -> Node:
    """The norm of each group of channels; the weight of all of them is multiplied after it."""
    leading: list[Any] = [b.size(x, dim) for dim in range(b.val(x).dim())]
    width = leading.pop()
    b.require(isinstance(width, int), "the last dimension is symbolic, and the norm goes over groups of it")
    groups = b.reshape(x, [*leading, width // a.group_size, a.group_size])
    y, _ = npu("npu::npu_rms_norm", groups, _filled(b, groups, 1.0, torch.float32), a.eps)
    y = b.reshape(y, [*leading, width])
    return y if weight is None else b.emit(aten.mul.Tensor, y, weight)


# -------------------------------------------------------------------- residual sums


def _sum_args(b: Builder, a: Arguments) -> tuple[Node, Node]:
    """The addends, in the one dtype that the op takes."""
    x, residual = a.x, a.residual
    dtype = b.val(x).dtype
    b.require(b.val(residual).dtype == dtype, f"x is {dtype}, the residual {b.val(residual).dtype}")
    b.require(a.sum_dtype in (None, dtype), f"it gives the sum in {dtype}, the model in {a.sum_dtype}")
    b.require(a.out_dtype in (None, dtype), f"it gives {dtype}, the model {a.out_dtype}")
    return x, residual


def keeps_sum(b: Builder, a: Arguments, dtype: torch.dtype) -> None:
    """bf16: the op normalises the unrounded sum; fp16: the rounded one."""
    if dtype == torch.bfloat16:
        keeps_rounding(b, None, None if a.norm_unrounded else dtype, "the sum that is normalised")
    elif dtype == torch.float16:
        keeps_rounding(b, dtype, None if a.norm_unrounded else dtype, "the sum that is normalised")
    else:
        a.norm_unrounded  # noqa: B018  fp32: the same either way


@provides("add_rms_norm", "npu::npu_add_rms_norm")
def add_rms_norm(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
    """s = x + residual, and s * rsqrt(mean(s^2) + eps) * weight."""
    b.only_if(a.weight_offset == 0)
    x, residual = _sum_args(b, a)
    dtype = b.val(x).dtype
    if dtype in _HALVES and a.weight is not None:
        keeps_rounding(b, dtype, a.round_dtype, "the normalised sum before the weight")
    elif a.round_dtype is not None:
        keeps_rounding(b, None, _rounds_before_weight(a, dtype), "the normalised sum before the weight")
    keeps_sum(b, a, dtype)
    y, _, total = npu("npu::npu_add_rms_norm", x, residual, weight_or_ones(b, x, a.weight), a.eps)
    return [y, total]


@provides("add_rms_norm", "npu::npu_add_rms_norm_cast", rank=1)
def add_rms_norm_cast(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
    """As add_rms_norm, for models that multiply the weight in fp32: one launch, whose fp32 result is not used."""
    b.only_if(a.weight_offset == 0)
    x, residual = _sum_args(b, a)
    dtype = b.val(x).dtype
    keeps_rounding(b, None, _rounds_before_weight(a, dtype), "the normalised sum before the weight")
    keeps_sum(b, a, dtype)
    _, y, _, total = npu("npu::npu_add_rms_norm_cast", x, residual, weight_or_ones(b, x, a.weight), a.eps)
    return [y, total]


def _sum(b: Builder, a: Arguments) -> Node:
    """The sum by itself, rounded once, as the norm then reads it."""
    x, residual = a.x, a.residual
    _not_float64(b, x=x, residual=residual, bias=a.bias)
    dtype = torch.promote_types(b.val(x).dtype, b.val(residual).dtype)
    total_dtype = a.sum_dtype or dtype
    b.require(not a.norm_unrounded or total_dtype == torch.float32, "the model normalises the sum before it is rounded")
    if a.bias is None:
        wide = b.cast(x, torch.promote_types(dtype, total_dtype))  # a sum that is kept wider than the addends is not rounded to their dtype
        return b.cast(b.emit(aten.add.Tensor, wide, residual), total_dtype)
    wide = b.emit(aten.add.Tensor, b.cast(x, torch.float32), b.cast(residual, torch.float32))
    return b.cast(b.emit(aten.add.Tensor, wide, b.cast(a.bias, torch.float32)), total_dtype)


@provides("add_rms_norm", "npu::npu_rms_norm", rank=2, name="aten.add + npu.npu_rms_norm")
def add_then_rms_norm(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
    """The sum and the norm apart: what rounds or types otherwise than the fused op does."""
    total = _sum(b, a)
    return [_normalised(b, a, npu, total, a.out_dtype or b.val(total).dtype, gemma=False), total]


@provides("add_rms_norm", "npu::npu_gemma_rms_norm", rank=2, name="aten.add + npu.npu_gemma_rms_norm")
def add_then_gemma_rms_norm(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
    """The sum, and the norm of it times (1 + weight)."""
    total = _sum(b, a)
    return [_normalised(b, a, npu, total, a.out_dtype or b.val(total).dtype, gemma=True), total]


# -------------------------------------------------------------------- others


@provides("l2_norm", "npu::npu_rms_norm")
def l2_norm(b: Builder, a: Arguments, npu: Npu) -> Node:
    """x / sqrt(sum(x^2) + eps) * scale, as the RMS norm with eps / H and the constant weight scale / sqrt(H)."""
    b.require(a.eps_mode == "add", "eps is a lower limit of the divisor there, it adds eps to the mean square")
    size = b.val(a.x).shape[-1]
    b.require(isinstance(size, int), "the last dimension is symbolic, and the weight depends on it")
    b.require(all(isinstance(number, (int, float)) for number in (a.eps, a.scale)), "eps or scale is known at run time only")
    out_dtype = a.out_dtype or b.val(a.x).dtype
    x = b.cast(a.x, torch.promote_types(b.val(a.x).dtype, out_dtype))
    weight = _filled(b, x, a.scale / math.sqrt(size), torch.float32)
    y, _ = npu("npu::npu_rms_norm", x, weight, a.eps / size)
    return b.cast(y, out_dtype)


@provides_aten("layer_norm", "aten.native_layer_norm")
def layer_norm(b: Builder, a: Arguments) -> Node:
    """(x - mean) * rsqrt(var + eps) * weight + bias: PyTorch's own op, one launch of aclnnLayerNorm, which keeps fp32 to the end.

    Weight and bias have one dtype, that of x or fp32 (ops-nn norm/layer_norm_v4 docs/aclnnLayerNorm).
    """
    out_dtype = a.out_dtype or b.val(a.x).dtype
    x = b.cast(a.x, torch.promote_types(b.val(a.x).dtype, out_dtype))
    dtype = b.val(x).dtype
    _not_float64(b, x=x, weight=a.weight, bias=a.bias)
    given = {b.val(tensor).dtype for tensor in (a.weight, a.bias) if tensor is not None}
    keeps_rounding(b, None, a.round_dtype if given and a.round_dtype in _HALVES else None, "the normalised x before the weight")
    affine = dtype if given <= {dtype} else torch.float32
    weight, bias = (None if tensor is None else b.cast(tensor, affine) for tensor in (a.weight, a.bias))
    y = b.results(b.emit(aten.native_layer_norm.default, x, [b.size(x, -1)], weight, bias, a.eps), 1)[0]
    return b.cast(y, out_dtype)
