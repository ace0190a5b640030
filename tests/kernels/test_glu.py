"""Gated linear units by Triton, against float64: on the GPU, or on the CPU by the interpreter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.kernels.glu import glu_launch
from npu_fusion.kernels.launch import Device
from npu_fusion.lowerings.triton.define import launch
from npu_fusion.lowerings.triton.glu import glu
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops._common import ACTIVATIONS
from npu_fusion.ops.glu import LAYOUTS
from npu_fusion.ops.glu import glu as reference
from tests.ops.checks import check_op

CORES = 2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLAMPED: dict[str, Any] = {"gate_limit": 1.0, "up_limit": 0.7, "up_offset": 1.0}


def check(gate: Tensor, up: Tensor | None, **arguments: Any) -> Tensor:
    """Run the op, and hold it to the numeric contract."""
    y = glu(gate, up, **arguments, cores=CORES)
    eager = reference(gate, up, **arguments)
    exact = {name: value for name, value in arguments.items() if name not in ("round_dtype", "out_dtype")}
    truth = reference(gate.double(), None if up is None else up.double(), **exact)
    assert (y.shape, y.dtype, y.is_contiguous()) == (eager.shape, eager.dtype, True)
    lowest = max((gate.dtype, (gate if up is None else up).dtype, y.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    assert_within_contract(y, eager, truth, lowest)
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_a_merged_tensor(layout: str, activation: str, device: str) -> None:
    check(2 * torch.randn(3, 80, device=device), None, layout=layout, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_tensors(activation: str, device: str) -> None:
    gate, up = 2 * torch.randn(2, 2, 3, 40, device=device)
    check(gate, up, activation=activation, layout="interleaved")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{"gate_limit": 0.5}, {"up_limit": 0.5}, {"up_offset": 1.0}, {"alpha": 1.702}, CLAMPED | {"alpha": 1.702, "layout": "interleaved"}],
    ids=["gate_limit", "up_limit", "up_offset", "alpha", "gpt_oss"],
)
def test_limits_slope_and_offset(arguments: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    check(torch.randn(3, 64, dtype=dtype, device=device), None, **arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 3), (1, 257), (7, 256), (3, 1000), (33, 300), (2, 2049)])
def test_odd_sizes(rows: int, width: int, layout: str, device: str) -> None:
    check(torch.randn(rows, 2 * width, dtype=FP16, device=device), None, layout=layout)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :48],
        lambda x: x[::2, 3:35],
        lambda x: x.t()[:, :6],
        lambda x: x.view(2, 4, 64).transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[0],
        lambda x: x.view(2, 4, 64)[:, :3],
    ],
    ids=["columns", "every other row", "transposed", "rows permuted", "every other column", "one dimension", "rows not evenly apart"],
)
def test_strides(view: Callable[[Tensor], Tensor], device: str) -> None:
    gate, up = view(torch.randn(8, 64, device=device)), view(torch.randn(8, 64, device=device))
    check(gate, None)
    check(gate, up)
    check(gate, up.contiguous())


def test_gate_and_up_broadcast(device: str) -> None:
    x = torch.randn(2, 3, 16, device=device)
    check(x, torch.randn(16, device=device))
    check(x, torch.randn(2, 3, 1, device=device))
    check(torch.randn(2, 1, 16, device=device), torch.randn(3, 16, device=device))


# The interpreter truncates where it rounds to bf16.
@pytest.mark.parametrize("rounds", [pytest.param(BF16, marks=pytest.mark.gpu), FP16], ids=str)
def test_the_activated_gate_is_rounded_where_asked(rounds: torch.dtype, device: str) -> None:
    gate, up = torch.randn(2, 4, 64, device=device).to(rounds)
    y = glu(gate, up, activation="identity", up_offset=1.0, round_dtype=rounds, out_dtype=FP32, cores=CORES)
    assert torch.equal(y, gate.float() * (up.float() + 1))
    gate, up = torch.randn(2, 4, 64, device=device)
    y = glu(gate, up, activation="identity", round_dtype=rounds, cores=CORES)
    assert torch.equal(y, gate.to(rounds).float() * up)
    assert not torch.equal(y, glu(gate, up, activation="identity", cores=CORES))


def test_dtypes_of_results(device: str) -> None:
    gate, up = torch.randn(2, 3, 8, device=device)
    assert check(gate.to(BF16), up.to(FP16)).dtype == FP32
    assert check(gate.to(BF16), up.to(BF16), out_dtype=FP32).dtype == FP32
    assert check(gate, None, out_dtype=FP16).dtype == FP16


@pytest.mark.parametrize("activation", ["silu", "relu", "relu2", "gelu", "identity"])
def test_rows_of_nan_and_infinity_stay_by_themselves(activation: str, device: str) -> None:
    x = torch.randn(6, 32, device=device)
    clean = glu(x, None, activation=activation, **CLAMPED, cores=CORES)
    x[1], x[3], x[4, 5] = float("nan"), float("-inf"), float("inf")
    y = glu(x, None, activation=activation, **CLAMPED, cores=CORES)
    assert torch.equal(y[[0, 2, 5]], clean[[0, 2, 5]])
    assert y[1].isnan().all()
    torch.testing.assert_close(y, reference(x, None, activation=activation, **CLAMPED), equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    x = torch.empty(shape, device=device)
    assert glu(x, None, cores=CORES).shape == (*shape[:-1], shape[-1] // 2)
    assert glu(x, x, cores=CORES).shape == shape


def test_calls_repeat_bit_by_bit(device: str) -> None:
    x = torch.randn(5, 600, dtype=FP16, device=device)
    assert torch.equal(glu(x, None, activation="gelu_tanh", cores=CORES), glu(x, None, activation="gelu_tanh", cores=CORES))


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize(("rows", "width", "cores"), [(5, 768, 3), (1, 1100, 2), (9, 300, 4)])
def test_the_plan_for_ascend(rows: int, width: int, cores: int, layout: str, device: str) -> None:
    """Its cores take turns; the kernel is right on any grid."""
    plan = glu_launch(rows, width, Device("npu", cores, cores), layout=layout)
    assert plan.grid <= cores
    x, y = torch.randn(rows, 2 * width, device=device), torch.full((rows, width), torch.nan, device=device)
    numbers = dict.fromkeys(("alpha", "gate_limit", "up_limit", "up_offset"))
    launch(plan, x, gate_ptr=x, up_ptr=x, y_ptr=y, rows=rows, gate_stride=2 * width, up_stride=2 * width, **numbers)
    torch.testing.assert_close(y, reference(x, None, layout=layout))


def test_plans_fill_the_gpu() -> None:
    h100 = Device("cuda", 132, 132)
    for rows, width in ((1, 18432), (16, 8192), (64, 2048)):
        assert glu_launch(rows, width, h100).grid >= min(132, rows * width // 256), (rows, width)
    many = glu_launch(4096, 18432, h100)
    assert (many.constants["BLOCK"], many.options["num_warps"], many.grid) == (2048, 8, 4096 * 9)
    short = glu_launch(4096, 768, h100)
    assert short.constants["ROWS"] * short.constants["BLOCK"] == 2048


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: glu(x.double(), None, cores=1), TypeError, "glu: gate must be one of float16, bfloat16, float32, not torch.float64"),
        (lambda x: glu(x, x.int(), cores=1), TypeError, "glu: up must be one of float16"),
        (lambda x: glu(x, None, out_dtype=torch.int8, cores=1), TypeError, "glu: out_dtype must be one of float16"),
        (lambda x: glu(x, None, round_dtype=torch.float64, cores=1), TypeError, "glu: round_dtype must be one of float16"),
        (lambda x: glu(x, None, activation="mish", cores=1), ValueError, "glu: activation must be one of 'silu'"),
        (lambda x: glu(x, None, layout="thirds", cores=1), ValueError, "glu: layout must be one of 'halves'"),
        (lambda x: glu(x, None, activation="gelu", alpha=1.7, cores=1), ValueError, "glu: alpha belongs to silu, not to gelu"),
        (lambda x: glu(x[:, :3], None, cores=1), ValueError, "glu: a merged gate and up needs an even last dimension"),
        (lambda x: glu(x, x[:, :2], cores=1), ValueError, "glu: shapes [2, 4] and [2, 2] do not broadcast"),
        (lambda x: glu(x[0, 0], None, cores=1), ValueError, "glu: gate must have at least 1 dimensions, not 0"),
        (lambda x: glu(x, x.to("meta"), cores=1), ValueError, "must lie on one device"),
        (lambda x: glu(x, None, cores=0), ValueError, "glu: cores must be positive: 0"),
        (lambda x: glu(x.new_empty(1, device="meta").expand(2**31), None, cores=1), ValueError, "glu: a row of gate has 2147483648"),
    ],
)
def test_wrong_arguments(call: Callable[[Tensor], Tensor], error: type[Exception], message: str, device: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(torch.randn(2, 4, device=device))


@pytest.mark.parametrize("arguments", [{}, {"layout": "interleaved", "out_dtype": BF16}], ids=str)
def test_the_fake_kernel_tells_the_result(arguments: dict[str, Any], device: str) -> None:
    x = torch.randn(2, 3, 16, device=device)
    check_op(glu, x, None, **arguments, cores=CORES)
    check_op(glu, x, x.transpose(0, 1).contiguous().transpose(0, 1), **arguments, cores=CORES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1024, 2816, 4096, 11008, 14336, 18432])
def test_full_sizes(width: int, layout: str, dtype: torch.dtype, device: str) -> None:
    for rows in (1, 7, 512):
        check(torch.randn(rows, 2 * width, dtype=dtype, device=device), None, layout=layout, round_dtype=dtype)
        gate, up = torch.randn(2, rows, width, dtype=dtype, device=device)
        check(gate, up, activation="gelu_tanh")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_many_rows(dtype: torch.dtype, device: str) -> None:
    check(torch.randn(65537, 1536, dtype=dtype, device=device), None)
    check(torch.randn(65537, 20, dtype=dtype, device=device), None, layout="interleaved")
    gate, up = torch.randn(2, 1 << 16, 48, dtype=dtype, device=device)
    check(gate, up)
