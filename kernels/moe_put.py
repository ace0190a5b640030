"""Puts of rows into the memory of other GPUs of one host, with flags, for MoE dispatch and combine. NVIDIA only: plain loads and stores
through peer pointers, no multicast.

A channel is a symmetric buffer (the same layout on each rank) of two halves that calls take in turn, each with R blocks of M rows, and
R flags for each half at its end. A call is a put of rows, then a kernel that raises this rank's flag on every peer and waits for theirs:
the launch boundary in between orders all rows of the put before the flags. A flag is the call's number (its epoch), which a rank counts
in its own memory, in the upper 32 bits, and the number of rows put in the lower: nothing is ever reset, and replays count on.

Two halves are enough: a rank writes a half again two calls later, after it has seen all flags of the call in between, which a peer raises
after it has read the half (a stream runs one kernel after another).

`state` [2] int32 lies in the device's memory: the number of calls, and a count of programs that are done. A wait ends after `limit`
nanoseconds: then `broken` [1] int32, which all channels of a group share, becomes 1, and the number of the late rank, plus 1, goes to
`status`, which lies in pinned memory of the host, so that the host reads it without waiting for the device. From then on no call waits, and
results are NaN or absent: never stale rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import Device, Launch, dividing_block, power_of_2

_TOKENS_AT_ONCE = 1024


@triton.jit
def _now():
    """Nanoseconds."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _row(peers_ptr, rank, offset, ELEMENT: tl.constexpr):
    """Pointer to byte `offset` of the channel's buffer on a rank: a multiple of 16, so that 16 bytes are moved at a time."""
    return tl.multiple_of((tl.load(peers_ptr + rank) + offset).to(tl.pointer_type(ELEMENT)), 16)


@triton.jit
def _flag(peers_ptr, rank, half, source, FLAGS: tl.constexpr, RANKS: tl.constexpr):
    return (tl.load(peers_ptr + rank) + FLAGS + (half * RANKS + source) * 8).to(tl.pointer_type(tl.int64))


@triton.jit
def _wait(peers_ptr, broken_ptr, status_ptr, epoch, source, me, limit, FLAGS: tl.constexpr, RANKS: tl.constexpr):
    """The number of rows that `source` put in this call; -1 if it did not come in time, now or earlier."""
    flag = _flag(peers_ptr, me, epoch & 1, source, FLAGS, RANKS)
    broken = tl.load(broken_ptr, volatile=True) != 0
    start = _now()
    value = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    late = broken
    while ((value >> 32) != epoch) & (not late):
        value = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        late = _now() - start > limit
    arrived = (value >> 32) == epoch
    if not arrived:
        if not broken:
            tl.store(broken_ptr, 1)
            tl.store(status_ptr, source + 1)
    return tl.where(arrived & (not broken), (value & 0xFFFFFFFF).to(tl.int32), -1)


@triton.jit
def _finish(state_ptr, epoch):
    """Count this program; the last of the launch counts the call."""
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.atomic_xchg(state_ptr + 1, 0)
        tl.atomic_xchg(state_ptr, epoch)


@triton.jit
def route_kernel(
    ids_ptr, route_ptr, counts_ptr, tokens, max_tokens,
    LOCAL: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`plan.route` [T, K] int32 of ids [T, K]: program r < R for destination r, also how many rows go there; program R for the choices
    without a row. An id outside [0, EXPERTS) chooses nothing."""
    rank = tl.program_id(0)
    RANKS: tl.constexpr = EXPERTS // LOCAL
    lane = tl.arange(0, LANES)
    found = 0
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        at = token[:, None] * K + lane[None, :]
        inside = (token[:, None] < tokens) & (lane[None, :] < K)
        chosen = tl.load(ids_ptr + at, mask=inside, other=-1).to(tl.int32)
        target = tl.where((chosen >= 0) & (chosen < EXPERTS), chosen // LOCAL, -1)
        if rank < RANKS:
            first = tl.min(tl.where(target == rank, lane[None, :], LANES), axis=1)
            needs = (first < LANES).to(tl.int32)
            row = rank * max_tokens + found + tl.cumsum(needs, axis=0) - 1
            tl.store(route_ptr + token * K + first, row, mask=needs != 0)
            found += tl.sum(needs, axis=0)
        else:
            without = target < 0
            for k in tl.static_range(K):
                other = tl.load(ids_ptr + token * K + k, mask=token < tokens, other=-1).to(tl.int32)
                other = tl.where((other >= 0) & (other < EXPERTS), other // LOCAL, -1)
                without = without | ((other[:, None] == target) & (lane[None, :] > k))
            tl.store(route_ptr + at, tl.full((BLOCK, LANES), -1, tl.int32), mask=inside & without)
    if rank < RANKS:
        tl.store(counts_ptr + rank, found)


@triton.jit
def _copy_words(source_ptr, target_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """WORDS int32 words, a multiple of 4."""
    for start in tl.static_range(0, WORDS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if start + BLOCK <= WORDS:
            tl.store(target_ptr + at, tl.load(source_ptr + at))
        else:
            tl.store(target_ptr + at, tl.load(source_ptr + at, mask=at < WORDS), mask=at < WORDS)


@triton.jit
def put_kernel(
    payload_ptr, ids_ptr, weights_ptr, scales_ptr, route_ptr, peers_ptr, state_ptr, max_tokens, me,
    K: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr, META: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put each token's row of WORDS int32 words where its route says; a program for each choice [T, K].

    With ids [T, K] the row is followed by META words: the ids, the weights as fp32, the scale (1 where there are none).
    """
    choice = tl.program_id(0)
    row = tl.load(route_ptr + choice)
    if row >= 0:
        ROW: tl.constexpr = WORDS + META
        token = (choice // K).to(tl.int64)
        half = (tl.load(state_ptr) + 1) & 1
        rank = row // max_tokens
        there = ((half * RANKS + me).to(tl.int64) * max_tokens + row % max_tokens) * (ROW * 4)
        target = _row(peers_ptr, rank, there, tl.int32)
        _copy_words(payload_ptr + token * WORDS, target, WORDS, BLOCK)
        if ids_ptr is not None:
            lane = tl.arange(0, LANES)
            tl.store(target + WORDS + lane, tl.load(ids_ptr + token * K + lane, mask=lane < K).to(tl.int32), mask=lane < K)
            weight = tl.load(weights_ptr + token * K + lane, mask=lane < K).to(tl.float32)
            tl.store(target + WORDS + K + lane, weight.to(tl.int32, bitcast=True), mask=lane < K)
            scale = 1.0
            if scales_ptr is not None:
                scale = tl.load(scales_ptr + token)
            tl.store((target + WORDS + 2 * K).to(tl.pointer_type(tl.float32)), scale)


@triton.jit
def arrive_kernel(
    counts_ptr, ids_ptr, weights_ptr, scales_ptr, came_ptr, peers_ptr, state_ptr, broken_ptr, status_ptr, max_tokens, me, limit,
    K: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr, META: tl.constexpr, LANES: tl.constexpr, FLAGS: tl.constexpr,
    ROWS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Raise the flags, wait for those of the peers, and take ids [R * M, K] (-1 in a row that did not come), weights and scales of rows.

    Programs: TURNS a rank, of which each takes tiles of ROWS rows in turn; the first R programs raise the flags. `came` [R] gets the
    numbers of rows, and `came[R]` the half that they are in.
    """
    pid = tl.program_id(0)
    epoch = tl.load(state_ptr) + 1
    half = (epoch & 1).to(tl.int64)
    source = pid % RANKS
    if pid < RANKS:
        value = (epoch.to(tl.int64) << 32) | tl.load(counts_ptr + source).to(tl.int64)
        tl.atomic_xchg(_flag(peers_ptr, source, epoch & 1, me, FLAGS, RANKS), value, sem="release", scope="sys")
    count = _wait(peers_ptr, broken_ptr, status_ptr, epoch.to(tl.int64), source, me, limit, FLAGS, RANKS)
    if ids_ptr is not None:
        ROW: tl.constexpr = WORDS + META
        here = _row(peers_ptr, me, (half * RANKS + source) * max_tokens * (ROW * 4), tl.int32) + WORDS
        lane = tl.arange(0, LANES)
        for start in range(pid // RANKS * ROWS, max_tokens, TURNS * ROWS):
            row = start + tl.arange(0, ROWS)
            words = here + row.to(tl.int64) * ROW
            came = row < count
            inside = (row[:, None] < max_tokens) & (lane[None, :] < K)
            present = came[:, None] & inside
            to = source.to(tl.int64) * max_tokens + row
            at = to[:, None] * K + lane[None, :]
            tl.store(ids_ptr + at, tl.load(words[:, None] + lane[None, :], mask=present, other=-1), mask=inside)
            weight = tl.load(words[:, None] + K + lane[None, :], mask=present, other=0).to(tl.float32, bitcast=True)
            tl.store(weights_ptr + at, weight, mask=inside)
            scale = tl.load(words + 2 * K, mask=came, other=0).to(tl.float32, bitcast=True)
            tl.store(scales_ptr + to, scale, mask=row < max_tokens)
    if pid < RANKS:
        tl.store(came_ptr + source, tl.maximum(count, 0))
        if pid == 0:
            tl.store(came_ptr + RANKS, epoch & 1)
    _finish(state_ptr, epoch)


@triton.jit
def place_kernel(
    ids_ptr, place_ptr, source_ptr, counts_ptr, choices, rows, first, K: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr
):
    """`plan.expand` of received ids [N, K] int32 for the slots from `first` on: program e < LOCAL for local expert e, program LOCAL for the
    choices that are not here. `choices` is N * K. Entries of `source` past the last stay what they were."""
    expert = tl.program_id(0)
    if expert < LOCAL:
        slot = first + expert
        before = 0
        mine = 0
        for start in range(0, choices, BLOCK):
            at = start + tl.arange(0, BLOCK)
            chosen = tl.load(ids_ptr + at, mask=at < choices, other=-1)
            before += tl.sum(((chosen >= first) & (chosen < slot)).to(tl.int32), axis=0)
            mine += tl.sum((chosen == slot).to(tl.int32), axis=0)
        tl.store(counts_ptr + expert, mine)
        if mine > 0:
            for start in range(0, choices, BLOCK):
                at = start + tl.arange(0, BLOCK)
                chosen = tl.load(ids_ptr + at, mask=at < choices, other=-1)
                hit = (chosen == slot).to(tl.int32)
                place = before + tl.cumsum(hit, axis=0) - 1
                tl.store(place_ptr + at, place, mask=hit != 0)
                tl.store(source_ptr + place, at // K, mask=(hit != 0) & (place < rows))
                before += tl.sum(hit, axis=0)
    else:
        for start in range(0, choices, BLOCK):
            at = start + tl.arange(0, BLOCK)
            chosen = tl.load(ids_ptr + at, mask=at < choices, other=-1)
            elsewhere = (chosen < first) | (chosen >= first + LOCAL)
            tl.store(place_ptr + at, tl.full((BLOCK,), -1, tl.int32), mask=(at < choices) & elsewhere)


@triton.jit
def take_kernel(
    out_ptr, out_scales_ptr, source_ptr, counts_ptr, scales_ptr, came_ptr, peers_ptr, max_tokens, me,
    LOCAL: tl.constexpr, LANES: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr, META: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy rows out of the channel, a program for each: those of `source` in expert order with their scales, or, without it, all that came,
    and 0 for the others."""
    row = tl.program_id(0)
    ROW: tl.constexpr = WORDS + META
    half = tl.load(came_ptr + RANKS).to(tl.int64)
    if source_ptr is not None:
        lane = tl.arange(0, LANES)
        present = row < tl.sum(tl.load(counts_ptr + lane, mask=lane < LOCAL, other=0), axis=0)
        taken = tl.load(source_ptr + row, mask=present, other=0).to(tl.int64)
        tl.store(out_scales_ptr + row, tl.load(scales_ptr + taken, mask=present, other=0.0))
    else:
        taken = row.to(tl.int64)
        present = row % max_tokens < tl.load(came_ptr + row // max_tokens)
    target = out_ptr + row.to(tl.int64) * WORDS
    if present:
        there = (half * RANKS * max_tokens + taken) * (ROW * 4)
        _copy_words(_row(peers_ptr, me, there, tl.int32), target, WORDS, BLOCK)
    elif source_ptr is None:
        for start in tl.static_range(0, WORDS, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(target + at, tl.zeros((BLOCK,), dtype=tl.int32), mask=at < WORDS)


@triton.jit
def reduce_put_kernel(
    x_ptr, place_ptr, weights_ptr, peers_ptr, state_ptr, rows, max_tokens, me,
    K: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put rows home, a program for each received row and block of columns: the weighted sum of its places in x [rows, WIDTH], for rows that
    have any; without places, its own row of x. The sum is of fp32 products."""
    COLUMNS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // COLUMNS
    at = (tl.program_id(0) % COLUMNS) * BLOCK + tl.arange(0, BLOCK)
    mask = at < WIDTH
    rank = row // max_tokens
    half = (tl.load(state_ptr) + 1) & 1
    used = True
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if place_ptr is not None:
        used = False
        for k in tl.static_range(K):
            place = tl.load(place_ptr + row * K + k)
            if place >= 0:
                used = True
                value = tl.load(x_ptr + place.to(tl.int64) * WIDTH + at, mask=mask & (place < rows), other=0.0).to(tl.float32)
                value = tl.where(place < rows, value, float("nan"))
                total += value * tl.load(weights_ptr + row * K + k)
    else:
        total = tl.load(x_ptr + row.to(tl.int64) * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    if used:
        SIZE: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
        there = ((half * RANKS + me).to(tl.int64) * max_tokens + row % max_tokens) * (WIDTH * SIZE)
        target = _row(peers_ptr, rank, there, x_ptr.dtype.element_ty)
        tl.store(target + at, total.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_home_kernel(
    y_ptr, route_ptr, peers_ptr, state_ptr, broken_ptr, status_ptr, tokens, max_tokens, me, limit,
    K: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FLAGS: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Raise the flags, wait for those of the peers, and add up the rows of each token in fp32: y [T, WIDTH], NaN if a peer was late.

    A program for each token and block of columns, at least R; the first R raise the flags.
    """
    COLUMNS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    epoch = tl.load(state_ptr) + 1
    half = (epoch & 1).to(tl.int64)
    if pid < RANKS:
        value = epoch.to(tl.int64) << 32  # no row is counted: the route says what comes
        tl.atomic_xchg(_flag(peers_ptr, pid, epoch & 1, me, FLAGS, RANKS), value, sem="release", scope="sys")
        # Every rank waits for every other in every call, needed or not: the halves rely on it.
        _wait(peers_ptr, broken_ptr, status_ptr, epoch.to(tl.int64), pid, me, limit, FLAGS, RANKS)
    token = pid // COLUMNS
    if token < tokens:
        at = (pid % COLUMNS) * BLOCK + tl.arange(0, BLOCK)
        mask = at < WIDTH
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        whole = tl.load(broken_ptr, volatile=True) == 0
        for k in tl.static_range(K):
            row = tl.load(route_ptr + token * K + k)
            if row >= 0:
                if _wait(peers_ptr, broken_ptr, status_ptr, epoch.to(tl.int64), row // max_tokens, me, limit, FLAGS, RANKS) < 0:
                    whole = False
                SIZE: tl.constexpr = ELEMENT.primitive_bitwidth // 8
                there = (half * RANKS * max_tokens + row) * (WIDTH * SIZE)
                source = _row(peers_ptr, me, there, ELEMENT)
                total += tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.where(whole, total, float("nan"))
        tl.store(y_ptr + token.to(tl.int64) * WIDTH + at, total.to(y_ptr.dtype.element_ty), mask=mask)
    _finish(state_ptr, epoch)


# -------------------------------------------------------------------- plans


def _words_block(words: int) -> tuple[int, dict[str, int]]:
    block = min(power_of_2(words), 4096)
    return block, {"num_warps": max(1, min(8, block // 128))}


def route_launch(tokens: int, experts: int, local_experts: int, k: int) -> Launch:
    """`route_kernel` for [tokens, k] choices among `experts` slots."""
    lanes = power_of_2(k)
    block = min(_TOKENS_AT_ONCE, max(16, power_of_2(tokens)))
    constants = {"LOCAL": local_experts, "EXPERTS": experts, "K": k, "LANES": lanes, "BLOCK": block}
    return Launch(route_kernel, experts // local_experts + 1, constants, {"num_warps": 8 if block * lanes > 2048 else 4})


def meta_words(k: int) -> int:
    """int32 words that follow a row: k ids, k weights, a scale, and what makes them a multiple of 16 bytes."""
    return -(-(2 * k + 1) // 4) * 4


def put_launch(tokens: int, k: int, ranks: int, words: int, meta: int) -> Launch:
    """`put_kernel` for rows of `words` and `meta` int32 words."""
    block, options = _words_block(words)
    constants = {"K": k, "RANKS": ranks, "WORDS": words, "META": meta, "LANES": power_of_2(k), "BLOCK": block}
    return Launch(put_kernel, tokens * k, constants, options)


def arrive_launch(ranks: int, max_tokens: int, k: int, words: int, meta: int, flags: int) -> Launch:
    """`arrive_kernel`; `flags` is the byte of the buffer where the flags begin."""
    rows = 16
    turns = max(1, min(16, -(-max_tokens // rows)))
    constants = {
        "K": k, "RANKS": ranks, "WORDS": words, "META": meta, "LANES": power_of_2(k), "FLAGS": flags, "ROWS": rows, "TURNS": turns,
    }  # fmt: skip
    return Launch(arrive_kernel, ranks * turns, constants, {"num_warps": 4})


def place_launch(choices: int, local_experts: int, k: int) -> Launch:
    """`place_kernel` for `choices` = N * k choices of received rows."""
    block = min(4096, max(128, power_of_2(choices)))
    return Launch(
        place_kernel, local_experts + 1, {"K": k, "LOCAL": local_experts, "BLOCK": block}, {"num_warps": 8 if block > 1024 else 4}
    )


def take_launch(rows: int, local_experts: int, ranks: int, words: int, meta: int) -> Launch:
    """`take_kernel` for `rows` rows."""
    block, options = _words_block(words)
    constants = {
        "LOCAL": local_experts, "LANES": power_of_2(local_experts), "RANKS": ranks, "WORDS": words, "META": meta, "BLOCK": block,
    }  # fmt: skip
    return Launch(take_kernel, rows, constants, options)


def _columns(width: int, rows: int, device: Device) -> int:
    """Columns of a program: a whole row where there are rows enough, fewer where a GPU would else be idle."""
    if rows >= 8 * device.cores:
        return dividing_block(width, 512, 2048) if width > 512 else power_of_2(width)
    return dividing_block(width, 256, 1024) if width > 256 else power_of_2(width)


def reduce_put_launch(received: int, k: int, ranks: int, width: int, device: Device) -> Launch:
    """`reduce_put_kernel` for `received` = R * M rows."""
    block = _columns(width, received, device)
    constants = {"K": k, "RANKS": ranks, "WIDTH": width, "BLOCK": block}
    return Launch(reduce_put_kernel, received * -(-width // block), constants, {"num_warps": max(1, block // 256)})


def sum_home_launch(tokens: int, k: int, ranks: int, width: int, flags: int, element: Any, device: Device) -> Launch:
    """`sum_home_kernel` for [tokens, k]; `element` is Triton's dtype of the rows."""
    block = _columns(width, tokens, device)
    constants = {"K": k, "RANKS": ranks, "WIDTH": width, "BLOCK": block, "FLAGS": flags, "ELEMENT": element}
    programs = max(tokens * -(-width // block), ranks)
    return Launch(sum_home_kernel, programs, constants, {"num_warps": max(1, block // 256)})
