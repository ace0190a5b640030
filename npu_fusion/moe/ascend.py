"""Dispatch and combine by torch_npu's `npu_moe_distribute_dispatch_v2`, `npu_moe_distribute_combine_v2` and, with the residual sum and the
next norm, `npu_moe_distribute_combine_add_rms_norm`.

They are of static shapes, read no value on the host, and have converters for torchair, so that NPUGraph and npugraph_ex hold them. The
weights are applied by the combine, where the tokens came from. What the combine has to know of its dispatch is opaque to us.

The ops want ids in [0, E), K different ones for each token. A choice that does not count (-1, masked, a token that is not there) becomes an
expert that its token did not choose, and then:

- where the ops take a mask [T, K] (A3 and later), the mask leaves it out: nothing is sent for it. With a mask all ranks must have equally
  many tokens, so that those of a rank are filled up to `max_tokens` with tokens that are masked out.
- on Ascend910B (A2) the mask is [T] and must be a run of trues, so that none is given: the row is sent, and the combine gives it weight 0.
  Its expert's result must be finite, else the token's sum is NaN. Tokens of which no choice counts are sent as zeros.

Source: op-plugin docs of the ops (values of expert_ids, x_active_mask, global_bs, comm_alg); torch_npu 2.13's meta kernels (sizes).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CollectiveError
from . import plan

ASSIST_WORDS = 128
"""int32 words of `assist_info_for_combine` for each row in expert order."""
_QUANT_MODES = {"none": 0, "int8": 2}  # 2: dynamic, one scale a row


def handle_size(rows: Any, ranks: int, experts: int) -> Any:
    """int32 words of a handle: the assist info of `rows` rows, then the number of rows from each rank for each local expert."""
    return rows * ASSIST_WORDS + experts


@functools.cache
def communicator(process_group: Any, rank: int) -> str:
    """HCCL's name of a group's communicator on this rank."""
    name: str = process_group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    return name


@functools.cache
def _masks_choices() -> bool:
    """Whether the ops take a mask [T, K], each choice by itself: not on 910B, where it is [T]."""
    return not str(torch.get_device_module("npu").get_device_name()).startswith("Ascend910B")


@dataclass(frozen=True)
class Place:
    """Where a call of the ops is made.

    Attributes:
        communicator: HCCL's name of the group's.
        rank, ranks: this rank and how many there are.
        masks_choices: whether the ops take a mask [T, K].
    """

    communicator: str
    rank: int
    ranks: int
    masks_choices: bool

    def common(self, experts: int, max_tokens: int) -> dict[str, Any]:
        """The arguments that all ops take."""
        return {
            "group_ep": self.communicator,
            "ep_world_size": self.ranks,
            "ep_rank_id": self.rank,
            "moe_expert_num": experts,
            "global_bs": self.ranks * max_tokens,
            # Which one 910B takes by itself depends on variables of the environment; what goes from dispatch to combine follows from it.
            "comm_alg": "" if self.masks_choices else "fullmesh",
        }


def place_of(group: Any) -> Place:
    """The place of this process in a group (`transport.Group`) of NPUs."""
    return Place(communicator(group.process_group, group.rank), group.rank, group.ranks, _masks_choices())


def _without_holes(slots: Tensor, experts: int, rank: int) -> Tensor:
    """Slots [T, K] with each hole filled by an expert that the token did not choose, a different one for each; K at most `experts`.

    They come from a window of K experts that moves on with the tokens, so that no expert gets all of them.
    """
    tokens, top_k = slots.shape
    lanes = torch.arange(top_k, device=slots.device)
    window = ((torch.arange(tokens, device=slots.device)[:, None] + rank) * top_k + lanes) % experts
    free = (window[:, :, None] != slots[:, None, :]).all(dim=2)
    hole = slots < 0
    filler = free[:, None, :] & (free.cumsum(dim=1)[:, None, :] == hole.cumsum(dim=1)[:, :, None])
    return torch.where(hole, (window[:, None, :] * filler).sum(dim=2), slots)


class _Choices(NamedTuple):
    """What the ops are given of the routing, for the B tokens that they see.

    Attributes:
        ids: [B, K] int32.
        counting: [B, K] bool: the choices that count; None where all of the T tokens do.
        mask: [B, K] bool, or None where the ops are given none.
        tokens: T.
        extra: B - T: how many tokens were added.
    """

    ids: Tensor
    counting: Tensor | None
    mask: Tensor | None
    tokens: int
    extra: int

    def filled(self, x: Tensor) -> Tensor:
        """[T, W] with rows of zeros for the tokens that were added."""
        return torch.nn.functional.pad(x, (0, 0, 0, self.extra)) if self.extra else x

    def scales(self, weights: Tensor) -> Tensor:
        """[B, K] fp32: the weights, 0 for choices that do not count."""
        weights = self.filled(weights.float())
        return weights if self.counting is None else torch.where(self.counting, weights, 0.0)


def _choices(
    ids: Tensor, experts: int, max_tokens: int, active: Tensor | None, placement: Tensor | None, place: Place, all_count: bool = False
) -> _Choices:
    """What the ops are given. `all_count`: the ids of a token are different experts, and none is masked or placed elsewhere."""
    if ids.shape[1] > experts:
        raise CollectiveError(f"{ids.shape[1]} choices a token are more than {experts} experts")
    masked, rank = place.masks_choices, place.rank
    tokens, top_k = ids.shape
    extra = (max_tokens if masked else max(tokens, 1)) - tokens
    if all_count:
        if not extra:
            return _Choices(ids.to(torch.int32), None, None, tokens, 0)
        added = torch.arange(top_k, dtype=torch.int32, device=ids.device).expand(extra, top_k)
        there = torch.arange(tokens + extra, device=ids.device)[:, None].expand(tokens + extra, top_k) < tokens
        return _Choices(torch.cat([ids.to(torch.int32), added]), None, there, tokens, extra)
    slots = plan.physical_experts(ids, experts, active, placement, rank)
    slots = torch.nn.functional.pad(slots, (0, 0, 0, extra), value=plan.NOWHERE) if extra else slots
    counting = slots >= 0
    filled = _without_holes(slots, experts, rank).to(torch.int32)
    return _Choices(filled, counting, counting if masked else None, tokens, extra)


def split_handle(handle: Tensor, rows: int, experts: int) -> tuple[Tensor, Tensor]:
    """The assist info and the numbers of rows in a handle."""
    assist, received = handle.split([rows * ASSIST_WORDS, experts])
    return assist, received


def dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    place: Place,
    experts: int,
    max_tokens: int,
    active: Tensor | None,
    placement: Tensor | None,
    quant: str,
    all_count: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`moe_dispatch` on Ascend; arguments and results as there. `all_count`: as for `_choices`."""
    if quant not in _QUANT_MODES:
        raise CollectiveError(f"there is no {quant} dispatch on Ascend, only {', '.join(_QUANT_MODES)}")
    chosen = _choices(ids, experts, max_tokens, active, placement, place, all_count)
    x = chosen.filled(x)
    if chosen.mask is None and chosen.counting is not None:
        x = torch.where(chosen.counting.any(dim=1, keepdim=True), x, 0)
    rows, scales, assist, counts, received, _, _ = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        x, chosen.ids, x_active_mask=chosen.mask, quant_mode=_QUANT_MODES[quant], expert_token_nums_type=1,
        **place.common(experts, max_tokens),
    )  # fmt: skip
    scales = torch.ones_like(rows[:, 0], dtype=torch.float32) if quant == "none" else scales
    return rows, scales, counts, torch.cat([assist, received])


def combine(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    assist: Tensor,
    received: Tensor,
    place: Place,
    experts: int,
    max_tokens: int,
    active: Tensor | None,
    placement: Tensor | None,
    shared: Tensor | None,
    all_count: bool = False,
) -> Tensor:
    """`moe_combine` on Ascend; arguments and result as there, the handle in its two parts. `all_count`: as for `_choices`."""
    chosen = _choices(ids, experts, max_tokens, active, placement, place, all_count)
    result: Tensor = torch.ops.npu.npu_moe_distribute_combine_v2(
        x,
        chosen.ids,
        assist,
        received,
        chosen.scales(weights),
        x_active_mask=chosen.mask,
        shared_expert_x=None if shared is None else chosen.filled(shared),
        **place.common(experts, max_tokens),
    )
    result = result[: chosen.tokens] if chosen.extra else result
    if chosen.counting is None:
        return result
    present = chosen.counting.any(dim=1, keepdim=True)[: chosen.tokens]  # the kernel leaves the others' results unwritten
    return torch.where(present, result, 0 if shared is None else shared)


def combine_add_rms_norm(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    assist: Tensor,
    received: Tensor,
    residual: Tensor,
    gamma: Tensor,
    eps: float,
    place: Place,
    experts: int,
    max_tokens: int,
    shared: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`moe_combine_add_rms_norm` where all choices count: the op leaves the results of tokens without any unwritten."""
    chosen = _choices(ids, experts, max_tokens, None, None, place, all_count=True)
    y, _, total = torch.ops.npu.npu_moe_distribute_combine_add_rms_norm(
        x,
        chosen.ids,
        assist,
        received,
        chosen.scales(weights),
        chosen.filled(residual).unsqueeze(1),
        gamma,
        x_active_mask=chosen.mask,
        shared_expert_x=None if shared is None else chosen.filled(shared),
        norm_eps=eps,
        **place.common(experts, max_tokens),
    )
    y, total = y.squeeze(1), total.squeeze(1)
    return (y[: chosen.tokens], total[: chosen.tokens]) if chosen.extra else (y, total)
