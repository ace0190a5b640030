"""Self-test cases of the MoE collectives, for their CPU kernels: a group of one rank, which no device has."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..emulation.moe_collectives import npu_moe_distribute_dispatch_v2
from .case import BF16, HALVES, Arguments, Case, Inputs, case

_DISPATCH, _COMBINE = "npu::npu_moe_distribute_dispatch_v2", "npu::npu_moe_distribute_combine_v2"
_COMBINE_NORM = "npu::npu_moe_distribute_combine_add_rms_norm"


def cases() -> Iterator[Case]:
    """Rows there, as they are and quantised, and home again, with and without shared experts and the next norm."""
    for dtype in HALVES:
        for quant_mode in (0, 2):
            yield case(_DISPATCH, _there, dtype, alone=False, tokens=8, width=1024, experts=8, k=4, quant_mode=quant_mode)
        yield case(_COMBINE, _home, dtype, alone=False, tokens=8, width=1024, experts=8, k=4, shared=dtype == BF16)
    yield case(_COMBINE_NORM, _home_to_norm, BF16, alone=False, tokens=8, width=1024, experts=8, k=4)


def _group(experts: int) -> Arguments:
    return {"group_ep": "alone", "ep_world_size": 1, "ep_rank_id": 0, "moe_expert_num": experts}


def _there(inputs: Inputs, dtype: torch.dtype, tokens: int, width: int, experts: int, k: int, quant_mode: int) -> Arguments:
    ids = torch.stack([inputs.places(k, experts, torch.int32) for _ in range(tokens)])
    return {"x": inputs.normal((tokens, width), dtype), "expert_ids": ids, "quant_mode": quant_mode, **_group(experts)}


def _home(inputs: Inputs, dtype: torch.dtype, tokens: int, width: int, experts: int, k: int, shared: bool) -> Arguments:
    given = _there(inputs, dtype, tokens, width, experts, k, 0)
    rows, _, assist, _, received, *_ = npu_moe_distribute_dispatch_v2(**given)
    return {
        "expand_x": rows,
        "expert_ids": given["expert_ids"],
        "assist_info_for_combine": assist,
        "ep_send_counts": received,
        "expert_scales": inputs.normal((tokens, k), torch.float32),
        "shared_expert_x": inputs.normal((tokens, width), dtype) if shared else None,
        **_group(experts),
    }


def _home_to_norm(inputs: Inputs, dtype: torch.dtype, tokens: int, width: int, experts: int, k: int) -> Arguments:
    given = dict(_home(inputs, dtype, tokens, width, experts, k, True))
    given["expand_idx"] = given.pop("assist_info_for_combine")
    return {**given, "residual_x": inputs.normal((tokens, 1, width), dtype), "gamma": inputs.near_one((width,), dtype), "norm_eps": 1e-5}
