"""CPU kernels of npu_mm_all_reduce_base, npu_all_gather_base_mm and npu_mm_reduce_scatter_base, over a process group of CPU tensors.

`hcom` is the group's own name here. Products are accumulated in fp32 and rounded before they are exchanged; the ranks' sum is the group's.

Source: op-plugin docs of the ops; op-plugin opapi/MatmulAllReduceBaseKernelNpuOpApi.cpp and its neighbours (checks, sizes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import CollectiveError
from ....moe.transport import Group, resolve
from .registry import check, check_dtype, check_same_dtype, emulates, refuse

_ALL_REDUCE, _ALL_GATHER, _REDUCE_SCATTER = "npu_mm_all_reduce_base", "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"
_HALVES = (torch.float16, torch.bfloat16)
_RANKS = (2, 4, 8, 16, 32)
_MODES = (None, "ai_cpu", "aiv")
_INNER = range(256, 65535)
_collectives: Any = torch.ops._c10d_functional


def _members(op: str, hcom: str, ranks: int | None = None) -> Group:
    try:
        return resolve(hcom, ranks)
    except CollectiveError as error:
        check(op, False, f"hcom: {error}")
        raise


def _check_factors(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str]) -> None:
    first, second = names
    check_dtype(op, first, x, *_HALVES)
    check_same_dtype(op, **{first: x, second: weight, "bias": bias})
    check(op, weight.dim() == 2, f"{second} needs to be 2D, but got {weight.dim()}D")
    check(op, x.shape[-1] == weight.shape[0], f"K of {first} and {second} should be same, but they are {x.shape[-1]} and {weight.shape[0]}")
    check(op, x.numel() > 0 and weight.numel() > 0, "empty tensors are not supported")
    check(op, x.is_contiguous(), f"{first} must not be transposed")
    check(op, weight.is_contiguous() or weight.t().is_contiguous(), f"{second} must be contiguous, or a transposition of what is")
    check(op, bias is None or tuple(bias.shape) == (weight.shape[1],), f"bias must have shape [{weight.shape[1]}]")


def _check_sharded(op: str, x: Tensor, weight: Tensor, world_size: int, comm_turn: int, comm_mode: str | None) -> None:
    check(op, world_size in _RANKS, f"world_size should be in {list(_RANKS)}, but the actual value is {world_size}")
    check(op, x.dim() == 2, f"input must be 2D, not {x.dim()}D")
    check(op, weight.shape[0] in _INNER, f"K must be in [256, 65535), not {weight.shape[0]}")
    check(op, comm_turn == 0, f"comm_turn must be 0, not {comm_turn}")
    check(op, comm_mode in _MODES, f"comm_mode must be ai_cpu or aiv, not {comm_mode!r}")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.float() @ weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _waited(result: Tensor) -> Tensor:
    waited: Tensor = _collectives.wait_tensor(result)
    return waited


@emulates("npu::npu_mm_all_reduce_base")
def npu_mm_all_reduce_base(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    x3: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    comm_quant_scale_1: Tensor | None = None,
    comm_quant_scale_2: Tensor | None = None,
    antiquant_group_size: int = 0,
    comm_turn: int = 0,
    group_sizes: Sequence[int] | None = None,
    y_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    dequant_scale_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    comm_quant_mode: int = 0,
    comm_mode: str | None = None,
) -> Tensor:
    """`all_reduce(x1 @ x2 + bias + x3)`, x1 [M, K] or [B, S, K]: x3, of the result's shape, is added by every rank."""
    refuse(_ALL_REDUCE, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset, dequant_scale=dequant_scale)
    refuse(_ALL_REDUCE, pertoken_scale=pertoken_scale, comm_quant_scale_1=comm_quant_scale_1, comm_quant_scale_2=comm_quant_scale_2)
    refuse(_ALL_REDUCE, group_sizes=group_sizes, y_dtype=y_dtype, x1_dtype=x1_dtype, x2_dtype=x2_dtype)
    refuse(_ALL_REDUCE, dequant_scale_dtype=dequant_scale_dtype, pertoken_scale_dtype=pertoken_scale_dtype)
    _check_factors(_ALL_REDUCE, x1, x2, bias, ("x1", "x2"))
    check(_ALL_REDUCE, x1.dim() in (2, 3), f"x1 must be 2D or 3D, not {x1.dim()}D")
    check(_ALL_REDUCE, reduce_op == "sum", f"reduce_op must be sum, not {reduce_op}")
    check(_ALL_REDUCE, antiquant_group_size == 0 and comm_turn == 0 and comm_quant_mode == 0, "group size, comm_turn and mode must be 0")
    check(_ALL_REDUCE, comm_mode in (None, "ai_cpu"), f"comm_mode must be ai_cpu, not {comm_mode!r}")
    members = _members(_ALL_REDUCE, hcom)
    check(_ALL_REDUCE, members.ranks in (1, 2, 4, 8), f"1, 2, 4 or 8 ranks are supported, not {members.ranks}")
    y = _product(x1, x2, bias)
    if x3 is not None:
        check_same_dtype(_ALL_REDUCE, x1=x1, x3=x3)
        check(_ALL_REDUCE, x3.shape == y.shape, f"x3 with shape {list(x3.shape)} doesn't match the output shape {list(y.shape)}")
        y = y + x3
    return _waited(_collectives.all_reduce(y, "sum", hcom))


@npu_mm_all_reduce_base.fake
def _(x1: Tensor, x2: Tensor, hcom: str, **_: Any) -> Tensor:
    return x1.new_empty((*x1.shape[:-1], x2.shape[1]))


@emulates("npu::npu_all_gather_base_mm")
def npu_all_gather_base_mm(
    input: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    *,
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    gather_index: int = 0,
    gather_output: bool = True,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`all_gather(input) @ x2` [world_size * M, N], and what was gathered [world_size * M, K], or an empty tensor."""
    refuse(_ALL_GATHER, bias=bias, x1_scale=x1_scale, x2_scale=x2_scale, output_dtype=output_dtype)
    _check_factors(_ALL_GATHER, input, x2, None, ("input", "x2"))
    _check_sharded(_ALL_GATHER, input, x2, world_size, comm_turn, comm_mode)
    check(_ALL_GATHER, gather_index == 0, f"gather_index must be 0, not {gather_index}")
    check(_ALL_GATHER, gather_output or comm_mode != "aiv", "gather_output must be True in mode aiv")
    _members(_ALL_GATHER, hcom, world_size)
    gathered = _waited(_collectives.all_gather_into_tensor(input, world_size, hcom))
    return _product(gathered, x2), gathered if gather_output else input.new_empty((0,))


@npu_all_gather_base_mm.fake
def _(
    input: Tensor, x2: Tensor, hcom: str, world_size: int, *, gather_output: bool = True, **_: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = input.shape[0] * world_size
    return input.new_empty((rows, x2.shape[1])), input.new_empty((rows, input.shape[1]) if gather_output else (0,))


@emulates("npu::npu_mm_reduce_scatter_base")
def npu_mm_reduce_scatter_base(
    input: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> Tensor:
    """This rank's rows of the ranks' sum of `input @ x2`: [M / world_size, N]."""
    refuse(_REDUCE_SCATTER, bias=bias, x1_scale=x1_scale, x2_scale=x2_scale, output_dtype=output_dtype)
    _check_factors(_REDUCE_SCATTER, input, x2, None, ("input", "x2"))
    _check_sharded(_REDUCE_SCATTER, input, x2, world_size, comm_turn, comm_mode)
    check(_REDUCE_SCATTER, reduce_op == "sum", f"reduce_op must be sum, not {reduce_op}")
    check(_REDUCE_SCATTER, input.shape[0] % world_size == 0, f"the {input.shape[0]} rows must be divisible by world_size {world_size}")
    _members(_REDUCE_SCATTER, hcom, world_size)
    return _waited(_collectives.reduce_scatter_tensor(_product(input, x2), "sum", world_size, hcom))


@npu_mm_reduce_scatter_base.fake
def _(input: Tensor, x2: Tensor, hcom: str, world_size: int, **_: Any) -> Tensor:
    return input.new_empty((input.shape[0] // world_size, x2.shape[1]))
