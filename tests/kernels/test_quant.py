"""Quantisation to int8 and back against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.triton.quant import asymmetric_quantize, dequantize, dynamic_quantize, static_quantize
from tests.kernels.agreement import CORES, HIDDEN, assert_nearest, strided
from tests.ops.checks import check_op, tensors_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Blocks that are not full, a tile that is not full; for an NPU two tiles of 32 rows or more, a row that is walked.
planned = pytest.mark.parametrize(
    ("plan", "size"), [("own", (3, 100)), ("own", (17, 64)), ("npu", (65, 64)), ("npu", (1, 5000))], indirect=["plan"], ids=str
)


def per_token(x: Tensor, smooth: Tensor | None, min_scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """What is quantised, and its scales, in float64."""
    v = x.double() * (1.0 if smooth is None else smooth.double())
    scale = (v.abs().amax(-1) / 127).clamp_min(min_scale)
    return v, scale


def check_dynamic(x: Tensor, smooth: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    q, scale = dynamic_quantize(x, smooth=smooth, **options, cores=CORES)
    v, expected = per_token(x, smooth, options.get("min_scale", 0.0))
    torch.testing.assert_close(scale.double(), expected, rtol=3e-7, atol=0.0)
    assert_nearest(q, v, scale.double()[..., None])
    return q, scale


@planned
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_per_token(size: tuple[int, int], dtype: torch.dtype, device: str, plan: str) -> None:
    q, _ = check_dynamic(torch.randn(size, device=device, dtype=dtype))
    assert (q.int().abs().amax(-1) == 127).all()


@pytest.mark.parametrize("divide", [False, True], ids=["times", "over"])
def test_per_token_smoothed(divide: bool, device: str, plan: str) -> None:
    x, smooth = torch.randn(2, 3, 100, device=device, dtype=FP16), torch.rand(200, device=device)[::2]
    check_dynamic(x, smooth, divide=divide)
    check_dynamic(torch.randn(1, 2500, device=device), torch.rand(2500, device=device, dtype=BF16), divide=divide)


@pytest.mark.parametrize("rows", [3, pytest.param(4097, marks=pytest.mark.gpu)])
def test_the_same_bits_from_call_to_call(rows: int, device: str) -> None:
    x, scale = torch.randn(rows, 100, device=device), torch.rand(100, device=device)
    for op, arguments in ((dynamic_quantize, ()), (asymmetric_quantize, ()), (static_quantize, (scale,))):
        assert all(map(torch.equal, tensors_of(op(x, *arguments, cores=CORES)), tensors_of(op(x, *arguments, cores=CORES))))


def test_division_is_that_of_eager(device: str) -> None:
    x = torch.randn(4, 1000, device=device)
    q, scale = dynamic_quantize(x, divide=True, cores=CORES)
    assert torch.equal(scale, x.abs().amax(-1) / torch.full((4,), 127.0, device=device))
    assert torch.equal(q, torch.round(x / scale[:, None]).to(torch.int8))


def test_halves_go_to_even(device: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], device=device)
    q, scale = dynamic_quantize(x, cores=CORES)
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("least", [0.0, 1e-5])
def test_rows_of_zeros(least: float, device: str, plan: str) -> None:
    x = torch.randn(40, 64, device=device)
    x[3], x[39] = 0, 1e-9
    q, scale = check_dynamic(x, min_scale=least)
    assert (q[3] == 0).all()
    assert scale[3].item() == pytest.approx(least)
    assert (q[39] == (0 if least else 127)).all()


def test_a_scale_too_small_to_divide_by_is_zero(device: str) -> None:
    x = torch.tensor([[1e-37, -1e-37], [1e-35, -1e-35]], device=device)
    q, scale = dynamic_quantize(x, cores=CORES)
    assert scale[0] == 0
    assert q.tolist() == [[0, 0], [127, -127]]


@pytest.mark.parametrize(("plan", "width"), [("own", 64), ("npu", 5000)], indirect=["plan"], ids=str)
@pytest.mark.parametrize("bad", [-float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_in_its_row_and_shows_in_its_scale(bad: float, width: int, device: str, plan: str) -> None:
    x = torch.randn(3, width, device=device)
    before = dynamic_quantize(x, cores=CORES), asymmetric_quantize(x, cores=CORES)
    x[1, width // 2] = bad
    after = dynamic_quantize(x, cores=CORES), asymmetric_quantize(x, cores=CORES)
    for results, spoilt in zip(before, after):
        assert not spoilt[1][1].isfinite()
        for b, a in zip(results, spoilt):
            assert torch.equal(b[::2], a[::2])
    assert after[0][1][1].isnan() == (bad != bad)


@planned
@pytest.mark.parametrize("whole", [False, True], ids=["any zero", "whole zero"])
@pytest.mark.parametrize("lowest", [-128, -127])
def test_asymmetric(size: tuple[int, int], whole: bool, lowest: int, device: str, plan: str) -> None:
    x = torch.randn(size, device=device, dtype=BF16) + torch.linspace(-3, 3, size[0], device=device, dtype=BF16)[:, None]
    options: dict[str, Any] = {"with_zero": whole, "whole_zero": whole, "lowest": lowest, "divide": whole}
    q, scale, zero = asymmetric_quantize(x, **options, cores=CORES)
    low, high = x.double().aminmax(dim=-1)
    if whole:
        low, high = low.clamp_max(0), high.clamp_min(0)
        assert torch.equal(zero, zero.round())
        assert ((zero >= lowest) & (zero <= 127)).all()
    torch.testing.assert_close(scale.double(), (high - low) / (127 - lowest), rtol=3e-7, atol=0.0)
    torch.testing.assert_close(zero.double(), 127 - high / scale.double(), rtol=0.0, atol=0.5001 if whole else 1e-4)
    assert_nearest(q, x.double(), scale.double()[:, None], zero.double()[:, None], lowest)
    if not whole:
        assert (q.amax(-1) == 127).all()
        assert (q.amin(-1) == lowest).all()


def test_asymmetric_smoothed_is_quantised_as_the_product(device: str, plan: str) -> None:
    x, smooth = torch.randn(3, 100, device=device), torch.rand(100, device=device)
    for actual, expected in zip(asymmetric_quantize(x, smooth=smooth, cores=CORES), asymmetric_quantize(x * smooth, cores=CORES)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("value", [0.0, 2.5, -0.75, 1e-39])
def test_rows_of_one_value_come_back(value: float, device: str) -> None:
    q, scale, zero = asymmetric_quantize(torch.full((2, 10), value, device=device), cores=CORES)
    back = dequantize(q, scale, None, row_zero_point=zero, out_dtype=FP32, cores=CORES)
    torch.testing.assert_close(back, torch.full_like(back, value), rtol=1e-6, atol=1e-38)


SCALES: list[Any] = [
    ("one", None, True),
    ("channels", None, False),
    ("one", "one", False),
    ("channels", "one", True),
    ("channels", "channels", False),
]


@pytest.mark.parametrize(("scales", "zeros", "divide"), SCALES, ids=str)
@planned
def test_static(scales: str, zeros: str | None, divide: bool, size: tuple[int, int], device: str, plan: str) -> None:
    x = torch.randn(size, device=device, dtype=FP16)
    scale = (torch.rand(1 if scales == "one" else size[1], device=device) + 1) * (0.01 if divide else 70)
    zero = None if zeros is None else torch.randint(-40, 40, [] if zeros == "one" else size[1:], device=device, dtype=torch.int32)
    q = static_quantize(x, scale, zero, divide=divide, cores=CORES)
    v = x.float() / scale if divide else x.float() * scale
    expected = torch.round(v if zero is None else v + zero).clamp(-128, 127)
    assert torch.equal(q, expected.to(torch.int8))
    assert (q == -128).any()
    assert (q == 127).any()


@pytest.mark.parametrize("zero", [torch.int8, torch.int32, BF16, FP16, FP32], ids=str)
def test_static_dtypes_and_range(zero: torch.dtype, device: str) -> None:
    x = torch.tensor([[-500.0, -1.5, 0.5, 500.0, float("inf"), -float("inf")]], device=device, dtype=BF16)
    scale, zeros = torch.ones(1, device=device, dtype=BF16), torch.tensor([3], device=device).to(zero)
    q = static_quantize(x, scale, zeros, lowest=-127, cores=CORES)
    assert q.tolist() == [[-127, 2, 4, 127, 127, -127]]


@planned
@pytest.mark.parametrize("source", [torch.int8, torch.int32], ids=str)
def test_dequantize(source: torch.dtype, size: tuple[int, int], device: str, plan: str) -> None:
    x = torch.randint(-128, 128, size, device=device, dtype=source)
    rows, channels = torch.rand(size[0], device=device), torch.rand(size[1], device=device, dtype=BF16)
    zeros, row_zeros = torch.randint(-9, 9, size[1:], device=device, dtype=torch.int8), torch.randn(size[0], device=device)
    bias = torch.randn(size[1], device=device, dtype=FP16)
    y = dequantize(x, rows, channels, row_zero_point=row_zeros, zero_point=zeros, bias=bias, out_dtype=FP32, cores=CORES)
    expected = (x.double() - row_zeros[:, None] - zeros) * channels * rows[:, None] + bias
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    plain = dequantize(x, None, channels[:1], out_dtype=FP16, cores=CORES)  # the interpreter does not round to bf16, it truncates
    assert torch.equal(plain, (x.float() * channels[0].float()).to(FP16))


def test_dequantize_with_a_bias_of_whole_numbers(device: str, plan: str) -> None:
    x = torch.randint(-(2**23), 2**23, (3, 100), device=device, dtype=torch.int32)
    bias = torch.randint(-1000, 1000, (100,), device=device, dtype=torch.int32)
    rows, channels = torch.rand(3, device=device), torch.rand(100, device=device)
    y = dequantize(x, rows, channels, bias=bias, out_dtype=FP32, cores=CORES)
    torch.testing.assert_close(y.double(), (x + bias).double() * channels * rows[:, None], rtol=5e-7, atol=0.0)


@pytest.mark.parametrize("order", ["even", "uneven", "transposed"])
def test_rows_that_lie_apart(order: str, device: str) -> None:
    x = strided(order, device)
    plain = x.contiguous()
    for op, arguments in ((dynamic_quantize, ()), (asymmetric_quantize, ()), (static_quantize, (torch.tensor(0.02, device=device),))):
        actual, expected = op(x, *arguments, cores=CORES), op(plain, *arguments, cores=CORES)
        for a, e in zip(*((r,) if isinstance(r, Tensor) else r for r in (actual, expected))):
            assert a.is_contiguous()
            assert torch.equal(a, e)
    whole = (x * 20).to(torch.int8)
    of_rows, channels = torch.rand(x.shape[:-1], device=device).mT.contiguous().mT, torch.rand(2 * x.shape[-1], device=device)[::2]
    back = dequantize(whole, of_rows, channels, out_dtype=FP32, cores=CORES)
    assert torch.equal(back, dequantize(whole.contiguous(), of_rows.contiguous(), channels.contiguous(), out_dtype=FP32, cores=CORES))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    x, one = torch.empty(shape, device=device), torch.ones(1, device=device)
    q, scale = dynamic_quantize(x, min_scale=0.5, cores=CORES)
    assert (q.shape, scale.shape, q.dtype, scale.dtype) == (x.shape, x.shape[:-1], torch.int8, FP32)
    assert (scale == 0.5).all()
    assert [t.shape for t in asymmetric_quantize(x, cores=CORES)] == [x.shape, x.shape[:-1], x.shape[:-1]]
    assert static_quantize(x, one, cores=CORES).shape == x.shape
    assert dequantize(x.to(torch.int8), None, one, out_dtype=BF16, cores=CORES).shape == x.shape


def test_one_row_of_one_dimension(device: str) -> None:
    q, scale = dynamic_quantize(torch.tensor([1.0, -2.0], device=device), cores=CORES)
    assert (q.tolist(), scale.shape) == ([64, -127], ())


def test_fake_kernels(device: str) -> None:
    x, smooth, one = torch.randn(2, 3, 16, device=device), torch.rand(16, device=device), torch.ones(1, device=device)
    q, scale = check_op(dynamic_quantize, x, smooth=smooth, cores=CORES)
    _, _, zero = check_op(asymmetric_quantize, x, smooth=smooth, with_zero=True, cores=CORES)
    check_op(static_quantize, x, smooth, one.to(torch.int8), cores=CORES)
    check_op(dequantize, q, scale, smooth, row_zero_point=zero, bias=smooth, out_dtype=BF16, cores=CORES)


def bad_calls(device: str) -> dict[str, tuple[type[Exception], Any]]:
    x, vector, whole = torch.randn(2, 8, device=device), torch.rand(8, device=device), torch.zeros(2, 8, device=device, dtype=torch.int8)
    return {
        "dynamic_quantize: x must be one of float16, bfloat16, float32, not torch.float64": (
            TypeError,
            lambda: dynamic_quantize(x.double(), cores=CORES),
        ),
        "dynamic_quantize: smooth must have shape [8], not [7]": (ValueError, lambda: dynamic_quantize(x, smooth=vector[1:], cores=CORES)),
        "dynamic_quantize: x must have at least 1 dimensions, not 0": (ValueError, lambda: dynamic_quantize(x.sum(), cores=CORES)),
        "dynamic_quantize: min_scale must be 0, or finite and at least 2^-126: -1.0": (
            ValueError,
            lambda: dynamic_quantize(x, min_scale=-1.0, cores=CORES),
        ),
        "dynamic_quantize: cores must be positive: 0": (ValueError, lambda: dynamic_quantize(x, cores=0)),
        "dynamic_quantize: x, smooth must lie on one device": (
            ValueError,
            lambda: dynamic_quantize(x, smooth=vector.to("meta"), cores=CORES),
        ),
        "asymmetric_quantize: lowest must be one of -128, -127, not -126": (
            ValueError,
            lambda: asymmetric_quantize(x, lowest=-126, cores=CORES),
        ),
        "static_quantize: scale must have shape [8], not [2]": (ValueError, lambda: static_quantize(x, vector[:2], cores=CORES)),
        "static_quantize: scale must have shape [8], not [1, 8]": (ValueError, lambda: static_quantize(x, vector[None], cores=CORES)),
        "static_quantize: scale must be one of float16, bfloat16, float32, not torch.int8": (
            TypeError,
            lambda: static_quantize(x, whole[0], cores=CORES),
        ),
        "static_quantize: zero_point must be one of int8, int32, float16, bfloat16, float32, not torch.int64": (
            TypeError,
            lambda: static_quantize(x, vector, whole[0].long(), cores=CORES),
        ),
        "dequantize: x must be one of int8, int32, not torch.float32": (
            TypeError,
            lambda: dequantize(x, None, vector, out_dtype=BF16, cores=CORES),
        ),
        "dequantize: row_scale must have shape [2], not [8]": (
            ValueError,
            lambda: dequantize(whole, vector, vector, out_dtype=BF16, cores=CORES),
        ),
        "dequantize: bias must be one of float16, bfloat16, float32, not torch.int32": (
            TypeError,
            lambda: dequantize(whole, None, vector, bias=whole[0].int(), out_dtype=BF16, cores=CORES),
        ),
        "dequantize: bias must have shape [8], not [7]": (
            ValueError,
            lambda: dequantize(whole, None, vector, bias=vector[1:], out_dtype=BF16, cores=CORES),
        ),
        "dequantize: out_dtype must be one of float16, bfloat16, float32, not torch.float64": (
            TypeError,
            lambda: dequantize(whole, None, vector, out_dtype=torch.float64, cores=CORES),
        ),
    }


@pytest.mark.parametrize("message", bad_calls("cpu"))
def test_wrong_arguments(message: str, device: str) -> None:
    error, call = bad_calls(device)[message]
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def test_sizes_past_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="a row of x has 2147483648 elements"):
        dynamic_quantize(torch.empty(1, 2**31, device="meta"), cores=CORES)
    with pytest.raises(ValueError, match="x has 2147483648 rows"):
        dynamic_quantize(torch.empty(2**31, 1, device="meta"), cores=CORES)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 4097])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_full_matrix(rows: int, hidden: int, dtype: torch.dtype, device: str) -> None:
    x, smooth = torch.randn(rows, hidden, device=device, dtype=dtype), torch.rand(hidden, device=device, dtype=dtype)
    q, scale = check_dynamic(x)
    check_dynamic(x, smooth, divide=True)
    back = dequantize(q, scale, None, out_dtype=FP32, cores=CORES)
    assert torch.equal(back, q.float() * scale[:, None])
    q, scale, zero = asymmetric_quantize(x, cores=CORES)
    assert_nearest(q, x.double(), scale.double()[:, None], zero.double()[:, None], -128)
    channels = smooth.float() * 0.02 + 0.005
    assert torch.equal(static_quantize(x, channels, cores=CORES), torch.round(x / channels).clamp(-128, 127).to(torch.int8))


@pytest.mark.gpu
def test_many_rows(device: str) -> None:
    check_dynamic(torch.randn(65537, 128, device=device, dtype=BF16))
    check_dynamic(torch.randn(70001, 8, 64, device=device, dtype=FP16)[:, :5])
