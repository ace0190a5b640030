"""Products of int8 matrices by Triton: the op int8_matmul. No semantic op is lowered to it yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels import int8_matmul as kernels
from ...ops._common import check_min_rank, check_rank, check_sizes, check_type, check_value, known_different
from .checks import FLOATS, LIMIT_32, as_rows, check_cores, check_dtypes, check_together
from .define import device_for, launch, triton_op

_MOST_TILE_ROWS = 128


@triton_op(
    "(Tensor x, Tensor weight, Tensor? weight_scale=None, Tensor? x_scale=None, Tensor? bias=None, *, bool bias_first=False, "
    "Tensor? x_zero_point=None, Tensor? weight_sum=None, ScalarType out_dtype, int cores) -> Tensor"
)
def int8_matmul(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bias_first: bool = False,
    x_zero_point: Tensor | None = None,
    weight_sum: Tensor | None = None,
    out_dtype: torch.dtype,
    cores: int,
) -> Tensor:
    """y = ((x - x_zero_point) W) * weight_scale * x_scale + bias in one launch, or with the bias in the sums; contiguous result.

    Args:
        x: int8 [..., K]; rows may lie apart evenly, what lies otherwise is copied first.
        weight: int8 [K, N], stored in either order, one of its strides 1 (the transpose of a [N, K] is read best); copied where neither is.
        weight_scale: [N], or one element: fp16, bf16 or fp32. None, as without any other scale, for int32 results.
        x_scale: [...] or [..., 1] with the leading sizes of x, or one element; fp16, bf16 or fp32.
        bias: [N]: int32 with `bias_first`, which adds it to the sums of products, before the scales; else fp16, bf16 or fp32, added last.
        x_zero_point: int32, shaped as x_scale may be; needs weight_sum.
        weight_sum: int32 [N], the sums of the columns of weight.
        out_dtype: fp16, bf16, fp32, or int32 without scales and with a bias in the sums only.
        cores: matrix cores of the device.

    Returns:
        [..., N].

    Rounding: sums, zero point and `bias_first` are exact in int32; then fp32 (a sum of 2^24 and more rounds), one cast at the end.

    Raises:
        TypeError: a dtype is none of those.
        ValueError: a shape does not fit, arguments do not go together, tensors lie on several devices, or K products may exceed int32.

    Source: op-plugin doc npu_quant_matmul, whose offset of an int8 result is not here.
    """
    _check(x, weight, weight_scale, x_scale, bias, bias_first, x_zero_point, weight_sum, out_dtype, cores)
    inputs, outputs = weight.shape
    y = x.new_empty((*x.shape[:-1], outputs), dtype=out_dtype)
    if y.numel() == 0:
        return y
    xs = as_rows(x) if inputs else x.new_zeros((y.numel() // outputs, 1))
    weights = weight if inputs else weight.new_zeros((1, outputs))
    if xs.stride(0) * _MOST_TILE_ROWS >= LIMIT_32:
        xs = xs.contiguous()
    if 1 not in weights.stride() or max(weights.stride()) * 256 >= LIMIT_32:
        weights = weights.contiguous()
    along_inputs = weights.stride(0) == 1 and weights.shape[0] > 1
    plan = kernels.int8_matmul_launch(
        xs.shape[0],
        xs.shape[1],
        outputs,
        device_for(x, cores),
        along_inputs=along_inputs,
        row_scales=_is_vector(x_scale),
        column_scales=_is_vector(weight_scale),
        row_zeros=_is_vector(x_zero_point),
        bias_first=bias_first,
    )
    vectors = {
        "x_scale_ptr": x_scale,
        "weight_scale_ptr": weight_scale,
        "x_zero_ptr": x_zero_point,
        "weight_sum_ptr": weight_sum,
        "bias_ptr": bias,
    }
    tensors = {name: vector if vector is None else vector.contiguous() for name, vector in vectors.items()}
    strides = {"x_stride": xs.stride(0), "weight_stride": weights.stride(1 if along_inputs else 0)}
    launch(plan, x, x_ptr=xs, weight_ptr=weights, **tensors, y_ptr=y, rows=xs.shape[0], **strides)
    return y


def _is_vector(scale: Tensor | None) -> bool:
    return scale is not None and scale.numel() > 1


def _check(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    x_scale: Tensor | None,
    bias: Tensor | None,
    bias_first: bool,
    x_zero_point: Tensor | None,
    weight_sum: Tensor | None,
    out_dtype: torch.dtype,
    cores: int,
) -> None:
    op = "int8_matmul"
    check_dtypes(op, (torch.int8,), x=x, weight=weight)
    check_dtypes(op, FLOATS, weight_scale=weight_scale, x_scale=x_scale)
    check_dtypes(op, (torch.int32,) if bias_first else FLOATS, bias=bias)
    check_dtypes(op, (torch.int32,), x_zero_point=x_zero_point, weight_sum=weight_sum)
    known = (*FLOATS, torch.int32)
    check_type(op, out_dtype in known, f"out_dtype must be one of float16, bfloat16, float32, int32, not {out_dtype}")
    given = {"x_scale": x_scale, "weight_scale": weight_scale, "bias": bias, "x_zero_point": x_zero_point, "weight_sum": weight_sum}
    check_together(op, x=x, weight=weight, **given)
    check_cores(op, cores)
    if out_dtype == torch.int32:
        check_value(op, weight_scale is None and x_scale is None, "an int32 result has no scales")
        check_value(op, bias is None or bias_first, "an int32 result has its bias in the sums (bias_first)")
    else:
        check_value(op, weight_scale is not None, f"weight_scale is needed for a result of {out_dtype}")
    check_value(op, (x_zero_point is None) == (weight_sum is None), "x_zero_point and weight_sum go together")
    _check_shapes(op, x, weight, given)


def _check_shapes(op: str, x: Tensor, weight: Tensor, given: dict[str, Tensor | None]) -> None:
    check_min_rank(op, 1, x=x)
    check_rank(op, 2, weight=weight)
    inputs, outputs = weight.shape
    fits = not known_different(x.shape[-1], inputs)
    check_value(op, fits, f"x {list(x.shape)} must end in the inputs of weight {list(weight.shape)}")
    most = kernels.MOST_INPUTS // (1 if given["x_zero_point"] is None else 2)
    check_value(op, not statically_known_true(inputs > most), f"{inputs} products, of which {most} fit into int32")
    for name in ("x_scale", "x_zero_point"):
        _check_rows(op, name, given[name], x)
    for name in ("bias", "weight_sum"):
        if (vector := given[name]) is not None:
            check_sizes(op, name, vector.shape, (outputs,))
    if (scale := given["weight_scale"]) is not None and not statically_known_true(scale.numel() == 1):
        check_sizes(op, "weight_scale", scale.shape, (outputs,))


def _check_rows(op: str, name: str, vector: Tensor | None, x: Tensor) -> None:
    """One element, or one for each row of x, with or without a last dimension of 1."""
    if vector is None or statically_known_true(vector.numel() == 1):
        return
    lead: tuple[Any, ...] = tuple(x.shape[:-1])
    check_sizes(op, name, vector.shape, (*lead, 1) if vector.dim() == x.dim() else lead)


@int8_matmul.fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bias_first: bool = False,
    x_zero_point: Tensor | None = None,
    weight_sum: Tensor | None = None,
    out_dtype: torch.dtype,
    cores: int,
) -> Tensor:
    _check(x, weight, weight_scale, x_scale, bias, bias_first, x_zero_point, weight_sum, out_dtype, cores)
    return x.new_empty((*x.shape[:-1], weight.shape[1]), dtype=out_dtype)
