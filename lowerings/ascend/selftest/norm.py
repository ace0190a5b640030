"""Self-test cases of the normalisations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import BF16, FLOATS, FP16, FP32, HALVES, Arguments, Case, Inputs, Shape, case


def cases() -> Iterator[Case]:
    """Widths of real models, heads of 128, one row, an odd number of rows, mixed dtypes, an input that is not contiguous."""
    for op in ("npu::npu_rms_norm", "npu::npu_gemma_rms_norm"):
        yield case(op, _rms_norm, BF16, (2, 16, 4096))
        yield case(op, _rms_norm, BF16, (1, 7168))
        yield case(op, _rms_norm, FP16, (3, 5, 8, 128))
        yield case(op, _rms_norm, FP32, (7, 1536))
        yield case(op, _rms_norm, BF16, (8, 16, 128), layout="transposed")
    for dtype in HALVES:
        yield case("npu::npu_rms_norm", _rms_norm, dtype, (4, 2048), gamma=FP32)
    for dtype in FLOATS:
        for shape in ((2, 16, 4096), (1, 7168), (7, 1536)):
            yield case("npu::npu_add_rms_norm", _add_rms_norm, dtype, shape)
    for dtype in HALVES:
        for shape in ((2, 16, 4096), (7, 1536)):
            yield case("npu::npu_add_rms_norm_cast", _add_rms_norm, dtype, shape)


def _rms_norm(inputs: Inputs, dtype: torch.dtype, shape: Shape, gamma: torch.dtype | None = None, layout: str = "contiguous") -> Arguments:
    x = inputs.normal(shape, dtype)
    if layout == "transposed":
        x = x.transpose(0, 1)
    return {"input": x, "gamma": inputs.near_one(shape[-1:], gamma or dtype), "epsilon": 1e-5}


def _add_rms_norm(inputs: Inputs, dtype: torch.dtype, shape: Shape) -> Arguments:
    x1, x2 = inputs.normal(shape, dtype), inputs.normal(shape, dtype, scale=3.0)
    return {"x1": x1, "x2": x2, "gamma": inputs.near_one(shape[-1:], dtype), "epsilon": 1e-5}
