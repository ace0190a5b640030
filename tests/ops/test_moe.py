"""Numerics, metadata and errors of `moe_gating` and `moe_experts`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.experts import moe_experts
from npu_fusion.ops.moe import moe_gating
from tests.ops.checks import DTYPES, check_op, check_traceable

TOKENS, HIDDEN, INNER, EXPERTS, K = 5, 8, 6, 8, 2


# -------------------------------------------------------------------- moe_gating


def plain_gating(logits: Tensor, bias: Tensor | None, indices: Tensor, score: str, renormalize: bool, scale: float) -> Tensor:
    """The weights of given experts as modelling code writes them."""
    scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "sqrt_softplus": lambda x: F.softplus(x).sqrt()}[score](logits)
    weights = scores.gather(-1, indices)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights) * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_gating_meets_the_numeric_contract(score: str, dtype: torch.dtype) -> None:
    logits, bias = torch.randn(TOKENS, EXPERTS).to(dtype), torch.randn(EXPERTS)
    for renormalize in (False, True):
        options: dict[str, Any] = {"score": score, "renormalize": renormalize, "scale": 2.5}
        actual, indices = check_op(moe_gating, logits, bias, K, weights_dtype=dtype, **options)
        exact = plain_gating(logits.double(), bias, indices, *options.values())
        assert_within_contract(actual, plain_gating(logits, bias, indices, *options.values()), exact, dtype, str(options))


def test_the_bias_and_the_groups_decide_the_choice_alone() -> None:
    logits, bias = torch.zeros(1, EXPERTS), torch.zeros(EXPERTS)
    logits[0, :4], bias[6:] = torch.tensor([3.0, 0.0, 2.0, 1.0]), 10.0
    weights, indices = check_op(moe_gating, logits, bias, K, score="sigmoid")
    assert indices.sort().values.tolist() == [[6, 7]]
    assert weights.tolist() == [[0.5, 0.5]]
    _, indices = check_op(moe_gating, logits, None, K, score="sigmoid", groups=4, top_groups=1, group_score="max")
    assert indices.tolist() == [[0, 1]]
    _, indices = check_op(moe_gating, logits, None, K, score="sigmoid", groups=4, top_groups=1, group_score="top2")
    assert indices.tolist() == [[2, 3]]


def test_scores_of_the_chosen_alone_and_weights_of_all() -> None:
    logits = torch.randn(TOKENS, EXPERTS)
    weights, indices = check_op(moe_gating, logits, None, K, score_first=False)
    assert torch.allclose(weights, logits.topk(K).values.softmax(-1))
    dense, same = check_op(moe_gating, logits, None, K, score_first=False, dense=True)
    assert torch.equal(same, indices)
    assert torch.equal(dense, torch.zeros(TOKENS, EXPERTS).scatter(1, indices, weights))


LOGITS = torch.randn(TOKENS, EXPERTS)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: moe_gating(LOGITS.int(), None, K), TypeError, "logits must be floating point"),
        (lambda: moe_gating(LOGITS, None, K, score="tanh"), ValueError, "score must be one of"),
        (lambda: moe_gating(LOGITS, torch.randn(3), K), ValueError, "bias"),
        (lambda: moe_gating(LOGITS, None, K, groups=3, top_groups=1), ValueError, "equal groups"),
        (lambda: moe_gating(LOGITS, None, 3, groups=4, top_groups=1), ValueError, "k = 3"),
    ],
)
def test_wrong_calls_of_gating(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


# -------------------------------------------------------------------- moe_experts


def experts_inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tokens, ids, weights, gate_up [E, H, 2I], down [E, I, H]."""
    return [
        torch.randn(TOKENS, HIDDEN).to(dtype),
        torch.rand(TOKENS, EXPERTS).topk(K).indices,
        torch.rand(TOKENS, K).to(dtype),
        (torch.randn(EXPERTS, HIDDEN, 2 * INNER) * HIDDEN**-0.5).to(dtype),
        (torch.randn(EXPERTS, INNER, HIDDEN) * INNER**-0.5).to(dtype),
    ]


def plain_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, b1: Any = 0, b2: Any = 0) -> Tensor:
    """Every expert for every token, weighted by a one-hot sum."""
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        pick = [b[expert] if isinstance(b, Tensor) else b for b in (b1, b2)]
        gate, up = (x @ gate_up[expert] + pick[0]).chunk(2, -1)
        out = out + ((F.silu(gate) * up) @ down[expert] + pick[1]) * (weights * (indices == expert)).sum(-1, keepdim=True)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_meet_the_numeric_contract(dtype: torch.dtype) -> None:
    x, ids, *rest = experts_inputs(dtype)
    biases = [torch.randn(EXPERTS, 2 * INNER).to(dtype), torch.randn(EXPERTS, HIDDEN).to(dtype)]
    weights, gate_up, down = rest
    actual = check_op(moe_experts, x, ids, weights, gate_up, None, down, gate_up_bias=biases[0], down_bias=biases[1])
    exact = plain_experts(x.double(), ids, *(t.double() for t in (*rest, *biases)))
    assert_within_contract(actual, plain_experts(x, ids, *rest, *biases), exact, dtype, "biased")


def test_gate_and_up_may_be_apart_and_matrices_transposed() -> None:
    x, ids, weights, gate_up, down = experts_inputs()
    merged = moe_experts(x, ids, weights, gate_up, None, down)
    gate, up = gate_up.chunk(2, -1)
    assert torch.allclose(check_op(moe_experts, x, ids, weights, gate, up, down), merged, atol=1e-6)
    assert torch.allclose(moe_experts(x, ids, weights, gate_up.mT.contiguous().mT, None, down), merged, atol=1e-6)
    plain = check_op(moe_experts, x, ids, weights, gate, None, down, gated=False, activation="relu")
    assert torch.allclose(plain[0], sum(w * (F.relu(x[0] @ gate[e]) @ down[e]) for e, w in zip(ids[0], weights[0])), atol=1e-5)  # type: ignore[arg-type]


def test_ids_of_no_expert_add_nothing() -> None:
    x, ids, weights, gate_up, down = experts_inputs()
    ids[0], ids[1, 0] = -1, EXPERTS
    actual = check_op(moe_experts, x, ids, weights, gate_up, None, down)
    assert not actual[0].any()
    assert torch.allclose(actual, plain_experts(x, ids, weights, gate_up, down), atol=1e-5)


def test_traced_with_symbols() -> None:
    x, ids, *rest = experts_inputs()
    weights, gate_up, down = rest
    more = [torch.cat([t, t]) for t in (x, ids, weights)]
    check_traceable(
        moe_experts, lambda x, i, w, g, d: moe_experts(x, i, w, g, None, d), [x, ids, weights, gate_up, down], [*more, gate_up, down]
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"indices": torch.rand(TOKENS, K)}, TypeError, "indices"),
        ({"weights": torch.rand(TOKENS, K + 1)}, ValueError, "weights"),
        ({"down": torch.randn(EXPERTS, INNER + 1, HIDDEN)}, ValueError, "down"),
        ({"gate_up": torch.randn(EXPERTS, HIDDEN, 2 * INNER).half()}, TypeError, "dtype"),
        ({"activation": "mish"}, ValueError, "activation"),
    ],
)
def test_wrong_calls_of_experts(change: dict[str, Any], error: type[Exception], match: str) -> None:
    names = ("x", "indices", "weights", "gate_up", "down")
    with pytest.raises(error, match=match):
        moe_experts(**{**dict(zip(names, experts_inputs(), strict=True)), "up": None, **change})
