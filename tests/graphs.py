"""What the tests of the engine share: small ATen graphs, their views, and semantic ops of the tests' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from npu_fusion import FusionConfig, GraphRecord
from npu_fusion.match import MatchResult, find_matches
from npu_fusion.pattern import Pattern, State
from npu_fusion.pipeline import fuse_graph
from npu_fusion.rule import AnyRule, in_order
from npu_fusion.semantic import NAMESPACE, SemanticOp
from npu_fusion.view import Value, View, build_view

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def test_op(schema: str) -> Callable[[Callable[..., Any]], SemanticOp]:
    """Declare a semantic op for tests, outside the table of the package's own. Its reference is its fake kernel too."""

    def declare(reference: Callable[..., Any]) -> SemanticOp:
        name = f"test_{reference.__name__}"
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", reference, lib=_LIBRARY)
        return SemanticOp(name, "test", schema, reference)

    return declare


test_op.__test__ = False  # type: ignore[attr-defined]  # no test, whatever its name


@test_op("(Tensor a, Tensor b, Tensor c) -> Tensor")
def muladd(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c."""
    return a * b + c


@test_op("(Tensor a, Tensor b) -> (Tensor, Tensor)")
def sumdiff(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a + b and a - b."""
    return a + b, a - b


@test_op("(Tensor a, Scalar scale=1) -> Tensor")
def scaled_tanh(a: torch.Tensor, scale: float = 1) -> torch.Tensor:
    """tanh(a) * scale."""
    return torch.tanh(a) * scale


def aten_graph(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> GraphModule:
    """The ATen graph of `fn`, with fake tensors in `meta["val"]`. Sizes are symbols if `dynamic`, equal sizes the same one."""
    with torch.no_grad():
        return make_fx(fn, tracing_mode="symbolic" if dynamic else "fake")(*args)


def view_of(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> tuple[View, list[Value]]:
    """The view of a function's graph, and the values that it returns."""
    view = build_view(aten_graph(fn, *args, dynamic=dynamic).graph)
    output = next(iter(view.graph.find_nodes(op="output")))
    returned = output.args[0] if isinstance(output.args[0], (tuple, list)) else [output.args[0]]
    return view, [view.of[node] for node in returned]


def ways(pattern: Pattern, value: Value) -> list[dict[str, Any]]:
    """The bindings of every way in which the pattern fits the value."""
    state = State()
    found = [dict(state.bindings) for _ in pattern.match(value, state)]
    assert not state.bindings, "a match must leave no binding behind"
    assert not state.visited
    assert not state.forms
    return found


def failure_of(pattern: Pattern, value: Value) -> str:
    """The reason why the pattern does not fit."""
    state = State()
    assert not list(pattern.match(value, state))
    assert state.failure is not None
    return state.failure.reason


def matches_of(view: View, *rules: AnyRule, config: FusionConfig | None = None) -> MatchResult:
    return find_matches(view, in_order(rules), config or FusionConfig())


def fuse_with(gm: GraphModule, rules: Sequence[AnyRule], **options: Any) -> GraphRecord:
    """Rewrite a graph in place under these rules alone."""
    config = FusionConfig(rules=(), extra_rules=tuple(rules), target="cpu", **options)
    record = GraphRecord(config)
    fuse_graph(gm, config, record)
    gm.recompile()
    return record


def calls_of(gm: GraphModule, op: SemanticOp) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.target is op.overload]
