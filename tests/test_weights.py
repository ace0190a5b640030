"""Merged weights: which linears are merged, and that the model stays right whatever happens to its parameters afterwards."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

import npu_fusion
from npu_fusion import UnsupportedInputError, torch_private
from npu_fusion.backend import records_of
from npu_fusion.numerics import error_bound, relative_error
from npu_fusion.record import GraphRecord
from npu_fusion.torch_private import FakeTensorMode
from npu_fusion.weights import merge_linears

HIDDEN, INNER = 16, 24
MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default


class Mlp(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, 32, bias=bias)
        self.k_proj = nn.Linear(HIDDEN, 16, bias=bias)
        self.v_proj = nn.Linear(HIDDEN, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)

    @staticmethod
    def _heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8)).transpose(1, 2)


class Model(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.attention, self.out, self.mlp = Attention(bias), nn.Linear(32, HIDDEN), Mlp(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attention(x))
        return x + self.mlp(x)


def frozen(module: nn.Module) -> Any:
    return module.eval().requires_grad_(False)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, 5)), HIDDEN, dtype=dtype)


class Compiled:
    """A model, compiled; each call is compared with the model run eagerly on copies of its parameters as they are then."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model = model
        dynamic = options.pop("dynamic", False)
        self.run = torch.compile(model, backend="npu_fusion", dynamic=dynamic, options=options)

    def check(self, x: Tensor | None = None) -> None:
        x = inputs(dtype=next(self.model.parameters()).dtype) if x is None else x
        with torch.no_grad():
            results, expected = self.run(x), copy.deepcopy(self.model)(x)
        for actual, wanted in zip(tree_leaves(results), tree_leaves(expected), strict=True):
            assert actual.dtype is wanted.dtype
            assert relative_error(actual, wanted) < error_bound(x.dtype)

    @property
    def records(self) -> list[GraphRecord]:
        return records_of(self.run)

    def launches(self, *targets: Any) -> int:
        return sum(node.target in targets for node in self.records[-1].stages["fused"].graph.nodes)


def is_merged(*parameters: Tensor) -> bool:
    """Whether the parameters lie one behind the other in one storage."""
    first = parameters[0]
    ends = [p.storage_offset() + p.numel() for p in parameters]
    same = all(p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parameters)
    return same and [p.storage_offset() for p in parameters[1:]] == ends[:-1]


def gate_and_up(model: Any) -> tuple[Tensor, Tensor]:
    return model.mlp.gate_proj.weight, model.mlp.up_proj.weight


@pytest.fixture
def compiled() -> Compiled:
    """A model that has run once, its weights merged."""
    result = Compiled(frozen(Model()))
    result.check()
    assert is_merged(*gate_and_up(result.model))
    return result


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


class Wide(nn.Module):
    """Two linears of one input, up to what is passed."""

    def __init__(self, first: nn.Module, second: nn.Module, combine: Callable[[Tensor, Tensor], Any] = torch.add) -> None:
        super().__init__()
        self.first, self.second, self.combine = first, second, combine

    def forward(self, x: Tensor) -> Any:
        return self.combine(self.first(x), self.second(x))


class Router(nn.Module):
    """A router beside the expert that it does not route to."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(HIDDEN, HIDDEN, bias=False), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1) + self.shared(x)


def linear(out: int = 24, **options: Any) -> nn.Linear:
    return nn.Linear(HIDDEN, out, **options)


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


# -------------------------------------------------------------------- what happens to parameters afterwards


def test_rebound_data(compiled: Compiled) -> None:
    """`parameter.data = ...`, with the merged weight still alive: silently wrong, if nobody looks."""
    compiled.model.mlp.up_proj.weight.data = torch.randn(INNER, HIDDEN)
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


def test_rebound_to_its_own_transpose() -> None:
    """The address stays the same."""
    model = frozen(Wide(linear(HIDDEN), linear(HIDDEN)))
    compiled = Compiled(model)
    compiled.check()
    model.first.weight.data = model.first.weight.data.t()
    compiled.check()


def test_rebound_to_a_part_of_itself() -> None:
    """The addresses stay the same, and the memory stays adjacent."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = linear(bias=False), linear(bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).sigmoid().sum(-1, keepdim=True) * self.second(x)

    compiled = Compiled(frozen(Product()))
    compiled.check()
    compiled.model.second.weight.data = compiled.model.second.weight.data[:8]
    if not torch_private.GUARDS_PARAMETERS:  # better an error than the weight as it was
        with pytest.raises(UnsupportedInputError, match=r"rebound to another shape.*torch.compiler.reset"):
            compiled.check()
        return
    compiled.check()
    compiled.model.first.weight.data = compiled.model.first.weight.data[:8]
    compiled.check()


def test_swapped_data(compiled: Compiled) -> None:
    gate, up = gate_and_up(compiled.model)
    gate.data, up.data = up.data, gate.data
    compiled.check()


def test_written_in_place(compiled: Compiled) -> None:
    gate, up = gate_and_up(compiled.model)
    gate.mul_(2)
    up.data.copy_(torch.randn(INNER, HIDDEN))
    compiled.check()
    assert is_merged(gate, up)


def test_load_state_dict(compiled: Compiled) -> None:
    compiled.model.load_state_dict(Model().state_dict())
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


def test_load_state_dict_assign(compiled: Compiled) -> None:
    compiled.model.load_state_dict(frozen(Model()).state_dict(), assign=True)
    frozen(compiled.model)
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


def test_parameter_replaced(compiled: Compiled) -> None:
    compiled.model.mlp.gate_proj.weight = nn.Parameter(torch.randn(INNER, HIDDEN), requires_grad=False)
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


def test_moved_to_another_dtype_and_back(compiled: Compiled) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        compiled.model.to(dtype)
        assert not is_merged(*gate_and_up(compiled.model))
        compiled.check()
        assert is_merged(*gate_and_up(compiled.model))


@pytest.mark.gpu
def test_moved_to_another_device_and_back(compiled: Compiled) -> None:
    for device in ("cuda", "cpu"):
        compiled.model.to(device)
        compiled.check(inputs().to(device))
        assert is_merged(*gate_and_up(compiled.model))


def test_deep_copy(compiled: Compiled) -> None:
    twin = Compiled(copy.deepcopy(compiled.model))
    assert not is_merged(*gate_and_up(twin.model))
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.add_(1)
    twin.check()
    compiled.check()
    twin.check()
    assert is_merged(*gate_and_up(twin.model))
    assert not is_merged(gate_and_up(twin.model)[0], gate_and_up(compiled.model)[1])


def test_save_and_load(compiled: Compiled, tmp_path: Path) -> None:
    torch.save(compiled.model.state_dict(), tmp_path / "model.pt")
    other = frozen(Model())
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    x = inputs()
    with torch.no_grad():
        torch.testing.assert_close(other(x), compiled.model(x))
    compiled.check()


def test_save_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=50
    )
    model = frozen(transformers.LlamaForCausalLM(config))
    tokens = torch.randint(50, (1, 6))
    with torch.no_grad():
        expected = model(tokens).logits
        compiled = torch.compile(model, backend="npu_fusion")(tokens).logits
    layer = model.model.layers[0]
    assert is_merged(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
    model.save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert size < 1.2 * sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected)
        torch.testing.assert_close(compiled, expected)


def test_tied_embedding() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(INNER, HIDDEN)
            self.mlp = Mlp()
            self.mlp.gate_proj.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x + self.embedding.weight.mean(0))

    compiled = Compiled(frozen(Language()))
    compiled.check()
    assert compiled.model.embedding.weight is compiled.model.mlp.gate_proj.weight
    compiled.model.embedding.weight.add_(1)
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


# -------------------------------------------------------------------- memory that others refer to


def test_state_dict_that_is_held_sees_the_model_and_the_model_it() -> None:
    model = frozen(Model())
    held = model.state_dict()
    compiled = Compiled(model)
    compiled.check()
    held["mlp.up_proj.weight"].zero_()
    assert not model.mlp.up_proj.weight.any()
    compiled.check()
    assert not is_merged(*gate_and_up(model))


def test_weight_that_is_held_when_it_must_move(compiled: Compiled, caplog: pytest.LogCaptureFixture) -> None:
    up = compiled.model.mlp.up_proj.weight
    held = torch.randn(INNER, HIDDEN)
    up.data = held
    with caplog.at_level(logging.WARNING, logger="npu_fusion.weights"):
        compiled.check()
        held.zero_()
        compiled.check()
    assert not is_merged(*gate_and_up(compiled.model))
    assert sum("concatenated at every call" in record.message for record in caplog.records) == 1
    del held
    compiled.check()
    assert is_merged(*gate_and_up(compiled.model))


def test_memory_of_numpy() -> None:
    model = frozen(Model())
    array = torch.randn(INNER, HIDDEN).numpy()
    model.mlp.up_proj.weight.data = torch.from_numpy(array)
    compiled = Compiled(model)
    compiled.check()
    array[:] = 0
    assert not model.mlp.up_proj.weight.any()
    compiled.check()


def test_memory_shared_between_processes() -> None:
    model = frozen(Model()).share_memory()
    Compiled(model).check()
    assert all(parameter.is_shared() for parameter in model.parameters())


# -------------------------------------------------------------------- several graphs, several models


def test_graphs_of_two_shapes_share_the_merged_weights(compiled: Compiled) -> None:
    gate, _ = gate_and_up(compiled.model)
    address = gate.data_ptr()
    compiled.check(inputs(1, 1))
    compiled.check(inputs(2, 5))
    assert len(compiled.records) == 2
    assert gate.data_ptr() == address


def test_two_models_share_a_graph() -> None:
    both = [Compiled(frozen(Model())), Compiled(frozen(Model()))]
    for _ in range(2):
        for compiled in both:
            compiled.check()
    assert all(is_merged(*gate_and_up(compiled.model)) for compiled in both)


def test_graphs_that_want_another_order() -> None:
    """The first graph's order stays; the second concatenates."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                return self.second(x).sigmoid() + self.first(x)
            return self.first(x).sigmoid() + self.second(x)

    compiled = Compiled(frozen(Either()))
    for rows in (2, 1, 2, 1):
        compiled.check(inputs(rows, 3))
    assert is_merged(compiled.model.first.weight, compiled.model.second.weight)


def test_parts_of_a_merged_weight_are_one_too() -> None:
    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                return self.attention.k_proj(x).sigmoid() * self.attention.v_proj(x)
            return self.attention(x)

    compiled = Compiled(frozen(Keys()))
    for rows in (2, 1, 2):
        compiled.check(inputs(rows, 3))
    attention = compiled.model.attention
    assert is_merged(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)


def test_model_is_freed() -> None:
    compiled = Compiled(frozen(Model()))
    compiled.check()
    storage = weakref.ref(gate_and_up(compiled.model)[0].untyped_storage())
    torch.compiler.reset()
    del compiled
    gc.collect()
    assert storage() is None


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
    for linear in linears:
        result = call(aten.matmul.default, nodes[id(x)], call(aten.t.default, nodes[id(linear.weight)]))
        results.append(result if linear.bias is None else call(aten.add.Tensor, result, nodes[id(linear.bias)]))
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
    for linear in linears:
        linear.bias = nn.Parameter(torch.randn(1))
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
