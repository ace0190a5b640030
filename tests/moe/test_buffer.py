"""DeepEP's interface over two gloo processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from npu_fusion.moe import Buffer

from .ranks import Ranks
from .test_collectives import EXPERTS, HIDDEN, MOST, TOP_K, expected, inputs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("moe")]


def normal(worst: int) -> None:
    x, ids, weights = inputs("absent")
    buffer, local, rank = Buffer(dist.group.WORLD), EXPERTS // 2, dist.get_rank()
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, EXPERTS)
    assert per_rank.tolist() == in_rank.sum(0).tolist()
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    rows, got, got_weights, counts, handle, event = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, num_worst_tokens=worst, **layout)
    event.current_stream_wait()
    assert isinstance(rows, torch.Tensor)
    assert got is not None
    assert got_weights is not None
    everyone = per_expert.clone()
    dist.all_reduce(everyone)
    assert counts == ([] if worst else everyone[rank * local : (rank + 1) * local].tolist())
    assert not worst or len(rows) == worst
    factor = (torch.where(got >= 0, got + rank * local + 1, 0) * got_weights).sum(1, keepdim=True)
    y, home, _ = buffer.combine(rows * factor, handle, got_weights, bias=torch.ones_like(x))
    torch.testing.assert_close(y, expected(x, ids, weights) + 1)
    torch.testing.assert_close(home, torch.where(ids >= 0, weights, 0))
    again, *_ = buffer.dispatch(2 * x, handle=handle)
    torch.testing.assert_close(again, 2 * rows)


def low_latency(quantised: bool, weights_first: bool) -> None:
    x, ids, weights = inputs("absent")
    buffer, local = Buffer(dist.group.WORLD, low_latency_mode=True), EXPERTS // 2
    seen = torch.zeros(local, dtype=torch.int32)
    got, counts, handle, _, hook = buffer.low_latency_dispatch(
        x, ids, MOST, EXPERTS, seen, quantised, topk_weights=weights if weights_first else None
    )
    hook()
    rows = got[0].float() * got[1][:, None] if isinstance(got, tuple) else got
    assert rows.shape == (2 * MOST * TOP_K, HIDDEN)
    assert seen.tolist() == counts.tolist()
    slot = torch.searchsorted(counts.cumsum(0), torch.arange(len(rows)), right=True) + dist.get_rank() * local
    out = torch.empty_like(x)
    y, _, _ = buffer.low_latency_combine(rows * (slot + 1)[:, None], ids, weights, handle, out=out)
    torch.testing.assert_close(out, y)
    tolerance = {"atol": 0.3, "rtol": 0.05} if quantised else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(y, expected(x, ids, weights), **tolerance)


@pytest.mark.parametrize("worst", [0, 2 * MOST])
def test_normal_mode(two: Ranks, worst: int) -> None:
    two.run(normal, worst)


@pytest.mark.parametrize(("quantised", "weights_first"), [(False, True), (False, False), (True, True)])
def test_low_latency_mode(two: Ranks, quantised: bool, weights_first: bool) -> None:
    two.run(low_latency, quantised, weights_first)
