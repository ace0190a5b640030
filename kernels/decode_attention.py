"""Attention of few queries over many keys: a cache in one piece or in pages, grouped heads, latent heads (MLA).

A tile is what one key head is asked: TOKENS queries times GROUP query heads, so that the keys are read once for all of them. Its keys are
walked in blocks of BLOCK with the running maximum and sum of an online softmax. Where the tiles are too few to fill a device, the keys of
each are dealt out over SPLITS programs, whose parts `combine_kernel` puts together. How many there are follows from sizes alone; what each
walks follows from the lengths that are on the device, so that short sequences are dealt out evenly too.

Logits, softmax and sums are fp32; the weights are rounded to the dtype of the values for the second product.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .attention_tile import LAST, extent, finished, load_keys, load_mask, load_queries, masked, store_numbers, store_results
from .launch import Device, Launch, cube_grid, power_of_2, vector_grid
from .numeric import tanh


@triton.jit(do_not_specialize=["batches", "kv_heads", "queries", "keys", "causal_offset", "window", "token_tiles"])
def attention_kernel(
    q_ptr,
    q_rope_ptr,
    k_ptr,
    k_rope_ptr,
    v_ptr,
    mask_ptr,
    bounds_ptr,
    sinks_ptr,
    table_ptr,
    lengths_ptr,
    out_ptr,
    sums_ptr,
    tops_ptr,
    batches,
    kv_heads,
    queries,
    keys,
    token_tiles,
    scale,
    softcap,
    causal_offset,
    window,
    q_b,
    q_h,
    q_t,
    qr_b,
    qr_h,
    qr_t,
    k_b,
    k_h,
    k_t,
    kr_b,
    kr_h,
    kr_t,
    v_b,
    v_h,
    v_t,
    mask_b,
    mask_h,
    mask_t,
    bounds_b,
    bounds_q,
    table_b,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PADDED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    LATENT: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    FROM_END: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEYS_ONLY: tl.constexpr,
    ADDITIVE: tl.constexpr,
    SKIP: tl.constexpr,
):
    """softmax(scale * q @ k^T + mask) @ v, or with SPLITS > 1 the parts of it: weighted sums, sums of weights, and maxima.

    HEADS query heads share a key head. With ROPE > 0 the logits have a second part, q_rope @ k_rope^T. With LATENT the values are the first
    VALUE columns of the keys. SKIP does not read single keys that a mask hides from all rows. `out` is contiguous, [B, Sq, N, VALUE], and
    with SPLITS > 1 [B, Sq, N, SPLITS, VALUE]; `sums` and `tops` are [B, Sq, N, SPLITS]. Strides in elements: batch or page, head, token.
    """
    HEAD_TILES: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    ROWS: tl.constexpr = TOKENS * GROUP
    for work in range(tl.program_id(0), batches * kv_heads * HEAD_TILES * token_tiles * SPLITS, tl.num_programs(0)):
        split = work % SPLITS
        tile = work // SPLITS
        token = (token_tiles - 1 - tile % token_tiles) * TOKENS  # under causality the last queries see most keys: they come first
        tile = tile // token_tiles
        head = tile % HEAD_TILES * GROUP  # within the key head's
        kv_head = tile // HEAD_TILES % kv_heads
        batch = tile // HEAD_TILES // kv_heads
        first, stop, share, offset = extent(
            bounds_ptr,
            lengths_ptr,
            batch,
            token,
            queries,
            keys,
            bounds_b,
            bounds_q,
            causal_offset,
            window,
            TOKENS,
            BLOCK,
            SPLITS,
            CAUSAL,
            FROM_END,
            WINDOW,
        )
        first += split * share
        stop = tl.minimum(stop, first + share)
        head_of_all = (kv_head * HEADS).to(tl.int64)
        q_at = q_ptr + batch.to(tl.int64) * q_b + head_of_all * q_h
        q = load_queries(q_at, token, queries, head, q_t, q_h, HEADS, WIDTH, PADDED, TOKENS, GROUP)
        if ROPE > 0:
            qr_at = q_rope_ptr + batch.to(tl.int64) * qr_b + head_of_all * qr_h
            q_rope = load_queries(qr_at, token, queries, head, qr_t, qr_h, HEADS, ROPE, ROPE_PADDED, TOKENS, GROUP)
        k_at = k_ptr + kv_head.to(tl.int64) * k_h
        pages = table_ptr
        if PAGE > 0:
            pages = table_ptr + batch.to(tl.int64) * table_b
        top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        acc = tl.zeros((ROWS, VALUE_PADDED), dtype=tl.float32)
        for step in range(0, stop - first, BLOCK):
            key = first + step
            said = load_mask(
                mask_ptr,
                batch,
                token,
                queries,
                head_of_all,
                head,
                key,
                stop,
                mask_b,
                mask_t,
                mask_h,
                HEADS,
                TOKENS,
                GROUP,
                BLOCK,
                KEYS_ONLY,
            )
            shown = key + tl.arange(0, BLOCK) < stop
            if SKIP:
                shown = shown & (said != 0)
            k = load_keys(k_at, pages, batch, key, stop, shown, k_b, k_t, WIDTH, PADDED, BLOCK, PAGE)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            if ROPE > 0:
                kr_at = k_rope_ptr + kv_head.to(tl.int64) * kr_h
                k_rope = load_keys(kr_at, pages, batch, key, stop, shown, kr_b, kr_t, ROPE, ROPE_PADDED, BLOCK, PAGE)
                logits = tl.dot(q_rope, tl.trans(k_rope), logits, input_precision="ieee")
            logits *= scale
            if SOFTCAP:
                logits = softcap * tanh(logits / softcap)
            logits = masked(
                logits, mask_ptr, said, shown, token, offset, key, window, TOKENS, GROUP, BLOCK, CAUSAL, WINDOW, KEYS_ONLY, ADDITIVE
            )
            higher = tl.maximum(top, tl.max(logits, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(logits - base[:, None])
            factor = tl.exp(top - base)
            total = total * factor + tl.sum(weights, axis=1)
            if LATENT:
                v = k
            else:
                v = load_keys(
                    v_ptr + kv_head.to(tl.int64) * v_h, pages, batch, key, stop, shown, v_b, v_t, VALUE, VALUE_PADDED, BLOCK, PAGE
                )
            acc = tl.dot(weights.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
            top = higher
        heads = kv_heads * HEADS
        place = batch.to(tl.int64) * queries * heads + head_of_all
        if SPLITS == 1:
            if sinks_ptr is not None:
                acc = finished(total, top, acc, sinks_ptr + head_of_all, head, HEADS, TOKENS, GROUP)
            else:
                acc = finished(total, top, acc, None, head, HEADS, TOKENS, GROUP)
            store_results(
                out_ptr + place * VALUE, acc, token, queries, head, heads * VALUE, VALUE, HEADS, VALUE, VALUE_PADDED, TOKENS, GROUP
            )
        elif first < stop:  # a part without keys is not read
            place = place * SPLITS + split
            row, column = heads * SPLITS, SPLITS
            store_results(
                out_ptr + place * VALUE,
                acc,
                token,
                queries,
                head,
                row * VALUE,
                column * VALUE,
                HEADS,
                VALUE,
                VALUE_PADDED,
                TOKENS,
                GROUP,
            )
            store_numbers(sums_ptr + place, total, token, queries, head, row, column, HEADS, TOKENS, GROUP)
            store_numbers(tops_ptr + place, top, token, queries, head, row, column, HEADS, TOKENS, GROUP)


@triton.jit(do_not_specialize=["rows", "heads", "queries", "keys", "causal_offset", "window"])
def combine_kernel(
    parts_ptr,
    sums_ptr,
    tops_ptr,
    sinks_ptr,
    bounds_ptr,
    lengths_ptr,
    out_ptr,
    rows,
    heads,
    queries,
    keys,
    causal_offset,
    window,
    bounds_b,
    bounds_q,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    FROM_END: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Join the parts [rows, SPLITS, VALUE] of `attention_kernel`; a row is one head of one query. Parts without keys are not read."""
    every = tl.arange(0, SPLITS_PADDED)
    some = tl.arange(0, CHUNK)
    column = tl.arange(0, VALUE_PADDED)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        head = row % heads
        token = row // heads % queries // TOKENS * TOKENS
        batch = row // heads // queries
        first, stop, share, _ = extent(
            bounds_ptr,
            lengths_ptr,
            batch,
            token,
            queries,
            keys,
            bounds_b,
            bounds_q,
            causal_offset,
            window,
            TOKENS,
            BLOCK,
            SPLITS,
            CAUSAL,
            FROM_END,
            WINDOW,
        )
        parts = tl.cdiv(tl.maximum(stop - first, 0), tl.maximum(share, 1))
        result = batch.to(tl.int64) * queries * heads + row % (queries * heads)
        place = result * SPLITS
        tops = tl.load(tops_ptr + place + every, mask=every < parts, other=float("-inf"))
        sums = tl.load(sums_ptr + place + every, mask=every < parts, other=0.0)
        top = tl.max(tops, axis=0)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head).to(tl.float32)
            top = tl.maximum(top, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(sums * tl.exp(tops - top), axis=0)
        if sinks_ptr is not None:
            total += tl.exp(sink - top)
        acc = tl.zeros((VALUE_PADDED,), dtype=tl.float32)
        for part in range(0, parts, CHUNK):
            at = part + some
            weights = tl.exp(tl.load(tops_ptr + place + at, mask=at < parts, other=float("-inf")) - top)
            inside = (at < parts)[:, None] & (column < VALUE)[None, :]
            values = tl.load(parts_ptr + (place + part) * VALUE + some[:, None] * VALUE + column[None, :], mask=inside, other=0.0)
            acc += tl.sum(values * weights[:, None], axis=0)
        y = acc / tl.where(total == 0.0, 1.0, total)
        tl.store(out_ptr + result * VALUE + column, y.to(out_ptr.dtype.element_ty), mask=column < VALUE)


@triton.jit(do_not_specialize=["rows", "queries", "heads", "keys"])
def mask_bounds_kernel(
    mask_ptr,
    bounds_ptr,
    rows,
    queries,
    heads,
    keys,
    mask_b,
    mask_h,
    mask_t,
    hidden,
    ADDITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From which key to before which the mask of each query [rows, 2] shows any; with ADDITIVE all keys where it shows none.

    A number that is not above `hidden` hides: the softmax gives such keys weight only if there is no other.
    """
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        first = tl.full((BLOCK,), LAST, dtype=tl.int32)
        stop = tl.zeros((BLOCK,), dtype=tl.int32)
        for head in range(heads):
            at = mask_ptr + (row // queries).to(tl.int64) * mask_b + (row % queries).to(tl.int64) * mask_t + head * mask_h
            for key in range(0, keys, BLOCK):
                place = key + tl.arange(0, BLOCK)
                if ADDITIVE:
                    shown = tl.load(at + place, mask=place < keys, other=float("-inf")).to(tl.float32)
                    visible = (place < keys) & ~(shown <= hidden)  # a NaN shows
                else:
                    visible = tl.load(at + place, mask=place < keys, other=0) != 0
                first = tl.minimum(first, tl.where(visible, place, LAST))
                stop = tl.maximum(stop, tl.where(visible, place + 1, 0))
        begin, end = tl.min(first, axis=0), tl.max(stop, axis=0)
        if ADDITIVE:
            begin, end = tl.where(end == 0, 0, begin), tl.where(end == 0, keys, end)
        tl.store(bounds_ptr + row * 2, begin)
        tl.store(bounds_ptr + row * 2 + 1, end)


# -------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Sizes:
    """What a call of attention asks.

    Attributes:
        batch, kv_heads, group, queries, keys: group query heads share a key head; `keys` is the most that a sequence may have.
        width, value_width: of keys and of values.
        rope_width: of the second part of the keys, 0 without.
        page: keys in a page of the cache, 0 for keys in one piece.
        itemsize: bytes of an element.
    """

    batch: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    width: int
    value_width: int
    rope_width: int = 0
    page: int = 0
    itemsize: int = 2


@dataclass(frozen=True)
class Tiling:
    """How the rows and keys of a call are dealt out: constants of the kernels."""

    tokens: int
    group: int
    block: int
    splits: int
    options: dict[str, int]

    def token_tiles(self, queries: int) -> int:
        return -(-queries // self.tokens)


def tiling(sizes: Sizes, device: Device) -> Tiling:
    """The tile of a call, and into how many parts its keys are split so that batch 1 fills the device."""
    most = _most_rows(sizes, device)
    group = min(power_of_2(sizes.group), most)
    tokens = min(power_of_2(sizes.queries), most // group)
    if tokens * group < 16:  # the least that a matrix unit takes
        group, tokens = (16, 1) if tokens == 1 else (group, 16 // group)
    block, options = _block(sizes, tokens * group, device)
    tiles = sizes.batch * sizes.kv_heads * -(-sizes.group // group) * -(-sizes.queries // tokens)
    wanted = 2 * device.cube_cores // max(tiles, 1)  # two programs a core; the rest of a half filled round is not worth a split
    walks = -(-sizes.keys // block)  # a part has two blocks at least, to be read while the one before is computed
    splits = max(1, min(wanted, walks // 2, 64 if device.kind != "npu" else 16))
    return Tiling(tokens, group, block, splits, options)


def _most_rows(sizes: Sizes, device: Device) -> int:
    """Rows of the largest tile: what the accumulator of [rows, value] has room for."""
    padded = power_of_2(sizes.value_width)
    if device.kind == "npu":
        return 16
    wide = (padded > 128) + (padded > 256) * (sizes.itemsize > 2) + (sizes.itemsize > 2)
    return 128 >> wide


def _block(sizes: Sizes, rows: int, device: Device) -> tuple[int, dict[str, int]]:
    """Keys of a block and the compiler's options."""
    padded = max(power_of_2(sizes.width), power_of_2(sizes.value_width))
    if device.kind == "npu":
        block = 128 if padded <= 128 else 64 if padded <= 256 else 32
        while sizes.page % block:  # pages that are looked up for each key are scalar loops
            block //= 2
        return block, {}
    # 16 KiB of keys, and of values; three of each are in flight.
    block = min(max(16384 // (padded * sizes.itemsize), 16 if sizes.itemsize > 2 else 32), 128)
    stages = 5 if sizes.page else 3  # a page is looked up two stages before its keys are read
    return block, {"num_warps": 8 if rows >= 64 else 4, "num_stages": stages}


def attention_launch(
    sizes: Sizes,
    device: Device,
    *,
    latent: bool = False,
    causal: bool = False,
    from_end: bool = False,
    window: bool = False,
    softcap: bool = False,
    keys_only: bool = False,
    additive: bool = False,
) -> tuple[Launch, Launch | None]:
    """`attention_kernel`, and `combine_kernel` where the keys are split.

    Args:
        latent: the values are the first columns of the keys.
        causal, from_end: key j is visible to query i if j <= i + offset; with `from_end` that is the sequence's length less the queries.
        window, softcap: whether there are.
        keys_only: the mask says the same to all heads and queries.
        additive: the mask is added, not compared.
    """
    tile = tiling(sizes, device)
    structure = {"CAUSAL": causal, "FROM_END": from_end, "WINDOW": window}
    shared = {"TOKENS": tile.tokens, "BLOCK": tile.block, "SPLITS": tile.splits, "VALUE": sizes.value_width, **structure}
    padded = power_of_2(sizes.value_width)
    widths = {"WIDTH": sizes.width, "PADDED": max(16, power_of_2(sizes.width)), "VALUE_PADDED": max(16, padded)}
    rope = {"ROPE": sizes.rope_width, "ROPE_PADDED": max(16, power_of_2(sizes.rope_width or 1)), "LATENT": latent}
    constants = {"HEADS": sizes.group, "GROUP": tile.group, "PAGE": sizes.page, **widths, **rope}
    skip = keys_only and not additive and device.kind != "npu"  # there a load by such a mask takes three times the room
    form = {"SOFTCAP": softcap, "KEYS_ONLY": keys_only, "ADDITIVE": additive, "SKIP": skip}
    tiles = sizes.batch * sizes.kv_heads * -(-sizes.group // tile.group) * tile.token_tiles(sizes.queries)
    walk = Launch(attention_kernel, cube_grid(tiles * tile.splits, device), {**shared, **constants, **form}, tile.options)
    if tile.splits == 1:
        return walk, None
    rows = sizes.batch * sizes.kv_heads * sizes.group * sizes.queries
    chunk = min(power_of_2(tile.splits), max(1, 8192 // max(16, padded)))
    combined = {**shared, "VALUE_PADDED": max(16, padded), "SPLITS_PADDED": max(16, power_of_2(tile.splits)), "CHUNK": chunk}
    options = {} if device.kind == "npu" else {"num_warps": 4}
    return walk, Launch(combine_kernel, vector_grid(rows, device), combined, options)


def mask_bounds_launch(rows: int, keys: int, device: Device, *, additive: bool) -> Launch:
    """`mask_bounds_kernel` for the masks of `rows` queries."""
    block = min(max(power_of_2(keys), 16), 1024 if device.kind == "npu" else 4096)
    options = {} if device.kind == "npu" else {"num_warps": 4}
    return Launch(mask_bounds_kernel, vector_grid(rows, device), {"ADDITIVE": additive, "BLOCK": block}, options)
