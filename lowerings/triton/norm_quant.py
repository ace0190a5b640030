"""RMSNorm with int8 results by Triton: the ops rms_norm_quant and add_rms_norm_quant.

Both quantise per token, or, with a `scale`, by what is given. A result that is not asked for has the shape [0].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import norm_quant as kernels
from ...kernels.launch import Launch
from ...ops._common import check_sizes, check_value
from .checks import FLOATS, as_rows, as_vector, check_dtypes, check_together, name_of
from .define import device_for, launch, triton_op
from .norm import check_float_dtypes, check_offset, product_dtype
from .quant import check_matrix, check_min_scale, check_static, is_one

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, the scale per token, the norm, the sum."""

_QUANT_SCHEMA = (
    "Tensor? beta=None, int weight_offset=0, ScalarType? round_dtype=None, ScalarType? norm_dtype=None, Tensor? smooth=None, "
    "float min_scale=0.0, Tensor? scale=None, Tensor? zero_point=None, bool? divide=None, int lowest=-128, bool return_norm=False, "
    "int cores"
)


def _check(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    vectors: dict[str, Tensor | None],
    scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    weight_offset: int,
    min_scale: float,
    lowest: int,
    round_dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
    sum_dtype: torch.dtype | None,
    cores: int,
) -> None:
    check_matrix(op, x, cores)
    check_dtypes(op, FLOATS, x=x, residual=residual, **vectors)
    check_together(op, x=x, residual=residual, **vectors, scale=scale, zero_point=zero_point)
    check_float_dtypes(op, round_dtype=round_dtype, norm_dtype=norm_dtype, sum_dtype=sum_dtype)
    check_offset(op, vectors["weight"], weight_offset)
    check_min_scale(op, min_scale)
    if residual is not None:
        check_sizes(op, "residual", residual.shape, x.shape)
    for name, vector in vectors.items():
        if vector is not None:
            check_sizes(op, name, vector.shape, x.shape[-1:])
    if scale is None:
        check_value(op, zero_point is None, "zero_point needs a scale: without, q is symmetric")
        check_value(op, lowest == -128, "lowest needs a scale: without, q is at least -127")
    else:
        check_static(op, x.shape[-1], scale, zero_point, lowest)
        check_value(op, vectors["smooth"] is None, "smooth is of the quantisation per token, which a scale turns off")
        check_value(op, min_scale == 0, "min_scale is of the quantisation per token, which a scale turns off")


def _results(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    norm_dtype: torch.dtype | None,
    sum_dtype: torch.dtype | None,
    return_norm: bool,
) -> Results:
    """Room for the results."""
    total_dtype = x.dtype if residual is None else sum_dtype or torch.promote_types(x.dtype, residual.dtype)
    total = x.new_empty((0,) if residual is None else x.shape, dtype=total_dtype)
    norm = x.new_empty(x.shape if return_norm else (0,), dtype=norm_dtype or total_dtype)
    scales = x.new_empty(x.shape[:-1] if scale is None else (0,), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scales, norm, total


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    *,
    bias: Tensor | None,
    beta: Tensor | None,
    weight_offset: int,
    norm_unrounded: bool,
    sum_dtype: torch.dtype | None,
    round_dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
    smooth: Tensor | None,
    min_scale: float,
    scale: Tensor | None,
    zero_point: Tensor | None,
    divide: bool | None,
    lowest: int,
    return_norm: bool,
    cores: int,
) -> Results:
    """Both ops, once the arguments are checked."""
    results = q, scales, norm, total = _results(x, residual, scale, norm_dtype, sum_dtype, return_norm)
    if x.numel() == 0:
        scales.fill_(min_scale)
        return results
    xs, residuals = as_rows(x), None if residual is None else as_rows(residual)
    rounding: dict[str, Any] = {
        "round_to": name_of(round_dtype),
        "product": name_of(product_dtype(round_dtype, weight)),
        "norm": name_of(norm_dtype),
    }
    present = {"residual": residual is not None, "bias": bias is not None, "beta": beta is not None, "returns_norm": return_norm}
    shared: dict[str, Any] = {**present, **rounding, "weight_offset": weight_offset, "unrounded": norm_unrounded}
    size = xs.shape[0], xs.shape[1], device_for(x, cores)
    quantising: dict[str, Any]
    plan: Launch
    if scale is None:
        plan = kernels.norm_dynamic_quantize_launch(*size, **shared, smooth=smooth is not None, divide=bool(divide))
        quantising = {"smooth_ptr": as_vector(smooth), "scale_ptr": scales, "least": min_scale}
    else:
        shared |= {"one_scale": is_one(scale), "one_zero": is_one(zero_point), "zero": zero_point is not None}
        plan = kernels.norm_static_quantize_launch(*size, **shared, divide=divide is not False, lowest=lowest)
        quantising = {"scale_ptr": as_vector(scale), "zero_ptr": as_vector(zero_point)}
    launch(
        plan,
        x,
        x_ptr=xs,
        residual_ptr=residuals,
        weight_ptr=as_vector(weight),
        bias_ptr=as_vector(bias),
        beta_ptr=as_vector(beta),
        **quantising,
        q_ptr=q,
        norm_ptr=norm if return_norm else None,
        sum_ptr=None if residual is None else total,
        rows=xs.shape[0],
        x_stride=xs.stride(0),
        residual_stride=0 if residuals is None else residuals.stride(0),
        eps=eps,
    )
    return results


@triton_op(f"(Tensor x, Tensor? weight, float eps, *, {_QUANT_SCHEMA}) -> (Tensor, Tensor, Tensor)")
def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    beta: Tensor | None = None,
    weight_offset: int = 0,
    round_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    smooth: Tensor | None = None,
    min_scale: float = 0.0,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    divide: bool | None = None,
    lowest: int = -128,
    return_norm: bool = False,
    cores: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm, quantised to int8, in one launch; contiguous results.

    Maths: `y = x / sqrt(mean(x^2, -1) + eps) * (weight_offset + weight) + beta`, then q as `dynamic_quantize(y)` has it, or
    `static_quantize(y, scale, zero_point)` if a scale is given.

    Args:
        x: [..., H], fp16, bf16 or fp32; rows may lie apart evenly, what lies otherwise is copied first.
        weight, beta: [H], fp16, bf16 or fp32, or None.
        eps: added to the mean square.
        weight_offset: 1 scales by `1 + weight`, 0 by `weight`.
        round_dtype: dtype to which the normalised x is rounded before the weight; None keeps fp32.
        norm_dtype: dtype to which y is rounded before it is quantised; None keeps fp32.
        smooth, min_scale: as in `dynamic_quantize`; without a `scale` only.
        scale, zero_point, lowest: as in `static_quantize`.
        divide: divides by the scale instead of multiplying, by its reciprocal if it was found; None divides by given scales alone.
        return_norm: returns y, too.
        cores: vector cores of the device.

    Returns:
        q int8 [..., H]; the scale fp32 [...], or [0] if it is given; y [..., H] in `norm_dtype` (that of x if None), or [0] if it is not
        asked for. A row with a NaN or an infinity has the scale NaN; its q mean nothing.

    Rounding: fp32 inside, where nothing else is asked for; the weight multiplies in the dtype that `round_dtype` and its own promote to.
        A found scale of a long row, walked in blocks, may be off by two units in the last place.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: a shape or choice does not fit, tensors lie on several devices, or there are 2^31 rows, or elements in a row, or more.

    Source: `npu_rms_norm_quant` and `npu_rms_norm_quant_v2` of torch_npu compute the same with a scale.
    """
    rounding: dict[str, Any] = {"round_dtype": round_dtype, "norm_dtype": norm_dtype}
    arguments: dict[str, Any] = {"weight_offset": weight_offset, "min_scale": min_scale, "lowest": lowest, **rounding}
    vectors: dict[str, Any] = {"weight": weight, "beta": beta, "smooth": smooth}
    _check("rms_norm_quant", x, None, vectors, scale, zero_point, **arguments, sum_dtype=None, cores=cores)
    choices: dict[str, Any] = {"divide": divide, "return_norm": return_norm}
    absent: dict[str, Any] = {"bias": None, "norm_unrounded": False, "sum_dtype": None}
    tensors: dict[str, Any] = {"beta": beta, "smooth": smooth, "scale": scale, "zero_point": zero_point}
    q, scales, norm, _ = _run(x, None, weight, eps, **tensors, **arguments, **choices, **absent, cores=cores)
    return q, scales, norm


@rms_norm_quant.fake
def _(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    beta: Tensor | None,
    smooth: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    divide: bool | None,
    norm_dtype: torch.dtype | None,
    return_norm: bool,
    **form: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    vectors: dict[str, Any] = {"weight": weight, "beta": beta, "smooth": smooth}
    _check("rms_norm_quant", x, None, vectors, scale, zero_point, norm_dtype=norm_dtype, sum_dtype=None, **form)
    return _results(x, None, scale, norm_dtype, None, return_norm)[:3]


@triton_op(
    "(Tensor x, Tensor residual, Tensor? weight, float eps, *, Tensor? bias=None, bool norm_unrounded=False, ScalarType? sum_dtype=None, "
    f"{_QUANT_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    bias: Tensor | None = None,
    norm_unrounded: bool = False,
    sum_dtype: torch.dtype | None = None,
    beta: Tensor | None = None,
    weight_offset: int = 0,
    round_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    smooth: Tensor | None = None,
    min_scale: float = 0.0,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    divide: bool | None = None,
    lowest: int = -128,
    return_norm: bool = False,
    cores: int,
) -> Results:
    """Residual addition with RMSNorm, quantised to int8, in one launch; contiguous results.

    Maths: `s = x + residual (+ bias)`, of which the rest is as in `rms_norm_quant`.

    Args:
        x, residual: [..., H], fp16, bf16 or fp32; rows may lie apart evenly, what lies otherwise is copied first.
        bias: [H], fp16, bf16 or fp32, added to the sum; or None.
        norm_unrounded: the norm is of the sum before it is rounded.
        sum_dtype: dtype of the sum; None is what x and the residual promote to.
        weight, eps, beta, weight_offset, round_dtype, norm_dtype, smooth, min_scale, scale, zero_point, divide, lowest, return_norm, cores:
            as in `rms_norm_quant`.

    Returns:
        q, the scale and y as there (y in the dtype of the sum if `norm_dtype` is None); and s [..., H] in `sum_dtype`.

    Rounding: as there; the sum is rounded once.

    Raises:
        as `rms_norm_quant`.

    Source: `npu_add_rms_norm_quant` and `npu_add_rms_norm_dynamic_quant` of torch_npu compute the same for one of their two results.
    """
    rounding: dict[str, Any] = {"round_dtype": round_dtype, "norm_dtype": norm_dtype}
    arguments: dict[str, Any] = {"weight_offset": weight_offset, "min_scale": min_scale, "lowest": lowest, **rounding}
    vectors: dict[str, Any] = {"weight": weight, "bias": bias, "beta": beta, "smooth": smooth}
    _check("add_rms_norm_quant", x, residual, vectors, scale, zero_point, **arguments, sum_dtype=sum_dtype, cores=cores)
    choices: dict[str, Any] = {"divide": divide, "return_norm": return_norm, "sum_dtype": sum_dtype}
    tensors: dict[str, Any] = {"bias": bias, "beta": beta, "smooth": smooth, "scale": scale, "zero_point": zero_point}
    return _run(x, residual, weight, eps, norm_unrounded=norm_unrounded, **tensors, **arguments, **choices, cores=cores)


@add_rms_norm_quant.fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    bias: Tensor | None,
    norm_unrounded: bool,
    beta: Tensor | None,
    smooth: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    divide: bool | None,
    norm_dtype: torch.dtype | None,
    sum_dtype: torch.dtype | None,
    return_norm: bool,
    **form: Any,
) -> Results:
    vectors: dict[str, Any] = {"weight": weight, "bias": bias, "beta": beta, "smooth": smooth}
    _check("add_rms_norm_quant", x, residual, vectors, scale, zero_point, norm_dtype=norm_dtype, sum_dtype=sum_dtype, **form)
    return _results(x, residual, scale, norm_dtype, sum_dtype, return_norm)
