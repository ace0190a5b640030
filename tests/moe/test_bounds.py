"""Ranks that disagree, come late or end: an error in bounded time that names the rank, never a hang or another rank's rows."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode

from npu_fusion import moe
from npu_fusion.moe import api, transport

from .ranks import Ranks
from .test_collectives import EXPERTS, HIDDEN, TOP_K, expected, inputs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("moe")]


def failure(group: object, max_tokens: int | None = 8) -> tuple[str, float]:
    """What a dispatch raises, and after how many seconds."""
    start = time.monotonic()
    with pytest.raises(moe.CollectiveError) as caught:
        moe.dispatch(*inputs(), EXPERTS, group=group, max_tokens=max_tokens)
    return str(caught.value), time.monotonic() - start


def unequal_preparations() -> str:
    with pytest.raises(moe.CollectiveError) as caught:
        moe.prepare(max_tokens=8 + dist.get_rank(), hidden=HIDDEN, top_k=TOP_K, device="cpu", group=dist.new_group([0, 1]))
    return str(caught.value)


def prepared() -> None:
    """Unequal tokens, and max_tokens from the preparation, also of one after the compilation."""
    group = dist.new_group([0, 1])
    name, first = str(group.group_name), dist.get_rank() * EXPERTS // 2

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sent = moe.dispatch(x, ids, weights, EXPERTS, group=name)
        slot = torch.searchsorted(sent.counts.cumsum(0), torch.arange(len(sent.rows)), right=True) + first
        return moe.combine(sent.rows * (slot + 1)[:, None], sent)

    x, ids, weights = inputs("absent")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for most in (9, 11):
        moe.prepare(max_tokens=most, hidden=HIDDEN, top_k=TOP_K, device="cpu", group=group, dtype=torch.float32)
        assert moe.dispatch(x, ids, weights, EXPERTS, group=group).form["max_tokens"] == most
        for function in (layer, compiled):
            torch.testing.assert_close(function(x, ids, weights), expected(x, ids, weights))


def compared_once(different: bool) -> str:
    """What NCCL's and HCCL's exchanges do before the first of a size."""
    group = dist.new_group([0, 1])
    exchange = transport.AllToAll(transport.resolve(str(group.group_name), 2))
    exchange.timeout = 5.0
    rows = torch.empty(2 * (4 + dist.get_rank() * different), 1)
    try:
        exchange._agree(rows)
    except moe.CollectiveError as error:
        return str(error)
    if dist.get_rank() == 0:
        exchange._agree(rows)  # known by now: nobody is asked
    return ""


def late() -> list[tuple[str, float]]:
    group = dist.new_group([0, 1])
    moe.prepare(max_tokens=8, hidden=HIDDEN, top_k=TOP_K, device="cpu", group=group, timeout=0.5)
    if dist.get_rank() == 1:
        time.sleep(1.0)
    failures = [failure(group), failure(group)]
    with pytest.raises(moe.CollectiveError):
        moe.check(group, "cpu")
    return failures


def absent_from_preparation() -> str | None:
    group = dist.new_group([0, 1])
    if dist.get_rank() == 1:
        return None
    with pytest.raises(moe.CollectiveError) as caught:
        moe.prepare(max_tokens=8, hidden=HIDDEN, top_k=TOP_K, device="cpu", group=group, timeout=0.2)
    return str(caught.value)


def ends(rank: int) -> list[tuple[str, float]]:
    moe.prepare(max_tokens=8, hidden=HIDDEN, top_k=TOP_K, device="cpu", timeout=20)
    moe.dispatch(*inputs(), 9, max_tokens=8)
    if dist.get_rank() == rank:
        os._exit(1)
    failures = []
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(moe.CollectiveError) as caught:
            moe.dispatch(*inputs(), 9, max_tokens=8)
        failures.append((str(caught.value), time.monotonic() - start))
    return failures


def test_unequal_preparations_are_an_error_with_the_ranks(two: Ranks) -> None:
    assert all("max_tokens" in message and "rank 0" in message and "rank 1" in message for message in two.run(unequal_preparations))


def test_max_tokens_left_out_is_what_was_prepared(two: Ranks) -> None:
    two.run(prepared)


def test_max_tokens_left_out_is_an_error_where_nothing_compares_it() -> None:
    with FakeTensorMode():
        x = torch.empty(3, 4, device="cuda")
    with pytest.raises(moe.CollectiveError, match=r"on cuda, max_tokens must be given, or npu_fusion.moe.prepare"):
        api.most_tokens("not a group", 2, x)
    assert api.most_tokens("not a group", 1, x) == 3
    compiled = torch.compile(lambda: api._unknown("cuda"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="on cuda, max_tokens must be given"):
        compiled()


def test_sizes_are_compared_at_their_first_use(two: Ranks) -> None:
    assert all("max_tokens: 4" in message and "max_tokens: 5" in message for message in two.run(compared_once, True))
    assert two.run(compared_once, False) == ["", ""]


def test_a_late_rank_is_named(two: Ranks) -> None:
    for rank, failures in enumerate(two.run(late)):
        for (message, seconds), most in zip(failures, (2.5, 0.2), strict=True):
            assert f"rank {1 - rank} did not take part" in message
            assert seconds < most, "the second call does not wait again"


def test_a_rank_that_does_not_prepare_is_named(two: Ranks) -> None:
    message, _ = two.run(absent_from_preparation)
    assert "rank 1 did not take part" in message


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_ended_is_named(rank: int) -> None:
    ranks = Ranks(3)
    try:
        answers = ranks.run(ends, rank, ending=rank, timeout=30)
    finally:
        ranks.close()
    for failures in (failures for at, failures in enumerate(answers) if at != rank):
        for message, seconds in failures:
            assert f"rank {rank} did not take part" in message
            assert seconds < 5, "nobody waits for the timeout"


def test_the_status_word_of_puts_is_raised_by_the_next_call() -> None:
    from npu_fusion.moe.symmetric import Puts

    puts = object.__new__(Puts)
    puts.group, puts.timeout, puts._channels = transport.Group("puts", None, 0, 4), 3.0, {}
    puts.group.__dict__["global_rank"] = lambda rank: 10 + rank
    puts._status = torch.zeros(1, dtype=torch.int32)
    puts.check()
    puts._status[0] = 3  # rank 2, plus 1
    for call in (puts.check, lambda: puts._channel("dispatch", 64, 8)):
        with pytest.raises(moe.CollectiveError, match=r"rank 12 did not take part .* within 3 s .*seen by rank 10"):
            call()
