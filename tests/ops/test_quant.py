"""References of quantize, dequantize and quant_linear: a model's own bits, metadata, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.ops.quant import dequantize, quant_linear, quantize
from npu_fusion.ops.quant_core import QUANTIZATION_NAMES
from tests.ops.checks import DTYPES, check_op

H = 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_quantised_as_models_do(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, H, dtype=dtype)
    x[0, 0] = 0
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    q, found, zero = check_op(quantize, x, floor_mode="amax", floor=1e-5)
    assert torch.equal(q, (x / scale).round().clamp(-128, 127).to(torch.int8))
    assert torch.equal(found, scale)
    assert zero.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_scales(dtype: torch.dtype) -> None:
    x, scale, zero = torch.randn(3, H, dtype=dtype), torch.rand(H) + 0.1, torch.randint(-5, 5, (H,))
    q, *nothing = check_op(quantize, x, scale, zero, apply="reciprocal")
    assert torch.equal(q, ((x * (1 / scale)).round() + zero).clamp(-128, 127).to(torch.int8))
    assert all(tensor.numel() == 0 for tensor in nothing)


def test_asymmetric_scales_hold_the_range() -> None:
    x = torch.randn(4, H) + 3
    q, scale, zero = check_op(quantize, x, symmetric=False, with_zero=True, steps=255.0)
    assert ((q - zero) * scale - x).abs().max() <= 0.51 * scale.max()


@pytest.mark.parametrize(
    "options",
    [
        {"per_tensor": True},
        {"floor_mode": "one"},
        {"floor_mode": "one_amax"},
        {"floor_mode": "add_scale", "floor": 1e-6},
        {"apply": "multiply"},
        {"apply": "narrow_reciprocal", "scale_dtype": torch.bfloat16},
        {"smooth": torch.rand(H) + 0.5},
        {"smooth": torch.rand(H) + 0.5, "smooth_divide": True, "steps_reciprocal": True},
        {"dtype": torch.float8_e4m3fn, "low": -448.0, "high": 448.0, "steps": 448.0},
        {"dtype": torch.float32, "steps": 7.0, "low": -8.0, "high": 7.0},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items() if name != "smooth") or "smooth",
)
def test_forms_come_back(options: dict[str, Any]) -> None:
    x = torch.randn(3, H)
    q, scale, _ = check_op(quantize, x, **options)
    back = q.float() * scale.float()
    if "smooth" in options:
        back = back * options["smooth"] if options.get("smooth_divide") else back / options["smooth"]
    step = 32 if options.get("dtype") is torch.float8_e4m3fn else 1  # of a float8 near its largest number
    assert (back - x).abs().max() <= 1.1 * step * scale.float().max()


def test_dequantize_keeps_the_order_of_products() -> None:
    x = torch.randint(-(2**20), 2**20, (3, H), dtype=torch.int32)
    weight, rows, bias = torch.rand(H), torch.rand(3, 1), torch.randn(H)
    assert torch.equal(check_op(dequantize, x, rows, weight, None, bias), x.float() * rows * weight + bias)
    combined = check_op(dequantize, x, rows, weight, combined=True, out_dtype=torch.bfloat16)
    assert torch.equal(combined, (x.float() * (rows * weight)).bfloat16())


def test_quant_linear_is_exact() -> None:
    x = torch.full((2, 3, 2048), -128, dtype=torch.int8)
    weight = torch.full((5, 2048), -128, dtype=torch.int8).t()
    assert torch.equal(check_op(quant_linear, x, weight), torch.full((2, 3, 5), 2**25, dtype=torch.int32))
    bias = torch.arange(5, dtype=torch.int32)
    y = check_op(quant_linear, x, weight, torch.full((5,), 2.0), None, bias, bias_first=True, out_dtype=torch.float32)
    assert torch.equal(y[0, 0], (2**25 + bias).float() * 2)


def test_the_names_are_those_of_the_schema() -> None:
    names = {spec.name for spec in quantize.overload._schema.arguments}
    assert names == {"x", *QUANTIZATION_NAMES}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: quantize(x.int()), TypeError, "floating point"),
        (lambda x: quantize(x, torch.ones(3)), ValueError, "does not broadcast"),
        (lambda x: quantize(x, None, torch.ones(())), ValueError, "a zero point needs a scale"),
        (lambda x: quantize(x, apply="shift"), ValueError, "apply must be one of"),
        (lambda x: quantize(x, low=3.0, high=3.0), ValueError, "low must be less"),
        (lambda x: dequantize(x.to(torch.int8), None), ValueError, "a scale is needed"),
        (lambda x: quant_linear(x, torch.ones(H, 2)), TypeError, "must be int8"),
        (lambda x: quant_linear(x.to(torch.int8), torch.ones(H, 2).to(torch.int8), zero_point=torch.ones(())), ValueError, "together"),
        (lambda x: quant_linear(x.to(torch.int8), torch.ones(H + 1, 2).to(torch.int8)), ValueError, "inputs of weight"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    x: Tensor = torch.ones(2, H)
    with pytest.raises(error, match=message):
        call(x)
