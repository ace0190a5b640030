"""Quantisation to int8 by Triton, and back: the ops dynamic_quantize, asymmetric_quantize, static_quantize, dequantize.

Per token means that each row [H] has a scale of its own, in the shape x.shape[:-1]; per channel that each of the H has; per tensor that
there is one for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import quant as kernels
from ...ops._common import check_choice, check_min_rank, check_sizes, check_type, check_value
from .checks import FLOATS, as_rows, as_vector, check_cores, check_dtypes, check_row_count, check_row_length, check_together
from .define import device_for, launch, triton_op

LOWEST = (-128, -127)
ZERO_POINTS = (torch.int8, torch.int32, *FLOATS)
SMALLEST_SCALE = 2.0**-126


def check_matrix(op: str, x: Tensor, cores: int) -> None:
    """What is demanded of x [..., H], but for its dtype."""
    check_min_rank(op, 1, x=x)
    check_row_length(op, "x", x.shape[-1])
    check_row_count(op, "x", x)
    check_cores(op, cores)


def check_min_scale(op: str, min_scale: float) -> None:
    fits = min_scale == 0 or SMALLEST_SCALE <= min_scale < float("inf")
    check_value(op, fits, f"min_scale must be 0, or finite and at least 2^-126: {min_scale}")


def is_one(x: Tensor | None) -> bool:
    """Whether a scale or zero point is one for all channels."""
    return x is not None and (x.dim() == 0 or x.shape[0] == 1)


def check_one_or_channels(op: str, name: str, x: Tensor | None, hidden: object) -> None:
    """Raise ValueError unless a scale or zero point is one number or [H]. A size 1 is known to be one: a tensor [1] is never symbolic."""
    if x is not None and x.dim() > 0 and not (x.dim() == 1 and isinstance(x.shape[0], int) and x.shape[0] == 1):
        check_sizes(op, name, x.shape, (hidden,))


def _check_dynamic(op: str, x: Tensor, smooth: Tensor | None, min_scale: float, cores: int) -> None:
    check_matrix(op, x, cores)
    check_dtypes(op, FLOATS, x=x, smooth=smooth)
    check_together(op, x=x, smooth=smooth)
    check_min_scale(op, min_scale)
    if smooth is not None:
        check_sizes(op, "smooth", smooth.shape, x.shape[-1:])


@triton_op("(Tensor x, *, Tensor? smooth=None, float min_scale=0.0, bool divide=False, int cores) -> (Tensor, Tensor)")
def dynamic_quantize(
    x: Tensor, *, smooth: Tensor | None = None, min_scale: float = 0.0, divide: bool = False, cores: int
) -> tuple[Tensor, Tensor]:
    """Symmetric quantisation per token to int8, in one launch; contiguous results.

    Maths: `v = x * smooth`, `scale = max(max(|v|) / 127, min_scale)`, `q = round(v / scale)`.

    Args:
        x: [..., H], fp16, bf16 or fp32; rows may lie apart evenly, what lies otherwise is copied first.
        smooth: [H], fp16, bf16 or fp32, or None for ones.
        min_scale: the least scale; 0 or at least 2^-126.
        divide: divides by the scale, correctly rounded, instead of multiplying by its reciprocal.
        cores: vector cores of the device.

    Returns:
        q int8 [..., H] and scale fp32 [...]. A row of zeros has the scale `min_scale`, and so has one whose scale would be less; a scale
        below 2^-126 is 0. What has the scale 0 is 0. A row with a NaN has the scale NaN, one with an infinity and no NaN an infinite scale;
        their q mean nothing.

    Rounding: fp32 inside, halves to even.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: a shape does not fit, tensors lie on several devices, or there are 2^31 rows, or elements in a row, or more.

    Source: `npu_dynamic_quant` of torch_npu computes the same; SmoothQuant, https://arxiv.org/abs/2211.10438.
    """
    _check_dynamic("dynamic_quantize", x, smooth, min_scale, cores)
    q, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel() == 0:
        return q, scale.fill_(min_scale)
    xs = as_rows(x)
    plan = kernels.dynamic_quantize_launch(xs.shape[0], xs.shape[1], device_for(x, cores), smooth=smooth is not None, divide=divide)
    sizes = {"rows": xs.shape[0], "x_stride": xs.stride(0)}
    launch(plan, x, x_ptr=xs, smooth_ptr=as_vector(smooth), q_ptr=q, scale_ptr=scale, **sizes, least=min_scale)
    return q, scale


@dynamic_quantize.fake
def _(x: Tensor, *, smooth: Tensor | None = None, min_scale: float = 0.0, divide: bool = False, cores: int) -> tuple[Tensor, Tensor]:
    _check_dynamic("dynamic_quantize", x, smooth, min_scale, cores)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _check_asymmetric(x: Tensor, smooth: Tensor | None, lowest: int, min_scale: float, cores: int) -> None:
    _check_dynamic("asymmetric_quantize", x, smooth, min_scale, cores)
    check_choice("asymmetric_quantize", "lowest", lowest, LOWEST)


@triton_op(
    "(Tensor x, *, Tensor? smooth=None, int lowest=-128, bool with_zero=False, bool whole_zero=False, float min_scale=0.0, "
    "bool divide=False, int cores) -> (Tensor, Tensor, Tensor)"
)
def asymmetric_quantize(
    x: Tensor,
    *,
    smooth: Tensor | None = None,
    lowest: int = -128,
    with_zero: bool = False,
    whole_zero: bool = False,
    min_scale: float = 0.0,
    divide: bool = False,
    cores: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric quantisation per token to int8, in one launch; contiguous results.

    Maths: `v = x * smooth`, `scale = max((max(v) - min(v)) / (127 - lowest), min_scale)`, `zero = 127 - max(v) / scale`,
    `q = round(v / scale + zero)` within [lowest, 127]; v is `(q - zero) * scale`.

    Args:
        x, smooth, min_scale, divide, cores: as in `dynamic_quantize`.
        lowest: -128 or -127, the least q.
        with_zero: the range of a row is extended to hold 0.
        whole_zero: zero points are rounded to whole numbers, which lie within [lowest, 127] if the range holds 0.

    Returns:
        q int8 [..., H], scale fp32 [...] and zero fp32 [...]. A row of one value has its magnitude as the scale; one of zeros, or whose
        scale is below 2^-126, has the scale `min_scale`. A row with a NaN or an infinity has a scale that is not finite;
        its q mean nothing.

    Rounding: fp32 inside, halves to even.

    Raises:
        as `dynamic_quantize`; ValueError for another `lowest`.

    Source: `npu_dynamic_quant_asymmetric` of torch_npu computes the same with the defaults.
    """
    _check_asymmetric(x, smooth, lowest, min_scale, cores)
    q, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    zero = torch.empty_like(scale)
    if x.numel() == 0:
        return q, scale.fill_(min_scale), zero.fill_(127)
    xs = as_rows(x)
    choices: dict[str, Any] = {"lowest": lowest, "with_zero": with_zero, "whole_zero": whole_zero, "divide": divide}
    plan = kernels.asymmetric_quantize_launch(xs.shape[0], xs.shape[1], device_for(x, cores), **choices)
    sizes = {"rows": xs.shape[0], "x_stride": xs.stride(0)}
    launch(plan, x, x_ptr=xs, smooth_ptr=as_vector(smooth), q_ptr=q, scale_ptr=scale, zero_ptr=zero, **sizes, least=min_scale)
    return q, scale, zero


@asymmetric_quantize.fake
def _(
    x: Tensor,
    *,
    smooth: Tensor | None = None,
    lowest: int = -128,
    with_zero: bool = False,
    whole_zero: bool = False,
    min_scale: float = 0.0,
    divide: bool = False,
    cores: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_asymmetric(x, smooth, lowest, min_scale, cores)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale, torch.empty_like(scale)


def check_static(op: str, hidden: object, scale: Tensor, zero_point: Tensor | None, lowest: int) -> None:
    """What is demanded of given scales."""
    check_dtypes(op, FLOATS, scale=scale)
    check_dtypes(op, ZERO_POINTS, zero_point=zero_point)
    check_one_or_channels(op, "scale", scale, hidden)
    check_one_or_channels(op, "zero_point", zero_point, hidden)
    check_choice(op, "lowest", lowest, LOWEST)


def _check_static(x: Tensor, scale: Tensor, zero_point: Tensor | None, lowest: int, cores: int) -> None:
    op = "static_quantize"
    check_matrix(op, x, cores)
    check_dtypes(op, FLOATS, x=x)
    check_static(op, x.shape[-1], scale, zero_point, lowest)
    check_together(op, x=x, scale=scale, zero_point=zero_point)


@triton_op("(Tensor x, Tensor scale, Tensor? zero_point=None, *, bool divide=True, int lowest=-128, int cores) -> Tensor")
def static_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, divide: bool = True, lowest: int = -128, cores: int
) -> Tensor:
    """Quantisation to int8 with given scales, in one launch; contiguous result.

    Maths: `round(x / scale + zero_point)`, or without `divide` `round(x * scale + zero_point)`, within [lowest, 127].

    Args:
        x: [..., H], fp16, bf16 or fp32; rows may lie apart evenly, what lies otherwise is copied first.
        scale: [H], or one number [1] or []; fp16, bf16 or fp32.
        zero_point: [H], or one number [1] or []; int8, int32, fp16, bf16, fp32, or None for 0.
        divide: x is divided by the scale, correctly rounded; else multiplied.
        lowest: -128 or -127, the least result.
        cores: vector cores of the device.

    Returns:
        int8 [..., H]. What a NaN becomes means nothing.

    Rounding: fp32 inside: the quotient (product) is rounded before the zero point is added; halves to even.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: a shape does not fit, another `lowest`, several devices, or 2^31 rows, or elements in a row, or more.

    Source: `npu_quantize` of torch_npu computes the same over the last dimension (`div_mode` is `divide`).
    """
    _check_static(x, scale, zero_point, lowest, cores)
    q = x.new_empty(x.shape, dtype=torch.int8)
    if q.numel() == 0:
        return q
    xs = as_rows(x)
    choices: dict[str, Any] = {"one_scale": is_one(scale), "one_zero": is_one(zero_point), "divide": divide, "lowest": lowest}
    plan = kernels.static_quantize_launch(xs.shape[0], xs.shape[1], device_for(x, cores), **choices)
    vectors = {"scale_ptr": as_vector(scale), "zero_ptr": as_vector(zero_point)}
    launch(plan, x, x_ptr=xs, **vectors, q_ptr=q, rows=xs.shape[0], x_stride=xs.stride(0))
    return q


@static_quantize.fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, divide: bool = True, lowest: int = -128, cores: int) -> Tensor:
    _check_static(x, scale, zero_point, lowest, cores)
    return x.new_empty(x.shape, dtype=torch.int8)


def _check_dequantize(
    x: Tensor,
    row_scale: Tensor | None,
    scale: Tensor | None,
    row_zero_point: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    cores: int,
) -> None:
    op = "dequantize"
    check_matrix(op, x, cores)
    check_dtypes(op, (torch.int8, torch.int32), x=x)
    check_dtypes(op, FLOATS, row_scale=row_scale, scale=scale, row_zero_point=row_zero_point)
    check_dtypes(op, ZERO_POINTS, zero_point=zero_point)
    check_dtypes(op, (*FLOATS, torch.int32) if x.dtype == torch.int32 else FLOATS, bias=bias)
    check_type(op, out_dtype in FLOATS, f"out_dtype must be one of float16, bfloat16, float32, not {out_dtype}")
    check_together(op, x=x, row_scale=row_scale, scale=scale, row_zero_point=row_zero_point, zero_point=zero_point, bias=bias)
    check_one_or_channels(op, "scale", scale, x.shape[-1])
    check_one_or_channels(op, "zero_point", zero_point, x.shape[-1])
    for name, of_rows in {"row_scale": row_scale, "row_zero_point": row_zero_point}.items():
        if of_rows is not None:
            check_sizes(op, name, of_rows.shape, x.shape[:-1])
    if bias is not None:
        check_sizes(op, "bias", bias.shape, x.shape[-1:])


@triton_op(
    "(Tensor x, Tensor? row_scale, Tensor? scale, *, Tensor? row_zero_point=None, Tensor? zero_point=None, Tensor? bias=None, "
    "ScalarType out_dtype, int cores) -> Tensor"
)
def dequantize(
    x: Tensor,
    row_scale: Tensor | None,
    scale: Tensor | None,
    *,
    row_zero_point: Tensor | None = None,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
    cores: int,
) -> Tensor:
    """Floating-point values of int8, or of the int32 results of an int8 matmul, in one launch; contiguous result.

    Maths: `(x - row_zero_point - zero_point) * scale * row_scale + bias`; a bias of int32 is added to x instead.

    Args:
        x: [..., H], int8 or int32; rows may lie apart evenly, what lies otherwise is copied first.
        row_scale: [...], one a row; fp16, bf16 or fp32, or None for 1.
        scale: [H], or one number [1] or []; fp16, bf16 or fp32, or None for 1.
        row_zero_point: [...], fp16, bf16 or fp32, or None for 0.
        zero_point: [H], or one number [1] or []; int8, int32, fp16, bf16, fp32, or None for 0.
        bias: [H]; fp16, bf16 or fp32, or with x of int32 also int32 (the sum wraps); or None.
        out_dtype: fp16, bf16 or fp32.
        cores: vector cores of the device.

    Returns:
        [..., H] in `out_dtype`.

    Rounding: fp32 inside, to which an int32 beyond 2^24 is rounded first; one cast at the end.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: a shape does not fit, tensors lie on several devices, or there are 2^31 rows, or elements in a row, or more.

    Source: `npu_dequant_bias` of torch_npu computes the same from int32; `npu_anti_quant` from int8, with `-offset` as the zero point.
    """
    _check_dequantize(x, row_scale, scale, row_zero_point, zero_point, bias, out_dtype, cores)
    y = x.new_empty(x.shape, dtype=out_dtype)
    if y.numel() == 0:
        return y
    xs = as_rows(x)
    choices: dict[str, Any] = {
        "one_scale": is_one(scale),
        "one_zero": is_one(zero_point),
        "whole_bias": bias is not None and bias.dtype == torch.int32,
    }
    plan = kernels.dequantize_launch(xs.shape[0], xs.shape[1], device_for(x, cores), **choices)
    of_rows = {"row_scale_ptr": as_vector(row_scale), "row_zero_ptr": as_vector(row_zero_point)}
    vectors = {"scale_ptr": as_vector(scale), "zero_ptr": as_vector(zero_point), "bias_ptr": as_vector(bias)}
    launch(plan, x, x_ptr=xs, **of_rows, **vectors, y_ptr=y, rows=xs.shape[0], x_stride=xs.stride(0))
    return y


@dequantize.fake
def _(
    x: Tensor,
    row_scale: Tensor | None,
    scale: Tensor | None,
    *,
    row_zero_point: Tensor | None = None,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
    cores: int,
) -> Tensor:
    _check_dequantize(x, row_scale, scale, row_zero_point, zero_point, bias, out_dtype, cores)
    return x.new_empty(x.shape, dtype=out_dtype)
