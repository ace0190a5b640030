"""The provider of routed experts by Triton: what it takes, what it leaves to others and why, and its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.ops.experts import moe_experts
from tests.lowerings.ascend.checks import Lowered, lower_and_check, lower_call

TOKENS, HIDDEN, INNER, EXPERTS, K = 5, 16, 8, 4, 2
PROVIDER = "triton.moe_permute + aten._grouped_mm + triton.moe_unpermute"
CUDA: dict[str, Any] = {"target": "cuda", "emulate": True}
BF16 = torch.bfloat16
IDS = torch.tensor([[0, 3], [3, 0], [2, 3], [0, 2], [3, 0]])  # nothing for expert 1


def tensors(dtype: torch.dtype = BF16, *, width: int = 2 * INNER, up: bool = False, biases: bool = False) -> list[Tensor]:
    """x, weights, gate_up, down, then up, then the biases of gate_up and down."""
    torch.manual_seed(0)
    found = [
        torch.randn(TOKENS, HIDDEN),
        torch.rand(TOKENS, K),
        torch.randn(EXPERTS, width, HIDDEN).mT / 4,
        torch.randn(EXPERTS, HIDDEN, INNER).mT / 3,
    ]
    found += [torch.randn(EXPERTS, HIDDEN, INNER) / 4] * up
    found += [torch.randn(EXPERTS, width), torch.randn(EXPERTS, HIDDEN)] * biases
    return [tensor.to(dtype) for tensor in found]


def call(**options: Any) -> Any:
    """A function of the tensors that calls the op; the ids come as a float tensor, as all inputs of `lower_and_check`."""

    def experts(ids: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *rest: Tensor) -> Tensor:
        up = rest[0] if len(rest) % 2 else None
        named = dict(zip(("gate_up_bias", "down_bias"), rest[len(rest) % 2 :], strict=False))
        return moe_experts(x, ids.long(), weights, gate_up, up, down, **named, **options) + 0

    return experts


def lowered(*inputs: Tensor, ids: Tensor = IDS, **options: Any) -> Lowered:
    return lower_and_check(call(**options), call(**options), ids.to(BF16), *inputs, **CUDA)


def test_nothing_waits_for_the_device() -> None:
    found = lowered(*tensors())
    assert (found.provider, found.reason) == (PROVIDER, "")
    own = [
        "npu_fusion_triton.moe_permute",
        "aten._grouped_mm",
        "npu_fusion_triton.glu",
        "aten._grouped_mm",
        "npu_fusion_triton.moe_unpermute",
    ]
    assert found.targets()[1:] == [*own, "aten.add"]


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (tensors(biases=True), {"layout": "interleaved", "alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.6, "up_offset": 1.0}),
        (tensors(width=INNER, up=True), {"activation": "gelu_tanh"}),
        (tensors(width=INNER), {"gated": False, "activation": "relu2"}),
    ],
    ids=["biases", "two", "no gate"],
)
def test_every_argument_is_honoured(inputs: list[Tensor], options: dict[str, Any]) -> None:
    assert lowered(*inputs, **options).provider == PROVIDER


def test_ids_that_are_no_experts_add_nothing() -> None:
    assert lowered(*tensors(biases=True), ids=IDS.masked_fill(IDS == 2, -1)).provider == PROVIDER


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (tensors(torch.float16), "x is torch.float16"),
        ([*tensors()[:2], torch.randn(EXPERTS, HIDDEN, 12).to(BF16), torch.randn(EXPERTS, 6, HIDDEN).to(BF16)], "not multiples of 8"),
    ],
    ids=["fp16", "unaligned"],
)
def test_what_does_not_fit_is_the_reference(inputs: list[Tensor], reason: str) -> None:
    found = lower_call(call(), IDS.to(BF16), *inputs, **CUDA)
    assert found.provider == REFERENCE
    assert reason in found.reason
