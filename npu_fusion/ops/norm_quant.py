"""Norms and gated units of which the result is quantised: `rms_norm_quant`, `add_rms_norm_quant`, `glu_quant`, `dequant_glu_quant`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..semantic import semantic_op
from ._common import check_type
from .glu import glu
from .norm import add_rms_norm, rms_norm
from .quant import dequantize, quantize
from .quant_core import DEQUANTIZATION_NAMES, QUANTIZE_SCHEMA, Quantization, Quantized

_NORM = "int weight_offset=0, ScalarType? round_dtype=None, ScalarType? norm_dtype=None, bool return_norm=False"


def _norm_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the norm among those of an op, under its names."""
    taken: dict[str, Any] = {name: options.pop(name) for name in ("weight_offset", "round_dtype") if name in options}
    return {**taken, "out_dtype": options.pop("norm_dtype", None)}


@semantic_op(
    "quant",
    f"(Tensor x, Tensor? weight, float eps, Tensor? scale=None, Tensor? zero_point=None, *, {_NORM}, {QUANTIZE_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    parts=("rms_norm", "quantize"),
)
def rms_norm_quant(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | None = None, zero_point: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm, quantised.

    Maths: `y = rms_norm(x, weight, eps)`, then as `quantize(y, scale, zero_point)`.

    Args:
        x: [..., H], floating point.
        weight: [H] or None.
        eps: added to the mean square.
        scale, zero_point: as in `quantize`.
        options: `weight_offset` and `round_dtype` as in `rms_norm`; `norm_dtype`: dtype of y, None: that of x; `return_norm`: y is returned
            too; and those of
            `quantize`: `smooth`, `smooth_divide`, `apply`, `symmetric`, `with_zero`, `per_tensor`, `steps`,
            `steps_reciprocal`, `floor_mode`, `floor`, `round_last`, `low`, `high`, `dtype`, `compute_dtype`, `scale_dtype`, `value_dtype`.

    Returns:
        q, scale and zero point as in `quantize`; y [..., H], or [0] without `return_norm`.

    Rounding: as in `rms_norm` and `quantize`.

    Raises:
        TypeError: as `rms_norm` and `quantize`.
        ValueError: as `rms_norm` and `quantize`.

    Source: `npu_rms_norm_quant`, `npu_rms_norm_quant_v2` of torch_npu.
    """
    return_norm = options.pop("return_norm", False)
    y = rms_norm(x, weight, eps, **_norm_arguments(options))
    return *quantize(y, scale, zero_point, **options), y if return_norm else y.new_empty((0,))


@rms_norm_quant.fake
def _(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | None = None, zero_point: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return_norm = options.pop("return_norm", False)
    y = rms_norm(x, weight, eps, **_norm_arguments(options))
    how = Quantization(scale, zero_point, **options)
    how.check("rms_norm_quant", y)
    return *how.empty(y), y if return_norm else y.new_empty((0,))


@semantic_op(
    "quant",
    "(Tensor x, Tensor residual, Tensor? weight, float eps, Tensor? scale=None, Tensor? zero_point=None, *, Tensor? bias=None, "
    f"bool norm_unrounded=False, ScalarType? sum_dtype=None, {_NORM}, {QUANTIZE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    parts=("add_rms_norm", "quantize"),
)
def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Residual addition and the RMSNorm of the sum, quantised; the sum is returned too.

    Maths: `y, s = add_rms_norm(x, residual, weight, eps)`, then as `quantize(y, scale, zero_point)`.

    Args:
        x, residual, weight, eps: as in `add_rms_norm`.
        scale, zero_point: as in `quantize`.
        options: `bias`, `norm_unrounded`, `sum_dtype`, `weight_offset`, `round_dtype` as in `add_rms_norm`; `norm_dtype`: dtype of y, None:
            that of the sum; `return_norm`: y is returned too; and those of
            `quantize`: `smooth`, `smooth_divide`, `apply`, `symmetric`, `with_zero`, `per_tensor`, `steps`,
            `steps_reciprocal`, `floor_mode`, `floor`, `round_last`, `low`, `high`, `dtype`, `compute_dtype`, `scale_dtype`, `value_dtype`.

    Returns:
        q, scale and zero point as in `quantize`; y [..., H], or [0] without `return_norm`; the sum [..., H].

    Rounding: as in `add_rms_norm` and `quantize`.

    Raises:
        TypeError: as `add_rms_norm` and `quantize`.
        ValueError: as `add_rms_norm` and `quantize`.

    Source: `npu_add_rms_norm_quant`, `npu_add_rms_norm_dynamic_quant` of torch_npu.
    """
    return_norm = options.pop("return_norm", False)
    y, total = add_rms_norm(x, residual, weight, eps, **_sum_arguments(options))
    return *quantize(y, scale, zero_point, **options), y if return_norm else y.new_empty((0,)), total


def _sum_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the sum and its norm among those of an op, under their names."""
    sums: dict[str, Any] = {name: options.pop(name) for name in ("bias", "norm_unrounded", "sum_dtype") if name in options}
    return {**sums, **_norm_arguments(options)}


@add_rms_norm_quant.fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return_norm = options.pop("return_norm", False)
    y, total = add_rms_norm(x, residual, weight, eps, **_sum_arguments(options))
    how = Quantization(scale, zero_point, **options)
    how.check("add_rms_norm_quant", y)
    return *how.empty(y), y if return_norm else y.new_empty((0,)), total


# -------------------------------------------------------------------- gated units

_UNIT = (
    'str activation="silu", str layout="halves", float alpha=1.0, float? gate_limit=None, float? up_limit=None, float up_offset=0.0, '
    "ScalarType? round_dtype=None, ScalarType? product_dtype=None"
)
_UNIT_NAMES = ("activation", "layout", "alpha", "gate_limit", "up_limit", "up_offset", "round_dtype")


def _unit_arguments(options: dict[str, Any]) -> dict[str, Any]:
    taken = {name: options.pop(name) for name in _UNIT_NAMES if name in options}
    return {**taken, "out_dtype": options.pop("product_dtype", None)}


@semantic_op(
    "quant",
    f"(Tensor gate, Tensor? up, Tensor? scale=None, Tensor? zero_point=None, *, {_UNIT}, {QUANTIZE_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    parts=("glu", "quantize"),
)
def glu_quant(gate: Tensor, up: Tensor | None, scale: Tensor | None = None, zero_point: Tensor | None = None, **options: Any) -> Quantized:
    """A gated unit, quantised.

    Maths: `y = glu(gate, up)`, then as `quantize(y, scale, zero_point)`.

    Args:
        gate, up: as in `glu`.
        scale, zero_point: as in `quantize`.
        options: `activation`, `layout`, `alpha`, `gate_limit`, `up_limit`, `up_offset`, `round_dtype` as in `glu`; `product_dtype`: its
            `out_dtype`; and those of `quantize`: `smooth`, `smooth_divide`, `apply`, `symmetric`, `with_zero`, `per_tensor`, `steps`,
            `steps_reciprocal`, `floor_mode`, `floor`, `round_last`, `low`, `high`, `dtype`, `compute_dtype`, `scale_dtype`, `value_dtype`.

    Returns:
        q, scale and zero point as in `quantize`.

    Rounding: as in `glu` and `quantize`.

    Raises:
        TypeError: as `glu` and `quantize`.
        ValueError: as `glu` and `quantize`.

    Source: `npu_swiglu_quant` of torch_npu.
    """
    y = glu(gate, up, **_unit_arguments(options))
    found: Quantized = quantize(y, scale, zero_point, **options)
    return found


@glu_quant.fake
def _(gate: Tensor, up: Tensor | None, scale: Tensor | None = None, zero_point: Tensor | None = None, **options: Any) -> Quantized:
    y = glu(gate, up, **_unit_arguments(options))
    how = Quantization(scale, zero_point, **options)
    how.check("glu_quant", y)
    return how.empty(y)


_SUMS = (
    "Tensor? sum_bias=None, bool sum_combined=False, bool sum_bias_first=False, ScalarType? sum_compute_dtype=None, "
    "ScalarType? sum_round_dtype=None, ScalarType? sum_out_dtype=None"
)


@semantic_op(
    "quant",
    "(Tensor x, Tensor sum_scale, Tensor? sum_scale2=None, Tensor? scale=None, Tensor? zero_point=None, *, "
    f"{_SUMS}, {_UNIT}, {QUANTIZE_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    parts=("dequantize", "glu", "quantize"),
)
def dequant_glu_quant(
    x: Tensor,
    sum_scale: Tensor,
    sum_scale2: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    **options: Any,
) -> Quantized:
    """A gated unit of the int32 sums of an int8 matmul, quantised again.

    Maths: `h = dequantize(x, sum_scale, sum_scale2, bias=sum_bias)` [..., 2I], `y = glu(h, None)`, then as `quantize`.

    Args:
        x: [..., 2I], int32: gate and up, merged.
        sum_scale, sum_scale2: as `scale` and `scale2` of `dequantize`.
        scale, zero_point: as in `quantize`.
        options: `sum_bias`, `sum_combined`, `sum_bias_first`, `sum_compute_dtype`, `sum_round_dtype`, `sum_out_dtype`: as those of
            `dequantize`; `activation`, `layout`, `alpha`, `gate_limit`, `up_limit`, `up_offset`, `round_dtype`, `product_dtype`: as in
            `glu_quant`; and those of `quantize`: `smooth`, `smooth_divide`, `apply`, `symmetric`, `with_zero`, `per_tensor`, `steps`,
            `steps_reciprocal`, `floor_mode`, `floor`, `round_last`, `low`, `high`, `dtype`, `compute_dtype`, `scale_dtype`, `value_dtype`.

    Returns:
        q [..., I], scale and zero point as in `quantize`.

    Rounding: as in `dequantize`, `glu` and `quantize`.

    Raises:
        TypeError: as these.
        ValueError: as these.

    Source: `npu_dequant_swiglu_quant` of torch_npu.
    """
    y = _unit_of_sums(x, sum_scale, sum_scale2, options)
    found: Quantized = quantize(y, scale, zero_point, **options)
    return found


def _unit_of_sums(x: Tensor, scale: Tensor, scale2: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The unit of the sums; takes its arguments out of `options`."""
    check_type("dequant_glu_quant", x.dtype == torch.int32, f"x must be int32, not {x.dtype}")
    names = [name for name in DEQUANTIZATION_NAMES if f"sum_{name}" in options]
    sums = dequantize(x, scale, scale2, **{name: options.pop(f"sum_{name}") for name in names})
    unit: Tensor = glu(sums, None, **_unit_arguments(options))
    return unit


@dequant_glu_quant.fake
def _(
    x: Tensor,
    sum_scale: Tensor,
    sum_scale2: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    **options: Any,
) -> Quantized:
    y = _unit_of_sums(x, sum_scale, sum_scale2, options)
    how = Quantization(scale, zero_point, **options)
    how.check("dequant_glu_quant", y)
    return how.empty(y)
