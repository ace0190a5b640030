"""Linear layers whose weights are integers with a scale, and whose activations are not quantised: `weight_only_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..semantic import semantic_op
from ._common import check_floating, check_min_rank, check_rank, check_same_dtype, check_sizes, check_type, check_value, compute_dtype

_CODES = (torch.int8, torch.uint8)


def _check(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> None:
    op = "weight_only_linear"
    check_floating(op, x=x, scale=scale, bias=bias)
    check_type(op, weight.dtype in _CODES, f"weight must be int8 or uint8, not {weight.dtype}")
    if zero is not None:
        check_type(op, zero.dtype in _CODES or zero.dtype.is_floating_point, f"zero must be int8, uint8 or floating, not {zero.dtype}")
    check_min_rank(op, 1, x=x)
    check_rank(op, 2, weight=weight, scale=scale, zero=zero)
    check_rank(op, 1, bias=bias)
    outputs, inputs = weight.shape
    check_sizes(op, "x", x.shape, (*x.shape[:-1], inputs))
    groups = scale.shape[1]
    check_sizes(op, "scale", scale.shape, (outputs, groups))
    whole = not isinstance(inputs, int) or not isinstance(groups, int) or (groups > 0 and inputs % groups == 0)
    check_value(op, whole, f"{groups} groups do not divide {inputs} inputs")
    if zero is not None:
        check_sizes(op, "zero", zero.shape, scale.shape)
    if bias is not None:
        check_same_dtype(op, x=x, bias=bias)
        check_sizes(op, "bias", bias.shape, (outputs,))


@semantic_op("quant", "(Tensor x, Tensor weight, Tensor scale, Tensor? zero=None, Tensor? bias=None) -> Tensor")
def weight_only_linear(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A linear layer with integer weights that are dequantised by a scale for each output channel, or each group of its inputs.

    Maths: `y = x @ ((weight - zero) * scale)^T + bias`, where the scale and zero of column k are those of group `k // (K / G)`.

    Args:
        x: [..., K], floating point.
        weight: [N, K], int8 or uint8.
        scale: [N, G], floating point; G divides K, 1 is a scale for each output channel.
        zero: [N, G], int8, uint8 or floating point; None is 0.
        bias: [N] in the dtype of x, or None.

    Returns:
        [..., N] in the dtype of x.

    Rounding: the weight is dequantised in fp32 (fp64 for fp64), rounded once to the dtype of x, and multiplied as a matrix product of that
        dtype: accumulated in fp32, one cast at the end.

    Raises:
        TypeError: a dtype is none of those.
        ValueError: a rank or size does not fit, or G does not divide K.

    Source: torchao's Int8WeightOnly; op-plugin doc npu_weight_quant_batchmatmul.
    """
    _check(x, weight, scale, zero, bias)
    dtype = compute_dtype(x, scale)
    grouped = weight.to(dtype).unflatten(1, (scale.shape[1], -1))
    if zero is not None:
        grouped = grouped - zero.to(dtype)[..., None]
    dequantised = (grouped * scale.to(dtype)[..., None]).flatten(1).to(x.dtype)
    return torch.nn.functional.linear(x, dequantised, bias).contiguous()


@weight_only_linear.fake
def _(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    _check(x, weight, scale, zero, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
