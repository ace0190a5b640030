"""CPU kernels of routed experts: npu_moe_init_routing_v2, npu_grouped_matmul, npu_moe_finalize_routing.

Source: ops-transformer `moe/*/docs` and `gmm/grouped_matmul/docs`. Of each op the modes are supported that the providers call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .quant import dynamic
from .registry import FLOATS, check, check_dtype, check_same_dtype, emulates, refuse

_NARROW = (torch.float16, torch.bfloat16)
_DYNAMIC = 1
_OUT = {None: None, 3: torch.int32, 5: torch.float16, 15: torch.bfloat16}
"""Dtypes of results by their numbers in torch."""


def _check_init(x: Tensor, expert_idx: Tensor, expert_num: int, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    op = "npu_moe_init_routing_v2"
    check_dtype(op, "x", x, *FLOATS)
    check(op, given["quant_mode"] in (-1, _DYNAMIC), f"the CPU kernel supports quant_mode -1 and {_DYNAMIC}, not {given['quant_mode']}")
    check_dtype(op, "expert_idx", expert_idx, torch.int32)
    check(op, x.dim() == 2 and expert_idx.dim() == 2, "x and expert_idx must have 2 dimensions")
    check(op, 0 < expert_num <= 10240, f"expert_num must be from 1 to 10240, not {expert_num}")
    for name, value in wanted.items():
        check(op, given[name] == value, f"the CPU kernel supports {name} = {value} alone, not {given[name]}")


_INIT = {"drop_pad_mode": 0, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "row_idx_type": 0}


@emulates("npu::npu_moe_init_routing_v2")
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = [],
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of x in the order of their experts, where each went (int32, by flat id), how many each expert has (int64), and scales.

    With quant_mode 1 the rows are quantised to int8, `scale = max / 127` of each; else there are no scales.
    """
    given = {name: value for name, value in locals().items() if name in (*_INIT, "quant_mode")}
    _check_init(x, expert_idx, expert_num, given, _INIT)
    refuse("npu_moe_init_routing_v2", scale=scale, offset=offset, x_dtype=x_dtype)
    check("npu_moe_init_routing_v2", list(active_expert_range) == [0, expert_num], "the CPU kernel supports the range of all experts alone")
    flat = expert_idx.reshape(-1)
    order = flat.sort(stable=True).indices
    places = torch.empty_like(flat).index_copy(0, order, torch.arange(flat.numel(), dtype=torch.int32, device=flat.device))
    counts = torch.zeros(expert_num, dtype=torch.int64, device=x.device).scatter_add(
        0, flat.long(), torch.ones_like(flat, dtype=torch.int64)
    )
    rows = x[order // expert_idx.shape[1]]
    if quant_mode == _DYNAMIC:
        rows, factor = dynamic(rows.float())
        return rows, places, counts, 1 / factor
    return rows, places, counts, x.new_empty(flat.numel(), dtype=torch.float32)


@npu_moe_init_routing_v2.fake
def _(x: Tensor, expert_idx: Tensor, *, expert_num: int = -1, quant_mode: int = -1, **given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_init(x, expert_idx, expert_num, given | {"quant_mode": quant_mode}, {})
    rows = expert_idx.shape[0] * expert_idx.shape[1]
    tokens = x.new_empty((expert_num,), dtype=torch.int64)
    y = x.new_empty((rows, x.shape[1]), dtype=torch.int8 if quant_mode == _DYNAMIC else x.dtype)
    return y, x.new_empty((rows,), dtype=torch.int32), tokens, x.new_empty((rows,), dtype=torch.float32)


def _check_grouped(
    x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor] | None, group_list: Tensor | None, modes: tuple[Any, ...]
) -> None:
    op = "npu_grouped_matmul"
    check(op, len(x) == len(weight) == 1, f"the CPU kernel supports one x and one weight, not {len(x)} and {len(weight)}")
    check_dtype(op, "x", x[0], *_NARROW, torch.int8)
    if weight[0].dtype != torch.int32:
        check_same_dtype(op, x=x[0], weight=weight[0])
    check(op, x[0].dim() == 2 and weight[0].dim() == 3, "x must have 2 dimensions and weight 3")
    check(op, modes == (2, 0, 1), f"split_item, group_type, group_list_type must be 2, 0, 1, not {modes}")
    check(op, group_list is not None, "group_list is missing")
    if bias is not None:
        check_dtype(op, "bias", bias[0], {torch.bfloat16: torch.float32, torch.float16: torch.float16}.get(x[0].dtype, torch.int32))
        check(op, bias[0].dim() == 2, "bias must have 2 dimensions")


def _dequantised(
    x: Tensor, words: Tensor, scale: Sequence[Tensor] | None, offset: Sequence[Tensor] | None, *, fake: bool = False
) -> Tensor:
    """The matrices [G, K, N] of words of eight two's complement nibbles of outputs: (code + offset) * scale in the dtype of x."""
    op = "npu_grouped_matmul"
    if scale is None or offset is None:
        check(op, False, "the CPU kernel needs antiquant_scale and antiquant_offset of a packed weight")
        raise AssertionError
    check_same_dtype(op, x=x, antiquant_scale=scale[0], antiquant_offset=offset[0])
    check(op, scale[0].shape == offset[0].shape, "antiquant_scale and antiquant_offset must have one shape")
    groups, inputs, outputs = words.shape[0], words.shape[1], words.shape[2] * 8
    if fake:
        return x.new_empty((groups, inputs, outputs))
    check(op, scale[0].dim() == 2 or not offset[0].any(), "offsets go by channel alone")
    of_groups = [
        tensor[0].reshape(groups, -1, outputs).repeat_interleave(inputs // (tensor[0].numel() // groups // outputs), 1)
        for tensor in (scale, offset)
    ]
    codes = (((words.unsqueeze(-1) >> torch.arange(0, 32, 4, device=words.device)) & 15 ^ 8) - 8).flatten(-2)
    return (codes.to(x.dtype) + of_groups[1]) * of_groups[0]


def _check_scales(
    x: Tensor, weight: Tensor, scale: Sequence[Tensor] | None, of_rows: Sequence[Tensor] | None, output_dtype: int | None
) -> torch.dtype:
    """The dtype of the result; raises where scales and types do not go together."""
    op = "npu_grouped_matmul"
    check(op, output_dtype in _OUT, f"the CPU kernel does not know output_dtype {output_dtype}")
    out = _OUT[output_dtype] or x.dtype
    if x.dtype != torch.int8:
        check(op, scale is None and of_rows is None and out == x.dtype, "scales and output_dtype are of int8 rows")
        return out
    if out == torch.int32:
        check(op, scale is None and of_rows is None, "sums in int32 are not scaled")
        return out
    check(op, out in _NARROW, f"int8 rows give int32, float16 or bfloat16, not {out}")
    if scale is None or of_rows is None:
        check(op, False, "the CPU kernel supports scaled sums with scale and per_token_scale alone")
        raise AssertionError
    check_dtype(op, "scale", scale[0], torch.float32, *([torch.bfloat16] if out == torch.bfloat16 else []))
    check_dtype(op, "per_token_scale", of_rows[0], torch.float32)
    check(op, scale[0].shape == (weight.shape[0], weight.shape[2]), f"scale must be [groups, N], not {list(scale[0].shape)}")
    check(op, of_rows[0].shape == x.shape[:1], f"per_token_scale must be [{x.shape[0]}], not {list(of_rows[0].shape)}")
    return out


@emulates("npu::npu_grouped_matmul")
def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    offset: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    activation_input: Sequence[Tensor] | None = None,
    activation_quant_scale: Sequence[Tensor] | None = None,
    activation_quant_offset: Sequence[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """Rows times the matrix of their group, of which each has as many as `group_list` says.

    Floating point: fp32 inside, rounded once. int8: sums in int32, or `sums * scale * per_token_scale` in fp32, rounded once.
    """
    op = "npu_grouped_matmul"
    _check_grouped(x, weight, bias, group_list, (split_item, group_type, group_list_type))
    if weight[0].dtype == torch.int32:
        weight, antiquant_scale, antiquant_offset = [_dequantised(x[0], weight[0], antiquant_scale, antiquant_offset)], None, None
    out = _check_scales(x[0], weight[0], scale, per_token_scale, output_dtype)
    check(op, act_type == 0, "the CPU kernel supports no activation")
    refuse(op, offset=offset, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    refuse(op, activation_input=activation_input, activation_quant_scale=activation_quant_scale, x_dtype=x_dtype)
    refuse(op, activation_quant_offset=activation_quant_offset, tuning_config=tuning_config)
    refuse(op, weight_dtype=weight_dtype, scale_dtype=scale_dtype, per_token_scale_dtype=per_token_scale_dtype)
    assert group_list is not None
    y = x[0].new_zeros((x[0].shape[0], weight[0].shape[2]), dtype=out)
    start = 0
    for group, count in enumerate(group_list.tolist()):
        rows = slice(start, start + count)
        whole = x[0].dtype == torch.int8
        sums = torch._int_mm(x[0][rows], weight[0][group]) if whole and count else x[0][rows].float() @ weight[0][group].float()
        sums = sums if bias is None else sums + bias[0][group].to(sums.dtype)
        if scale is not None and per_token_scale is not None:
            sums = sums.float() * scale[0][group].float() * per_token_scale[0][rows].unsqueeze(-1)
        y[rows] = sums.to(out)
        start += count
    return [y]


@npu_grouped_matmul.fake
def _(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **others: Any,
) -> list[Tensor]:
    _check_grouped(x, weight, bias, group_list, (split_item, group_type, group_list_type))
    if weight[0].dtype == torch.int32:
        weight = [_dequantised(x[0], weight[0], antiquant_scale, antiquant_offset, fake=True)]
    out = _check_scales(x[0], weight[0], scale, per_token_scale, output_dtype)
    return [x[0].new_empty((x[0].shape[0], weight[0].shape[2]), dtype=out)]


def _check_finalize(rows: Tensor, scales: Tensor | None, bias: Tensor | None, places: Tensor, mode: int) -> None:
    op = "npu_moe_finalize_routing"
    check_dtype(op, "expanded_permuted_rows", rows, *FLOATS)
    check_same_dtype(op, expanded_permuted_rows=rows, scales=scales, bias=bias)
    check_dtype(op, "expanded_src_to_dst_row", places, torch.int32)
    check(op, mode == 2, f"the CPU kernel supports drop_pad_mode = 2 alone, not {mode}")
    check(op, rows.dim() == 2 and places.dim() == 1, "rows must have 2 dimensions, their places 1")
    check(op, scales is not None, "the CPU kernel needs scales")


@emulates("npu::npu_moe_finalize_routing")
def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """The sum, for each token, of scales times (row + bias of its expert); with drop_pad_mode 2 the places lie token by token."""
    _check_finalize(expanded_permuted_rows, scales, bias, expanded_src_to_dst_row, drop_pad_mode or 0)
    refuse("npu_moe_finalize_routing", skip1=skip1, skip2=skip2)
    assert scales is not None
    rows = expanded_permuted_rows.float()[expanded_src_to_dst_row.long()].unflatten(0, scales.shape)
    if bias is not None:
        check("npu_moe_finalize_routing", export_for_source_row is not None, "bias needs export_for_source_row")
        assert export_for_source_row is not None
        rows = rows + bias.float()[export_for_source_row.long()]
    total: Tensor = (rows * scales.float().unsqueeze(-1)).sum(1)
    return total.to(expanded_permuted_rows.dtype)


@npu_moe_finalize_routing.fake
def _(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    _check_finalize(expanded_permuted_rows, scales, bias, expanded_src_to_dst_row, drop_pad_mode or 0)
    assert scales is not None
    return expanded_permuted_rows.new_empty((scales.shape[0], expanded_permuted_rows.shape[1]))
