"""`npu_fusion.moe.dispatch`, `combine` and `prepare`: the collectives with the arguments that a model has at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .transport import resolve, transport_of


@dataclass(frozen=True)
class Dispatched:
    """What `dispatch` brought to this rank.

    Attributes:
        rows: [A, H], in the order of the local experts; those past the sum of counts have no meaning.
        scales: [A] fp32, by which quantised rows are multiplied.
        counts: [L] int64, rows of each local expert.
        handle, ids, weights, form: what `combine` needs.
    """

    rows: Tensor
    scales: Tensor
    counts: Tensor
    handle: Tensor
    ids: Tensor
    weights: Tensor
    form: dict[str, Any]


def group_name(group: Any) -> tuple[str, int]:
    """Name and size of a process group, of a name, or of the default group (None)."""
    if isinstance(group, str):
        from .. import torch_private

        return group, dist.get_world_size(torch_private.process_group(group))
    found: Any = group if group is not None else dist.group.WORLD
    return str(found.group_name), dist.get_world_size(found)


def dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: int,
    *,
    group: Any = None,
    max_tokens: int | None = None,
    active: Tensor | None = None,
    placement: Tensor | None = None,
    quant: str = "none",
) -> Dispatched:
    """`torch.ops.npu_fusion.moe_dispatch` on a group.

    Args:
        group: a process group, its name, or None for the default group.
        max_tokens: the most tokens of any rank; None where all ranks have as many as this one.
        the others: as the op's.
    """
    name, ranks = group_name(group)
    form = {
        "group": name,
        "ranks": ranks,
        "experts": experts,
        "max_tokens": x.shape[0] if max_tokens is None else max_tokens,
        "active": active,
        "placement": placement,
    }
    rows, scales, counts, handle = torch.ops.npu_fusion.moe_dispatch(x, ids, weights, quant=quant, **form)
    return Dispatched(rows, scales, counts, handle, ids, weights, form)


def combine(rows: Tensor, dispatched: Dispatched, *, shared: Tensor | None = None) -> Tensor:
    """`torch.ops.npu_fusion.moe_combine` of the experts' results [A, H] for what `dispatch` returned: [T, H]."""
    given = dispatched
    result: Tensor = torch.ops.npu_fusion.moe_combine(rows, given.ids, given.weights, given.handle, shared=shared, **given.form)
    return result


def prepare(
    *,
    max_tokens: int,
    hidden: int,
    top_k: int,
    device: torch.device | str,
    group: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    quant: str = "none",
    timeout: float = 100.0,
) -> None:
    """Allocate what dispatch and combine of this size need on a group, so that a graph capture can hold them. All ranks must call it.

    Where a transport keeps no buffers (CPU, NCCL, Ascend) this only makes the communicator.

    Args:
        max_tokens: the most tokens of any rank: what will be given to dispatch.
        hidden, top_k: H and K.
        device: of the tensors.
        dtype: of the rows and of the experts' results.
        quant: as the dispatch's.
        timeout: seconds that a rank waits for another before it gives up, which the next call on the host then raises.
    """
    name, ranks = group_name(group)
    where = torch.empty(0, device=device).device
    members = resolve(name, ranks)
    if where.type == "npu":
        from . import ascend

        ascend._communicator(members.process_group, members.rank)
        return
    transport = transport_of(members, where)
    allocate = getattr(transport, "prepare", None)
    if allocate is not None:
        allocate(max_tokens, hidden, top_k, dtype, quant, timeout)


def check(group: Any = None, device: torch.device | str = "cuda") -> None:
    """Raise CollectiveError if a wait of an earlier collective of the group on a device ran out, naming the rank that was late.

    Waits for nothing: it says what the device has found so far. Calls of dispatch and combine ask this themselves; replays of a captured
    graph run no code of theirs, so that after one this is to be asked.
    """
    name, ranks = group_name(group)
    transport = transport_of(resolve(name, ranks), torch.empty(0, device=device).device)
    ask = getattr(transport, "check", None)
    if ask is not None:
        ask()
