"""Cache writes on Ascend: which op takes which write, why another does not, and that every cache holds what eager wrote."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import npu_fusion
from npu_fusion.record import Site

PAIR, SINGLE = "npu.npu_scatter_pa_kv_cache", "npu.npu_scatter_nd_update_"
BATCH, HEADS, LENGTH, SIZE = 2, 2, 8, 16
HALF = torch.float16


class Written:
    """A step function compiled for ascend910b on CPU tensors, run three times beside eager on inputs and caches of its own."""

    def __init__(self, step: Callable[..., Any], *args: Any, dynamic: bool | None = False, **options: Any) -> None:
        torch.compiler.reset()
        compiled = torch.compile(step, backend="npu_fusion", dynamic=dynamic, fullgraph=True, options={"emulate": True, **options})
        mine, theirs = copy.deepcopy(args), copy.deepcopy(args)
        with torch.no_grad():
            for _ in range(3):
                for actual, expected in zip(pytree.tree_leaves((compiled(*mine), mine)), pytree.tree_leaves((step(*theirs), theirs))):
                    assert torch.equal(actual, expected) if isinstance(actual, Tensor) else actual == expected
        self.report = npu_fusion.report(compiled)
        assert not self.report.rule_errors, self.report.rule_errors

    @property
    def sites(self) -> list[Site]:
        return [site for site in self.report.sites if site.idiom == "kv_update"]

    @property
    def ops(self) -> list[str | None]:
        return [site.lowered_to for site in self.sites]

    @property
    def reasons(self) -> str:
        return "; ".join(site.reason or "" for site in self.sites)

    def calls(self, op: str) -> int:
        """How often the lowered graph calls an op."""
        return self.report.graph("lowered").code.count(f"ops.{op}.")


def caches(dtype: torch.dtype = HALF, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, HEADS, LENGTH, SIZE).to(dtype), torch.randn(batch, HEADS, LENGTH, SIZE).to(dtype)


def rows(count: int = 1, dtype: torch.dtype = HALF, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, HEADS, count, SIZE).to(dtype), torch.randn(batch, HEADS, count, SIZE).to(dtype)


def static_step(k_cache: Tensor, v_cache: Tensor, seen: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As transformers' static cache: a counter of the layer, positions from it on."""
    positions = torch.arange(k.shape[2]) + seen
    seen.add_(k.shape[2])
    k_cache.index_copy_(2, positions, k)
    v_cache.index_copy_(2, positions, v)
    return k_cache.sum(-1) + v_cache.sum(-1)


# -------------------------------------------------------------------- caches of fixed length


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
def test_static_cache_is_one_write_and_one_addition(dtype: torch.dtype, count: int, batch: int) -> None:
    written = Written(static_step, *caches(dtype, batch), torch.tensor(1), *rows(count, dtype, batch))
    assert written.ops == [PAIR, PAIR]
    assert written.reasons == "; "
    assert written.calls(PAIR) == 1
    assert written.calls("aten.index_copy_") == 0
    # The slots, the write, the counter, and the three ops of the result.
    assert written.report.launches_after == 6


def test_float32_is_written_one_by_one() -> None:
    written = Written(static_step, *caches(torch.float32), torch.tensor(1), *rows(2, torch.float32))
    assert written.ops == [SINGLE, SINGLE]
    assert "key is float32, not float16 or bfloat16 or int8" in written.reasons
    assert written.calls(SINGLE) == 2


@pytest.mark.parametrize("positions", [torch.tensor([5]), torch.tensor([6, 2]), torch.tensor([6, 2], dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_positions_that_are_an_input(positions: Tensor, batch: int) -> None:
    def step(k_cache: Tensor, v_cache: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cache.index_copy_(2, positions.long(), k)
        v_cache.index_copy_(2, positions.long(), v)
        return k_cache + v_cache

    written = Written(step, *caches(batch=batch), positions, *rows(len(positions), batch=batch))
    assert written.ops == [PAIR, PAIR]


def test_all_layers_share_the_slots_of_shared_positions() -> None:
    def step(layers: list[tuple[Tensor, Tensor]], positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total = torch.zeros(())
        for k_cache, v_cache in layers:
            k_cache.index_copy_(2, positions, k)
            v_cache.index_copy_(2, positions, v)
            total = total + k_cache.sum() * v_cache.sum()
        return total

    written = Written(step, [caches(), caches(), caches()], torch.tensor([4]), *rows())
    assert written.ops == [PAIR] * 6
    calls = written.report.graph("lowered").graph.find_nodes(op="call_function", target=torch.ops.npu.npu_scatter_pa_kv_cache.default)
    assert len(calls) == 3
    assert len({call.args[4] for call in calls}) == 1


def test_a_cache_with_heads_inside() -> None:
    def step(k_cache: Tensor, v_cache: Tensor, seen: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(k.shape[1]) + seen
        k_cache.index_copy_(1, positions, k)
        v_cache[:, positions] = v
        return k_cache.sum() + v_cache.sum()

    k_cache, v_cache = torch.randn(2, BATCH, LENGTH, HEADS, SIZE).half()
    written = Written(step, k_cache.clone(), v_cache.clone(), torch.tensor(3), *torch.randn(2, BATCH, 2, HEADS, SIZE).half().unbind())
    assert written.ops == [SINGLE, SINGLE]
    assert "no second cache that is written at the same places" in written.reasons  # one of them may wrap


def test_dynamic_lengths() -> None:
    written = Written(static_step, *caches(), torch.tensor(0), *rows(2), dynamic=True)
    assert set(written.ops) <= {PAIR, SINGLE, "aten.index_copy_"}
    assert len(written.ops) == 2


def test_keys_and_values_of_different_width() -> None:
    def step(k_cache: Tensor, v_cache: Tensor, seen: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(1) + seen
        k_cache.index_copy_(2, positions, k)
        v_cache.index_copy_(2, positions, v)
        return k_cache.sum() + v_cache.sum()

    k_cache, v_cache = (torch.randn(BATCH, HEADS, LENGTH, size).half() for size in (24, 16))
    written = Written(step, k_cache, v_cache, torch.tensor(3), *(torch.randn(BATCH, HEADS, 1, size).half() for size in (24, 16)))
    assert written.ops == [PAIR, PAIR]


# -------------------------------------------------------------------- paged caches

BLOCKS, PAGE = 3, 4


def paged() -> tuple[Tensor, Tensor]:
    return torch.randn(BLOCKS, PAGE, HEADS, SIZE).half(), torch.randn(BLOCKS, PAGE, HEADS, SIZE).half()


def tokens(count: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(count, HEADS, SIZE).half(), torch.randn(count, HEADS, SIZE).half()


def flat_index_put(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    cache.view(-1, HEADS, SIZE)[slots] = x


def flat_index_copy(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    cache.view(-1, HEADS, SIZE).index_copy_(0, slots, x)


def block_and_place(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    cache[slots // PAGE, slots % PAGE] = x


def divided_otherwise(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    cache[torch.div(slots, PAGE, rounding_mode="floor"), torch.remainder(slots, PAGE)] = x


def pair_of_indices(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    cache[(slots + 0) // PAGE, (slots + 0) % PAGE] = x


@pytest.mark.parametrize("write", [flat_index_put, flat_index_copy, block_and_place, divided_otherwise, pair_of_indices])
def test_paged_cache(write: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    def step(k_cache: Tensor, v_cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> Tensor:
        write(k_cache, slots, k)
        write(v_cache, slots, v)
        return k_cache.sum(-1) + v_cache.sum(-1)

    written = Written(step, *paged(), torch.tensor([5, 0, 11]), *tokens())
    assert written.ops == [PAIR, PAIR]
    assert written.calls(PAIR) == 1


@pytest.mark.parametrize("write", [flat_index_put, block_and_place])
def test_negative_slots_count_from_the_end_as_in_eager(write: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    def step(k_cache: Tensor, v_cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> Tensor:
        write(k_cache, slots, k)
        write(v_cache, slots, v)
        return k_cache + v_cache

    assert Written(step, *paged(), torch.tensor([-1, 3, 2]), *tokens()).ops == [PAIR, PAIR]


def test_keys_and_values_in_one_tensor() -> None:
    def step(cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache[0].view(-1, HEADS, SIZE).index_copy_(0, slots, k)
        cache[1].view(-1, HEADS, SIZE).index_copy_(0, slots, v)
        return cache.sum(-1)

    written = Written(step, torch.randn(2, BLOCKS, PAGE, HEADS, SIZE).half(), torch.tensor([5, 0, 11]), *tokens())
    assert written.ops == [PAIR, PAIR]


def test_the_same_part_of_one_tensor_twice_stays_in_order() -> None:
    def step(cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache[0].view(-1, HEADS, SIZE).index_copy_(0, slots, k)
        cache[0].view(-1, HEADS, SIZE).index_copy_(0, slots, v)
        return cache.sum(-1)

    written = Written(step, torch.randn(2, BLOCKS, PAGE, HEADS, SIZE).half(), torch.tensor([5, 0, 11]), *tokens())
    assert PAIR not in written.ops


def test_a_batch_known_at_run_time_only() -> None:
    """There may be more rows than one op can number: ATen's op, which counts in 64 bits, stays, and no provider stumbles."""

    def step(k_cache: Tensor, v_cache: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k_cache.index_copy_(2, positions, k)
        v_cache.index_copy_(2, positions, v)
        return k_cache + 1, v_cache + 1

    inputs = (*caches(batch=3), torch.tensor([3]), *rows(batch=3))
    for tensor in (*inputs[:2], *inputs[3:]):
        torch._dynamo.mark_dynamic(tensor, 0)
    written = Written(step, *inputs, dynamic=None)
    assert written.ops == ["aten.index_copy_"] * 2
    assert "not known to have at most" in written.reasons


# -------------------------------------------------------------------- what stays or is written apart


def test_a_read_between_two_writes_keeps_them_apart() -> None:
    def step(k_cache: Tensor, v_cache: Tensor, positions: Tensor, k: Tensor) -> Tensor:
        k_cache.index_copy_(2, positions, k)
        v_cache.index_copy_(2, positions, k_cache.sum((0, 1, 2), keepdim=True).expand(BATCH, HEADS, 1, SIZE))
        return v_cache + 1

    written = Written(step, *caches(), torch.tensor([3]), rows()[0])
    assert written.ops == [SINGLE, SINGLE]
    assert "no second cache" in written.reasons


def test_two_writes_into_one_cache_stay_in_order() -> None:
    def step(cache: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.index_copy_(2, positions, k)
        cache.index_copy_(2, positions, v)
        return cache + 1

    written = Written(step, caches()[0], torch.tensor([3]), *rows())
    assert written.ops == [SINGLE, SINGLE]


def masked(cache: Tensor, position: Tensor, x: Tensor) -> None:
    cache[torch.arange(BATCH) < position] = x[:1].expand(1, HEADS, LENGTH, SIZE)


def broadcast(cache: Tensor, position: Tensor, x: Tensor) -> None:
    cache[position] = x[0, 0, 0]


def accumulated(cache: Tensor, position: Tensor, x: Tensor) -> None:
    cache.index_put_((position,), x[:1].expand(1, HEADS, LENGTH, SIZE), accumulate=True)


def apart(cache: Tensor, position: Tensor, x: Tensor) -> None:
    cache.view(BATCH, HEADS, LENGTH // 2, 2 * SIZE)[position, :, position] = x[:1, :, 0].repeat(1, 1, 2)


def in_pieces(cache: Tensor, position: Tensor, x: Tensor) -> None:
    cache[position, :, position] = x[:1, :, 0]


STAYS = {
    masked: "the index is a mask",
    broadcast: "what is written is broadcast",
    accumulated: "it adds to what is there",
    apart: "do not lie side by side",
    in_pieces: "the rows of the cache lie in pieces",
}


@pytest.mark.parametrize("write", STAYS)
def test_what_is_no_write_of_whole_rows_stays(write: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    def step(cache: Tensor, positions: Tensor, x: Tensor) -> Tensor:
        write(cache, positions, x)
        return cache + 1

    written = Written(step, caches()[0], torch.tensor([1]), rows()[0])
    assert not {PAIR, SINGLE} & set(written.ops)
    assert STAYS[write] in written.reasons


def test_a_slice_is_written_by_a_copy() -> None:
    def step(cache: Tensor, x: Tensor) -> Tensor:
        cache[:, :, 2:3] = x
        return cache + 1

    assert Written(step, caches()[0], rows()[0]).ops == ["aten.copy_"]


def test_other_targets_keep_their_ops() -> None:
    written = Written(static_step, *caches(), torch.tensor(1), *rows(), emulate=False, target="cpu")
    assert written.ops == ["aten.index_copy_", "aten.index_copy_"]
