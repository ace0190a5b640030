"""Norms and gated units whose results are quantised: one op for both, with the model's own bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parameters import dtypes_and_shapes
from tests.patterns.support import fused

DTYPES = (torch.float32, torch.bfloat16)
H, N = 16, 32
GAMMA = torch.rand(H) + 0.5
CHANNELS = torch.rand(H) * 20 + 1
WEIGHT = torch.randint(-127, 128, (N, H), dtype=torch.int8)
SCALE = torch.rand(N) * 0.01 + 0.001

ROW_SCALES = torch.rand(20, 1) * 0.01 + 0.001


def norm(x: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
    return GAMMA.to(x.dtype) * h.to(x.dtype)


def found(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


def given(x: Tensor) -> tuple[Tensor]:
    return ((x * CHANNELS).round().clamp(-128, 127).to(torch.int8),)


def added(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return *found(norm(total)), total


def of_rows(y: Tensor) -> tuple[Tensor, ...]:
    """As a linear does that flattens its tokens first; the scales keep no dimension of their own."""
    rows = y.reshape(-1, y.shape[-1])
    scale = rows.float().abs().amax(-1).clamp(min=1e-5) / 127
    return (rows / scale.unsqueeze(1)).round().clamp(-128, 127).to(torch.int8), scale


def one_scale(y: Tensor) -> tuple[Tensor, ...]:
    rows = y.flatten(0, 1)
    scale = rows.float().abs().amax().clamp(min=1e-5) / 127
    return (rows / scale).round().clamp(-128, 127).to(torch.int8), scale


def given_rows(y: Tensor) -> tuple[Tensor, ...]:
    rows = y.reshape(-1, y.shape[-1])
    return ((rows / ROW_SCALES).round().clamp(-128, 127).to(torch.int8),)


def unit(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def of_sums(x: Tensor) -> tuple[Tensor, ...]:
    q, scale = found(x)
    acc = torch._int_mm(q.flatten(0, 1), WEIGHT.t())
    h = (acc.float() * scale.flatten(0, 1) * SCALE).view(*x.shape[:2], N).to(x.dtype)
    return found(unit(h))


CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], str, dict[str, int]]] = {
    "norm": (lambda x: found(norm(x)), (H,), "rms_norm_quant", {"rms_norm": 1, "quantize": 1}),
    "norm, given scale": (lambda x: given(norm(x)), (H,), "rms_norm_quant", {"rms_norm": 1, "quantize": 1}),
    "norm, read elsewhere": (lambda x: (*found(y := norm(x)), y * 2), (H,), "rms_norm_quant", {"rms_norm": 1, "quantize": 1}),
    "norm, returned": (lambda x: (*found(y := norm(x)), y), (H,), "rms_norm_quant", {"rms_norm": 1, "quantize": 1}),
    "sum": (added, (H, H), "add_rms_norm_quant", {"residual_add": 1, "rms_norm": 1, "quantize": 1}),
    "unit": (lambda x: found(unit(x)), (N,), "glu_quant", {"glu": 1, "quantize": 1}),
    "norm of rows": (lambda x: of_rows(norm(x)), (H,), "rms_norm_quant", {"rms_norm": 1, "quantize": 1}),
    "norm of rows, read elsewhere": (lambda x: (*of_rows(y := norm(x)), y.flatten(0, 1) * 2), (H,), "rms_norm_quant", {"quantize": 1}),
    "norm of rows, given scales": (lambda x: given_rows(norm(x)), (H,), "rms_norm_quant", {"rms_norm": 1, "quantize": 1}),
    "norm of rows, one scale": (lambda x: one_scale(norm(x)), (H,), "rms_norm_quant", {"rms_norm": 1, "quantize": 1}),
    "unit of rows": (lambda x: of_rows(unit(x)), (N,), "glu_quant", {"glu": 1, "quantize": 1}),
    "unit of sums": (of_sums, (H,), "dequant_glu_quant", {"glu": 1, "quantize": 2, "dequantize": 1}),
}


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_one_op(case: str, dtype: torch.dtype, dynamic: bool) -> None:
    fn, sizes, op, idioms = CASES[case]
    inputs = [torch.randn(4, 5, size, dtype=dtype) for size in sizes]
    with torch.no_grad():
        eager = fn(*inputs)
    actual, report = fused(fn, *inputs, dynamic=dynamic)
    assert not report.rule_errors, report.rule_errors
    report.expect(**idioms)
    assert report.ops[op] == 1
    assert not set(report.ops) & {"rms_norm", "add_rms_norm", "glu"}
    for a, e in zip(actual, eager, strict=True):
        assert torch.equal(a, e)


def test_a_normalised_tensor_that_is_changed_before_it_is_quantised() -> None:
    report = fused(lambda x: found(torch.tanh(norm(x))), torch.randn(4, 5, H))[1]
    assert report.ops == {"rms_norm": 1, "quantize": 1}


def test_groups_of_channels_are_quantised() -> None:
    report = fused(lambda x: found(norm(x).unflatten(-1, (-1, 8))), torch.randn(4, 5, H))[1]
    assert report.ops == {"rms_norm": 1, "quantize": 1}


def test_another_row_is_quantised() -> None:
    report = fused(lambda x: found(norm(x).flip(0)), torch.randn(4, 5, H))[1]
    assert report.ops == {"rms_norm": 1, "quantize": 1}


def test_a_unit_whose_gate_alone_was_dequantised() -> None:
    def half(x: Tensor) -> tuple[Tensor, Tensor]:
        acc = torch._int_mm(found(x)[0], WEIGHT.t()).float() * SCALE
        return found(F.silu(acc) * x.repeat(1, 2))

    assert fused(half, torch.randn(20, H))[1].ops["dequant_glu_quant"] == 0
