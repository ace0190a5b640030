"""`npu_fusion.moe.dispatch`, `combine` and `prepare`: the collectives with the arguments that a model has at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import torch_private
from ..errors import CollectiveError
from . import quantized
from .transport import agree, resolve, transport_of

_PREPARED: dict[str, int] = {}
"""max_tokens of each group that was prepared, by name."""
_PREPARED_GROUPS: dict[str, Any] = {}
"""The process group that had the name then. Dynamo cannot look one up: a compiled call takes it that the name stands for the same."""


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


@torch.compiler.assume_constant_result
def _size(name: str) -> int:
    """Size of the group of a name. Dynamo cannot trace how it is found."""
    return resolve(name, None).ranks


def group_name(group: Any) -> tuple[str, int]:
    """Name and size of a process group, of a name, or of the default group (None)."""
    if isinstance(group, str):
        return group, _size(group)
    found: Any = group if group is not None else dist.group.WORLD
    return str(found.group_name), dist.get_world_size(found)


@torch.compiler.assume_constant_result
def _unknown(device_type: str) -> int:
    """Raise. Dynamo calls this rather than trace it, and so passes on what it says."""
    raise CollectiveError(
        f"on {device_type}, max_tokens must be given, or npu_fusion.moe.prepare(max_tokens=..., ...) be called before on all ranks: "
        "ranks with unequal numbers of tokens would otherwise hang, or mix their rows up"
    )


def most_tokens(name: str, ranks: int, x: Tensor) -> int:
    """What max_tokens is where a caller leaves it out: what `prepare` was given, on all ranks the same, or the tokens of this rank.

    Raises:
        CollectiveError: nobody can tell whether other ranks have as many tokens as this one: nothing was prepared, and only on CPUs are the
            numbers compared at each call.
    """
    prepared = _PREPARED.get(name)
    if prepared is not None and (torch.compiler.is_compiling() or _PREPARED_GROUPS[name] is torch_private.process_group(name)):
        return prepared
    if ranks > 1 and x.device.type not in ("cpu", "meta"):
        _unknown(x.device.type)
    return x.shape[0]


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
        max_tokens: the most tokens of any rank, the same on all ranks; None for what `prepare` was given. Where nothing was prepared, None
            is an error, but on CPUs, where it is the tokens of this rank, as many as all others must have.
        the others: as the op's.
    """
    name, ranks = group_name(group)
    form = {
        "group": name,
        "ranks": ranks,
        "experts": experts,
        "max_tokens": most_tokens(name, ranks, x) if max_tokens is None else max_tokens,
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

    The ranks compare what they were given. Where a transport keeps no buffers (CPU, NCCL, Ascend) this also makes the communicator. What
    is given here is also what dispatch takes for a `max_tokens` that is left out.

    Args:
        max_tokens: the most tokens of any rank: what will be given to dispatch.
        hidden, top_k: H and K.
        device: of the tensors.
        dtype: of the rows and of the experts' results.
        quant: as the dispatch's.
        timeout: seconds that a rank waits for another before it gives up, which the next call on the host then raises.

    Raises:
        CollectiveError: the ranks were given other sizes, or one is not there in time.
    """
    name, ranks = group_name(group)
    where = torch.empty(0, device=device).device
    members = resolve(name, ranks)
    if ranks > 1:
        formats = ["none", *quantized.FORMATS].index(quant)
        sizes = [max_tokens, hidden, top_k, dtype.itemsize, formats]
        agree(members, "max_tokens, hidden, top_k, bytes of an element, format", sizes, timeout)
    _PREPARED[name], _PREPARED_GROUPS[name] = max_tokens, members.process_group
    if where.type == "npu":
        from . import ascend

        ascend.communicator(members.process_group, members.rank)
        return
    transport = transport_of(members, where)
    transport.timeout = timeout
    transport.prepare(max_tokens, hidden, top_k, dtype, quant)


def check(group: Any = None, device: torch.device | str = "cuda") -> None:
    """Raise CollectiveError if a wait of an earlier collective of the group on a device ran out, naming the rank that was late.

    Waits for nothing: it says what the device has found so far. Calls of dispatch and combine ask this themselves; replays of a captured
    graph run no code of theirs, so that after one this is to be asked.
    """
    name, ranks = group_name(group)
    transport_of(resolve(name, ranks), torch.empty(0, device=device).device).check()
