"""All ranks of an expert-parallel group in one process: the index arithmetic as it is, the exchange a transposition."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.moe import plan


def exchange(sent: list[Tensor]) -> list[Tensor]:
    """What each rank receives when rank r sends block d of `sent[r]` to rank d."""
    ranks = len(sent)
    blocks = torch.stack([buffer.unflatten(0, (ranks, -1)) for buffer in sent])
    return list(blocks.transpose(0, 1).flatten(1, 2).contiguous())


def dispatch_and_combine(
    xs: list[Tensor],
    ids: list[Tensor],
    weights: list[Tensor],
    experts: int,
    max_tokens: int,
    *,
    expert_scale: Tensor,
    active: list[Tensor] | None = None,
    placement: Tensor | None = None,
) -> list[Tensor]:
    """Every rank's result where expert (slot) e multiplies by `expert_scale[e]`."""
    ranks, local, top_k = len(xs), experts // len(xs), ids[0].shape[1]
    count = ranks * max_tokens
    slots = [plan.physical_experts(i, experts, None if active is None else active[r], placement, r) for r, i in enumerate(ids)]
    routes = [plan.route(s, ranks, local, max_tokens) for s in slots]
    rows = exchange([plan.pack(x, route, count) for x, route in zip(xs, routes)])
    got_slots = exchange([plan.pack(s, route, count, plan.NOWHERE) for s, route in zip(slots, routes)])
    got_weights = exchange([plan.pack(w, route, count) for w, route in zip(weights, routes)])
    home = []
    for rank in range(ranks):
        choices = plan.local_choices(got_slots[rank], rank, local)
        expansion = plan.expand(choices, local, plan.expanded_rows(ranks, max_tokens, top_k, local))
        expanded = rows[rank][expansion.source]
        assert int(expansion.counts.sum()) == int((choices >= 0).sum())
        scale = expert_scale[rank * local : (rank + 1) * local].repeat_interleave(expansion.counts)
        expanded[: len(scale)] *= scale[:, None]
        expanded[len(scale) :] = torch.nan  # nobody may read these
        home.append(plan.reduce_rows(expanded, expansion.place, got_weights[rank]).to(xs[rank].dtype))
    returned = exchange(home)
    return [plan.reduce_rows(buffer, route, None) for buffer, route in zip(returned, routes)]


def dense(x: Tensor, slots: Tensor, weights: Tensor, expert_scale: Tensor) -> Tensor:
    """The weighted sum over the choices of one rank's tokens, without any movement."""
    factor = torch.where(slots >= 0, weights * expert_scale[slots.clamp(min=0)], 0).sum(dim=1)
    return x * factor[:, None]
