"""Collectives in one op with what stands around them: what is fused, what is not, what it computes, and what Ascend runs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import npu_fusion
from npu_fusion import moe
from npu_fusion.numerics import assert_within_contract

from .ranks import Ranks

pytestmark = pytest.mark.usefixtures("alone")

EXPERTS, TOP_K, HIDDEN, INNER, BATCH, LENGTH = 4, 2, 1024, 32, 2, 3
TOKENS = BATCH * LENGTH
Layer = Callable[..., Any]


def norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def routed(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, *, most: int = TOKENS, absent: bool = False) -> Tensor:
    """The experts of a layer, over all ranks."""
    weights, ids = torch.topk(logits.softmax(-1), TOP_K)
    ids = torch.where(ids == 0, -1, ids) if absent else ids
    sent = moe.dispatch(x, ids, weights, EXPERTS, max_tokens=most)
    if x.dtype != torch.bfloat16:  # for which alone a CPU has grouped products
        return moe.combine(sent.rows * 2, sent)
    ends = sent.counts.cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(sent.rows, gate_up, ends).chunk(2, -1)
    return moe.combine(torch._grouped_mm(torch.nn.functional.silu(gate) * up, down, ends), sent)


def inputs(dtype: torch.dtype = torch.bfloat16, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    generator, common = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(9)

    def normal(*sizes: int, scale: float = 1.0, of: torch.Generator = generator) -> Tensor:
        return (torch.randn(*sizes, generator=of) * scale).to(dtype)

    gate_up, down = normal(EXPERTS, HIDDEN, 2 * INNER, scale=0.03, of=common), normal(EXPERTS, INNER, HIDDEN, scale=0.2, of=common)
    return {
        "x": normal(TOKENS, HIDDEN),
        "logits": torch.randn(TOKENS, EXPERTS, generator=generator),
        "gate_up": gate_up.chunk(ranks)[rank],
        "down": down.chunk(ranks)[rank],
        "stream": normal(BATCH, LENGTH, HIDDEN),
        "weight": normal(HIDDEN),
        "shared": normal(BATCH, LENGTH, HIDDEN),
    }


def block(given: dict[str, Tensor], *, swapped: bool = False, with_shared: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """A decoder layer's end and the next one's norm, as transformers writes them."""
    y = routed(given["x"], given["logits"], given["gate_up"], given["down"], **options).view(BATCH, LENGTH, HIDDEN)
    y = y + given["shared"] if with_shared else y
    total = y + given["stream"] if swapped else given["stream"] + y
    return norm(total, given["weight"]), total


def compiled(layer: Layer, *args: Any, dynamic: bool = False, **options: Any) -> tuple[Any, npu_fusion.FusionReport]:
    torch.compiler.reset()
    made = torch.compile(layer, backend="npu_fusion", fullgraph=True, dynamic=dynamic, options=options or None)
    with torch.no_grad():
        result = made(*args)
    report = npu_fusion.report(made)
    assert not report.rule_errors, report.rule_errors
    return result, report


def same(actual: Any, layer: Layer, *args: Any) -> None:
    with torch.no_grad():
        expected = layer(*args)
    for mine, theirs in zip(actual, expected, strict=True):
        assert_within_contract(mine, theirs, theirs.double(), theirs.dtype, "result")


def calls(report: npu_fusion.FusionReport, stage: str = "lowered") -> list[str]:
    """The collectives and products of a graph, in order."""
    found = [str(node.target) for node in report.graph(stage).graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in found if "moe_dis" in name or "moe_comb" in name or "grouped" in name or "deep_moe" in name]


# -------------------------------------------------------------------- combine, residual sum, norm


@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize(("dtype", "swapped", "dynamic"), [(torch.bfloat16, False, False), (torch.float32, True, True)])
def test_combine_sum_and_norm_are_one_op(dtype: torch.dtype, swapped: bool, dynamic: bool, with_shared: bool) -> None:
    def layer(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return block(given, swapped=swapped, with_shared=with_shared)

    given = inputs(dtype)
    actual, report = compiled(layer, given, dynamic=dynamic)
    report.expect(residual_add=1, rms_norm=1)
    assert report.ops["moe_combine_add_rms_norm"] == 1
    assert [name for name in calls(report) if "comb" in name] == ["moe_combine_add_rms_norm"]
    same(actual, layer, given)


def test_shared_experts_are_added_by_the_combine() -> None:
    def layer(given: dict[str, Tensor]) -> list[Tensor]:
        y = routed(given["x"], given["logits"], given["gate_up"], given["down"])
        return [given["shared"] + y.view(BATCH, LENGTH, HIDDEN)]

    given = inputs(torch.float32)
    actual, report = compiled(layer, given)
    [combine] = [node for node in report.graph("fused").graph.nodes if "moe_combine" in str(node.target)]
    assert combine.args[6] is not None
    assert calls(report).count("moe_combine") == 1
    same(actual, layer, given)
    _, exact = compiled(layer, inputs(), rounding="exact")
    [combine] = [node for node in exact.graph("fused").graph.nodes if "moe_combine" in str(node.target)]
    assert combine.args[6:] in ((), (None,))


def read_elsewhere(y: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    total = given["stream"] + y.view(BATCH, LENGTH, HIDDEN)
    return [norm(total, given["weight"]), total, y]


def other_width(y: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    total = given["stream"].view(TOKENS, 2, -1) + y.view(TOKENS, 2, -1)
    return [norm(total, given["weight"][: HIDDEN // 2]), total]


def broadcast(y: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    return [y.view(BATCH, LENGTH, HIDDEN) + given["shared"][:, :1]]


def of_another_dtype(y: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    total = given["stream"].float() * 1.5 + y.view(BATCH, LENGTH, HIDDEN)
    return [norm(total, given["weight"].float()), total]


@pytest.mark.parametrize("then", [read_elsewhere, other_width, broadcast, of_another_dtype])
def test_look_alikes_keep_their_combine(then: Callable[[Tensor, dict[str, Tensor]], list[Tensor]]) -> None:
    def layer(given: dict[str, Tensor]) -> list[Tensor]:
        return then(routed(given["x"], given["logits"], given["gate_up"], given["down"]), given)

    given = inputs()
    actual, report = compiled(layer, given)
    assert [name for name in calls(report) if "moe" in name] == ["moe_dispatch", "moe_combine"]
    [combine] = [node for node in report.graph("fused").graph.nodes if "moe_combine" in str(node.target)]
    assert combine.args[6:] in ((), (None,))
    same(actual, layer, given)


def test_a_collective_between_is_not_passed() -> None:
    """The residual stream comes of another block's combine, which is called after this one's: their order is the program's."""

    def layer(given: dict[str, Tensor]) -> list[Tensor]:
        x = given["x"]
        y = routed(x, given["logits"], given["gate_up"], given["down"])
        other = routed(-x, given["logits"], given["gate_up"], given["down"])
        total = y + other.sin()
        return [norm(total, given["weight"]), total]

    given = inputs()
    actual, report = compiled(layer, given)
    order = [name for name in calls(report) if "moe" in name]
    assert order[:3] == ["moe_dispatch", "moe_combine", "moe_dispatch"]
    assert len(order) == 4
    same(actual, layer, given)


# -------------------------------------------------------------------- all of a layer's experts


def whole(given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    return [routed(given["x"], given["logits"], given["gate_up"], given["down"], **options)]


def not_what_was_sent(given: dict[str, Tensor]) -> list[Tensor]:
    """The combine has other weights than the dispatch."""
    weights, ids = torch.topk(given["logits"].softmax(-1), TOP_K)
    sent = moe.dispatch(given["x"], ids, weights, EXPERTS, max_tokens=TOKENS)
    ends = sent.counts.cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(sent.rows, given["gate_up"], ends).chunk(2, -1)
    rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, given["down"], ends)
    return [torch.ops.npu_fusion.moe_combine(rows, ids, weights * 2, sent.handle, **sent.form)]


@pytest.mark.parametrize(("layer", "forms"), [(whole, 1), (not_what_was_sent, 0)])
def test_a_layer_s_experts_are_known_as_a_whole(layer: Layer, forms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found, whatever a target makes of it: on a CPU the parts are as cheap."""
    from npu_fusion import pipeline

    found: list[str] = []
    find = pipeline.find_matches

    def finding(*args: Any) -> Any:
        result = find(*args)
        found.extend(match.rule.name for match in result.matches)
        return result

    monkeypatch.setattr(pipeline, "find_matches", finding)
    given = inputs()
    actual, report = compiled(layer, given)
    assert found.count("grouped_linear") == 2
    assert found.count("fused_deep_moe") == forms
    assert [name for name in calls(report) if "moe" in name] == ["moe_dispatch", "moe_combine"]
    same(actual, layer, given)


@pytest.mark.parametrize("with_shared", [False, True])
def test_the_whole_is_its_parts(with_shared: bool) -> None:
    given = inputs()
    weights, ids = torch.topk(given["logits"].softmax(-1), TOP_K)
    form = {"group": str(dist.group.WORLD.group_name), "ranks": 1, "experts": EXPERTS, "max_tokens": TOKENS}
    shared = given["x"] if with_shared else None
    y = torch.ops.npu_fusion.fused_deep_moe(given["x"], ids, weights, given["gate_up"], given["down"], shared=shared, **form)
    expected = whole(given)[0] + (given["x"] if with_shared else 0)
    assert_within_contract(y, expected, expected.double(), y.dtype, "result")


# -------------------------------------------------------------------- Ascend

FUSED = ["npu_moe_distribute_dispatch_v2", "npu_grouped_matmul", "npu_grouped_matmul", "npu_moe_distribute_combine_add_rms_norm"]
APART = [*FUSED[:3], "npu_moe_distribute_combine_v2"]


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ("ascend910_93", {"with_shared": True}, FUSED),
        ("ascend910_93", {"most": TOKENS + 2}, FUSED),
        ("ascend910_93", {"absent": True}, APART),  # tokens without a choice that counts have no result there
        ("ascend910b", {"with_shared": True}, APART),
        ("ascend910b", {"absent": True, "most": TOKENS + 2}, APART),
    ],
)
def test_ascend_runs_its_own_ops(target: str, options: dict[str, Any], expected: list[str]) -> None:
    def layer(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return block(given, **options)

    given = inputs()
    actual, report = compiled(layer, given, target=target, emulate=True)
    assert calls(report) == expected
    same(actual, layer, given)


def test_ascend_keeps_the_model_s_rounding() -> None:
    """`exact`: the op adds up what the model rounds in between."""
    given = inputs()
    actual, report = compiled(block, given, target="ascend910_93", emulate=True, rounding="exact")
    assert calls(report) == APART
    same(actual, block, given)


def emulated_ranks(target: str) -> None:
    given = inputs(rank=dist.get_rank(), ranks=dist.get_world_size())
    actual, report = compiled(block, given, target=target, emulate=True)
    assert calls(report) == (FUSED if target == "ascend910_93" else APART)
    same(actual, block, given)


@pytest.mark.slow
@pytest.mark.xdist_group("moe")
@pytest.mark.parametrize("target", ["ascend910_93", "ascend910b"])
def test_emulated_over_two_ranks(two: Ranks, target: str) -> None:
    two.run(emulated_ranks, target)
