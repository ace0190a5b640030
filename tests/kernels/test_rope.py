"""rotary and rotary_: numbers against float64, memory orders, tables, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.kernels import rope as kernels
from npu_fusion.kernels.launch import Device
from npu_fusion.lowerings.triton import rope as lowering
from npu_fusion.lowerings.triton.rope import rotary, rotary_
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops import rope as semantic
from tests.ops.checks import check_symbolic

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYOUTS = ("half", "interleaved", "mla")
CORES = 4


def tables(shape: Sequence[int], width: int, full: bool, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin [*shape, W] of any angles: those of a pair differ in a full table."""
    theta = 6.3 * torch.rand(*shape, width if full else width // 2, device=device)
    return theta.cos().to(dtype), theta.sin().to(dtype)


def check(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, results: Sequence[Tensor], **arguments: Any) -> None:
    """The results are within the numeric contract, and lie in memory as their inputs do."""
    eager = semantic.rotary(xs, cos, sin, **arguments)
    truth = semantic.rotary([x.double() for x in xs], cos.double(), sin.double(), **arguments)
    for x, y, e, t in zip(xs, results, eager, truth, strict=True):
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, torch.empty_like(x).stride())
        assert_within_contract(y, e, t, x.dtype)


def plain(device: str, *heads: int, tokens: int = 2, size: int = 8, dtype: torch.dtype = FP32) -> tuple[list[Tensor], Tensor, Tensor]:
    """Tensors [1, tokens, N, size] with half tables [1, tokens, 1, size / 2]."""
    xs = [torch.randn(1, tokens, n, size, device=device, dtype=dtype) for n in heads]
    return xs, *tables((1, tokens, 1), size, False, dtype, device)


# -------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("layout", "full", "rotary_dim", "sign", "dtype"),
    [
        ("half", True, -1, 1, FP16),
        ("half", False, 10, -1, BF16),
        ("half", True, 4, 1, FP32),
        ("interleaved", False, -1, -1, FP16),
        ("interleaved", True, 10, 1, FP32),
        ("interleaved", True, -1, 1, BF16),
        ("mla", True, -1, 1, FP32),
        ("mla", False, 6, -1, FP16),
        ("mla", False, -1, 1, BF16),
    ],
)
def test_numbers(layout: str, full: bool, rotary_dim: int, sign: int, dtype: torch.dtype, device: str) -> None:
    xs = [torch.randn(2, 1, heads, 12, device=device).to(dtype) for heads in (5, 3)]
    cos, sin = tables((2, 1, 1), 12 if rotary_dim == -1 else rotary_dim, full, dtype, device)
    arguments = {"layout": layout, "rotary_dim": rotary_dim, "sign": sign}
    results = rotary(xs, cos, sin, **arguments, cores=CORES)
    check(xs, cos, sin, results, **arguments)
    if rotary_dim > 0:
        assert all(torch.equal(x[..., rotary_dim:], y[..., rotary_dim:]) for x, y in zip(xs, results))


def test_tables_of_higher_precision_and_a_wider_result(device: str) -> None:
    (x,), cos, sin = plain(device, 2, tokens=1)
    (y,) = rotary([x.bfloat16()], cos, sin, out_dtype=FP32, cores=CORES)
    (expected,) = semantic.rotary([x.bfloat16().double()], cos.double(), sin.double())
    assert y.dtype == FP32
    assert (y.double() - expected).abs().max() < 1e-6  # a table rounded to bf16 is off by 1e-3


def test_a_call_repeats_itself(device: str) -> None:
    xs, cos, sin = plain(device, 4, 2, tokens=1)
    first, second = (rotary(xs, cos, sin, cores=CORES) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head(value: float, device: str) -> None:
    xs, cos, sin = plain(device, 3, 3)
    clean = rotary(xs, cos, sin, cores=CORES)
    xs[0][0, 0, 1, 2] = xs[1][0, 1, 2, 0] = value
    for i, (y, before) in enumerate(zip(rotary(xs, cos, sin, cores=CORES), clean, strict=True)):
        hit = torch.zeros(1, 2, 3, dtype=torch.bool, device=device)
        hit[0, i, 1 + i] = True
        assert torch.equal(y[~hit], before[~hit])
        assert not y[hit].isfinite().all()


# -------------------------------------------------------------------- memory


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _within_a_row(x: Tensor) -> Tensor:
    row = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3]), float("nan"), device=x.device)
    row[:, :, 1:-2] = x
    return row[:, :, 1:-2]


def _every_other_head(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2)[:, :, ::2]


def _size_first(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("moved", [_heads_first, _within_a_row, _every_other_head, _size_first])
def test_memory_orders(moved: Callable[[Tensor], Tensor], device: str) -> None:
    xs, cos, sin = plain(device, 3, 2)
    expected = rotary(xs, cos, sin, cores=CORES)
    xs = [moved(x) for x in xs]
    results = rotary(xs, cos, sin, cores=CORES)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert [y.stride() for y in results] == [torch.empty_like(x).stride() for x in xs]
    if moved is not _size_first:
        rotary_(xs, cos, sin, cores=CORES)
        assert all(torch.equal(a, b) for a, b in zip(xs, expected, strict=True))


@pytest.mark.parametrize("rank", [3, 4])
def test_in_place_leaves_the_rest_alone(rank: int, device: str) -> None:
    xs, cos, sin = plain(device, 3, 1)
    cos, sin = cos[..., :2], sin[..., :2]
    xs = [x[0] if rank == 3 else x for x in xs]
    cos, sin = (cos[0], sin[0]) if rank == 3 else (cos, sin)
    rows = torch.full((3, 2, 3, 8), 7.0, device=device)
    rows[1] = xs[0].reshape(2, 3, 8)
    whole = rows[1] if rank == 3 else rows[1:2]
    expected = rotary(xs, cos, sin, rotary_dim=4, cores=CORES)
    assert rotary_([whole, xs[1]], cos, sin, rotary_dim=4, cores=CORES) is None
    assert torch.equal(whole, expected[0])
    assert torch.equal(xs[1], expected[1])
    assert (rows[0] == 7).all()
    assert (rows[2] == 7).all()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of the launches from here on."""
    seen: list[dict[str, Any]] = []
    run = lowering.launch

    def launch(plan: Any, on: Tensor, **arguments: Any) -> None:
        seen.append(arguments)
        run(plan, on, **arguments)

    monkeypatch.setattr(lowering, "launch", launch)
    return seen


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1)], ids=str)
def test_tables_broadcast_without_a_copy(shape: tuple[int, ...], launches: list[dict[str, Any]], device: str) -> None:
    x = torch.randn(2, 2, 3, 8, device=device)
    cos, sin = tables(shape, 8, True, FP32, device)
    check([x], cos, sin, rotary([x], cos, sin, cores=CORES))
    assert [(call["cos_ptr"].data_ptr(), call["sin_ptr"].data_ptr()) for call in launches] == [(cos.data_ptr(), sin.data_ptr())]
    assert launches[0]["cos_ptr"].numel() == cos.numel()


@pytest.mark.parametrize(("dtype", "shared"), [(torch.int64, False), (torch.int32, True)])
def test_rows_of_tables_by_position(dtype: torch.dtype, shared: bool, device: str) -> None:
    both = torch.randn(9, 8, device=device)  # cosines beside sines
    cos, sin = both.chunk(2, -1)
    positions = torch.tensor([[8, 0]] if shared else [[8, 0], [3, 3]], device=device, dtype=dtype)
    xs = [torch.randn(2, 2, heads, 8, device=device) for heads in (3, 1)]
    results = rotary(xs, cos, sin, positions=positions, cores=CORES)
    rows = positions.long().expand(2, 2)
    check(xs, cos[rows][:, :, None], sin[rows][:, :, None], results)


def test_each_two_tensors_are_one_launch(launches: list[dict[str, Any]], device: str) -> None:
    (q, k, other), cos, sin = plain(device, 3, 2, 1, tokens=1)
    small, empty = other[..., :4].clone(), q[:, :, :0]
    xs = [q, k, other, empty, small]
    results = rotary(xs, cos[..., :2], sin[..., :2], rotary_dim=4, cores=CORES)
    check(xs, cos[..., :2], sin[..., :2], results, rotary_dim=4)
    assert [call["k_ptr"] is not None for call in launches] == [True, False, False]


@pytest.mark.parametrize("shape", [(1, 0, 2, 8), (0, 3, 2, 8), (0, 2, 8)])
def test_nothing_to_rotate(shape: tuple[int, ...], launches: list[dict[str, Any]], device: str) -> None:
    x, table = torch.empty(shape, device=device), torch.empty(8, device=device)
    assert [y.shape for y in rotary([x, x], table, table, cores=CORES)] == [x.shape] * 2
    assert rotary_([x], table, table, cores=CORES) is None
    assert not launches


# -------------------------------------------------------------------- plans


@pytest.mark.parametrize("heads", [(96, 1), (40, 40)])
@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_heads_in_parts(kind: str, heads: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More heads than a program holds: on an NPU they follow one another, elsewhere they are dealt out to programs."""
    monkeypatch.setattr(lowering, "device_for", lambda x, cores: Device(kind, cores, cores))
    xs, cos, sin = plain(device, *heads, tokens=1, size=128)
    plan = kernels.rotary_launch(1, *heads, 128, 128, Device(kind, CORES, CORES))
    assert plan.constants["PARTS"] > 1
    assert plan.constants["SPREAD"] == plan.grid == (1 if kind == "npu" else plan.constants["PARTS"])
    check(xs, cos, sin, rotary(xs, cos, sin, cores=CORES))


def test_a_small_grid_walks_all_tokens(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "device_for", lambda x, cores: Device("npu", cores, cores))
    xs, cos, sin = plain(device, 2, 1, tokens=3)
    check(xs, cos, sin, rotary(xs, cos, sin, cores=2))


@pytest.mark.parametrize("device_kind", ["npu", "cuda", "cpu"])
@pytest.mark.parametrize("heads", [(1, 0), (1, 1), (7, 0), (32, 8), (40, 8), (128, 1), (128, 128)])
def test_plans_cover_all_heads(heads: tuple[int, int], device_kind: str) -> None:
    for pairs in (1, 32, 64, 128):
        given = heads if heads[1] else heads[:1]
        grid, tiles, _ = kernels.head_tiles(70000, given, pairs, Device(device_kind, 40, 20), most=2560)
        rows = (tiles["Q_ROWS"], tiles["K_ROWS"])
        assert all(tiles["PARTS"] * tile >= count for tile, count in zip(rows, given))
        assert pairs * sum(rows[: len(given)]) <= max(2560, pairs * len(given))
        assert grid == (40 if device_kind == "npu" else 70000 * tiles["PARTS"])


# -------------------------------------------------------------------- what is refused


def _call(**change: Any) -> dict[str, Any]:
    x, table = torch.zeros(1, 2, 3, 8), torch.zeros(2, 1, 4)
    return {"xs": [x], "cos": table, "sin": table, "cores": CORES} | change


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "xs[0] must be one of float16, bfloat16, float32, not torch.float64", {"xs": [torch.zeros(1, 2, 3, 8).double()]}),
        (TypeError, "sin must be one of float16, bfloat16, float32, not torch.int32", {"sin": torch.zeros(2, 1, 4, dtype=torch.int32)}),
        (TypeError, "positions must be int32 or int64", {"cos": torch.zeros(9, 4), "sin": torch.zeros(9, 4), "positions": torch.zeros(2)}),
        (ValueError, "xs must have at least one tensor", {"xs": []}),
        (ValueError, "xs[0] must have 3 or 4 dimensions, not 2", {"xs": [torch.zeros(2, 8)]}),
        (ValueError, "xs[1] must have 4 dimensions, not 3", {"xs": [torch.zeros(1, 2, 3, 8), torch.zeros(2, 3, 8)]}),
        (ValueError, "xs[0], cos, sin, positions must lie on one device", {"xs": [torch.zeros(1, 2, 3, 8, device="meta")]}),
        (ValueError, "layout must be one of 'half', 'interleaved', 'mla', not 'neox'", {"layout": "neox"}),
        (ValueError, "sign must be one of 1, -1, not 0", {"sign": 0}),
        (ValueError, "rotary_dim must be positive or -1, not 0", {"rotary_dim": 0}),
        (ValueError, "rotary_dim 10 exceeds the size of a head, 8", {"rotary_dim": 10}),
        (ValueError, "an odd number of elements, 3, cannot be rotated", {"rotary_dim": 3}),
        (ValueError, "cos must end in 4 or half of it, not 3", {"rotary_dim": 4, "cos": torch.zeros(2, 1, 3)}),
        (ValueError, "sin's last dimension must have shape [4], not [8]", {"sin": torch.zeros(2, 1, 8)}),
        (ValueError, "cos of shape [2, 3] does not broadcast to [1, 2, 1]", {"cos": torch.zeros(2, 3, 4)}),
        (ValueError, "cos must have 2 dimensions, not 3", {"positions": torch.zeros(2, dtype=torch.int32)}),
        (
            ValueError,
            "positions of shape [3] does not broadcast to [1, 2]",
            {"cos": torch.zeros(9, 4), "sin": torch.zeros(9, 4), "positions": torch.zeros(3, dtype=torch.int32)},
        ),
        (ValueError, "out_dtype must be one of float16, bfloat16, float32, not torch.int8", {"out_dtype": torch.int8}),
        (ValueError, "cores must be positive: 0", {"cores": 0}),
    ],
)
def test_what_is_refused(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    call = _call(**change)
    with pytest.raises(error) as raised:
        rotary(call.pop("xs"), call.pop("cos"), call.pop("sin"), **call)
    assert str(raised.value).startswith(f"rotary: {message}")


def test_heads_that_32_bits_do_not_reach() -> None:
    x = torch.empty_strided((1, 1, 129, 8), (0, 0, 2**24, 1), device="meta")
    table = torch.empty(8, device="meta")
    with pytest.raises(ValueError, match=r"xs\[0\] lie over 2147483656 elements"):
        rotary([x], table, table, cores=CORES)


def test_what_is_written_must_lie_in_one_piece() -> None:
    call = _call(xs=[torch.zeros(1, 2, 8, 3).transpose(2, 3)])
    with pytest.raises(ValueError, match=r"rotary_: the last dimension of xs\[0\], which is written, must have stride 1, not 3"):
        rotary_(call.pop("xs"), call.pop("cos"), call.pop("sin"), **call)


# -------------------------------------------------------------------- fake kernels


@pytest.mark.parametrize("moved", [_heads_first, _within_a_row])
def test_fake_kernel(moved: Callable[[Tensor], Tensor], device: str) -> None:
    xs, cos, sin = plain(device, 3, 2, tokens=2)
    xs, arguments = [moved(x) for x in xs], {"rotary_dim": 4, "out_dtype": FP16, "cores": CORES}
    real = rotary(xs, cos[..., :2], sin[..., :2], **arguments)
    check_symbolic(rotary, real, xs, cos[..., :2], sin[..., :2], **arguments)


def test_schemas_say_what_is_written(device: str) -> None:
    xs, cos, sin = plain(device, 2, 1, tokens=1)
    for op in (rotary, rotary_):
        torch.library.opcheck(op.overload, (xs, cos, sin), {"cores": CORES}, test_utils=("test_schema", "test_faketensor"))


# -------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(8, 1), (32, 8), (40, 8), (128, 128)], ids=str)
def test_matrix(heads: tuple[int, int], size: int, layout: str, dtype: torch.dtype, device: str) -> None:
    for tokens, full, rotary_dim in ((1, False, -1), (257, True, size // 2), (1031, True, -1)):
        xs = [torch.randn(1, n, tokens, size, device=device, dtype=dtype).transpose(1, 2) for n in heads]
        cos, sin = tables((tokens, 1), size if rotary_dim == -1 else rotary_dim, full, dtype, device)
        check(xs, cos, sin, rotary(xs, cos, sin, layout=layout, rotary_dim=rotary_dim, cores=132), layout=layout, rotary_dim=rotary_dim)


@pytest.mark.gpu
def test_many_tokens_and_offsets_past_32_bits(device: str) -> None:
    x = torch.randn(65537, 2, 64, device=device, dtype=FP16)
    cos, sin = tables((65537, 1), 64, False, FP16, device)
    check([x], cos, sin, rotary([x], cos, sin, cores=132))
    wide = torch.empty(3, 2**30 + 64, device=device, dtype=FP16)[:, :128].view(3, 2, 64)
    wide.copy_(x[:3])
    rotary_([wide], cos[:3], sin[:3], cores=132)
    assert torch.equal(wide, rotary([x[:3]], cos[:3], sin[:3], cores=132)[0])


@pytest.mark.gpu
def test_capture(device: str) -> None:
    xs, cos, sin = plain(device, 32, 8, tokens=16, size=128, dtype=BF16)
    expected = rotary(xs, cos, sin, cores=132)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = rotary(xs, cos, sin, cores=132)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
