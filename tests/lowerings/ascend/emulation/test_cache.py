"""CPU kernels of cache writes against loops over the rows that the documents describe, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.ascend.emulation import EmulationError
from tests.lowerings.ascend.checks import check_kernel

npu = torch.ops.npu
BLOCKS, PAGE, HEADS = 3, 4, 2


# -------------------------------------------------------------------- npu_scatter_nd_update


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in_place"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_scatter_nd_update(depth: int, in_place: bool, dtype: torch.dtype) -> None:
    given = torch.randint(0, 2, (4, 5, 6)).to(dtype)
    rows = torch.tensor([[3, 1, 2], [0, 4, 5]])[:, :depth]
    updates = torch.randint(0, 2, (2, *given.shape[depth:])).to(dtype)
    expected = given.clone()
    for row, update in zip(rows.tolist(), updates, strict=True):
        expected[tuple(row)] = update
    target = given.clone()
    name = "npu::npu_scatter_nd_update_" if in_place else "npu::npu_scatter_nd_update"
    result = check_kernel(name, target, rows.int(), updates)
    assert torch.equal(result, expected)
    assert torch.equal(target, expected if in_place else given)
    assert (result.data_ptr() == target.data_ptr()) is in_place


def test_scatter_nd_update_writes_through_a_view() -> None:
    cache = torch.zeros(3, 4, 2)
    npu.npu_scatter_nd_update_(cache.transpose(0, 1), torch.tensor([[2]]), torch.ones(1, 3, 2))
    assert torch.equal(cache[:, 2], torch.ones(3, 2))
    assert cache.sum() == 6


@pytest.mark.parametrize(
    ("indices", "updates", "message"),
    [
        (torch.tensor([0]), torch.ones(1, 5), "indices must have at least 2 dimensions"),
        (torch.tensor([[0]]), torch.ones(2, 5), "updates must have shape"),
        (torch.tensor([[4]]), torch.ones(1, 5), "out of range"),
        (torch.tensor([[-1]]), torch.ones(1, 5), "out of range"),
        (torch.tensor([[0, 0, 0]]), torch.ones(1), "the last dimension of indices is 3"),
        (torch.tensor([[0]]), torch.ones(1, 5).half(), "dtypes must be equal"),
        (torch.tensor([[0.0]]), torch.ones(1, 5), "indices must be int32, int64"),
    ],
)
def test_scatter_nd_update_refuses(indices: Tensor, updates: Tensor, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        npu.npu_scatter_nd_update(torch.zeros(4, 5), indices, updates)


# -------------------------------------------------------------------- scatter_update, npu_scatter


@pytest.mark.parametrize("axis", [-2, 2, -1, 1])
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in_place"])
def test_scatter_update_starts_each_row_at_its_index(axis: int, in_place: bool) -> None:
    data = torch.zeros(2, 5, 6, 7)
    shape = list(data.shape)
    shape[axis] = 2
    updates, starts = torch.randn(shape), torch.tensor([3, 0])
    expected = data.clone()
    for row, start in enumerate(starts.tolist()):
        for i in range(2):
            expected[row].select(axis % 4 - 1, start + i).copy_(updates[row].select(axis % 4 - 1, i))
    target = data.clone()
    result = check_kernel("npu::scatter_update_" if in_place else "npu::scatter_update", target, starts, updates, axis)
    assert torch.equal(result, expected)
    assert torch.equal(target, expected if in_place else data)


def test_scatter_update_with_rows_of_its_own() -> None:
    data, updates = torch.zeros(3, 4, 2), torch.ones(1, 1, 2)
    result = check_kernel("npu::scatter_update", data, torch.tensor([[2, 1]], dtype=torch.int32), updates, -2)
    assert result[2, 1].tolist() == [1, 1]
    assert result.sum() == 2


@pytest.mark.parametrize(
    ("indices", "updates", "axis", "message"),
    [
        (torch.tensor([0, 0]), torch.ones(2, 1, 3), 0, "axis=0"),
        (torch.tensor([4, 0]), torch.ones(2, 1, 3), -2, "out of range"),
        (torch.tensor([3, 0]), torch.ones(2, 2, 3), -2, "out of range"),
        (torch.tensor([0]), torch.ones(2, 1, 3), -2, "one element for each of the 2 rows"),
        (torch.tensor([0, 0]), torch.ones(2, 1, 2), -2, "must fit"),
        (torch.tensor([0, 0]), torch.ones(2, 3), -2, "must have 3 dimensions"),
    ],
)
def test_scatter_update_refuses(indices: Tensor, updates: Tensor, axis: int, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        npu.scatter_update(torch.zeros(2, 4, 3), indices, updates, axis)


def test_npu_scatter_is_the_document_s_example() -> None:
    given = torch.tensor([[1.6279, 0.1226], [0.9041, 1.0980]])
    result = check_kernel("npu::npu_scatter", given, torch.tensor([0, 1], dtype=torch.int32), torch.tensor([-1.1993, -1.5247]), 0)
    assert torch.equal(result, torch.tensor([[-1.1993, 0.1226], [0.9041, -1.5247]]))
    assert torch.equal(npu.npu_scatter(given, torch.tensor([], dtype=torch.int32), torch.tensor([]), 0), given)
    with pytest.raises(EmulationError, match="indices must have shape"):
        npu.npu_scatter(given, torch.tensor([0]), torch.tensor([1.0]), 0)


# -------------------------------------------------------------------- paged caches


def paged(size: int, mode: str | None, dtype: torch.dtype = torch.float16) -> Tensor:
    c0 = 32 // dtype.itemsize
    shape = (BLOCKS, HEADS * size // c0, PAGE, c0) if mode == "PA_NZ" else (BLOCKS, PAGE, HEADS, size)
    return torch.randn(shape).to(dtype)


def written(cache: Tensor, rows: Tensor, slots: Tensor, mode: str | None) -> Tensor:
    """The cache after a loop over the tokens."""
    cache = cache.clone()
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot < 0:
            continue
        if mode == "PA_NZ":
            for i, part in enumerate(row.reshape(-1, cache.shape[-1])):
                cache[slot // PAGE, i, slot % PAGE] = part
        else:
            cache[slot // PAGE, slot % PAGE] = row
    return cache


@pytest.mark.parametrize("functional", [False, True], ids=["in_place", "functional"])
@pytest.mark.parametrize("sizes", [(32, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("mode", [None, "Norm", "PA_NZ"])
def test_scatter_pa_kv_cache(mode: str | None, sizes: tuple[int, int], functional: bool) -> None:
    slots = torch.tensor([7, -1, 0, 11], dtype=torch.int32)
    key, value = (torch.randn(4, HEADS, size, dtype=torch.float16) for size in sizes)
    caches = [paged(size, mode) for size in sizes]
    expected = [written(cache, rows, slots, mode) for cache, rows in zip(caches, (key, value), strict=True)]
    given = [cache.clone() for cache in caches]
    name = f"npu::npu_scatter_pa_kv_cache{'_functional' if functional else ''}"
    result = check_kernel(name, key, value, *given, slots, cache_mode=mode)
    for actual, untouched, wanted, before in zip(result if functional else given, given, expected, caches, strict=True):
        assert torch.equal(actual, wanted)
        assert torch.equal(untouched, before if functional else wanted)


def test_scatter_pa_kv_cache_of_int8_has_other_fractals() -> None:
    slots = torch.tensor([5])
    key = torch.randint(-9, 9, (1, HEADS, 32), dtype=torch.int8)
    cache = paged(32, "PA_NZ", torch.int8)
    npu.npu_scatter_pa_kv_cache(key, key, cache, other := cache.clone(), slots)
    assert torch.equal(cache[1, :, 1].reshape(-1), key.reshape(-1))
    assert torch.equal(cache, other)


def test_scatter_pa_cache() -> None:
    key, slots, cache = torch.randn(3, HEADS, 4), torch.tensor([1, 6, 9], dtype=torch.int32), torch.zeros(BLOCKS, PAGE, HEADS, 4)
    result = check_kernel("npu::npu_scatter_pa_cache.value", key, slots, key_cache=cache)
    assert torch.equal(cache.flatten(0, 1)[slots.long()], key)
    assert result.data_ptr() == cache.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_lens": torch.ones(1)}, "compress_lens"),
        ({"compress_seq_offsets": torch.ones(1)}, "compress_seq_offsets"),
        ({"seq_lens": torch.ones(1)}, "seq_lens"),
        ({"cache_mode": "PA"}, "cache_mode"),
        ({"slot_mapping": torch.tensor([12], dtype=torch.int32)}, "beyond the cache"),
        ({"slot_mapping": torch.tensor([1, 2], dtype=torch.int32)}, "slot_mapping must have shape"),
        ({"value": torch.zeros(1, HEADS, 32)}, "dtypes must be equal"),
        ({"key": torch.zeros(1, 1, HEADS, 32, dtype=torch.float16)}, "key must have 3 dimensions"),
        ({"key_cache": torch.zeros(BLOCKS, PAGE, 32, HEADS, dtype=torch.float16).transpose(2, 3)}, "contiguous"),
    ],
)
def test_scatter_pa_kv_cache_refuses(change: dict[str, Any], message: str) -> None:
    rows, cache = torch.zeros(1, HEADS, 32, dtype=torch.float16), torch.zeros(BLOCKS, PAGE, HEADS, 32, dtype=torch.float16)
    arguments = {"key": rows, "value": rows, "key_cache": cache, "value_cache": cache.clone(), "cache_mode": "Norm"}
    arguments["slot_mapping"] = torch.tensor([1], dtype=torch.int32)
    with pytest.raises(EmulationError, match=message):
        npu.npu_scatter_pa_kv_cache(**{**arguments, **change})
