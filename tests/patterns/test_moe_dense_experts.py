"""Experts that are all computed for all tokens: every spelling that is recognised, look-alikes that are not, numerics against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_fusion import FusionReport
from tests.patterns.support import fused_within_contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, HIDDEN, INNER, EXPERTS, K = 6, 16, 32, 4, 2

Experts = Callable[..., Tensor]


def inputs(dtype: torch.dtype = BF16) -> list[Tensor]:
    """Tokens, logits, gate_up [E, 2I, H], down [E, H, I]."""
    torch.manual_seed(0)
    return [
        torch.randn(TOKENS, HIDDEN).to(dtype),
        torch.randn(TOKENS, EXPERTS).to(dtype),
        (torch.randn(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5).to(dtype),
        (torch.randn(EXPERTS, HIDDEN, INNER) * INNER**-0.5).to(dtype),
    ]


def swiglu(merged: Tensor) -> Tensor:
    gate, up = merged.chunk(2, dim=-1)
    return F.silu(gate) * up


def routed(logits: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(torch.softmax(logits.float(), dim=-1), k, dim=-1)
    return weights.to(logits.dtype), ids


# -------------------------------------------------------------------- weights of all experts


def one_hot(logits: Tensor) -> Tensor:
    weights, ids = routed(logits)
    return (F.one_hot(ids, EXPERTS).to(weights.dtype) * weights.unsqueeze(-1)).sum(1)


def scattered(logits: Tensor) -> Tensor:
    weights, ids = routed(logits)
    return torch.zeros_like(logits).scatter(1, ids, weights)


def compared(logits: Tensor) -> Tensor:
    weights, ids = routed(logits)
    return (weights[:, :, None] * (torch.arange(EXPERTS, device=ids.device) == ids[:, :, None])).sum(dim=-2)


# -------------------------------------------------------------------- spellings


def einsum(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, combine: Any = one_hot, act: Any = swiglu) -> Tensor:
    hidden = act(torch.einsum("th,efh->tef", x, gate_up))
    return torch.einsum("teh,te->th", torch.einsum("tef,ehf->teh", hidden, down), combine(logits))


def batched(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, combine: Any = scattered, act: Any = swiglu) -> Tensor:
    rows = x.unsqueeze(0).expand(EXPERTS, -1, -1)
    results = torch.bmm(act(torch.bmm(rows, gate_up.mT)), down.mT)
    return (results * combine(logits).t().unsqueeze(-1)).sum(0)


def apart(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Gate and up as two products."""
    rows = x.expand(EXPERTS, -1, -1)
    hidden = F.silu(rows @ gate_up[:, :INNER].mT) * (rows @ gate_up[:, INNER:].mT)
    return torch.einsum("eth,te->th", hidden @ down.mT, compared(logits))


def llama4(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, k: int = 1, act: Any = swiglu) -> Tensor:
    """The score multiplies what goes in."""
    best, chosen = torch.topk(logits, k, dim=1)
    scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, best)
    scores = torch.sigmoid(scores.float()).to(logits.dtype)
    rows = (x.repeat(EXPERTS, 1) * scores.transpose(0, 1).reshape(-1, 1)).view(EXPERTS, -1, HIDDEN)
    results = torch.bmm(act(torch.bmm(rows, gate_up.mT)), down.mT).view(-1, HIDDEN)
    return results.reshape(EXPERTS, -1, HIDDEN).sum(dim=0)


SPELLINGS: dict[str, Experts] = {
    "einsum": einsum,
    "einsum, scatter": lambda *args: einsum(*args, combine=scattered),
    "bmm": batched,
    "bmm, one-hot": lambda *args: batched(*args, combine=one_hot),
    "gate and up apart": apart,
    "llama4": llama4,
}


def leftovers(report: FusionReport) -> set[str]:
    names = {getattr(node.target, "_opname", "") for node in report.graph("fused").graph.nodes}
    return names & {"bmm", "silu", "one_hot", "sum", "eq", "topk"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_call(name: str) -> None:
    report = fused_within_contract(SPELLINGS[name], *inputs())
    assert (report.idioms["router"], report.idioms["experts"], report.idioms["glu"]) == (1, 1, 1), report.missed
    assert not leftovers(report)


@pytest.mark.parametrize(("experts", "dtype"), [(einsum, FP16), (llama4, FP32)])
def test_dtypes(experts: Experts, dtype: torch.dtype) -> None:
    assert fused_within_contract(experts, *inputs(dtype)).idioms["experts"] == 1


@pytest.mark.parametrize("experts", [einsum, llama4])
def test_the_number_of_tokens_may_be_symbolic(experts: Experts) -> None:
    x, logits, *matrices = inputs()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(logits, 0)
    assert fused_within_contract(experts, x, logits, *matrices, dynamic=None).idioms["experts"] == 1


def test_experts_without_a_gate() -> None:
    x, logits, gate_up, down = inputs()
    report = fused_within_contract(lambda *args: einsum(*args, act=F.relu), x, logits, gate_up[:, :INNER], down)
    assert report.idioms["experts"] == 1


# -------------------------------------------------------------------- look-alikes


def unequal(logits: Tensor) -> Tensor:
    """Every expert but those chosen."""
    weights, ids = routed(logits)
    return (weights[:, :, None] * (torch.arange(EXPERTS, device=ids.device) != ids[:, :, None])).sum(dim=-2)


def shifted(logits: Tensor) -> Tensor:
    """Each expert's neighbour."""
    weights, ids = routed(logits)
    return (weights[:, :, None] * (torch.arange(1, EXPERTS + 1, device=ids.device) == ids[:, :, None])).sum(dim=-2)


def of_other_tokens(logits: Tensor) -> Tensor:
    return one_hot(logits).flip(0)


def over_tokens(logits: Tensor) -> Tensor:
    """Each expert chooses tokens."""
    weights, ids = torch.topk(torch.softmax(logits, dim=-1), K, dim=0)
    return torch.zeros_like(logits).scatter(0, ids, weights)


def unknown(logits: Tensor) -> Tensor:
    """Zero for most, but nobody knows how many."""
    return F.relu(logits)


def one_expert_for_all(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Experts share their second matrix."""
    hidden = swiglu(torch.einsum("th,efh->tef", x, gate_up))
    return torch.einsum("teh,te->th", torch.einsum("tef,hf->teh", hidden, down[0]), one_hot(logits))


def sum_of_tokens(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    hidden = swiglu(torch.einsum("th,efh->tef", x, gate_up))
    return (torch.einsum("tef,ehf->teh", hidden, down) * one_hot(logits)[..., None]).sum(0)


def early_with_sigmoid(*args: Tensor) -> Tensor:
    """An expert that is not chosen adds a half."""
    x, logits, gate_up, down = args
    return llama4(x, logits, gate_up[:, :INNER], down, act=torch.sigmoid)


LOOK_ALIKES: dict[str, Experts] = {
    **{f.__name__: lambda *args, f=f: einsum(*args, combine=f) for f in (unequal, shifted, of_other_tokens, over_tokens, unknown)},
    **{f.__name__: f for f in (one_expert_for_all, sum_of_tokens, early_with_sigmoid)},
    "several early experts": lambda *args: llama4(*args, k=2),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_stay_as_they_are(name: str) -> None:
    assert fused_within_contract(LOOK_ALIKES[name], *inputs()).idioms["experts"] == 0


# -------------------------------------------------------------------- a loop over all experts


def by_number(weights: Tensor, ids: Tensor, expert: int) -> Tensor:
    return (weights * (ids == expert)).sum(-1, keepdim=True)


def by_where(weights: Tensor, ids: Tensor, expert: int) -> Tensor:
    return torch.where(ids == expert, weights, 0.0).sum(-1).unsqueeze(-1)


def by_masked_fill(weights: Tensor, ids: Tensor, expert: int) -> Tensor:
    return weights.masked_fill(ids != expert, 0).sum(-1, keepdim=True)


def loop(
    x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, weigh: Any = by_number, experts: Any = range(EXPERTS), act: Any = None
) -> Tensor:
    weights, ids = routed(logits)
    out = torch.zeros_like(x)
    for expert in experts:
        hidden = (act(expert) if act else swiglu)(F.linear(x, gate_up[expert]))
        out = out + F.linear(hidden, down[expert]) * weigh(weights, ids, expert)
    return out


def loop_over_columns(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    combine = one_hot(logits)
    parts = [(swiglu(x @ gate_up[e].T) @ down[e].T) * combine[:, e, None] for e in range(EXPERTS)]
    return sum(parts[1:], parts[0])


def loop_and_shared(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A residual and an expert for all tokens are added to the sum."""
    return x + loop(x, logits, gate_up, down) + F.linear(swiglu(F.linear(x, gate_up[0])), down[0])


LOOPS: dict[str, Experts] = {
    **{f.__name__: lambda *args, f=f: loop(*args, weigh=f) for f in (by_number, by_where, by_masked_fill)},
    "columns": loop_over_columns,
    "more is added": loop_and_shared,
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_over_all_experts_is_one_call(name: str) -> None:
    report = fused_within_contract(LOOPS[name], *inputs())
    assert (report.idioms["router"], report.idioms["experts"]) == (1, 1)


def test_a_loop_for_any_number_of_tokens() -> None:
    x, logits, *matrices = inputs(FP32)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(logits, 0)
    assert fused_within_contract(loop, x, logits, *matrices, dynamic=None).idioms["experts"] == 1


OTHER_LOOPS: dict[str, Experts] = {
    "some of the experts": lambda *args: loop(*args, experts=range(1, EXPERTS)),
    "one expert twice": lambda *args: loop(*args, experts=[0, *range(EXPERTS - 1)]),
    "the weight of the next": lambda *args: loop(*args, weigh=lambda w, ids, e: by_number(w, ids, (e + 1) % EXPERTS)),
    "all but the chosen": lambda *args: loop(*args, weigh=lambda w, ids, e: (w * (ids != e)).sum(-1, keepdim=True)),
    "another activation": lambda *args: loop(*args, act=lambda e: swiglu if e != 2 else lambda h: F.gelu(h[:, :INNER]) * h[:, INNER:]),
    "one second matrix": lambda x, logits, gate_up, down: loop(x, logits, gate_up, [down[0]] * EXPERTS),
    "weights over tokens": lambda *args: loop(*args, weigh=lambda w, ids, e: (w * (ids == e)).sum(0, keepdim=True)[:, :1]),
}


@pytest.mark.parametrize("name", OTHER_LOOPS)
def test_other_loops_stay_as_they_are(name: str) -> None:
    assert fused_within_contract(OTHER_LOOPS[name], *inputs()).idioms["experts"] == 0
