"""How rows get from rank to rank: what a transport does, which one a device has, and the one over all_to_all of equal blocks.

A transport moves rows by a route (see `plan`): `send` to the ranks, `give_back` home again. Which one serves a call follows from the
device of its tensors: `register_transport` is how the others (symmetric memory on CUDA) are found.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import torch_private
from ..errors import CollectiveError
from . import plan


@dataclass(frozen=True)
class Group:
    """A process group as the collectives see it."""

    name: str
    process_group: Any
    rank: int
    ranks: int

    def global_rank(self, rank: int) -> int:
        """The rank in the default group of a rank of this one."""
        return int(dist.get_global_rank(self.process_group, rank))


def resolve(name: str, ranks: int | None) -> Group:
    """The group of a name, of so many ranks (None: of any number).

    Raises:
        CollectiveError: there is no such group, or it has another number of ranks.
    """
    try:
        group = torch_private.process_group(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CollectiveError(f"there is no process group {name!r} in this process: {error}") from error
    found = Group(name, group, dist.get_rank(group), dist.get_world_size(group))
    if ranks is not None and found.ranks != ranks:
        raise CollectiveError(f"process group {name!r} has {found.ranks} ranks, not {ranks}")
    return found


_AGREEMENTS: dict[str, tuple[Any, int]] = {}
"""Of each group by name, the process group and how often its ranks compared numbers."""


def agree(group: Group, what: str, mine: Sequence[int], timeout: float) -> None:
    """Raise unless all ranks say the same numbers. Takes place on the host, through the group's store; all ranks must call it.

    Args:
        what: the names of the numbers, for the message.
        mine: this rank's numbers.
        timeout: seconds to wait for the other ranks.

    Raises:
        CollectiveError: a rank says other numbers, or does not call in time.
    """
    known, count = _AGREEMENTS.get(group.name, (None, 0))
    count = count + 1 if known is group.process_group else 1
    _AGREEMENTS[group.name] = (group.process_group, count)
    store = torch_private.group_store(group.process_group)
    text = f"{what}: {', '.join(map(str, mine))}"
    store.set(f"npu_fusion.moe/{count}/{group.rank}", text)
    for rank in range(group.ranks):
        key = f"npu_fusion.moe/{count}/{rank}"
        try:
            store.wait([key], timedelta(seconds=timeout))
            theirs = store.get(key).decode()
        except RuntimeError as error:
            raise late(group, rank, timeout) from error
        if theirs != text:
            raise CollectiveError(
                f"rank {group.global_rank(rank)} has {theirs}; rank {group.global_rank(group.rank)} has {text}: these must be the same on "
                f"all ranks of group {group.name!r}"
            )


def late(group: Group, rank: int, timeout: float) -> CollectiveError:
    """The error of a wait for a rank of the group that ran out, or whose connection broke."""
    return CollectiveError(
        f"rank {group.global_rank(rank)} did not take part in a MoE collective of group {group.name!r} within {timeout:g} s, or ended "
        f"(seen by rank {group.global_rank(group.rank)}); the group has to be made anew"
    )


class Handle(NamedTuple):
    """What a combine has to know of its dispatch, and how the two ops keep it in one int32 tensor.

    Attributes:
        route: [T, K], of `plan.route`.
        place: [R * M, K], of `plan.expand`.
        weights: [R * M, K] fp32: the weights of received rows.
    """

    route: Tensor
    place: Tensor
    weights: Tensor

    def packed(self) -> Tensor:
        return torch.cat([self.route.flatten(), self.place.flatten(), self.weights.view(torch.int32).flatten()])

    @staticmethod
    def size(tokens: Any, top_k: Any, received: Any) -> Any:
        return tokens * top_k + 2 * received * top_k

    @staticmethod
    def unpacked(handle: Tensor, tokens: int, top_k: int, received: int) -> Handle:
        """Views of the parts of a packed handle."""
        route, place, weights = handle.split([tokens * top_k, received * top_k, received * top_k])
        rows = (received, top_k)
        return Handle(route.view(tokens, top_k), place.view(rows), weights.view(torch.float32).view(rows))


class Transport(abc.ABC):
    """Moves rows between the ranks of a group. Every rank calls the same methods in the same order with the same `max_tokens`."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.timeout = TIMEOUT

    def prepare(self, max_tokens: int, hidden: int, top_k: int, dtype: torch.dtype, quant: str) -> None:  # noqa: B027
        """Make what dispatch and combine of a size need; see `npu_fusion.moe.prepare`, which has compared the sizes of the ranks."""

    def check(self) -> None:  # noqa: B027
        """Raise CollectiveError if a peer was late in an earlier call, as far as is known; waits for nothing."""

    @abc.abstractmethod
    def send(self, payload: Tensor, meta: Tensor, route: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
        """Send rows out.

        Args:
            payload: [T, W], any dtype.
            meta: [T, C] int32, C > 0: what goes with each row.
            route: [T, K] int32, of `plan.route`.

        Returns:
            [R * M, W] and [R * M, C]: rows of rank r at `r * M`. A row that no token came to is 0, and its meta is -1.
        """

    @abc.abstractmethod
    def give_back(self, rows: Tensor, route: Tensor, max_tokens: int) -> Tensor:
        """Send [R * M, W] rows back to where `send` brought them from, and add up those of each token: [T, W] in fp32 (fp64 for fp64)."""

    def send_rows(self, payload: Tensor, route: Tensor, max_tokens: int) -> Tensor:
        """`send` of rows alone."""
        marks = torch.zeros((payload.shape[0], 1), dtype=torch.int32, device=payload.device)
        return self.send(payload, marks, route, max_tokens)[0]

    def dispatch(
        self, payload: Tensor, scales: Tensor | None, slots: Tensor, weights: Tensor, experts: int, max_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `moe_dispatch` returns.

        Args:
            payload: [T, H], as rows travel.
            scales: [T, 1] fp32, or None for ones.
            slots: [T, K] expert slots; outside [0, experts) for none.
            weights: [T, K] floating point.
        """
        ranks, top_k, local = self.group.ranks, slots.shape[1], experts // self.group.ranks
        slots = plan.physical_experts(slots, experts, None, None, self.group.rank)
        route = plan.route(slots, ranks, local, max_tokens)
        scales = torch.ones_like(weights[:, :1], dtype=torch.float32) if scales is None else scales
        meta = torch.cat([part.contiguous().view(torch.int32) for part in (slots.to(torch.int32), weights.float(), scales)], dim=1)
        rows, got = self.send(payload, meta, route, max_tokens)
        choices = plan.local_choices(got[:, :top_k], self.group.rank, local)
        expansion = plan.expand(choices, local, plan.expanded_rows(ranks, max_tokens, top_k, local))
        got_weights = got[:, top_k : 2 * top_k].contiguous().view(torch.float32)
        got_scales = got[:, -1].contiguous().view(torch.float32)
        handle = Handle(route, expansion.place, torch.where(choices >= 0, got_weights, 0.0)).packed()
        return rows[expansion.source], got_scales[expansion.source], expansion.counts, handle

    def combine(self, x: Tensor, known: Handle, max_tokens: int) -> Tensor:
        """What `moe_combine` returns, without shared experts and before the last cast."""
        partial = plan.reduce_rows(x, known.place, known.weights).to(x.dtype)
        return self.give_back(partial, known.route, max_tokens)


class AllToAll(Transport):
    """Exchange of equal blocks: `all_to_all_single` of NCCL or HCCL, static, so that it can be captured; on CPUs rank by rank over gloo."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._agreed: set[int] = set()
        self._broken: CollectiveError | None = None

    def prepare(self, max_tokens: int, hidden: int, top_k: int, dtype: torch.dtype, quant: str) -> None:
        self._agreed.add(self.group.ranks * max_tokens)

    def check(self) -> None:
        if self._broken is not None:
            raise CollectiveError(str(self._broken)) from self._broken

    def send(self, payload: Tensor, meta: Tensor, route: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
        count = self.group.ranks * max_tokens
        parts = [plan.pack(payload, route, count), plan.pack(meta, route, count, plan.NOWHERE)]
        packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        received = self._exchange(packed)
        width = parts[0].shape[1] * payload.element_size()
        return received[:, :width].contiguous().view(payload.dtype), received[:, width:].contiguous().view(meta.dtype)

    def give_back(self, rows: Tensor, route: Tensor, max_tokens: int) -> Tensor:
        return plan.reduce_rows(self._exchange(rows.contiguous()), route, None)

    def _exchange(self, buffer: Tensor) -> Tensor:
        """Block r of `buffer` [R * M, ...] to rank r."""
        if buffer.device.type == "cpu":
            return self._exchange_on_host(buffer)
        self._agree(buffer)
        received = torch.empty_like(buffer)
        dist.all_to_all_single(received, buffer, group=self.group.process_group)
        return received

    def _agree(self, buffer: Tensor) -> None:
        """Compare the number of rows at its first use: unequal blocks would hang, or mix rows up."""
        rows = buffer.shape[0]
        if rows not in self._agreed:
            max_tokens = rows // self.group.ranks
            capturing = getattr(torch.get_device_module(buffer.device), "is_current_stream_capturing", None)
            if capturing is not None and capturing():
                raise CollectiveError(
                    f"a graph capture meets a MoE collective of max_tokens={max_tokens}, which the ranks have not compared: call "
                    "npu_fusion.moe.prepare(max_tokens=..., hidden=..., top_k=..., device=...) on all ranks before"
                )
            agree(self.group, "max_tokens", [max_tokens], self.timeout)
            self._agreed.add(rows)

    def _exchange_on_host(self, buffer: Tensor) -> Tensor:
        """Over messages from rank to rank, so that it is known which rank a wait is for; first their sizes, then the rows."""
        self.check()
        mine = torch.tensor([*buffer.shape, buffer.element_size()])
        sizes = [torch.empty_like(mine) for _ in range(self.group.ranks)]
        blocks, received = list(buffer.chunk(self.group.ranks)), torch.empty_like(buffer)
        self._messages([mine] * self.group.ranks, sizes)
        for rank, theirs in enumerate(sizes):
            if not torch.equal(mine, theirs):
                raise self._unequal(rank, theirs.tolist(), mine.tolist())
        if buffer.numel():
            self._messages(blocks, list(received.chunk(self.group.ranks)))
        return received

    def _messages(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """`sent[r]` to rank r, `received[r]` from rank r."""
        group, waits = self.group, []
        received[group.rank].copy_(sent[group.rank])
        others = [rank for rank in range(group.ranks) if rank != group.rank]
        until = time.monotonic() + self.timeout
        peer = group.rank
        try:
            for post, tensors in ((dist.irecv, received), (dist.isend, sent)):
                for rank in others:
                    peer = rank
                    waits.append((rank, post(tensors[rank], group.global_rank(rank), group=group.process_group, tag=_TAG)))
            for rank, work in waits:
                peer = rank
                if work is not None and not work.wait(timedelta(seconds=max(until - time.monotonic(), 0.001))):
                    raise TimeoutError
        except (RuntimeError, TimeoutError) as error:
            self._broken = late(group, peer, self.timeout)  # messages may still be on their way: the group is of no use any more
            raise self._broken from error

    def _unequal(self, rank: int, theirs: Sequence[int], mine: Sequence[int]) -> CollectiveError:
        return CollectiveError(
            f"rank {self.group.global_rank(rank)} exchanges rows [{theirs[0]}, {theirs[1]}] of {theirs[2]} bytes an element, "
            f"rank {self.group.global_rank(self.group.rank)} rows [{mine[0]}, {mine[1]}] of {mine[2]}: max_tokens must be the "
            "same on all ranks (give it, where ranks have unequal numbers of tokens)"
        )


class Alone(Transport):
    """A group of one rank: rows stay where they are."""

    def send(self, payload: Tensor, meta: Tensor, route: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
        return plan.pack(payload, route, max_tokens), plan.pack(meta, route, max_tokens, plan.NOWHERE)

    def give_back(self, rows: Tensor, route: Tensor, max_tokens: int) -> Tensor:
        return plan.reduce_rows(rows, route, None)


TIMEOUT = 100.0
"""Seconds that a rank waits for another, until `npu_fusion.moe.prepare` says otherwise."""
_TAG = 0x6D6F65  # of our messages, apart from those of others in the same group

TransportMaker = Callable[[Group, torch.device], Transport | None]
_MAKERS: dict[str, list[TransportMaker]] = {}
_TRANSPORTS: dict[tuple[int, torch.device], tuple[Any, Transport]] = {}


def register_transport(device_type: str, make: TransportMaker) -> None:
    """Let `make` serve groups on a kind of device, before those registered earlier. It returns None on every rank, or on none."""
    _MAKERS.setdefault(device_type, []).insert(0, make)


def transport_of(group: Group, device: torch.device) -> Transport:
    """The transport of a group on a device, made at its first use, upon which all ranks must call."""
    if group.ranks == 1:
        return Alone(group)
    key = (id(group.process_group), device)
    kept = _TRANSPORTS.get(key)
    if kept is None or kept[0] is not group.process_group:
        made = (make(group, device) for make in _MAKERS.get(device.type, ()))
        transport: Transport = next((found for found in made if found is not None), AllToAll(group))
        kept = _TRANSPORTS[key] = (group.process_group, transport)
    return kept[1]


def _by_puts(group: Group, device: torch.device) -> Transport | None:
    """Symmetric memory, where there is Triton to write to it."""
    try:
        from . import symmetric
    except ImportError:
        return None
    return symmetric.make(group, device)


register_transport("cuda", _by_puts)
