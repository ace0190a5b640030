"""Rows sorted by expert and back, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.triton import load
from tests.ops.checks import check_op

pytest.importorskip("triton")
load()
from npu_fusion.kernels import permute as kernels  # noqa: E402
from npu_fusion.kernels.launch import Device  # noqa: E402
from npu_fusion.lowerings.triton.permute import moe_permute, moe_unpermute  # noqa: E402

CORES = 4


def _ids(rows: int, k: int, experts: int, device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    """Distinct experts a row; one in five ids is dropped."""
    ids = torch.rand(rows, experts, device=device).argsort(-1)[:, :k]
    return ids.masked_fill(torch.rand(rows, k, device=device) < 0.2, -1).to(dtype)


def _check(
    x: Tensor,
    ids: Tensor,
    experts: int,
    *,
    scales: Tensor | None = None,
    first_expert: int = 0,
    out_rows: int | None = None,
    capacity: int | None = None,
    group_list: str = "counts",
    **options: Any,
) -> tuple[Tensor, ...]:
    """Every result is that of a stable sort."""
    results = moe_permute(
        x,
        ids,
        experts,
        scales=scales,
        first_expert=first_expert,
        out_rows=out_rows,
        capacity=capacity,
        group_list=group_list,
        **options,
        cores=CORES,
    )
    y, y_scales, places, source, groups = results
    local = (ids.long() - first_expert).flatten()
    kept = (local >= 0) & (local < experts)
    order = torch.where(kept, local, experts).sort(stable=True).indices[: int(kept.sum())]
    if capacity is None:
        source_expected = torch.full((ids.numel() if out_rows is None else out_rows,), -1, device=x.device)
        order = order[: len(source_expected)]
        source_expected[: len(order)] = order
    else:
        source_expected = torch.full((experts, capacity), -1, device=x.device)
        for expert in range(experts):
            own = (local == expert).nonzero().flatten()[:capacity]
            source_expected[expert, : len(own)] = own
        source_expected = source_expected.flatten()
    assert source.dtype == places.dtype == torch.int32
    assert torch.equal(source.long(), source_expected)
    used = source_expected >= 0
    places_expected = torch.full((ids.numel(),), -1, device=x.device)
    places_expected[source_expected[used]] = used.nonzero().flatten()
    assert torch.equal(places.long().flatten(), places_expected)
    assert torch.equal(y[used], x[source_expected[used] // ids.shape[1]])
    counts = torch.bincount(local[source_expected[used]], minlength=experts)
    assert torch.equal(groups.long(), counts.cumsum(0) if group_list == "sums" else counts)
    if scales is not None:
        assert torch.equal(y_scales[used], scales[source_expected[used] // ids.shape[1]])
    if options.get("zero_unused", True):
        assert not y[~used].any()
        assert scales is None or not y_scales[~used].any()
    return results


@pytest.fixture(params=["few", "many"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to sort, one launch and three, at sizes that the interpreter stands."""
    if request.param == "many":
        monkeypatch.setattr(kernels, "FEW_IDS", 0)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_rows_go_where_a_stable_sort_puts_them(ids_dtype: torch.dtype, device: str) -> None:
    x = torch.randn(9, 33, device=device).half()
    _check(x, _ids(9, 3, 5, device, ids_dtype), 5)


@pytest.mark.usefixtures("way")
def test_a_range_of_experts(device: str) -> None:
    x = torch.randn(7, 20, device=device)
    _check(x, _ids(7, 2, 12, device), 4, first_expert=3, group_list="sums", group_dtype=torch.int32)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("capacity", [1, 3])
def test_a_capacity_for_each_expert(capacity: int, device: str) -> None:
    x = torch.randint(-127, 128, (8, 40), device=device, dtype=torch.int8)
    _check(x, _ids(8, 2, 3, device), 3, capacity=capacity, scales=torch.rand(8, device=device))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("out_rows", [0, 5, 40])
def test_fewer_or_more_rows_than_ids(out_rows: int, device: str) -> None:
    x = torch.randn(6, 16, device=device)
    for group_list in ("counts", "sums"):
        _check(x, _ids(6, 2, 4, device), 4, out_rows=out_rows, group_list=group_list)


@pytest.mark.usefixtures("way")
def test_rows_without_a_source_may_stay(device: str) -> None:
    x = torch.randn(5, 8, device=device)
    ids = torch.full((5, 1), -1, dtype=torch.int32, device=device)
    ids[2] = 1
    y = _check(x, ids, 2, zero_unused=False)[0]
    assert y[1:].isnan().all()  # the poison of uninitialised memory


@pytest.mark.usefixtures("way")
def test_all_ids_are_dropped(device: str) -> None:
    x = torch.randn(4, 8, device=device)
    groups = _check(x, torch.full((4, 2), 9, dtype=torch.int32, device=device), 3, scales=torch.rand(4, device=device))[4]
    assert groups.tolist() == [0, 0, 0]


@pytest.mark.usefixtures("way")
def test_what_is_no_number_is_only_copied(device: str) -> None:
    x = torch.randn(4, 8, device=device)
    x[1], x[2] = float("nan"), float("inf")
    y, _, places, *_ = moe_permute(x, torch.tensor([[0], [1], [0], [-1]], device=device), 2, cores=CORES)
    assert places.flatten().tolist() == [0, 2, 1, -1]
    assert torch.equal(y[[0, 1, 3]], torch.stack([x[0], x[2], torch.zeros(8, device=device)]))
    assert y[2].isnan().all()


def test_ids_in_several_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of one expert come from several chunks and blocks of one, and the last chunk is not full."""
    monkeypatch.setattr(kernels, "FEW_IDS", 0)
    monkeypatch.setattr(kernels, "chunks_of", lambda ids, _: (-(-ids // 16), 16))
    monkeypatch.setattr(kernels, "_id_block", lambda *_: 8)
    x = torch.arange(17, device=device, dtype=torch.float32)[:, None]
    ids = torch.randint(-1, 4, (17, 3), device=device, dtype=torch.int32)
    _check(x, ids, 4, group_list="sums")
    _check(x, ids, 4, capacity=7)


def test_a_row_longer_than_a_block(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_row_block", lambda *_: (16, {}))
    x = torch.randn(3, 40, device=device)
    for few in (kernels.FEW_IDS, 0):
        monkeypatch.setattr(kernels, "FEW_IDS", few)
        _check(x, _ids(3, 2, 4, device), 4)


def test_strided_rows(device: str) -> None:
    wide, ids = torch.randn(6, 40, device=device), _ids(6, 4, 5, device)
    for x, some in ((wide[:, 3:23], ids[:, ::2]), (wide.t()[:6, :], ids.t().contiguous().t()[:, :2]), (wide[:, ::2], ids[:, 1:3])):
        _check(x, some, 5)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_ids(shape: tuple[int, int], device: str) -> None:
    ids = torch.empty(shape, dtype=torch.int32, device=device)
    _check(torch.randn(shape[0], 8, device=device), ids, 3)
    _check(torch.randn(shape[0], 8, device=device), ids, 3, capacity=2, scales=torch.ones(shape[0], device=device))


@pytest.mark.parametrize("few", [True, False])
def test_calls_are_bit_identical(few: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not few:
        monkeypatch.setattr(kernels, "FEW_IDS", 0)
    x, ids = torch.randn(6, 8, device=device), _ids(6, 2, 3, device)
    first, second = (moe_permute(x, ids, 3, cores=CORES) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def _unpermuted(
    x: Tensor,
    places: Tensor,
    weights: Tensor | None,
    *,
    bias: Tensor | None = None,
    expert_ids: Tensor | None = None,
    residual: Tensor | None = None,
    residual2: Tensor | None = None,
    scale: float = 1.0,
    **_: Any,
) -> Tensor:
    """In float64."""
    used = places >= 0
    rows = x.double()[places.long().clamp(min=0)]
    if bias is not None and expert_ids is not None:
        rows = rows + bias.double()[expert_ids.long().clamp(min=0)]
    if weights is not None:
        rows = rows * weights.double()[..., None]
    total = torch.where(used[..., None], rows, 0).sum(1) * scale
    for more in (residual, residual2):
        total = total if more is None else total + more.double()
    return total


def _check_back(x: Tensor, places: Tensor, weights: Tensor | None, **options: Any) -> Tensor:
    y = moe_unpermute(x, places, weights, **options, cores=CORES)
    exact = _unpermuted(x, places, weights, **options)
    dtype = options.get("out_dtype") or x.dtype
    assert (y.shape, y.dtype, y.is_contiguous()) == (exact.shape, dtype, True)
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_weights", [True, False])
def test_weighted_sums(dtype: torch.dtype, with_weights: bool, device: str) -> None:
    x = torch.randn(12, 33, device=device).to(dtype)
    places = torch.randperm(12, device=device).reshape(4, 3).int()
    places[1, 2] = places[2] = -1
    _check_back(x, places, torch.rand(4, 3, device=device) if with_weights else None)


def test_bias_and_residuals(device: str) -> None:
    x, places = torch.randn(9, 20, device=device), torch.randint(-1, 9, (5, 3), device=device)
    options = {
        "bias": torch.randn(4, 20, device=device).half(),
        "expert_ids": torch.randint(0, 4, (5, 3), device=device).masked_fill(places < 0, -1),
        "residual": torch.randn(5, 20, device=device),
        "residual2": torch.randn(5, 20, device=device).bfloat16(),
        "scale": 2.5,
        "out_dtype": torch.float16,
    }
    _check_back(x, places, torch.rand(5, 3, device=device).half(), **options)


def test_what_is_no_number_stays_in_its_row_and_dropped_ids_add_nothing(device: str) -> None:
    x = torch.ones(3, 8, device=device)
    x[0], x[2] = float("nan"), float("inf")
    weights = torch.tensor([[float("nan"), 0.5], [1.0, 1.0], [2.0, 3.0]], device=device)
    y = moe_unpermute(x, torch.tensor([[-1, 1], [0, 1], [2, 1]], device=device), weights, cores=CORES)
    assert torch.equal(y[0], torch.full((8,), 0.5, device=device))
    assert y[1].isnan().all()
    assert y[2].isinf().all()


def test_products_are_rounded_where_the_model_rounds(device: str) -> None:
    """1 + 2^-9 times 1 + 2^-7 is rounded to bf16 before the sum, which cancels what is left of it."""
    x = torch.tensor([[1 + 2**-9], [-1.0]], device=device)
    places, weights = torch.tensor([[0, 1]], device=device), torch.tensor([[1 + 2**-7, 1 + 2**-7]], device=device)
    assert moe_unpermute(x, places, weights, cores=CORES).item() > 0
    assert moe_unpermute(x, places, weights, round_dtype=torch.bfloat16, cores=CORES).item() == 0


def test_k_major_places_and_strides(device: str) -> None:
    wide = torch.randn(24, 40, device=device)
    places = torch.randperm(12, device=device).int().reshape(3, 4).t()
    weights = torch.rand(3, 4, device=device).t()
    for x in (wide[:12, 3:23], wide[::2, 3:23], wide.t()[:20, :].t()):
        _check_back(x, places, weights, residual=wide[:4, 1:21], residual2=wide[4:12:2, ::2])


def test_nothing_to_add(device: str) -> None:
    x, none = torch.randn(3, 8, device=device), torch.empty(2, 0, dtype=torch.int32, device=device)
    assert moe_unpermute(x, none[:0], cores=CORES).shape == (0, 8)
    assert not moe_unpermute(x, none, cores=CORES).any()
    residual = torch.randn(2, 8, device=device)
    no_rows = torch.full((2, 1), -1, device=device)
    assert torch.equal(moe_unpermute(x[:0], no_rows, residual=residual, cores=CORES), residual)


def test_there_and_back_is_the_identity(device: str) -> None:
    x, ids = torch.randn(6, 16, device=device), torch.rand(6, 5, device=device).argsort(-1)[:, :2]
    y, _, places, *_ = moe_permute(x, ids, 5, cores=CORES)
    assert torch.equal(moe_unpermute(y, places, torch.full((6, 2), 0.5, device=device), cores=CORES), x)


def test_the_fake_kernels_predict_the_results(device: str) -> None:
    x, ids = torch.randn(3, 8, device=device), _ids(3, 2, 3, device)
    check_op(moe_permute, x, ids, 3, scales=torch.rand(3, device=device), group_dtype=torch.int32, cores=CORES)
    check_op(moe_permute, x[:2], ids[:2], 3, capacity=1, cores=CORES)
    places = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32, device=device)
    check_op(moe_unpermute, x, places, torch.rand(2, 2, device=device), residual=x[:2].clone(), out_dtype=torch.float16, cores=CORES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "x must have 2 dimensions, not 1"),
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, "x must be one of float16, bfloat16, float32, int8"),
        ({"x": torch.zeros(3, 0)}, ValueError, "rows of x have no elements"),
        ({"expert_ids": torch.zeros(3, 2)}, TypeError, "expert_ids must be int32 or int64"),
        ({"expert_ids": torch.zeros(4, 2, dtype=torch.int32)}, ValueError, r"expert_ids must have shape \[3, 2\], not \[4, 2\]"),
        ({"expert_ids": torch.zeros(3, 33, dtype=torch.int32)}, ValueError, "at most 32 ids a row"),
        ({"num_experts": 0}, ValueError, "num_experts must be from 1 to 512: 0"),
        ({"scales": torch.zeros(2)}, ValueError, r"scales must have shape \[3\], not \[2\]"),
        ({"scales": torch.zeros(3).half()}, TypeError, "scales must be one of float32"),
        ({"group_list": "both"}, ValueError, "group_list must be one of 'counts', 'sums'"),
        ({"group_dtype": torch.int8}, ValueError, "group_dtype must be one of torch.int32, torch.int64"),
        ({"out_rows": -1}, ValueError, "out_rows must not be negative: -1"),
        ({"out_rows": 2**31}, ValueError, "out_rows is 2.31 or more"),
        ({"capacity": 0}, ValueError, "capacity must be positive: 0"),
        ({"capacity": 2**30}, ValueError, "4 experts of capacity 1073741824 have 2.31 rows or more"),
        ({"capacity": 2, "out_rows": 2}, ValueError, "out_rows must be None"),
        ({"capacity": 2, "group_list": "sums"}, ValueError, "with capacity group_list must be 'counts'"),
        ({"cores": 0}, ValueError, "cores must be positive: 0"),
    ],
)
def test_arguments_of_moe_permute_that_do_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(3, 8), "expert_ids": torch.zeros(3, 2, dtype=torch.int32), "num_experts": 4, "cores": CORES, **changes}
    positional = [arguments.pop(name) for name in ("x", "expert_ids", "num_experts")]
    with pytest.raises(error, match=message):
        moe_permute(*positional, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "x must have 2 dimensions, not 1"),
        ({"x": torch.zeros(3, 8, dtype=torch.int8)}, TypeError, "x must be one of float16, bfloat16, float32"),
        ({"places": torch.zeros(3, 2)}, TypeError, "places must be int32 or int64"),
        ({"places": torch.zeros(3, 33, dtype=torch.int32)}, ValueError, "at most 32 places a row"),
        ({"weights": torch.zeros(3, 3)}, ValueError, r"weights must have shape \[3, 2\], not \[3, 3\]"),
        ({"bias": torch.zeros(4, 8)}, ValueError, "bias needs expert_ids"),
        ({"bias": torch.zeros(4, 7), "expert_ids": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, r"bias must have shape \[8\]"),
        ({"residual": torch.zeros(2, 8)}, ValueError, r"residual must have shape \[3, 8\], not \[2, 8\]"),
        ({"residual2": torch.zeros(3, 8, dtype=torch.int32)}, TypeError, "residual2 must be one of float16"),
        ({"out_dtype": torch.int8}, ValueError, "out_dtype must be one of float16"),
        ({"cores": -1}, ValueError, "cores must be positive: -1"),
    ],
)
def test_arguments_of_moe_unpermute_that_do_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(6, 8), "places": torch.zeros(3, 2, dtype=torch.int32), "cores": CORES, **changes}
    positional = [arguments.pop(name) for name in ("x", "places")]
    with pytest.raises(error, match=message):
        moe_unpermute(*positional, **arguments)


def test_plans_hold_a_row_of_any_length() -> None:
    """An NPU's core holds a block of the row; the grid is its cores; a GPU has a program a row."""
    npu, gpu = Device("npu", 40, 20), Device("cuda", 132, 132)
    for width in (1, 1000, 7168, 18432, 100000):
        plan = kernels.permute_rows_launch(4096, 8, 128, width, npu, size=2)
        assert plan.grid == 40
        assert plan.constants["BLOCK"] * 2 <= 32768
        assert kernels.permute_rows_launch(4096, 8, 128, width, gpu, size=2).grid == 4096


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
@pytest.mark.parametrize("hidden", [1024, 2304, 4096, 7168, 18432])
def test_all_widths(hidden: int, dtype: torch.dtype, device: str) -> None:
    for rows, k, experts in ((1, 8, 128), (16, 8, 256), (128, 8, 64), (1001, 6, 160)):
        x = torch.randint(-127, 128, (rows, hidden), device=device).to(dtype)
        ids = _ids(rows, k, experts, device)
        y, _, places, *_ = _check(x, ids, experts)
        if dtype != torch.int8:
            _check_back(y, places, torch.rand(rows, k, device=device), residual=x)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [8, 128, 512])
@pytest.mark.parametrize("rows", [4096, 65537])
def test_many_rows(rows: int, experts: int, device: str) -> None:
    x = torch.randn(rows, 64, device=device)
    _check(x, _ids(rows, 8, experts, device), experts, group_list="sums", zero_unused=False)


@pytest.mark.gpu
def test_results_past_int32_elements(device: str) -> None:
    x = torch.randint(-127, 128, (65537, 5120), dtype=torch.int8, device=device)
    ids = torch.arange(65537 * 8, device=device).reshape(65537, 8).int() % 64
    y, _, places, source, _ = moe_permute(x, ids, 64, cores=CORES)
    assert y.numel() > 2**31
    for at in (0, 2**18, 65537 * 8 - 1):
        assert torch.equal(y[at], x[source[at] // 8])
        assert places.flatten()[source[at]] == at
