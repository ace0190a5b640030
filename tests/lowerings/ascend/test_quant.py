"""Quantisation on Ascend: what becomes npu_dynamic_quant and npu_quant_matmul, what does not and why, ops taken apart, and the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.norm_quant import add_rms_norm_quant, dequant_glu_quant, glu_quant, rms_norm_quant
from npu_fusion.ops.quant import quant_linear, quantize
from tests.lowerings.ascend.checks import lower_call

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUANT, MATMUL = "npu.npu_dynamic_quant", "npu.npu_quant_matmul"
WIDE = {"compute_dtype": FP32, "value_dtype": FP32}  # scale and quotient in fp32, as the op has them
TOKENS, INPUTS, OUTPUTS = 5, 64, 48


def rows(dtype: torch.dtype = BF16) -> Tensor:
    x = torch.randn(2, TOKENS, INPUTS).to(dtype)
    x[0, 1] = 0
    return x


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "how", [{}, WIDE, {**WIDE, "floor_mode": "amax", "floor": 1e-5}, {**WIDE, "low": -127.0, "apply": "reciprocal"}], ids=str
)
def test_rows(how: dict[str, Any], dtype: torch.dtype) -> None:
    x = rows(dtype)
    found = lower_call(lambda x: quantize(x, **how)[:2], x)
    assert found.provider == QUANT
    q, scale = found.gm(x)
    wanted, wanted_scale, _ = quantize(x, **{**WIDE, **how, "floor_mode": "amax", "floor": 1e-9})
    assert q.dtype == torch.int8
    assert q.shape == x.shape
    assert (q.int() - wanted.int()).abs().max() <= 1
    assert not q[0, 1].any()
    torch.testing.assert_close(scale.float(), wanted_scale.float(), rtol=2 ** (-7 if "compute_dtype" not in how else -20), atol=1e-6)


def test_exactly_the_model() -> None:
    x = rows(FP16)
    found = lower_call(lambda x: quantize(x, **WIDE)[:2], x, rounding="exact")
    assert found.provider == QUANT
    for given, wanted in zip(found.gm(x), quantize(x[1:], **WIDE)[:2]):
        assert torch.equal(given[1:], wanted)


@pytest.mark.parametrize(
    ("how", "dtype", "reason"),
    [
        ({"steps": 127.5}, BF16, "it has 127 steps, the model 127.5"),
        ({"dtype": torch.uint8, "low": 0.0, "high": 255.0}, BF16, "it stores int8, the model torch.uint8"),
        ({"per_tensor": True}, BF16, "it finds a scale for each row, the model one for all"),
        ({"floor_mode": "add_scale", "floor": 1e-6}, BF16, "it has no floor of the kind 'add_scale'"),
        ({"floor_mode": "scale", "floor": 0.5}, BF16, "it has no least scale, the model's is 0.5"),
        ({}, FP32, "input is float32"),
    ],
    ids=str,
)
def test_refused(how: dict[str, Any], dtype: torch.dtype, reason: str) -> None:
    found = lower_call(lambda x: quantize(x, **how)[:2], rows(dtype))
    assert found.provider == REFERENCE
    assert reason in (found.reason or "")


def test_exact_rounding_refuses_a_scale_of_bf16() -> None:
    assert lower_call(lambda x: quantize(x)[:2], rows(), rounding="exact").provider == REFERENCE


# -------------------------------------------------------------------- products


def product(tokens: int, out: torch.dtype, bias: str | None, per_tensor: bool = False) -> dict[str, Any]:
    given: dict[str, Any] = {
        "x": torch.randint(-128, 128, (tokens, INPUTS), dtype=torch.int8),
        "weight": torch.randint(-128, 128, (OUTPUTS, INPUTS), dtype=torch.int8).t(),
        "scale": torch.rand(1 if per_tensor else OUTPUTS) / 1000,
        "scale2": torch.rand(tokens, 1) / 100,
    }
    if bias == "last":
        given["bias"] = torch.randn(OUTPUTS).to(out)
    elif bias == "first":
        given["bias"] = torch.randint(-1000, 1000, (OUTPUTS,), dtype=torch.int32)
    return given


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("out", [BF16, FP16], ids=str)
@pytest.mark.parametrize("bias", [None, "first", "last"])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_products(tokens: int, out: torch.dtype, bias: str | None, per_tensor: bool) -> None:
    given = product(tokens, out, bias, per_tensor)

    def fn(*tensors: Tensor) -> Tensor:
        return quant_linear(*tensors, bias_first=bias == "first", out_dtype=out)

    found = lower_call(fn, *given.values())
    assert found.provider == MATMUL
    assert "aten.clone" not in found.targets()
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    truth = quant_linear(*wide.values(), bias_first=bias == "first", compute_dtype=torch.float64, out_dtype=torch.float64)
    assert_within_contract(found.gm(*given.values()), fn(*given.values()), truth, out)


@pytest.mark.parametrize(("out", "reason"), [(FP32, "it gives float16 and bfloat16"), (None, "it gives float16 and bfloat16")])
def test_products_refused(out: torch.dtype | None, reason: str) -> None:
    given = product(TOKENS, BF16, None)
    found = lower_call(lambda *tensors: quant_linear(*tensors, out_dtype=out), *given.values())
    assert found.provider == REFERENCE
    assert reason in (found.reason or "")


def test_products_of_whole_numbers_stay_whole() -> None:
    given = product(TOKENS, BF16, None)
    found = lower_call(lambda x, w: quant_linear(x, w), given["x"], given["weight"])
    assert found.provider == REFERENCE
    assert torch.equal(found.gm(given["x"], given["weight"]), given["x"].int() @ given["weight"].int())


# -------------------------------------------------------------------- ops of several parts


def test_norms_are_taken_apart() -> None:
    """Nothing here computes a quantised norm: the norm and the quantisation have their own ops, and the numbers stay those of the parts."""
    x, residual, weight = rows(), rows(), torch.randn(INPUTS).to(BF16)
    found = lower_call(lambda x, w: rms_norm_quant(x, w, 1e-6)[:2], x, weight)
    assert found.provider == f"npu.npu_rms_norm + {QUANT}"

    def add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        q, scale, _, _, total = add_rms_norm_quant(x, residual, weight, 1e-6, norm_unrounded=True, round_dtype=BF16)
        return q, scale, total

    added = lower_call(add, x, residual, weight)
    assert added.provider == f"npu.npu_add_rms_norm + {QUANT}"
    q, _, total = added.gm(x, residual, weight)
    assert torch.equal(total, x + residual)
    wanted = add_rms_norm_quant(x, residual, weight, 1e-6, norm_unrounded=True, round_dtype=BF16)[0]
    assert (q.int() - wanted.int()).abs()[1:].max() <= 1


def test_gated_units_are_taken_apart() -> None:
    gate_up = torch.randn(TOKENS, 2 * INPUTS).to(BF16)
    found = lower_call(lambda x: glu_quant(x, None)[:2], gate_up)
    assert found.provider == f"npu.npu_swiglu + {QUANT}"
    wanted, scale, _ = glu_quant(gate_up, None)
    q, found_scale = found.gm(gate_up)
    assert (q.int() - wanted.int()).abs().max() <= 1
    torch.testing.assert_close(found_scale, scale, rtol=2**-7, atol=0)


@pytest.mark.parametrize("op", [rms_norm_quant, add_rms_norm_quant, glu_quant, dequant_glu_quant], ids=lambda op: op.name)
def test_the_parts_compute_the_same_bit_for_bit(op: Any) -> None:
    x, weight = rows(), torch.randn(INPUTS).to(BF16)
    arguments: dict[str, dict[str, Any]] = {
        "rms_norm_quant": {"x": x, "weight": weight, "eps": 1e-6, "return_norm": True, "smooth": weight},
        "add_rms_norm_quant": {
            "x": x,
            "residual": rows(),
            "weight": weight,
            "eps": 1e-6,
            "return_norm": True,
            "symmetric": False,
            "steps": 255.0,
        },
        "glu_quant": {"gate": x, "up": None, "floor_mode": "amax", "floor": 1e-5},
        "dequant_glu_quant": {
            "x": torch.randint(-9999, 9999, (TOKENS, INPUTS), dtype=torch.int32),
            "sum_scale": torch.rand(INPUTS) / 1000,
            "sum_scale2": torch.rand(TOKENS, 1),
            "sum_out_dtype": BF16,
        },
    }
    parts = []

    def call(part: Any, *args: Any, **kwargs: Any) -> Any:
        parts.append(part.name)
        return part(*args, **kwargs)

    whole, apart = op(**arguments[op.name]), op.taken_apart(call, arguments[op.name])
    assert tuple(parts) == op.parts
    for one, other in zip(whole, apart):
        assert torch.equal(one.nan_to_num() if one.is_floating_point() else one, other.nan_to_num() if other.is_floating_point() else other)
