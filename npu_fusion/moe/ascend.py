"""Dispatch and combine by torch_npu's `npu_moe_distribute_dispatch_v2` and `npu_moe_distribute_combine_v2`.

Both are of static shapes, read no value on the host, and have converters for torchair, so that NPUGraph and npugraph_ex hold them. The
weights are applied by the combine, where the tokens came from. What the combine has to know of its dispatch is opaque to us.

The ops want ids in [0, E), K different ones for each token. A choice that does not count (-1, masked, a token that is not there) becomes an
expert that its token did not choose, and then:

- where the ops take a mask [T, K] (A3 and later), the mask leaves it out: nothing is sent for it. With a mask all ranks must have equally
  many tokens, so that those of a rank are filled up to `max_tokens` with tokens that are masked out.
- on Ascend910B (A2) the mask is [T] and must be a run of trues, so that none is given: the row is sent, and the combine gives it weight 0.
  Its expert's result must be finite, else the token's sum is NaN. Tokens of which no choice counts are sent as zeros.

Source: op-plugin docs of the two ops (values of expert_ids, x_active_mask, global_bs, comm_alg); torch_npu 2.13's meta kernels (sizes).
"""

from __future__ import annotations

import functools
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
        counting: [B, K] bool: the choices that count.
        mask: [B, K] bool, or None where the ops take none.
        extra: B - T: how many tokens were added.
    """

    ids: Tensor
    counting: Tensor
    mask: Tensor | None
    extra: int

    def filled(self, x: Tensor) -> Tensor:
        """[T, W] with rows of zeros for the tokens that were added."""
        return torch.nn.functional.pad(x, (0, 0, 0, self.extra)) if self.extra else x


def _choices(ids: Tensor, experts: int, max_tokens: int, active: Tensor | None, placement: Tensor | None, rank: int) -> _Choices:
    if ids.shape[1] > experts:
        raise CollectiveError(f"{ids.shape[1]} choices a token are more than {experts} experts")
    masked = _masks_choices()
    tokens = ids.shape[0]
    extra = (max_tokens if masked else max(tokens, 1)) - tokens
    slots = plan.physical_experts(ids, experts, active, placement, rank)
    slots = torch.nn.functional.pad(slots, (0, 0, 0, extra), value=plan.NOWHERE) if extra else slots
    counting = slots >= 0
    return _Choices(_without_holes(slots, experts, rank).to(torch.int32), counting, counting if masked else None, extra)


def _common(group: Any, experts: int, max_tokens: int) -> dict[str, Any]:
    return {
        "group_ep": communicator(group.process_group, group.rank),
        "ep_world_size": group.ranks,
        "ep_rank_id": group.rank,
        "moe_expert_num": experts,
        "global_bs": group.ranks * max_tokens,
        # Which one 910B takes by itself depends on variables of the environment, and with it what goes from the dispatch to the combine.
        "comm_alg": "" if _masks_choices() else "fullmesh",
    }


def dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    group: Any,
    experts: int,
    max_tokens: int,
    active: Tensor | None,
    placement: Tensor | None,
    quant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`moe_dispatch` on Ascend; arguments and results as there."""
    if quant not in _QUANT_MODES:
        raise CollectiveError(f"there is no {quant} dispatch on Ascend, only {', '.join(_QUANT_MODES)}")
    chosen = _choices(ids, experts, max_tokens, active, placement, group.rank)
    x = chosen.filled(x)
    if chosen.mask is None:
        x = torch.where(chosen.counting.any(dim=1, keepdim=True), x, 0)
    rows, scales, assist, counts, received, _, _ = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        x, chosen.ids, x_active_mask=chosen.mask, quant_mode=_QUANT_MODES[quant], expert_token_nums_type=1,
        **_common(group, experts, max_tokens),
    )  # fmt: skip
    scales = torch.ones_like(rows[:, 0], dtype=torch.float32) if quant == "none" else scales
    return rows, scales, counts, torch.cat([assist, received])


def combine(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    handle: Tensor,
    group: Any,
    experts: int,
    max_tokens: int,
    active: Tensor | None,
    placement: Tensor | None,
    shared: Tensor | None,
) -> Tensor:
    """`moe_combine` on Ascend; arguments and result as there."""
    chosen = _choices(ids, experts, max_tokens, active, placement, group.rank)
    assist, received = handle.split([x.shape[0] * ASSIST_WORDS, experts])
    result: Tensor = torch.ops.npu.npu_moe_distribute_combine_v2(
        x,
        chosen.ids,
        assist,
        received,
        torch.where(chosen.counting, chosen.filled(weights.float()), 0.0),
        x_active_mask=chosen.mask,
        shared_expert_x=None if shared is None else chosen.filled(shared),
        **_common(group, experts, max_tokens),
    )
    # The docs do not say what the op leaves for a token that the mask takes out.
    present = chosen.counting.any(dim=1, keepdim=True)[: ids.shape[0]]
    return torch.where(present, result[: ids.shape[0]], 0 if shared is None else shared)
