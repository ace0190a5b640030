"""Routers: every spelling that is recognised, look-alikes that are not, numerics against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_fusion import FusionConfig, FusionReport
from tests.patterns.support import fused, fused_within_contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, HIDDEN, EXPERTS, K, GROUPS, TOP_GROUPS = 6, 8, 16, 4, 4, 2
EPS, SCALE = 1e-20, 2.5

Choice = tuple[Tensor, Tensor]


class Router(nn.Module):
    """Logits by a linear layer, then `choose(logits, bias)`."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Any], dtype: torch.dtype = BF16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(EXPERTS) * 0.2, requires_grad=False)
        self.choose = choose

    def forward(self, x: Tensor) -> Any:
        return self.choose(F.linear(x, self.weight), self.bias)


def tokens(dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(TOKENS, HIDDEN, dtype=dtype)


# -------------------------------------------------------------------- spellings


def probabilities(logits: Tensor) -> Tensor:
    return F.softmax(logits, dim=1, dtype=torch.float)


def mixtral(logits: Tensor, bias: Tensor) -> Choice:
    weights, chosen = torch.topk(F.softmax(logits.float(), dim=-1), K, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def qwen(logits: Tensor, bias: Tensor) -> Choice:
    weights, chosen = torch.topk(probabilities(logits), K, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), chosen


def jamba(logits: Tensor, bias: Tensor) -> Choice:
    weights, chosen = torch.topk(probabilities(logits), K, dim=-1)
    return weights.to(logits.dtype), chosen


def clamped(logits: Tensor, bias: Tensor) -> Choice:
    weights, chosen = torch.topk(probabilities(logits), K, dim=-1)
    return weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=1e-12), chosen


def ernie(logits: Tensor, bias: Tensor) -> Choice:
    scores = probabilities(logits)
    chosen = torch.topk(scores + bias.unsqueeze(0), K, dim=-1)[1]
    weights = torch.gather(scores, dim=-1, index=chosen)
    return (weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=0.3)).to(logits.dtype), chosen


def dbrx(logits: Tensor, bias: Tensor) -> Choice:
    weights, chosen = torch.topk(F.softmax(logits.float(), dim=1), K, dim=-1)
    return weights / torch.norm(weights, p=1, dim=-1, keepdim=True), chosen


def gpt_oss(logits: Tensor, bias: Tensor) -> Choice:
    best, chosen = torch.topk(logits, K, dim=-1)
    return F.softmax(best, dim=1, dtype=best.dtype), chosen


def granite(logits: Tensor, bias: Tensor) -> Choice:
    best, chosen = logits.float().topk(K, dim=-1)
    return torch.softmax(best, dim=-1).type_as(logits), chosen


def privacy(logits: Tensor, bias: Tensor) -> Choice:
    best, chosen = torch.topk(logits.float(), K, dim=-1)
    return torch.softmax(best, dim=-1) / K, chosen


def cohere(logits: Tensor, bias: Tensor) -> Choice:
    best, chosen = torch.topk(logits, K, dim=-1)
    scores = torch.sigmoid(best.float())
    return (scores / torch.sum(scores, dim=-1, keepdim=True)).to(logits.dtype), chosen


def minimax(logits: Tensor, bias: Tensor) -> Choice:
    scores = torch.sigmoid(logits.float())
    chosen = torch.topk(scores + bias, K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, chosen)
    return weights / weights.sum(dim=-1, keepdim=True), chosen


def afmoe(logits: Tensor, bias: Tensor) -> Choice:
    scores = torch.sigmoid(logits.to(torch.float32))
    _, chosen = torch.topk(bias + scores, k=K, dim=1)
    weights = scores.gather(dim=1, index=chosen)
    return weights / (weights.sum(dim=-1, keepdim=True) + EPS) * SCALE, chosen


def deepseek_v4(logits: Tensor, bias: Tensor) -> Choice:
    scores = F.softplus(logits.float()).sqrt()
    chosen = torch.topk(scores + bias, K, dim=-1, sorted=False).indices
    weights = scores.gather(1, chosen)
    return SCALE * (weights / (weights.sum(dim=-1, keepdim=True) + EPS)), chosen


def no_renorm(logits: Tensor, bias: Tensor) -> Choice:
    scores = logits.float().softmax(-1)
    chosen = torch.topk(scores.view(-1, EXPERTS) + bias.unsqueeze(0), k=K, dim=-1, sorted=False)[1]
    return scores.gather(1, chosen) * 6.0, chosen


def kept_mask(merit: Tensor) -> Tensor:
    best = torch.topk(merit, k=TOP_GROUPS, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(merit)
    mask.scatter_(1, best, 1)
    return mask.unsqueeze(-1).expand(-1, GROUPS, EXPERTS // GROUPS).reshape(-1, EXPERTS)


def top2(choice: Tensor) -> Tensor:
    return choice.view(-1, GROUPS, EXPERTS // GROUPS).topk(2, dim=-1)[0].sum(dim=-1)


def deepseek_v3(logits: Tensor, bias: Tensor, limit: Callable[[Tensor, Tensor], Tensor] | None = None, merit: Any = top2) -> Choice:
    scores = logits.float().sigmoid()
    choice = scores + bias
    mask = kept_mask(merit(choice))
    choice = limit(choice, mask) if limit else choice.masked_fill(~mask.bool(), 0.0)
    chosen = torch.topk(choice, k=K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, chosen)
    weights /= weights.sum(dim=-1, keepdim=True) + EPS
    return weights * SCALE, chosen


def deepseek_v2(logits: Tensor, bias: Tensor) -> Choice:
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    mask = kept_mask(scores.view(-1, GROUPS, EXPERTS // GROUPS).max(dim=-1).values)
    weights, chosen = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=K, dim=-1, sorted=False)
    return weights * 16.0, chosen


def deepseek_v3_by(limit: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Choice]:
    return lambda logits, bias: deepseek_v3(logits, bias, limit)


def on_groups(choice: Tensor, mask: Tensor) -> Tensor:
    """Masked while the groups are apart, by a mask that broadcasts over their members."""
    small = mask.view(-1, GROUPS, EXPERTS // GROUPS)
    return choice.view(-1, GROUPS, EXPERTS // GROUPS).masked_fill(small == 0, float("-inf")).view(-1, EXPERTS)


SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Choice], dict[str, Any]]] = {
    "mixtral": (mixtral, {"renormalize": True}),
    "qwen": (qwen, {"renormalize": True, "weights_dtype": BF16}),
    "jamba": (jamba, {"weights_dtype": BF16}),
    "clamped": (clamped, {"renormalize": True}),
    "ernie": (ernie, {"renormalize": True, "eps": 0.3, "guard": "clamp", "weights_dtype": BF16}),
    "dbrx": (dbrx, {"renormalize": True}),
    "gpt_oss": (gpt_oss, {"score_first": False, "weights_dtype": BF16}),
    "granite": (granite, {"score_first": False, "weights_dtype": BF16}),
    "privacy": (privacy, {"score_first": False, "scale": 1 / K}),
    "cohere": (cohere, {"score": "sigmoid", "score_first": False, "renormalize": True, "weights_dtype": BF16}),
    "minimax": (minimax, {"score": "sigmoid", "renormalize": True, "sorted": False}),
    "afmoe": (afmoe, {"score": "sigmoid", "renormalize": True, "eps": EPS, "scale": SCALE}),
    "deepseek_v4": (deepseek_v4, {"score": "sqrt_softplus", "renormalize": True, "eps": EPS, "scale": SCALE, "sorted": False}),
    "no_renorm": (no_renorm, {"scale": 6.0, "sorted": False}),
    "deepseek_v2": (deepseek_v2, {"groups": 4, "top_groups": 2, "group_score": "max", "scale": 16.0, "sorted": False}),
}
V3 = {
    "score": "sigmoid",
    "groups": 4,
    "top_groups": 2,
    "group_score": "top2",
    "renormalize": True,
    "eps": EPS,
    "scale": SCALE,
    "sorted": False,
}
SPELLINGS |= {
    "deepseek_v3": (deepseek_v3, V3 | {"excluded": 0.0}),
    "product mask": (deepseek_v3_by(lambda choice, mask: choice * mask), V3 | {"excluded": 0.0}),
    "where": (deepseek_v3_by(lambda choice, mask: torch.where(mask.bool(), choice, float("-inf"))), V3),
    "mask is zero": (deepseek_v3_by(lambda choice, mask: choice.masked_fill(mask == 0, float("-inf"))), V3),
}


def call_of(report: FusionReport) -> dict[str, Any]:
    """The arguments of the only moe_gating call that are not defaults; no weights_dtype where it is float32."""
    [call] = [node for node in report.graph("fused").graph.nodes if "moe_gating" in str(node.target)]
    found = {name: value for name, value in call.kwargs.items() if value is not None}
    if found.get("weights_dtype") is FP32:
        del found["weights_dtype"]
    return {name: value for name, value in found.items() if (name, value) != ("score", "softmax")} | {"k": call.args[2]}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_call(name: str) -> None:
    choose, expected = SPELLINGS[name]
    report = fused_within_contract(Router(choose), tokens())
    assert report.idioms["router"] == 1, [site.reason for site in report.missed]
    found = call_of(report)
    scale = found.pop("scale", 1.0)
    assert found == {name: value for name, value in expected.items() if name != "scale"} | {"k": K}
    assert scale == pytest.approx(expected.get("scale", 1.0))
    assert not {"softmax", "sigmoid", "topk"} & {str(node.target) for node in report.graph("fused").graph.nodes}


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("name", ["qwen", "gpt_oss", "deepseek_v3"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    assert fused_within_contract(Router(SPELLINGS[name][0], dtype), tokens(dtype)).idioms["router"] == 1


class Dynamic(nn.Module):
    """A router whose number of tokens is symbolic."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.router = Router(choose)

    def forward(self, x: Tensor) -> Any:
        return self.router(x.view(-1, HIDDEN))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "afmoe", "deepseek_v2", "deepseek_v3"])
def test_the_number_of_tokens_may_be_symbolic(name: str) -> None:
    x = torch.randn(2, 3, HIDDEN, dtype=BF16)
    torch._dynamo.mark_dynamic(x, 1)
    assert fused_within_contract(Dynamic(SPELLINGS[name][0]), x, dynamic=None).idioms["router"] == 1


def llama4(logits: Tensor, bias: Tensor) -> Tensor:
    best, chosen = torch.topk(logits, 1, dim=1)
    scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, best)
    return torch.sigmoid(scores.float()).to(logits.dtype)


def scattered(logits: Tensor, bias: Tensor) -> Tensor:
    weights, chosen = qwen(logits, bias)
    return torch.zeros_like(logits).scatter_(1, chosen, weights)


@pytest.mark.parametrize("choose", [llama4, scattered])
def test_weights_of_all_experts(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    report = fused_within_contract(Router(choose), tokens())
    assert report.idioms["router"] == 1
    assert call_of(report)["dense"]


def test_scores_that_are_used_elsewhere_stay_computed() -> None:
    def choose(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        scores = logits.float().sigmoid()
        weights, chosen = torch.topk(scores, K, dim=-1)
        return scores.mean(0), weights / weights.sum(-1, keepdim=True), chosen

    report = fused_within_contract(Router(choose), tokens())
    assert report.idioms["router"] == 1
    assert any("sigmoid" in str(node.target) for node in report.graph("fused").graph.nodes)


# -------------------------------------------------------------------- look-alikes


def biased_weights(logits: Tensor, bias: Tensor) -> Choice:
    weights, chosen = torch.topk(logits.float().sigmoid() + bias, K, dim=-1)
    return weights / weights.sum(-1, keepdim=True), chosen


def biased_gather(logits: Tensor, bias: Tensor) -> Choice:
    choice = logits.float().sigmoid() + bias
    chosen = torch.topk(choice, K, dim=-1)[1]
    return choice.gather(1, chosen), chosen


def other_scores(logits: Tensor, bias: Tensor) -> Choice:
    chosen = torch.topk(logits.float().softmax(-1) + bias, K, dim=-1)[1]
    return logits.float().sigmoid().gather(1, chosen), chosen


def smallest(logits: Tensor, bias: Tensor) -> Choice:
    return tuple(torch.topk(logits.float().softmax(-1), K, dim=-1, largest=False))  # type: ignore[return-value]


def other_dim(logits: Tensor, bias: Tensor) -> Choice:
    return tuple(torch.topk(logits.float().softmax(-1), K, dim=0))  # type: ignore[return-value]


def softmax_of_tokens(logits: Tensor, bias: Tensor) -> Choice:
    return tuple(torch.topk(logits.float().softmax(0), K, dim=-1))  # type: ignore[return-value]


def bias_a_token(logits: Tensor, bias: Tensor) -> Choice:
    scores = logits.float().sigmoid()
    chosen = torch.topk(scores + scores.mean(-1, keepdim=True), K, dim=-1)[1]
    return scores.gather(1, chosen), chosen


def tiled_mask(logits: Tensor, bias: Tensor) -> Choice:
    """The mask of groups is repeated as a whole: it keeps other experts than those of the best groups."""

    def merit(choice: Tensor) -> Tensor:
        return choice.view(-1, GROUPS, EXPERTS // GROUPS).amax(-1)

    scores = logits.float().softmax(-1)
    best = torch.topk(merit(scores), k=TOP_GROUPS, dim=-1)[1]
    mask = torch.zeros_like(merit(scores)).scatter_(1, best, 1)
    mask = mask.unsqueeze(1).expand(-1, EXPERTS // GROUPS, GROUPS).reshape(-1, EXPERTS)
    return tuple(torch.topk(scores.masked_fill(~mask.bool(), 0.0), K, dim=-1))  # type: ignore[return-value]


def excluded_weights(logits: Tensor, bias: Tensor) -> Choice:
    """A chosen expert may be one of those that count as 0.5, and so is its weight."""
    scores = logits.float().softmax(-1)
    mask = kept_mask(scores.view(-1, GROUPS, EXPERTS // GROUPS).amax(-1))
    return tuple(torch.topk(scores.masked_fill(~mask.bool(), 0.5), K, dim=-1))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "choose",
    [
        biased_weights,
        biased_gather,
        other_scores,
        smallest,
        other_dim,
        softmax_of_tokens,
        bias_a_token,
        tiled_mask,
        excluded_weights,
    ],
)
def test_look_alikes_stay_as_they_are(choose: Callable[[Tensor, Tensor], Any]) -> None:
    assert fused_within_contract(Router(choose), tokens()).idioms["router"] == 0


def test_the_division_by_another_sum_stays_outside() -> None:
    def choose(logits: Tensor, bias: Tensor) -> Choice:
        weights, chosen = torch.topk(logits.float().softmax(-1), K, dim=-1)
        return weights / weights.sum(dim=0, keepdim=True), chosen

    report = fused_within_contract(Router(choose), tokens())
    assert "renormalize" not in call_of(report)


def test_sampling_from_a_vocabulary_is_no_router() -> None:
    def sample(logits: Tensor) -> Choice:
        return tuple(torch.topk(logits.float().softmax(-1), K, dim=-1))  # type: ignore[return-value]

    _, report = fused(sample, torch.randn(2, 4096))
    assert not report.idioms
    assert not report.missed


def test_a_miss_says_why() -> None:
    _, report = fused(Router(biased_weights), tokens())
    assert [(site.idiom, site.reason) for site in report.missed] == [("router", "the weights hold the bias of the choice")]


def test_exact_rounding_refuses_what_the_model_rounds_between() -> None:
    def choose(logits: Tensor, bias: Tensor) -> Choice:
        weights, chosen = torch.topk(logits.softmax(-1), K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen

    exact = FusionConfig(rounding="exact")
    assert "renormalize" not in call_of(fused_within_contract(Router(choose), tokens(), config=exact))
    assert call_of(fused_within_contract(Router(choose), tokens()))["score_dtype"] is BF16
    assert call_of(fused_within_contract(Router(mixtral), tokens(), config=exact))["renormalize"]


# -------------------------------------------------------------------- routers that no fused op computes


def by_log_sum(x: Tensor) -> Tensor:
    return torch.exp(x - torch.logsumexp(x, -1, keepdim=True))


def by_exponentials(x: Tensor) -> Tensor:
    best = torch.exp(x - x.max(-1, keepdim=True).values)
    return best / best.sum(-1).unsqueeze(-1)


def scored_by(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Choice]:
    def choose(logits: Tensor, bias: Tensor) -> Choice:
        weights, chosen = torch.topk(score(logits.float()), K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen

    return choose


@pytest.mark.parametrize("score", [by_log_sum, by_exponentials, lambda x: torch.log_softmax(x, -1).exp()])
def test_a_softmax_may_be_written_out(score: Callable[[Tensor], Tensor]) -> None:
    report = fused_within_contract(Router(scored_by(score)), tokens())
    assert report.idioms["router"] == 1
    assert call_of(report)["renormalize"]


def inkling(logits: Tensor, bias: Tensor) -> Choice:
    """The weights are divided by a sum that has experts in it which nobody chose."""
    routed = logits[:, :-2].float()
    chosen = torch.topk(routed.sigmoid() + bias[:-2], K, dim=-1)[1]
    scores = torch.cat([routed.gather(1, chosen), logits[:, -2:].float()], -1).sigmoid()
    return (scores / scores.sum(-1, keepdim=True))[:, :K], chosen


def sparse_mixer(logits: Tensor, bias: Tensor) -> Choice:
    best, chosen = logits.max(-1, keepdim=True)
    far = (best - logits) / logits.abs().clamp(min=best) > 0.02
    return torch.softmax(logits.masked_fill(far, float("-inf")), -1).gather(-1, chosen), chosen


@pytest.mark.parametrize(
    ("choose", "reason"),
    [
        (scored_by(lambda x: torch.softmax(x, -1) ** 2), "the scores are made by square"),
        (scored_by(lambda x: x.exp() / (x.exp().sum(-1, keepdim=True) + 1)), "the scores are made by div"),
        (inkling, "the weights are not made of the scores"),
        (sparse_mixer, "a sparse mixer"),
        (other_dim, ""),
    ],
)
def test_every_router_is_in_the_report(choose: Callable[[Tensor, Tensor], Choice], reason: str) -> None:
    _, report = fused(Router(choose), tokens())
    assert [site.idiom for site in report.missed] == ["router"]
    assert reason in (report.missed[0].reason or "")
