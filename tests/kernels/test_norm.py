"""Normalisations against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.kernels.launch import Device
from npu_fusion.kernels.norm import add_rms_norm_launch, layer_norm_launch, rms_norm_launch, row_tiles
from npu_fusion.lowerings.triton.norm import add_rms_norm, l2_norm, layer_norm, rms_norm
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops import norm as semantic
from tests.kernels.agreement import CORES, HIDDEN, strided
from tests.ops.checks import check_op, tensors_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-5
# Blocks and tiles that are not full; for an NPU two tiles, and rows that are walked.
planned = pytest.mark.parametrize(
    ("plan", "size"), [("own", (3, 100)), ("own", (33, 64)), ("npu", (65, 64)), ("npu", (1, 5000))], indirect=["plan"], ids=str
)


def check(op: Any, *positional: Any, **arguments: Any) -> Any:
    """A call is within the numeric contract of the semantic op of its name, and has its dtypes."""
    result = op(*positional, **arguments, cores=CORES)
    reference = getattr(semantic, op.name)
    eager = reference(*positional, **arguments)

    def exact(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) else value

    wide = {name: exact(value) for name, value in arguments.items() if not name.endswith("_dtype")}
    truth = reference(*map(exact, positional), **wide)
    inputs = [value for value in (*positional, *arguments.values()) if isinstance(value, Tensor)]
    for a, e, t in zip(*map(tensors_of, (result, eager, truth))):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert a.is_contiguous()
        lowest = max((tensor.dtype for tensor in (*inputs, a)), key=lambda dtype: torch.finfo(dtype).eps)
        assert_within_contract(a, e, t, lowest)
    return result


def inputs(size: tuple[int, ...], device: str, dtype: torch.dtype = FP16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two tensors of the size, a weight and a bias."""
    x, other = torch.randn(size, device=device, dtype=dtype), torch.randn(size, device=device, dtype=dtype)
    weight = 1 + 0.2 * torch.randn(size[-1], device=device, dtype=dtype)
    return x, other, weight, torch.randn(size[-1], device=device, dtype=dtype)


# -------------------------------------------------------------------- rms_norm


@planned
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_rms_norm(plan: str, size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x, _, weight, _ = inputs(size, device, dtype)
    check(rms_norm, x, weight, EPS, weight_offset=int(dtype == BF16))


@planned
@pytest.mark.parametrize(("first", "activation"), [(False, "silu"), (True, "silu"), (False, "sigmoid")], ids=str)
def test_a_gated_norm(plan: str, size: tuple[int, int], first: bool, activation: str, device: str) -> None:
    x, gate, weight, _ = inputs(size, device)
    check(rms_norm, x, weight, EPS, gate=gate, gate_first=first, gate_activation=activation)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_groups_of_channels(gated: bool, plan: str, device: str) -> None:
    x, gate, weight, _ = inputs((2, 64), device)
    check(rms_norm, x, weight, EPS, group_size=16, gate=gate if gated else None, gate_first=gated)
    check(rms_norm, x, None, EPS, group_size=32)


def test_no_weight_other_dtypes_one_dimension(device: str) -> None:
    x, _, weight, _ = inputs((48,), device)
    check(rms_norm, x, None, EPS)
    check(rms_norm, x, weight.float(), EPS, out_dtype=FP32)
    check(rms_norm, x.float(), weight, 1e-2, out_dtype=FP16)


@pytest.mark.parametrize("offset", [0, 1])
def test_rms_norm_rounds_where_the_model_does(offset: int, device: str) -> None:
    """To the bit in all but few elements; without the rounding many differ."""
    x, _, weight, _ = inputs((4, 256), device)
    call: dict[str, Any] = {"weight_offset": offset, "out_dtype": FP32}
    model = semantic.rms_norm(x, weight, EPS, round_dtype=FP16, **call)
    rounded = rms_norm(x, weight, EPS, round_dtype=FP16, **call, cores=CORES)
    assert (rounded != model).float().mean() < 0.02
    assert (rms_norm(x, weight, EPS, **call, cores=CORES) != model).float().mean() > 0.5


# -------------------------------------------------------------------- add_rms_norm


@planned
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_add_rms_norm(plan: str, size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x, residual, weight, bias = inputs(size, device, dtype)
    options: dict[str, Any] = {} if dtype == FP16 else {"bias": bias, "weight_offset": 1, "norm_unrounded": dtype == BF16}
    _, total = check(add_rms_norm, x, residual, weight, EPS, **options)
    if dtype != BF16:  # to which the interpreter does not round: it truncates
        assert torch.equal(total, semantic.add_rms_norm(x, residual, weight, EPS, **options)[1])


def test_add_rms_norm_of_two_dtypes(device: str) -> None:
    x, residual, weight, _ = inputs((3, 40), device)
    check(add_rms_norm, x, residual.float(), weight, EPS)
    check(add_rms_norm, x, residual.float(), None, EPS, sum_dtype=FP16, out_dtype=FP32)


def test_the_norm_is_of_the_rounded_sum_or_of_the_sum(device: str) -> None:
    x, residual, weight, _ = inputs((4, 256), device)
    call: dict[str, Any] = {"out_dtype": FP32}
    for unrounded in (False, True):
        model, _ = semantic.add_rms_norm(x, residual.float(), weight, EPS, sum_dtype=FP16, norm_unrounded=unrounded, **call)
        args = (x, residual.float(), weight, EPS)
        same, _ = add_rms_norm(*args, sum_dtype=FP16, norm_unrounded=unrounded, **call, cores=CORES)
        other, _ = add_rms_norm(*args, sum_dtype=FP16, norm_unrounded=not unrounded, **call, cores=CORES)
        assert (same - model).abs().max() < 2e-6
        assert (other - model).abs().max() > 1e-4


# -------------------------------------------------------------------- layer_norm, l2_norm


@planned
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_layer_norm(plan: str, size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x, _, weight, bias = inputs(size, device, dtype)
    check(layer_norm, x + 3, weight, bias, EPS)
    check(layer_norm, x, None, bias if dtype == FP32 else None, EPS)


def test_layer_norm_of_a_far_mean(device: str, plan: str) -> None:
    """A variance by a difference of squares would be lost."""
    x = 1000 + torch.randn(2, 100, device=device)
    check(layer_norm, x, None, None, EPS)


def test_layer_norm_rounds_where_the_model_does(device: str) -> None:
    x, _, weight, bias = inputs((4, 256), device)
    for vectors in ((weight, bias), (None, bias), (weight, None)):
        model = semantic.layer_norm(x, *vectors, EPS, round_dtype=FP16, out_dtype=FP32)
        rounded = layer_norm(x, *vectors, EPS, round_dtype=FP16, out_dtype=FP32, cores=CORES)
        assert (rounded != model).float().mean() < 0.02
        assert (layer_norm(x, *vectors, EPS, out_dtype=FP32, cores=CORES) != model).float().mean() > 0.3


@planned
@pytest.mark.parametrize(("mode", "eps"), [("add", 1e-6), ("max", 1e-12), ("max", 30.0)], ids=str)
def test_l2_norm(plan: str, size: tuple[int, int], mode: str, eps: float, device: str) -> None:
    check(l2_norm, torch.randn(size, device=device, dtype=FP16), eps, eps_mode=mode, scale=0.5)


def test_l2_norm_of_zeros(device: str) -> None:
    zeros = torch.zeros(2, 8, device=device)
    assert torch.equal(check(l2_norm, zeros, 1e-12, eps_mode="max"), zeros)
    assert torch.equal(check(l2_norm, zeros, 1e-6), zeros)


# -------------------------------------------------------------------- what holds for all


def calls(x: Tensor, other: Tensor, weight: Tensor) -> list[Any]:
    """A call of each op."""
    return [
        lambda: rms_norm(x, weight, EPS, gate=other, cores=CORES),
        lambda: add_rms_norm(x, other, weight, EPS, bias=weight, cores=CORES),
        lambda: layer_norm(x, weight, weight, EPS, cores=CORES),
        lambda: l2_norm(x, EPS, cores=CORES),
        lambda: l2_norm(x, EPS, eps_mode="max", cores=CORES),
    ]


@pytest.mark.parametrize("rows", [3, pytest.param(4097, marks=pytest.mark.gpu)])
def test_the_same_bits_from_call_to_call(rows: int, device: str) -> None:
    x, other, weight, _ = inputs((rows, 100), device)
    for first, second in zip(calls(x, other, weight), calls(x, other, weight)):
        assert all(map(torch.equal, tensors_of(first()), tensors_of(second())))


@pytest.mark.parametrize(("plan", "bad"), [("own", float("nan")), ("npu", float("inf"))], indirect=["plan"], ids=str)
def test_what_is_not_finite_stays_in_its_row(plan: str, bad: float, device: str) -> None:
    x, other, weight, _ = inputs((5, 24), device)
    before = [call() for call in calls(x, other, weight)]
    x[2, 7] = bad
    for old, call in zip(before, calls(x, other, weight)):
        for b, a in zip(tensors_of(old), tensors_of(call())):
            assert torch.equal(b[:2], a[:2])
            assert torch.equal(b[3:], a[3:])
            assert not a[2].isfinite().all()


@pytest.mark.parametrize("order", ["even", "uneven", "transposed"])
def test_rows_and_vectors_that_lie_apart(order: str, device: str) -> None:
    x, other, weight = strided(order, device), strided("even", device), torch.rand(80, device=device)[::2]
    dense = calls(x.contiguous(), other.contiguous(), weight.contiguous())
    for call, expected in zip(calls(x, other, weight), dense):
        for a, e in zip(tensors_of(call()), tensors_of(expected())):
            assert a.is_contiguous()
            assert torch.equal(a, e)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...], device: str) -> None:
    x, weight = torch.empty(shape, device=device), torch.empty(shape[-1], device=device)
    for call in calls(x, x, weight):
        assert all(result.shape == x.shape for result in tensors_of(call()))


def test_fake_kernels(device: str) -> None:
    x, other, weight, bias = inputs((2, 3, 16), device)
    check_op(rms_norm, x, weight, EPS, gate=other, group_size=8, out_dtype=FP32, cores=CORES)
    check_op(add_rms_norm, x.mT.contiguous().mT, other.float(), weight, EPS, bias=bias, cores=CORES)
    check_op(layer_norm, x, weight, bias, EPS, cores=CORES)
    check_op(l2_norm, x, EPS, out_dtype=BF16, cores=CORES)


def bad_calls(device: str) -> dict[str, tuple[type[Exception], Any]]:
    x, other, weight, _ = inputs((2, 8), device, FP32)
    floats = "must be one of float16, bfloat16, float32, not"
    return {
        f"rms_norm: x {floats} torch.float64": (TypeError, lambda: rms_norm(x.double(), weight, EPS, cores=CORES)),
        f"rms_norm: gate {floats} torch.int32": (TypeError, lambda: rms_norm(x, weight, EPS, gate=other.int(), cores=CORES)),
        f"rms_norm: out_dtype {floats} torch.int8": (TypeError, lambda: rms_norm(x, weight, EPS, out_dtype=torch.int8, cores=CORES)),
        f"rms_norm: round_dtype {floats} torch.float64": (
            TypeError,
            lambda: rms_norm(x, weight, EPS, round_dtype=torch.float64, cores=CORES),
        ),
        f"layer_norm: round_dtype {floats} torch.int8": (
            TypeError,
            lambda: layer_norm(x, weight, None, EPS, round_dtype=torch.int8, cores=CORES),
        ),
        "rms_norm: weight must have shape [8], not [7]": (ValueError, lambda: rms_norm(x, weight[1:], EPS, cores=CORES)),
        "rms_norm: gate must have shape [2, 8], not [8]": (ValueError, lambda: rms_norm(x, weight, EPS, gate=weight, cores=CORES)),
        "rms_norm: x must have at least 1 dimensions, not 0": (ValueError, lambda: rms_norm(x.sum(), None, EPS, cores=CORES)),
        "rms_norm: gate_activation must be one of 'silu', 'sigmoid', not 'gelu'": (
            ValueError,
            lambda: rms_norm(x, weight, EPS, gate=other, gate_activation="gelu", cores=CORES),
        ),
        "rms_norm: gate_first needs a gate": (ValueError, lambda: rms_norm(x, weight, EPS, gate_first=True, cores=CORES)),
        "rms_norm: group_size 3 does not divide the last dimension": (
            ValueError,
            lambda: rms_norm(x, weight, EPS, group_size=3, cores=CORES),
        ),
        "rms_norm: group_size must not be negative: -1": (ValueError, lambda: rms_norm(x, weight, EPS, group_size=-1, cores=CORES)),
        "rms_norm: weight_offset must be one of 0, 1, not 2": (ValueError, lambda: rms_norm(x, weight, EPS, weight_offset=2, cores=CORES)),
        "rms_norm: weight_offset needs a weight": (ValueError, lambda: rms_norm(x, None, EPS, weight_offset=1, cores=CORES)),
        "rms_norm: cores must be positive: 0": (ValueError, lambda: rms_norm(x, weight, EPS, cores=0)),
        "rms_norm: x, weight, gate must lie on one device": (ValueError, lambda: rms_norm(x, weight.to("meta"), EPS, cores=CORES)),
        f"add_rms_norm: residual {floats} torch.int64": (TypeError, lambda: add_rms_norm(x, other.long(), weight, EPS, cores=CORES)),
        f"add_rms_norm: sum_dtype {floats} torch.float64": (
            TypeError,
            lambda: add_rms_norm(x, other, weight, EPS, sum_dtype=torch.float64, out_dtype=FP32, cores=CORES),
        ),
        "add_rms_norm: residual must have shape [2, 8], not [1, 8]": (
            ValueError,
            lambda: add_rms_norm(x, other[:1], weight, EPS, cores=CORES),
        ),
        "add_rms_norm: weight_offset needs a weight": (
            ValueError,
            lambda: add_rms_norm(x, other, None, EPS, weight_offset=1, cores=CORES),
        ),
        "layer_norm: bias must have shape [8], not [2, 8]": (ValueError, lambda: layer_norm(x, weight, other, EPS, cores=CORES)),
        "l2_norm: eps_mode must be one of 'add', 'max', not 'sum'": (ValueError, lambda: l2_norm(x, EPS, eps_mode="sum", cores=CORES)),
    }


@pytest.mark.parametrize("message", bad_calls("cpu"))
def test_wrong_arguments(message: str, device: str) -> None:
    error, call = bad_calls(device)[message]
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def test_sizes_past_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="a row of x has 2147483648 elements, of which 2\\^31 - 1 fit"):
        rms_norm(torch.empty(1, 2**31, device="meta"), None, EPS, cores=CORES)
    with pytest.raises(ValueError, match="x has 2147483648 rows, of which 2\\^31 - 1 fit"):
        l2_norm(torch.empty(2**15, 2**16, 1, device="meta"), EPS, cores=CORES)


# -------------------------------------------------------------------- plans

GPU, NPU = Device("cuda", 132, 132), Device("npu", 40, 20)


def test_on_a_gpu_a_row_is_a_program_and_stays_in_registers() -> None:
    for hidden in HIDDEN:
        plan = add_rms_norm_launch(4096, hidden, GPU)
        assert plan.constants["BLOCK"] >= hidden
        assert plan.grid * plan.constants["ROWS"] >= 4096
        assert plan.constants["BLOCK"] * plan.constants["ROWS"] / (32 * plan.options["num_warps"]) <= 64


def test_rows_enough_to_fill_a_gpu_take_fewer_warps_each() -> None:
    def warps(rows: int, hidden: int, held: int) -> int:
        return row_tiles(rows, hidden, GPU, whole=4096, chunk=4096, held=held)[2]["num_warps"]

    assert [warps(4096, hidden, 32) for hidden in (1024, 2048, 4096, 7168, 16384)] == [2, 4, 4, 8, 16]
    assert [warps(4096, hidden, 16) for hidden in (1024, 2048, 4096, 7168, 16384)] == [2, 4, 8, 16, 16]
    assert warps(64, 7168, 32) == warps(64, 7168, 16) == 16


def test_a_row_that_registers_do_not_hold_is_walked() -> None:
    _, tile, _ = row_tiles(8, 40960, GPU, whole=4096, chunk=4096)
    assert tile == {"ROWS": 1, "BLOCK": 8192}


def test_on_an_npu_the_cores_take_turns() -> None:
    assert rms_norm_launch(4096, 7168, NPU).grid == 40
    assert rms_norm_launch(3, 7168, NPU).grid == 3
    assert layer_norm_launch(41, 64, NPU).grid == 21  # two rows a core
    for hidden in HIDDEN:
        assert rms_norm_launch(4096, hidden, NPU).constants["BLOCK"] <= 4096


def test_groups_have_a_row_a_tile() -> None:
    assert rms_norm_launch(4096, 64, GPU, groups=1).constants["ROWS"] > 1
    assert rms_norm_launch(4096, 64, GPU, groups=8).constants["ROWS"] == 1


# -------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 33, 4097])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_full_matrix(rows: int, hidden: int, dtype: torch.dtype, device: str) -> None:
    x, other, weight, bias = inputs((rows, hidden), device, dtype)
    check(rms_norm, x, weight, EPS)
    check(rms_norm, x, weight, EPS, weight_offset=1, gate=other, round_dtype=dtype)
    _, total = check(add_rms_norm, x, other, weight, EPS, round_dtype=dtype)
    assert torch.equal(total, x + other)
    check(layer_norm, x, weight, bias, EPS)
    check(l2_norm, x, EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 64, 128])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_heads(heads: int, width: int, device: str) -> None:
    x = torch.randn(517, heads + 2, width, device=device, dtype=BF16)[:, :heads]
    weight = torch.rand(width, device=device, dtype=BF16)
    check(rms_norm, x, weight, EPS, weight_offset=1)
    check(l2_norm, x, EPS)


@pytest.mark.gpu
def test_many_and_long_rows(device: str) -> None:
    x, other, weight, bias = inputs((65537, 512), device, BF16)
    check(add_rms_norm, x, other, weight, EPS)
    x, other, weight, bias = inputs((5, 40000), device, BF16)
    check(add_rms_norm, x, other, weight, EPS)
    check(layer_norm, x, weight, bias, EPS)
