"""Gated linear units to int8 by Triton, against float64: on the GPU, or on the CPU by the interpreter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.kernels.glu_quant import glu_quant_launch, glu_static_quant_launch
from npu_fusion.kernels.launch import Device
from npu_fusion.lowerings.triton.define import launch
from npu_fusion.lowerings.triton.glu_quant import dequant_glu_quant, dequant_glu_static_quant, glu_quant, glu_static_quant
from npu_fusion.ops.glu import LAYOUTS
from npu_fusion.ops.glu import glu as reference
from tests.ops.checks import check_op

CORES = 2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLAMPED: dict[str, Any] = {"gate_limit": 1.0, "up_limit": 0.7, "up_offset": 1.0}
SLACK = 1e-3  # of a step: what fp32 may move a value that lies between two steps


def check_quantised(q: Tensor, scale: Tensor, y: Tensor) -> None:
    """Rows [rows, I] quantised by their largest magnitude are right: y is in float64."""
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, FP32, y.shape, y.shape[:-1])
    assert q.is_contiguous()
    assert scale.is_contiguous()
    largest = y.abs().amax(-1)
    torch.testing.assert_close(scale.double(), largest / 127, rtol=1e-5, atol=0)
    assert torch.equal(q.abs().amax(-1), torch.where(largest > 0, 127, 0).to(torch.int8))
    step = scale.double()[..., None]
    assert ((q * step - y).abs() <= (0.5 + SLACK) * step).all()


def check_static(q: Tensor, expected: Tensor) -> None:
    """q is the float64 value to the nearest, within the range of int8."""
    assert (q.dtype, q.shape, q.is_contiguous()) == (torch.int8, expected.shape, True)
    assert ((q - expected.clamp(-128, 127)).abs() <= 0.5 + SLACK).all()


def check(gate: Tensor, up: Tensor | None, *, smooth: Tensor | None = None, **arguments: Any) -> None:
    """The op on gate and up, without groups."""
    y = reference(gate.double(), None if up is None else up.double(), **arguments)
    q, scale = glu_quant(gate, up, smooth_scale=smooth, **arguments, cores=CORES)
    check_quantised(q, scale, y if smooth is None else y * smooth.double())


def sums(rows: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """int32 sums [rows, 2 * width] and their scales, of columns and of rows."""
    x = torch.randint(-3000, 3000, (rows, 2 * width), dtype=torch.int32, device=device)
    return x, torch.rand(2 * width, device=device) / 1000 + 1e-4, torch.rand(rows, device=device) + 0.1


# -------------------------------------------------------------------- by the largest magnitude of a row


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_a_merged_tensor(layout: str, dtype: torch.dtype, device: str) -> None:
    check(torch.randn(3, 80, dtype=dtype, device=device), None, layout=layout)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "sigmoid", "identity"])
def test_two_tensors(activation: str, device: str) -> None:
    """With an offset that up takes back, so that what pads a row would be seen if it counted."""
    gate, up = 0.01 * torch.randn(2, 2, 3, 37, device=device)
    check(gate, up - 1, activation=activation, up_offset=1.0)


def test_limits_slope_and_offset(device: str) -> None:
    check(torch.randn(3, 90, device=device), None, layout="interleaved", alpha=1.702, **CLAMPED)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 3), (1, 257), (2, 256), (2, 768), (2, 1100), (1, 2049), (1, 32771)])
def test_odd_sizes(rows: int, width: int, device: str) -> None:
    check(torch.randn(rows, 2 * width, dtype=FP16, device=device), None, smooth=torch.rand(width, device=device) + 0.5)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, :48], lambda x: x[::2, 3:35], lambda x: x.t()[:5, :6], lambda x: x[0], lambda x: x.view(2, 4, 64)[:, :3]],
    ids=["columns", "every other row", "transposed", "one dimension", "rows not evenly apart"],
)
def test_strides(view: Callable[[Tensor], Tensor], device: str) -> None:
    gate, up = view(torch.randn(8, 64, device=device)), view(torch.randn(8, 64, device=device))
    check(gate, None)
    check(gate, up)
    check(gate, up[..., :1])


def test_rows_of_zeros_nan_and_infinity(device: str) -> None:
    x = torch.randn(7, 600, device=device)
    clean = glu_quant(x, None, cores=CORES)
    x[1], x[2], x[3, 7], x[4, 400], x[5] = 0, 1e-20, float("nan"), float("inf"), float("nan")
    q, scale = glu_quant(x, None, cores=CORES)
    assert torch.equal(q[[0, 6]], clean[0][[0, 6]])
    assert torch.equal(scale[[0, 6]], clean[1][[0, 6]])
    assert not q[1:6].any()
    assert scale[1] == 0
    assert scale[2] < 1e-35
    assert scale[3:6].isinf().all()


def test_rounding_in_between(device: str) -> None:
    gate, up = torch.randn(2, 4, 64, device=device)
    rounded = {"round_dtype": FP16, "product_dtype": FP16}
    q, scale = glu_quant(gate, up, activation="identity", **rounded, cores=CORES)
    check_quantised(q, scale, (gate.half().float() * up).half().double())
    assert not torch.equal(scale, glu_quant(gate, up, activation="identity", cores=CORES)[1])


def test_calls_repeat_bit_by_bit(device: str) -> None:
    x = torch.randn(3, 1500, dtype=FP16, device=device)
    for first, second in zip(glu_quant(x, None, cores=CORES), glu_quant(x, None, cores=CORES)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    x = torch.empty(shape, device=device)
    q, scale = glu_quant(x, None, cores=CORES)
    assert q.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(scale, torch.zeros(shape[:-1], device=device))
    assert glu_static_quant(x, None, torch.ones(1, device=device), divide=True, cores=CORES).shape == q.shape


# -------------------------------------------------------------------- groups


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 6, 0], [1, 0, 0, 2], [0, 0, 0, 0], [6]], ids=str)
def test_groups_have_vectors_of_their_own(counts: list[int], dtype: torch.dtype, device: str) -> None:
    """Rows beyond the last group are zeros, whatever is in them."""
    rows, width, total = 6, 40, sum(counts)
    x = torch.randn(rows, 2 * width, device=device)
    x[total:] = float("nan")
    smooth = torch.rand(len(counts), width, device=device) + 0.1
    sizes = torch.tensor(counts, dtype=dtype, device=device)
    q, scale = glu_quant(x, None, smooth_scale=smooth, group_list=sizes, group_list_type="count", cores=CORES)
    y = reference(x[:total].double(), None) * smooth.double().repeat_interleave(sizes.long(), 0)
    check_quantised(q[:total], scale[:total], y)
    assert not q[total:].any()
    assert not scale[total:].any()
    by_ends = glu_quant(x, None, smooth_scale=smooth, group_list=sizes.cumsum(0).to(dtype), cores=CORES)
    assert torch.equal(by_ends[0], q)
    assert torch.equal(by_ends[1], scale)


def test_groups_share_what_is_one_vector(device: str) -> None:
    x, weight, token = sums(5, 24, device)
    sizes = torch.tensor([3, 2], device=device)
    groups = {"group_list": sizes, "group_list_type": "count", "cores": CORES}
    smooth = torch.rand(24, device=device)
    shared = dequant_glu_quant(x, weight, token, smooth_scale=smooth, **groups)
    own = dequant_glu_quant(x, weight.expand(2, -1), token, smooth_scale=smooth.expand(2, -1), **groups)
    alone = dequant_glu_quant(x, weight[None], token[:, None], smooth_scale=smooth, cores=CORES)
    for a, b, c in zip(shared, own, alone):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# -------------------------------------------------------------------- of int32 sums


@pytest.mark.parametrize("bias_dtype", [None, torch.int32, FP32, FP16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_dequantised(layout: str, bias_dtype: torch.dtype | None, device: str) -> None:
    x, weight, token = sums(3, 90, device)
    smooth = torch.rand(90, device=device)
    scaled = weight.double() * token.double()[:, None]
    bias, exact = None, x * scaled
    if bias_dtype == torch.int32:
        bias = torch.randint(-900, 900, (180,), dtype=torch.int32, device=device)
        exact = (x + bias) * scaled
    elif bias_dtype is not None:
        bias = torch.randn(180, device=device).to(bias_dtype)
        exact = x * scaled + bias.double()
    q, scale = dequant_glu_quant(x, weight, token, bias=bias, smooth_scale=smooth, layout=layout, cores=CORES)
    check_quantised(q, scale, reference(exact, None, layout=layout) * smooth.double())
    step = torch.tensor(0.01, device=device)
    q = dequant_glu_static_quant(x, weight, token, step, bias=bias, divide=True, layout=layout, cores=CORES)
    check_static(q, reference(exact, None, layout=layout) / step.double())


def test_sums_of_groups(device: str) -> None:
    x, _, token = sums(6, 48, device)
    counts = torch.tensor([2, 0, 3], device=device)
    weight = torch.rand(3, 96, device=device) / 1000
    bias = torch.randint(-500, 500, (3, 96), dtype=torch.int32, device=device)
    smooth = torch.rand(3, 48, device=device)
    groups = {"group_list": counts, "group_list_type": "count", "cores": CORES}
    q, scale = dequant_glu_quant(x, weight, token, bias=bias, smooth_scale=smooth, **CLAMPED, **groups)
    own = [vector.double().repeat_interleave(counts, 0) for vector in (weight, bias, smooth)]
    y = reference((x[:5] + own[1]) * own[0] * token.double()[:5, None], None, **CLAMPED) * own[2]
    check_quantised(q[:5], scale[:5], y)
    assert not q[5].any()
    steps = torch.tensor([[100.0], [200.0], [50.0]], device=device)
    q = dequant_glu_static_quant(x, weight, None, steps, divide=False, **groups)
    y = reference(x[:5] * own[0], None) * steps.double().repeat_interleave(counts, 0)
    check_static(q[:5], y)
    assert not q[5].any()


def test_dequantised_numbers_are_rounded_where_asked(device: str) -> None:
    x, weight, token = sums(2, 40, device)
    q, scale = dequant_glu_quant(x, weight, token, dequant_dtype=FP16, activation="identity", cores=CORES)
    exact = (x.float() * weight * token[:, None]).half().double()
    check_quantised(q, scale, reference(exact, None, activation="identity"))
    assert not torch.equal(scale, dequant_glu_quant(x, weight, token, activation="identity", cores=CORES)[1])


def test_a_bias_of_integers_is_exact(device: str) -> None:
    """Sums and bias beyond 2^24, of which fp32 would lose the difference."""
    x = torch.full((1, 4), 2**30 + 1, dtype=torch.int32, device=device)
    bias = torch.full((4,), -(2**30), dtype=torch.int32, device=device)
    ones = torch.ones(4, device=device)
    q = dequant_glu_static_quant(x, ones, None, ones[:1], bias=bias, divide=True, activation="identity", cores=CORES)
    assert q.tolist() == [[1, 1]]


# -------------------------------------------------------------------- by a given scale


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (60,), (1, 1), (1, 60)], ids=str)
def test_scales_of_a_tensor_and_of_channels(shape: tuple[int, ...], divide: bool, device: str) -> None:
    x = torch.randn(3, 120, dtype=FP16, device=device)
    scale = torch.rand(shape, device=device) + 0.5
    scale = scale / 50 if divide else scale * 50
    offset = 5 * torch.randn(shape, device=device)
    y, step = reference(x.double(), None), scale.double()
    for zero in (None, offset):
        q = glu_static_quant(x, None, scale, zero, divide=divide, cores=CORES)
        check_static(q, (y / step if divide else y * step) + (0 if zero is None else zero.double()))


def test_halves_go_to_even_and_the_range_ends(device: str) -> None:
    values = [0.5, 1.5, 2.5, -0.5, -2.5, 126.5, 127.5, 200.0, -128.5, -200.0, float("nan"), float("inf"), float("-inf")]
    gate = torch.tensor([values], device=device)
    q = glu_static_quant(gate, torch.ones_like(gate), torch.ones(1, device=device), divide=True, activation="identity", cores=CORES)
    assert q.tolist() == [[0, 2, 2, 0, -2, 126, 127, 127, -128, -128, 0, 127, -128]]


@pytest.mark.parametrize("width", [1, 300, 2049, 3000])
def test_odd_sizes_by_a_given_scale(width: int, device: str) -> None:
    x, scale = torch.randn(2, 2 * width, device=device), torch.rand(width, device=device) * 30
    check_static(glu_static_quant(x, None, scale, divide=False, cores=CORES), reference(x.double(), None) * scale.double())


# -------------------------------------------------------------------- plans


@pytest.mark.parametrize(("width", "activation"), [(300, "silu"), (1408, "silu"), (2560, "silu"), (700, "gelu_tanh")])
def test_the_plan_for_ascend(width: int, activation: str, device: str) -> None:
    """Its cores take turns; rows too long for a core are walked twice."""
    x = torch.randn(5, 2 * width, device=device)
    plan = glu_quant_launch(5, width, Device("npu", 2, 2), layout="halves", activation=activation)
    assert plan.grid == 2
    assert (plan.constants["HEAD"] + plan.constants["TAIL"] < width) == (width == 2560)
    q = torch.full((5, width), 99, dtype=torch.int8, device=device)
    scale = torch.full((5,), torch.nan, device=device)
    absent = dict.fromkeys(("weight_scale_ptr", "token_scale_ptr", "bias_ptr", "group_ptr", "alpha", "gate_limit", "up_limit", "up_offset"))
    strides = {"gate_stride": 2 * width, "up_stride": 2 * width, "weight_stride": 0, "bias_stride": 0}
    common = {"gate_ptr": x, "up_ptr": x, "q_ptr": q, "scale_ptr": scale, "rows": 5, **absent, **strides}
    launch(plan, x, **common, smooth_ptr=None, smooth_stride=0)
    y = reference(x.double(), None, activation=activation)
    check_quantised(q, scale, y)
    plan = glu_static_quant_launch(5, width, Device("npu", 2, 2), layout="halves", activation=activation, divide=True)
    launch(plan, x, **{**common, "scale_ptr": torch.full((1,), 0.02, device=device)}, offset_ptr=None, scale_stride=0)
    check_static(q, y / 0.02)


@pytest.mark.parametrize("width", [1, 768, 1408, 2048, 3072, 11008, 14336, 18432, 28672, 32768])
def test_a_gpu_holds_rows_whole(width: int) -> None:
    plan = glu_quant_launch(4096, width, Device("cuda", 132, 132))
    held, warps = plan.constants["HEAD"] + plan.constants["TAIL"], plan.options["num_warps"]
    assert width <= held <= max(1.5 * width, 256)
    assert warps & (warps - 1) == 0
    assert held <= 1024 * warps
    assert plan.grid == 4096


# -------------------------------------------------------------------- arguments


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape)


LIST = torch.tensor([1, 2])
X32 = torch.zeros(2, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: glu_quant(_ones(2, 4).double(), None, cores=1), TypeError, "glu_quant: gate must be one of float16"),
        (lambda: glu_quant(_ones(2, 4), None, smooth_scale=_ones(3), cores=1), ValueError, "smooth_scale must have shape [2], not [3]"),
        (lambda: glu_quant(_ones(2, 4), None, smooth_scale=_ones(2, 2), cores=1), ValueError, "smooth_scale must have shape [1, 2]"),
        (
            lambda: glu_quant(_ones(2, 4), None, smooth_scale=_ones(3, 2), group_list=LIST, cores=1),
            ValueError,
            "glu_quant: smooth_scale must have shape [2, 2], not [3, 2]",
        ),
        (lambda: glu_quant(_ones(2, 4), None, group_list=LIST.float(), cores=1), TypeError, "group_list must be int32 or int64"),
        (lambda: glu_quant(_ones(2, 4), None, group_list=LIST[:0], cores=1), ValueError, "group_list must have 1 to 4096 groups, not 0"),
        (lambda: glu_quant(_ones(2, 4), None, group_list=LIST[None], cores=1), ValueError, "group_list must have 1 dimensions, not 2"),
        (lambda: glu_quant(_ones(2, 4), None, group_list_type="ends", cores=1), ValueError, "group_list_type must be one of 'cumsum'"),
        (lambda: glu_quant(_ones(2, 4), None, product_dtype=torch.int8, cores=1), TypeError, "product_dtype must be one of float16"),
        (lambda: glu_quant(_ones(2, 3), None, cores=1), ValueError, "glu_quant: a merged gate and up needs an even last dimension"),
        (lambda: glu_static_quant(_ones(2, 4), None, _ones(3), divide=True, cores=1), ValueError, "scale must have shape [2], not [3]"),
        (
            lambda: glu_static_quant(_ones(2, 4), None, _ones(2), _ones(1), divide=True, cores=1),
            ValueError,
            "glu_static_quant: offset must have shape [2], not [1]",
        ),
        (lambda: glu_static_quant(_ones(2, 4), None, _ones(2).int(), divide=True, cores=1), TypeError, "scale must be one of float16"),
        (lambda: dequant_glu_quant(_ones(2, 4), _ones(4), None, cores=1), TypeError, "dequant_glu_quant: x must be one of int32"),
        (lambda: dequant_glu_quant(X32, _ones(2), None, cores=1), ValueError, "weight_scale must have shape [4], not [2]"),
        (lambda: dequant_glu_quant(X32, _ones(4), _ones(3), cores=1), ValueError, "token_scale must have shape [2], not [3]"),
        (lambda: dequant_glu_quant(X32, _ones(4), None, bias=_ones(4).short(), cores=1), TypeError, "bias must be one of int32, float16"),
        (lambda: dequant_glu_quant(X32, _ones(4).to("meta"), None, cores=1), ValueError, "must lie on one device"),
        (
            lambda: dequant_glu_static_quant(X32, _ones(4), None, _ones(5), divide=False, cores=1),
            ValueError,
            "dequant_glu_static_quant: scale must have shape [2], not [5]",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_fake_kernels_tell_the_results(device: str) -> None:
    x, scale = torch.randn(2, 3, 16, device=device), torch.ones(8, device=device)
    check_op(glu_quant, x, None, smooth_scale=scale, cores=CORES)
    check_op(glu_quant, x, x, group_list=torch.tensor([3, 6], device=device), smooth_scale=torch.rand(2, 16, device=device), cores=CORES)
    check_op(glu_static_quant, x, None, scale, scale, divide=True, cores=CORES)
    sums_, weight, token = sums(3, 8, device)
    check_op(dequant_glu_quant, sums_, weight, token, bias=weight, smooth_scale=scale, cores=CORES)
    check_op(dequant_glu_static_quant, sums_, weight, token[:, None], scale[:1], divide=False, cores=CORES)


# -------------------------------------------------------------------- full sizes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("width", [768, 1024, 1408, 2048, 4096, 11008, 14336, 18432])
def test_full_sizes(width: int, dtype: torch.dtype, device: str) -> None:
    for rows in (1, 7, 512):
        x = torch.randn(rows, 2 * width, dtype=dtype, device=device)
        check(x, None, smooth=torch.rand(width, device=device) + 0.1)
        scale = torch.rand(width, device=device) * 30
        check_static(glu_static_quant(x, None, scale, divide=False, cores=CORES), reference(x.double(), None) * scale.double())
        sums_, weight, token = sums(rows, width, device)
        q, steps = dequant_glu_quant(sums_, weight, token, layout="swapped", cores=CORES)
        check_quantised(q, steps, reference(sums_ * weight.double() * token.double()[:, None], None, layout="swapped"))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [8, 64, 256])
def test_many_rows_in_groups(groups: int, device: str) -> None:
    rows, width = 65537, 768
    x = torch.randn(rows, 2 * width, dtype=BF16, device=device)
    ends = torch.randint(0, rows - 99, (groups,), device=device).sort().values
    smooth = torch.rand(groups, width, device=device) + 0.1
    q, scale = glu_quant(x, None, smooth_scale=smooth, group_list=ends, cores=CORES)
    counts, total = ends.diff(prepend=ends.new_zeros(1)), int(ends[-1])
    check_quantised(q[:total], scale[:total], reference(x[:total].double(), None) * smooth.double().repeat_interleave(counts, 0))
    assert not q[total:].any()
    by_counts = glu_quant(x, None, smooth_scale=smooth, group_list=counts, group_list_type="count", cores=CORES)
    assert torch.equal(by_counts[0], q)
