"""Blocks that do not depend on each other call their collectives in the order of the program, whatever compiles them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion
from npu_fusion import moe
from npu_fusion.moe import transport

pytestmark = pytest.mark.usefixtures("alone")

EXPERTS, HIDDEN, TOP_K = 8, 16, 2
SIZES = (3, 9, 5, 7)  # tokens of each of the blocks, by which the calls are told apart


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the transport is asked to do."""
    seen: list[str] = []
    send, back = transport.Alone.send, transport.Alone.give_back

    def sending(self: Any, payload: Tensor, meta: Tensor, route: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
        seen.append(f"send {len(payload)}")
        return send(self, payload, meta, route, max_tokens)

    def giving_back(self: Any, rows: Tensor, route: Tensor, max_tokens: int) -> Tensor:
        seen.append(f"back {len(route)}")
        return back(self, rows, route, max_tokens)

    monkeypatch.setattr(transport.Alone, "send", sending)
    monkeypatch.setattr(transport.Alone, "give_back", giving_back)
    return seen


def block(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    sent = moe.dispatch(x, ids, weights, EXPERTS)
    return moe.combine(sent.rows, sent)


def blocks(*inputs: Tensor) -> Tensor:
    """The results are used in another order than they are made in, and the last block's not at all."""
    results = [block(*inputs[at : at + 3]) for at in range(0, len(inputs), 3)]
    return (results[2] @ results[0].mT) @ (results[0] @ results[1].mT)  # matrix products: Inductor has nothing to compile for them


def inputs() -> list[Tensor]:
    made = []
    for tokens in SIZES:
        ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
        made += [torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, TOP_K)]
    return made


FORWARD = [f"{what} {tokens}" for tokens in SIZES for what in ("send", "back")]


@pytest.mark.parametrize(
    ("backend", "options"), [("aot_eager", None), ("npu_fusion", None), ("npu_fusion", {"executor": "inductor"}), ("inductor", None)]
)
def test_independent_blocks_keep_their_order(backend: str, options: dict[str, str] | None, calls: list[str]) -> None:
    given = inputs()
    expected = blocks(*given)
    calls.clear()
    with torch.no_grad():
        actual = torch.compile(blocks, backend=backend, fullgraph=True, options=options)(*given)
    torch.testing.assert_close(actual, expected)
    assert calls == FORWARD


def test_a_backward_calls_all_of_eager_s_collectives(calls: list[str]) -> None:
    given = inputs()
    for x in given[::3]:
        x.requires_grad_()
    blocks(*given).sum().backward()
    eager, expected = list(calls), [x.grad for x in given[:9:3]]
    calls.clear()
    for x in given[::3]:
        x.grad = None
    torch.compile(blocks, backend="npu_fusion", fullgraph=True)(*given).sum().backward()
    assert calls[: len(FORWARD)] == FORWARD
    assert sorted(calls) == sorted(eager)
    torch.testing.assert_close([x.grad for x in given[:9:3]], expected)


def test_our_graphs_have_plain_calls_in_order() -> None:
    """So that rules see them, and nothing stands in the way of a capture."""
    compiled = torch.compile(blocks, backend="npu_fusion", fullgraph=True)
    with torch.no_grad():
        compiled(*inputs())
    graph = npu_fusion.report(compiled).graph("lowered").graph
    calls = [node for node in graph.nodes if "moe_" in str(node.target)]
    assert [node.target._opname for node in calls] == ["moe_dispatch", "moe_combine"] * len(SIZES)
    assert [node.kwargs["max_tokens"] for node in calls] == [size for size in SIZES for _ in range(2)]
    assert len(graph.find_nodes(op="placeholder")) == 3 * len(SIZES)
    assert not any("token" in str(node.target) or "effects" in str(node.target) for node in graph.nodes)
