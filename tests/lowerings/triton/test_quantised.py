"""Quantising ops by Triton: which calls the providers take, why not others, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.ops.norm_quant import add_rms_norm_quant, dequant_glu_quant, glu_quant, rms_norm_quant
from npu_fusion.ops.quant import dequantize, quant_linear, quantize
from tests.lowerings.ascend.checks import lower_call

H, N = 32, 16
X = torch.randn(2, 3, H)
GAMMA, CHANNELS = torch.rand(H) + 0.5, torch.rand(H) * 20 + 1
Q, WEIGHT = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((2, 3, H), (H, N)))
SUMS = torch.randint(-(2**16), 2**16, (2, 3, H), dtype=torch.int32)
ROWS, COLUMNS = torch.rand(2, 3, 1) * 0.01, torch.rand(N) * 0.01
CUDA = {"target": "cuda"}
EXACT = {**CUDA, "rounding": "exact"}
FLOOR: dict[str, Any] = {"floor_mode": "amax", "floor": 1e-5}

TAKEN: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "rows": (lambda x: quantize(x, **FLOOR), (X,), "dynamic_quantize"),
    "rows, smoothed": (lambda x, s: quantize(x, smooth=s, apply="reciprocal"), (X, GAMMA), "dynamic_quantize"),
    "a range": (lambda x: quantize(x, symmetric=False, with_zero=True, steps=255.0), (X,), "asymmetric_quantize"),
    "channels": (lambda x, s: quantize(x, s, apply="multiply"), (X, CHANNELS), "static_quantize"),
    "a zero point": (lambda x, s, z: quantize(x, s, z, round_last=True), (X, torch.tensor([[[0.05]]]), torch.tensor(3)), "static_quantize"),
    "whole again": (lambda x, r, c: dequantize(x, r, c), (SUMS, ROWS, GAMMA), "dequantize"),
    "linear": (lambda x, w, r, c: quant_linear(x, w, r, c, out_dtype=torch.bfloat16), (Q, WEIGHT, ROWS, COLUMNS), "int8_matmul"),
    "linear, bias": (lambda x, w, c, b: quant_linear(x, w, c, None, b), (Q, WEIGHT, COLUMNS, COLUMNS), "int8_matmul"),
    "linear, rows": (lambda x, w, r: quant_linear(x, w, r), (Q, WEIGHT, ROWS), "int8_matmul"),
    "linear, zero points": (
        lambda x, w, r, c, z: quant_linear(x, w, r, c, None, z, w.sum(0)),
        (Q, WEIGHT, ROWS, COLUMNS, Q[..., :1].float()),
        "int8_matmul",
    ),
    "product": (lambda x, w: quant_linear(x, w), (Q, WEIGHT), "int8_matmul"),
    "norm": (lambda x, w: rms_norm_quant(x, w, 1e-5, return_norm=True, **FLOOR), (X, GAMMA), "rms_norm_quant"),
    "norm, given": (lambda x, w, s: rms_norm_quant(x, w, 1e-5, s, apply="multiply"), (X, GAMMA, CHANNELS), "rms_norm_quant"),
    "sum": (lambda x, r, w: add_rms_norm_quant(x, r, w, 1e-5), (X, X.flip(0), GAMMA), "add_rms_norm_quant"),
    "unit": (lambda x: glu_quant(x, None), (X,), "glu_quant"),
    "unit of sums": (lambda x, r, c: dequant_glu_quant(x, r, c), (SUMS, ROWS, CHANNELS * 1e-4), "dequant_glu_quant"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_taken(case: str) -> None:
    whole, tensors, name = TAKEN[case]

    def call(*tensors: Tensor) -> list[Tensor]:
        """The results that there are."""
        results = whole(*tensors)
        return [result for result in (results if isinstance(results, tuple) else (results,)) if result.numel()]

    found = lower_call(call, *tensors, **CUDA)
    assert found.provider.startswith("triton."), found.reason
    assert f"npu_fusion_triton.{name}" in found.targets()
    for result, wanted in zip(found.gm(*tensors), call(*tensors), strict=True):
        assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
        if wanted.dtype == torch.int8:
            assert (result.int() - wanted.int()).abs().max() <= 1
            assert (result != wanted).float().mean() < 0.02
        else:
            torch.testing.assert_close(result, wanted, rtol=1e-2 if wanted.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "config", "reason"),
    [
        (lambda x: quantize(x, dtype=torch.uint8, low=0.0, high=255.0), CUDA, "stores int8"),
        (lambda x: quantize(x, per_tensor=True), CUDA, "a scale for each row"),
        (lambda x: quantize(x, steps=127.5), CUDA, "127 steps"),
        (lambda x: quantize(x, floor_mode="one"), CUDA, "no floor of the kind"),
        (lambda x: quantize(x, steps_reciprocal=True), EXACT, "rounding is 'exact'"),
        (lambda x: quantize(x, symmetric=False, steps=255.0), CUDA, "without 0"),
        (lambda x: quantize(x, torch.ones(2, 3, 1)), CUDA, "differs from row to row"),
        (lambda x: quantize(x.bfloat16()), EXACT, "rounding is 'exact'"),
    ],
)
def test_refused(call: Callable[[Tensor], Any], config: dict[str, Any], reason: str) -> None:
    found = lower_call(call, X, **config)
    assert found.provider.split(" + ")[-1] == REFERENCE
    assert reason in found.reason


def test_what_is_refused_as_a_whole_is_taken_apart() -> None:
    found = lower_call(lambda x: glu_quant(x, None, **FLOOR)[:2], X, **EXACT)
    assert found.provider == "triton.glu + triton.dynamic_quantize"
    assert "triton.glu_quant: the kernel has no least scale" in found.reason
    for result, wanted in zip(found.gm(X), glu_quant(X, None, **FLOOR)):
        torch.testing.assert_close(result, wanted, atol=1, rtol=1e-5)


@pytest.mark.parametrize(("rows", "reason"), [(3, "differs from row to row"), (1, None)])
def test_a_scale_that_multiplies_twice_counts_twice(rows: int, reason: str | None) -> None:
    x, scale = Q[0, :rows], ROWS[0, :rows]
    found = lower_call(lambda x, w, r: quant_linear(x, w, r, r), x, WEIGHT, scale, **CUDA)
    assert found.reason == reason or (reason or "") in found.reason
    torch.testing.assert_close(found.gm(x, WEIGHT, scale), quant_linear(x, WEIGHT, scale, scale))
