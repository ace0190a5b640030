"""Routers on Ascend: moe_gating.

`npu_moe_gating_top_k_softmax_v2` is softmax and top-k in either order; a softmax of all logits whose chosen part is divided by its sum is
the softmax of the chosen logits. `npu_moe_gating_top_k` is a sigmoid with bias and groups, its weights always divided by their sum.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ...lower import Arguments, Builder
from ..moe_results import by_rows, dense_weights, in_rows
from .provide import Npu, keeps_rounding, provides

aten = torch.ops.aten

_MOST_PADDED = 2048  # experts, each group padded to a multiple of 32
_MODES = {"max": 0, "top2": 1}


def _results(b: Builder, a: Arguments, weights: Node, indices: Node, scale: float = 1.0) -> list[Node]:
    if isinstance(scale, Node) or scale != 1.0:
        weights = b.emit(aten.mul.Tensor, weights, scale)
    dtype = a.weights_dtype or torch.float32
    weights, indices = (in_rows(b, node, a.logits) for node in (b.cast(weights, dtype), b.cast(indices, torch.int64)))
    return [dense_weights(b, weights, indices, a.logits) if a.dense else weights, indices]


def _rows(b: Builder, a: Arguments, *, scaled: bool) -> Node:
    """The logits by rows; in fp32 where the weights, which come in the dtype of the logits, would be rounded too early."""
    logits, dtype = by_rows(b, a.logits), a.weights_dtype or torch.float32
    b.require(b.val(logits).dtype != torch.float64, "logits is float64")
    return logits if b.val(logits).dtype == dtype and not scaled else b.cast(logits, torch.float32)


@provides("moe_gating", "npu::npu_moe_gating_top_k_softmax_v2")
def gating_softmax(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
    """Softmax and top-k."""
    b.only_if(a.score == "softmax")
    b.require(a.bias is None, "it takes no bias for the choice")
    b.require(a.top_groups == a.groups, "it does not choose by groups")
    a.group_score, a.excluded  # noqa: B018  they say nothing where all groups are chosen
    chosen_first = not a.score_first
    if a.renormalize:
        b.require(
            a.eps == 0.0, f"it divides by the sum as it is, the model by at least {a.eps}" if a.guard == "clamp" else f"eps is {a.eps}"
        )
        chosen_first = True
    a.eps, a.guard, a.sorted  # noqa: B018  eps and guard belong to the division; it sorts always
    keeps_rounding(b, None, a.score_dtype, "the scores")
    unscaled = not isinstance(a.scale, Node) and a.scale == 1.0
    results = npu("npu::npu_moe_gating_top_k_softmax_v2", _rows(b, a, scaled=not unscaled), k=a.k, renorm=int(chosen_first))
    return _results(b, a, results[0], results[1], a.scale)


@provides("moe_gating", "npu::npu_moe_gating_top_k", rank=1)
def gating_sigmoid(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
    """Sigmoid, bias, groups and top-k; weights divided by their sum."""
    b.only_if(a.score == "sigmoid")
    b.require(a.score_first, "it scores before the choice, the model after it")
    b.require(a.renormalize and a.guard == "add", "it divides the weights by their sum and eps")
    experts, groups = b.val(a.logits).shape[-1], a.groups if a.top_groups < a.groups else 1
    b.require(isinstance(experts, int), "the number of experts is symbolic")
    padded = -(-(experts // groups) // 32) * 32 * groups
    b.require(experts // groups > 2 and padded <= _MOST_PADDED, f"{groups} groups of {experts // groups} experts")
    b.require(groups == 1 or a.excluded is None, f"it leaves experts of other groups out, for the model they count as {a.excluded}")
    a.group_score, a.excluded, a.sorted  # noqa: B018  they say nothing of one group; it sorts always
    keeps_rounding(b, None, a.score_dtype, "the scores")
    for name, number in (("eps", a.eps), ("scale", a.scale)):
        b.require(not isinstance(number, Node), f"{name} is known at run time only")
    rows = _rows(b, a, scaled=False)
    bias = None if a.bias is None else b.cast(a.bias, torch.float32)
    rows = rows if bias is None else b.cast(rows, torch.float32)
    results = npu(
        "npu::npu_moe_gating_top_k",
        rows,
        a.k,
        bias=bias,
        k_group=a.top_groups if groups > 1 else 1,
        group_count=groups,
        group_select_mode=_MODES[a.group_score],
        norm_type=1,
        routed_scaling_factor=a.scale,
        eps=a.eps,
    )
    return _results(b, a, results[0], results[1])
