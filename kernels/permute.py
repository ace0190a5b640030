"""Rows sorted by expert, and back: MoE permutation and its weighted inverse.

Sorting is by counting, without a cumulative sum, a histogram or an atomic: how many ids are equal to, or at most, an expert is a sum of
comparisons. Flat id i = row * K + j goes to place

    base of its expert + ids of that expert in chunks before its own + those before it in its own chunk

so that the order is stable and the same in every call. A few ids are placed by the programs that copy the rows; many take three launches:
counts of chunks, places, copies. Ids outside of [first, first + EXPERTS) have no place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Device, Launch, dividing_block, power_of_2, vector_grid
from .numeric import dtype_of, rounded

FEW_IDS = 1024
"""Up to so many ids each program looks at them all."""


_CLEARED: tl.constexpr = tl.constexpr(256)  # sources that are cleared at a time


@triton.jit
def _experts(ids, first, EXPERTS: tl.constexpr):
    """Ids as numbers from 0 to EXPERTS, which stands for all that have no place."""
    local = ids.to(tl.int32) - first
    return tl.where((local >= 0) & (local < EXPERTS), local, EXPERTS)


@triton.jit
def _load_experts(ids_ptr, at, count, first, EXPERTS: tl.constexpr):
    return tl.where(at < count, _experts(tl.load(ids_ptr + at, mask=at < count, other=0), first, EXPERTS), EXPERTS)


@triton.jit
def _limited(rank, expert, out_rows, capacity, EXPERTS: tl.constexpr, BY_CAPACITY: tl.constexpr):
    """The place of the id that is the `rank`-th of all, or with BY_CAPACITY of its expert; -1 where there is none."""
    if BY_CAPACITY:
        place = tl.where(rank < capacity, expert * capacity + rank, -1)
    else:
        place = tl.where(rank < out_rows, rank, -1)
    return tl.where(expert < EXPERTS, place, -1)


@triton.jit
def _store_groups(
    groups_ptr, expert, equal, upto, out_rows, capacity, EXPERTS: tl.constexpr, BY_CAPACITY: tl.constexpr, SUMS: tl.constexpr
):
    """Rows that have a place, an expert or up to it, from the number of its ids and of those up to it."""
    if BY_CAPACITY:
        group = tl.minimum(equal, capacity)
    else:
        group = tl.minimum(upto, out_rows)
        if not SUMS:
            group = group - tl.minimum(upto - equal, out_rows)
    tl.store(groups_ptr + expert, group.to(groups_ptr.dtype.element_ty), mask=expert < EXPERTS)


@triton.jit
def _copy_row(x_ptr, y_ptr, x_stride, source, target, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row, as it is."""
    x_row = x_ptr + source.to(tl.int64) * x_stride
    y_row = y_ptr + target.to(tl.int64) * WIDTH
    for column in range(0, WIDTH, BLOCK):
        at = column + tl.arange(0, BLOCK)
        if WIDTH % BLOCK == 0:
            tl.store(y_row + at, tl.load(x_row + at))
        else:
            tl.store(y_row + at, tl.load(x_row + at, mask=at < WIDTH), mask=at < WIDTH)


@triton.jit
def _zero_row(y_ptr, target, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.cast(target, tl.int32)  # in the interpreter a loop's variable is no tensor
    zeros = tl.zeros((BLOCK,), dtype=y_ptr.dtype.element_ty)
    for column in range(0, WIDTH, BLOCK):
        at = column + tl.arange(0, BLOCK)
        tl.store(y_ptr + row.to(tl.int64) * WIDTH + at, zeros, mask=at < WIDTH)


@triton.jit
def _clear_row(y_ptr, y_scales_ptr, source_ptr, target, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr):
    """Row `target` has no source: it gets zeros, or stays as it is."""
    tl.store(source_ptr + target, -1)
    if ZERO:
        if y_scales_ptr is not None:
            tl.store(y_scales_ptr + target, 0.0)
        _zero_row(y_ptr, target, WIDTH, BLOCK)


@triton.jit
def _clear_rows_from(filled, y_ptr, y_scales_ptr, source_ptr, out_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr):
    """Rows from `filled` on have no source, as in `_clear_row`; all programs share them."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    for start in range(filled + pid * _CLEARED, out_rows, programs * _CLEARED):
        at = start + tl.arange(0, _CLEARED)
        tl.store(source_ptr + at, tl.full((_CLEARED,), -1, tl.int32), mask=at < out_rows)
        if ZERO and y_scales_ptr is not None:
            tl.store(y_scales_ptr + at, tl.zeros((_CLEARED,), tl.float32), mask=at < out_rows)
    if ZERO:
        for target in range(filled + pid, out_rows, programs):
            _zero_row(y_ptr, target, WIDTH, BLOCK)


@triton.jit
def permute_few_kernel(
    x_ptr,
    scales_ptr,
    ids_ptr,
    y_ptr,
    y_scales_ptr,
    places_ptr,
    source_ptr,
    groups_ptr,
    count,
    first,
    x_stride,
    out_rows,
    capacity,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BY_CAPACITY: tl.constexpr,
    SUMS: tl.constexpr,
    ZERO: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """All of a permutation of at most IDS ids: each program compares its own ids with all, and copies their rows.

    places [count], source [out_rows], groups [EXPERTS]; see `moe_permute` in lowerings/triton/permute.py.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    at = tl.arange(0, IDS)
    experts = _load_experts(ids_ptr, at, count, first, EXPERTS)
    for i in range(pid, count, programs):
        row = i // K
        expert = _experts(tl.load(ids_ptr + i), first, EXPERTS)
        rank = tl.sum(((experts == expert) & (at < i)).to(tl.int32), axis=0)
        if not BY_CAPACITY:
            rank += tl.sum((experts < expert).to(tl.int32), axis=0)
        place = _limited(rank, expert, out_rows, capacity, EXPERTS, BY_CAPACITY)
        tl.store(places_ptr + i, place)
        if place >= 0:
            tl.store(source_ptr + place, i)
            if scales_ptr is not None:
                tl.store(y_scales_ptr + place, tl.load(scales_ptr + row))
            _copy_row(x_ptr, y_ptr, x_stride, row, place, WIDTH, BLOCK)
    # The last programs have the fewest ids.
    for group in range(programs - 1 - pid, tl.cdiv(EXPERTS, GROUP), programs):
        expert = group * GROUP + tl.arange(0, GROUP)
        equal = tl.sum((experts[None, :] == expert[:, None]).to(tl.int32), axis=1)
        upto = tl.sum((experts[None, :] <= expert[:, None]).to(tl.int32), axis=1)
        _store_groups(groups_ptr, expert, equal, upto, out_rows, capacity, EXPERTS, BY_CAPACITY, SUMS)
    if BY_CAPACITY:
        for target in range(pid, out_rows, programs):
            filled = tl.sum((experts == target // capacity).to(tl.int32), axis=0)
            if target % capacity >= filled:
                _clear_row(y_ptr, y_scales_ptr, source_ptr, target, WIDTH, BLOCK, ZERO)
    else:
        filled = tl.sum((experts < EXPERTS).to(tl.int32), axis=0)
        _clear_rows_from(filled, y_ptr, y_scales_ptr, source_ptr, out_rows, WIDTH, BLOCK, ZERO)


@triton.jit
def expert_counts_kernel(
    ids_ptr,
    counts_ptr,
    count,
    first,
    EXPERTS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts [chunks, 2, LANES]: how many ids of a chunk are each expert, and how many are at most it."""
    lane = tl.arange(0, LANES)
    for chunk in range(tl.program_id(0), tl.cdiv(count, CHUNK), tl.num_programs(0)):
        equal = tl.zeros((LANES,), dtype=tl.int32)
        upto = tl.zeros((LANES,), dtype=tl.int32)
        for start in range(0, CHUNK, BLOCK):
            experts = _load_experts(ids_ptr, chunk * CHUNK + start + tl.arange(0, BLOCK), count, first, EXPERTS)
            equal += tl.sum((experts[:, None] == lane[None, :]).to(tl.int32), axis=0)
            upto += tl.sum((experts[:, None] <= lane[None, :]).to(tl.int32), axis=0)
        at = counts_ptr + chunk * (2 * LANES) + lane
        tl.store(at, equal)
        tl.store(at + LANES, upto)


@triton.jit
def expert_places_kernel(
    ids_ptr,
    counts_ptr,
    places_ptr,
    ends_ptr,
    groups_ptr,
    count,
    first,
    out_rows,
    capacity,
    EXPERTS: tl.constexpr,
    BY_CAPACITY: tl.constexpr,
    SUMS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """places [count] of ids; ends [LANES], where an expert's rows end; groups [EXPERTS]. Counts are read CHUNKS chunks at a time."""
    lane = tl.arange(0, LANES)
    chunks = tl.cdiv(count, CHUNK)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        before = tl.zeros((LANES,), dtype=tl.int32)
        equal = tl.zeros((LANES,), dtype=tl.int32)
        upto = tl.zeros((LANES,), dtype=tl.int32)
        for start in range(0, chunks, CHUNKS):
            other = start + tl.arange(0, CHUNKS)[:, None]
            at = counts_ptr + other * (2 * LANES) + lane[None, :]
            counted = tl.load(at, mask=other < chunks, other=0)
            equal += tl.sum(counted, axis=0)
            before += tl.sum(tl.where(other < chunk, counted, 0), axis=0)
            upto += tl.sum(tl.load(at + LANES, mask=other < chunks, other=0), axis=0)
        for start in range(0, CHUNK, BLOCK):
            at = chunk * CHUNK + start + tl.arange(0, BLOCK)
            experts = _load_experts(ids_ptr, at, count, first, EXPERTS)
            rank = tl.zeros((BLOCK,), dtype=tl.int32)
            for other_start in range(0, start + BLOCK, BLOCK):
                at_other = chunk * CHUNK + other_start + tl.arange(0, BLOCK)
                others = _load_experts(ids_ptr, at_other, count, first, EXPERTS)
                same = (experts[:, None] == others[None, :]) & (at_other[None, :] < at[:, None])
                rank += tl.sum(same.to(tl.int32), axis=1)
            # Of an expert of its own a segment begins at a known place.
            base = before if BY_CAPACITY else before + upto - equal
            own = experts[:, None] == lane[None, :]
            rank += tl.sum(tl.where(own, base[None, :], 0), axis=1)
            place = _limited(rank, experts, out_rows, capacity, EXPERTS, BY_CAPACITY)
            tl.store(places_ptr + at, place, mask=at < count)
        if chunk == 0:
            _store_groups(groups_ptr, lane, equal, upto, out_rows, capacity, EXPERTS, BY_CAPACITY, SUMS)
            if BY_CAPACITY:
                tl.store(ends_ptr + lane, lane * capacity + tl.minimum(equal, capacity))
            else:
                tl.store(ends_ptr + lane, upto)


@triton.jit
def permute_rows_kernel(
    x_ptr,
    scales_ptr,
    places_ptr,
    ends_ptr,
    y_ptr,
    y_scales_ptr,
    source_ptr,
    rows,
    x_stride,
    out_rows,
    capacity,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BY_CAPACITY: tl.constexpr,
    ZERO: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row of x, read once, to its K places; source [out_rows], the ids that the rows are of."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    for item in range(pid, rows, programs):
        row = tl.cast(item, tl.int32)
        for column in range(0, WIDTH, BLOCK):
            at = column + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row.to(tl.int64) * x_stride + at, mask=at < WIDTH)
            for j in range(K):
                place = tl.load(places_ptr + row * K + j)
                if place >= 0:
                    tl.store(y_ptr + place.to(tl.int64) * WIDTH + at, x, mask=at < WIDTH)
        for j in range(K):
            place = tl.load(places_ptr + row * K + j)
            if place >= 0:
                tl.store(source_ptr + place, row * K + j)
                if scales_ptr is not None:
                    tl.store(y_scales_ptr + place, tl.load(scales_ptr + row))
    if BY_CAPACITY:
        for target in range(pid, out_rows, programs):
            if target >= tl.load(ends_ptr + target // capacity):
                _clear_row(y_ptr, y_scales_ptr, source_ptr, target, WIDTH, BLOCK, ZERO)
    else:
        _clear_rows_from(tl.load(ends_ptr + EXPERTS - 1), y_ptr, y_scales_ptr, source_ptr, out_rows, WIDTH, BLOCK, ZERO)


@triton.jit
def _weighted_row(x_ptr, bias_ptr, weight_ptr, id_ptr, place, x_stride, j, at, ROUND: tl.constexpr, WIDTH: tl.constexpr):
    """weight[j] * (x[place] + bias[id[j]]) at some columns, rounded to ROUND."""
    mask = at < WIDTH
    x = tl.load(x_ptr + place.to(tl.int64) * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        expert = tl.load(id_ptr + j).to(tl.int64)
        x += tl.load(bias_ptr + expert * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        x = rounded(x * tl.load(weight_ptr + j).to(tl.float32), ROUND)
    return x


@triton.jit
def unpermute_kernel(
    x_ptr,
    places_ptr,
    weights_ptr,
    bias_ptr,
    ids_ptr,
    residual_ptr,
    residual2_ptr,
    y_ptr,
    rows,
    x_stride,
    places_stride,
    places_step,
    weights_stride,
    ids_stride,
    residual_stride,
    residual2_stride,
    scale,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    ROUND: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[r] = scale * sum over j of weight[r, j] * (x[place[r, j]] + bias[id[r, j]]) + residual[r] + residual2[r].

    A place below 0 adds nothing. Products are rounded to ROUND.
    """
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    for tile in range(tl.program_id(0), rows * BLOCKS, tl.num_programs(0)):
        row = tile // BLOCKS
        at = (tile % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        mask = at < WIDTH
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        place_ptr = places_ptr + row.to(tl.int64) * places_stride
        weight_ptr = weights_ptr
        if weights_ptr is not None:
            weight_ptr += row.to(tl.int64) * weights_stride
        id_ptr = ids_ptr
        if bias_ptr is not None:
            id_ptr += row.to(tl.int64) * ids_stride
        if UNROLL:
            for j in tl.static_range(K):
                place = tl.load(place_ptr + j * places_step)
                if place >= 0:
                    total += _weighted_row(x_ptr, bias_ptr, weight_ptr, id_ptr, place, x_stride, j, at, ROUND, WIDTH)
        else:
            for j in range(K):
                place = tl.load(place_ptr + j * places_step)
                if place >= 0:
                    total += _weighted_row(x_ptr, bias_ptr, weight_ptr, id_ptr, place, x_stride, j, at, ROUND, WIDTH)
        total = total * scale
        if residual_ptr is not None:
            total += tl.load(residual_ptr + row.to(tl.int64) * residual_stride + at, mask=mask, other=0.0).to(tl.float32)
        if residual2_ptr is not None:
            total += tl.load(residual2_ptr + row.to(tl.int64) * residual2_stride + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row.to(tl.int64) * WIDTH + at, total.to(y_ptr.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------- plans


def _row_block(width: int, size: int, device: Device) -> tuple[int, dict[str, int]]:
    """The block in which rows of `width` elements of `size` bytes are copied, and the compiler's options."""
    if device.kind == "npu":
        return min(power_of_2(width), 32768 // size), {}
    block = min(power_of_2(width), 65536 // size)
    return block, {"num_warps": min(max(block * size // 2048, 1), 16)}


def permute_few_launch(
    ids: int,
    k: int,
    experts: int,
    width: int,
    device: Device,
    *,
    size: int,
    by_capacity: bool = False,
    sums: bool = False,
    zero: bool = True,
) -> Launch:
    """`permute_few_kernel` for `ids` (at most FEW_IDS) ids, k a row.

    Args:
        width, size: elements of a row, and bytes of one.
        by_capacity: whether every expert has a segment of its own of equal length.
        sums: whether groups are cumulative.
        zero: whether rows without a source get zeros.
    """
    block, options = _row_block(width, size, device)
    lanes = power_of_2(ids)
    group = max(1, min(power_of_2(experts), 2048 // lanes, 64))
    constants = {
        "K": k,
        "EXPERTS": experts,
        "BY_CAPACITY": by_capacity,
        "SUMS": sums,
        "ZERO": zero,
        "WIDTH": width,
        "BLOCK": block,
        "IDS": lanes,
        "GROUP": group,
    }
    return Launch(permute_few_kernel, vector_grid(max(ids, -(-experts // group)), device), constants, options)


def chunks_of(ids: int, device: Device) -> tuple[int, int]:
    """How many chunks of ids there are, and of how many ids each."""
    chunk = 256 if ids <= 65536 else 1024
    return -(-ids // chunk), chunk


def count_lanes(experts: int) -> int:
    """Experts in a row of the counts of `expert_counts_kernel`."""
    return power_of_2(experts)


def expert_counts_launch(ids: int, experts: int, device: Device) -> Launch:
    """`expert_counts_kernel` for `ids` ids."""
    chunks, chunk = chunks_of(ids, device)
    lanes = count_lanes(experts)
    constants = {"EXPERTS": experts, "LANES": lanes, "CHUNK": chunk, "BLOCK": _id_block(lanes, device)}
    return Launch(expert_counts_kernel, vector_grid(chunks, device), constants, {} if device.kind == "npu" else {"num_warps": 4})


def _id_block(lanes: int, device: Device) -> int:
    """How many ids are compared with `lanes` experts at a time."""
    return max(8, min(2048 // lanes, 32)) if device.kind == "npu" else max(8, min(8192 // lanes, 128))


def expert_places_launch(ids: int, experts: int, device: Device, *, by_capacity: bool = False, sums: bool = False) -> Launch:
    """`expert_places_kernel` for `ids` ids; the rest as in `permute_few_launch`."""
    chunks, chunk = chunks_of(ids, device)
    lanes = count_lanes(experts)
    constants = {
        "EXPERTS": experts,
        "BY_CAPACITY": by_capacity,
        "SUMS": sums,
        "LANES": lanes,
        "CHUNK": chunk,
        "BLOCK": _id_block(lanes, device),
        "CHUNKS": max(1, min((1024 if device.kind == "npu" else 4096) // lanes, power_of_2(chunks))),
    }
    return Launch(expert_places_kernel, vector_grid(chunks, device), constants, {} if device.kind == "npu" else {"num_warps": 4})


def permute_rows_launch(
    rows: int, k: int, experts: int, width: int, device: Device, *, size: int, by_capacity: bool = False, zero: bool = True
) -> Launch:
    """`permute_rows_kernel` for [rows, width]; the rest as in `permute_few_launch`."""
    block, options = _row_block(width, size, device)
    constants = {"K": k, "EXPERTS": experts, "BY_CAPACITY": by_capacity, "ZERO": zero, "WIDTH": width, "BLOCK": block}
    return Launch(permute_rows_kernel, vector_grid(rows, device), constants, options)


def unpermute_launch(rows: int, k: int, width: int, device: Device, *, round_to: str | None = None) -> Launch:
    """`unpermute_kernel` for [rows, width]; `round_to` is the dtype to which products are rounded."""
    if device.kind == "npu":
        block, options = (dividing_block(width, 1024, 4096) if width > 1024 else power_of_2(width)), {}
    else:  # a row of each expert is in flight at once
        block = dividing_block(width, 512, 1024) if width > 512 else power_of_2(width)
        options = {"num_warps": max(1, block // 256)}
    constants = {"K": k, "UNROLL": device.kind != "npu", "ROUND": dtype_of(round_to), "WIDTH": width, "BLOCK": block}
    return Launch(unpermute_kernel, vector_grid(rows * -(-width // block), device), constants, options)
