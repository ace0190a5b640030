"""w4a16_linear, w4a16_repack_awq and w4a16_awq_zeros: numbers against float64, layouts, experts, plans, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from npu_fusion.kernels import w4a16 as kernels
from npu_fusion.kernels.launch import Device
from npu_fusion.lowerings.triton.define import launch
from npu_fusion.lowerings.triton.w4a16 import w4a16_awq_zeros, w4a16_linear, w4a16_repack_awq
from npu_fusion.numerics import assert_within_contract
from tests.ops.checks import assert_same_metadata, check_symbolic

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CORES = {"cores": 4, "matrix_cores": 4}


@dataclass
class Layer:
    """A quantised layer: q [..., K, N] of 0 to 15, and what w4a16_linear takes of it."""

    q: Tensor
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    group_size: int

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.words, self.scales, self.zeros, self.bias

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weights [..., K, N], computed in that dtype."""
        group = self.q.shape[-2] if self.group_size == -1 else self.group_size
        scales = self.scales.to(dtype).repeat_interleave(group, -2)
        zeros = 8 if self.zeros is None else self.zeros.to(dtype).repeat_interleave(group, -2)
        return (self.q.to(dtype) - zeros) * scales


def packed(q: Tensor, group_size: int) -> Tensor:
    """The words of kernels/w4a16.py, by the definition of the layout."""
    *lead, inputs, outputs = q.shape
    plane = kernels.plane_rows(inputs, inputs if group_size == -1 else group_size)
    planes = q.int().reshape(*lead, inputs // (8 * plane), 8, plane, outputs)
    words = torch.zeros_like(planes[..., 0, :, :])
    for i in range(8):
        words |= planes[..., i, :, :] << 4 * i
    return words.reshape(*lead, inputs // 8, outputs)


def awq_packed(q: Tensor) -> Tensor:
    """Words of eight columns in AWQ's order."""
    words = torch.zeros_like(q[..., ::8], dtype=torch.int32)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= q[..., column::8].int() << 4 * place
    return words


def layer(
    inputs: int,
    outputs: int,
    group_size: int,
    dtype: torch.dtype,
    device: str,
    *,
    zeros: bool = True,
    bias: bool = False,
    lead: Sequence[int] = (),
) -> Layer:
    q = torch.randint(0, 16, (*lead, inputs, outputs), device=device, dtype=torch.uint8)
    groups = 1 if group_size == -1 else inputs // group_size
    scales = (torch.rand(*lead, groups, outputs, device=device) * 0.02 + 0.01).to(dtype)
    zero = torch.randint(0, 16, (*lead, groups, outputs), device=device).to(dtype) if zeros else None
    shift = torch.randn(*lead, outputs, device=device).to(dtype) if bias else None
    return Layer(q, packed(q, group_size), scales, zero, shift, group_size)


def check(y: Tensor, x: Tensor, of: Layer) -> None:
    """y = x W + bias within the numeric contract."""
    eager = x @ of.weight(x.dtype) + (0 if of.bias is None else of.bias.to(x.dtype))
    truth = x.double() @ of.weight(torch.float64) + (0 if of.bias is None else of.bias.double())
    assert y.shape == eager.shape
    assert y.is_contiguous()
    assert_within_contract(y, eager, truth, x.dtype)


# -------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "group_size", "zeros", "bias"),
    [
        (1, 256, 40, 128, True, True),
        (2, 192, 64, 64, False, False),
        (3, 96, 24, 32, True, False),
        (8, 160, 17, -1, True, True),
        (9, 256, 40, 128, True, True),
        (17, 96, 24, 32, False, False),
        (33, 320, 48, 64, True, False),
        (33, 128, 9, -1, False, True),
        (1, 384, 16, 128, False, True),
        (5, 640, 33, 128, True, False),
        (16, 256, 24, -1, True, True),
        (19, 256, 24, 128, True, True),
    ],
)
def test_linear(device: str, rows: int, inputs: int, outputs: int, group_size: int, zeros: bool, bias: bool) -> None:
    of = layer(inputs, outputs, group_size, FP16, device, zeros=zeros, bias=bias)
    x = torch.randn(rows, inputs, device=device, dtype=FP16)
    y = w4a16_linear(x, *of.arguments(), group_size=group_size, **CORES)
    assert y.dtype == FP16
    check(y, x, of)
    assert torch.equal(y, w4a16_linear(x, *of.arguments(), group_size=group_size, **CORES)), "not the same from call to call"


@pytest.mark.parametrize("rows", [2, 11])
def test_mixed_dtypes_and_a_result_that_is_not_rounded(device: str, rows: int) -> None:
    of = layer(128, 32, 64, FP32, device, bias=True)
    x = torch.randn(rows, 128, device=device, dtype=FP16)
    y = w4a16_linear(x, *of.arguments(), group_size=64, out_dtype=FP32, **CORES)
    assert y.dtype == FP32
    truth = x.double() @ of.weight(torch.float64) + of.bias.double()
    # Products of many rows round the weights to fp16; nothing else is rounded.
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=2e-3 if rows > 8 else 2e-6)


def test_zeros_need_not_be_whole_numbers(device: str) -> None:
    of = layer(64, 16, 32, FP16, device)
    of.zeros = of.zeros + 0.375
    for rows in (1, 9):
        x = torch.randn(rows, 64, device=device, dtype=FP16)
        check(w4a16_linear(x, *of.arguments(), group_size=32, **CORES), x, of)


def test_bf16_by_vectors(device: str) -> None:
    of = layer(128, 40, 64, BF16, device, bias=True)
    x = torch.randn(2, 128, device=device, dtype=BF16)
    check(w4a16_linear(x, *of.arguments(), group_size=64, **CORES), x, of)


@pytest.mark.parametrize("rows", [3, 12])
def test_rows_that_lie_apart_and_leading_dimensions(device: str, rows: int) -> None:
    of = layer(64, 24, 64, FP16, device)
    apart = torch.randn(1, rows, 80, device=device, dtype=FP16)[..., 8:72]
    check(w4a16_linear(apart, *of.arguments(), group_size=64, **CORES), apart, of)
    columns = torch.randn(64, rows, device=device, dtype=FP16).t()
    check(w4a16_linear(columns, *of.arguments(), group_size=64, **CORES), columns, of)
    row = torch.randn(64, device=device, dtype=FP16)
    check(w4a16_linear(row, *of.arguments(), group_size=64, **CORES), row, of)


@pytest.mark.parametrize(("rows", "inputs"), [(2, 64), (10, 64), (4, 128), (18, 128)])
def test_what_is_not_finite_stays_in_its_row(device: str, rows: int, inputs: int) -> None:
    of = layer(inputs, 24, inputs, FP16, device)
    x = torch.randn(rows, inputs, device=device, dtype=FP16)
    clean = w4a16_linear(x, *of.arguments(), group_size=inputs, **CORES)
    touched = of.q[63].double() != of.zeros[0].double()
    for row, value in ((1, torch.nan), (0, torch.inf)):
        broken = x.clone()
        broken[row, 63] = value
        y = w4a16_linear(broken, *of.arguments(), group_size=inputs, **CORES)
        assert not y[row, touched].isfinite().any()
        others = [other for other in range(rows) if other != row]
        assert torch.equal(y[others], clean[others])


def test_empty(device: str) -> None:
    of = layer(64, 24, 64, FP16, device)
    assert w4a16_linear(torch.empty(0, 64, device=device, dtype=FP16), *of.arguments(), group_size=64, **CORES).shape == (0, 24)
    none = layer(64, 0, 64, FP16, device)
    assert w4a16_linear(torch.empty(3, 64, device=device, dtype=FP16), *none.arguments(), group_size=64, **CORES).shape == (3, 0)


# -------------------------------------------------------------------- experts


@pytest.mark.parametrize("own_rows", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_experts(device: str, own_rows: bool, index: torch.dtype) -> None:
    of = layer(64, 24, 32, FP16, device, bias=True, lead=(4,))
    ids = torch.tensor([[2, 0, -1], [3, 3, 4]], device=device, dtype=index)
    x = torch.randn(2, *((3,) if own_rows else ()), 64, device=device, dtype=FP16)
    y = w4a16_linear(x, *of.arguments(), group_size=32, expert_ids=ids, **CORES)
    assert y.shape == (2, 3, 24)
    assert not y[0, 2].any()
    assert not y[1, 2].any(), "there is no expert 4"
    for token, slot in ((0, 0), (0, 1), (1, 0), (1, 1)):
        e = int(ids[token, slot])
        one = Layer(of.q[e], of.words[e], of.scales[e], of.zeros[e], of.bias[e], 32)
        check(y[token, slot], x[token, slot] if own_rows else x[token], one)


def test_experts_without_zeros_or_tokens(device: str) -> None:
    of = layer(64, 16, -1, FP16, device, zeros=False, lead=(2,))
    x = torch.randn(1, 64, device=device, dtype=FP16)
    y = w4a16_linear(x, *of.arguments(), group_size=-1, expert_ids=torch.tensor([[1]], device=device), **CORES)
    check(y[0], x, Layer(of.q[1], of.words[1], of.scales[1], None, None, -1))
    none = torch.empty(0, 1, device=device, dtype=torch.int64)
    assert w4a16_linear(x[:0], *of.arguments(), group_size=-1, expert_ids=none, **CORES).shape == (0, 1, 16)


# -------------------------------------------------------------------- preparation


@pytest.mark.parametrize(
    ("shape", "group_size"), [((256, 80), 128), ((3, 64, 16), 32), ((128, 272), 64), ((160, 8), -1), ((0, 64, 16), 32), ((64, 0), 32)]
)
def test_repack_awq(device: str, shape: tuple[int, ...], group_size: int) -> None:
    q = torch.randint(0, 16, shape, device=device, dtype=torch.uint8)
    words = w4a16_repack_awq(awq_packed(q), group_size=group_size, cores=4)
    assert words.is_contiguous()
    assert torch.equal(words, packed(q, group_size))


def test_repack_awq_of_words_that_lie_apart(device: str) -> None:
    q = torch.randint(0, 16, (32, 32), device=device, dtype=torch.uint8)
    wide = torch.zeros(32, 7, device=device, dtype=torch.int32)
    wide[:, 1:5] = awq_packed(q)
    assert torch.equal(w4a16_repack_awq(wide[:, 1:5], group_size=32, cores=4), packed(q, 32))


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_awq_zeros(device: str, dtype: torch.dtype) -> None:
    zeros = torch.randint(0, 16, (2, 3, 40), device=device, dtype=torch.uint8)
    unpacked = w4a16_awq_zeros(awq_packed(zeros), dtype=dtype)
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, zeros.to(dtype))


def test_an_awq_layer_as_it_is_stored(device: str) -> None:
    of = layer(128, 32, 64, FP16, device)
    words = w4a16_repack_awq(awq_packed(of.q), group_size=64, cores=4)
    zeros = w4a16_awq_zeros(awq_packed(of.zeros.to(torch.uint8)), dtype=FP16)
    x = torch.randn(2, 128, device=device, dtype=FP16)
    check(w4a16_linear(x, words, of.scales, zeros, group_size=64, **CORES), x, of)


# -------------------------------------------------------------------- plans


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 11])
def test_the_plans_of_another_device_compute_the_same(device: str, rows: int) -> None:
    """Tiles of an NPU, and few programs that take turns."""
    of = layer(256, 72, 128, FP16, device, bias=True)
    x = torch.randn(rows, 256, device=device, dtype=FP16)
    y = torch.full((rows, 72), torch.nan, device=device, dtype=FP16)
    npu = Device("npu", 3, 2)
    arguments = {"x_ptr": x, "words_ptr": of.words, "scales_ptr": of.scales, "zeros_ptr": of.zeros, "bias_ptr": of.bias, "y_ptr": y}
    if rows > 8:
        launch(kernels.w4a16_gemm_launch(rows, 256, 72, 128, npu), x, **arguments, rows=rows, x_stride=256)
    else:
        plan = kernels.w4a16_gemv_launch(rows, 256, 72, 128, npu)
        launch(plan, x, **arguments, ids_ptr=None, rows=rows, slots=1, experts=1, x_stride=256)
    check(y, x, of)


H100 = Device("cuda", 132, 132)
A2 = Device("npu", 40, 20)
SHAPES = [(2048, 1536), (768, 2048), (4096, 4096), (5120, 13824), (7168, 18432), (18432, 7168), (96, 24), (11008, 4096), (1152, 640)]


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 384, -1])
def test_steps_of_vectors(inputs: int, outputs: int, group_size: int) -> None:
    """A step is of whole planes; on an NPU it lies in one group or holds whole ones, and the last ends where the inputs end."""
    group = inputs if group_size == -1 else group_size
    if inputs % group:
        return
    for device in (H100, A2):
        for rows in (1, 2, 5, 8):
            plan = kernels.w4a16_gemv_launch(rows, inputs, outputs, group, device)
            words, plane = plan.constants["WORDS"], plan.constants["PLANE"]
            assert words % plane == 0
            assert group % (8 * plane) == 0
            if device is A2:
                assert inputs // 8 % (words * plan.constants["AHEAD"]) == 0
                assert group % (8 * words) == 0 or 8 * words % group == 0
                assert 1 <= plan.grid <= 65535
                assert plan.constants["TOKENS"] >= rows


def test_a_gpu_is_full() -> None:
    for inputs, outputs in ((4096, 4096), (2048, 2048), (7168, 18432)):
        plan = kernels.w4a16_gemv_launch(1, inputs, outputs, 128, H100)
        assert plan.grid >= 120, (inputs, outputs)
        assert kernels.w4a16_gemm_launch(64, inputs, outputs, 128, H100).grid >= 64


def test_which_rows_take_products_of_a_gpu() -> None:
    assert all(kernels.takes_products(rows, 4096, group, H100) for rows in (2, 32) for group in (128, 4096))
    assert not kernels.takes_products(33, 4096, 128, H100)
    assert not kernels.takes_products(1, 4096, 128, H100), "vectors are faster"
    assert not kernels.takes_products(3, 4096, 64, H100), "a batch of warps takes 128 inputs, which are of one group"
    assert not kernels.takes_products(3, 4096, 128, A2)


@pytest.mark.parametrize("group_size", [96, 192, 32])
def test_vectors_of_a_gpu_whose_steps_end_within_a_group(device: str, group_size: int) -> None:
    """Also beyond the end of the inputs: 1344 are 168 rows of words, of steps of 256 or 64."""
    of = layer(1344, 24, group_size, FP16, device, bias=True)
    for rows in (1, 2):
        x = torch.randn(rows, 1344, device=device, dtype=FP16)
        y = torch.full((rows, 24), torch.nan, device=device, dtype=FP16)
        arguments = {"x_ptr": x, "words_ptr": of.words, "scales_ptr": of.scales, "zeros_ptr": of.zeros, "bias_ptr": of.bias, "y_ptr": y}
        plan = kernels.w4a16_gemv_launch(rows, 1344, 24, group_size, Device(device, 132, 132))
        launch(plan, x, **arguments, ids_ptr=None, rows=rows, slots=1, experts=1, x_stride=1344)
        check(y, x, of)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "group_size"),
    [
        (2, 128, 24, -1),
        (3, 768, 2048, 128),
        (8, 4096, 4096, 128),
        (9, 640, 1000, 128),
        (16, 1152, 33, 384),
        (17, 2048, 1536, 256),
        (32, 11008, 80, -1),
    ],
)
def test_products(dtype: torch.dtype, zeros: bool, rows: int, inputs: int, outputs: int, group_size: int) -> None:
    of = layer(inputs, outputs, group_size, dtype, "cuda", zeros=zeros, bias=rows % 2 == 0)
    apart = torch.randn(rows, inputs + 24, device="cuda", dtype=dtype)[:, 8 : 8 + inputs]
    y = w4a16_linear(apart, *of.arguments(), group_size=group_size, cores=132, matrix_cores=132)
    check(y, apart, of)


# -------------------------------------------------------------------- fake kernels


def check_fake(op: Any, *args: Any, **kwargs: Any) -> None:
    """The fake kernel predicts the result, static and symbolic, without a guard."""
    real = op(*args, **kwargs)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
        named = {name: mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
        assert_same_metadata(op(*fakes, **named), real)
    check_symbolic(op, real, *args, **kwargs)


def test_fake(device: str) -> None:
    of = layer(64, 24, 32, FP16, device, bias=True)
    check_fake(w4a16_linear, torch.randn(2, 3, 64, device=device, dtype=FP16), *of.arguments(), group_size=32, out_dtype=FP32, **CORES)
    check_fake(w4a16_linear, torch.randn(64, device=device, dtype=FP16), *of.arguments(), group_size=32, **CORES)
    of = layer(64, 24, -1, FP16, device, zeros=False, lead=(2,))
    ids = torch.tensor([[1, 0], [-1, 0]], device=device)
    check_fake(w4a16_linear, torch.randn(2, 2, 64, device=device, dtype=FP16), *of.arguments(), group_size=-1, expert_ids=ids, **CORES)
    qweight = awq_packed(torch.randint(0, 16, (3, 64, 16), device=device))
    check_fake(w4a16_repack_awq, qweight, group_size=32, cores=4)
    check_fake(w4a16_awq_zeros, qweight, dtype=BF16)


# -------------------------------------------------------------------- errors


def test_what_is_refused(device: str) -> None:
    of = layer(64, 24, 32, FP16, device, bias=True)
    x = torch.randn(2, 64, device=device, dtype=FP16)
    words, scales, zeros, bias = of.arguments()

    def refused(error: type[Exception], message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=message):
            w4a16_linear(*(args or (x, words, scales, zeros, bias)), **{"group_size": 32, **CORES, **options})

    refused(TypeError, "x must be one of float16, bfloat16, not torch.float32", x.float(), words, scales)
    refused(TypeError, "words must be one of int32, not torch.int64", x, words.long(), scales)
    refused(TypeError, "zeros must be one of float16, bfloat16, float32, not torch.int8", x, words, scales, zeros.to(torch.int8))
    refused(ValueError, "out_dtype must be one of", out_dtype=torch.int8)
    refused(ValueError, r"scales must have shape \[2, 24\], not \[1, 24\]", x, words, scales[:1])
    refused(ValueError, r"zeros must have shape", x, words, scales, zeros[:, :8])
    refused(ValueError, r"bias must have shape \[24\], not \[8\]", x, words, scales, zeros, bias[:8])
    refused(ValueError, r"words must have shape \[8, 24\], not \[4, 24\]", x, words[:4], scales)
    refused(ValueError, "words must have 2 dimensions, not 3", x, words[None], scales)
    refused(ValueError, "group_size must be -1 or at least 32, not 16", group_size=16)
    refused(ValueError, "64 inputs in groups of 48", group_size=48)
    refused(ValueError, "40 inputs in groups of 40: both must be multiples of 32", x[:, :40], words[:5], scales[:1], group_size=-1)
    refused(ValueError, "0 inputs", x[:, :0], words[:0], scales[:0], group_size=-1)
    refused(ValueError, "cores must be positive", cores=0)
    refused(ValueError, "must lie on one device", x, words, scales.to("meta"))
    ids = torch.zeros(2, 1, device=device, dtype=torch.int32)
    refused(ValueError, "words must have 3 dimensions, not 2", expert_ids=ids)
    refused(TypeError, "expert_ids must be int32 or int64", x, words[None], scales[None], expert_ids=ids.float())
    refused(ValueError, r"x must have shape \[3\], not \[2\]", x, words[None], scales[None], expert_ids=ids.new_zeros(3, 1))
    refused(ValueError, "x must have 2 or 3 dimensions with expert_ids, not 1", x[0], words[None], scales[None], expert_ids=ids)
    with FakeTensorMode():
        long = torch.empty(1, 2**24, dtype=FP16), torch.empty(2**21, 2**13, dtype=torch.int32), torch.empty(1, 2**13, dtype=FP16)
        refused(ValueError, r"a matrix of words has 2\^31 elements or more", *long, group_size=-1)


def test_what_repacking_refuses(device: str) -> None:
    qweight = torch.zeros(64, 4, device=device, dtype=torch.int32)
    with pytest.raises(TypeError, match="qweight must be one of int32"):
        w4a16_repack_awq(qweight.long(), group_size=32, cores=4)
    with pytest.raises(ValueError, match="qweight must have 2 or 3 dimensions, not 1"):
        w4a16_repack_awq(qweight[0], group_size=32, cores=4)
    with pytest.raises(ValueError, match="60 inputs in groups of 32"):
        w4a16_repack_awq(qweight[:60], group_size=32, cores=4)
    with pytest.raises(TypeError, match="qzeros must be one of int32"):
        w4a16_awq_zeros(qweight.long(), dtype=FP16)
    with pytest.raises(ValueError, match="dtype must be one of"):
        w4a16_awq_zeros(qweight, dtype=torch.int8)


# -------------------------------------------------------------------- everything, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1024, 1024), (2048, 1536), (768, 2048), (4096, 4096), (5120, 5120), (7168, 4608), (18432, 1024), (4096, 1000)]
)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_linear_of_models(device: str, inputs: int, outputs: int, group_size: int, dtype: torch.dtype) -> None:
    for zeros in (False, True):
        of = layer(inputs, outputs, group_size, dtype, device, zeros=zeros, bias=zeros)
        for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 77, 128, 1000):
            x = torch.randn(rows, inputs, device=device, dtype=dtype)
            y = w4a16_linear(x, *of.arguments(), group_size=group_size, cores=132, matrix_cores=132)
            check(y, x, of)
            assert torch.equal(y, w4a16_linear(x, *of.arguments(), group_size=group_size, cores=132, matrix_cores=132))


@pytest.mark.gpu
def test_many_rows(device: str) -> None:
    of = layer(256, 128, 128, BF16, device)
    x = torch.randn(65537, 256, device=device, dtype=BF16)
    check(w4a16_linear(x, *of.arguments(), group_size=128, cores=132, matrix_cores=132), x, of)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_experts_of_a_model(device: str, tokens: int) -> None:
    of = layer(2048, 1536, 128, BF16, device, lead=(16,))
    x = torch.randn(tokens, 2048, device=device, dtype=BF16)
    ids = torch.stack([torch.randperm(16, device=device)[:8] for _ in range(tokens)])
    y = w4a16_linear(x, *of.arguments(), group_size=128, expert_ids=ids, cores=132, matrix_cores=132)
    for token in range(tokens):
        for slot in range(8):
            e = int(ids[token, slot])
            check(y[token, slot], x[token], Layer(of.q[e], of.words[e], of.scales[e], of.zeros[e], None, 128))


@pytest.mark.gpu
def test_capture(device: str) -> None:
    """A call asks nothing of the device and allocates from the graph's pool: it can be captured, and replayed on other numbers."""
    of = layer(1024, 512, 128, FP16, device)
    for rows in (2, 40):
        x = torch.randn(rows, 1024, device=device, dtype=FP16)
        w4a16_linear(x, *of.arguments(), group_size=128, cores=132, matrix_cores=132)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = w4a16_linear(x, *of.arguments(), group_size=128, cores=132, matrix_cores=132)
        x.normal_()
        graph.replay()
        check(y, x, of)
