"""Quantising ops on Ascend: what becomes which op, what does not and why, and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion
from npu_fusion.lower import REFERENCE
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.norm_quant import add_rms_norm_quant, dequant_glu_quant, glu_quant, rms_norm_quant
from npu_fusion.ops.quant import quant_linear, quantize
from tests.lowerings.ascend.checks import lower_call

H, N = 128, 32
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLOOR: dict[str, Any] = {"floor_mode": "amax", "floor": 1e-5, "compute_dtype": FP32}
X = torch.randn(2, 3, H)
X[0, 1] = 0  # a row without a largest number
GAMMA, CHANNELS = torch.rand(H) + 0.5, torch.rand(H) * 20 + 1
CODES, WEIGHT = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((2, 3, H), (N, H)))
SUMS = torch.randint(-(2**16), 2**16, (2, 3, H), dtype=torch.int32)
ROWS, COLUMNS, BIAS = torch.rand(2, 3, 1) * 0.01 + 0.005, torch.rand(N) * 0.01, torch.randn(N)
ZERO = torch.tensor(3, dtype=torch.int32)
Fn = Callable[..., Any]


def halves(*tensors: Tensor, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    return tuple(tensor.to(dtype) for tensor in tensors)


def results(found: Any) -> list[Tensor]:
    return [result for result in (found if isinstance(found, (tuple, list)) else (found,)) if result.numel()]


def assert_quantised(actual: list[Tensor], wanted: list[Tensor]) -> None:
    """Numbers differ where a quotient is halfway, seldom, and by what the model's own roundings to 16 bits make; floats by those."""
    for a, w in zip(actual, wanted, strict=True):
        assert (a.shape, a.dtype) == (w.shape, w.dtype)
        if a.dtype in (torch.int8, torch.uint8):
            apart = (a.int() - w.int()).abs()
            assert apart.max() <= 2
            assert apart.float().mean() < 0.15
        else:
            torch.testing.assert_close(a, w, rtol=1.6e-2 if a.dtype == BF16 else 1e-2, atol=2e-6)


TAKEN: dict[str, tuple[Fn, tuple[Tensor, ...], str]] = {
    "rows": (lambda x: quantize(x, **FLOOR), halves(X), "npu_dynamic_quant"),
    "rows, fp16": (lambda x: quantize(x, apply="reciprocal", low=-127.0, **FLOOR), halves(X, dtype=FP16), "npu_dynamic_quant"),
    "rows, smoothed": (lambda x, s: quantize(x, smooth=s, **FLOOR), halves(X, GAMMA), "npu_dynamic_quant"),
    "rows, zero is one": (lambda x: quantize(x, floor_mode="one", compute_dtype=FP32), halves(X), "npu_dynamic_quant"),
    "channels, divided": (lambda x, s: quantize(x, s), (X, GAMMA / 16), "npu_quantize"),
    "channels, multiplied": (lambda x, s: quantize(x, s, apply="multiply"), (*halves(X), CHANNELS), "npu_quantize"),
    "one scale and zero": (lambda x, s, z: quantize(x, s, z, round_last=True), (X, torch.tensor(0.05), ZERO), "npu_quantize"),
    "a scale, zeros": (lambda x, s, z: quantize(x, s, z, apply="multiply"), (X, torch.tensor([9.0]), ZERO.expand(H)), "npu_quantize"),
    "unsigned": (
        lambda x, s, z: quantize(x, s, z, round_last=True, low=0.0, high=255.0, dtype=torch.uint8),
        (*halves(X), torch.tensor(0.05), ZERO),
        "npu_quantize",
    ),
    "sum": (lambda x, r, w: add_rms_norm_quant(x, r, w, 1e-5, **FLOOR), halves(X, X.flip(0), GAMMA), "npu_add_rms_norm_dynamic_quant"),
    "sum, smoothed": (
        lambda x, r, w: add_rms_norm_quant(x, r, w, 1e-5, smooth=w, round_dtype=FP16, **FLOOR),
        halves(X, X.flip(0), GAMMA, dtype=FP16),
        "npu_add_rms_norm_dynamic_quant",
    ),
    "sum, given": (
        lambda x, r, w, s, z: add_rms_norm_quant(x, r, w, 1e-5, s, z, apply="multiply"),
        (*halves(X, X.flip(0), GAMMA), CHANNELS, ZERO),
        "npu_add_rms_norm_quant",
    ),
    "sum, one given": (
        lambda x, r, w, s: add_rms_norm_quant(x, r, w, 1e-5, s, round_dtype=FP16),
        (*halves(X, X.flip(0), GAMMA, dtype=FP16), torch.tensor(0.05)),
        "npu_add_rms_norm_quant",
    ),
    "unit": (lambda x: glu_quant(x, None, **FLOOR), halves(X), "npu_swiglu_quant"),
    "unit, swapped": (lambda x, s: glu_quant(x, None, layout="swapped", smooth=s, **FLOOR), (X, GAMMA[: H // 2]), "npu_swiglu_quant"),
    "unit of sums": (
        lambda x, r, c: dequant_glu_quant(x, r, c, sum_out_dtype=BF16, product_dtype=BF16, **FLOOR),
        (SUMS, ROWS, CHANNELS * 1e-4),
        "npu_dequant_swiglu_quant",
    ),
    "unit of sums, bias": (
        lambda x, r, c, b: dequant_glu_quant(x, c, r, sum_bias=b, sum_bias_first=True, layout="swapped", smooth=c[: H // 2], **FLOOR),
        (SUMS, ROWS, CHANNELS * 1e-4, SUMS[0, 0]),
        "npu_dequant_swiglu_quant",
    ),
    "linear": (lambda x, w, r, c: quant_linear(x, w.t(), r, c, out_dtype=BF16), (CODES, WEIGHT, ROWS, COLUMNS), "npu_quant_matmul"),
    "linear, fp16": (
        lambda x, w, c, b: quant_linear(x, w.t(), c, None, b, out_dtype=FP16),
        (CODES, WEIGHT, COLUMNS, BIAS.half()),
        "npu_quant_matmul",
    ),
    "linear, bias first": (
        lambda x, w, r, b: quant_linear(x, w.t(), r, None, b, bias_first=True, out_dtype=BF16),
        (CODES, WEIGHT, ROWS, BIAS.int()),
        "npu_quant_matmul",
    ),
    "product": (lambda x, w: quant_linear(x, w.t()), (CODES, WEIGHT), "npu_quant_matmul"),
    "linear, a zero point": (
        lambda x, w, r, c, z, b: quant_linear(x, w.t(), r, c, b, z, w.sum(-1), bias_first=True, out_dtype=BF16),
        (CODES, WEIGHT, ROWS, COLUMNS, torch.tensor(7, dtype=torch.int8), BIAS.int()),
        "npu_quant_matmul",
    ),
    "product, zero points of rows": (
        lambda x, w, z: quant_linear(x, w.t(), None, None, None, z, w.sum(-1)),
        (CODES, WEIGHT, CODES[..., :1]),
        "npu_quant_matmul",
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", TAKEN)
def test_taken(case: str, dynamic: bool) -> None:
    fn, inputs, name = TAKEN[case]
    if dynamic:
        inputs = tuple(x.clone() for x in inputs)
        fn, inputs = _with_dynamic_rows(fn, inputs)
    found = lower_call(lambda *args: results(fn(*args)), *inputs)
    assert found.provider == f"npu.{name}", found.reason
    assert f"npu.{name}" in found.targets()
    assert_quantised(results(found.gm(*inputs)), results(fn(*inputs)))


def test_a_scale_that_multiplies_twice_counts_twice() -> None:
    found = lower_call(lambda x, w, r: quant_linear(x, w.t(), r, r, out_dtype=BF16), CODES, WEIGHT, ROWS)
    assert found.provider == "npu.npu_quant_matmul + aten"
    assert "differs from row to row" in found.reason
    torch.testing.assert_close(found.gm(CODES, WEIGHT, ROWS), quant_linear(CODES, WEIGHT.t(), ROWS, ROWS, out_dtype=BF16))


def _with_dynamic_rows(fn: Fn, inputs: tuple[Tensor, ...]) -> tuple[Fn, tuple[Tensor, ...]]:
    """The same for rows in one dimension."""
    flat = tuple(x.flatten(0, 1) if x.dim() == 3 else x for x in inputs)
    return fn, flat


@pytest.mark.parametrize(
    ("call", "inputs", "reason"),
    [
        (lambda x: quantize(x, **FLOOR), (X,), "input is float32, not float16 or bfloat16"),
        (lambda x: quantize(x, steps=127.5), halves(X), "it makes 127 steps, the model 127.5"),
        (lambda x: quantize(x, floor_mode="scale", floor=0.1), halves(X), "is no small one"),
        (lambda x: quantize(x, floor_mode="add_scale", floor=1e-5), halves(X), "no floor of the kind 'add_scale'"),
        (lambda x: quantize(x, high=63.0), halves(X), "its numbers go up to 127"),
        (lambda x: quantize(x, per_tensor=True), halves(X), "a scale for each row"),
        (lambda x: quantize(x, symmetric=False, with_zero=True, steps=255.0), halves(X), "does not round the zero point"),
        (lambda x: 1 / quantize(x, **FLOOR)[1], halves(X), "the model does more with it than multiply"),
        (lambda x: quantize(x, torch.ones(2, 3, 1)), (X,), "scale differs from row to row"),
        (lambda x: quantize(x, torch.ones(()), low=-127.0), (X,), "it clamps to the range of bytes"),
        (lambda x: quantize(x, torch.ones(()), apply="reciprocal"), (X,), "the reciprocal of the scale"),
        (lambda x, w: quant_linear(x, w.t(), torch.ones((), dtype=torch.float64), compute_dtype=torch.float64), (CODES, WEIGHT), "float64"),
    ],
)
def test_refused(call: Fn, inputs: tuple[Tensor, ...], reason: str) -> None:
    found = lower_call(call, *inputs)
    assert found.provider == REFERENCE
    assert reason in found.reason


def test_exact_rounding() -> None:
    """With `rounding="exact"` dynamic scales stay the reference's; given ones are taken where the model divides in fp32."""
    found = lower_call(lambda x: quantize(x), *halves(X), rounding="exact")
    assert "rounding is 'exact'" in found.reason
    found = lower_call(lambda x: quantize(x, torch.tensor(0.05)), X, rounding="exact")
    assert torch.equal(found.gm(X)[0], quantize(X, torch.tensor(0.05))[0])
    found = lower_call(lambda x, z: quantize(x, torch.tensor(0.05), z), X, ZERO, rounding="exact")
    assert "before it rounds" in found.reason
    found = lower_call(lambda x: quantize(x, torch.tensor(0.05), value_dtype=BF16), *halves(X), rounding="exact")
    assert "computes the quotient in fp32" in found.reason


@pytest.mark.parametrize(
    "options",
    [{}, {"combined": True, "round_dtype": BF16, "out_dtype": BF16}, {"compute_dtype": BF16}, {"bias_first": True, "out_dtype": FP16}],
)
def test_sums_then_scales_give_the_models_bits(options: dict[str, Any]) -> None:
    """Float32 results, and any others with exact rounding: whole sums by the op, the scales step by step."""
    bias = BIAS.int() if "bias_first" in options else BIAS

    def fn(x: Tensor, w: Tensor, r: Tensor, c: Tensor, b: Tensor) -> Tensor:
        y: Tensor = quant_linear(x, w.t(), r, c, b, **options)
        return y

    inputs = (CODES, WEIGHT, ROWS, COLUMNS, bias)
    found = lower_call(fn, *inputs, rounding="exact")
    assert found.provider == "npu.npu_quant_matmul + aten"
    assert torch.equal(found.gm(*inputs), fn(*inputs))


@pytest.mark.parametrize(
    ("call", "inputs", "parts"),
    [
        (lambda x, w: rms_norm_quant(x, w, 1e-5, **FLOOR), halves(X, GAMMA), "npu.npu_rms_norm + npu.npu_dynamic_quant"),
        (lambda x, w: rms_norm_quant(x, w, 1e-5, torch.tensor(0.05)), halves(X, GAMMA), "npu.npu_rms_norm + npu.npu_quantize"),
        (
            lambda x, r, w: add_rms_norm_quant(x, r, w, 1e-5, return_norm=True, **FLOOR),
            halves(X, X.flip(0), GAMMA),
            "npu.npu_add_rms_norm_cast + npu.npu_dynamic_quant",
        ),
        (lambda x: glu_quant(x, None, gate_limit=7.0, up_limit=7.0, **FLOOR), halves(X), "npu.npu_clipped_swiglu + npu.npu_dynamic_quant"),
        (lambda g, u: glu_quant(g, u, **FLOOR), halves(X, X.flip(0)), "aten.cat + npu.npu_swiglu + npu.npu_dynamic_quant"),
    ],
)
def test_taken_apart(call: Fn, inputs: tuple[Tensor, ...], parts: str) -> None:
    """What no op takes as a whole: each part by its own."""
    found = lower_call(lambda *args: results(call(*args)), *inputs)
    assert found.provider == parts, found.reason
    assert_quantised(results(found.gm(*inputs)), results(call(*inputs)))


# -------------------------------------------------------------------- products


def product(tokens: int, out: torch.dtype, bias: str | None, per_tensor: bool = False) -> dict[str, Any]:
    given: dict[str, Any] = {
        "x": torch.randint(-128, 128, (tokens, H), dtype=torch.int8),
        "weight": torch.randint(-128, 128, (N, H), dtype=torch.int8).t(),
        "scale": torch.rand(1 if per_tensor else N) / 1000,
        "scale2": torch.rand(tokens, 1) / 100,
    }
    if bias == "last":
        given["bias"] = torch.randn(N).to(out)
    elif bias == "first":
        given["bias"] = torch.randint(-1000, 1000, (N,), dtype=torch.int32)
    return given


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("out", [BF16, FP16], ids=str)
@pytest.mark.parametrize("bias", [None, "first", "last"])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_products(tokens: int, out: torch.dtype, bias: str | None, per_tensor: bool) -> None:
    given = product(tokens, out, bias, per_tensor)

    def fn(*tensors: Tensor) -> Tensor:
        return quant_linear(*tensors, bias_first=bias == "first", out_dtype=out)

    found = lower_call(fn, *given.values())
    assert found.provider == "npu.npu_quant_matmul"
    assert "aten.clone" not in found.targets()
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    truth = quant_linear(*wide.values(), bias_first=bias == "first", compute_dtype=torch.float64, out_dtype=torch.float64)
    assert_within_contract(found.gm(*given.values()), fn(*given.values()), truth, out)


# -------------------------------------------------------------------- a model


class Block(torch.nn.Module):
    """Residual sum, RMSNorm, int8 activations by rows, an int8 linear; a SwiGLU whose result is quantised for another one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter((torch.rand(H) + 0.5).bfloat16())
        for name, shape in (("up", (2 * H, H)), ("down", (H, H))):
            self.register_buffer(name, torch.randint(-127, 128, shape, dtype=torch.int8))
            self.register_buffer(f"{name}_scale", torch.rand(shape[0]) * 1e-3 + 1e-3)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, weight_scale = self.get_buffer(name), self.get_buffer(f"{name}_scale")
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        q = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(q, weight.t()).float() * scale * weight_scale).to(x.dtype)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        h = total.float()
        h = self.norm * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        gate, up = self.linear(h, "up").chunk(2, -1)
        return self.linear(torch.nn.functional.silu(gate) * up, "down"), total


@pytest.mark.parametrize("dynamic", [False, True])
def test_model(dynamic: bool) -> None:
    block = Block()
    x, residual = (torch.randn(32, H).bfloat16() for _ in range(2))
    compiled = torch.compile(block, backend="npu_fusion", dynamic=dynamic, options={"target": "ascend910b", "emulate": True})
    with torch.no_grad():
        for actual, wanted in zip(compiled(x, residual), block(x, residual), strict=True):
            error = (actual.double() - wanted.double()).square().mean().sqrt()
            assert error <= 2e-2 * wanted.double().square().mean().sqrt()
    report = npu_fusion.report(compiled)
    report.expect(rms_norm=1, residual_add=1, glu=1, quantize=2, dequantize=2)
    ran = {site.lowered_to for site in report.sites if site.fused}
    assert ran >= {"npu.npu_add_rms_norm_dynamic_quant"}
    assert not any(REFERENCE in str(name) for name in ran), str(report)
