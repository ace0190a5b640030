"""Self-test cases of quantisation: scales found and given, norms and gated units that quantise, int8 products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .case import BF16, FP16, FP32, HALVES, Arguments, Case, Inputs, Shape, case

_QINT8, _QUINT8 = 12, 13
_RESULTS = {3: torch.int32, 5: FP16, 15: BF16}


def cases() -> Iterator[Case]:
    """Rows of real widths, smoothed and not; every way to give a scale; all results of products."""
    for dtype in HALVES:
        for smooth in (False, True):
            yield case("npu::npu_dynamic_quant", _dynamic, dtype, (2, 16, 4096), smooth=smooth)
            yield case("npu::npu_add_rms_norm_dynamic_quant", _sums, dtype, (2, 16, 4096), smooth=smooth)
        for divide in (True, False):
            yield case("npu::npu_quantize", _given, dtype, (7, 1536), divide=divide, zero=True)
            yield case("npu::npu_add_rms_norm_quant", _sums_given, dtype, (7, 1536), divide=divide)
        yield case("npu::npu_swiglu_quant", _unit, dtype, (16, 4096), activate_left=True)
    yield case("npu::npu_quantize", _given, FP32, (7, 1536), divide=True, zero=False, dtype_code=_QUINT8)
    yield case("npu::npu_swiglu_quant", _unit, FP32, (16, 2816), activate_left=False)
    for left in (True, False):
        yield case("npu::npu_dequant_swiglu_quant", _unit_of_sums, (16, 4096), activate_left=left)
    for code in _RESULTS:
        yield case("npu::npu_quant_matmul", _product, tokens=48, k=512, n=256, code=code, bias=FP32 if code != 3 else torch.int32)
    yield case("npu::npu_quant_matmul", _product, tokens=1, k=512, n=256, code=15, bias=None)


def _dynamic(inputs: Inputs, dtype: torch.dtype, shape: Shape, smooth: bool) -> Arguments:
    arguments: dict[str, Any] = {"input": inputs.normal(shape, dtype)}
    return {**arguments, "smooth_scales": inputs.near_one(shape[-1:], dtype)} if smooth else arguments


def _given(inputs: Inputs, dtype: torch.dtype, shape: Shape, divide: bool, zero: bool, dtype_code: int = _QINT8) -> Arguments:
    x = inputs.normal(shape, dtype)
    steps = inputs.near_one(shape[-1:], FP32)
    scales = steps / 32 if divide else (steps * 32).to(dtype)
    zeros = inputs.integers(shape[-1:], 16, torch.int32)
    points = (zeros if divide else zeros.to(dtype)) if zero else None
    return {"input": x, "scales": scales, "zero_points": points, "dtype": dtype_code, "axis": -1, "div_mode": divide}


def _sums(inputs: Inputs, dtype: torch.dtype, shape: Shape, smooth: bool) -> Arguments:
    tensors = {name: inputs.normal(shape, dtype) for name in ("x1", "x2")}
    arguments: dict[str, Any] = {**tensors, "gamma": inputs.near_one(shape[-1:], dtype), "epsilon": 1e-5, "output_mask": [True, False]}
    return {**arguments, "smooth_scale1": inputs.near_one(shape[-1:], dtype)} if smooth else arguments


def _sums_given(inputs: Inputs, dtype: torch.dtype, shape: Shape, divide: bool) -> Arguments:
    tensors = {name: inputs.normal(shape, dtype) for name in ("x1", "x2")}
    steps = inputs.near_one(shape[-1:], FP32)
    zeros = inputs.integers(shape[-1:], 16, torch.int32)
    norm = {"gamma": inputs.near_one(shape[-1:], dtype), "epsilon": 1e-5}
    return {**tensors, **norm, "scales1": steps / 32 if divide else steps * 32, "zero_points1": zeros, "div_mode": divide}


def _unit(inputs: Inputs, dtype: torch.dtype, shape: Shape, activate_left: bool) -> Arguments:
    smooth = inputs.near_one((1, shape[-1] // 2), FP32)
    return {"x": inputs.normal(shape, dtype, scale=2.0), "smooth_scales": smooth, "activate_left": activate_left, "quant_mode": 1}


def _unit_of_sums(inputs: Inputs, shape: Shape, activate_left: bool) -> Arguments:
    rows, width = shape
    scales = {"weight_scale": inputs.near_one((1, width), FP32) / 1024, "activation_scale": inputs.near_one((rows,), FP32) / 8}
    smooth = inputs.near_one((1, width // 2), FP32)
    x = (inputs.normal(shape, FP32) * 8192).to(torch.int32)
    return {"x": x, **scales, "quant_scale": smooth, "activate_left": activate_left, "quant_mode": 1}


def _product(inputs: Inputs, tokens: int, k: int, n: int, code: int, bias: torch.dtype | None) -> Arguments:
    x1, x2 = ((inputs.normal(shape, FP32) * 40).round().clamp(-128, 127).to(torch.int8) for shape in ((tokens, k), (n, k)))
    arguments: dict[str, Any] = {"x1": x1, "x2": x2.t(), "scale": inputs.near_one((n,), FP32) / 4096, "output_dtype": code}
    if code != 3:
        arguments["pertoken_scale"] = inputs.near_one((tokens,), FP32) / 8
    if bias is not None:
        arguments["bias"] = (inputs.normal((n,), FP32) * (100 if bias == torch.int32 else 1)).to(bias)
    return arguments
