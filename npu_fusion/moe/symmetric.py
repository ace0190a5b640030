"""Rows put straight into the memory of the other GPUs of a host, by `kernels/moe_put.py` over torch's symmetric memory.

Only rows that are needed travel, nothing is asked of the host, and no launch depends on a value: all of it can be captured and replayed. A
buffer is of one size of rows; it is made at the first call of that size, upon which all ranks must call, or by `prepare`, as a capture
needs it. All calls on a device go to one stream at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import triton.language as tl
from torch import Tensor

from ..errors import CollectiveError
from ..kernels import moe_put
from ..kernels.launch import Device, Launch
from . import plan, quantized
from .transport import AllToAll, Group, Handle, Transport, agree

_ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_ALIGNMENT = 16


@dataclass
class Channel:
    """A symmetric buffer for rows of one size, and what its kernels count in.

    Attributes:
        row_bytes, max_tokens: the size of a row; M.
        flags: the byte where the flags begin.
        peers: [R] int64, the buffer's address on each rank.
        state: [2] int32, see `kernels/moe_put.py`.
        came: [R + 1] int32: rows that came from each rank, and the half that they are in.
        buffer, memory: what keeps the buffer alive.
    """

    row_bytes: int
    max_tokens: int
    flags: int
    peers: Tensor
    state: Tensor
    came: Tensor
    buffer: Tensor
    memory: Any

    @staticmethod
    def make(group: Group, device: torch.device, row_bytes: int, max_tokens: int) -> Channel:
        """Allocate one; all ranks call."""
        from torch.distributed import _symmetric_memory as symmetric

        flags = 2 * group.ranks * max_tokens * row_bytes
        buffer = symmetric.empty(flags + 2 * group.ranks * 8, dtype=torch.uint8, device=device)
        memory = symmetric.rendezvous(buffer, group.process_group)
        buffer.zero_()
        peers = torch.tensor([int(pointer) for pointer in memory.buffer_ptrs], dtype=torch.int64, device=device)
        state = torch.zeros(2, dtype=torch.int32, device=device)
        came = torch.zeros(group.ranks + 1, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # all flags are 0 before any peer raises one
        dist.barrier(group=group.process_group)
        return Channel(row_bytes, max_tokens, flags, peers, state, came, buffer, memory)


class Puts(Transport):
    """The transport of a group whose GPUs can all write each other's memory."""

    def __init__(self, group: Group, device: torch.device) -> None:
        super().__init__(group)
        self.device = device
        self._status = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._broken = torch.zeros(1, dtype=torch.int32, device=device)
        self._channels: dict[tuple[str, int, int], Channel] = {}
        self._fallback = AllToAll(group)
        cores = torch.cuda.get_device_properties(device).multi_processor_count
        self._planned_for = Device("cuda", cores, cores)

    # ---------------------------------------------------------------- buffers

    def prepare(self, max_tokens: int, hidden: int, top_k: int, dtype: torch.dtype, quant: str) -> None:
        """Make the buffers of a dispatch and its combine; see `npu_fusion.moe.prepare`."""
        self._fallback.timeout = self.timeout
        self._fallback.prepare(max_tokens, hidden, top_k, dtype, quant)
        sent = dtype if quant == "none" else quantized.FORMATS[quant][0]
        if self._fits(hidden * sent.itemsize):
            self._channel("dispatch", hidden * sent.itemsize + 4 * moe_put.meta_words(top_k), max_tokens)
        if self._fits(hidden * dtype.itemsize):
            self._channel("combine", hidden * dtype.itemsize, max_tokens)

    @staticmethod
    def _fits(row_bytes: int) -> bool:
        return row_bytes % _ALIGNMENT == 0

    def _channel(self, use: str, row_bytes: int, max_tokens: int) -> Channel:
        self.check()
        key = (use, row_bytes, max_tokens)
        if key not in self._channels:
            if torch.cuda.is_current_stream_capturing():
                raise CollectiveError(
                    f"a graph capture meets a MoE {use} of {row_bytes} bytes a row and max_tokens={max_tokens}, without a buffer: "
                    "call npu_fusion.moe.prepare(max_tokens=..., hidden=..., top_k=..., dtype=..., quant=...) on all ranks before"
                )
            agree(self.group, f"MoE {use}: bytes a row, max_tokens", [row_bytes, max_tokens], self.timeout)
            self._channels[key] = Channel.make(self.group, self.device, row_bytes, max_tokens)
        return self._channels[key]

    def check(self) -> None:
        """Raise if a peer was late, as far as the device has found; waits for nothing."""
        late = int(self._status[0])
        if late:
            raise CollectiveError(
                f"rank {self.group.global_rank(late - 1)} did not take part in a MoE collective of group {self.group.name!r} within "
                f"{self.timeout:g} s (seen by rank {self.group.global_rank(self.group.rank)}); results since then are NaN or absent, "
                "and the group has to be made anew"
            )

    @property
    def _limit(self) -> int:
        return int(self.timeout * 1e9)

    def _launch(self, planned: Launch, **arguments: Any) -> None:
        if planned.grid > 0:
            with torch.cuda.device(self.device):
                planned.kernel[(planned.grid,)](**arguments, **planned.constants, **planned.options)

    def _waiting(self, channel: Channel) -> dict[str, Any]:
        return {
            "peers_ptr": channel.peers,
            "state_ptr": channel.state,
            "broken_ptr": self._broken,
            "status_ptr": self._status,
            "max_tokens": channel.max_tokens,
            "me": self.group.rank,
            "limit": self._limit,
        }

    # -------------------------------------------------------------- movements

    def _put(self, channel: Channel, payload: Tensor, route: Tensor, meta: int, **parts: Tensor | None) -> None:
        """Put rows by their route; `parts` are ids, weights and scales where they go along."""
        words = payload.shape[1] * payload.element_size() // 4
        self._launch(
            moe_put.put_launch(route.shape[0], route.shape[1], self.group.ranks, words, meta),
            payload_ptr=payload.view(torch.int32), route_ptr=route, peers_ptr=channel.peers, state_ptr=channel.state,
            max_tokens=channel.max_tokens, me=self.group.rank, **parts,
        )  # fmt: skip

    def dispatch(
        self, payload: Tensor, scales: Tensor | None, slots: Tensor, weights: Tensor, experts: int, max_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row_bytes = payload.shape[1] * payload.element_size()
        if not self._fits(row_bytes):
            return self._fallback.dispatch(payload, scales, slots, weights, experts, max_tokens)
        (tokens, top_k), ranks, local = slots.shape, self.group.ranks, experts // self.group.ranks
        meta, words, received = moe_put.meta_words(top_k), row_bytes // 4, ranks * max_tokens
        channel = self._channel("dispatch", row_bytes + 4 * meta, max_tokens)
        rows = plan.expanded_rows(ranks, max_tokens, top_k, local)
        new = payload.new_empty
        handle = new(Handle.size(tokens, top_k, received), dtype=torch.int32)
        known = Handle.unpacked(handle, tokens, top_k, received)
        counts, sent = new(local, dtype=torch.int64), new(ranks, dtype=torch.int32)
        ids, came_scales, source = (
            new((received, top_k), dtype=torch.int32),
            new(received, dtype=torch.float32),
            new(rows, dtype=torch.int32),
        )
        out, out_scales = new((rows, payload.shape[1])), new(rows, dtype=torch.float32)
        self._launch(
            moe_put.route_launch(tokens, experts, local, top_k),
            ids_ptr=slots, route_ptr=known.route, counts_ptr=sent, tokens=tokens, max_tokens=max_tokens,
        )  # fmt: skip
        self._put(channel, payload, known.route, meta, ids_ptr=slots, weights_ptr=weights, scales_ptr=scales)
        self._launch(
            moe_put.arrive_launch(ranks, max_tokens, top_k, words, meta, channel.flags),
            counts_ptr=sent, ids_ptr=ids, weights_ptr=known.weights, scales_ptr=came_scales, came_ptr=channel.came,
            **self._waiting(channel),
        )  # fmt: skip
        self._launch(
            moe_put.place_launch(received * top_k, local, top_k),
            ids_ptr=ids, place_ptr=known.place, source_ptr=source, counts_ptr=counts, choices=received * top_k, rows=rows,
            first=self.group.rank * local,
        )  # fmt: skip
        self._launch(
            moe_put.take_launch(rows, local, ranks, words, meta),
            out_ptr=out.view(torch.int32), out_scales_ptr=out_scales, source_ptr=source, counts_ptr=counts, scales_ptr=came_scales,
            came_ptr=channel.came, peers_ptr=channel.peers, max_tokens=max_tokens, me=self.group.rank,
        )  # fmt: skip
        return out, out_scales, counts, handle

    def send(self, payload: Tensor, meta: Tensor, route: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
        return self.send_rows(payload, route, max_tokens), self._fallback.send(meta, meta, route, max_tokens)[1]

    def send_rows(self, payload: Tensor, route: Tensor, max_tokens: int) -> Tensor:
        row_bytes = payload.shape[1] * payload.element_size()
        if not self._fits(row_bytes):
            return self._fallback.send_rows(payload, route, max_tokens)
        ranks, words = self.group.ranks, row_bytes // 4
        channel = self._channel("send", row_bytes, max_tokens)
        target = torch.where(route >= 0, route // max_tokens, ranks).flatten().to(torch.int64)
        ones = torch.ones_like(target, dtype=torch.int32)
        counts = ones.new_zeros(ranks + 1).scatter_add(0, target, ones)
        out = payload.new_empty((ranks * max_tokens, payload.shape[1]))
        self._put(channel, payload, route, 0, ids_ptr=None, weights_ptr=None, scales_ptr=None)
        self._launch(
            moe_put.arrive_launch(ranks, 1, route.shape[1], words, 0, channel.flags),
            counts_ptr=counts, ids_ptr=None, weights_ptr=None, scales_ptr=None, came_ptr=channel.came, **self._waiting(channel),
        )  # fmt: skip
        self._launch(
            moe_put.take_launch(out.shape[0], 1, ranks, words, 0),
            out_ptr=out.view(torch.int32), out_scales_ptr=None, source_ptr=None, counts_ptr=None, scales_ptr=None,
            came_ptr=channel.came, peers_ptr=channel.peers, max_tokens=max_tokens, me=self.group.rank,
        )  # fmt: skip
        return out

    def combine(self, x: Tensor, known: Handle, max_tokens: int) -> Tensor:
        if not self._can_sum(x):
            return super().combine(x, known, max_tokens)
        return self._home(x, known.place, known.weights, known.route, max_tokens, x.dtype)

    def give_back(self, rows: Tensor, route: Tensor, max_tokens: int) -> Tensor:
        if not self._can_sum(rows):
            return self._fallback.give_back(rows, route, max_tokens)
        return self._home(rows, None, None, route, max_tokens, torch.float32)

    def _can_sum(self, x: Tensor) -> bool:
        return x.dtype in _ELEMENTS and self._fits(x.shape[1] * x.element_size())

    def _home(self, x: Tensor, place: Tensor | None, weights: Tensor | None, route: Tensor, max_tokens: int, dtype: torch.dtype) -> Tensor:
        """Put rows (or weighted sums of them) home, and add them up: [T, W] in `dtype`."""
        ranks, (tokens, top_k), width = self.group.ranks, route.shape, x.shape[1]
        channel = self._channel("combine", width * x.element_size(), max_tokens)
        y = x.new_empty((tokens, width), dtype=dtype)
        self._launch(
            moe_put.reduce_put_launch(ranks * max_tokens, top_k, ranks, width, self._planned_for),
            x_ptr=x, place_ptr=place, weights_ptr=weights, peers_ptr=channel.peers, state_ptr=channel.state, rows=x.shape[0],
            max_tokens=max_tokens, me=self.group.rank,
        )  # fmt: skip
        self._launch(
            moe_put.sum_home_launch(tokens, top_k, ranks, width, channel.flags, _ELEMENTS[x.dtype], self._planned_for),
            y_ptr=y, route_ptr=route, tokens=tokens, **self._waiting(channel),
        )  # fmt: skip
        return y


def make(group: Group, device: torch.device) -> Puts | None:
    """The transport of a group, or None where its GPUs cannot all reach each other; every rank finds the same."""
    ok = torch.ones(1, device=device)
    try:
        transport = Puts(group, device)
        transport._channel("combine", _ALIGNMENT, 1)
    except CollectiveError:  # a rank is not there
        raise
    except (RuntimeError, ImportError):  # no peer access, several hosts, a torch without symmetric memory
        ok.zero_()
    dist.all_reduce(ok, op=dist.ReduceOp.MIN, group=group.process_group)
    return transport if bool(ok.item()) else None
