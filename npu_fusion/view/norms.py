"""How torch's own norms and variances are read: spelled out, so that `F.rms_norm` and a norm written by hand are one value."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .build import ViewBuilder, handles, meta_of
from .handlers import only_first_result
from .shapes import to_shape
from .value import Value


@handles("var.correction", "var.dim", "std.correction", "std.dim")
def _variance(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """The biased variance, spelled out as the mean square of what is left when the mean is taken off."""
    if args[2] is None or args[2] != 0:  # `correction`, or `unbiased`
        return None
    shape, dtype = meta_of(node)
    result = _mean_square(b, _centred(b, b.cast_operand(args[0], dtype), args[1]), args[1])
    if node.target._opname == "std":  # type: ignore[union-attr]
        result = b.canon.unary("sqrt", result)
    return b.canon.reshape(result, shape)


@handles("var_mean.correction", "var_mean.dim")
def _variance_and_mean(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    if args[2] is None or args[2] != 0:
        return None
    variance, mean = node.meta["val"]
    x = b.cast_operand(args[0], variance.dtype)
    parts = (
        b.canon.reshape(_mean_square(b, _centred(b, x, args[1]), args[1]), to_shape(variance.shape)),
        b.canon.reshape(b.canon.reduce("mean", x, args[1], keepdim=True), to_shape(mean.shape)),
    )
    return b.table.unique("split", (x,), {"parts": parts}, (), None)


def _mean_square(b: ViewBuilder, x: Value, dims: Any) -> Value:
    return b.canon.reduce("mean", b.canon.unary("square", x), dims, keepdim=True)


def _centred(b: ViewBuilder, x: Value, dims: Any) -> Value:
    return b.canon.binary("sub", x, b.canon.reduce("mean", x, dims, keepdim=True), x.shape)


def _normalised(b: ViewBuilder, x: Value, dims: Any, eps: Any, affine: dict[str, Any], dtype: torch.dtype | None) -> Value:
    """x over its root mean square, times the weight, plus the bias, rounded once."""
    root = b.canon.unary("rsqrt", b.canon.binary("add", _mean_square(b, x, dims), b.operand(eps)))
    result = b.canon.binary("mul", x, root, x.shape)
    for op, operand in affine.items():
        if operand is not None:
            result = b.canon.binary(op, result, b.cast_operand(operand, x.dtype), x.shape)
    return b.canon.cast(result, dtype) if dtype is not None else result


@handles("npu_fusion_lifted::rms_norm")
def _rms_norm(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """Spelled out as torch computes it (aten/src/ATen/native/layer_norm.cpp): in fp32 or wider, weight included, rounded once."""
    source, sizes, weight, eps = args
    _, dtype = meta_of(node)
    x = b.cast_operand(source, _compute_dtype(dtype))
    return _normalised(b, x, range(-len(sizes), 0), eps, {"mul": weight}, dtype)


@handles("native_layer_norm")
def _layer_norm(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """Spelled out as torch computes it: in fp32 or wider, weight and bias included, rounded once. Only the result, not the statistics."""
    source, sizes, weight, bias, eps = args
    if not only_first_result(node):
        return None
    dtype = source.meta["val"].dtype
    x = b.cast_operand(source, _compute_dtype(dtype))
    dims = range(-len(sizes), 0)
    result = _normalised(b, _centred(b, x, dims), dims, eps, {"mul": weight, "add": bias}, dtype)
    return b.table.unique("split", (x,), {"parts": (result,)}, (), None)


def _compute_dtype(dtype: torch.dtype | None) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
