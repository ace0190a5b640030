"""Which linears are merged, and which are not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

import npu_fusion
from npu_fusion.numerics import error_bound, relative_error
from npu_fusion.torch_private import FakeTensorMode
from npu_fusion.weights import merge_linears
from tests.weights.models import ADDMM, HIDDEN, MM, Compiled, Mlp, Model, Wide, frozen, gate_and_up, inputs, is_merged, linear

# -------------------------------------------------------------------- what is merged


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_qkv_and_gate_up_are_one_product_each(bias: bool, dtype: torch.dtype, dynamic: bool) -> None:
    compiled = Compiled(frozen(Model(bias).to(dtype)), dynamic=dynamic)
    compiled.check()
    attention = compiled.model.attention
    assert is_merged(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    assert is_merged(*gate_and_up(compiled.model))
    if bias:
        assert is_merged(attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias)
    assert compiled.launches(MM, ADDMM) == 4
    compiled.check(inputs(3, 7, dtype=dtype))


def test_glu_reads_the_merged_product(compiled: Compiled) -> None:
    [call] = [node for node in compiled.records[0].stages["fused"].graph.nodes if node.target is torch.ops.npu_fusion.glu.default]
    assert call.args[1] is None
    assert call.kwargs["layout"] == "halves"


def test_two_dimensional_input() -> None:
    compiled = Compiled(frozen(Mlp(bias=True)))
    compiled.check(inputs(5))
    assert compiled.launches(MM, ADDMM) == 2


def test_report_counts_the_launches_that_are_saved(compiled: Compiled) -> None:
    report = npu_fusion.report(compiled.run)
    aten = [node.target for node in report.graph("aten").graph.nodes]
    assert sum(target in (MM, ADDMM) for target in aten) == 7
    assert any("merged" in note for record in compiled.records for note in record.notes)


def test_switched_off() -> None:
    compiled = Compiled(frozen(Model()), merge_weights=False)
    compiled.check()
    assert compiled.launches(MM, ADDMM) == 7
    assert not is_merged(*gate_and_up(compiled.model))


def test_no_weight_is_kept_twice(compiled: Compiled) -> None:
    weights = [*gate_and_up(compiled.model)]
    assert weights[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in weights)


def test_replaced_memory_is_freed() -> None:
    model = frozen(Mlp())
    storage = weakref.ref(model.gate_proj.weight.untyped_storage())
    Compiled(model).check()
    gc.collect()
    assert storage() is None


def test_explain_merges_nothing() -> None:
    model = frozen(Model())
    report = npu_fusion.explain(model, inputs())
    assert report.idioms["glu"] == 1
    assert not is_merged(*gate_and_up(model))


def test_verify() -> None:
    compiled = Compiled(frozen(Model(bias=True)), verify=True)
    compiled.check()
    assert compiled.records[0].checks
    assert is_merged(*gate_and_up(compiled.model))


def test_inference_mode() -> None:
    compiled = Compiled(frozen(Model()))
    with torch.inference_mode():
        compiled.run(inputs())
    gate, up = gate_and_up(compiled.model)
    assert is_merged(gate, up)
    assert not gate.is_inference()
    compiled.check()


def test_parameters_that_require_gradients_still_train() -> None:
    model = Model()
    compiled = Compiled(model)
    compiled.check()
    assert is_merged(*gate_and_up(model))
    model(inputs()).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    compiled.check()
    assert is_merged(*gate_and_up(model))


# -------------------------------------------------------------------- what is not


class Router(nn.Module):
    """A router beside the expert that it does not route to."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(HIDDEN, HIDDEN, bias=False), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1) + self.shared(x)


def test_linear_of_another_module_stays_out() -> None:
    model = frozen(Router())
    Compiled(model).check()
    assert is_merged(model.shared.gate_proj.weight, model.shared.up_proj.weight)
    assert model.router.weight.untyped_storage().nbytes() == model.router.weight.nbytes


class HalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(bias=False), linear(bias=False).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x.bfloat16()).float()


class SecondInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x.relu())


class Tied(nn.Module):
    """One weight, used twice on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(bias=False), linear(bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.second(x).sigmoid()


class Weights(nn.Module):
    """Weights that the forward pass computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(bias=False), linear(bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.first.weight * 2) + F.linear(x, self.second.weight * 3)


@pytest.mark.parametrize(
    "make",
    [
        HalfPrecision,
        SecondInput,
        Tied,
        Weights,
        lambda: Wide(linear(), linear(bias=False)),
        lambda: Wide(linear(3), linear(3)),
        lambda: Wide(linear(), linear(), lambda a, b: (a, b)),
        lambda: Wide(linear(), linear(), lambda a, b: (a.transpose(0, 1), b + 1)),
    ],
    ids=["dtypes", "inputs", "tied", "computed weights", "one bias", "unaligned", "returned", "view returned"],
)
def test_not_merged(make: Callable[[], nn.Module]) -> None:
    compiled = Compiled(frozen(make()))
    compiled.check()
    assert compiled.records[0].weights is None


def test_weight_that_the_graph_writes_to() -> None:
    class Writing(Wide):
        def forward(self, x: Tensor) -> Any:
            result = super().forward(x)
            self.first.weight.mul_(2)
            return result

    model = frozen(Writing(linear(), linear()))
    twin = copy.deepcopy(model)
    run = torch.compile(model, backend="npu_fusion")
    with torch.no_grad():
        for _ in range(3):
            x = inputs()
            torch.testing.assert_close(run(x), twin(x))


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(0.1)
        self.down, self.up = nn.Linear(HIDDEN, 8, bias=False), nn.Linear(8, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x)))


def test_lora_around_each_linear() -> None:
    model = Mlp()
    model.gate_proj, model.up_proj = Lora(model.gate_proj), Lora(model.up_proj)  # type: ignore[assignment]
    Compiled(frozen(model)).check()


# -------------------------------------------------------------------- graphs traced on an NPU


def traced_on_npu(x: Tensor, *linears: nn.Linear) -> tuple[GraphModule, list[Tensor]]:
    """The linears of one input as AOT traces them on an NPU, `matmul` and `add`, side by side; and the graph's inputs."""
    graph, mode, values = Graph(), FakeTensorMode(), [x, *(p for linear in linears for p in linear.parameters())]
    nodes = {id(value): graph.placeholder(f"input_{i}") for i, value in enumerate(values)}
    for value in values:
        nodes[id(value)].meta["val"] = mode.from_tensor(value)

    def call(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        with mode:
            node.meta["val"] = target(*map_arg(args, lambda arg: arg.meta["val"]))
        return node

    aten, results = torch.ops.aten, []
    for layer in linears:
        result = call(aten.matmul.default, nodes[id(x)], call(aten.t.default, nodes[id(layer.weight)]))
        results.append(result if layer.bias is None else call(aten.add.Tensor, result, nodes[id(layer.bias)]))
    graph.output(tuple(call(aten.relu.default, result) for result in results))
    return GraphModule({}, graph), values


@pytest.mark.parametrize("bias", [False, True])
def test_linears_as_an_npu_traces_them_are_merged(bias: bool) -> None:
    linears = [nn.Linear(HIDDEN, size, bias=bias) for size in (16, 32)]
    gm, values = traced_on_npu(inputs(2, 5), *linears)
    expected = [F.relu(linear(values[0])) for linear in linears]
    merger = merge_linears(gm, values)
    assert merger is not None
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)) == 1
    with torch.no_grad():
        results = gm(*values, *merger(values))
    assert is_merged(*(linear.weight for linear in linears))
    for actual, wanted in zip(results, expected, strict=True):
        assert relative_error(actual, wanted) < error_bound(torch.float32)


def test_a_vector_that_is_broadcast_is_no_bias() -> None:
    """Merged, it would lie where the bias of one row is wanted; the products below it are merged without it."""
    linears = [nn.Linear(HIDDEN, 16), nn.Linear(HIDDEN, 32)]
    for layer in linears:
        layer.bias = nn.Parameter(torch.randn(1))
    gm, values = traced_on_npu(inputs(2, 5), *linears)
    expected = gm(*values)
    merger = merge_linears(gm, values)
    assert merger is not None
    assert len(merger.slots) == 1
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)) == 2
    with torch.no_grad():
        results = gm(*values, *merger(values))
    for actual, wanted in zip(results, expected, strict=True):
        assert relative_error(actual, wanted) < error_bound(torch.float32)
