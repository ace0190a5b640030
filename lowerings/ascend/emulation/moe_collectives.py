"""CPU kernels of the MoE collectives: npu_moe_distribute_dispatch_v2, npu_moe_distribute_combine_v2 and ..._combine_add_rms_norm.

`group_ep` names a process group of CPU tensors, which all ranks of it call; with one rank there need be none. Everything is gathered on
every rank, so that they are for small sizes. Of a row the assist info holds rank, token and choice in its first words, as A3's does.

Source: ops-transformer `mc2/moe_distribute_*/op_kernel`: the sum is in fp32 and rounded once; `..._add_rms_norm` adds the residual before
it rounds, normalises the unrounded sum, and rounds that before gamma. Results of tokens of which no choice counts are left unwritten: NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ....moe.ascend import ASSIST_WORDS
from ....moe.quantized import quantize_rows
from ....moe.transport import resolve
from .registry import check, check_dtype, emulates, refuse

_HALVES = (torch.float16, torch.bfloat16, torch.float32)  # fp32 for the arithmetic alone: the table has the device's


def _gathered(tensor: Tensor, group: str, ranks: int) -> Tensor:
    """What all ranks have, [R, ...]."""
    if ranks == 1:
        return tensor[None]
    found = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(found, tensor.contiguous(), group=resolve(group, ranks).process_group)
    return torch.stack(found)


def _check_combine(op: str, *modes: int) -> None:
    check(op, not any(modes), "the CPU kernel supports no TP, no ranks of shared experts, no special experts, no quantised rows")


def _check_routing(op: str, x: Tensor, expert_ids: Tensor, mask: Tensor | None, experts: int, ranks: int) -> None:
    check_dtype(op, "x", x, *_HALVES)
    check_dtype(op, "expert_ids", expert_ids, torch.int32)
    check(op, x.dim() == 2 and expert_ids.dim() == 2, "x and expert_ids must have 2 dimensions")
    check(op, experts % ranks == 0, f"{experts} experts cannot be shared equally by {ranks} ranks")
    check(op, mask is None or mask.shape == expert_ids.shape, "the CPU kernel supports a mask of choices alone")


def _rows(tokens: int, global_bs: int, ranks: int, experts: int, top_k: int) -> int:
    return (global_bs or tokens * ranks) * min(experts // ranks, top_k)


@emulates("npu::npu_moe_distribute_dispatch_v2")
def npu_moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    elastic_info: Tensor | None = None,
    performance_info: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: int | None = None,
    x_dtype: int | None = None,
    scales_dtype: int | None = None,
) -> tuple[Tensor, ...]:
    """Rows in the order of the local experts, each expert's by rank, token and choice; counts; what the combine needs."""
    op = "npu_moe_distribute_dispatch_v2"
    _check_routing(op, x, expert_ids, x_active_mask, moe_expert_num, ep_world_size)
    modes = (tp_world_size, shared_expert_rank_num, expert_token_nums_type, zero_expert_num, copy_expert_num, const_expert_num)
    check(op, modes == (0, 0, 1, 0, 0, 0), "the CPU kernel supports no TP, no ranks of shared experts, no special experts; counts alone")
    refuse(op, scales=scales, expert_scales=expert_scales, elastic_info=elastic_info, performance_info=performance_info)
    refuse(op, y_dtype=y_dtype, x_dtype=x_dtype, scales_dtype=scales_dtype)
    check(op, quant_mode in (0, 2), f"the CPU kernel supports quant_mode 0 and 2, not {quant_mode}")
    check(op, bool(((expert_ids >= 0) & (expert_ids < moe_expert_num)).all()), "expert_ids must be of experts")
    ordered = expert_ids.sort(dim=1).values
    check(op, bool((ordered[:, 1:] != ordered[:, :-1]).all()), "the experts of a token must be different")
    (tokens, top_k), ranks = expert_ids.shape, ep_world_size
    most = global_bs // ranks or tokens
    check(op, x_active_mask is None or tokens == most, "with a mask all ranks must have equally many tokens")
    counting = torch.ones_like(expert_ids, dtype=torch.bool) if x_active_mask is None else x_active_mask
    sent, row_scales = quantize_rows(x, "int8" if quant_mode == 2 else "none")
    row_scales = torch.ones(tokens, 1) if row_scales is None else row_scales
    pad = (0, 0, 0, most - tokens)
    slots = torch.nn.functional.pad(torch.where(counting, expert_ids, -1), pad, value=-1)
    everyone, rows, factors = (
        _gathered(part, group_ep, ranks) for part in (slots, torch.nn.functional.pad(sent, pad), torch.nn.functional.pad(row_scales, pad))
    )
    local = moe_expert_num // ranks
    mine = everyone - ep_rank_id * local
    found = torch.cat([torch.nonzero(mine == expert) for expert in range(local)])  # [S, (rank, token, choice)]
    size = _rows(tokens, global_bs, ranks, moe_expert_num, top_k)
    expanded = rows.new_zeros((size, x.shape[1]))
    expanded[: len(found)] = rows[found[:, 0], found[:, 1]]
    dynamic = torch.zeros(size)
    dynamic[: len(found)] = factors[found[:, 0], found[:, 1], 0]
    assist = torch.full((size, ASSIST_WORDS), -1, dtype=torch.int32)
    assist[: len(found), :3] = found.to(torch.int32)
    by_rank = torch.stack([(mine == expert).sum(dim=(1, 2)) for expert in range(local)])  # [L, R]
    received = by_rank.flatten().cumsum(0).to(torch.int32)
    empty = torch.zeros(0, dtype=torch.int32)
    words = torch.cat([assist.flatten(), torch.full((max(tokens * top_k - size * ASSIST_WORDS, 0),), -1, dtype=torch.int32)])
    return expanded, dynamic, words, by_rank.sum(1), received, empty, torch.zeros(0)


@npu_moe_distribute_dispatch_v2.fake
def _(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: Tensor | None = None,
    quant_mode: int = 0,
    global_bs: int = 0,
    **given: Any,
) -> tuple[Tensor, ...]:
    _check_routing("npu_moe_distribute_dispatch_v2", x, expert_ids, x_active_mask, moe_expert_num, ep_world_size)
    size, int32 = _rows(x.shape[0], global_bs, ep_world_size, moe_expert_num, expert_ids.shape[1]), torch.int32
    return (
        x.new_empty((size, x.shape[1]), dtype=torch.int8 if quant_mode == 2 else x.dtype),
        x.new_empty((size,), dtype=torch.float32),
        x.new_empty((max(x.shape[0] * expert_ids.shape[1], size * ASSIST_WORDS),), dtype=int32),
        x.new_empty((moe_expert_num // ep_world_size,), dtype=torch.int64),
        x.new_empty((moe_expert_num,), dtype=int32),
        x.new_empty((0,), dtype=int32),
        x.new_empty((0,), dtype=torch.float32),
    )


def _combined(
    op: str, expand_x: Tensor, expert_ids: Tensor, assist: Tensor, counts: Tensor, scales: Tensor, group: str, ranks: int, rank: int,
    experts: int, mask: Tensor | None, shared: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The unrounded sum [T, H] of each token's rows in fp32, and which tokens [T, 1] have any."""
    _check_routing(op, expand_x, expert_ids, mask, experts, ranks)
    check_dtype(op, "expert_scales", scales, torch.float32)
    rows, words = _gathered(expand_x, group, ranks), _gathered(assist, group, ranks)
    numbers = _gathered(counts[-1:], group, ranks)
    total = torch.zeros(expert_ids.shape[0], expand_x.shape[1])
    for source in range(ranks):
        sent = words[source].view(-1, ASSIST_WORDS)[: int(numbers[source])].long()
        here = sent[:, 0] == rank
        token, choice = sent[here, 1], sent[here, 2]
        total.index_add_(0, token, rows[source][: len(sent)][here].float() * scales[token, choice, None])
    if shared is not None:
        total = total + shared.float()
    counting = torch.ones_like(expert_ids, dtype=torch.bool) if mask is None else mask
    return total, counting.any(dim=1, keepdim=True)


@emulates("npu::npu_moe_distribute_combine_v2")
def npu_moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    elastic_info: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    performance_info: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> Tensor:
    """Each token's rows, weighted and added up."""
    op = "npu_moe_distribute_combine_v2"
    _check_combine(op, tp_world_size, shared_expert_rank_num, comm_quant_mode, zero_expert_num, copy_expert_num, const_expert_num)
    refuse(op, tp_send_counts=tp_send_counts, expand_scales=expand_scales, elastic_info=elastic_info, performance_info=performance_info)
    total, present = _combined(
        op, expand_x, expert_ids, assist_info_for_combine, ep_send_counts, expert_scales, group_ep,
        ep_world_size, ep_rank_id, moe_expert_num, x_active_mask, shared_expert_x,
    )  # fmt: skip
    return torch.where(present, total, torch.nan).to(expand_x.dtype)


@npu_moe_distribute_combine_v2.fake
def _(expand_x: Tensor, expert_ids: Tensor, *others: Any, **given: Any) -> Tensor:
    return expand_x.new_empty((expert_ids.shape[0], expand_x.shape[1]))


@emulates("npu::npu_moe_distribute_combine_add_rms_norm")
def npu_moe_distribute_combine_add_rms_norm(
    expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    residual_x: Tensor,
    gamma: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    activation_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    group_list: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    elastic_info: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
    comm_alg: str = "",
    norm_eps: float = 1e-6,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, 1, H], 1 / rms [T, 1, 1] and the sum [T, 1, H]."""
    op = "npu_moe_distribute_combine_add_rms_norm"
    _check_combine(op, tp_world_size, shared_expert_rank_num, comm_quant_mode, zero_expert_num, copy_expert_num, const_expert_num)
    refuse(op, tp_send_counts=tp_send_counts, expand_scales=expand_scales, elastic_info=elastic_info, activation_scale=activation_scale)
    refuse(op, weight_scale=weight_scale, group_list=group_list)
    check(op, residual_x.dim() == 3 and residual_x.shape[1] == 1, "residual_x must be [BS, 1, H]")
    total, present = _combined(
        op, expand_x, expert_ids, expand_idx, ep_send_counts, expert_scales, group_ep, ep_world_size, ep_rank_id, moe_expert_num,
        x_active_mask, shared_expert_x,
    )  # fmt: skip
    total = torch.where(present, total + residual_x[:, 0].float(), torch.nan)
    rstd = 1 / (total.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    y = (total * rstd).to(residual_x.dtype).float() * gamma.float()
    return y.to(residual_x.dtype)[:, None], rstd[:, None], total.to(residual_x.dtype)[:, None]


@npu_moe_distribute_combine_add_rms_norm.fake
def _(expand_x: Tensor, expert_ids: Tensor, *others: Any, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, hidden = expert_ids.shape[0], expand_x.shape[1]
    shape: Sequence[Any] = (tokens, 1, hidden)
    return expand_x.new_empty(shape), expand_x.new_empty((tokens, 1, 1), dtype=torch.float32), expand_x.new_empty(shape)
