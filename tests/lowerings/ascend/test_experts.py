"""`moe_experts` and `moe_gating` on Ascend: what they become, why not, and the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.ops.experts import moe_experts
from npu_fusion.ops.moe import moe_gating
from tests.lowerings.ascend.checks import Lowered, lower_and_check, lower_call
from tests.lowerings.routed import EXPERTS, IDS, INNER, TOKENS, K, call, tensors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PROVIDER = "npu.npu_grouped_matmul (init_routing_v2, finalize_routing)"


def lowered(*inputs: Tensor, **options: Any) -> Lowered:
    return lower_and_check(call(**options), call(**options), IDS.to(BF16), *inputs)


def test_five_launches() -> None:
    found = lowered(*tensors())
    assert (found.provider, found.reason) == (PROVIDER, "")
    own = [
        "npu.npu_moe_init_routing_v2",
        "npu.npu_grouped_matmul",
        "npu.npu_swiglu",
        "npu.npu_grouped_matmul",
        "npu.npu_moe_finalize_routing",
    ]
    assert [target for target in found.targets() if target.startswith("npu.")] == own


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (tensors(biases=True), {"layout": "interleaved", "alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.7, "up_offset": 1.0}),
        (tensors(width=INNER, up=True), {"round_dtype": BF16}),
        (tensors(FP16, width=INNER, up=True), {"activation": "gelu_tanh", "round_dtype": FP16}),
        (tensors(), {"activation": "gelu"}),
        (tensors(width=INNER), {"gated": False, "activation": "relu2"}),
    ],
    ids=["biases", "two", "two, gelu", "gelu", "no gate"],
)
def test_every_argument_is_honoured(inputs: list[Tensor], options: dict[str, Any]) -> None:
    assert lowered(*inputs, **options).provider == PROVIDER


def test_wider_weights_are_not_rounded() -> None:
    weights, *others = tensors()
    found = lowered(weights.float() + 1e-4, *others)
    [call] = [node for node in found.gm.graph.nodes if "finalize" in str(node.target)]
    assert call.args[4].meta["val"].dtype is FP32


def test_what_does_not_fit_is_the_reference() -> None:
    found = lower_call(call(), IDS.to(BF16), *tensors(FP32))
    assert found.provider == REFERENCE
    assert "x is torch.float32" in found.reason


@pytest.mark.parametrize(
    ("options", "provider"),
    [
        ({"renormalize": True, "weights_dtype": BF16}, "npu.npu_moe_gating_top_k_softmax_v2"),
        ({"scale": 2.0, "weights_dtype": FP32}, "npu.npu_moe_gating_top_k_softmax_v2"),
        ({"score_first": False}, "npu.npu_moe_gating_top_k_softmax_v2"),
        (
            {"score": "sigmoid", "groups": 4, "top_groups": 2, "group_score": "top2", "renormalize": True, "eps": 1e-20, "scale": 2.5},
            "npu.npu_moe_gating_top_k",
        ),
    ],
    ids=str,
)
def test_routers(options: dict[str, Any], provider: str) -> None:

    def gate(logits: Tensor) -> Tensor:
        bias = torch.linspace(-0.1, 0.1, 16) if options.get("score") == "sigmoid" else None
        return moe_gating(logits, bias, 4, **options)[0] * 1

    assert lower_and_check(gate, gate, torch.randn(6, 16).to(BF16)).provider == provider


def test_ids_of_no_expert_count_nothing() -> None:
    weights, *rest = tensors()
    ids = IDS.clone()
    ids[0, 0], ids[2, 1] = -1, EXPERTS
    found = lower_call(call(), ids.to(BF16), weights, *rest)
    assert found.provider == PROVIDER
    kept = weights.clone()
    kept[0, 0] = kept[2, 1] = 0
    expected = lower_call(call(), IDS.to(BF16), kept, *rest).gm(IDS.to(BF16), kept, *rest)
    torch.testing.assert_close(found.gm(ids.to(BF16), weights, *rest), expected)
    reference = call()(ids.to(BF16), weights, *rest)
    torch.testing.assert_close(found.gm(ids.to(BF16), weights, *rest), reference, rtol=2e-2, atol=2e-2)


def test_ids_that_were_chosen_among_the_experts_are_taken_as_they_are() -> None:
    _, x, gate_up, down = tensors()

    def experts(logits: Tensor, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights, ids = logits.topk(K)
        return moe_experts(x, ids, weights, gate_up, None, down)

    def masked(count: int) -> bool:
        found = lower_call(experts, torch.randn(TOKENS, count).to(BF16), x, gate_up, down)
        assert found.provider == PROVIDER
        return "aten.clamp" in found.targets()

    assert not masked(EXPERTS)
    assert masked(EXPERTS + 1), "a choice among more"
