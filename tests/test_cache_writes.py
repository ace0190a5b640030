"""Writes of rows and their providers: what is one, which two belong together, and what happens when a provider refuses or raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from npu_fusion import FusionConfig, GraphRecord
from npu_fusion import cache_writes as module
from npu_fusion.cache_writes import RowWrite, WriteProvider, lower_writes, row_write
from npu_fusion.lower import Builder
from npu_fusion.record import Site
from tests.graphs import aten_graph

aten = torch.ops.aten
CACHE, OTHER, ROWS, AT = torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), torch.ones(2, 1, 5), torch.tensor([1])


def graph_of(step: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """The ATen graph of a step that writes in place."""
    return aten_graph(step, *inputs)


def two_writes(a: Tensor, b: Tensor, at: Tensor, x: Tensor) -> Tensor:
    a.index_copy_(1, at, x)
    b.index_copy_(1, at, x)
    return a + b


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> list[WriteProvider]:
    """The registry, empty."""
    found: list[WriteProvider] = []
    monkeypatch.setattr(module, "_PROVIDERS", found)
    return found


def provider(name: str, lower: Callable[[Builder, Sequence[RowWrite]], None], count: int = 1, rank: int = 0) -> WriteProvider:
    return WriteProvider(name, ("cpu",), lower, count, rank)


def zero(b: Builder, writes: Sequence[RowWrite]) -> None:
    """Fills the caches with zeros, which a test can tell from a write."""
    for write in writes:
        b.emit(aten.zero_.default, write.cache)


def refusing(b: Builder, writes: Sequence[RowWrite]) -> None:
    b.emit(aten.zero_.default, writes[0].cache)
    b.refuse("not today")


def raising(b: Builder, writes: Sequence[RowWrite]) -> None:
    b.emit(aten.zero_.default, writes[0].cache)
    raise ValueError("broken")


def lowered(gm: GraphModule) -> tuple[GraphRecord, int]:
    record = GraphRecord(FusionConfig(target="cpu"))
    names = [node.name for node in gm.graph.nodes if node.target is aten.index_copy_.default]
    record.sites = [Site("kv_update", True, lowered_to="aten.index_copy_", call=name) for name in names]
    return record, lower_writes(gm, record.config, record)


def written_to(record: GraphRecord) -> list[tuple[str | None, str | None]]:
    return [(site.lowered_to, site.reason) for site in record.sites]


class TestRowWrite:
    def test_index_copy(self) -> None:
        gm = graph_of(lambda c, at, x: c.index_copy_(-2, at, x), CACHE, AT, ROWS)
        [write] = [found for node in gm.graph.nodes if isinstance(found := row_write(node), RowWrite)]
        assert (write.dims, write.prefix, write.length, write.row, write.wraps) == ((1,), 2, 3, 5, False)

    def test_index_put_of_two_dimensions(self) -> None:
        gm = graph_of(lambda c, at, x: c.index_put_((at, at), x), CACHE, AT, torch.ones(1, 5))
        [write] = [found for node in gm.graph.nodes if isinstance(found := row_write(node), RowWrite)]
        assert (write.dims, write.prefix, write.length, write.row, write.wraps) == ((0, 1), 1, 6, 5, True)
        assert len(write.indices) == 2

    @pytest.mark.parametrize(
        ("step", "reason"),
        [
            (lambda c, at, x: c.transpose(0, 1).index_copy_(0, at, x.transpose(0, 1)), "the cache is not contiguous"),
            (lambda c, at, x: c.index_put_((at,), x[0, 0]), "what is written is broadcast"),
            (lambda c, at, x: c.index_put_((at > 0, at), x[:, 0][:1]), "the index is a mask"),
        ],
    )
    def test_what_is_none(self, step: Callable[..., Any], reason: str) -> None:
        found = [row_write(node) for node in graph_of(step, CACHE, AT, ROWS).graph.nodes]
        assert [why for why in found if why is not None] == [reason]


class TestProviders:
    def test_two_writes_become_one(self, providers: list[WriteProvider]) -> None:
        providers += [provider("one", raising), provider("two", zero, count=2)]
        gm = graph_of(two_writes, CACHE, OTHER, AT, ROWS)
        record, count = lowered(gm)
        assert (count, written_to(record)) == (2, [("two", None)] * 2)
        assert torch.equal(gm(CACHE + 1, CACHE + 1, AT, ROWS), CACHE)

    def test_refusals_are_taken_back_and_told(self, providers: list[WriteProvider]) -> None:
        providers += [provider("two", refusing, count=2), provider("one", zero, rank=1), provider("first", refusing)]
        gm = graph_of(two_writes, CACHE, OTHER, AT, ROWS)
        record, count = lowered(gm)
        reason = "two: not today; first: not today"
        assert (count, written_to(record)) == (2, [("one", reason), ("one", reason)])
        assert len(gm.graph.find_nodes(op="call_function", target=aten.zero_.default)) == 2

    def test_a_provider_that_raises_is_skipped(self, providers: list[WriteProvider], caplog: pytest.LogCaptureFixture) -> None:
        providers.append(provider("one", raising))
        gm = graph_of(two_writes, CACHE, OTHER, AT, ROWS)
        record, count = lowered(gm)
        assert (count, written_to(record)) == (0, [("aten.index_copy_", "one: ValueError: broken")] * 2)
        assert record.rule_errors == {"one": "ValueError: broken"}
        assert len(caplog.records) == 1
        assert torch.equal(gm(CACHE.clone(), CACHE.clone(), AT, ROWS), two_writes(CACHE.clone(), CACHE.clone(), AT, ROWS))

    def test_other_targets_have_none(self, providers: list[WriteProvider]) -> None:
        providers.append(WriteProvider("one", ("cuda",), zero))
        assert lowered(graph_of(two_writes, CACHE, OTHER, AT, ROWS))[1] == 0

    def test_a_read_between_keeps_two_writes_apart(self, providers: list[WriteProvider]) -> None:
        def step(a: Tensor, b: Tensor, at: Tensor, x: Tensor) -> Tensor:
            a.index_copy_(1, at, x)
            seen = a.view(-1).sum()
            b.index_copy_(1, at, x)
            return seen

        taken: list[int] = []
        providers.append(provider("two", lambda b, writes: (taken.append(len(writes)), zero(b, writes))[1], count=2))
        count = lowered(graph_of(step, CACHE, OTHER, AT, ROWS))[1]
        assert (count, taken) == (2, [1, 1])
