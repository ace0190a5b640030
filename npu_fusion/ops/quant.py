"""Quantisation: `quantize`, `dequantize`, `quant_linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..semantic import semantic_op
from ._common import check_broadcastable, check_min_rank, check_rank, check_type, check_value, known_different, stored_like
from .quant_core import QUANTIZE_SCHEMA, WHOLE_DTYPES, Dequantization, Quantization, Quantized


@semantic_op("quant", f"(Tensor x, Tensor? scale=None, Tensor? zero_point=None, *, {QUANTIZE_SCHEMA}) -> (Tensor, Tensor, Tensor)")
def quantize(x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None, **options: Any) -> Quantized:
    """Quantisation, with scales that are given, or found for each row or the whole tensor.

    Maths: as in `ops.quant_core.Quantization`, whose arguments these are.

    Args:
        x: [..., H], floating point.
        scale: broadcasts to x, or None: `max(|x|) / steps` of each row [..., 1], or of all elements [1, ..., 1] with `per_tensor`.
        zero_point: broadcasts to x, added after the division; or None.
        options: `smooth`, `smooth_divide`, `apply`, `symmetric`, `with_zero`, `per_tensor`, `steps`, `steps_reciprocal`, `floor_mode`,
            `floor`, `round_last`, `low`, `high`, `dtype`, `compute_dtype`, `scale_dtype`, `value_dtype`.

    Returns:
        q [..., H] in `dtype`; the scale that was found [..., 1], or [0]; the zero point that was found [..., 1], or [0].

    Rounding: halves to even; every step in the dtype that the arguments name, as the model does it.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or choice does not fit.

    Source: SmoothQuant, https://arxiv.org/abs/2211.10438; `torch.ao.quantization`; torchao; `npu_quantize` and `npu_dynamic_quant`.
    """
    how = Quantization(scale, zero_point, **options)
    how.check("quantize", x)
    return how.quantize(x)


@quantize.fake
def _(x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None, **options: Any) -> Quantized:
    how = Quantization(scale, zero_point, **options)
    how.check("quantize", x)
    return how.empty(x)


_SCALES = "bool combined=False, bool bias_first=False, ScalarType? compute_dtype=None, ScalarType? round_dtype=None"


@semantic_op(
    "quant",
    "(Tensor x, Tensor? scale, Tensor? scale2=None, Tensor? zero_point=None, Tensor? bias=None, *, "
    f"{_SCALES}, ScalarType? out_dtype=None) -> Tensor",
)
def dequantize(
    x: Tensor,
    scale: Tensor | None,
    scale2: Tensor | None = None,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Floating-point values of whole numbers: of a quantised tensor, or of the int32 sums of an int8 matmul.

    Maths: `(x - zero_point) * scale * scale2 + bias`, as in `ops.quant_core.Dequantization`, whose arguments these are.

    Args:
        x: [..., N], whole numbers (int8, uint8, int16, int32), or a floating dtype or float8 that holds quantised values.
        scale, scale2: broadcast to x; of the weight and of the activation, in the order in which they multiply; or None.
        zero_point: broadcasts to x; or None.
        bias: broadcasts to x, floating, added last; or int32 with `bias_first`, added to x; or None.
        options: `combined`, `bias_first`, `compute_dtype`, `round_dtype`, `out_dtype`.

    Returns:
        [..., N] in `out_dtype`.

    Rounding: products in `compute_dtype`, in the order given; then to `round_dtype`; then the bias; one cast to `out_dtype`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit.

    Source: `torch.ao.quantization`; `npu_dequant_bias` and `npu_anti_quant` of torch_npu compute the same in fp32.
    """
    how = Dequantization(scale, scale2, zero_point, bias, **options)
    _check_dequantize(x, how)
    return stored_like(how.dequantize(x), x)


def _check_dequantize(x: Tensor, how: Dequantization) -> None:
    check_type("dequantize", x.dtype in WHOLE_DTYPES or x.is_floating_point(), f"x must hold whole numbers, not {x.dtype}")
    check_value("dequantize", how.scale is not None, "a scale is needed")
    how.check("dequantize", x.shape)


@dequantize.fake
def _(
    x: Tensor,
    scale: Tensor | None,
    scale2: Tensor | None = None,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    how = Dequantization(scale, scale2, zero_point, bias, **options)
    _check_dequantize(x, how)
    return torch.empty_like(x, dtype=how.result_dtype)


@semantic_op(
    "quant",
    "(Tensor x, Tensor weight, Tensor? scale=None, Tensor? scale2=None, Tensor? bias=None, Tensor? zero_point=None, "
    f"Tensor? column_sums=None, *, {_SCALES}, ScalarType? out_dtype=None) -> Tensor",
)
def quant_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    scale2: Tensor | None = None,
    bias: Tensor | None = None,
    zero_point: Tensor | None = None,
    column_sums: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Product of int8 matrices, summed up exactly, and dequantised.

    Maths: `n = x W - zero_point * column_sums` in int32, which is `(x - zero_point) W` where `column_sums` are the sums of the weight's
    columns; then `n * scale * scale2 + bias`, as in `dequantize`; n itself without a scale and `out_dtype`.

    Args:
        x: [..., K], int8.
        weight: [K, N], int8, in any memory order.
        scale, scale2: broadcast to [..., N]: of the weight [N] (or one number), of the rows [..., 1] (or one number), in the order in
            which they multiply; or None.
        bias: [N], floating, added last; int32 with `bias_first`, added to n; or None.
        zero_point: of the activations, whole numbers of any integer or floating dtype: of the rows [..., 1] or one number; or None.
        column_sums: [N] or [1, N], an integer dtype; given with a zero point, and only then.
        options: `combined`, `bias_first`, `compute_dtype`, `round_dtype`, `out_dtype` as in `dequantize`; `out_dtype` None without a scale
            is int32, which wraps.

    Returns:
        [..., N], contiguous.

    Rounding: n is exact; then as in `dequantize`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit.

    Source: LLM.int8(), https://arxiv.org/abs/2208.07339; SmoothQuant; `torch._int_mm`; `npu_quant_matmul` of torch_npu.
    """
    how = Dequantization(scale, scale2, None, bias, **options)
    _check_quant_linear(x, weight, how, zero_point, column_sums)
    n = _whole_matmul(x, weight)
    if zero_point is not None and column_sums is not None:
        n = n - zero_point.to(torch.int32) * column_sums.to(torch.int32)
    return how.dequantize(n).contiguous()


_LEAST_ROWS = 17  # cuBLASLt's int8 product takes no fewer
_ALIGNMENT = 8


def _whole_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x W in int32, exactly: by `torch._int_mm`, rows being padded to as many as a GPU takes.

    In float64, where sums of 2^39 products and fewer are exact, for sizes that a GPU does not take and for devices that multiply no whole
    matrices.
    """
    (inputs, outputs), lead = weight.shape, x.shape[:-1]
    rows = x.reshape(-1, inputs)
    if x.device.type == "cpu":
        return torch._int_mm(rows, weight).reshape(*lead, outputs)
    if x.device.type == "cuda" and inputs % _ALIGNMENT == 0 and outputs % _ALIGNMENT == 0:
        missing = max(_LEAST_ROWS - rows.shape[0], 0)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()
        return torch._int_mm(padded, weight)[: rows.shape[0]].reshape(*lead, outputs)
    return torch.matmul(x.double(), weight.double()).to(torch.int32)


def _check_quant_linear(
    x: Tensor, weight: Tensor, how: Dequantization, zero_point: Tensor | None = None, column_sums: Tensor | None = None
) -> None:
    op = "quant_linear"
    check_min_rank(op, 1, x=x)
    check_rank(op, 2, weight=weight)
    check_type(op, x.dtype == weight.dtype == torch.int8, f"x and weight must be int8, not {x.dtype} and {weight.dtype}")
    fits = not known_different(x.shape[-1], weight.shape[0])
    check_value(op, fits, f"x {list(x.shape)} must end in the inputs of weight {list(weight.shape)}")
    how.check(op, torch.Size([*x.shape[:-1], weight.shape[1]]))
    check_value(op, (zero_point is None) == (column_sums is None), "zero_point and column_sums are given together")
    if zero_point is not None and column_sums is not None:
        check_broadcastable(op, "zero_point", zero_point.shape, [*x.shape[:-1], 1])
        check_broadcastable(op, "column_sums", column_sums.shape, weight.shape[1:] if column_sums.dim() < 2 else [1, weight.shape[1]])
        whole = not column_sums.is_floating_point() and column_sums.dtype != torch.bool
        check_type(op, whole, f"column_sums must be an integer, not {column_sums.dtype}")


@quant_linear.fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    scale2: Tensor | None = None,
    bias: Tensor | None = None,
    zero_point: Tensor | None = None,
    column_sums: Tensor | None = None,
    **options: Any,
) -> Tensor:
    how = Dequantization(scale, scale2, None, bias, **options)
    _check_quant_linear(x, weight, how, zero_point, column_sums)
    return x.new_empty((*x.shape[:-1], weight.shape[1]), dtype=how.result_dtype)
