"""Routed experts: every spelling that is recognised, look-alikes that are not, numerics against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (declares grouped_mm_fallback)
from torch import Tensor

from npu_fusion import FusionReport
from tests.patterns.support import fused_within_contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, HIDDEN, INNER, EXPERTS, K = 6, 16, 32, 8, 2

Experts = Callable[..., Tensor]


def inputs(dtype: torch.dtype = BF16, weights_dtype: torch.dtype | None = None, *, biases: bool = False) -> list[Tensor]:
    """Tokens, ids, weights, gate_up [E, 2I, H], down [E, H, I], and their biases if asked for."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(TOKENS, HIDDEN).to(dtype),
        torch.rand(TOKENS, EXPERTS).topk(K).indices,
        torch.rand(TOKENS, K).to(weights_dtype or dtype),
        (torch.randn(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5).to(dtype),
        (torch.randn(EXPERTS, HIDDEN, INNER) * INNER**-0.5).to(dtype),
    ]
    return [*tensors, torch.randn(EXPERTS, 2 * INNER).to(dtype), torch.randn(EXPERTS, HIDDEN).to(dtype)] if biases else tensors


# -------------------------------------------------------------------- spellings


def swiglu(merged: Tensor) -> Tensor:
    gate, up = merged.chunk(2, dim=-1)
    return F.silu(gate) * up


def clipped(merged: Tensor) -> Tensor:
    gate, up = merged[..., ::2].clamp(max=7.0), merged[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def ends_of(ids: Tensor) -> Tensor:
    return torch.cumsum(torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1), dim=0, dtype=torch.int32)


def back(rows: Tensor, order: Tensor) -> Tensor:
    """The rows as they lay before they were ordered."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.size(0), device=order.device)
    return rows[inverse]


def grouped(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor, act: Any = swiglu, product: Any = F.grouped_mm) -> Tensor:
    """transformers' grouped_mm."""
    ordered, order = torch.sort(ids.reshape(-1))
    ends = ends_of(ordered)
    hidden = act(product(x[order // K], gate_up.transpose(-2, -1), offs=ends))
    rows = product(hidden, down.transpose(-2, -1), offs=ends) * w.reshape(-1)[order].unsqueeze(-1)
    return back(rows, order).view(x.size(0), K, -1).sum(dim=1).to(x.dtype)


def fallback(*args: Tensor) -> Tensor:
    """What transformers calls for other types than bfloat16."""
    return grouped(*args, product=lambda x, weight, offs: torch.ops.transformers.grouped_mm_fallback(x, weight, offs))


def grouped_with_biases(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    ordered, order = torch.sort(ids.reshape(-1))
    ends = ends_of(ordered)
    hidden = clipped(F.grouped_mm(x[order // K], gate_up.transpose(-2, -1), offs=ends) + b1[ordered])
    rows = (F.grouped_mm(hidden, down.transpose(-2, -1), offs=ends) + b2[ordered]) * w.reshape(-1)[order].unsqueeze(-1)
    return back(rows, order).view(x.size(0), K, -1).sum(dim=1).to(x.dtype)


def weighted_late(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Rows repeated before they are sorted; the weights come after the way back, which a second sort finds."""
    order = ids.view(-1).argsort(stable=True)
    ends = ends_of(ids.view(-1))
    repeated = x.unsqueeze(1).expand(-1, K, -1).reshape(-1, HIDDEN)
    rows = torch._grouped_mm(swiglu(torch._grouped_mm(repeated[order], gate_up.mT, offs=ends)), down.mT, offs=ends)
    return (rows[order.argsort()].view(-1, K, HIDDEN) * w.unsqueeze(-1)).sum(1)


def torchtitan(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    order = torch.argsort(ids.view(-1), stable=True)
    ends = torch.cumsum(torch.histc(ids.view(-1).float(), bins=EXPERTS, min=0, max=EXPERTS), dim=0, dtype=torch.int32)
    token = (order // K).reshape(-1, 1).expand(-1, HIDDEN)
    rows = torch.gather(x, dim=0, index=token)
    w1, w3 = gate_up[:, :INNER], gate_up[:, INNER:]
    hidden = F.silu(torch._grouped_mm(rows, w1.mT, offs=ends)) * torch._grouped_mm(rows, w3.mT, offs=ends)
    rows = torch._grouped_mm(hidden, down.mT, offs=ends)
    return torch.zeros_like(x).scatter_add(0, token, (rows.float() * w.view(-1)[order].reshape(-1, 1)).to(x.dtype))


def added_by_index(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    ordered, order = torch.sort(ids.reshape(-1))
    ends, token = ends_of(ordered), order // K
    hidden = swiglu(F.grouped_mm(x[token], gate_up.mT, offs=ends))
    rows = F.grouped_mm(hidden, down.mT, offs=ends) * w.reshape(-1)[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, token, rows)


def batched(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor, act: Any = swiglu) -> Tensor:
    """transformers' batched_mm."""
    flat = ids.reshape(-1)
    hidden = act(torch.bmm(gate_up[flat], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1))
    rows = torch.bmm(down[flat], hidden.unsqueeze(-1)).squeeze(-1) * w.reshape(-1).unsqueeze(-1)
    return rows.view(x.size(0), K, -1).sum(dim=1).to(x.dtype)


def batched_with_biases(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    flat = ids.reshape(-1)
    rows = x.repeat_interleave(K, dim=0).unsqueeze(1)
    hidden = clipped(torch.bmm(rows, gate_up.mT[flat]).squeeze(1) + b1[flat])
    rows = (torch.bmm(hidden.unsqueeze(1), down.mT[flat]).squeeze(1) + b2[flat]) * w.reshape(-1, 1)
    return rows.view(x.size(0), K, -1).sum(dim=1)


def einsum(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    hidden = swiglu(torch.einsum("th,tkfh->tkf", x, gate_up[ids]))
    return torch.einsum("tkh,tk->th", torch.einsum("tkf,tkhf->tkh", hidden, down[ids]), w.to(x.dtype))


def einsum_sum(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = gate_up.mT.chunk(2, dim=-1)
    hidden = F.silu(torch.einsum("th,tkhf->tkf", x, gate[ids])) * torch.einsum("th,tkhf->tkf", x, up[ids])
    return (torch.einsum("tkf,tkhf->tkh", hidden, down[ids]) * w[..., None]).sum(dim=-2)


SPELLINGS: dict[str, Experts] = {
    "grouped": grouped,
    "weighted late": weighted_late,
    "torchtitan": torchtitan,
    "added by index": added_by_index,
    "batched": batched,
    "einsum": einsum,
    "einsum, sum": einsum_sum,
}
BIASED: dict[str, Experts] = {"grouped": grouped_with_biases, "batched": batched_with_biases}


def call_of(report: FusionReport) -> dict[str, Any]:
    """The keyword arguments of the only moe_experts call."""
    [call] = [node for node in report.graph("fused").graph.nodes if "moe_experts" in str(node.target)]
    return dict(call.kwargs)


def leftovers(report: FusionReport) -> set[str]:
    names = {getattr(node.target, "_opname", "") for node in report.graph("fused").graph.nodes}
    return names & {"_grouped_mm", "grouped_mm_fallback", "bmm", "sort", "index", "histc", "silu", "sum", "scatter_add"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_call(name: str) -> None:
    report = fused_within_contract(SPELLINGS[name], *inputs())
    assert report.idioms["experts"] == 1, [site.reason for site in report.missed]
    assert report.idioms["glu"] == 1
    assert not leftovers(report)


@pytest.mark.parametrize("name", BIASED)
def test_biases_and_limits_are_captured(name: str) -> None:
    report = fused_within_contract(BIASED[name], *inputs(biases=True))
    call = call_of(report)
    assert {call["gate_limit"], call["up_limit"], call["up_offset"]} == {7.0, 1.0}
    assert (call["layout"], call["alpha"]) == ("interleaved", pytest.approx(1.702))
    assert call["gate_up_bias"] is not None
    assert call["down_bias"] is not None
    assert not leftovers(report)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("experts", [fallback, batched, einsum_sum])
def test_dtypes(experts: Experts, dtype: torch.dtype) -> None:
    assert fused_within_contract(experts, *inputs(dtype)).idioms["experts"] == 1


@pytest.mark.parametrize("experts", [grouped, batched])
def test_weights_may_be_wider(experts: Experts) -> None:
    report = fused_within_contract(experts, *inputs(BF16, FP32))
    assert report.idioms["experts"] == 1
    assert call_of(report)["product_dtype"] is FP32


@pytest.mark.parametrize("experts", [grouped, batched, einsum_sum])
def test_the_number_of_tokens_may_be_symbolic(experts: Experts) -> None:
    x, _, _, *matrices = inputs()

    def routed(x: Tensor, *matrices: Tensor) -> Tensor:
        weights, ids = torch.topk(torch.softmax(x[:, :EXPERTS].float(), dim=-1), K, dim=-1)
        return experts(x, ids, weights.to(x.dtype), *matrices)

    torch._dynamo.mark_dynamic(x, 0)
    report = fused_within_contract(routed, x, *matrices, dynamic=None)
    assert (report.idioms["router"], report.idioms["experts"]) == (1, 1)


@pytest.mark.parametrize("experts", [grouped, batched])
def test_experts_without_a_gate(experts: Experts) -> None:
    x, ids, w, gate_up, down = inputs()
    report = fused_within_contract(
        lambda *args: experts(*args, act=lambda rows: F.relu(rows).square()), x, ids, w, gate_up[:, :INNER], down
    )
    call = call_of(report)
    assert (call["gated"], call["activation"]) == (False, "relu2")


@pytest.mark.parametrize("experts", [grouped, batched, einsum])
def test_one_token(experts: Experts) -> None:
    x, ids, w, *matrices = inputs()
    assert fused_within_contract(experts, x[:1], ids[:1], w[:1], *matrices).idioms["experts"] == 1


@pytest.mark.parametrize("experts", [grouped, batched])
def test_all_tokens_to_one_expert(experts: Experts) -> None:
    x, ids, w, *matrices = inputs()
    assert fused_within_contract(experts, x, torch.full_like(ids, 3), w, *matrices).idioms["experts"] == 1


# -------------------------------------------------------------------- look-alikes


def other_tokens(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Rows are taken by order % T: those of other tokens."""
    ordered, order = torch.sort(ids.reshape(-1))
    ends = ends_of(ordered)
    hidden = swiglu(F.grouped_mm(x[order % TOKENS], gate_up.mT, offs=ends))
    rows = F.grouped_mm(hidden, down.mT, offs=ends) * w.reshape(-1)[order].unsqueeze(-1)
    return back(rows, order).view(x.size(0), K, -1).sum(dim=1)


def unordered_weights(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    ordered, order = torch.sort(ids.reshape(-1))
    ends = ends_of(ordered)
    rows = F.grouped_mm(swiglu(F.grouped_mm(x[order // K], gate_up.mT, offs=ends)), down.mT, offs=ends) * w.reshape(-1).unsqueeze(-1)
    return back(rows, order).view(x.size(0), K, -1).sum(dim=1)


def not_put_back(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Gathered by the order once more, not by its inverse."""
    ordered, order = torch.sort(ids.reshape(-1))
    ends = ends_of(ordered)
    hidden = swiglu(F.grouped_mm(x[order // K], gate_up.mT, offs=ends))
    rows = F.grouped_mm(hidden, down.mT, offs=ends) * w.reshape(-1)[order].unsqueeze(-1)
    return rows[order].view(x.size(0), K, -1).sum(dim=1)


def fewer_bins(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The ids are counted two to a bin."""
    ordered, order = torch.sort(ids.reshape(-1))
    ends = torch.cumsum(torch.histc(ordered.float(), bins=EXPERTS, min=0, max=2 * EXPERTS), dim=0, dtype=torch.int32)
    hidden = swiglu(F.grouped_mm(x[order // K], gate_up.mT, offs=ends))
    rows = F.grouped_mm(hidden, down.mT, offs=ends) * w.reshape(-1)[order].unsqueeze(-1)
    return back(rows, order).view(x.size(0), K, -1).sum(dim=1)


def other_down(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The second matrix is that of another expert."""
    flat = ids.reshape(-1)
    hidden = swiglu(torch.bmm(gate_up[flat], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1))
    rows = torch.bmm(down[(flat + 1) % EXPERTS], hidden.unsqueeze(-1)).squeeze(-1) * w.reshape(-1).unsqueeze(-1)
    return rows.view(x.size(0), K, -1).sum(dim=1)


def tiled_tokens(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Tokens repeated as a whole, one after the other: ids and rows do not belong together."""
    flat = ids.reshape(-1)
    hidden = swiglu(torch.bmm(gate_up[flat], x.repeat(K, 1).unsqueeze(-1)).squeeze(-1))
    rows = torch.bmm(down[flat], hidden.unsqueeze(-1)).squeeze(-1) * w.reshape(-1).unsqueeze(-1)
    return rows.view(x.size(0), K, -1).sum(dim=1)


def sum_of_tokens(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    hidden = swiglu(torch.einsum("th,tkfh->tkf", x, gate_up[ids]))
    return (torch.einsum("tkf,tkhf->tkh", hidden, down[ids]) * w[..., None]).sum(dim=0)


def transposed_ids(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    flat = ids.t().reshape(-1)
    hidden = swiglu(torch.bmm(gate_up[flat], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1))
    rows = torch.bmm(down[flat], hidden.unsqueeze(-1)).squeeze(-1) * w.reshape(-1).unsqueeze(-1)
    return rows.view(x.size(0), K, -1).sum(dim=1)


LOOK_ALIKES: list[Experts] = [
    other_tokens,
    unordered_weights,
    not_put_back,
    fewer_bins,
    other_down,
    tiled_tokens,
    sum_of_tokens,
    transposed_ids,
]


@pytest.mark.parametrize("experts", LOOK_ALIKES)
def test_look_alikes_stay_as_they_are(experts: Experts) -> None:
    assert fused_within_contract(experts, *inputs()).idioms["experts"] == 0


def test_a_miss_says_why() -> None:
    report = fused_within_contract(unordered_weights, *inputs())
    assert [site.idiom for site in report.missed] == ["experts"]
    assert report.missed[0].reason


def test_rows_that_are_used_elsewhere_stay_computed() -> None:
    def experts(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        ordered, _ = torch.sort(ids.reshape(-1))
        return grouped(x, ids, w, gate_up, down), ends_of(ordered)

    assert fused_within_contract(experts, *inputs()).idioms["experts"] == 1
