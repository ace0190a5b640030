"""Providers of the quantising semantic ops by the Triton ops of quant.py, norm_quant.py, glu_quant.py and int8_matmul.py.

A semantic op says where the model rounds; the kernels compute in fp32 and round once. So with `rounding="exact"` calls whose steps are all
fp32, in the kernels' order, are taken, and others are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...lower import Arguments, Builder
from ..quant_forms import (
    bias_of_channels,
    channels,
    is_exact,
    is_of_rows,
    ones_but_last,
    require_fp32,
    roles_of,
    rows_of,
    scales_of,
    scaling,
)
from . import glu_quant as glu_ops
from . import int8_matmul as matmul_ops
from . import norm_quant as norm_ops
from . import quant as ops
from .checks import FLOATS
from .provide import provides, require_width
from .quant import SMALLEST_SCALE

aten = torch.ops.aten
_STEPS = 127.0
_SPAN = 255.0


def _require_floats(b: Builder, **tensors: Node | None) -> None:
    for name, node in tensors.items():
        b.require(node is None or b.val(node).dtype in FLOATS, f"{name} is {None if node is None else b.val(node).dtype}")


# -------------------------------------------------------------------- quantise


@dataclass(frozen=True)
class _Found:
    """How the kernels find scales: the least scale, and whether they divide."""

    min_scale: float
    divide: bool


def _integral(b: Builder, a: Arguments) -> None:
    """What all kernels demand: signed bytes, clamped to all of them or all but the least."""
    b.require(a.dtype in (None, torch.int8), f"the kernel stores int8, the model {a.dtype}")
    b.require(a.high == 127 and a.low in (-128, -127), f"the kernel clamps to 127, the model to [{a.low}, {a.high}]")
    b.require(a.smooth is None or not a.smooth_divide, "the kernel multiplies by the smoothing vector, the model divides")
    b.require(not a.per_tensor, "the kernel finds a scale for each row, the model one for all")
    require_fp32(b, "the quotient", a.value_dtype)


def _min_scale(b: Builder, a: Arguments, least: bool) -> float:
    """The least scale of a call; `least`: whether the kernel has one."""
    mode, floor = a.floor_mode, a.floor
    if mode in ("amax", "scale"):
        floor = floor / a.steps if mode == "amax" else floor
        if least and floor >= SMALLEST_SCALE:
            return float(floor)
    b.require(mode in ("none", "amax", "scale"), f"the kernel has no floor of the kind {mode!r}")
    b.require(mode == "none" or not is_exact(b), "the kernel has no least scale of that size: rounding is 'exact'")
    return 0.0


def symmetric(b: Builder, a: Arguments, source: torch.dtype, least: bool = True) -> _Found:
    _integral(b, a)
    b.require(a.steps == _STEPS, f"the kernel has 127 steps, the model {a.steps}")
    require_fp32(b, "the scale", a.compute_dtype or source, a.scale_dtype)
    plain = a.apply in ("divide", "reciprocal") and not a.steps_reciprocal
    b.require(plain or not is_exact(b), "the model finds or applies the scale by a reciprocal of its own: rounding is 'exact'")
    a.round_last  # noqa: B018  there is no zero point
    a.with_zero  # noqa: B018
    return _Found(_min_scale(b, a, least), a.apply == "divide")


def _static(b: Builder, a: Arguments, width: Any) -> tuple[dict[str, Any], bool]:
    """The given scale and zero point, and whether the kernel divides."""
    _integral(b, a)
    _require_floats(b, scale=a.scale)
    known = a.zero_point is None or b.val(a.zero_point).dtype in ops.ZERO_POINTS
    zero = a.zero_point if known else b.cast(a.zero_point, torch.int32)
    b.require(known or not b.val(a.zero_point).is_floating_point(), "the zero point is float64")
    b.require(a.apply in ("divide", "multiply") or not is_exact(b), "the model multiplies by the reciprocal: rounding is 'exact'")
    b.require(zero is None or a.round_last or not is_exact(b), "the kernel adds the zero point before it rounds: rounding is 'exact'")
    a.round_last  # noqa: B018
    for name in ("steps", "steps_reciprocal", "floor_mode", "floor", "compute_dtype", "scale_dtype", "with_zero", "symmetric"):
        getattr(a, name)  # they are of scales that are found
    tensors = {"scale": channels(b, "scale", a.scale, width), "zero_point": channels(b, "zero_point", zero, width)}
    return tensors, a.apply != "multiply"


@provides("quantize", "triton.dynamic_quantize")
def dynamic_quantize(b: Builder, a: Arguments, cores: int) -> list[Node | None]:
    b.only_if(a.scale is None and a.symmetric)
    _require_floats(b, x=a.x, smooth=a.smooth)
    require_width(b, x=a.x)
    how = symmetric(b, a, b.val(a.x).dtype)
    call = b.emit(ops.dynamic_quantize.overload, a.x, smooth=a.smooth, min_scale=how.min_scale, divide=how.divide, cores=cores)
    q, scale = b.results(call, 2)
    return [q, scales_of(b, a, a.x, scale), None]


@provides("quantize", "triton.asymmetric_quantize")
def asymmetric_quantize(b: Builder, a: Arguments, cores: int) -> list[Node | None]:
    b.only_if(a.scale is None and not a.symmetric)
    _require_floats(b, x=a.x, smooth=a.smooth)
    require_width(b, x=a.x)
    _integral(b, a)
    b.require(a.steps == _SPAN and a.low == -128, f"the kernel has 255 steps from -128, the model {a.steps} from {a.low}")
    b.require(a.with_zero, "the zero point of a range without 0 is not clamped by the kernel")
    b.require(not is_exact(b), "the kernel takes the zero point off the largest number, the model off the least: rounding is 'exact'")
    a.round_last, a.apply, a.steps_reciprocal  # noqa: B018  they change the last bit only
    form: dict[str, Any] = {"smooth": a.smooth, "with_zero": True, "whole_zero": True, "min_scale": _min_scale(b, a, least=True)}
    call = b.emit(ops.asymmetric_quantize.overload, a.x, **form, divide=a.apply == "divide", cores=cores)
    q, scale, zero = b.results(call, 3)
    scale = scales_of(b, a, a.x, scale)
    zero_dtype = torch.promote_types(a.compute_dtype or b.val(a.x).dtype, b.val(scale).dtype)
    return [q, scale, b.cast(b.reshape(zero, b.val(scale).shape[:-1] and [*rows_of(b, a.x), 1]), zero_dtype)]


@provides("quantize", "triton.static_quantize")
def static_quantize(b: Builder, a: Arguments, cores: int) -> list[Node | None]:
    b.only_if(a.scale is not None)
    _require_floats(b, x=a.x)
    require_width(b, x=a.x)
    b.require(a.smooth is None, "the kernel of given scales does not smooth")
    tensors, divide = _static(b, a, b.val(a.x).shape[-1])
    lowest = int(a.low)
    call = b.emit(ops.static_quantize.overload, a.x, tensors["scale"], tensors["zero_point"], divide=divide, lowest=lowest, cores=cores)
    return [call, None, None]


# -------------------------------------------------------------------- dequantise


@provides("dequantize", "triton.dequantize")
def dequantize(b: Builder, a: Arguments, cores: int) -> Node:
    val = b.val(a.x)
    b.require(val.dtype in (torch.int8, torch.int32), f"x is {val.dtype}, the kernel reads int8 and int32")
    require_width(b, x=a.x)
    scaling(b, a)
    out = a.out_dtype or torch.float32
    b.require(out in FLOATS, f"the result is {out}")
    roles = roles_of(b, (a.scale, a.scale2), val.shape[:-1], val.shape[-1])
    zero = _zero_point(b, a.zero_point, val)
    bias = bias_of_channels(b, a.bias, val.shape[-1])
    a.bias_first  # noqa: B018  a bias of int32 is added first, and no other
    form: dict[str, Any] = {"out_dtype": out, "bias": bias, "cores": cores, **zero}
    return b.emit(ops.dequantize.overload, a.x, roles.rows, roles.channels, **form)


def _zero_point(b: Builder, node: Node | None, x: Tensor) -> dict[str, Any]:
    if node is None:
        return {}
    if is_of_rows(b.val(node), x.shape[:-1]) and not ones_but_last(b.val(node).shape):
        rows = b.reshape(node, [b.size(node, dim) for dim in range(b.val(node).dim() - 1)])
        return {"row_zero_point": b.cast(rows, torch.float32)}
    return {"zero_point": b.cast(channels(b, "zero_point", node, x.shape[-1]) or node, torch.float32)}


@provides("quant_linear", "triton.int8_matmul", matrix=True)
def quant_linear(b: Builder, a: Arguments, cores: int) -> Node:
    width, rows = b.val(a.weight).shape[1], b.val(a.x).shape[:-1]
    b.require(all(isinstance(size, int) for size in b.val(a.weight).shape), "the weight has symbolic sizes: a kernel is compiled for them")
    scaling(b, a)
    out = a.out_dtype or (torch.int32 if a.scale is None else torch.float32)
    b.require(out in (*FLOATS, torch.int32), f"the result is {out}")
    roles = roles_of(b, (a.scale, a.scale2), rows, width)
    weight_scale = roles.channels
    if weight_scale is None and out != torch.int32:
        device = b.val(a.x).device
        weight_scale = b.emit(aten.full.default, [1], 1.0, dtype=torch.float32, device=device)
    form: dict[str, Any] = {"bias_first": a.bias_first, "out_dtype": out, "cores": cores, **_row_zeros(b, a)}
    return b.emit(matmul_ops.int8_matmul.overload, a.x, a.weight, weight_scale, roles.rows, bias_of_channels(b, a.bias, width), **form)


def _row_zeros(b: Builder, a: Arguments) -> dict[str, Any]:
    """The zero point of the activations, of the rows or one, and the sums of the weight's columns."""
    if a.zero_point is None:
        a.column_sums  # noqa: B018  they go with a zero point
        return {}
    val = b.val(a.zero_point)
    one = ones_but_last(val.shape) and (val.dim() == 0 or val.shape[-1] == 1)
    b.require(one or is_of_rows(val, b.val(a.x).shape[:-1]), "the zero point is not one a row")
    zero = b.reshape(a.zero_point, [1]) if one else a.zero_point
    sums = b.reshape(a.column_sums, [b.val(a.weight).shape[1]])
    return {"x_zero_point": b.cast(zero, torch.int32), "weight_sum": b.cast(sums, torch.int32)}


# -------------------------------------------------------------------- norms


def _norm_form(b: Builder, a: Arguments, width: Any) -> dict[str, Any]:
    """The arguments that the two norms share."""
    rounding = a.round_dtype if is_exact(b) else None
    for name, dtype in (("round_dtype", rounding), ("norm_dtype", a.norm_dtype)):
        b.require(dtype is None or dtype in FLOATS, f"{name} is {dtype}")
    form: dict[str, Any] = {"weight_offset": a.weight_offset, "round_dtype": rounding, "norm_dtype": a.norm_dtype}
    a.round_dtype  # noqa: B018
    form["return_norm"] = a.return_norm
    if a.scale is None:
        b.require(a.symmetric, "the kernel of norms quantises symmetrically")
        how = symmetric(b, a, a.norm_dtype or b.val(a.x).dtype)
        return {**form, "smooth": a.smooth, "min_scale": how.min_scale, "divide": how.divide}
    b.require(a.smooth is None, "the kernel of given scales does not smooth")
    tensors, divide = _static(b, a, width)
    return {**form, **tensors, "divide": divide, "lowest": int(a.low)}


def _norm_results(b: Builder, a: Arguments, q: Node, scale: Node, norm: Node) -> list[Node | None]:
    """q, scale, no zero point, and the norm if it is returned."""
    found = None
    if a.scale is None:
        dtype = a.scale_dtype or a.compute_dtype or a.norm_dtype or b.val(a.x).dtype
        found = b.cast(b.reshape(scale, [*rows_of(b, a.x), 1]), dtype)
    return [q, found, None, norm if a.return_norm else None]


@provides("rms_norm_quant", "triton.rms_norm_quant")
def rms_norm_quant(b: Builder, a: Arguments, cores: int) -> list[Node | None]:
    _require_floats(b, x=a.x, weight=a.weight, smooth=a.smooth)
    require_width(b, x=a.x)
    form = _norm_form(b, a, b.val(a.x).shape[-1])
    form["norm_dtype"] = form["norm_dtype"] or b.val(a.x).dtype
    call = b.emit(norm_ops.rms_norm_quant.overload, a.x, a.weight, a.eps, **form, cores=cores)
    q, scale, norm = b.results(call, 3)
    return _norm_results(b, a, q, scale, norm)


@provides("add_rms_norm_quant", "triton.add_rms_norm_quant")
def add_rms_norm_quant(b: Builder, a: Arguments, cores: int) -> list[Node | None]:
    _require_floats(b, x=a.x, residual=a.residual, weight=a.weight, bias=a.bias, smooth=a.smooth)
    require_width(b, x=a.x)
    form = _norm_form(b, a, b.val(a.x).shape[-1])
    total_dtype = a.sum_dtype or torch.promote_types(b.val(a.x).dtype, b.val(a.residual).dtype)
    b.require(total_dtype in FLOATS, f"the sum is {total_dtype}")
    form["norm_dtype"] = form["norm_dtype"] or total_dtype
    sums: dict[str, Any] = {"bias": a.bias, "norm_unrounded": a.norm_unrounded, "sum_dtype": a.sum_dtype}
    call = b.emit(norm_ops.add_rms_norm_quant.overload, a.x, a.residual, a.weight, a.eps, **sums, **form, cores=cores)
    q, scale, norm, total = b.results(call, 4)
    return [*_norm_results(b, a, q, scale, norm), total]


# -------------------------------------------------------------------- gated units


def _unit_form(b: Builder, a: Arguments) -> dict[str, Any]:
    exact = is_exact(b)
    for name, dtype in (("round_dtype", a.round_dtype), ("product_dtype", a.product_dtype)):
        b.require(dtype is None or dtype in FLOATS, f"{name} is {dtype}")
    limits = {"gate_limit": a.gate_limit, "up_limit": a.up_limit, "up_offset": a.up_offset}
    rounding = {"round_dtype": a.round_dtype if exact else None, "product_dtype": a.product_dtype}
    return {"activation": a.activation, "layout": a.layout, "alpha": a.alpha, **limits, **rounding}


def _unit_scales(b: Builder, a: Arguments, q: Node, scale: Node) -> list[Node | None]:
    dtype = a.scale_dtype or a.compute_dtype or a.product_dtype or torch.float32
    return [q, b.cast(b.reshape(scale, [*rows_of(b, q), 1]), dtype), None]


@provides("glu_quant", "triton.glu_quant")
def glu_quant(b: Builder, a: Arguments, cores: int) -> list[Node | None]:
    b.only_if(a.scale is None)
    b.require(a.symmetric, "the kernel of gated units quantises symmetrically")
    _require_floats(b, gate=a.gate, up=a.up, smooth=a.smooth)
    require_width(b, gate=a.gate, up=a.up)
    symmetric(b, a, a.product_dtype or b.val(a.gate).dtype, least=False)
    call = b.emit(glu_ops.glu_quant.overload, a.gate, a.up, smooth_scale=a.smooth, **_unit_form(b, a), cores=cores)
    return _unit_scales(b, a, *b.results(call, 2))


@provides("dequant_glu_quant", "triton.dequant_glu_quant")
def dequant_glu_quant(b: Builder, a: Arguments, cores: int) -> list[Node | None]:
    b.only_if(a.scale is None)
    b.require(a.symmetric, "the kernel of gated units quantises symmetrically")
    require_width(b, x=a.x)
    symmetric(b, a, a.product_dtype or torch.float32, least=False)
    scaling(b, a, "sum_")
    val = b.val(a.x)
    roles = roles_of(b, (a.sum_scale, a.sum_scale2), val.shape[:-1], val.shape[-1])
    b.require(roles.channels is not None, "there is no scale of the weight's channels")
    assert roles.channels is not None
    b.require(b.val(roles.channels).dim() == 1 and b.equal(b.val(roles.channels).shape[0], val.shape[-1]), "the weight has one scale")
    bias = bias_of_channels(b, a.sum_bias, val.shape[-1])
    a.sum_bias_first  # noqa: B018  a bias of int32 is added first, and no other
    dequant = a.sum_out_dtype if is_exact(b) else None
    a.sum_out_dtype  # noqa: B018
    form: dict[str, Any] = {"bias": bias, "smooth_scale": a.smooth, "dequant_dtype": dequant, **_unit_form(b, a)}
    call = b.emit(glu_ops.dequant_glu_quant.overload, a.x, roles.channels, roles.rows, **form, cores=cores)
    return _unit_scales(b, a, *b.results(call, 2))
