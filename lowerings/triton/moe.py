"""The providers of mixtures of experts by Triton: moe_gating."""

from __future__ import annotations

import torch
from torch.fx import Node

from ...lower import Arguments, Builder
from ..moe_results import by_rows, dense_weights, in_rows
from .checks import FLOATS
from .gating import MOST_CHOSEN, MOST_EXPERTS, moe_gating
from .provide import provides, require_width

aten = torch.ops.aten


@provides("moe_gating", "triton.moe_gating")
def _moe_gating(b: Builder, a: Arguments, cores: int) -> list[Node]:
    logits, bias = a.logits, a.bias
    require_width(b, logits=logits)
    experts = b.val(logits).shape[-1]
    b.require(
        experts <= MOST_EXPERTS and a.k <= MOST_CHOSEN, f"{a.k} of {experts} experts: it chooses {MOST_CHOSEN} of {MOST_EXPERTS} at most"
    )
    dtype = a.weights_dtype or torch.float32
    for name, given in {"logits": b.val(logits).dtype, "bias": None if bias is None else b.val(bias).dtype, "weights_dtype": dtype}.items():
        b.require(given is None or given in FLOATS, f"{name} is {given}")
    b.require(a.score_dtype is None or a.score_dtype in FLOATS, f"score_dtype is {a.score_dtype}")
    a.sorted  # noqa: B018  it sorts always
    groups = {"groups": a.groups, "top_groups": a.top_groups, "group_score": a.group_score, "excluded": a.excluded}
    clamped = a.renormalize and a.guard == "clamp"
    numbers = {"eps": 0.0, "scale": 1.0} if clamped else {"eps": a.eps, "scale": a.scale}
    call = b.emit(
        moe_gating.overload,
        by_rows(b, logits),
        a.k,
        bias=bias,
        score=a.score,
        score_first=a.score_first,
        renormalize=a.renormalize and not clamped,
        round_dtype=a.score_dtype,
        weights_dtype=torch.float32 if clamped else dtype,
        cores=cores,
        **groups,
        **numbers,
    )
    weights, indices = b.results(call, 2)
    if clamped:
        floor = b.emit(aten.clamp_min.default, b.emit(aten.sum.dim_IntList, weights, [-1], True), a.eps)
        weights = b.emit(aten.mul.Tensor, b.emit(aten.div.Tensor, weights, floor), a.scale)
    weights, indices = (in_rows(b, node, logits) for node in (b.cast(weights, dtype), b.cast(indices, torch.int64)))
    return [dense_weights(b, weights, indices, logits) if a.dense else weights, indices]
