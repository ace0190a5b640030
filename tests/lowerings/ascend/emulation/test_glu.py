"""CPU kernels of gated units and activations against formulas in float64, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from npu_fusion.lowerings.ascend.emulation import EmulationError
from tests.lowerings.ascend.checks import DTYPES, check_kernel

npu = torch.ops.npu


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def gelu(x: Tensor, mode: str) -> Tensor:
    if mode == "none":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    size = x.shape[dim] // 2
    return x.narrow(dim, 0, size), x.narrow(dim, size, size)


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """`actual` is `exact` in its dtype, but for the errors of fp32 arithmetic."""
    tolerance = 1.01 * torch.finfo(actual.dtype).eps if actual.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=1e-6)


def exactly(x: Tensor) -> Tensor:
    return x.double()


# -------------------------------------------------------------------- npu_swiglu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((3, 8), -1), ((2, 3, 6), 2), ((2, 4, 5), 1), ((4, 3), 0), ((6,), 0), ((2, 3, 4, 2), -3 + 1)])
def test_swiglu(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    a, b = halves(exactly(x), dim)
    y = check_kernel("npu::npu_swiglu", x, dim)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_rounded_once(y, a * sigmoid(a) * b)


def test_swiglu_halves_the_last_dimension_by_default() -> None:
    x = torch.randn(2, 4, 6)
    assert torch.equal(npu.npu_swiglu(x), npu.npu_swiglu(x, 2))


def test_swiglu_keeps_float32_up_to_the_end() -> None:
    """As the golden of the operator's own test: halves in float32, one cast."""
    x = torch.rand(64, 2 * 61, dtype=torch.bfloat16)
    a, b = x.float().chunk(2, -1)
    assert torch.equal(npu.npu_swiglu(x, -1), (torch.nn.functional.silu(a) * b).bfloat16())
    assert not torch.equal(npu.npu_swiglu(x, -1), torch.nn.functional.silu(a.bfloat16()) * b.bfloat16())


def test_a_view_and_an_empty_tensor() -> None:
    x = torch.randn(8, 3)
    assert torch.equal(npu.npu_swiglu(x.T), npu.npu_swiglu(x.T.contiguous()))
    assert npu.npu_swiglu(torch.empty(0, 8)).shape == (0, 4)


# -------------------------------------------------------------------- npu_geglu


@pytest.mark.parametrize("activate_left", [False, True])
@pytest.mark.parametrize("approximate", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((3, 8), -1), ((2, 4, 5), 1)])
def test_geglu(shape: tuple[int, ...], dim: int, dtype: torch.dtype, approximate: int, activate_left: bool) -> None:
    x = torch.randn(shape, dtype=dtype)
    left, right = halves(exactly(x), dim)
    gate, up = (left, right) if activate_left else (right, left)
    y, activated = check_kernel("npu::npu_geglu", x, dim, approximate, activate_left)
    exact = gelu(gate, ("none", "tanh")[approximate])
    assert_rounded_once(y, exact * up)
    assert_rounded_once(activated, exact)


def test_geglu_activates_the_second_half_by_tanh_by_default() -> None:
    x = torch.randn(2, 6)
    for actual, expected in zip(npu.npu_geglu(x), npu.npu_geglu(x, -1, 1, False), strict=True):
        assert torch.equal(actual, expected)
    assert not torch.equal(npu.npu_geglu(x)[1], npu.npu_geglu(x, approximate=0)[1])


def test_geglu_in_float16_multiplies_the_rounded_gelu() -> None:
    x = torch.randn(64, 32, dtype=torch.float16)
    y, activated = npu.npu_geglu(x)
    assert torch.equal(y, x[:, :16] * activated)
    x = x.bfloat16()
    y, activated = npu.npu_geglu(x)
    assert not torch.equal(y, x[:, :16] * activated)


# -------------------------------------------------------------------- npu_clipped_swiglu


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.7, "limit": 1.0, "bias": 1.2}, {"alpha": 1.0, "limit": 0.5, "bias": 0.0}], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((3, 8), -1), ((2, 4, 3), 1), ((4, 3), 0)])
def test_clipped_swiglu(shape: tuple[int, ...], dim: int, options: dict[str, float], dtype: torch.dtype, interleaved: bool) -> None:
    x = 4 * torch.randn(shape, dtype=dtype)
    rows = exactly(x).flatten(dim % x.dim()).reshape(math.prod(shape[: dim % x.dim()]), -1)
    a, b = (rows[:, ::2], rows[:, 1::2]) if interleaved else halves(rows, 1)
    alpha, limit, bias = (options.get(name, default) for name, default in (("alpha", 1.702), ("limit", 7.0), ("bias", 1.0)))
    a, b = torch.where(a > limit, limit, a), torch.where(b.abs() > limit, limit * b.sign(), b)
    y = check_kernel("npu::npu_clipped_swiglu", x, dim=dim, interleaved=interleaved, **options)
    assert_rounded_once(y, (a * sigmoid(alpha * a) * (b + bias)).reshape(y.shape))


def test_clipped_swiglu_is_interleaved_by_default() -> None:
    x = torch.randn(2, 8)
    assert torch.equal(npu.npu_clipped_swiglu(x), npu.npu_clipped_swiglu(x, interleaved=True))
    assert not torch.equal(npu.npu_clipped_swiglu(x), npu.npu_clipped_swiglu(x, interleaved=False))


@pytest.mark.parametrize(("groups", "rows"), [([2, 1], 3), ([0, 0], 0), ([4, 9], 6)])
def test_clipped_swiglu_of_groups(groups: list[int], rows: int) -> None:
    """Rows after the groups' are not computed; groups may claim more rows than there are."""
    x = torch.randn(2, 3, 8)
    y = check_kernel("npu::npu_clipped_swiglu", x, group_index=torch.tensor(groups))
    whole = npu.npu_clipped_swiglu(x).flatten(0, 1)
    assert torch.equal(y.flatten(0, 1)[:rows], whole[:rows])
    assert not y.flatten(0, 1)[rows:].any()


# -------------------------------------------------------------------- npu_gelu_mul


@pytest.mark.parametrize("mode", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(10, 40), (2, 3, 6), (1, 1024)])
def test_gelu_mul(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> None:
    x = torch.randn(shape, dtype=dtype)
    a, b = halves(exactly(x), -1)
    assert_rounded_once(check_kernel("npu::npu_gelu_mul", x, approximate=mode), gelu(a, mode) * b)


def test_gelu_mul_takes_erf_by_default() -> None:
    x = torch.randn(4, 8)
    assert torch.equal(npu.npu_gelu_mul(x), npu.npu_gelu_mul(x, approximate="none"))


# -------------------------------------------------------------------- activations


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("npu_gelu", {}, lambda x: gelu(x, "none")),
        ("npu_gelu", {"approximate": "none"}, lambda x: gelu(x, "none")),
        ("npu_gelu", {"approximate": "tanh"}, lambda x: gelu(x, "tanh")),
        ("npu_fast_gelu", {}, lambda x: x * torch.exp(0.851 * (x - x.abs())) / (1 + torch.exp(-1.702 * x.abs()))),
        ("npu_silu", {}, lambda x: x / (1 + torch.exp(-x))),
    ],
    ids=["gelu", "gelu none", "gelu tanh", "fast_gelu", "silu"],
)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 5)])
def test_activations(
    name: str, options: dict[str, Any], formula: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = 3 * torch.randn(shape, dtype=dtype)
    assert_rounded_once(check_kernel(f"npu::{name}", x, **options), formula(exactly(x)))


def test_fast_gelu_of_the_operators_own_test() -> None:
    y = npu.npu_fast_gelu(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(y, torch.tensor([0.8458, 1.9357, 2.9819, 3.9956]), rtol=0, atol=1e-4)


def test_activations_keep_the_order_in_memory() -> None:
    x = torch.randn(4, 6).T
    for op in (npu.npu_gelu, npu.npu_fast_gelu, npu.npu_silu):
        assert op(x).stride() == x.stride()


# -------------------------------------------------------------------- errors

X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: npu.npu_swiglu(X.double()), "npu_swiglu: input must be float16, bfloat16, float32, not float64"),
        (lambda: npu.npu_swiglu(X.int()), "not int32"),
        (lambda: npu.npu_swiglu(X, 2), r"dim must be in \[-2, 1\], not 2"),
        (lambda: npu.npu_swiglu(X, -3), r"dim must be in \[-2, 1\], not -3"),
        (lambda: npu.npu_swiglu(torch.ones(2, 7)), "even size along dim -1, not 7"),
        (lambda: npu.npu_swiglu(torch.tensor(1.0)), "1 to 8 dimensions, not 0"),
        (lambda: npu.npu_swiglu(torch.ones([2] * 9)), "1 to 8 dimensions, not 9"),
        (lambda: npu.npu_geglu(torch.ones(3, 8), 0), "npu_geglu: input must have an even size along dim 0, not 3"),
        (lambda: npu.npu_geglu(X, approximate=2), r"approximate must be 0 \(erf\) or 1 \(tanh\), not 2"),
        (lambda: npu.npu_geglu(X, approximate=-1), "approximate must be 0"),
        (lambda: npu.npu_clipped_swiglu(X.double()), "npu_clipped_swiglu: x must be"),
        (lambda: npu.npu_clipped_swiglu(X.T), "x must be contiguous"),
        (lambda: npu.npu_clipped_swiglu(X, limit=0.0), "limit must be positive, not 0.0"),
        (lambda: npu.npu_clipped_swiglu(X, limit=-1.0), "limit must be positive"),
        (lambda: npu.npu_clipped_swiglu(X, group_index=torch.ones(2, dtype=torch.int32)), "group_index must be int64, not int32"),
        (lambda: npu.npu_clipped_swiglu(X, group_index=torch.ones(1, 1, dtype=torch.int64)), "group_index must have 1 dimension"),
        (lambda: npu.npu_clipped_swiglu(X, group_index=torch.tensor([3, -1])), "group_index must not be negative"),
        (lambda: npu.npu_clipped_swiglu(X, group_index=torch.zeros(8193, dtype=torch.int64)), "at most 8192"),
        (lambda: npu.npu_gelu_mul(torch.ones(8)), "2 to 8 dimensions, not 1"),
        (lambda: npu.npu_gelu_mul(torch.ones(2, 1026)), "last dimension of 2 to 1024, not 1026"),
        (lambda: npu.npu_gelu_mul(torch.ones(2, 0)), "last dimension of 2 to 1024, not 0"),
        (lambda: npu.npu_gelu_mul(torch.ones(200_001, 2)), "at most 200000 rows, not 200001"),
        (lambda: npu.npu_gelu_mul(X, approximate="erf"), "approximate must be 'none' or 'tanh', not 'erf'"),
        (lambda: npu.npu_gelu(X, approximate="sigmoid"), "npu_gelu: approximate must be 'none' or 'tanh', not 'sigmoid'"),
        (lambda: npu.npu_gelu(X.double()), "npu_gelu: input must be"),
        (lambda: npu.npu_fast_gelu(torch.ones([1] * 9)), "at most 8 dimensions, not 9"),
        (lambda: npu.npu_silu(X.long()), "npu_silu: input must be"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        call()


@pytest.mark.parametrize("op", [npu.npu_swiglu, npu.npu_geglu, npu.npu_clipped_swiglu])
def test_fake_kernels_check_what_is_known(op: Any) -> None:
    with FakeTensorMode():
        for tensor, dim in ((torch.ones(2, 7), -1), (torch.ones(2, 8), 2), (torch.ones(2, 8, dtype=torch.float64), 1)):
            with pytest.raises(EmulationError):
                op(tensor, dim=dim)
