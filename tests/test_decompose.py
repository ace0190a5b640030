"""Ops of several parts: what nothing takes as a whole is taken apart, and the parts are lowered, with every reason in the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from npu_fusion import FusionConfig, GraphRecord, lower
from npu_fusion.lower import REFERENCE, Arguments, Builder, Provider, launches_of, lower_graph, register_provider
from npu_fusion.ops.norm_quant import add_rms_norm_quant, dequant_glu_quant, glu_quant, rms_norm_quant
from npu_fusion.ops.quant import quantize
from npu_fusion.record import Site
from npu_fusion.semantic import SemanticOp, find_semantic_op, semantic_ops
from tests.graphs import aten_graph

aten = torch.ops.aten
H = 16
X, GAMMA, COLUMNS = torch.randn(2, 3, H), torch.rand(H) + 0.5, torch.rand(H) * 1e-4
SUMS = torch.randint(-(2**16), 2**16, (2, 3, H), dtype=torch.int32)
FLOOR: dict[str, Any] = {"floor_mode": "amax", "floor": 1e-5}


def given(x: Tensor, gamma: Tensor) -> Any:
    return rms_norm_quant(x, gamma, 1e-5, torch.full((), 0.1), torch.full((), 3.0))[0]


COMPOSITES: dict[str, tuple[SemanticOp, Callable[..., Any], tuple[Tensor, ...]]] = {
    "rms_norm_quant": (rms_norm_quant, lambda x, w: rms_norm_quant(x, w, 1e-5, return_norm=True, **FLOOR), (X, GAMMA)),
    "rms_norm_quant, given": (rms_norm_quant, given, (X, GAMMA)),
    "add_rms_norm_quant": (add_rms_norm_quant, lambda x, r, w: add_rms_norm_quant(x, r, w, 1e-5, smooth=w), (X, X.flip(0), GAMMA)),
    "glu_quant": (glu_quant, lambda x: glu_quant(x, None, symmetric=False, with_zero=True, steps=255.0), (X,)),
    "dequant_glu_quant": (dequant_glu_quant, lambda x, c: dequant_glu_quant(x, c, round_dtype=torch.bfloat16), (SUMS, COLUMNS)),
}


@pytest.fixture(autouse=True)
def _no_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "_PROVIDERS", [])


def whole_quantize(b: Builder, a: Arguments) -> Sequence[Node | None]:
    """Takes a call as it is: what it emits says that it was here."""
    assert isinstance(b.node.target, torch._ops.OpOverload)
    call = b.emit_anew(b.node.target, *b.node.args, **b.node.kwargs)
    for spec in b.node.target._schema.arguments:
        getattr(a, spec.name)
    return b.results(call, 3)


def refuse(b: Builder, a: Arguments) -> Node:
    b.refuse("it is Friday")


def provide(op: str, lowering: Callable[..., Any], name: str, launches: int = 1) -> None:
    register_provider(Provider(name, op, ("cpu",), lowering, launches=launches))


def lowered(fn: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> tuple[GraphModule, Site]:
    gm = aten_graph(fn, *inputs, dynamic=dynamic)
    record = GraphRecord(FusionConfig(target="cpu"))
    record.sites += [Site("", True, call=node.name) for node in gm.graph.nodes if find_semantic_op(node.target)]
    lower_graph(gm, record.config, record)
    gm.graph.lint()
    assert not record.rule_errors
    return gm, record.sites[0]


def called(gm: GraphModule) -> list[str]:
    return [op.name for node in gm.graph.nodes if (op := find_semantic_op(node.target)) is not None]


def test_every_composite_is_tested() -> None:
    """mla_preprocess, whose reference has more than its parts in it, in tests/lowerings/ascend/test_mla.py; collectives in tests/moe."""
    elsewhere = {"mla_preprocess", "moe_combine_add_rms_norm", "fused_deep_moe"}
    assert {op.name for op in semantic_ops() if op.parts} == elsewhere | {op.name for op, _, _ in COMPOSITES.values()}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", COMPOSITES)
def test_taken_apart(case: str, dynamic: bool) -> None:
    """The parts are those that the op names, in their order, and compute the same bits."""
    op, fn, inputs = COMPOSITES[case]
    provide("quantize", whole_quantize, "one part")
    provide(op.name, refuse, "the whole")
    gm, site = lowered(fn, *inputs, dynamic=dynamic)
    assert called(gm) == list(op.parts)
    assert site.lowered_to == " + ".join([REFERENCE] * (len(op.parts) - 1) + ["one part"])
    assert site.reason == "; ".join(
        ["the whole: it is Friday", *(f"{part}: nothing on cpu is known to compute it" for part in op.parts[:-1])]
    )
    wanted = fn(*inputs)
    for actual, expected in zip(*((x,) if isinstance(x, Tensor) else x for x in (gm(*inputs), wanted)), strict=True):
        assert torch.equal(actual, expected)


def test_whole_where_no_part_has_a_provider() -> None:
    """The one reference is left as it is: nothing is won by taking it apart."""
    provide("glu_quant", refuse, "the whole")
    gm, site = lowered(lambda x: glu_quant(x, None), X)
    assert (called(gm), site.lowered_to, site.reason) == (["glu_quant"], REFERENCE, "the whole: it is Friday")


def test_no_provider_of_the_whole() -> None:
    provide("quantize", whole_quantize, "one part")
    gm, site = lowered(lambda x: glu_quant(x, None), X)
    assert called(gm) == ["glu", "quantize"]
    assert site.reason == "nothing on cpu is known to compute it; glu: nothing on cpu is known to compute it"


def test_equal_calls_are_taken_apart_each() -> None:
    """A part that was lowered is not given to a later call."""
    provide("quantize", whole_quantize, "one part")
    gm, _ = lowered(lambda x: (*glu_quant(x, None)[:2], *glu_quant(x, None)[:2]), X)
    results = gm(X)
    assert all(torch.equal(a, b) for a, b in zip(results[:2], results[2:]))


def test_a_value_that_is_no_nodes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A reference that makes a tensor out of nothing it was given cannot be taken apart: it runs as a whole, and the log says so."""
    provide("quantize", whole_quantize, "one part")
    outside = torch.ones(H)
    broken = SemanticOp("glu_quant", "quant", "", lambda gate, up, *args, **kwargs: quantize(gate * outside), glu_quant.parts)
    monkeypatch.setattr(lower, "find_semantic_op", lambda target: broken if target is glu_quant.overload else find_semantic_op(target))
    gm = aten_graph(lambda x: glu_quant(x, None)[0], X)
    record = GraphRecord(FusionConfig(target="cpu"))
    lower_graph(gm, record.config, record)
    assert called(gm) == ["glu_quant"]
    assert "NoParts" in record.rule_errors["glu_quant"]
    assert "cannot be taken apart" in caplog.text


def test_launches() -> None:
    """An op that nothing takes costs as much as its parts, where one of these has a provider."""
    config = FusionConfig(target="cpu")
    assert launches_of("dequant_glu_quant", config, False) == 1
    provide("quantize", whole_quantize, "two launches", launches=2)
    assert launches_of("dequant_glu_quant", config, False) == 4
    provide("dequant_glu_quant", refuse, "the whole")
    assert launches_of("dequant_glu_quant", config, False) == 1
