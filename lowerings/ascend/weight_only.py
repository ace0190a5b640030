"""Weight-only linears on Ascend: `npu_weight_quant_batchmatmul`, which dequantises on the way into the matrix unit.

`w = (code + offset) * scale` in the dtype of the activations: the offset is the zero point, negated. Four-bit weights are int32 words of
eight two's complement nibbles of outputs, the lowest first: [K, N / 8]. A model's words of another order are used as they are: the results
change places. (The op's document has words of inputs too, [N, K / 8] transposed; torch_npu 2.13 takes K / 8 for K there, and raises.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from ...layout import row_major
from ...lower import Arguments, Builder
from ...prepare import prepared
from ..words import IN_ORDER, PER_WORD, in_words, transposed, with_other_sign, zero_point
from .provide import Npu, provides

aten = torch.ops.aten
_OP = "npu::npu_weight_quant_batchmatmul"


@provides("weight_only_linear", _OP)
def weight_only_linear(b: Builder, a: Arguments, npu: Npu) -> Node:
    """int8 weights with a scale for each output channel, [N, K] as linears store them."""
    b.only_if(not a.shifts)
    x, weight, dtype = a.x, a.weight, b.val(a.x).dtype
    outputs, inputs = b.val(weight).shape
    b.require(isinstance(outputs, int) and isinstance(inputs, int), "the sizes of the weight are symbolic")
    b.require(b.equal(b.val(a.scale).shape[1], 1), "of int8 weights it is known to take a scale for each output, the model's has groups")
    b.require(b.val(a.scale).dtype == dtype, f"its scale has the dtype of the activations, the model's is {b.val(a.scale).dtype}")
    codes = b.transpose(weight, 0, 1)
    b.require(row_major(b.val(weight)) or row_major(b.val(codes)), "the weight is not stored in one piece")
    offset = None if a.zero is None else b.emit(aten.neg.default, b.reshape(b.cast(a.zero, dtype), [outputs]))
    scale = b.contiguous(b.reshape(a.scale, [outputs]))
    return _product(b, a, npu, x, codes, scale, offset, a.bias)


def _product(
    b: Builder, a: Arguments, npu: Npu, x: Node, codes: Node, scale: Node, offset: Node | None, bias: Node | None, group: int = 0
) -> Node:
    """The product in the shape of the model's."""
    inputs = b.val(x).shape[-1]
    if bias is not None and b.val(x).dtype == torch.bfloat16:
        bias = b.cast(bias, torch.float32)
    lead = [b.size(x, dim) for dim in range(b.val(x).dim() - 1)]
    rows = x if len(lead) == 1 else b.emit(aten.reshape.default, x, [-1, inputs])
    y: Node = npu(_OP, b.contiguous(rows), codes, scale, offset, bias=bias, antiquant_group_size=group)
    return b.reshape(y, [*lead, b.val(a.scale).shape[0]])


@provides("weight_only_linear", _OP, name="npu.npu_weight_quant_batchmatmul (int4)")
def int4_linear(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Words of eight nibbles, with scales and zero points of outputs or of groups of their inputs."""
    b.only_if(bool(a.shifts))
    x, dtype = a.x, b.val(a.x).dtype
    b.require(b.val(a.scale).dtype == dtype, f"its scale has the dtype of the activations, the model's is {b.val(a.scale).dtype}")
    outputs, groups = b.val(a.scale).shape
    inputs = b.val(x).shape[-1]
    known = isinstance(outputs, int) and isinstance(groups, int) and isinstance(inputs, int)
    b.require(known, "the sizes of the weight are symbolic")
    words, nibbles = in_words(b, a)
    if not a.signed:
        words = with_other_sign(b, words)
    zero = zero_point(b, a, dtype, 0 if a.signed else -PER_WORD)
    offset = _offset(b, a, zero, dtype)
    group = inputs // groups if groups > 1 else 0
    bias = a.bias
    b.require(not a.packs_inputs, "torch_npu takes words of eight outputs; of words of inputs it reads too few inputs")
    codes = b.contiguous(transposed(b, words))
    scale, offset = (None if t is None else b.contiguous(transposed(b, t)) for t in (a.scale, offset))
    order = None if nibbles == IN_ORDER else nibbles
    scale, offset, bias = (None if t is None else in_order(b, t, order or IN_ORDER) for t in (scale, offset, bias))
    assert scale is not None
    codes, scale = prepared(codes), prepared(scale)
    offset, bias = (t if t is None else prepared(t) for t in (offset, bias))
    y = _product(b, a, npu, x, codes, scale, offset, bias, group)
    return y if order is None else in_order(b, y, [order.index(place) for place in range(PER_WORD)])


def _offset(b: Builder, a: Arguments, zero: Node | int, dtype: torch.dtype) -> Node | None:
    """What the op adds: [N, G] in the dtype of the activations, None for nothing."""
    if isinstance(zero, Node):
        return b.cast(b.emit(aten.neg.default, zero), dtype)
    return b.emit(aten.full_like.default, a.scale, -zero) if zero else None


def in_order(b: Builder, x: Node, order: Sequence[int]) -> Node:
    """x with element `order[i]` at place i, of every eight of its last dimension."""
    if tuple(order) == IN_ORDER:
        return x
    sizes = [b.size(x, dim) for dim in range(b.val(x).dim())]
    apart = b.reshape(x, [*sizes[:-1], sizes[-1] // PER_WORD, PER_WORD])
    device = b.val(x).device
    index = b.constant(("order", tuple(order), str(device)), lambda: torch.tensor(list(order), device=device))
    return b.reshape(b.emit(aten.index_select.default, apart, len(sizes), index), sizes)
