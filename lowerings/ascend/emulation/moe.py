"""CPU kernels of routers: npu_moe_gating_top_k_softmax_v2, npu_moe_gating_top_k.

Source: ops-transformer `moe/*/docs`. All compute in fp32 and round once, at the end; ties go to the lower index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import FLOATS, check, check_dtype, emulates


def _best(choice: Tensor, k: int) -> Tensor:
    return choice.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _check_softmax(x: Tensor, k: int, finished: Tensor | None, renorm: int | None) -> None:
    op = "npu_moe_gating_top_k_softmax_v2"
    check_dtype(op, "x", x, *FLOATS)
    check(op, x.dim() in (2, 3), f"x must have 2 or 3 dimensions, not {x.dim()}")
    check(op, renorm in (0, 1), f"renorm must be 0 or 1, not {renorm}")
    size = x.shape[-1]
    check(op, 0 < k <= 1024 and (not isinstance(size, int) or k <= size), f"k = {k} of {size} experts")
    if finished is not None:
        check_dtype(op, "finished", finished, torch.bool)
        check(op, finished.dim() == x.dim() - 1, "finished must have the shape of x without its last dimension")


@emulates("npu::npu_moe_gating_top_k_softmax_v2")
def npu_moe_gating_top_k_softmax_v2(
    x: Tensor, *, k: int = 1, finished: Tensor | None = None, renorm: int | None = 0, output_softmax: bool | None = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of softmax(x), or with `renorm` 1 the softmax of the k largest of x; rows that are finished have the index E."""
    _check_softmax(x, k, finished, renorm)
    scores = torch.softmax(x.float(), -1)
    choice = scores if renorm == 0 else x.float()
    indices = _best(choice, k)
    y = choice.gather(-1, indices)
    y = y if renorm == 0 else torch.softmax(y, -1)
    if finished is not None:
        indices = indices.masked_fill(finished.unsqueeze(-1), x.shape[-1])
    shown = scores if output_softmax and renorm == 0 else scores.new_empty(0)
    return y.to(x.dtype), indices.to(torch.int32), shown


@npu_moe_gating_top_k_softmax_v2.fake
def _(
    x: Tensor, *, k: int = 1, finished: Tensor | None = None, renorm: int | None = 0, output_softmax: bool | None = False
) -> tuple[Tensor, Tensor, Tensor]:
    _check_softmax(x, k, finished, renorm)
    sizes = (*x.shape[:-1], k)
    shown = x.shape if output_softmax and renorm == 0 else (0,)
    return x.new_empty(sizes), x.new_empty(sizes, dtype=torch.int32), x.new_empty(shown, dtype=torch.float32)


def _check_gating(
    x: Tensor, k: int, bias: Tensor | None, k_group: int, group_count: int, group_select_mode: int, modes: tuple[int, int]
) -> None:
    op = "npu_moe_gating_top_k"
    check_dtype(op, "x", x, *FLOATS)
    check(op, x.dim() == 2, f"x must have 2 dimensions, not {x.dim()}")
    check(op, modes == (0, 1), f"renorm must be 0 and norm_type 1, not {modes[0]} and {modes[1]}")
    check(op, group_select_mode in (0, 1), f"group_select_mode must be 0 or 1, not {group_select_mode}")
    check(op, 0 < k_group <= group_count, f"k_group must be from 1 to group_count: {k_group} of {group_count}")
    if bias is not None:
        check_dtype(op, "bias", bias, x.dtype)
        check(op, bias.dim() == 1, f"bias must have 1 dimension, not {bias.dim()}")
    size = x.shape[-1]
    if isinstance(size, int):
        members = size // group_count
        check(op, size % group_count == 0 and members > 2, f"{size} experts do not fall into {group_count} equal groups of more than 2")
        check(op, -(-members // 32) * 32 * group_count <= 2048, f"{group_count} groups of {members}, padded to 32, are more than 2048")
        check(op, 0 < k <= members * k_group, f"k = {k} of {k_group} groups of {members} experts")


@emulates("npu::npu_moe_gating_top_k")
def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoid, bias for the choice, the best groups, the k best of them; their sigmoids divided by their sum and scaled."""
    _check_gating(x, k, bias, k_group, group_count, group_select_mode, (renorm, norm_type))
    check("npu_moe_gating_top_k", input_ids is None and tid2eid is None, "input_ids and tid2eid are not supported")
    scores = torch.sigmoid(x.float())
    choice = scores if bias is None else scores + bias.float()
    groups = choice.unflatten(-1, (group_count, -1))
    merit = groups.amax(-1) if group_select_mode == 0 else groups.topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(merit, dtype=torch.bool).scatter(-1, _best(merit, k_group), True)
    indices = _best(groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2), k)
    y = scores.gather(-1, indices)
    y = y / (y.sum(-1, keepdim=True) + eps) * routed_scaling_factor
    return y.to(x.dtype), indices.to(torch.int32), choice if out_flag else choice.new_empty(0)


@npu_moe_gating_top_k.fake
def _(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_gating(x, k, bias, k_group, group_count, group_select_mode, (renorm, norm_type))
    rows = x.shape[0]
    shown = x.shape if out_flag else (0,)
    return x.new_empty((rows, k)), x.new_empty((rows, k), dtype=torch.int32), x.new_empty(shown, dtype=torch.float32)
