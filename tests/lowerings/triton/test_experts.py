"""The provider of routed experts by Triton: what it takes, what it leaves to others and why, and its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from tests.lowerings.ascend.checks import Lowered, lower_and_check, lower_call
from tests.lowerings.routed import BF16, EXPERTS, HIDDEN, IDS, INNER, call, tensors

PROVIDER = "triton.moe_permute + aten._grouped_mm + triton.moe_unpermute"
CUDA: dict[str, Any] = {"target": "cuda", "emulate": True}


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
