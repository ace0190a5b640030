"""Re-inplacing: which functional cache writes become in-place ones, and which must not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import npu_fusion
from npu_fusion.aot import trace
from npu_fusion.config import FusionConfig
from npu_fusion.execute import eager
from npu_fusion.record import GraphRecord, Site
from npu_fusion.reinplace import reinplace

aten = torch.ops.aten


class Reinplaced:
    """Compiles a function, reinplaces its graphs, and compares results and inputs with eager, bit for bit."""

    def __init__(self, fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> None:
        self.graphs: list[GraphModule] = []
        self.written: list[int] = []
        self.record = GraphRecord(FusionConfig())
        compiled = torch.compile(fn, backend=self._backend, dynamic=dynamic)
        mine, theirs = _copy(args), _copy(args)
        kept: list[tuple[Any, Any]] = []
        with torch.no_grad():
            for _ in range(2):
                kept.append((compiled(*mine), fn(*theirs)))
                _assert_equal(mine, theirs)
        # Looked at after the second call: a result that lies in the cache changes with it, one of its own does not.
        for actual, expected in kept:
            _assert_equal(actual, expected)

    def _backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def compile_graph(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            self.written.append(reinplace(graph, self.record))
            self.graphs.append(graph)
            return eager(graph)

        return trace(gm, inputs, compile_graph, compile_graph, compile_graph)

    @property
    def targets(self) -> list[Any]:
        return [node.target for node in self.graphs[0].graph.nodes if node.op == "call_function"]

    @property
    def whole_copies(self) -> int:
        """How many graph inputs are overwritten as a whole."""
        copies = [node for node in self.graphs[0].graph.nodes if node.target is aten.copy_.default]
        return sum(node.args[0].op == "placeholder" for node in copies)

    @property
    def sites(self) -> list[Site]:
        return self.record.sites

    @property
    def reasons(self) -> list[str | None]:
        return [site.reason for site in self.sites]


def _copy(args: Sequence[Any]) -> list[Any]:
    """Copies that keep strides."""
    return [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a) if isinstance(a, Tensor) else a for a in args]


def _assert_equal(actual: Any, expected: Any) -> None:
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def cache() -> Tensor:
    return torch.randn(1, 2, 6, 4)


def token(length: int = 1) -> Tensor:
    return torch.randn(1, 2, length, 4)


POSITION = torch.tensor([3])


class TestWritesInPlace:
    def test_index_copy(self) -> None:
        def step(c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
            c.index_copy_(2, pos, x)
            return c.sum(-1)

        done = Reinplaced(step, cache(), token(), POSITION)
        assert aten.index_copy_.default in done.targets
        assert done.whole_copies == 0
        (site,) = done.sites
        assert (site.idiom, site.fused, site.op, site.lowered_to) == ("kv_update", True, "kv_update", "aten.index_copy_")
        assert site.source is not None
        assert "test_reinplace.py" in site.source

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_slice_assignment(self, dynamic: bool) -> None:
        def step(c: Tensor, x: Tensor) -> Tensor:
            c[:, :, 2 : 2 + x.shape[2]] = x
            return c * 2

        done = Reinplaced(step, cache(), token(3), dynamic=dynamic)
        assert done.whole_copies == 0
        assert aten.slice_scatter.default not in done.targets
        assert done.reasons == [None]

    def test_nested_views(self) -> None:
        """Keys and values in one tensor, a slice of each written."""

        def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            c[0][:, :, 1:2] = x
            c[1][:, :, 1:2] = x * 2
            return c[0].sum(), c[1].sum()

        done = Reinplaced(step, torch.randn(2, 1, 2, 6, 4), token())
        assert done.whole_copies == 0
        assert done.written == [2]

    def test_a_reshaped_part_of_a_cache(self) -> None:
        """Keys and values in one tensor of pages, tokens written into each part as one list of slots."""

        def step(c: Tensor, slots: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            c[0].view(-1, 4).index_copy_(0, slots, x)
            c[1].view(-1, 4).index_copy_(0, slots, x * 2)
            return c[0].sum(), c[1].sum()

        done = Reinplaced(step, torch.randn(2, 3, 2, 4), torch.tensor([5, 0]), torch.randn(2, 4))
        assert done.targets.count(aten.index_copy_.default) == 2
        assert done.whole_copies == 0
        assert not {aten.select_scatter.default, aten.copy_.default} & set(done.targets)

    def test_index_put_with_a_table_of_slots(self) -> None:
        def step(c: Tensor, slots: Tensor, x: Tensor) -> Tensor:
            c.view(-1, 4)[slots] = x
            return c.sum(0)

        done = Reinplaced(step, torch.randn(3, 2, 4), torch.tensor([5, 0]), torch.randn(2, 4))
        assert aten.index_put_.default in done.targets
        assert done.whole_copies == 0

    def test_scatter(self) -> None:
        def step(c: Tensor, index: Tensor, x: Tensor) -> Tensor:
            c.scatter_(2, index, x)
            return c + 1

        done = Reinplaced(step, cache(), torch.full((1, 2, 1, 4), 5), token())
        assert aten.scatter_.src in done.targets
        assert done.whole_copies == 0

    def test_several_writes_with_reads_between(self) -> None:
        def step(c: Tensor, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
            c.index_copy_(2, pos, x)
            before = c.sum()
            c.index_copy_(2, pos + 1, x * 2)
            return before, c.sum()

        done = Reinplaced(step, cache(), token(), POSITION)
        assert done.written == [2]
        assert done.whole_copies == 0

    def test_old_contents_read_before_the_write(self) -> None:
        def step(c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
            old = c[:, :, :2].sum()
            c.index_copy_(2, pos, x)
            return c + old

        assert Reinplaced(step, cache(), token(), POSITION).whole_copies == 0

    def test_full_sliding_window(self) -> None:
        """transformers' StaticSlidingWindowLayer: roll, write the last place, copy back. Of four copies of the window two are left."""

        def step(c: Tensor, x: Tensor) -> Tensor:
            new = c.roll(-1, dims=-2)
            new[:, :, torch.tensor([-1])] = x
            c.copy_(new)
            return c.sum(-1)

        done = Reinplaced(step, cache(), token())
        assert aten.index_put_.default in done.targets
        assert aten.copy.default not in done.targets
        assert done.targets.count(aten.copy_.default) == 1
        assert done.reasons == [None]

    def test_new_cache(self) -> None:
        """The zeros of a cache made in the graph are written in place; they are no input, and no site."""

        def prefill(x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
            c = torch.zeros(1, 2, 6, 4)
            c.index_copy_(2, pos, x)
            return c, c.sum()

        done = Reinplaced(prefill, token(), POSITION)
        assert aten.index_copy_.default in done.targets
        assert done.sites == []

    def test_two_caches_that_share_storage_but_do_not_overlap(self) -> None:
        whole = torch.randn(2, 1, 2, 6, 4)
        expected = whole.clone()
        graphs: list[GraphModule] = []

        def step(k: Tensor, v: Tensor, x: Tensor, pos: Tensor) -> Tensor:
            k.index_copy_(2, pos, x)
            v.index_copy_(2, pos, x * 2)
            return k.sum() + v.sum()

        def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            def compile_graph(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
                reinplace(graph)
                graphs.append(graph)
                return eager(graph)

            return trace(gm, inputs, compile_graph, compile_graph, compile_graph)

        x = token()
        with torch.no_grad():
            actual = torch.compile(step, backend=backend)(whole[0], whole[1], x, POSITION)
        assert torch.equal(actual, step(expected[0], expected[1], x, POSITION))
        assert torch.equal(whole, expected)
        assert all(node.target is not aten.copy_.default for node in graphs[0].graph.nodes)

    def test_the_cache_and_views_of_it_returned(self) -> None:
        """What is returned is the cache's memory, in eager and here."""

        def step(c: Tensor, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
            c.index_copy_(2, pos, x)
            return c, c.view(2, -1), c[:, :, :2], c.transpose(1, 2)

        done = Reinplaced(step, cache(), token(), POSITION)
        assert done.whole_copies == 0

    def test_a_copy_returned_that_equals_the_cache(self) -> None:
        """The same computation, once functional and returned, once in place: the first must keep memory of its own."""

        def step(c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
            kept = c.index_copy(2, pos, x)
            c.index_copy_(2, pos, x)
            return kept

        done = Reinplaced(step, cache(), token(), POSITION)
        assert done.targets.count(aten.index_copy.default) == 1
        assert done.targets.count(aten.index_copy_.default) == 1

    def test_a_functional_result_copied_into_the_cache_and_returned(self) -> None:
        def step(c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
            new = c.index_copy(2, pos, x)
            c.copy_(new)
            return new

        assert aten.index_copy_.default not in Reinplaced(step, cache(), token(), POSITION).targets

    def test_twice_changes_nothing(self) -> None:
        def step(c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
            c.index_copy_(2, pos, x)
            return c.sum(-1)

        done = Reinplaced(step, cache(), token(), POSITION)
        before = [str(node) for node in done.graphs[0].graph.nodes]
        assert reinplace(done.graphs[0]) == 0
        assert [str(node) for node in done.graphs[0].graph.nodes] == before


class TestMustNot:
    def test_old_contents_read_after_the_write(self) -> None:
        def step(c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
            old = c.clone()
            c.index_copy_(2, pos, x)
            return old - c

        # The clone comes before the write: AOT keeps that order, and the write is in place.
        assert Reinplaced(step, cache(), token(), POSITION).whole_copies == 0

        functional = _graph_with_late_reader()
        record = GraphRecord(FusionConfig())
        assert reinplace(functional, record) == 0
        (site,) = record.sites
        assert not site.fused
        assert site.reason == "late reads the cache's old contents after the write"

    def test_late_reader_of_a_view(self) -> None:
        functional = _graph_with_late_reader(through_view=True)
        before = functional.code
        assert reinplace(functional) == 0
        assert functional.code == before

    def test_old_contents_returned(self) -> None:
        functional = _graph_with_late_reader(returned=True)
        record = GraphRecord(FusionConfig())
        assert reinplace(functional, record) == 0
        assert record.sites[0].reason == "the cache's old contents are returned"

    def test_written_value_is_a_view_of_the_cache(self) -> None:
        def shift(c: Tensor, pos: Tensor) -> Tensor:
            c.index_copy_(2, pos, c[:, :, :1])
            return c.sum()

        done = Reinplaced(shift, cache(), POSITION)
        assert done.reasons == ["what is written is a view of the cache itself"]

    def test_overlapping_slice(self) -> None:
        def shift(c: Tensor) -> Tensor:
            c[:, :, 1:] = c[:, :, :-1].clone()
            return c.sum()

        Reinplaced(shift, cache())

    def test_elementwise_updates_are_left_alone(self) -> None:
        def count(length: Tensor, c: Tensor) -> Tensor:
            length.add_(1)
            c.mul_(2)
            return length + c.sum()

        done = Reinplaced(count, torch.zeros(1), cache())
        assert done.written == [0]
        assert done.sites == []
        assert done.whole_copies == 2

    def test_functional_update_of_an_input_that_is_not_mutated(self) -> None:
        def step(c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
            return c.index_copy(2, pos, x)

        done = Reinplaced(step, cache(), token(), POSITION)
        assert done.written == [0]
        assert done.sites == []

    def test_cache_that_is_not_dense(self) -> None:
        """A functional copy is laid out densely, and views of it were traced so."""

        def step(c: Tensor, x: Tensor, pos: Tensor) -> Tensor:
            c.index_copy_(2, pos, x)
            return c.sum(-1)

        done = Reinplaced(step, torch.randn(1, 2, 6, 8)[..., ::2], token(), POSITION)
        assert done.written == [0]
        assert "not dense" in str(done.reasons[0])

    def test_temporary_that_is_read_later(self) -> None:
        def step(x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
            base = x * 2
            return base.index_copy(2, pos, x[:, :, :1]), base + 1

        assert Reinplaced(step, token(6), POSITION).written == [0]

    def test_temporary_that_is_returned(self) -> None:
        def step(x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
            base = x * 2
            return base.index_copy(2, pos, x[:, :, :1]), base

        assert Reinplaced(step, token(6), POSITION).written == [0]

    def test_temporary_that_may_be_an_input(self) -> None:
        """`reshape` of a dense tensor is a view: the result is the input's memory."""

        def step(x: Tensor, pos: Tensor) -> Tensor:
            return x.contiguous().reshape(2, 6, 4).index_copy(1, pos, torch.zeros(2, 1, 4))

        assert Reinplaced(step, token(6), POSITION).written == [0]


def _graph_with_late_reader(*, through_view: bool = False, returned: bool = False) -> GraphModule:
    """index_copy into an input, and a reader of the input's old contents after it: an order that AOT does not make, a rewrite might."""
    graph = torch.fx.Graph()
    values = {"c": cache(), "pos": POSITION, "x": token()}
    nodes = {name: graph.placeholder(name) for name in values}
    for name, node in nodes.items():
        node.meta["val"] = values[name]
    c = nodes["c"]

    def call(op: Any, *args: Any) -> torch.fx.Node:
        node = graph.call_function(op, args)
        node.meta["val"] = op(*(a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in args))
        return node

    seen = call(aten.slice.Tensor, c, 2, 0, 2) if through_view else c
    new = call(aten.index_copy.default, c, 2, nodes["pos"], nodes["x"])
    late = seen if returned else call(aten.neg.default, seen)
    if not returned:
        late.name = "late"
    graph.call_function(aten.copy_.default, (c, new))
    graph.output((late, new))
    return GraphModule(torch.nn.Module(), graph)


class TestCounters:
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_advanced_at_the_end(self, dynamic: bool) -> None:
        def step(seen: Tensor, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[0]) + seen
            seen.add_(x.shape[0])
            return positions

        done = Reinplaced(step, torch.tensor(3), torch.randn(5), dynamic=dynamic)
        assert done.targets[-1] is aten.add_.Tensor
        assert aten.copy_.default not in done.targets
        assert done.sites == []

    @pytest.mark.parametrize(
        "step",
        [
            lambda n, x: n.add_(1) * 2,  # the new value is used
            lambda n, x: n.add_(x),  # what is added may have been written to by then
            lambda n, x: n.copy_(1 - n),  # the number comes first
            lambda n, x: n.add_(n),
        ],
    )
    def test_others_stay_copies(self, step: Callable[..., Any]) -> None:
        done = Reinplaced(step, torch.ones(3), torch.ones(3))
        assert aten.add_.Tensor not in done.targets


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_cache_seen_in_another_shape_beside_a_fused_op(dynamic: bool) -> None:
    """Rewriting turns views into reshapes, for results of fused ops may lie otherwise; those of an input are views all the same."""

    def step(x: Tensor, weight: Tensor, slots: Tensor, paged: Tensor) -> Tensor:
        rows = torch.nn.functional.rms_norm(x.reshape(-1, 16), (16,), weight, 1e-6)
        paged.view(-1, 16).index_copy_(0, slots, rows)
        return paged.sum(-1)

    inputs = [torch.randn(3, 2, 8), torch.rand(16), torch.tensor([5, 0, 11]), torch.randn(4, 3, 1, 16)]
    mine, theirs = _copy(inputs), _copy(inputs)
    torch.compiler.reset()
    compiled = torch.compile(step, backend="npu_fusion", dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*mine), step(*theirs))
    torch.testing.assert_close(mine, theirs)
    found = npu_fusion.report(compiled)
    assert found.ops["rms_norm"] == 1
    assert [site.lowered_to for site in found.sites if site.idiom == "kv_update"] == ["aten.index_copy_"]
    copies = found.graph("lowered").graph.find_nodes(op="call_function", target=aten.copy_.default)
    assert not copies
