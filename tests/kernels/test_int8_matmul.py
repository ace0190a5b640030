"""int8_matmul: exact sums, epilogues against float64, orders of weights, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from npu_fusion.kernels import int8_matmul as kernels
from npu_fusion.kernels.launch import Device
from npu_fusion.lowerings.triton.define import launch
from npu_fusion.lowerings.triton.int8_matmul import int8_matmul
from tests.ops.checks import assert_same_metadata, check_symbolic

BF16, FP16, FP32, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
ROUNDING = {FP32: 2.0**-21, FP16: 2.0**-11, BF16: 2.0**-8}
"""Half of the last place of a 16-bit number; for fp32 what three operations and a large sum may lose."""


def integers(*shape: int, device: str) -> Tensor:
    return torch.randint(-128, 128, shape, device=device, dtype=torch.int8)


def product(x: Tensor, w: Tensor) -> Tensor:
    """x w, exactly, as int64."""
    return (x.double() @ w.double()).long()


def expected(
    x: Tensor,
    w: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bias_first: bool = False,
    x_zero_point: Tensor | None = None,
) -> Tensor:
    """As int8_matmul defines it, in float64; scales and zero points of rows are [..., 1] or broadcast."""
    shifted = x.double() if x_zero_point is None else x.double() - x_zero_point.double()
    y = shifted @ w.double()
    if bias is not None and bias_first:
        y = y + bias.double()
    y = y * weight_scale.double() * (1.0 if x_scale is None else x_scale.double())
    return y if bias is None or bias_first else y + bias.double()


def check(y: Tensor, truth: Tensor) -> None:
    """Rounded once: what a sum with a bias loses is relative to the larger of the two."""
    assert y.shape == truth.shape
    assert y.is_contiguous()
    rounding = ROUNDING[y.dtype] * (2 if y.dtype == BF16 and y.device.type == "cpu" else 1)  # the interpreter cuts bf16 off
    bound = rounding * truth.abs() + 1e-6 * truth.abs().max()
    assert ((y.double() - truth).abs() <= bound).all(), ((y.double() - truth).abs() - bound).max()


# -------------------------------------------------------------------- sums


@pytest.mark.parametrize("along_inputs", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 256, 40), (3, 300, 33), (17, 64, 128), (130, 33, 7), (2, 1, 1)])
def test_sums_are_exact(device: str, rows: int, inputs: int, outputs: int, along_inputs: bool) -> None:
    x, w = integers(rows, inputs, device=device), integers(inputs, outputs, device=device)
    x[0], w[:, 0] = -128, -128
    stored = w.t().contiguous().t() if along_inputs else w
    y = int8_matmul(x, stored, out_dtype=I32, cores=4)
    assert torch.equal(y.long(), product(x, w))
    bias = torch.randint(-1000, 1000, (outputs,), device=device, dtype=I32)
    zero = torch.randint(-128, 128, (rows,), device=device, dtype=I32)
    y = int8_matmul(x, stored, bias=bias, bias_first=True, x_zero_point=zero, weight_sum=w.sum(0, dtype=I32), out_dtype=I32, cores=4)
    assert torch.equal(y.long(), product(x, w) - zero[:, None].long() * w.long().sum(0) + bias.long())


def test_empty(device: str) -> None:
    scale = torch.ones(8, device=device)
    x, w = integers(0, 32, device=device), integers(32, 8, device=device)
    assert int8_matmul(x, w, scale, out_dtype=FP16, cores=4).shape == (0, 8)
    assert int8_matmul(integers(3, 32, device=device), w[:, :0], scale[:0], out_dtype=FP16, cores=4).shape == (3, 0)
    bias = torch.randn(8, device=device)
    y = int8_matmul(integers(3, 0, device=device), w[:0], scale, bias=bias, out_dtype=FP32, cores=4)
    assert torch.equal(y, bias.expand(3, 8)), "a sum of nothing is 0"


# -------------------------------------------------------------------- epilogues


@pytest.mark.parametrize("out_dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("bias", [None, "first", "last"])
@pytest.mark.parametrize("zero", [False, True])
def test_scales_of_rows_and_columns(device: str, out_dtype: torch.dtype, bias: str | None, zero: bool) -> None:
    x, w = integers(5, 64, device=device), integers(64, 24, device=device)
    weight_scale, x_scale = torch.rand(24, device=device) * 1e-3 + 1e-4, torch.rand(5, device=device) + 0.1
    shift = torch.randn(24, device=device) if bias == "last" else torch.randint(-9999, 9999, (24,), device=device, dtype=I32)
    zeros = torch.randint(-128, 128, (5,), device=device, dtype=I32) if zero else None
    options = {"bias": None if bias is None else shift, "bias_first": bias == "first"}
    y = int8_matmul(
        x,
        w,
        weight_scale,
        x_scale,
        **options,
        x_zero_point=zeros,
        weight_sum=w.sum(0, dtype=I32) if zero else None,
        out_dtype=out_dtype,
        cores=4,
    )
    assert y.dtype == out_dtype
    check(y, expected(x, w, weight_scale, x_scale[:, None], **options, x_zero_point=None if zeros is None else zeros[:, None]))


@pytest.mark.parametrize("scale_dtype", [FP16, BF16, FP32])
def test_scales_of_one_element(device: str, scale_dtype: torch.dtype) -> None:
    x, w = integers(3, 64, device=device), integers(64, 24, device=device)
    weight_scale, x_scale = torch.tensor(0.003, device=device).to(scale_dtype), torch.tensor([0.7], device=device).to(scale_dtype)
    zero = torch.tensor([7], device=device, dtype=I32)
    y = int8_matmul(x, w, weight_scale, x_scale, x_zero_point=zero, weight_sum=w.sum(0, dtype=I32), out_dtype=FP32, cores=4)
    check(y, expected(x, w, weight_scale, x_scale, x_zero_point=zero))
    check(int8_matmul(x, w, weight_scale, out_dtype=FP16, cores=4), expected(x, w, weight_scale))


def test_leading_dimensions_and_a_last_one_of_1(device: str) -> None:
    x, w = integers(2, 3, 64, device=device), integers(64, 8, device=device)
    weight_scale, x_scale = torch.rand(8, device=device), torch.rand(2, 3, 1, device=device)
    y = int8_matmul(x, w, weight_scale, x_scale, out_dtype=FP32, cores=4)
    check(y, expected(x, w, weight_scale, x_scale))
    assert torch.equal(y, int8_matmul(x, w, weight_scale, x_scale[..., 0], out_dtype=FP32, cores=4))
    row = x[0, 0]
    check(int8_matmul(row, w, weight_scale, out_dtype=FP32, cores=4), expected(row, w, weight_scale))


def test_a_scale_that_is_not_finite_stays_in_its_row(device: str) -> None:
    x, w = integers(4, 64, device=device), integers(64, 24, device=device)
    weight_scale, x_scale = torch.rand(24, device=device), torch.rand(4, device=device)
    clean = int8_matmul(x, w, weight_scale, x_scale, out_dtype=FP32, cores=4)
    x_scale[1] = torch.nan
    y = int8_matmul(x, w, weight_scale, x_scale, out_dtype=FP32, cores=4)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


# -------------------------------------------------------------------- places in memory


def test_rows_and_weights_that_lie_apart(device: str) -> None:
    w = integers(64, 24, device=device)
    scale = torch.rand(24, device=device)
    rows = integers(1, 5, 80, device=device)[..., 8:72]
    columns = integers(64, 5, device=device).t()
    for x in (rows, columns):
        truth = expected(x, w, scale)
        apart = torch.zeros(64, 40, device=device, dtype=torch.int8)
        apart[:, 8:32] = w
        turned = torch.zeros(24, 70, device=device, dtype=torch.int8)
        turned[:, 2:66] = w.t()
        neither = torch.zeros(64, 48, device=device, dtype=torch.int8)
        neither[:, ::2] = w
        for stored in (apart[:, 8:32], turned[:, 2:66].t(), neither[:, ::2]):
            assert torch.equal(stored, w)
            check(int8_matmul(x, stored, scale, out_dtype=FP32, cores=4), truth)


@pytest.mark.parametrize("along_inputs", [False, True])
def test_the_plans_of_another_device_compute_the_same(device: str, along_inputs: bool) -> None:
    """Tiles of an NPU, and few programs that take turns; more rows of tiles than are dealt out together."""
    x, w = integers(1200, 40, device=device), integers(40, 200, device=device)
    stored = w.t().contiguous() if along_inputs else w
    y = torch.full((1200, 200), 2**31 - 1, device=device, dtype=I32)
    plan = kernels.int8_matmul_launch(1200, 40, 200, Device("npu", 6, 3), along_inputs=along_inputs)
    assert plan.grid == 3
    nothing = dict.fromkeys(("x_scale_ptr", "weight_scale_ptr", "x_zero_ptr", "weight_sum_ptr", "bias_ptr"))
    launch(plan, x, x_ptr=x, weight_ptr=stored, **nothing, y_ptr=y, rows=1200, x_stride=40, weight_stride=stored.stride(0))
    assert torch.equal(y.long(), product(x, w))


# -------------------------------------------------------------------- fake kernels and errors


def test_fake(device: str) -> None:
    x, w = integers(2, 3, 64, device=device), integers(64, 8, device=device)
    scales = torch.rand(8, device=device), torch.rand(2, 3, 1, device=device)
    rest = {"bias": torch.randn(8, device=device), "x_zero_point": torch.ones(2, 3, device=device, dtype=I32)}
    rest |= {"weight_sum": w.sum(0, dtype=I32)}
    for args, kwargs in (((x, w, *scales), {**rest, "out_dtype": BF16}), ((x[0, 0], w.t().contiguous().t()), {"out_dtype": I32})):
        real = int8_matmul(*args, **kwargs, cores=4)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(arg) for arg in args]
            named = {name: mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
            assert_same_metadata(int8_matmul(*fakes, **named, cores=4), real)
        check_symbolic(int8_matmul, real, *args, **kwargs, cores=4)


def test_what_is_refused(device: str) -> None:
    x, w, scale = integers(2, 64, device=device), integers(64, 8, device=device), torch.ones(8, device=device)
    whole = torch.ones(8, device=device, dtype=I32)

    def refused(error: type[Exception], message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=message):
            int8_matmul(*(args or (x, w, scale)), **{"out_dtype": FP16, "cores": 4, **options})

    refused(TypeError, "x must be one of int8, not torch.uint8", x.to(torch.uint8), w, scale)
    refused(TypeError, "weight must be one of int8", x, w.int(), scale)
    refused(TypeError, "weight_scale must be one of float16, bfloat16, float32, not torch.int32", x, w, whole)
    refused(TypeError, "bias must be one of float16, bfloat16, float32, not torch.int32", bias=whole)
    refused(TypeError, "bias must be one of int32, not torch.float32", bias=scale, bias_first=True)
    refused(TypeError, "x_zero_point must be one of int32", x_zero_point=torch.ones(2, device=device), weight_sum=whole)
    refused(TypeError, "out_dtype must be one of float16, bfloat16, float32, int32, not torch.int8", out_dtype=torch.int8)
    refused(ValueError, "an int32 result has no scales", out_dtype=I32)
    refused(ValueError, "an int32 result has its bias in the sums", x, w, bias=scale, out_dtype=I32)
    refused(ValueError, "weight_scale is needed for a result of torch.float16", x, w)
    refused(ValueError, "x_zero_point and weight_sum go together", weight_sum=whole)
    refused(ValueError, r"x \[2, 32\] must end in the inputs of weight \[64, 8\]", x[:, :32], w, scale)
    refused(ValueError, "weight must have 2 dimensions, not 1", x, w[0], scale)
    refused(ValueError, r"weight_scale must have shape \[8\], not \[4\]", x, w, scale[:4])
    refused(ValueError, r"x_scale must have shape \[2\], not \[3\]", x, w, scale, torch.ones(3, device=device))
    refused(ValueError, r"x_scale must have shape \[2, 1\], not \[2, 8\]", x, w, scale, torch.ones(2, 8, device=device))
    refused(ValueError, r"bias must have shape \[8\], not \[4\]", bias=scale[:4])
    refused(ValueError, "cores must be positive", cores=0)
    refused(ValueError, "must lie on one device", x, w, scale.to("meta"))
    deep = torch.empty(1, 131072, device=device, dtype=torch.int8), torch.empty(131072, 1, device=device, dtype=torch.int8)
    refused(ValueError, "131072 products, of which 131071 fit into int32", *deep, out_dtype=I32)


# -------------------------------------------------------------------- everything, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("along_inputs", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1024, 1024), (2048, 1536), (768, 2048), (4096, 4096), (7168, 2112), (18432, 7168), (1536, 1000), (1000, 512)]
)
def test_products_of_models(device: str, inputs: int, outputs: int, along_inputs: bool) -> None:
    w = integers(inputs, outputs, device=device)
    stored = w.t().contiguous().t() if along_inputs else w
    weight_scale, weight_sum = torch.rand(outputs, device=device) * 1e-3 + 1e-4, w.sum(0, dtype=I32)
    for rows in (1, 2, 8, 16, 33, 64, 77, 128, 1000):
        x = integers(rows, inputs, device=device)
        assert torch.equal(int8_matmul(x, stored, out_dtype=I32, cores=132).long(), product(x, w))
        x_scale, zero = torch.rand(rows, device=device) + 0.1, torch.randint(-128, 128, (rows,), device=device, dtype=I32)
        for out_dtype in (FP16, BF16, FP32):
            weight = weight_scale * 1e-2 if out_dtype == FP16 else weight_scale
            y = int8_matmul(x, stored, weight, x_scale, x_zero_point=zero, weight_sum=weight_sum, out_dtype=out_dtype, cores=132)
            check(y, expected(x, w, weight, x_scale[:, None], x_zero_point=zero[:, None]))


@pytest.mark.gpu
def test_many_rows(device: str) -> None:
    x, w, scale = integers(65537, 256, device=device), integers(256, 128, device=device), torch.rand(128, device=device)
    check(int8_matmul(x, w, scale, out_dtype=BF16, cores=132), expected(x, w, scale))


@pytest.mark.gpu
def test_capture(device: str) -> None:
    x, w, scale = integers(8, 1024, device=device), integers(1024, 512, device=device), torch.rand(512, device=device)
    int8_matmul(x, w, scale, out_dtype=BF16, cores=132)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int8_matmul(x, w, scale, out_dtype=BF16, cores=132)
    x.random_(-128, 128)
    graph.replay()
    check(y, expected(x, w, scale))
