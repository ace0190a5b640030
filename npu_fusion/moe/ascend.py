"""Dispatch and combine by torch_npu's `npu_moe_distribute_dispatch_v2` and `npu_moe_distribute_combine_v2`.

Both are of static shapes, read no value on the host, and have converters for torchair, so that NPUGraph and npugraph_ex hold them. The
weights are applied by the combine, where the tokens came from. What the combine has to know of its dispatch is opaque to us.

Source: op-plugin docs of the two ops; torch_npu 2.13's meta kernels (sizes).
"""

from __future__ import annotations

import functools
from typing import Any

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
def _communicator(process_group: Any, rank: int) -> str:
    """HCCL's name of a group's communicator on this rank."""
    name: str = process_group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    return name


@functools.cache
def _masks_choices() -> bool:
    """Whether the mask can be [T, K], each choice by itself: not on 910B, where it is [T]."""
    return not str(torch.get_device_module("npu").get_device_name()).startswith("Ascend910B")


def _choices(ids: Tensor, experts: int, active: Tensor | None, placement: Tensor | None, rank: int) -> tuple[Tensor, Tensor | None]:
    """Slots [T, K] as the ops want them, int32 without holes, and the mask of those that count."""
    if not _masks_choices():
        if active is not None and active.dim() == 2:
            raise CollectiveError("the dispatch of Ascend910B has no mask of choices; give `active` as [T]")
        slots = plan.physical_experts(ids, experts, None, placement, rank)
        return slots.clamp(min=0).to(torch.int32), active
    slots = plan.physical_experts(ids, experts, active, placement, rank)
    return slots.clamp(min=0).to(torch.int32), slots >= 0


def _common(group: Any, experts: int, max_tokens: int) -> dict[str, Any]:
    return {
        "group_ep": _communicator(group.process_group, group.rank),
        "ep_world_size": group.ranks,
        "ep_rank_id": group.rank,
        "moe_expert_num": experts,
        "global_bs": group.ranks * max_tokens,
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
    slots, mask = _choices(ids, experts, active, placement, group.rank)
    rows, scales, assist, counts, received, _, _ = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        x, slots, x_active_mask=mask, quant_mode=_QUANT_MODES[quant], expert_token_nums_type=1, **_common(group, experts, max_tokens)
    )
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
    slots, mask = _choices(ids, experts, active, placement, group.rank)
    assist, received = handle.split([x.shape[0] * ASSIST_WORDS, experts])
    result: Tensor = torch.ops.npu.npu_moe_distribute_combine_v2(
        x,
        slots,
        assist,
        received,
        weights.float(),
        x_active_mask=mask,
        shared_expert_x=shared,
        **_common(group, experts, max_tokens),
    )
    return result
