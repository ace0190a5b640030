"""Routed experts on Ascend: npu_moe_init_routing_v2, npu_grouped_matmul, the unit, npu_grouped_matmul, npu_moe_finalize_routing.

These are the calls of SGLang's and vLLM's Ascend backends. Sizes do not depend on the routing, and the counts of each expert stay on the
device, so that a graph capture holds them. The sort has no place for ids that are of no expert, such as -1: unless they come from a choice
among the experts, such a row goes to an expert, and counts nothing.
"""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import Node

from ...lower import Arguments, Builder
from ...view.shapes import to_dim
from . import glu
from .provide import Npu, keeps_rounding, provides

aten = torch.ops.aten

_HALVES = (torch.float16, torch.bfloat16)
_GELUS = {"gelu": "none", "gelu_tanh": "tanh"}
_ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "silu": (aten.silu.default,),
    "sigmoid": (aten.sigmoid.default,),
    "tanh": (aten.tanh.default,),
    "relu": (aten.relu.default,),
    "relu2": (aten.relu.default, aten.square.default),
    "identity": (),
}


@provides("moe_experts", "npu::npu_grouped_matmul", name="npu.npu_grouped_matmul (init_routing_v2, finalize_routing)", launches=5)
def moe_experts(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Rows sorted by expert, grouped products, the unit, and the weighted sum."""
    x, weights, experts = a.x, a.weights, to_dim(b.val(a.gate_up).shape[0])
    dtype = b.val(x).dtype
    b.require(dtype in _HALVES, f"x is {dtype}: npu_grouped_matmul is for float16 and bfloat16")
    b.require(isinstance(experts, int), "the number of experts is symbolic")
    biased = any(bias is not None for bias in (a.gate_up_bias, a.up_bias, a.down_bias))
    b.require(
        not biased or b.config.rounding != "exact", "it keeps the sum with the bias in fp32, the model rounds it: rounding is 'exact'"
    )
    keeps_rounding(b, None, a.product_dtype if a.product_dtype in _HALVES else None, "the weighted products")
    ids, weights = of_experts(b, a.indices, weights, experts)
    rows, places, counts, _ = routed(b, npu, x, ids, experts)

    def product(source: Node, matrices: Node, bias: Node | None) -> Node:
        given = {} if bias is None else {"bias": [b.cast(bias, torch.float32 if dtype == torch.bfloat16 else dtype)]}
        groups = {"group_list": counts, "group_list_type": 1, "group_type": 0, "split_item": 2}
        return b.results(npu("npu::npu_grouped_matmul", [source], [matrices], **given, **groups), 1)[0]

    gate = product(rows, a.gate_up, a.gate_up_bias)
    if a.gated:
        hidden = unit_of(b, a, npu, gate, None if a.up is None else product(rows, a.up, a.up_bias))
    else:
        hidden = _activated(b, a.activation, npu, gate)
    results = product(hidden, a.down, a.down_bias)
    return summed(b, a, npu, results, weights, places)


def routed(b: Builder, npu: Npu, x: Node, ids: Node, experts: int, quant_mode: int = -1) -> Any:
    """Rows of x by expert, where each went, how many each expert has, and the scales of rows that are quantised (`quant_mode` 1)."""
    mode = {"expert_num": experts, "active_expert_range": [0, experts], "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    ids = b.contiguous(b.cast(ids, torch.int32))
    return npu("npu::npu_moe_init_routing_v2", b.contiguous(x), ids, **mode, quant_mode=quant_mode)


def summed(b: Builder, a: Arguments, npu: Npu, results: Node, weights: Node, places: Node) -> Node:
    """The weighted sum of the rows of each token, which `places` finds."""
    dtype = b.val(a.x).dtype
    wide = torch.promote_types(b.val(results).dtype, b.val(weights).dtype)
    b.require(wide != torch.float64, "the weights are float64")
    results, scales = b.cast(results, wide), b.contiguous(b.cast(weights, wide))
    y = npu("npu::npu_moe_finalize_routing", results, None, None, None, scales, places, None, drop_pad_mode=2)
    return b.cast(y, a.out_dtype or dtype)


_CHOICES = ("aten.topk", "npu_fusion.moe_gating", "npu.npu_moe_gating_top_k", "npu.npu_moe_gating_top_k_softmax_v2")
_VIEWS = ("aten._to_copy", "aten.view", "aten.reshape", "aten._unsafe_view")


def of_experts(b: Builder, ids: Node, weights: Node, experts: Any) -> tuple[Node, Node]:
    """Ids that are all of experts, and the weights, 0 where an id was none."""
    if are_chosen(b, ids, experts):
        return ids, weights
    known = b.emit(aten.logical_and.default, b.emit(aten.ge.Scalar, ids, 0), b.emit(aten.lt.Scalar, ids, experts))
    return b.emit(aten.clamp.default, ids, 0, experts - 1), b.emit(aten.where.ScalarOther, known, weights, 0.0)


def are_chosen(b: Builder, ids: Node, experts: Any) -> bool:
    """Whether the ids are the places of the largest of so many scores."""
    while _name(ids) in _VIEWS:
        ids = ids.args[0]  # type: ignore[assignment]
    if ids.target is not operator.getitem or ids.args[1] != 1:
        return False
    choice = ids.args[0]
    if not isinstance(choice, Node) or _name(choice) not in _CHOICES:
        return False
    scores = choice.args[0]
    last = choice.args[2:3] in ((), (-1,)) or not str(choice.target).startswith("aten")
    return isinstance(scores, Node) and last and b.equal(b.val(scores).shape[-1], experts)


def _name(node: Node) -> str:
    return str(node.target).rpartition(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""


def unit_of(b: Builder, a: Arguments, npu: Npu, gate: Node, up: Node | None) -> Any:
    """The gated unit by the providers of `glu`: the node of its result."""
    names = ("activation", "layout", "alpha", "gate_limit", "up_limit", "up_offset", "round_dtype")
    given = {name: getattr(a, name) for name in names}
    unit: Any = SimpleNamespace(gate=gate, up=up, out_dtype=b.val(gate).dtype, **given)
    plain = (unit.alpha, unit.gate_limit, unit.up_limit, unit.up_offset) == (1.0, None, None, 0.0)
    if unit.activation == "silu" and (up is None or not plain):
        merged, pair = (glu.swiglu, glu.concatenated_swiglu) if plain and unit.layout != "interleaved" else _CLIPPED
        return (merged if up is None and unit.layout != "swapped" else pair)(b, unit, npu)
    if unit.activation in _GELUS:
        b.require(plain, "it has no unit of gelu with limits")
        return (glu.geglu if up is None and unit.layout != "interleaved" else glu.gelu_and_product)(b, unit, npu)
    b.require(plain, f"it has no unit of {unit.activation} with limits")
    return glu.activated_product(b, unit, lambda node: _activated(b, unit.activation, npu, node))


_CLIPPED = (glu.clipped_swiglu, glu.concatenated_clipped_swiglu)


def _activated(b: Builder, activation: str, npu: Npu, node: Node) -> Node:
    if activation in _GELUS:  # aten.gelu is its tanh approximation on an NPU whatever is asked for
        y: Node = npu("npu::npu_gelu", node, approximate=_GELUS[activation])
        return y
    b.require(activation in _ACTIVATIONS, f"the activation is {activation}")
    for function in _ACTIVATIONS[activation]:
        node = b.emit(function, node)
    return node
