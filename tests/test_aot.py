"""AOT: which compiler gets which graph, and what the graphs look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from npu_fusion.aot import trace
from npu_fusion.execute import eager

aten = torch.ops.aten


class Caught:
    """A backend that keeps the graphs of each kind, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: dict[str, list[GraphModule]] = {"inference": [], "forward": [], "backward": []}

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def keep(kind: str) -> Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]:
            def compile_graph(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
                self.graphs[kind].append(graph)
                return eager(graph)

            return compile_graph

        return trace(gm, inputs, keep("inference"), keep("forward"), keep("backward"))

    @property
    def count(self) -> list[int]:
        return [len(graphs) for graphs in self.graphs.values()]


def targets(gm: GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_nothing_is_decomposed_that_aten_has() -> None:
    caught = Caught()
    compiled = torch.compile(lambda x: torch.nn.functional.silu(x).to(torch.bfloat16), backend=caught)
    with torch.no_grad():
        compiled(torch.randn(4))
    assert targets(caught.graphs["inference"][0]) == [aten.silu.default, aten._to_copy.default]


def test_mutations_of_inputs_end_the_graph() -> None:
    caught = Caught()

    def update(cache: Tensor, x: Tensor) -> Tensor:
        cache[1:2] = x
        return cache.sum()

    compiled = torch.compile(update, backend=caught)
    cache, expected, x = torch.zeros(3, 4), torch.zeros(3, 4), torch.randn(1, 4)
    assert torch.equal(compiled(cache, x), update(expected, x))
    assert torch.equal(cache, expected)
    assert targets(caught.graphs["inference"][0])[-1] is aten.copy_.default


def test_training_has_two_graphs_and_the_gradients_of_eager() -> None:
    caught = Caught()
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(2, 4, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return torch.tanh(layer(x)).square().sum()

    torch.compile(loss, backend=caught)(x).backward()
    actual = x.grad
    x.grad = None
    loss(x).backward()
    assert actual is not None
    assert x.grad is not None
    assert torch.allclose(actual, x.grad)
    assert caught.count == [0, 1, 1]


def test_no_grad_has_one() -> None:
    caught = Caught()
    compiled = torch.compile(torch.nn.Linear(4, 4), backend=caught)
    with torch.no_grad():
        compiled(torch.randn(2, 4))
    assert caught.count == [1, 0, 0]


def test_float_attributes_that_vary_make_a_graph_each_or_an_input() -> None:
    """Dynamo may call the backend several times for one graph (`TensorifyScalarRestartAnalysis`): the compiler sees finished runs only."""

    class Scaled(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale + 1

    caught = Caught()
    x = torch.randn(3)
    with torch.no_grad():
        for scale in (0.5, 0.25, 0.125):
            module = Scaled(scale)
            assert torch.equal(torch.compile(module, backend=caught, dynamic=True)(x), module(x))
    assert caught.count[0] >= 1
