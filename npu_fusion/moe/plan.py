"""Where every token goes and comes from: the index arithmetic of MoE dispatch and combine, as tensor ops of static shapes.

T tokens of a rank, each with K choices among E experts; R ranks with L = E / R experts each; M, the most tokens that any rank has. Nothing
here waits for the device or asks for a value, so that all of it can be captured in a graph and replayed with other routing.

A token travels once to each rank that needs it. A rank's send buffer has R blocks of M rows, block r for rank r; its receive buffer has
R blocks of M rows, block r from rank r. Row `r * M + i` of a rank's send buffer is row `me * M + i` of rank r's receive buffer, and, on
the way back, the other way round: the same index finds a token's row going out and coming home.

Received rows are then copied in expert order, to A = R * M * min(K, L) rows: those of local expert 0 first, then those of 1, and so on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Size = Any  # int or torch.SymInt

NOWHERE = -1
"""What stands for a row, an expert or a place that there is none of."""


def expanded_rows(ranks: int, max_tokens: Size, top_k: Size, local_experts: int) -> Size:
    """A: the most rows that a rank's experts can receive, given that the choices of one token are different experts."""
    return ranks * max_tokens * torch.sym_min(top_k, local_experts)


def physical_experts(ids: Tensor, experts: int, active: Tensor | None, placement: Tensor | None, rank: int) -> Tensor:
    """The expert slot [T, K] (int64) of each choice, `NOWHERE` for those that are not to be sent.

    Args:
        ids: [T, K] integers. An id outside [0, number of logical experts) chooses no expert: -1, and what transformers uses for padding.
        experts: E, the number of slots.
        active: [T] or [T, K] bool: choices that count; None for all.
        placement: [logical experts] slots, or [logical experts, C] with up to C slots of copies of an expert, the unused ones -1 at the
            end; tokens take turns with the copies. None where expert e is in slot e.
        rank: this rank, so that ranks begin with different copies.
    """
    logical = experts if placement is None else placement.shape[0]
    slots = ids.to(torch.int64)
    chosen = (slots >= 0) & (slots < logical)
    if active is not None:
        chosen = chosen & (active if active.dim() == 2 else active[:, None])
    if placement is not None:
        slots = slots.clamp(0, logical - 1)
        if placement.dim() == 2:
            copies = (placement >= 0).sum(dim=1).clamp(min=1)
            turn = torch.arange(ids.shape[0], device=ids.device)[:, None] + rank
            slots = placement[slots, turn % copies[slots]].to(torch.int64)
        else:
            slots = placement[slots].to(torch.int64)
        chosen = chosen & (slots >= 0) & (slots < experts)
    return torch.where(chosen, slots, NOWHERE)


def with_shared_experts(ids: Tensor, weights: Tensor, first: int, count: int, copies: int, rank: int) -> tuple[Tensor, Tensor]:
    """Let every token choose `count` shared experts as well, with weight 1, where shared experts have slots of their own.

    Args:
        ids, weights: [T, K].
        first: the first slot; copy c of shared expert s is in slot `first + c * count + s`.
        copies: how many copies there are; tokens take turns with them, ranks begin with different ones.

    Returns:
        ids and weights [T, K + count].
    """
    turn = (torch.arange(ids.shape[0], device=ids.device) + rank) % copies
    shared = first + turn[:, None] * count + torch.arange(count, device=ids.device)
    ones = weights.new_ones((ids.shape[0], count))
    return torch.cat([ids, shared.to(ids.dtype)], dim=1), torch.cat([weights, ones], dim=1)


def route(slots: Tensor, ranks: int, local_experts: int, max_tokens: Size) -> Tensor:
    """The send row [T, K] (int32) of each choice that is a token's first with its rank; `NOWHERE` for the others.

    Args:
        slots: [T, K] expert slots, `NOWHERE` for none.
    """
    tokens, top_k = slots.shape
    chosen = slots >= 0
    rank = torch.where(chosen, slots // local_experts, ranks)
    needs = torch.zeros((tokens, ranks + 1), dtype=torch.int32, device=slots.device).scatter(1, rank, 1)
    position = needs.cumsum(dim=0, dtype=torch.int64) - 1
    row = rank * max_tokens + position.gather(1, rank)
    earlier = torch.ones((top_k, top_k), dtype=torch.bool, device=slots.device).tril(-1)
    repeated = ((rank[:, :, None] == rank[:, None, :]) & earlier).any(dim=2)
    return torch.where(chosen & ~repeated, row, NOWHERE).to(torch.int32)


def tokens_of_rows(rows: Tensor, count: Size) -> Tensor:
    """The token [count] (int64) in each send row, `NOWHERE` for those without: the inverse of a route [T, K]."""
    tokens, top_k = rows.shape
    token = torch.arange(tokens, device=rows.device)[:, None].expand(tokens, top_k)
    target = torch.where(rows >= 0, rows.to(torch.int64), count)
    return torch.full((count + 1,), NOWHERE, dtype=torch.int64, device=rows.device).scatter(0, target.flatten(), token.flatten())[:count]


def pack(x: Tensor, rows: Tensor, count: Size, fill: int = 0) -> Tensor:
    """The send buffer [count, ...]: row `rows[t, k]` is x[t], and a row of no token is `fill`."""
    if x.shape[0] == 0:
        return x.new_full((count, *x.shape[1:]), fill)
    token = tokens_of_rows(rows, count)
    sent = x[token.clamp(min=0)]
    present = (token >= 0).reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(present, sent, torch.full((), fill, dtype=x.dtype, device=x.device))


def local_choices(slots: Tensor, rank: int, local_experts: int) -> Tensor:
    """Local experts [N, K] (int32) of received rows; `NOWHERE` for choices that are another rank's."""
    local = slots.to(torch.int32) - rank * local_experts
    return torch.where((slots >= 0) & (local >= 0) & (local < local_experts), local, NOWHERE)


class Expansion(NamedTuple):
    """How N received rows are copied in expert order.

    Attributes:
        place: [N, K] int32: where choice k of row n is copied to, `NOWHERE` where it is not.
        source: [A] int64: the received row of each row in expert order; 0 past the last.
        counts: [L] int64: rows of each local expert.
    """

    place: Tensor
    source: Tensor
    counts: Tensor


def expand(local: Tensor, local_experts: int, rows: Size) -> Expansion:
    """Order choices [N, K] of local experts by expert, then by received row, in `rows` rows."""
    received, top_k = local.shape
    expert = torch.where(local >= 0, local, local_experts).to(torch.int64).flatten()
    order = torch.argsort(expert, stable=True)
    numbers = torch.arange(received * top_k, device=local.device)
    place = torch.empty_like(order).scatter(0, order, numbers)
    place = torch.where(local >= 0, place.reshape(received, top_k), NOWHERE)
    counts = torch.zeros(local_experts + 1, dtype=torch.int64, device=local.device)
    counts = counts.scatter_add(0, expert, torch.ones_like(expert))[:local_experts]
    valid = torch.arange(rows, device=local.device) < counts.sum()
    source = torch.where(valid, order[:rows] // top_k, 0)
    return Expansion(place.to(torch.int32), source, counts)


def reduce_rows(x: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """sum over k of weights[n, k] * x[place[n, k]] as [N, H], where a place `NOWHERE` adds nothing: not even what an unused row holds.

    Args:
        x: [A, H].
        place: [N, K].
        weights: [N, K], or None for ones.

    Rounding: products and sums in fp32 (fp64 for fp64); the result has that dtype.

    A place past the last row of x, which only a token that chooses one expert twice can have, makes the sum NaN.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = torch.zeros((place.shape[0], x.shape[1]), dtype=wide, device=x.device)
    for k in range(place.shape[1]):
        at = place[:, k].to(torch.int64)
        term = x[at.clamp(0, x.shape[0] - 1)].to(wide)
        if weights is not None:
            term = term * weights[:, k, None].to(wide)
        term = torch.where((at < x.shape[0])[:, None], term, torch.full((), torch.nan, dtype=wide, device=x.device))
        total = total + torch.where((at >= 0)[:, None], term, torch.zeros((), dtype=wide, device=x.device))
    return total
