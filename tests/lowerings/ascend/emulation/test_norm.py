"""CPU kernels of the normalisations against formulas in float64, where they round, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.ascend.emulation import EmulationError
from tests.lowerings.ascend.checks import DTYPES, check_kernel

npu = torch.ops.npu
HALVES = DTYPES[:2]
SHAPES = [((4, 8), (8,)), ((2, 3, 8), (8,)), ((2, 3, 4), (3, 4)), ((6,), (6,)), ((0, 8), (8,))]
EPS = 0.1  # large enough to matter


def rstd_of(x: Tensor, gamma: Tensor, eps: float = EPS) -> Tensor:
    dims = tuple(range(-gamma.dim(), 0))
    return 1 / (x.double().pow(2).mean(dims, keepdim=True) + eps).sqrt()


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """`actual` is `exact` in its dtype, but for the errors of fp32 arithmetic."""
    tolerance = 1.01 * torch.finfo(actual.dtype).eps if actual.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(actual.double(), exact.double(), rtol=tolerance, atol=1e-6)


def inputs(shape: tuple[int, ...], gamma: tuple[int, ...], dtype: torch.dtype, count: int = 1) -> list[Tensor]:
    return [*(torch.randn(shape, dtype=dtype) for _ in range(count)), torch.randn(gamma, dtype=dtype)]


# -------------------------------------------------------------------- npu_rms_norm, npu_gemma_rms_norm


@pytest.mark.parametrize("offset", [0, 1], ids=["rms_norm", "gemma_rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "gamma_shape"), SHAPES)
def test_rms_norm(shape: tuple[int, ...], gamma_shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> None:
    x, gamma = inputs(shape, gamma_shape, dtype)
    y, rstd = check_kernel(("npu::npu_rms_norm", "npu::npu_gemma_rms_norm")[offset], x, gamma, EPS)
    assert (y.dtype, rstd.dtype) == (dtype, torch.float32)
    assert_rounded_once(rstd, rstd_of(x, gamma))
    assert_rounded_once(y, x.double() * rstd_of(x, gamma) * (offset + gamma.double()))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rms_norm_with_a_float32_gamma(dtype: torch.dtype) -> None:
    x, gamma = torch.randn(4, 8, dtype=dtype), torch.randn(8)
    y, _ = check_kernel("npu::npu_rms_norm", x, gamma, EPS)
    assert y.dtype == dtype
    assert_rounded_once(y, x.double() * rstd_of(x, gamma) * gamma.double())


@pytest.mark.parametrize("op", [npu.npu_rms_norm, npu.npu_gemma_rms_norm])
def test_epsilon_is_1e_6_by_default(op: Callable[..., Any]) -> None:
    x, gamma = 1e-3 * torch.randn(4, 8), torch.randn(8)
    assert torch.equal(op(x, gamma)[0], op(x, gamma, 1e-6)[0])
    assert not torch.allclose(op(x, gamma)[0], op(x, gamma, 1e-4)[0])


def test_gamma_is_multiplied_before_the_only_rounding() -> None:
    x, gamma = torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    normalised = (x.double() * rstd_of(x, gamma, 1e-6)).bfloat16()
    assert not torch.equal(npu.npu_rms_norm(x, gamma)[0], normalised * gamma)
    assert torch.equal(npu.npu_add_rms_norm(x, torch.zeros_like(x), gamma)[0], normalised * gamma)


# -------------------------------------------------------------------- npu_add_rms_norm and its forms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "gamma_shape"), SHAPES[:-1])
def test_add_rms_norm(shape: tuple[int, ...], gamma_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x1, x2, gamma = inputs(shape, gamma_shape, dtype, 2)
    y, rstd, total = check_kernel("npu::npu_add_rms_norm", x1, x2, gamma, EPS)
    assert torch.equal(total, (x1.double() + x2.double()).to(dtype))
    value = total.double() if dtype == torch.float16 else x1.double() + x2.double()
    assert rstd.dtype == torch.float32
    assert_rounded_once(rstd, rstd_of(value, gamma))
    if dtype == torch.float32:
        assert_rounded_once(y, value * rstd_of(value, gamma) * gamma.double())
    else:  # rounded before gamma: off by two roundings at most
        torch.testing.assert_close(y.double(), value * rstd_of(value, gamma) * gamma.double(), rtol=2.1 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("shape", "gamma_shape"), SHAPES[:-1])
def test_add_rms_norm_cast(shape: tuple[int, ...], gamma_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x1, x2, gamma = inputs(shape, gamma_shape, dtype, 2)
    wide, y, rstd, total = check_kernel("npu::npu_add_rms_norm_cast", x1, x2, gamma, EPS)
    value = total.double() if dtype == torch.float16 else x1.double() + x2.double()
    assert torch.equal(total, (x1.double() + x2.double()).to(dtype))
    assert torch.equal(wide, y.float())
    assert_rounded_once(rstd, rstd_of(value, gamma))
    assert_rounded_once(y, value * rstd_of(value, gamma) * gamma.double())


@pytest.mark.parametrize("eps", [None, EPS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_in_place(dtype: torch.dtype, eps: float | None) -> None:
    x1, x2, gamma = inputs((3, 8), (8,), dtype, 2)
    options = [] if eps is None else [eps]
    y, rstd, total = npu.npu_add_rms_norm(x1, x2, gamma, *options)
    functional = check_kernel("npu::npu_add_rms_norm_v2_functional", x1, x2, gamma, *options)
    for actual, expected in zip(functional, (rstd, y, total), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(npu.npu_add_rms_norm_v2(x1, x2, gamma, *options), rstd)
    assert torch.equal(x1, y)
    assert torch.equal(x2, total)


def test_the_sum_that_is_normalised() -> None:
    """bf16: before it is rounded; fp16: after."""
    for dtype in HALVES:
        x1, x2, gamma = torch.randn(64, 64, dtype=dtype), torch.randn(64, 64, dtype=dtype), torch.ones(64, dtype=dtype)
        exact = x1.double() + x2.double()
        taken = exact if dtype == torch.bfloat16 else exact.to(dtype).double()
        assert_rounded_once(npu.npu_add_rms_norm(x1, x2, gamma)[1], rstd_of(taken, gamma, 1e-6))
        rounded = rstd_of(exact.to(dtype), gamma, 1e-6).float()
        same = torch.allclose(npu.npu_add_rms_norm(x1, x2, gamma)[1], rounded, rtol=1e-6)
        assert same == (dtype == torch.float16)


# -------------------------------------------------------------------- errors

X, G = torch.ones(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: npu.npu_rms_norm(X.double(), G.double()), "npu_rms_norm: input must be float16, bfloat16, float32, not float64"),
        (lambda: npu.npu_rms_norm(X, G.half()), "gamma must be torch.float32 or torch.float32, not torch.float16"),
        (lambda: npu.npu_rms_norm(X.half(), G.bfloat16()), "gamma must be torch.float16 or torch.float32"),
        (lambda: npu.npu_rms_norm(X, torch.ones(4)), r"gamma of shape \[4\] does not match the last dimensions of \[2, 8\]"),
        (lambda: npu.npu_rms_norm(X, torch.ones(1, 2, 8)), r"gamma of shape \[1, 2, 8\] does not match"),
        (lambda: npu.npu_rms_norm(X, torch.tensor(1.0)), r"gamma of shape \[\] does not match"),
        (
            lambda: npu.npu_gemma_rms_norm(X.half(), G),
            "npu_gemma_rms_norm: dtypes must be equal: input is torch.float16, gamma is torch.float32",
        ),
        (lambda: npu.npu_gemma_rms_norm(X.int(), G.int()), "input must be float16, bfloat16, float32, not int32"),
        (lambda: npu.npu_add_rms_norm(X, X.half(), G), "npu_add_rms_norm: dtypes must be equal"),
        (lambda: npu.npu_add_rms_norm(X.half(), X.half(), G), "dtypes must be equal"),
        (lambda: npu.npu_add_rms_norm(X, X[:1], G), r"x1 and x2 must have one shape, not \[2, 8\] and \[1, 8\]"),
        (lambda: npu.npu_add_rms_norm(X, X, torch.ones(2)), "gamma of shape"),
        (lambda: npu.npu_add_rms_norm_cast(X, X, G), "npu_add_rms_norm_cast: x1 must be float16, bfloat16, not float32"),
        (lambda: npu.npu_add_rms_norm_v2(X.double(), X.double(), G.double()), "x1 must be"),
        (lambda: npu.npu_add_rms_norm_v2_functional(X, X[:1], G), "one shape"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        call()
