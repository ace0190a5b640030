"""Executors: boxed calls, freed inputs, fallbacks."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from npu_fusion.config import FusionConfig
from npu_fusion.execute import eager, execute, resolve_executor
from npu_fusion.record import GraphRecord

aten = torch.ops.aten


def graph_of(fn: object, *args: Tensor) -> GraphModule:
    gm = make_fx(fn, tracing_mode="fake")(*args)
    assert isinstance(gm, GraphModule)
    return gm


def record_for(executor: str, target: str = "cpu") -> GraphRecord:
    return GraphRecord(FusionConfig(target=target, executor=executor))


@pytest.mark.parametrize(
    ("executor", "target", "resolved"),
    [
        ("auto", "cpu", "eager"),
        ("auto", "cuda", "inductor"),
        ("auto", "ascend910b", "eager"),
        ("npugraph_ex", "ascend910b", "npugraph_ex"),
        ("graph", "cuda", "graph"),
        ("eager", "cuda", "eager"),
        ("inductor", "cpu", "inductor"),
    ],
)
def test_auto_depends_on_the_target(executor: str, target: str, resolved: str) -> None:
    assert resolve_executor(executor, target) == resolved


def test_what_is_emulated_runs_as_a_graph_of_its_own() -> None:
    assert resolve_executor("auto", "cuda", emulate=True) == "eager"
    assert resolve_executor("inductor", "cuda", emulate=True) == "inductor"


class TestEager:
    def test_runs_and_leaves_the_graph_alone(self) -> None:
        x = torch.randn(3)
        gm = graph_of(lambda x: (x + 1, x * 2), x)
        run = eager(gm)
        assert run._boxed_call  # type: ignore[attr-defined]
        for actual, expected in zip(run([x]), (x + 1, x * 2), strict=True):
            assert torch.equal(actual, expected)
        assert torch.equal(gm(x)[0], x + 1)

    def test_a_graph_without_inputs(self) -> None:
        gm = graph_of(lambda: (torch.ones(2),))
        assert torch.equal(eager(gm)([])[0], torch.ones(2))

    def test_empties_its_arguments(self) -> None:
        arguments = [torch.randn(3)]
        eager(graph_of(lambda x: (x + 1,), arguments[0]))(arguments)
        assert arguments == []

    def test_frees_an_input_after_its_last_use(self) -> None:
        """The input must be gone while later nodes run."""
        alive: list[bool] = []
        reference: list[weakref.ref[Tensor]] = []

        def probe(x: Tensor) -> Tensor:
            gc.collect()
            alive.append(reference[0]() is not None)
            return x

        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        y = graph.call_function(torch.neg, (x,))
        graph.output((graph.call_function(probe, (y,)),))
        run = eager(GraphModule(torch.nn.Module(), graph))
        arguments = [torch.randn(3)]
        reference.append(weakref.ref(arguments[0]))
        run(arguments)
        assert alive == [False]


class TestInductor:
    def test_takes_a_list_and_empties_it(self) -> None:
        x = torch.randn(4, 4)
        gm = graph_of(lambda x: (aten.silu(x) + 1, aten.t(x)), x)
        run = execute(gm, [x], record_for("inductor"))
        arguments = [x]
        first, second = run(arguments)
        assert arguments == []
        assert torch.allclose(first, torch.nn.functional.silu(x) + 1, atol=1e-6)
        assert torch.equal(second, x.t())
        assert aten.silu.default in [node.target for node in gm.graph.nodes]


class TestGraph:
    def test_runs_eagerly_on_a_cpu_and_says_so(self) -> None:
        x = torch.randn(3)
        record = record_for("graph")
        run = execute(graph_of(lambda x: (x + 1,), x), [x], record)
        assert torch.equal(run([x])[0], x + 1)
        assert record.config.executor == "eager"
        assert record.notes == ["executor eager in place of graph: the graph runs on cpu, and only cuda and npu graphs can be captured"]

    @pytest.mark.gpu
    def test_replays_with_new_values_caches_in_place_and_host_scalars(self) -> None:
        def step(x: Tensor, cache: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            aten.copy_(aten.slice(cache, 0, 0, 1), x)
            return aten.sum(cache, [0]) * scale, cache

        def args() -> list[Tensor]:
            return [torch.randn(1, 4, device="cuda"), torch.ones(3, 4, device="cuda"), torch.tensor(2.0, dtype=torch.float64)]

        gm = graph_of(step, *args())
        run = execute(gm, args(), record_for("graph", "cuda"))
        cache, expected_cache = args()[1], args()[1]
        for value in (2.0, 2.0, 3.0, 2.0):
            x, scale = torch.randn(1, 4, device="cuda"), torch.tensor(value, dtype=torch.float64)
            result, returned = run([x, cache, scale])
            expected, _ = step(x, expected_cache, scale)
            assert torch.equal(result, expected)
            assert torch.equal(cache, expected_cache)
            assert returned.data_ptr() == cache.data_ptr()
