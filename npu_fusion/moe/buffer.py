"""`Buffer`: DeepEP's interface over our collectives, so that callers of DeepEP and of DeepEP-Ascend can switch.

What is kept: names, order of arguments, shapes and meaning of what is returned. What is different, as it is on Ascend: nothing runs on
a stream of its own, so that events are empty and hooks do nothing; there is one kind of memory, so that byte sizes and configurations are
taken and not used; and nothing waits for the host unless `dispatch` has to return lists and exact sizes (`num_worst_tokens=0`).

Source: DeepEP V1, https://github.com/deepseek-ai/DeepEP; sgl-kernel-npu's deep_ep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CollectiveError
from . import plan, quantized
from .api import group_name, prepare
from .transport import Handle, resolve, transport_of

Rows = Tensor | tuple[Tensor, Tensor]


class EventOverlap:
    """Where DeepEP has an event of its communication stream: here all runs on the caller's, and there is nothing to wait for."""

    def current_stream_wait(self) -> None:
        """Wait for nothing."""

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class DispatchHandle(NamedTuple):
    """What `combine`, and a dispatch along the same way, need.

    Attributes:
        route: [T, K] int32, of `plan.route`.
        rows: [N] int64: where in the [R * M] received rows the N returned ones lie; None where all are returned.
        max_tokens: M.
    """

    route: Tensor
    rows: Tensor | None
    max_tokens: int


class LowLatencyHandle(NamedTuple):
    """What `low_latency_combine` needs. `weighted` says whether the weights travelled with the dispatch."""

    known: Handle
    max_tokens: int
    hidden: int
    experts: int
    weighted: bool


class Buffer:
    """DeepEP's Buffer.

    Args:
        group: a process group.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode, num_qps_per_rank, and what else DeepEP takes: not used.
    """

    num_sms = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 12,
        **_: Any,
    ) -> None:
        self.group = group
        self.name, self.group_size = group_name(group)
        self._members = resolve(self.name, self.group_size)
        self.rank = self._members.rank
        self.low_latency_mode = low_latency_mode

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Taken, not used."""
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int) -> int:
        """Bytes of the two symmetric buffers that low-latency calls of this size (bf16, top-16) use."""
        rows = 2 * num_ranks * num_max_dispatch_tokens_per_rank
        return rows * (2 * hidden * 2 + 144)

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap()

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing is to be cleaned: a call's flags are its number."""

    def prepare(self, num_max_tokens_per_rank: int, hidden: int, top_k: int, device: torch.device | str, **kwargs: Any) -> None:
        """`npu_fusion.moe.prepare` for this group; to be called on all ranks before a capture."""
        prepare(max_tokens=num_max_tokens_per_rank, hidden=hidden, top_k=top_k, device=device, group=self.group, **kwargs)

    # ------------------------------------------------------------ normal mode

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        """Tokens to each rank [R] and to each expert [E], both int32, and which token goes to which rank, [T, R] bool."""
        slots = plan.physical_experts(topk_idx, num_experts, None, None, self.rank)
        spill = torch.where(slots >= 0, slots, num_experts)
        ones = torch.ones_like(spill, dtype=torch.int32)
        per_expert = ones.new_zeros(num_experts + 1).scatter_add(0, spill.flatten(), ones.flatten())[:num_experts]
        rank = spill // (num_experts // self.group_size)
        in_rank = torch.zeros((len(slots), self.group_size + 1), dtype=torch.bool, device=slots.device).scatter(1, rank, True)
        in_rank = in_rank[:, : self.group_size]
        return in_rank.sum(0, dtype=torch.int32), None, per_expert, in_rank, EventOverlap()

    def dispatch(
        self,
        x: Rows,
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        **_: Any,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int], DispatchHandle, EventOverlap]:
        """Send tokens to the ranks of their experts, each once a rank.

        Args:
            x: [T, H], or (x, scales [T, S]) for rows that the caller quantised.
            handle: of an earlier dispatch, to send other rows the same way; the layout is then not needed.
            topk_idx: [T, K] int64. topk_weights: [T, K] fp32.
            num_tokens_per_expert: [E], which says how many experts there are.
            expert_alignment: the returned counts are rounded up to multiples of it.
            num_worst_tokens: 0 to get exactly the rows that came, which waits for the device; otherwise R * max tokens, the same on
                all ranks: all rows of the receive buffer are returned, unused ones with topk_idx -1, and the list is empty.

        Returns:
            recv_x (with scales where x had them), recv_topk_idx [N, K] int64 (local experts, -1 for others), recv_topk_weights [N, K], the
            number of rows of each local expert, the handle, an event.
        """
        payload, scales = x if isinstance(x, tuple) else (x, None)
        transport = transport_of(self._members, payload.device)
        if handle is not None:
            parts = [part if part is None else self._again(part, handle) for part in (payload, scales)]
            return self._joined(parts), None, None, [], handle, EventOverlap()
        if topk_idx is None or topk_weights is None or num_tokens_per_expert is None:
            raise CollectiveError("Buffer.dispatch needs topk_idx, topk_weights and num_tokens_per_expert, or a handle")
        experts = num_tokens_per_expert.shape[0]
        local = experts // self.group_size
        most = num_worst_tokens // self.group_size if num_worst_tokens else self._most(payload)
        slots = plan.physical_experts(topk_idx, experts, None, None, self.rank)
        route = plan.route(slots, self.group_size, local, most)
        meta = torch.cat([slots.to(torch.int32), topk_weights.float().contiguous().view(torch.int32)], dim=1)
        rows, got = transport.send(payload.contiguous(), meta, route, most)
        ids = plan.local_choices(got[:, : slots.shape[1]], self.rank, local)
        weights = torch.where(ids >= 0, got[:, slots.shape[1] :].contiguous().view(torch.float32), 0.0)
        got_scales = None if scales is None else transport.send_rows(scales.contiguous(), route, most)
        if num_worst_tokens:
            made = DispatchHandle(route, None, most)
            return self._joined([rows, got_scales]), ids.to(torch.int64), weights, [], made, EventOverlap()
        kept = (ids >= 0).any(dim=1).nonzero().flatten()
        ids = ids[kept].to(torch.int64)
        counts = torch.bincount(ids[ids >= 0], minlength=local).tolist()
        aligned = [-(-count // expert_alignment) * expert_alignment for count in counts]
        parts = [part if part is None else part[kept] for part in (rows, got_scales)]
        return self._joined(parts), ids, weights[kept], aligned, DispatchHandle(route, kept, most), EventOverlap()

    def combine(
        self,
        x: Tensor,
        handle: DispatchHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, ...] | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Send rows [N, H] home and add up those of each token (not weighted, as in DeepEP): [T, H].

        `topk_weights` [N, K] go home as well, added up; `bias`, one or two [T, H], is added.
        """
        transport = transport_of(self._members, x.device)
        total = transport.give_back(self._spread(x, handle), handle.route, handle.max_tokens)
        for term in bias if isinstance(bias, tuple) else () if bias is None else (bias,):
            total = total + term
        weights = None
        if topk_weights is not None:
            weights = transport.give_back(self._spread(topk_weights.float(), handle), handle.route, handle.max_tokens)
        return total.to(x.dtype), weights, EventOverlap()

    def _most(self, x: Tensor) -> int:
        """The most tokens of any rank, at least 1; asks all ranks."""
        most = torch.tensor([max(x.shape[0], 1)], device=x.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._members.process_group)
        return int(most.item())

    def _again(self, x: Tensor, handle: DispatchHandle) -> Tensor:
        rows = transport_of(self._members, x.device).send_rows(x.contiguous(), handle.route, handle.max_tokens)
        return rows if handle.rows is None else rows[handle.rows]

    def _spread(self, x: Tensor, handle: DispatchHandle) -> Tensor:
        """Returned rows [N, W] where they lie among all R * M."""
        if handle.rows is None:
            return x.contiguous()
        return x.new_zeros((self.group_size * handle.max_tokens, x.shape[1])).index_copy(0, handle.rows, x)

    @staticmethod
    def _joined(parts: Sequence[Tensor | None]) -> Rows:
        rows, scales = parts
        if rows is None:
            raise CollectiveError("Buffer.dispatch got no rows")
        return rows if scales is None else (rows, scales)

    # ------------------------------------------------------------ low latency

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        use_fp8: bool = True,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        topk_weights: Tensor | None = None,
        quant_mode: str | None = None,
        **_: Any,
    ) -> tuple[Rows, Tensor, LowLatencyHandle, EventOverlap, Callable[[], None]]:
        """Send tokens to their experts; everything is of static size, and can be captured once `prepare` was called.

        Args:
            x: [T, H] bf16, T at most `num_max_dispatch_tokens_per_rank`.
            topk_idx: [T, K], -1 for none.
            use_fp8: quantise. As on Ascend, what comes is 8 bits an element with one fp32 scale a row: fp8 (e4m3) on CUDA, else int8.
            topk_weights: [T, K]; given here, they need not travel by themselves when the results come home.
            quant_mode: `int8` or `fp8`, in place of the device's own.

        Returns:
            rows [A, H] in the order of the local experts (flat, as on Ascend; with scales [A] where quantised), the number of rows of each
            local expert, int64, the handle, an event, a hook that does nothing.
        """
        quant = "none" if not use_fp8 else quant_mode or ("fp8" if x.device.type == "cuda" else "int8")
        sent, scales = quantized.quantize_rows(x.contiguous(), quant)
        weights = torch.ones_like(topk_idx, dtype=torch.float32) if topk_weights is None else topk_weights.float()
        most, transport = num_max_dispatch_tokens_per_rank, transport_of(self._members, x.device)
        rows, got_scales, counts, handle = transport.dispatch(sent, scales, topk_idx.contiguous(), weights.contiguous(), num_experts, most)
        if cumulative_local_expert_recv_stats is not None:
            cumulative_local_expert_recv_stats += counts.to(cumulative_local_expert_recv_stats.dtype)
        known = Handle.unpacked(handle, topk_idx.shape[0], topk_idx.shape[1], self.group_size * most)
        made = LowLatencyHandle(known, most, x.shape[1], num_experts, topk_weights is not None)
        return (rows if quant == "none" else (rows, got_scales)), counts, made, EventOverlap(), _no_hook

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: LowLatencyHandle, out: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, EventOverlap, Callable[[], None]]:
        """Send the results [A, H] home, weighted by `topk_weights` [T, K] and added up: [T, H], also in `out` where given."""
        transport, known = transport_of(self._members, x.device), handle.known
        if not handle.weighted:
            sent = transport.send_rows(topk_weights.float().contiguous(), known.route, handle.max_tokens)
            known = known._replace(weights=sent)
        y = transport.combine(x.contiguous(), known, handle.max_tokens).to(x.dtype)
        return (y if out is None else out.copy_(y)), EventOverlap(), _no_hook


def _no_hook() -> None:
    """What came is there already."""
