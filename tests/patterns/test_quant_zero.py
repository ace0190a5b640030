"""Linears of int8 activations that have a zero point: spellings that fuse, look-alikes that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion import FusionConfig
from tests.patterns.support import fused, fused_within_contract

H, N = 16, 24
WEIGHT = torch.randint(-127, 128, (N, H), dtype=torch.int8)
SCALE = torch.rand(N) * 0.01 + 0.001
BIAS = torch.randn(N)
SUMS = WEIGHT.sum(-1)
Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def quantised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-5)
    zero = torch.clamp(-128 - torch.round(low / scale), -128, 127)
    return torch.clamp(torch.round(x / scale) + zero, -128, 127).to(torch.int8), scale, zero.to(torch.int8)


def product(q: Tensor) -> Tensor:
    return torch._int_mm(q, WEIGHT.t())


def sums() -> Tensor:
    return WEIGHT.sum(-1, dtype=torch.int32)


SPELLINGS: dict[str, Linear] = {
    "in whole numbers": lambda q, s, z: (product(q) - z.to(torch.int32) * sums()).float() * s * SCALE + BIAS,
    "a number": lambda q, s, z: (product(q) - 3 * sums()).float() * SCALE,
    "in floats, before the scales": lambda q, s, z: (product(q).float() - z.float() * sums().float()) * (s * SCALE),
    "scaled by rows": lambda q, s, z: (product(q).float() * s - (z.float() * s) * sums().float()) * SCALE + BIAS,
    "scaled by both": lambda q, s, z: product(q).float() * s * SCALE - z * s * (WEIGHT.sum(1) * SCALE),
    "sums of the transpose": lambda q, s, z: (product(q) - z.int() * WEIGHT.t().sum(0, keepdim=True, dtype=torch.int32)) * s * SCALE,
}


def linear(spelling: Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: spelling(*quantised(x))


@pytest.mark.parametrize(
    ("spelling", "dynamic"), [*((name, False) for name in SPELLINGS), ("in whole numbers", True), ("scaled by rows", True)]
)
def test_linears(spelling: str, dynamic: bool) -> None:
    x = torch.randn(20, H)
    if dynamic:  # weights have static sizes, as parameters do
        torch._dynamo.mark_dynamic(x, 0)
    report = fused_within_contract(linear(SPELLINGS[spelling]), x, dynamic=None if dynamic else False)
    report.expect(quantize=1, dequantize=1)
    assert report.ops == {"quantize": 1, "quant_linear": 1}


LOOK_ALIKES: dict[str, Linear] = {
    "sums that are given": lambda q, s, z: product(q).float() * s - (z.float() * s) * SUMS.float(),
    "sums of another weight": lambda q, s, z: product(q).float() * s - (z.float() * s) * (WEIGHT + 1).sum(-1).float(),
    "sums of rows": lambda q, s, z: product(q).float() * s - (z.float() * s) * WEIGHT[:, :1].sum(-1).float(),
    "another scale": lambda q, s, z: product(q).float() * s - (z.float() * (s + 1)) * sums().float(),
    "added": lambda q, s, z: product(q).float() * s + (z.float() * s) * sums().float(),
    "any number": lambda q, s, z: product(q).float() * s - (s.exp() * s) * sums().float(),
}


@pytest.mark.parametrize("spelling", LOOK_ALIKES)
def test_look_alikes(spelling: str) -> None:
    report = fused_within_contract(linear(LOOK_ALIKES[spelling]), torch.randn(20, H))
    assert not report.rule_errors
    assert report.launches_after > 2


def test_exact_rounding_keeps_what_is_subtracted_in_floats() -> None:
    fn: Any = linear(SPELLINGS["scaled by rows"])
    x = torch.randn(20, H)
    actual, report = fused(fn, x, config=FusionConfig(rounding="exact"))
    assert torch.equal(actual, fn(x))
    assert report.launches_after > 2
