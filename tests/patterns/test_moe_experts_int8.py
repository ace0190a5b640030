"""Routed experts in int8: spellings, look-alikes, numerics against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_fusion import FusionConfig, FusionReport
from tests.patterns.support import fused_within_contract
from tests.patterns.test_moe_experts import BF16, EXPERTS, FP16, FP32, HIDDEN, INNER, TOKENS, K, back, ends_of, swiglu

Experts = Callable[..., Tensor]


def codes(*shape: int) -> tuple[Tensor, Tensor]:
    """int8 matrices [E, out, in], and the scales [E, out] of their channels."""
    return torch.randint(-127, 128, shape, dtype=torch.int8), (torch.rand(shape[:2]) + 0.5) * shape[2] ** -0.5 / 70


def inputs(dtype: torch.dtype = BF16) -> list[Tensor]:
    """Tokens, ids, weights, gate_up and its scale, down and its scale."""
    torch.manual_seed(0)
    routing = [torch.randn(TOKENS, HIDDEN).to(dtype), torch.rand(TOKENS, EXPERTS).topk(K).indices, torch.rand(TOKENS, K).to(dtype)]
    return [*routing, *codes(EXPERTS, 2 * INNER, HIDDEN), *codes(EXPERTS, HIDDEN, INNER)]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    return (x.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


def product(q: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(q.to(BF16), w.mT.to(BF16), offs=ends)


# -------------------------------------------------------------------- spellings


def rows_quantised(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, s1: Tensor, down: Tensor, s2: Tensor) -> Tensor:
    """A linear that quantises what it gets, called twice."""
    ordered, order = torch.sort(ids.reshape(-1))
    ends = ends_of(ordered)

    def linear(rows: Tensor, matrices: Tensor, scales: Tensor) -> Tensor:
        q, s = quantize(rows)
        return (product(q, matrices, ends).float() * s * scales[ordered]).to(x.dtype)

    rows = linear(swiglu(linear(x[order // K], gate_up, s1)), down, s2) * w.reshape(-1)[order].unsqueeze(-1)
    return back(rows, order).view(x.size(0), K, -1).sum(dim=1).to(x.dtype)


def tokens_quantised(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, s1: Tensor, down: Tensor, s2: Tensor) -> Tensor:
    """Tokens are quantised before they are sorted; gate and up are two products; the scales are multiplied first."""
    order = torch.argsort(ids.view(-1), stable=True)
    chosen, ends, token = ids.view(-1)[order], ends_of(ids.view(-1)), order // K
    q, s = quantize(x)
    q, s = q[token], s[token]
    gate = product(q, gate_up[:, :INNER], ends).float() * (s * s1[:, :INNER][chosen])
    up = product(q, gate_up[:, INNER:], ends).float() * (s * s1[:, INNER:][chosen])
    q, s = quantize(F.silu(gate) * up)
    rows = product(q, down, ends) * s2[chosen] * s
    return (rows[order.argsort()].view(-1, K, HIDDEN) * w.unsqueeze(-1)).sum(1).to(x.dtype)


def repeated(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, s1: Tensor, down: Tensor, s2: Tensor) -> Tensor:
    """Quantised tokens repeated before they are sorted, scales without their last dimension, added up by index."""
    ordered, order = torch.sort(ids.reshape(-1))
    ends = ends_of(ordered)
    q, s = quantize(x)
    q = q.unsqueeze(1).expand(-1, K, -1).reshape(-1, HIDDEN)[order]
    s = s.unsqueeze(1).expand(-1, K, -1).reshape(-1, 1)[order]
    h = swiglu(product(q, gate_up, ends).to(FP32) * s * s1.unsqueeze(1)[ordered].squeeze(1))
    q, s = quantize(h.to(x.dtype))
    rows = (product(q, down, ends).to(FP32) * s * s2[ordered]).to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // K, rows * w.reshape(-1)[order].unsqueeze(-1))


def gathered(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, s1: Tensor, down: Tensor, s2: Tensor, wrong: str = "") -> Tensor:
    """Matrices are gathered by id; products in floating point."""
    flat = ids.reshape(-1)
    q, s = quantize(x.repeat_interleave(K, dim=0))
    sums = torch.bmm(gate_up[flat].float(), q.unsqueeze(-1).float()).squeeze(-1)
    q, t = quantize(swiglu(sums * s * s1[flat]))
    t = s if wrong == "other scale" else t
    chosen = s2[flat.roll(1)] if wrong == "other experts" else s2[flat]
    rows = torch.bmm(down[flat].to(torch.int32), q.unsqueeze(-1).to(torch.int32)).squeeze(-1) * t * chosen * w.reshape(-1, 1)
    return rows.view(x.size(0), K, -1).sum(dim=1).to(x.dtype)


SPELLINGS: list[Experts] = [rows_quantised, tokens_quantised, repeated, gathered]


def call_of(report: FusionReport) -> dict[str, Any]:
    [call] = [node for node in report.graph("fused").graph.nodes if "moe_experts_int8" in str(node.target)]
    return dict(call.kwargs)


@pytest.mark.parametrize("experts", SPELLINGS)
def test_every_spelling_is_one_call(experts: Experts) -> None:
    report = fused_within_contract(experts, *inputs())
    assert report.ops["moe_experts_int8"] == 1, [site.reason for site in report.missed]
    assert (report.idioms["experts"], report.idioms["glu"], report.idioms["quantize"]) == (1, 1, 2)
    names = {getattr(node.target, "_opname", "") for node in report.graph("fused").graph.nodes}
    assert not names & {"_grouped_mm", "bmm", "sort", "index", "histc", "silu", "round", "amax", "index_add", "quantize", "glu_quant"}
    assert call_of(report)["floor"] == torch.tensor(1e-8).item()  # as fp32 holds it


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    assert fused_within_contract(rows_quantised, *inputs(dtype)).ops["moe_experts_int8"] == 1


def test_the_number_of_tokens_may_be_symbolic() -> None:
    x, _, _, *matrices = inputs()

    def routed(x: Tensor, *matrices: Tensor) -> Tensor:
        weights, ids = torch.topk(torch.softmax(x[:, :EXPERTS].float(), dim=-1), K, dim=-1)
        return tokens_quantised(x, ids, weights.to(x.dtype), *matrices)

    torch._dynamo.mark_dynamic(x, 0)
    report = fused_within_contract(routed, x, *matrices, dynamic=None)
    assert (report.idioms["router"], report.ops["moe_experts_int8"]) == (1, 1)


# -------------------------------------------------------------------- look-alikes


def layer(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, s1: Tensor, down: Tensor, s2: Tensor, wrong: str = "") -> Tensor:
    """As it should be, but for what is wrong."""
    ordered, order = torch.sort(ids.reshape(-1))
    ends, token = ends_of(ordered), order // K
    q, s = quantize(x)
    rows = q[token].float().to(torch.float8_e4m3fn) if wrong == "narrow carrier" else q[token]
    of_rows = {"other rows": s.repeat_interleave(K, 0), "rounded scale": s[token].to(BF16).float()}.get(wrong, s[token])
    of_channels = s1[ids.reshape(-1)] if wrong == "other experts" else s1[ordered]
    h = swiglu(product(rows, gate_up, ends).float() * of_rows * of_channels)
    q, t = (
        quantize(h)
        if wrong != "other steps"
        else (h.div(h.abs().amax(-1, True) / 63).round().clamp(-64, 63).to(torch.int8), h.amax(-1, True))
    )
    t = {"scale of tokens": s[token], "scale and more": t + 1}.get(wrong, t)
    codes = down // 2 if wrong == "computed matrices" else down
    rows = product(q, codes, ends).float() * t * s2[ordered] * w.reshape(-1)[order].unsqueeze(-1)
    return back(rows, order).view(x.size(0), K, -1).sum(dim=1).to(x.dtype)


WRONG = ["other rows", "rounded scale", "other experts", "other steps", "scale of tokens", "scale and more", "narrow carrier"]
RIGHT = ["", "computed matrices"]


def test_look_alikes_stay_as_they_are() -> None:
    """All in one graph, which is quicker; were one of them taken, the number would be larger."""
    report = fused_within_contract(lambda *args: tuple(layer(*args, wrong=name) for name in WRONG + RIGHT), *inputs())
    assert report.ops["moe_experts_int8"] == len(RIGHT)


@pytest.mark.parametrize("wrong", ["other scale", "other experts"])
def test_gathered_look_alikes_stay_as_they_are(wrong: str) -> None:
    assert fused_within_contract(lambda *args: gathered(*args, wrong=wrong), *inputs()).ops["moe_experts_int8"] == 0


def test_exact_rounding_is_kept() -> None:
    report = fused_within_contract(rows_quantised, *inputs(), config=FusionConfig(rounding="exact"))
    assert report.ops["moe_experts_int8"] == 0
