"""Routed experts with four-bit matrices on Ascend: npu_grouped_matmul with antiquant_scale, which dequantises in front of the matrix unit.

`w = (code + offset) * scale` in the dtype of the activations. Its matrices are int32 words of eight two's complement nibbles of outputs,
the lowest first, [E, K, N / 8]; zero points go by output channel alone, scales by channel or by group of its inputs (ops-transformer
gmm/grouped_matmul/docs/aclnnGroupedMatmulV5.md, A16W4). So AWQ's layers, which have zero points of groups, and GPTQ's, whose words are of
inputs, are left to the Triton kernels, with that reason.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import Node

from ...lower import Arguments, Builder
from ...prepare import prepared
from ...view.shapes import to_dim
from ..words import IN_ORDER, PER_WORD, in_words, transposed, with_other_sign, zero_point
from .experts import of_experts, routed, summed, unit_of
from .provide import Npu, keeps_rounding, provides
from .weight_only import in_order

aten = torch.ops.aten

_HALVES = (torch.float16, torch.bfloat16)


def _product(b: Builder, a: Arguments, npu: Npu, rows: Node, name: str, counts: Node) -> Node:
    """Rows times the matrices of their experts."""
    dtype, scale, zero = b.val(rows).dtype, getattr(a, f"{name}_scale"), getattr(a, f"{name}_zero")
    b.require(b.val(scale).dtype == dtype, f"its scale has the dtype of the activations, the model's is {b.val(scale).dtype}")
    experts, outputs, groups = (to_dim(size) for size in b.val(scale).shape)
    known = all(isinstance(size, int) for size in (experts, outputs, groups))
    b.require(known, f"the sizes of {name} are symbolic")
    shape = {key: getattr(a, key) for key in ("shifts", "packs_inputs", "plane", "signed", "offset")}
    how: Any = SimpleNamespace(weight=getattr(a, name), zero=zero, **shape)
    words, nibbles = in_words(b, how)
    shift = zero_point(b, how, dtype, 0 if a.signed else -PER_WORD)
    symmetric = not isinstance(shift, Node) and shift == 0
    b.require(symmetric or groups == 1, f"its zero points go by output channel alone, the model's {name} has {groups} groups of inputs")
    codes = prepared(b.contiguous(transposed(b, words if a.signed else with_other_sign(b, words))))
    offset = b.cast(b.emit(aten.neg.default, shift), dtype) if isinstance(shift, Node) else b.emit(aten.full_like.default, scale, -shift)
    sizes = [experts, outputs] if groups == 1 else [experts, groups, outputs]
    tensors = [b.reshape(b.contiguous(transposed(b, tensor)), sizes) for tensor in (scale, offset)]
    scale, offset = (prepared(in_order(b, tensor, nibbles)) for tensor in tensors)
    mode = {"group_list": counts, "group_list_type": 1, "group_type": 0, "split_item": 2}
    y = npu("npu::npu_grouped_matmul", [rows], [codes], antiquant_scale=[scale], antiquant_offset=[offset], **mode)
    return in_order(b, b.results(y, 1)[0], [nibbles.index(place) for place in IN_ORDER])


@provides(
    "moe_experts_weight_only",
    "npu::npu_grouped_matmul",
    name="npu.npu_grouped_matmul (antiquant, init_routing_v2, finalize_routing)",
    launches=5,
)
def moe_experts_weight_only(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Rows sorted by expert, grouped products, the unit, and the weighted sum."""
    b.require(bool(a.shifts), "the matrices are not packed")
    dtype, experts = b.val(a.x).dtype, to_dim(b.val(a.gate_up).shape[0])
    b.require(dtype in _HALVES, f"x is {dtype}: npu_grouped_matmul is for float16 and bfloat16")
    b.require(not a.packs_inputs, "torch_npu takes words of eight outputs, the model's are of inputs")
    b.require(isinstance(experts, int), "the number of experts is symbolic")
    keeps_rounding(b, None, a.product_dtype if a.product_dtype in _HALVES else None, "the weighted products")
    ids, weights = of_experts(b, a.indices, a.weights, experts)
    rows, places, counts, _ = routed(b, npu, a.x, ids, experts)
    gate = _product(b, a, npu, rows, "gate_up", counts)
    hidden = unit_of(b, a, npu, gate, None if a.up is None else _product(b, a, npu, rows, "up", counts))
    for name in ("up_scale", "up_zero"):
        getattr(a, name)  # they belong to up
    return summed(b, a, npu, _product(b, a, npu, hidden, "down", counts), weights, places)
