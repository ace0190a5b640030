"""How the ops of torch_npu that stand in graphs traced on an NPU are read, so that such a graph has the values of one traced elsewhere.

torch_npu has kernels of its own for ops that are composites to torch, and AOT keeps what has a kernel: `softmax(dtype=...)` arrives with
`npu::_npu_dtype_cast`, `repeat_interleave` and `matmul` whole, and attention that was not lifted as `npu::npu_fusion_attention_v3`.
Models written for the NPU call some of these ops themselves.

Semantics are those of the operators' documentation in Ascend/op-plugin (docs/zh/custom_APIs/torch_npu).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .build import ViewBuilder, handles, meta_of
from .handlers import only_first_result
from .shapes import known_equal, normal_dim, product, same_shape
from .value import Value

aten = torch.ops.aten

EVERYTHING = 2**31 - 1  # as many tokens before or after as this: no band
DEFAULT_MASK, TOP_LEFT_CAUSAL, BOTTOM_RIGHT_CAUSAL = 0, 2, 3  # values of `sparse_mode`


@handles("npu::_npu_dtype_cast", "npu::npu_dtype_cast")
def _dtype_cast(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """A cast like any other, unless the bytes are read as another type than the tensor's or several numbers share one."""
    shape, dtype = meta_of(node)
    x = b.operand(args[0])
    reinterpreted = len(args) > 2 and args[2] is not None
    if reinterpreted or dtype is None or not same_shape(x.shape, shape):
        return None
    return b.canon.cast(x, dtype)


@handles("repeat_interleave.self_int")
def _repeat_interleave(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """Every element `repeats` times in a row: a new dimension behind `dim`, expanded and folded into it, as torch takes it apart."""
    x, repeats, dim = b.operand(args[0]), b.dim(args[1]), args[2]
    if dim is None:
        x, dim = b.canon.reshape(x, (product(x.shape),)), 0
    at = normal_dim(dim, x.ndim) + 1
    apart = b.canon.reshape(x, (*x.shape[:at], 1, *x.shape[at:]))
    return b.canon.reshape(b.canon.expand(apart, (*x.shape[:at], repeats, *x.shape[at:])), meta_of(node)[0])


@handles("npu::npu_silu")
def _silu(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.canon.unary("silu", b.operand(args[0]))


@handles("npu::npu_gelu")
def _gelu(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    return b.canon.unary("gelu", b.operand(args[0]), approximate=args[1])


@dataclass(frozen=True)
class _Attention:
    """What a call of `npu_fusion_attention_v3` masks: nothing, the future, or where a mask is true."""

    is_causal: bool = False
    masked_out: Value | None = None


@handles("npu::npu_fusion_attention_v3")
def _fusion_attention(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """As scaled_dot_product_attention, where the call computes no more than that: no dropout, bias, sink, prefix or packed sequences.

    In layout BNSD alone, that of scaled_dot_product_attention and of what torch_npu makes of it.
    """
    call = dict(zip((spec.name for spec in node.target._schema.arguments), args, strict=True))  # type: ignore[union-attr]
    extras = ("pse", "padding_mask", "prefix", "actual_seq_qlen", "actual_seq_kvlen", "sink")
    plain = call["input_layout"] == "BNSD" and call["keep_prob"] == 1 and all(call[name] is None for name in extras)
    if not plain or not only_first_result(node):
        return None
    query, key, value = (b.operand(call[name]) for name in ("query", "key", "value"))
    attention = _masking(b, call, query, key)
    if attention is None:
        return None
    operands = [query, key, value, b.operand(call["scale"])]
    if attention.masked_out is not None:
        operands.append(_not(b, attention.masked_out))
    shape = (*query.shape[:-1], value.shape[-1])
    result = b.table.intern("sdpa", operands, {"is_causal": attention.is_causal}, shape, query.dtype)
    return b.table.unique("split", (result,), {"parts": (result,)}, (), None)


def _masking(b: ViewBuilder, call: dict[str, Any], query: Value, key: Value) -> _Attention | None:
    """What the call masks, or None where that is neither everything in a mask nor everything in the future."""
    mode, mask = call["sparse_mode"], call["atten_mask"]
    if mode == DEFAULT_MASK:
        if call["pre_tockens"] < EVERYTHING or call["next_tockens"] < EVERYTHING:
            return None
        if mask is None:
            return _Attention()
        masked_out = b.operand(mask)
        return _Attention(masked_out=masked_out) if masked_out.dtype is torch.bool else None
    square = known_equal(query.shape[-2], key.shape[-2])
    causal = mode == TOP_LEFT_CAUSAL or (mode == BOTTOM_RIGHT_CAUSAL and square)
    return _Attention(is_causal=True) if causal and _is_future(mask) else None


def _is_future(mask: Any) -> bool:
    """Whether a mask is true above its diagonal and nowhere else, by how the graph makes it."""
    if not isinstance(mask, Node) or mask.target is not aten.triu.default or mask.args[1:] != (1,):
        return False
    ones = mask.args[0]
    return isinstance(ones, Node) and ones.target is aten.ones.default and ones.meta["val"].dtype is torch.bool


def _not(b: ViewBuilder, x: Value) -> Value:
    return x.args[0] if x.op == "not" else b.canon.unary("not", x)
