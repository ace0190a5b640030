"""Self-test cases of the gated linear units and activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .case import BF16, FLOATS, FP16, FP32, HALVES, Arguments, Case, Inputs, Shape, case


def cases() -> Iterator[Case]:
    """Both ways of splitting, both GELUs, either half activated, values beyond the clamps."""
    for dtype in FLOATS:
        yield case("npu::npu_swiglu", _activation, dtype, (2, 16, 2816))
        yield case("npu::npu_clipped_swiglu", _clipped, dtype, (24, 2880), interleaved=True)
    yield case("npu::npu_swiglu", _activation, BF16, (2, 6, 512), dim=1)
    yield case("npu::npu_clipped_swiglu", _clipped, BF16, (24, 2880), interleaved=False, alpha=1.5, limit=2.0, bias=0.0)
    for approximate in (0, 1):
        for left in (False, True):
            yield case("npu::npu_geglu", _activation, BF16, (2, 16, 2048), dim=-1, approximate=approximate, activate_left=left)
    yield case("npu::npu_geglu", _activation, FP16, (7, 512), dim=-1, approximate=1)
    for dtype in FLOATS:
        yield case("npu::npu_fast_gelu", _activation, dtype, (4, 1024))
    for dtype in (BF16, FP32):
        for form in ("none", "tanh"):
            yield case("npu::npu_gelu", _activation, dtype, (4, 1024), approximate=form)
    for dtype in HALVES:
        for form in ("none", "tanh"):
            yield case("npu::npu_gelu_mul", _activation, dtype, (4, 1024), approximate=form)
    yield case("npu::npu_silu", _activation, FP16, (4, 1024))


def _activation(inputs: Inputs, dtype: torch.dtype, shape: Shape, **options: Any) -> Arguments:
    return {"input": inputs.normal(shape, dtype, scale=2.0), **options}


def _clipped(inputs: Inputs, dtype: torch.dtype, shape: Shape, **options: Any) -> Arguments:
    return {"x": inputs.normal(shape, dtype, scale=4.0), **options}
