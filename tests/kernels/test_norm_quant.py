"""RMSNorm with int8 results against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.triton.norm import add_rms_norm, rms_norm
from npu_fusion.lowerings.triton.norm_quant import add_rms_norm_quant, rms_norm_quant
from npu_fusion.lowerings.triton.quant import dynamic_quantize, static_quantize
from npu_fusion.ops import norm as semantic
from tests.kernels.agreement import CORES, HIDDEN, assert_nearest, strided
from tests.ops.checks import check_op

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-5
# Blocks and tiles that are not full; for an NPU a row that is walked.
planned = pytest.mark.parametrize(("plan", "size"), [("own", (3, 100)), ("own", (17, 64)), ("npu", (1, 1100))], indirect=["plan"], ids=str)


def inputs(size: tuple[int, ...], device: str, dtype: torch.dtype = FP16) -> tuple[Tensor, Tensor, Tensor]:
    """x, a residual and a weight."""
    x, residual = torch.randn(size, device=device, dtype=dtype), torch.randn(size, device=device, dtype=dtype)
    return x, residual, 1 + 0.2 * torch.randn(size[-1], device=device, dtype=dtype)


def assert_quantised(q: Tensor, scale: Tensor, norm: Tensor, tolerance: float = 1e-3) -> None:
    """q and scale are those of a norm of float64; `tolerance` is what the norm may be off, in units of the scale."""
    torch.testing.assert_close(scale.double(), norm.abs().amax(-1) / 127, rtol=1e-5, atol=0.0)
    assert (q.double() * scale.double()[..., None] - norm).abs().div(scale.double()[..., None]).max() <= 0.5 + tolerance


@planned
@pytest.mark.parametrize(("dtype", "offset"), [(BF16, 0), (FP32, 1)], ids=str)
def test_rms_norm_per_token(plan: str, size: tuple[int, int], dtype: torch.dtype, offset: int, device: str) -> None:
    x, _, weight = inputs(size, device, dtype)
    call: dict[str, Any] = {"weight_offset": offset, "divide": bool(offset), "cores": CORES}
    q, scale, norm = rms_norm_quant(x, weight, EPS, **call)
    assert norm.shape == (0,)
    assert_quantised(q, scale, semantic.rms_norm(x.double(), weight.double(), EPS, weight_offset=offset))


@planned
@pytest.mark.parametrize(("extra", "unrounded"), [((), False), (("bias", "smooth"), True), (("bias", "beta", "smooth"), False)], ids=str)
def test_add_rms_norm_per_token(plan: str, size: tuple[int, int], extra: tuple[str, ...], unrounded: bool, device: str) -> None:
    x, residual, weight = inputs(size, device)
    vectors = {name: torch.rand(size[1], device=device, dtype=FP16) + 0.1 for name in extra}
    call: dict[str, Any] = {"norm_unrounded": unrounded, "return_norm": True, "cores": CORES}
    q, scale, norm, total = add_rms_norm_quant(x, residual, weight, EPS, **vectors, **call)
    exact = x.double() + residual.double() + vectors.get("bias", torch.zeros_like(weight)).double()
    assert torch.equal(total, exact.to(FP16))
    expected = semantic.rms_norm(exact if unrounded else total.double(), weight.double(), EPS) + vectors.get(
        "beta", torch.zeros_like(weight)
    )
    torch.testing.assert_close(norm.double(), expected, rtol=1e-3, atol=1e-3)
    assert norm.dtype == FP16
    assert_quantised(q, scale, expected * vectors.get("smooth", torch.ones_like(weight)))


@planned
@pytest.mark.parametrize(("channels", "divide"), [(False, None), (True, False), (True, True)], ids=str)
def test_with_given_scales(plan: str, size: tuple[int, int], channels: bool, divide: bool | None, device: str) -> None:
    x, residual, weight = inputs(size, device)
    count = size[1] if channels else 1
    scale = (torch.rand(count, device=device) + 1) * (60 if divide is False else 0.012)
    zero = torch.randint(-30, 30, (count,), device=device, dtype=torch.int8 if channels else torch.int32)
    call: dict[str, Any] = {"scale": scale, "zero_point": zero, "divide": divide, "lowest": -127, "cores": CORES}
    q, no_scale, no_norm, total = add_rms_norm_quant(x, residual, weight, EPS, **call)
    assert no_scale.shape == no_norm.shape == (0,)
    assert torch.equal(total, x + residual)
    norm = semantic.rms_norm(total.double(), weight.double(), EPS)
    factor = scale.double() if divide is not False else 1 / scale.double()
    units = (norm / factor + zero).clamp(-127, 127)
    assert (q.double() - units).abs().max() <= 0.501
    assert (q == -127).any()
    alone, _, _ = rms_norm_quant(total, weight, EPS, **call)
    assert (alone.int() - q.int()).abs().max() <= 1


@pytest.mark.parametrize(("static", "rounds"), [(False, None), (True, FP16)], ids=["per token", "given"])
def test_the_norm_is_rounded_before_it_is_quantised(static: bool, rounds: torch.dtype | None, plan: str, device: str) -> None:
    """Then the quantised norm is, to the bit, what the returned one gives, which is that of the op without quantisation."""
    x, residual, weight = inputs((2, 1100), device)
    smooth, one = torch.rand(1100, device=device), torch.full((1,), 0.02, device=device)
    by: dict[str, Any] = {"scale": one} if static else {"smooth": smooth}
    rounding: dict[str, Any] = {"round_dtype": rounds, "cores": CORES}
    q, _, norm, total = add_rms_norm_quant(x, residual, weight, EPS, norm_dtype=FP16, return_norm=True, **by, **rounding)
    expected = static_quantize(norm, one, cores=CORES) if static else dynamic_quantize(norm, smooth=smooth, cores=CORES)[0]
    assert torch.equal(q, expected)
    alone, _, _ = rms_norm_quant(total, weight, EPS, norm_dtype=FP16, **by, **rounding)
    assert (alone != q).float().mean() < 0.01
    without, _ = add_rms_norm(x, residual, weight, EPS, out_dtype=FP16, **rounding)
    assert (without != norm).float().mean() < 0.01
    kept = add_rms_norm_quant(x, residual, weight, EPS, return_norm=True, **by, cores=CORES)
    assert (kept[0] != q).any()
    assert (kept[2] != norm).any() == (rounds is not None)


@pytest.mark.parametrize("rows", [3, pytest.param(4097, marks=pytest.mark.gpu)])
def test_the_same_bits_from_call_to_call(rows: int, device: str) -> None:
    x, residual, weight = inputs((rows, 100), device)
    for scale in (None, weight):
        first, second = (add_rms_norm_quant(x, residual, weight, EPS, scale=scale, cores=CORES) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_dtypes_of_the_results(device: str) -> None:
    x, residual, weight = inputs((2, 16), device, FP16)
    _, _, norm, total = add_rms_norm_quant(x, residual.float(), weight, EPS, return_norm=True, cores=CORES)
    assert (norm.dtype, total.dtype) == (FP32, FP32)
    call: dict[str, Any] = {"sum_dtype": FP16, "norm_dtype": BF16, "return_norm": True, "cores": CORES}
    _, _, norm, total = add_rms_norm_quant(x, residual.float(), weight, EPS, **call)
    assert (norm.dtype, total.dtype) == (BF16, FP16)
    assert rms_norm_quant(x, None, EPS, return_norm=True, cores=CORES)[2].dtype == FP16


@pytest.mark.parametrize(
    ("plan", "width", "bad"),
    [("own", 64, float("nan")), ("own", 64, float("inf")), ("npu", 1100, float("inf"))],
    indirect=["plan"],
    ids=str,
)
def test_what_is_not_finite_stays_in_its_row_and_shows_in_its_scale(plan: str, width: int, bad: float, device: str) -> None:
    x, residual, weight = inputs((3, width), device)
    before = add_rms_norm_quant(x, residual, weight, EPS, cores=CORES)
    x[1, width // 2] = bad
    after = add_rms_norm_quant(x, residual, weight, EPS, cores=CORES)
    assert after[1][1].isnan()
    for b, a in zip(before, after):
        assert torch.equal(b[::2], a[::2])


@pytest.mark.parametrize(("plan", "width", "least"), [("own", 64, 0.0), ("npu", 1100, 1e-4)], indirect=["plan"], ids=str)
def test_rows_of_zeros(plan: str, width: int, least: float, device: str) -> None:
    x, _, weight = inputs((3, width), device)
    x[1] = 0
    q, scale, _ = rms_norm_quant(x, weight, EPS, min_scale=least, cores=CORES)
    assert (q[1] == 0).all()
    assert scale[1].item() == pytest.approx(least)
    assert (scale[::2] > 1e-3).all()


@pytest.mark.parametrize("order", ["even", "uneven", "transposed"])
def test_rows_that_lie_apart(order: str, device: str) -> None:
    x, residual = strided(order, device), strided("even", device)
    weight = torch.rand(80, device=device)[::2]
    actual = add_rms_norm_quant(x, residual, weight, EPS, beta=weight, cores=CORES)
    dense = weight.contiguous()
    for a, e in zip(actual, add_rms_norm_quant(x.contiguous(), residual.contiguous(), dense, EPS, beta=dense, cores=CORES)):
        assert a.is_contiguous()
        assert torch.equal(a, e)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    x, weight = torch.empty(shape, device=device), torch.empty(shape[-1], device=device)
    q, scale, norm, total = add_rms_norm_quant(x, x, weight, EPS, return_norm=True, min_scale=0.5, cores=CORES)
    assert (q.shape, scale.shape, norm.shape, total.shape) == (x.shape, x.shape[:-1], x.shape, x.shape)
    assert (scale == 0.5).all()
    assert rms_norm_quant(x, weight, EPS, scale=torch.ones((), device=device), cores=CORES)[0].shape == x.shape


def test_fake_kernels(device: str) -> None:
    x, residual, weight = inputs((2, 3, 16), device)
    check_op(add_rms_norm_quant, x, residual, weight, EPS, bias=weight, smooth=weight, return_norm=True, cores=CORES)
    check_op(add_rms_norm_quant, x, residual.float(), None, EPS, scale=weight, zero_point=weight, cores=CORES)
    check_op(rms_norm_quant, x, weight, EPS, norm_dtype=BF16, cores=CORES)


def bad_calls(device: str) -> dict[str, tuple[type[Exception], Any]]:
    x, residual, weight = inputs((2, 8), device, FP32)

    def add(**changes: Any) -> Any:
        return add_rms_norm_quant(**{"x": x, "residual": residual, "weight": weight, "eps": EPS, "cores": CORES, **changes})

    return {
        "add_rms_norm_quant: residual must have shape [2, 8], not [8]": (ValueError, lambda: add(residual=weight)),
        "add_rms_norm_quant: beta must have shape [8], not [7]": (ValueError, lambda: add(beta=weight[1:])),
        "add_rms_norm_quant: bias must be one of float16, bfloat16, float32, not torch.int32": (TypeError, lambda: add(bias=weight.int())),
        "add_rms_norm_quant: weight_offset needs a weight": (ValueError, lambda: add(weight=None, weight_offset=1)),
        "add_rms_norm_quant: weight_offset must be one of 0, 1, not 2": (ValueError, lambda: add(weight_offset=2)),
        "add_rms_norm_quant: zero_point needs a scale": (ValueError, lambda: add(zero_point=weight)),
        "add_rms_norm_quant: lowest needs a scale": (ValueError, lambda: add(lowest=-127)),
        "add_rms_norm_quant: smooth is of the quantisation per token": (ValueError, lambda: add(smooth=weight, scale=weight)),
        "add_rms_norm_quant: min_scale is of the quantisation per token": (ValueError, lambda: add(min_scale=0.1, scale=weight)),
        "add_rms_norm_quant: min_scale must be 0, or finite": (ValueError, lambda: add(min_scale=float("nan"))),
        "add_rms_norm_quant: scale must have shape [8], not [3]": (ValueError, lambda: add(scale=weight[:3])),
        "add_rms_norm_quant: norm_dtype must be one of float16, bfloat16, float32, not torch.float64": (
            TypeError,
            lambda: add(norm_dtype=torch.float64),
        ),
        "add_rms_norm_quant: sum_dtype must be one of float16, bfloat16, float32, not torch.int8": (
            TypeError,
            lambda: add(sum_dtype=torch.int8),
        ),
        "add_rms_norm_quant: round_dtype must be one of float16, bfloat16, float32, not torch.float64": (
            TypeError,
            lambda: add(round_dtype=torch.float64),
        ),
        "rms_norm_quant: x must be one of float16, bfloat16, float32, not torch.int64": (
            TypeError,
            lambda: rms_norm_quant(x.long(), weight, EPS, cores=CORES),
        ),
        "rms_norm_quant: cores must be positive: -1": (ValueError, lambda: rms_norm_quant(x, weight, EPS, cores=-1)),
    }


@pytest.mark.parametrize("message", bad_calls("cpu"))
def test_wrong_arguments(message: str, device: str) -> None:
    error, call = bad_calls(device)[message]
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 4097])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_full_matrix(rows: int, hidden: int, dtype: torch.dtype, device: str) -> None:
    x, residual, weight = inputs((rows, hidden), device, dtype)
    q, scale, norm, total = add_rms_norm_quant(x, residual, weight, EPS, return_norm=True, cores=CORES)
    assert torch.equal(total, x + residual)
    assert_quantised(q, scale, semantic.rms_norm(total.double(), weight.double(), EPS), tolerance=2e-3)
    torch.testing.assert_close(norm, rms_norm(total, weight, EPS, cores=CORES))
    rounded, scales, rounded_norm = rms_norm_quant(total, weight, EPS, norm_dtype=dtype, return_norm=True, cores=CORES)
    assert_nearest(rounded, rounded_norm.double(), scales.double()[:, None])
    static, _, _ = rms_norm_quant(total, weight, EPS, norm_dtype=dtype, scale=weight.float() * 0.02, cores=CORES)
    assert (static != static_quantize(rounded_norm, weight.float() * 0.02, cores=CORES)).float().mean() < 0.01


@pytest.mark.gpu
def test_many_rows(device: str) -> None:
    x, residual, weight = inputs((65537, 256), device, BF16)
    q, scale, _, total = add_rms_norm_quant(x, residual, weight, EPS, cores=CORES)
    assert_quantised(q, scale, semantic.rms_norm(total.double(), weight.double(), EPS), tolerance=2e-3)
