"""grouped_int8: exact sums of each group's own matrix, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from npu_fusion.lowerings.triton.experts_int8 import grouped_int8
from tests.ops.checks import assert_same_metadata, check_symbolic

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def operands(device: str, counts: list[int], inputs: int, outputs: int, *, behind: int = 2, along_inputs: bool = True) -> list[Tensor]:
    """x with rows behind the last group, weights, scales of columns and rows, counts."""
    torch.manual_seed(0)
    rows, groups = sum(counts) + behind, len(counts)
    sizes = (groups, outputs, inputs) if along_inputs else (groups, inputs, outputs)
    x, stored = (torch.randint(-128, 128, shape, device=device, dtype=torch.int8) for shape in ((rows, inputs), sizes))
    scales = torch.rand(groups, outputs, device=device) + 0.5, torch.rand(rows, device=device) + 0.5
    return [x, stored.mT if along_inputs else stored, *scales, torch.tensor(counts, device=device, dtype=torch.int32)]


def expected(x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor, counts: Tensor) -> Tensor:
    """In float64, of the rows that have a group."""
    starts = [0, *counts.cumsum(0).tolist()]
    parts = [x[a:b].double() @ weight[g].double() * weight_scale[g].double() for g, (a, b) in enumerate(itertools.pairwise(starts))]
    return torch.cat(parts) * x_scale[: starts[-1], None].double()


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("along_inputs", [False, True])
@pytest.mark.parametrize(
    ("counts", "inputs", "outputs"), [([0, 3, 0, 17, 1], 40, 33), ([5, 0], 64, 128), ([0, 0, 0], 16, 8), ([1] * 9, 300, 7)], ids=str
)
def test_sums_are_those_of_the_group(device: str, counts: list[int], inputs: int, outputs: int, along_inputs: bool) -> None:
    args = operands(device, counts, inputs, outputs, along_inputs=along_inputs)
    y = grouped_int8(*args, out_dtype=FP32, cores=4)
    torch.testing.assert_close(y[: sum(counts)].double(), expected(*args), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("out_dtype", [FP16, BF16])
def test_dtypes(device: str, out_dtype: torch.dtype) -> None:
    x, weight, weight_scale, x_scale, counts = operands(device, [4, 2], 32, 16)
    args = (x, weight, (weight_scale / 64).to(out_dtype), x_scale, counts)
    y = grouped_int8(*args, out_dtype=out_dtype, cores=4)
    torch.testing.assert_close(y[:6].double(), expected(*args), rtol=2.0**-7, atol=0)


def test_fake_and_empty(device: str) -> None:
    args = operands(device, [2, 1], 32, 8)
    real = grouped_int8(*args, out_dtype=BF16, cores=4)
    with FakeTensorMode() as mode:
        assert_same_metadata(grouped_int8(*(mode.from_tensor(arg) for arg in args), out_dtype=BF16, cores=4), real)
    check_symbolic(grouped_int8, real, *args, out_dtype=BF16, cores=4)
    nothing = operands(device, [0, 0], 32, 8, behind=0)
    assert grouped_int8(*nothing, out_dtype=BF16, cores=4).shape == (0, 8)


def test_what_is_refused(device: str) -> None:
    x, weight, weight_scale, x_scale, counts = operands(device, [2, 1], 32, 8)

    def refused(error: type[Exception], message: str, *args: Any, out_dtype: torch.dtype = BF16) -> None:
        with pytest.raises(error, match=message):
            grouped_int8(*args, out_dtype=out_dtype, cores=4)

    refused(TypeError, "weight must be one of int8", x, weight.int(), weight_scale, x_scale, counts)
    refused(TypeError, "counts must be one of int32", x, weight, weight_scale, x_scale, counts.long())
    refused(ValueError, r"weight_scale must have shape \[2, 8\]", x, weight, weight_scale[:1], x_scale, counts)
    refused(ValueError, r"x must have shape \[5, 32\]", x[:, :16], weight, weight_scale, x_scale, counts)
    refused(ValueError, "out_dtype must be one of", x, weight, weight_scale, x_scale, counts, out_dtype=torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "inputs", "outputs"), [(128, 2048, 1536), (256, 7168, 4096), (128, 768, 2048)])
def test_layers_of_models(device: str, experts: int, inputs: int, outputs: int) -> None:
    for rows in (8, 64, 4096):
        counts = torch.bincount(torch.randint(experts, (rows,)), minlength=experts).tolist()
        args = operands(device, counts, inputs, outputs)
        y = grouped_int8(*args, out_dtype=FP32, cores=132)
        torch.testing.assert_close(y[:rows].double(), expected(*args), rtol=2.0**-21, atol=0)
