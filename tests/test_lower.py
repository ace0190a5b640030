"""Lowering: providers as transactions, what they leave behind when they refuse, and what the graph may rely on afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from npu_fusion import FusionConfig, GraphRecord, lower
from npu_fusion.config import TARGETS
from npu_fusion.lower import REFERENCE, Arguments, Builder, Provider, elsewhere, lower_graph, providers_of, register_provider
from npu_fusion.ops.glu import glu
from npu_fusion.ops.norm import add_rms_norm, rms_norm
from npu_fusion.record import Site
from npu_fusion.semantic import find_semantic_op
from tests.graphs import aten_graph, calls_of, scaled_tanh, sumdiff

aten = torch.ops.aten
Lowering = Callable[[Builder, Arguments], "Node | Sequence[Node | None]"]


@pytest.fixture(autouse=True)
def _no_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "_PROVIDERS", [])


@pytest.fixture(autouse=True)
def _test_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own ops are semantic ops here."""
    known = {op.overload: op for op in (scaled_tanh, sumdiff)}
    monkeypatch.setattr(lower, "find_semantic_op", lambda target: known.get(target) or find_semantic_op(target))


def provide(op: str, lowering: Lowering, name: str = "made", rank: int = 0, targets: tuple[str, ...] = ("cpu",)) -> None:
    register_provider(Provider(name, op, targets, lowering, rank))


def lowered(
    fn: Callable[..., Any], *inputs: Tensor, dynamic: bool = False, dry_run: bool = False, **options: Any
) -> tuple[GraphModule, GraphRecord]:
    gm = aten_graph(fn, *inputs, dynamic=dynamic)
    record = GraphRecord(FusionConfig(target="cpu"), dry_run=dry_run)
    record.sites += [Site("", True, call=node.name) for node in gm.graph.nodes if lower.find_semantic_op(node.target)]
    lower_graph(gm, record.config, record, **options)
    gm.graph.lint()
    return gm, record


def targets_of(gm: GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def tanh(x: Tensor, scale: float = 1) -> Tensor:
    result: Tensor = scaled_tanh(x, scale)
    return result


def plain(x: Tensor) -> Tensor:
    return tanh(x)


def emit_tanh(b: Builder, a: Arguments) -> Node:
    return b.emit(aten.mul.Tensor, b.emit(aten.tanh.default, a.a), a.scale)


X = torch.arange(6.0).reshape(2, 3)


# -------------------------------------------------------------------- providers


def test_providers_are_tried_by_rank_on_their_target() -> None:
    for name, rank, targets in (("late", 2, ("cpu",)), ("early", -1, ("cpu", "cuda")), ("other", 0, ("cuda",))):
        provide("glu", emit_tanh, name, rank, targets)
    assert [provider.name for provider in providers_of("glu", "cpu")] == ["early", "late"]
    assert [provider.name for provider in providers_of("glu", "cuda")] == ["early", "other"]
    assert providers_of("rms_norm", "cpu") == []


def test_a_call_becomes_what_its_provider_emits() -> None:
    provide("test_scaled_tanh", emit_tanh)
    gm, record = lowered(lambda x: tanh(x, 3.0) + 1, X)
    assert targets_of(gm) == [aten.tanh.default, aten.mul.Tensor, aten.add.Tensor]
    assert [(site.lowered_to, site.reason) for site in record.sites] == [("made", None)]
    torch.testing.assert_close(gm(X), torch.tanh(X) * 3 + 1)


def test_several_results() -> None:
    provide("test_sumdiff", lambda b, a: [b.emit(aten.add.Tensor, a.a, a.b), b.emit(aten.sub.Tensor, a.a, a.b)])
    gm, _ = lowered(lambda x: sumdiff(x, x * 2), X)
    for actual, expected in zip(gm(X), (X * 3, -X), strict=True):
        assert torch.equal(actual, expected)


def test_a_result_that_nobody_reads_need_not_be_computed() -> None:
    provide("test_sumdiff", lambda b, a: [b.emit(aten.add.Tensor, a.a, a.b), None])
    gm, record = lowered(lambda x: sumdiff(x, x)[0], X)
    assert record.sites[0].lowered_to == "made"
    assert torch.equal(gm(X), X * 2)
    _, record = lowered(lambda x: sumdiff(x, x)[1], X)
    assert (record.sites[0].lowered_to, record.sites[0].reason) == (REFERENCE, "made: it does not compute result 1")


def test_emitted_nodes_have_metadata_and_the_source_of_the_call() -> None:
    provide("test_scaled_tanh", emit_tanh)
    gm = aten_graph(lambda x: tanh(x, 3.0), X)
    [call] = calls_of(gm, scaled_tanh)
    call.meta["stack_trace"] = "model.py:7"
    lower_graph(gm, FusionConfig(target="cpu"), GraphRecord(FusionConfig(target="cpu")))
    made = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert [node.meta["stack_trace"] for node in made] == ["model.py:7"] * 2
    assert [node.meta["val"].shape for node in made] == [X.shape] * 2


# -------------------------------------------------------------------- refusing


def refusing(how: Callable[[Builder], object]) -> Lowering:
    """Emits a few nodes and a constant, then refuses or raises."""

    def lowering(b: Builder, a: Arguments) -> Node:
        b.emit(aten.mul.Tensor, b.emit(aten.exp.default, a.a), b.constant("left", lambda: torch.ones(3)))
        how(b)
        return emit_tanh(b, a)

    return lowering


def divide_by_zero(b: Builder) -> None:
    1 / 0  # noqa: B018


def test_a_refusal_leaves_the_graph_as_it_was() -> None:
    provide("test_scaled_tanh", refusing(lambda b: b.refuse("it is Tuesday")), "first")
    provide("test_scaled_tanh", refusing(lambda b: b.require(False, "it rains")), "second", 1)
    provide("test_scaled_tanh", refusing(lambda b: b.only_if(False)), "third", 2)
    gm, record = lowered(plain, X)
    assert targets_of(gm) == [scaled_tanh.overload]
    assert not list(gm.buffers())
    [site] = record.sites
    assert (site.lowered_to, site.reason) == (REFERENCE, "first: it is Tuesday; second: it rains")
    assert not record.rule_errors


def test_an_exception_in_a_provider_leaves_the_call_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    provide("test_scaled_tanh", refusing(divide_by_zero), "broken")
    provide("test_scaled_tanh", emit_tanh, "sound", 1)
    with caplog.at_level(logging.WARNING, logger="npu_fusion.lower"):
        gm, record = lowered(lambda x: tanh(x) + tanh(x + 1), X)
    assert {site.lowered_to for site in record.sites} == {"sound"}
    assert record.rule_errors == {"broken": "ZeroDivisionError: division by zero"}
    assert record.sites[0].reason == "broken: ZeroDivisionError: division by zero"
    assert len(caplog.records) == 1, "logged once"
    assert aten.exp.default not in targets_of(gm)


def test_an_op_that_does_not_take_the_arguments_leaves_no_node_behind() -> None:
    provide("test_scaled_tanh", lambda b, a: b.emit(aten.mm.default, a.a, a.a), "mm")
    gm, record = lowered(plain, X)
    assert targets_of(gm) == [scaled_tanh.overload]
    assert "mm" in record.rule_errors


def test_what_was_taken_back_is_not_shared() -> None:
    """The second provider emits what the refused one had emitted, anew."""
    provide("test_scaled_tanh", refusing(lambda b: b.refuse("no")), "first")
    provide("test_scaled_tanh", lambda b, a: b.emit(aten.mul.Tensor, b.emit(aten.exp.default, a.a), a.scale), "second", 1)
    gm, _ = lowered(lambda x: (tanh(x), tanh(x, 2.0)), X)
    assert targets_of(gm).count(aten.exp.default) == 1
    assert torch.equal(gm(X)[1], X.exp() * 2)


def test_an_argument_that_the_provider_does_not_read_must_have_its_default() -> None:
    provide("test_scaled_tanh", lambda b, a: b.emit(aten.tanh.default, a.a))
    _, record = lowered(lambda x: (tanh(x, 1), tanh(x, 3)), X)
    assert [(site.lowered_to, site.reason) for site in record.sites] == [("made", None), (REFERENCE, "made: it does not take scale=3")]


def test_a_tensor_argument_that_is_not_read() -> None:
    provide("rms_norm", lambda b, a: b.emit(aten.mul.Tensor, a.x, a.eps))
    _, record = lowered(lambda x, w: (rms_norm(x, None, 2.0), rms_norm(x, w, 2.0)), X, torch.ones(3))
    assert [site.reason for site in record.sites] == [None, "made: it does not take weight=a tensor"]


def test_an_argument_that_the_op_has_not() -> None:
    provide("test_scaled_tanh", lambda b, a: a.slope)
    _, record = lowered(plain, X)
    assert "the semantic op has no argument 'slope'; it has a, scale" in str(record.sites[0].reason)


@pytest.mark.parametrize(
    ("lowering", "reason"),
    [
        (lambda b, a: b.cast(a.a, torch.float16), "it gives torch.float16 where the model has torch.float32"),
        (lambda b, a: b.transpose(a.a, 0, 1), "it gives shape [3, 2] where the model has [2, 3]"),
    ],
    ids=["dtype", "shape"],
)
def test_a_result_of_another_kind_is_refused(lowering: Lowering, reason: str) -> None:
    provide("test_scaled_tanh", lowering)
    gm, record = lowered(plain, X)
    assert targets_of(gm) == [scaled_tanh.overload]
    assert record.sites[0].reason == f"made: {reason}"


# -------------------------------------------------------------------- sharing and memory


def test_equal_computations_of_two_calls_are_emitted_once() -> None:
    provide("test_scaled_tanh", emit_tanh)
    gm, _ = lowered(lambda x: tanh(x, 2.0) + tanh(x, 3.0) * tanh(x, 2.0), X)
    assert targets_of(gm).count(aten.tanh.default) == 1
    assert targets_of(gm).count(aten.mul.Tensor) == 3
    torch.testing.assert_close(gm(X), X.tanh() * 2 + X.tanh() * 3 * X.tanh() * 2)


def test_results_that_the_caller_gets_are_tensors_of_their_own() -> None:
    provide("test_scaled_tanh", emit_tanh)
    gm, _ = lowered(lambda x: (tanh(x), tanh(x), tanh(x), tanh(x).t()), X)
    assert targets_of(gm).count(aten.tanh.default) == 1
    results = gm(X)
    assert len({result.untyped_storage().data_ptr() for result in results}) == 4
    for result in results:
        torch.testing.assert_close(result, X.tanh() if result.shape == X.shape else X.tanh().t())


def test_a_result_is_no_alias_of_an_input() -> None:
    provide("test_scaled_tanh", lambda b, a: b.cast(a.a, torch.float32), "nothing")
    gm, record = lowered(lambda x: (tanh(x), tanh(x) + 1), X)
    assert record.sites[0].lowered_to == "nothing"
    assert targets_of(gm) == [aten.clone.default, aten.add.Tensor]
    assert gm(X)[0].data_ptr() != X.data_ptr()


def test_calls_that_write_or_draw_are_not_shared() -> None:
    def noisy(b: Builder, a: Arguments) -> Node:
        fresh = b.emit(aten.clone.default, b.emit(aten.rand_like.default, a.a))
        return b.emit(aten.add.Tensor, b.emit(aten.add_.Tensor, fresh, 1), a.scale)

    provide("test_scaled_tanh", noisy)
    gm, _ = lowered(lambda x: tanh(x) + tanh(x), X)
    assert [targets_of(gm).count(target) for target in (aten.rand_like.default, aten.add_.Tensor)] == [2, 2]


def test_what_nobody_uses_is_erased() -> None:
    def wasteful(b: Builder, a: Arguments) -> Node:
        b.emit(aten.exp.default, b.emit(aten.sin.default, a.a))
        b.constant("unused", lambda: torch.ones(3))
        return emit_tanh(b, a)

    provide("test_scaled_tanh", wasteful)
    gm, _ = lowered(plain, X)
    assert targets_of(gm) == [aten.tanh.default, aten.mul.Tensor]
    assert not list(gm.buffers())


def emit_column_major(b: Builder, a: Arguments) -> Node:
    """tanh, stored column by column."""
    turned = b.emit(aten.clone.default, b.transpose(b.emit(aten.tanh.default, a.a), 0, 1), memory_format=torch.contiguous_format)
    return b.transpose(turned, 0, 1) if a.scale else turned


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_memory_layout_is_restored_where_somebody_may_rely_on_it(dynamic: bool) -> None:
    provide("test_scaled_tanh", emit_column_major)
    gm, record = lowered(lambda x: tanh(x * 1), X, dynamic=dynamic)
    assert record.sites[0].lowered_to == "made"
    assert gm(X).stride() == (3, 1)
    assert targets_of(gm).count(aten.clone.default) == 2
    inside, _ = lowered(lambda x: tanh(x) + 1, X, dynamic=dynamic)
    assert targets_of(inside).count(aten.clone.default) == 1
    assert torch.equal(inside(X), X.tanh() + 1)


# -------------------------------------------------------------------- what a builder knows and makes


def built(make: Callable[[Builder, Node], Node], *inputs: Tensor, dynamic: bool = False, dry_run: bool = False) -> GraphModule:
    """A graph in which a call of tanh became what `make` emits for its argument, times 0, plus the argument."""

    def lowering(b: Builder, a: Arguments) -> Node:
        made = make(b, a.a)
        assert made is not a.scale
        return b.emit(aten.add.Tensor, a.a, b.emit(aten.mul.Tensor, b.emit(aten.sum.default, made), 0))

    provide("test_scaled_tanh", lowering)
    gm, record = lowered(plain, *inputs, dynamic=dynamic, dry_run=dry_run)
    assert not record.rule_errors, record.rule_errors
    assert record.sites[0].lowered_to == "made", record.sites[0].reason
    return gm


def test_sizes() -> None:
    sizes: list[Any] = []

    def make(b: Builder, x: Node) -> Node:
        sizes[:] = [b.size(x, 0), b.size(x, -1)]
        return b.reshape(x, [sizes[1], sizes[0]])

    gm = built(make, torch.ones(4, 5))
    assert sizes == [4, 5]
    gm = built(make, torch.ones(4, 5), dynamic=True)
    assert all(isinstance(size, Node) for size in sizes)
    assert torch.equal(gm(torch.ones(6, 7)), torch.ones(6, 7))


def test_nothing_is_emitted_for_what_is_so_already() -> None:
    def make(b: Builder, x: Node) -> Node:
        assert b.cast(x, torch.float32) is x
        assert b.contiguous(x) is x
        assert b.reshape(x, [b.size(x, 0), b.size(x, 1)]) is x
        assert b.transpose(b.transpose(x, 0, 1), -1, 0) is x
        return x

    for dynamic in (False, True):
        built(make, torch.ones(4, 5), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
def test_contiguous_copies_a_view(dynamic: bool) -> None:
    def make(b: Builder, x: Node) -> Node:
        copied = b.contiguous(b.transpose(x, 0, 1))
        assert copied.target is aten.clone.default
        assert b.val(copied).stride()[1] == 1
        return copied

    built(make, torch.ones(4, 5), dynamic=dynamic)


def test_what_is_known_of_sizes() -> None:
    def make(b: Builder, x: Node) -> Node:
        rows = b.size(x, 0)
        assert b.equal(rows, b.val(x).shape[0])
        assert not b.equal(rows, b.size(x, 1))
        assert b.at_least(rows, 1)
        assert not b.at_least(rows, 5)
        return x

    gm = built(make, torch.ones(4, 5), dynamic=True)
    assert not next(node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")).fake_mode.shape_env.guards


def test_constants_are_made_once() -> None:
    made: list[int] = []

    def ones() -> Tensor:
        made.append(1)
        return torch.ones(3)

    provide("test_scaled_tanh", lambda b, a: b.emit(aten.mul.Tensor, emit_tanh(b, a), b.constant("ones", ones)))
    gm, _ = lowered(lambda x: tanh(x) + tanh(x, 2.0), X)
    assert made == [1]
    assert len(list(gm.buffers())) == 1
    assert len(list(gm.graph.find_nodes(op="get_attr"))) == 1
    torch.testing.assert_close(gm(X), X.tanh() * 3)


def test_constants_of_a_dry_run_are_fake() -> None:
    """The device for which a graph is explained may be absent."""
    gm = built(lambda b, x: b.constant("on an npu", lambda: torch.ones(3)), X, dry_run=True)
    assert [type(buffer).__name__ for buffer in gm.buffers()] == ["FakeTensor"]
    gm = built(lambda b, x: b.constant("here", lambda: torch.ones(3)), X)
    assert [type(buffer) for buffer in gm.buffers()] == [Tensor]


# -------------------------------------------------------------------- the whole graph


def test_reference_only_says_why_and_tries_no_provider() -> None:
    provide("test_scaled_tanh", lambda b, a: pytest.fail("tried"))
    gm, record = lowered(plain, X, reference_only="no NPU here")
    assert targets_of(gm) == [scaled_tanh.overload]
    assert record.notes == ["no NPU here"]
    assert (record.sites[0].lowered_to, record.sites[0].reason) == (REFERENCE, None)
    _, record = lowered(lambda x: x + 1, X, reference_only="no NPU here")
    assert record.notes == []


def test_a_target_that_needs_other_tensors() -> None:
    gm = aten_graph(lambda x: x + 1, X)
    assert elsewhere(gm, FusionConfig(target="cpu")) is None
    assert elsewhere(gm, FusionConfig(target="ascend910b", emulate=True)) is None
    message = elsewhere(gm, FusionConfig(target="ascend910b"))
    assert message == (
        "target ascend910b needs tensors on npu, these are on cpu: fused ops run as their references; "
        "options={'emulate': True} runs the Ascend lowering on CPU tensors"
    )
    assert "needs tensors on cuda" in str(elsewhere(gm, FusionConfig(target="cuda")))


def test_lifted_ops_that_no_rule_took_are_lowered_back() -> None:
    gm = aten_graph(lambda x, w: torch.ops.npu_fusion_lifted.rms_norm(x, [3], w, 1e-6), X, torch.ones(3))
    record = GraphRecord(FusionConfig(target="cpu"))
    lower_graph(gm, record.config, record)
    assert all(node.target.namespace == "aten" for node in gm.graph.nodes if node.op == "call_function")


def test_arguments_by_position_name_and_default() -> None:
    gm = aten_graph(lambda x, y, w: add_rms_norm(x, y, w, 1e-6, weight_offset=1), X, X, torch.ones(3))
    [call] = calls_of(gm, add_rms_norm)
    arguments = Arguments(call)
    assert [node.name for node in (arguments.x, arguments.residual, arguments.weight)] == [node.name for node in call.args[:3]]
    assert (arguments.eps, arguments.bias) == (1e-6, None)
    assert arguments.unread() == {"weight_offset": 1}
    assert arguments.weight_offset == 1
    assert arguments.unread() == {}


def test_every_target_is_known_to_the_table_of_providers() -> None:
    for target in TARGETS:
        assert providers_of("glu", target) == []
    assert glu.name == "glu"
