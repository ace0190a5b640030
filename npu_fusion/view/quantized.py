"""How quantising ops are read: spelled out, so that `quantized_decomposed` ops and the same steps written by hand are one value.

A product with a reciprocal that is spelled out here has no FX node of its own: that is how a rule tells `x * (1 / scale)`, which all of
`torch.ao.quantization` computes, from a division.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .build import ViewBuilder, handles, meta_of
from .canon import number_of
from .shapes import known_equal, normal_dim
from .value import Value

_HALVES = (torch.float16, torch.bfloat16)


@handles("round.default")
def _round(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """To the nearest whole number, halves to even."""
    return b.canon.unary("round", b.operand(args[0]))


@handles("_int_mm")
def _int_mm(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """The product of int8 matrices in int32."""
    x, y = (b.canon.cast(b.operand(arg), torch.int32) for arg in args[:2])
    return b.canon.matmul(x, y)


@handles("aminmax")
def _aminmax(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    x = b.operand(args[0])
    dims = None if args[1] is None else [args[1]]
    parts = tuple(b.canon.reduce(name, x, dims, bool(args[2])) for name in ("amin", "amax"))
    return b.table.unique("split", (x,), {"parts": parts}, (), None)


@handles("max.default", "min.default")
def _extreme(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """The largest (smallest) of all elements."""
    return b.canon.reduce(f"a{node.target._opname}", b.operand(args[0]), None, keepdim=False)  # type: ignore[union-attr]


# -------------------------------------------------------------------- quantized_decomposed


@handles(
    "quantized_decomposed::quantize_per_tensor", "quantized_decomposed::quantize_per_channel", "quantized_decomposed::quantize_per_token"
)
def _quantize(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """clamp(round(x * (1 / scale)) + zero), or, per token, clamp(round(x * (1 / scale) + zero))."""
    name = node.target._opname  # type: ignore[union-attr]
    x = b.operand(args[0])
    if x.dtype in _HALVES and name != "quantize_per_token":
        x = b.canon.cast(x, torch.float32)
    operands = _scale_and_zero(b, x, args)
    if operands is None:
        return None
    scale, zero, (low, high, dtype) = operands
    width = x.dtype if scale.dtype is None or not scale.shape or x.dtype is None else torch.promote_types(x.dtype, scale.dtype)
    assert width is not None
    x = b.canon.cast(x, width)
    number = number_of(scale)
    inverse = b.canon.const(1.0 / number) if number else b.canon.unary("reciprocal", scale)
    value = b.canon.binary("mul", x, b.canon.cast(inverse, width), x.shape)
    zero = b.canon.cast(zero, width)
    if name == "quantize_per_token":
        value = b.canon.unary("round", b.canon.binary("add", value, zero, x.shape))
    else:
        value = b.canon.binary("add", b.canon.unary("round", value), zero, x.shape)
    bounds = (value, b.operand(low), b.operand(high))
    return b.canon.cast(b.table.intern("clamp", bounds, {"low": True, "high": True}, x.shape, value.dtype), dtype)


@handles(
    "quantized_decomposed::dequantize_per_tensor",
    "quantized_decomposed::dequantize_per_channel",
    "quantized_decomposed::dequantize_per_token",
)
def _dequantize(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """(q - zero) * scale, in float32 or in the scale's wider type."""
    x = b.operand(args[0])
    operands = _scale_and_zero(b, x, args)
    _, dtype = meta_of(node)
    if operands is None or dtype is None:
        return None
    scale, zero, _ = operands
    by_tensor = node.target._opname == "dequantize_per_tensor"  # type: ignore[union-attr]
    width = dtype if by_tensor or scale.dtype is None else torch.promote_types(torch.float32, scale.dtype)
    value = b.canon.binary("sub", b.canon.cast(x, width), b.canon.cast(zero, width), x.shape)
    return b.canon.cast(b.canon.binary("mul", value, b.canon.cast(scale, width), x.shape), dtype)


def _scale_and_zero(b: ViewBuilder, x: Value, args: list[Any]) -> tuple[Value, Value, list[Any]] | None:
    """Scale and zero point as they broadcast to x, and the arguments that follow; None for a form that is not known."""
    scale, zero, rest = args[1], args[2], list(args[3:])
    axis = rest.pop(0) if len(rest) > 3 and isinstance(rest[3], torch.dtype) else None  # of a channel: axis, low, high, dtype
    if any(isinstance(bound, Node) for bound in rest[:2]) or (zero is not None and b.operand(zero).dtype is torch.bool):
        return None
    values = [b.operand(0 if item is None else item) for item in (scale, zero)]
    for i, value in enumerate(values):
        if value.op == "full" and value.attrs["value"] == 0:
            values[i] = b.canon.const(0)
        elif axis is not None and value.ndim:
            shape = [1] * x.ndim
            shape[normal_dim(axis, x.ndim)] = value.shape[0]
            values[i] = b.canon.reshape(value, tuple(shape))
        elif value.ndim == 1 and known_equal(value.shape[0], 1):
            values[i] = b.canon.reshape(value, ())
    return values[0], values[1], rest[:3]
