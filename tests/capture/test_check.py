"""The static check names every op that a capture cannot hold, with the author's line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from npu_fusion import torch_private
from npu_fusion.aot import trace
from npu_fusion.capture import CaptureFacts, facts, find_obstacles
from npu_fusion.capture.check import written_inputs
from npu_fusion.execute import eager
from tests.capture.recording import labelled

aten = torch.ops.aten


def graph_of(fn: Callable[..., Any], *args: Any, device: str = "cuda:0", **options: Any) -> GraphModule:
    """The ATen graph that Dynamo and AOT make of a function, said to be of a device."""
    caught: list[GraphModule] = []

    def compile_graph(gm: GraphModule, inputs: Any) -> Any:
        caught.append(gm)
        return eager(gm)

    def backend(gm: GraphModule, inputs: Any) -> Any:
        return trace(gm, inputs, compile_graph, compile_graph, compile_graph)

    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        torch.compile(fn, backend=backend, **options)(*args)
    (gm,) = caught
    return labelled(gm, device)


def on_devices(fn: Callable[..., Any], **devices: str) -> GraphModule:
    """The graph of a function of tensors on several devices, which need not be here."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        values = [
            torch.empty(() if device.endswith("scalar") else (4,), device=device.removesuffix("scalar")) for device in devices.values()
        ]
        return make_fx(fn)(*values)


X = torch.randn(4)


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda x: torch.relu(x) + 1, (X,)),
        (lambda x, i: x[i] * 2, (X, torch.tensor([1, 2]))),
        (lambda x: torch.where(x > 0, x, 0.0), (X,)),
        (lambda x, s: x * s, (X, torch.tensor(2.0, dtype=torch.float64))),
        (lambda x, s: x * s.item(), (X, torch.tensor(2.0, dtype=torch.float64))),
        (lambda x: x.to(torch.float16), (X,)),
        (lambda x, i: x.index_put((i,), x[:2]), (X, torch.tensor([1, 2]))),
        (lambda x: x.masked_fill(x > 0, 0.0), (X,)),
        (lambda x, n: torch.repeat_interleave(x, n, output_size=6), (X, torch.tensor([1, 2, 1, 2]))),
    ],
)
def test_what_can_be_captured(fn: Any, args: Any) -> None:
    assert find_obstacles(graph_of(fn, *args)) == []


@pytest.mark.parametrize(
    ("fn", "args", "op", "reason"),
    [
        (lambda x: x * x.argmax().item(), (X,), "aten._local_scalar_dense.default", "reads a value back to the host"),
        (lambda x: torch.nonzero(x), (X,), "aten.nonzero.default", "shape depends on data"),
        (lambda x: x[x > 0], (X,), "aten.index.Tensor", "shape depends on data"),
        (lambda x: torch.masked_select(x, x > 0), (X,), "aten.masked_select.default", "shape depends on data"),
        (lambda x: torch.unique(x), (X,), "aten._unique2.default", "shape depends on data"),
        (lambda x: x.index_put((x > 0,), torch.ones(())), (X,), "aten.index_put.default", "boolean mask"),
    ],
)
def test_what_cannot(fn: Any, args: Any, op: str, reason: str) -> None:
    obstacles = find_obstacles(graph_of(fn, *args))
    assert any(found.op == op and reason in found.reason for found in obstacles), obstacles
    assert all(found.source and "test_check.py:" in found.source for found in obstacles)


def test_branches_on_data() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    (found,) = find_obstacles(graph_of(fn, X))
    assert found.op == "cond"
    assert found.reason == "decides on the host which way to go"


@pytest.mark.parametrize(
    ("fn", "devices", "expected"),
    [
        (lambda x: aten._to_copy(x, device="cpu"), {"x": "cuda:0"}, {"reads a value back to the host"}),
        (lambda x, y: aten.add(x, aten._to_copy(y, device="cuda:0")), {"x": "cuda:0", "y": "cpu"}, {"in host memory", "from the host to"}),
        (lambda x, y: aten.add(x, aten._to_copy(y, device="cuda:0")), {"x": "cuda:0", "y": "cpuscalar"}, {"from the host to the device"}),
        (lambda x, y: aten.mul(x, y), {"x": "cuda:0", "y": "cpuscalar"}, set()),
        (lambda x, y: aten.where(aten.gt(x, 0), x, y), {"x": "cuda:0", "y": "cpuscalar"}, {"copies from the host to the device"}),
        (lambda x, y: (aten.neg(x), aten.add_(y, 1)), {"x": "cuda:0", "y": "cpuscalar"}, {"writes to an input in host memory"}),
        (lambda x: (aten.neg(x), aten.rand([2], device="cpu")), {"x": "cuda:0"}, {"draws random numbers on the host"}),
        (lambda x: (aten.neg(x), aten.rand([2], device="cuda:0")), {"x": "cuda:0"}, set()),
        (lambda x, y: (aten.neg(x), aten.neg(y)), {"x": "cuda:0", "y": "cuda:1"}, {"cuda:0 and cuda:1, and a capture is of one device"}),
        (lambda x: aten.neg(x), {"x": "cpu"}, {"the graph runs on cpu, and only cuda and npu graphs can be captured"}),
    ],
)
def test_host_and_device(fn: Any, devices: dict[str, str], expected: set[str]) -> None:
    obstacles = find_obstacles(on_devices(fn, **devices))
    for words in expected:
        assert any(words in str(found) for found in obstacles), obstacles
    assert len(obstacles) == len(expected)


def test_rebinding_an_input() -> None:
    def build(target: Any, *more: Any, of_input: bool) -> GraphModule:
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        y = x if of_input else graph.call_function(aten.neg.default, (x,))
        graph.output((graph.call_function(target, (y, *more)),))
        with FakeTensorMode():
            value = torch.empty(4, 1, device="cuda:0")
        for node in graph.nodes:
            node.meta["val"] = value
        return GraphModule(torch.nn.Module(), graph)

    for target, more in ((aten.resize_.default, ([8, 1],)), (aten.t_.default, ()), (aten.squeeze_.default, ())):
        (found,) = find_obstacles(build(target, *more, of_input=True))
        assert found.reason == "gives input x other memory or another shape in place"
        assert find_obstacles(build(target, *more, of_input=False)) == []


def test_all_obstacles_are_named_and_where_they_come_from() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = x[x > 0]
            return kept.sum() * x.argmax().item()

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + 1)

    obstacles = find_obstacles(graph_of(Outer(), X))
    assert [found.op for found in obstacles] == ["aten.index.Tensor", "aten._local_scalar_dense.default"]
    lines = [int(str(found.source).rsplit(":", 1)[1]) for found in obstacles]
    assert lines[1] == lines[0] + 1
    assert {found.module for found in obstacles} == {"inner"}
    assert str(obstacles[0]).endswith(f"at {obstacles[0].source} in inner")


def test_hazards_that_a_library_of_ops_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    told = CaptureFacts(lambda target: (), lambda target: "allocates its table when first called" if target is aten.sin.default else None)
    monkeypatch.setattr(facts, "_REGISTERED", [told])
    (found,) = find_obstacles(graph_of(torch.sin, X))
    assert str(found).startswith("sin (aten.sin.default) allocates its table when first called")


def test_inputs_written_through_views() -> None:
    def write(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        aten.copy_(aten.slice(a, 0, 0, 1), b)
        aten.add_(c, 1)
        return aten.sum(a) + aten.sum(c)

    gm = make_fx(write, tracing_mode="fake")(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2))
    assert {node.name for node in written_inputs(gm)} == {"a_1", "c_1"}


def test_unbacked_sizes_that_come_in_are_no_obstacle() -> None:
    """What an op does with a size that was found before it adds nothing."""
    gm = graph_of(lambda x: torch.nonzero(x)[:, 0].to(torch.float32) + 1, X)
    assert [found.op for found in find_obstacles(gm)] == ["aten.nonzero.default"]
    assert any(torch_private.unbacked_symbols(node.meta["val"]) for node in gm.graph.nodes if node.name.startswith("add"))
