"""MoE collectives on Ascend: moe_dispatch, moe_combine, moe_combine_add_rms_norm, and the grouped products between them.

What the calls are made of is written down once, in npu_fusion/moe/ascend.py: it is recorded node by node, so that a graph holds torch_npu's
own ops, which graph compilers know. A call that cannot be recorded, of symbolic sizes say, stays our op, which does the same at run time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ... import torch_private
from ...decompose import NoParts, emit_calls
from ...errors import CollectiveError
from ...lower import Arguments, Builder
from ...moe import ascend
from ...moe.transport import resolve
from .experts import are_chosen
from .norm import keeps_sum, weight_or_ones
from .provide import Npu, keeps_rounding, provides
from .table import find_op

aten = torch.ops.aten


@provides("grouped_linear", "npu::npu_grouped_matmul")
def grouped_linear(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Rows in the order of their groups, each times the matrix of its group."""
    dtype = b.val(a.x).dtype
    b.require(dtype in (torch.float16, torch.bfloat16), f"x is {dtype}: npu_grouped_matmul is for float16 and bfloat16")
    groups = {"group_list": b.cast(a.counts, torch.int64), "group_list_type": 1, "group_type": 0, "split_item": 2}
    return b.results(npu("npu::npu_grouped_matmul", [a.x], [a.weight], **groups), 1)[0]


@provides("moe_dispatch", "npu::npu_moe_distribute_dispatch_v2")
def moe_dispatch(b: Builder, a: Arguments, npu: Npu) -> Sequence[Node | None]:
    """Tokens to the ranks of their experts."""
    place, given = _place(b, a), (a.x, a.ids, a.weights)
    *results, handle = _recorded(
        b, ascend.dispatch, *given, place, a.experts, a.max_tokens, a.active, a.placement, a.quant, _all_count(b, a)
    )
    return [*results, handle if b.val(a.x).device.type == "npu" else _stand_in(b, handle)]


@provides("moe_combine", "npu::npu_moe_distribute_combine_v2")
def moe_combine(b: Builder, a: Arguments, npu: Npu) -> Node:
    """The experts' results home."""
    place, given = _place(b, a), (a.x, a.ids, a.weights, *_parts_of(b, a))
    return _recorded(b, ascend.combine, *given, place, a.experts, a.max_tokens, a.active, a.placement, a.shared, _all_count(b, a))[0]


@provides("moe_combine_add_rms_norm", "npu::npu_moe_distribute_combine_add_rms_norm")
def moe_combine_add_rms_norm(b: Builder, a: Arguments, npu: Npu) -> Sequence[Node | None]:
    """The experts' results home, the residual sum and its norm. All is added in fp32; the norm is rounded before the weight."""
    dtype = b.val(a.x).dtype
    b.only_if(a.weight_offset == 0)
    b.require(_all_count(b, a), "it leaves out tokens of which no choice counts, and it is not known that there are none")
    for name, given in (("the sum", a.sum_dtype), ("y", a.out_dtype), ("the residual", b.val(a.residual).dtype)):
        b.require(given in (None, dtype), f"it has {name} in {dtype}, the model in {given}")
    keeps_rounding(b, None, dtype, "the combined rows before the residual sum")
    if a.weight is not None:
        keeps_rounding(b, dtype, a.round_dtype, "the normalised sum before the weight")
    keeps_sum(b, a, dtype)
    a.round_dtype  # noqa: B018  without a weight it is the dtype of y
    gamma = weight_or_ones(b, a.x, a.weight)
    given = (a.x, a.ids, a.weights, *_parts_of(b, a), a.residual, gamma, a.eps)
    return _recorded(b, ascend.combine_add_rms_norm, *given, _place(b, a), a.experts, a.max_tokens, a.shared)


def _all_count(b: Builder, a: Arguments) -> bool:
    """Whether the ids of each token are different experts, all of which count."""
    return a.active is None and a.placement is None and are_chosen(b, a.ids, a.experts)


def _place(b: Builder, a: Arguments) -> ascend.Place:
    """This process in the call's group; in a graph that is only shown, or emulated, HCCL knows nothing of it."""
    b.only_if(b.config.executor != "inductor")  # where our own ops have their order noted
    b.require(a.ranks > 1 or b.config.emulate, "the ops are for two ranks and more")
    masks = b.config.target != "ascend910b"
    try:
        group = resolve(a.group, a.ranks)
    except CollectiveError:
        b.require(b.dry_run, f"there is no process group {a.group!r} of {a.ranks} ranks")
        return ascend.Place(a.group, 0, a.ranks, masks)
    communicator = a.group if b.dry_run or b.config.emulate else ascend.place_of(group).communicator
    return ascend.Place(communicator, group.rank, a.ranks, masks)


_PARTS = "npu_fusion_handle_parts"
"""Key of the meta of what stands for a handle: the call whose results its two parts are, and which ones."""


def _stand_in(b: Builder, handle: Node) -> Node:
    """What stands for a handle that no NPU makes: of the size that there is elsewhere, and of no use to any other combine than Ascend's.

    Whoever reads it gets places past all rows, of which NaN comes.
    """
    size = next(user.meta["val"].shape[0] for user in b.node.users if user.args[1] == 3)
    node = b.emit_anew(aten.full.default, [size], 2**31 - 1, dtype=torch.int32, device=b.val(handle).device)
    node.meta[_PARTS] = [part.args for part in handle.args[0]]  # type: ignore[union-attr]
    return node


def _parts_of(b: Builder, a: Arguments) -> list[Node]:
    """The two parts of a dispatch's handle: what that put together, where it did in this graph."""
    handle = a.handle
    if _PARTS in handle.meta:
        return [b.emit(operator.getitem, *part) for part in handle.meta[_PARTS]]
    if handle.target is aten.cat.default and isinstance(handle.args[0], (list, tuple)) and len(handle.args[0]) == 2:
        return list(handle.args[0])
    parts = b.emit(aten.split_with_sizes.default, handle, [b.val(a.x).shape[0] * ascend.ASSIST_WORDS, a.experts])
    return b.results(parts, 2)


def _recorded(b: Builder, function: Callable[..., Any], *args: Any) -> list[Node]:
    """What a function of npu_fusion/moe/ascend.py calls, as nodes; a call of a collective is held against the table, and never shared."""
    try:
        found = emit_calls(function, args, {}, functools.partial(_emit, b), b.results)
    except NoParts as error:
        b.refuse(f"sizes that are known at run time only ({error})")
    return [found] if isinstance(found, Node) else found


def _emit(b: Builder, target: Any, *args: Any, **kwargs: Any) -> Node:
    op = find_op(target)
    if op is None:
        return b.emit(target, *args, **kwargs)
    names = target._schema.arguments
    arguments = {spec.name: spec.default_value for spec in names} | dict(zip((spec.name for spec in names), args, strict=False)) | kwargs
    if (reason := op.refusal(arguments, b.config.target)) is not None:
        b.refuse(reason)
    torch_private.keep_in_graphs(target)
    return b.emit_anew(target, *args, **kwargs)
