"""Launches and bytes of hand-made graphs, checked against figures worked out by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import npu_fusion.ops  # noqa: F401  (declares the semantic ops)
from npu_fusion.cost import bytes_moved, launches, node_bytes, node_launches, tensor_bytes
from npu_fusion.symbols import clean_source, symbol_names

aten = torch.ops.aten


def trace(function: Callable[..., Any], *args: Any) -> GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def trace_dynamic(function: Callable[..., Any], *args: Tensor) -> tuple[GraphModule, ShapeEnv]:
    """Every size of every input a symbol of its own."""
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env) as mode:
        fakes = [mode.from_tensor(a, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC] * a.dim())) for a in args]
        return make_fx(function, tracing_mode="real")(*fakes), shape_env


def only(gm: GraphModule, name: str) -> Node:
    (node,) = (node for node in gm.graph.nodes if node.op == "call_function" and str(node.target).startswith(name))
    return node


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(32),
        lambda x: x.t(),
        lambda x: x.permute(1, 0),
        lambda x: x[1:],
        lambda x: x.unsqueeze(0).expand(3, 4, 8),
        lambda x: x.detach(),
        lambda x: aten.alias(x),
        lambda x: x.split(2)[1],
        lambda x: x.chunk(2, -1)[0],
        lambda x: x.unbind()[0],
        lambda x: aten._unsafe_view(x, [32]),
        lambda x: torch.empty_like(x),
    ],
)
def test_views_and_allocations_cost_nothing(view: Callable[[Tensor], Tensor]) -> None:
    gm = trace(view, torch.ones(4, 8))
    assert (launches(gm), bytes_moved(gm)) == (0, 0)


@pytest.mark.parametrize(
    ("function", "moved"),
    [
        (lambda x: x + 1, 2 * 128),
        (lambda x: x * x, 2 * 128),
        (lambda x: x.t().clone(memory_format=torch.contiguous_format), 2 * 128),
        (lambda x: x.to(torch.bfloat16), 128 + 64),
        (lambda x: x.sum(-1), 128 + 16),
        (lambda x: torch.zeros(4, 8), 128),
        # read once: the expanded copies are the same 128 bytes
        (lambda x: x.unsqueeze(0).expand(3, 4, 8).clone(memory_format=torch.contiguous_format), 128 + 3 * 128),
        (lambda x: torch.topk(x, 2)[0], 128 + 4 * 2 * (4 + 8)),
        (lambda x: x[:, ::2].exp(), 2 * 64),
    ],
)
def test_one_kernel_reads_inputs_and_writes_outputs(function: Callable[[Tensor], Tensor], moved: int) -> None:
    gm = trace(function, torch.ones(4, 8))
    assert (launches(gm), bytes_moved(gm)) == (1, moved)


@pytest.mark.parametrize(
    ("target", "args", "result", "moved"),
    [
        (aten.contiguous.default, (), torch.float32, 2 * 128),
        (aten.to.dtype, (torch.float32,), torch.float32, 0),
        (aten.to.dtype, (torch.float16,), torch.float16, 128 + 64),
    ],
)
def test_ops_that_alias_only_when_there_is_nothing_to_do(target: Any, args: tuple[Any, ...], result: torch.dtype, moved: int) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    call = graph.call_function(target, (x, *args))
    with FakeTensorMode() as mode:
        x.meta["val"] = mode.from_tensor(torch.ones(4, 8))
        call.meta["val"] = mode.from_tensor(torch.ones(4, 8, dtype=result))
    assert (node_launches(call), node_bytes(call)) == (int(moved > 0), moved)


def test_a_semantic_op_is_one_launch() -> None:
    gm = trace(lambda x, w: torch.ops.npu_fusion.rms_norm(x, w, 1e-6), torch.ones(4, 8), torch.ones(8))
    assert launches(gm) == 1
    assert bytes_moved(gm) == 128 + 32 + 128


@pytest.mark.parametrize(
    "gather",
    [
        lambda table, ids: torch.nn.functional.embedding(ids, table),
        lambda table, ids: table[ids],
        lambda table, ids: table.index_select(0, ids),
    ],
)
def test_gathers_read_what_they_return(gather: Callable[[Tensor, Tensor], Tensor]) -> None:
    gm = trace(gather, torch.ones(1000, 8), torch.zeros(3, dtype=torch.long))
    assert bytes_moved(gm) == 2 * (3 * 8 * 4) + 3 * 8


def test_writing_into_a_cache_in_place_costs_what_is_written() -> None:
    cache, new, at = torch.zeros(1, 2, 1000, 8), torch.ones(1, 2, 1, 8), torch.tensor([5])
    in_place = trace(lambda c, n, i: c.index_copy_(2, i, n), cache, new, at)
    assert node_bytes(only(in_place, "aten.index_copy_")) == 2 * 64 + 8
    functional = trace(lambda c, n, i: c.copy_(c.index_copy(2, i, n)), cache, new, at)
    whole = cache.numel() * 4
    assert node_bytes(only(functional, "aten.index_copy")) == 2 * whole + 64 + 8
    assert node_bytes(only(functional, "aten.copy_")) == 2 * whole


def test_in_place_arithmetic_reads_and_writes_its_operand() -> None:
    gm = trace(lambda x: x.add_(1), torch.ones(4, 8))
    assert bytes_moved(gm) == 2 * 128


def test_an_operand_mutated_outside_aten_is_not_moved_as_a_whole() -> None:
    library = torch.library.Library("npu_fusion_test_cost", "DEF")
    library.define("write(Tensor x, Tensor(a!) cache) -> Tensor")
    library.impl("write", lambda x, cache: x.clone(), "CompositeExplicitAutograd")
    with FakeTensorMode() as mode:
        x, cache = mode.from_tensor(torch.ones(4)), mode.from_tensor(torch.ones(100_000))
    graph = Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("cache")]
    call = graph.call_function(torch.ops.npu_fusion_test_cost.write.default, tuple(nodes))
    for node, value in zip([*nodes, call], [x, cache, x], strict=True):
        node.meta["val"] = value
    assert node_bytes(call) == 16 + 16


def test_sizes_stay_symbolic_and_add_no_guard() -> None:
    gm, shape_env = trace_dynamic(lambda x: (x + 1).to(torch.bfloat16), torch.ones(3, 5))
    guards = len(shape_env.guards)
    rows, columns = (size.node.expr for size in next(iter(gm.graph.nodes)).meta["val"].shape)
    assert launches(gm) == 2
    assert sympy.simplify(bytes_moved(gm) - (4 + 4 + 4 + 2) * rows * columns) == 0
    assert len(shape_env.guards) == guards
    assert list(symbol_names(gm)) == [rows, columns]


def test_arithmetic_on_sizes_costs_nothing() -> None:
    gm, _ = trace_dynamic(lambda x: x.view(x.shape[0] * x.shape[1]), torch.ones(3, 5))
    assert launches(gm) == 0


def test_subgraphs_of_higher_order_ops_are_counted() -> None:
    gm = trace(lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: (y * 2).exp(), (x,)), torch.ones(4))
    outside = sum(node_launches(node) for node in gm.graph.nodes if "cond" not in str(node.target))
    assert launches(gm) == outside + 3


def test_tensor_bytes_counts_every_output() -> None:
    gm = trace(lambda x: torch.topk(x, 2)[0], torch.ones(4, 8))
    assert tensor_bytes(only(gm, "aten.topk")) == 4 * 2 * (4 + 8)
    assert tensor_bytes(next(iter(gm.graph.nodes))) == 128


def test_clean_source() -> None:
    assert clean_source("L['kwargs']['input_ids'].size()[1]") == "input_ids.size(1)"
    assert clean_source("L['args'][0].size()[0]") == "args[0].size(0)"
    assert clean_source("L['x'].stride()[0]") == "x.stride(0)"


def test_thousands_of_nodes_take_milliseconds() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(1000):
            x = (x + 1).mul(2).transpose(0, 1)
        return x

    gm, _ = trace_dynamic(chain, torch.ones(3, 5))
    start = time.process_time()
    total = bytes_moved(gm)
    assert launches(gm) == 2000
    assert time.process_time() - start < 0.3
    rows, columns = (size.node.expr for size in next(iter(gm.graph.nodes)).meta["val"].shape)
    assert total == 2000 * 8 * rows * columns
