"""Tiles of attention: which keys a tile of queries sees, its loads and stores.

A tile is TOKENS queries times GROUP query heads of one key head, as the rows [TOKENS * GROUP, width] of matrix products. Places of tokens,
heads, and pages are 64-bit scalars; what is added to them are 32-bit vectors, as in tile.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

LAST: tl.constexpr = tl.constexpr(2147483647)  # the largest int32


@triton.jit
def extent(
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
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    FROM_END: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Which keys the queries from `token` on may see: from `first`, a multiple of BLOCK, to before `stop`, `share` for each split.

    The last of the four is the position of query 0 among the keys.
    """
    stop = keys
    if lengths_ptr is not None:
        stop = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), keys)
    offset = causal_offset
    if FROM_END:
        offset = stop - queries
    if CAUSAL:
        stop = tl.minimum(stop, tl.minimum(token + TOKENS, queries) + offset)
    first = token * 0
    if WINDOW:
        first = tl.maximum(first, token + offset - window + 1)
    if bounds_ptr is not None:
        tokens = token + tl.arange(0, TOKENS)
        at = bounds_ptr + batch * bounds_b + tokens * bounds_q
        first = tl.maximum(first, tl.min(tl.load(at, mask=tokens < queries, other=LAST), axis=0))
        stop = tl.minimum(stop, tl.max(tl.load(at + 1, mask=tokens < queries, other=0), axis=0))
    first = first // BLOCK * BLOCK
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - first, 0), BLOCK), SPLITS) * BLOCK
    return first, stop, share, offset


@triton.jit
def load_queries(
    ptr,
    token,
    queries,
    head,
    stride_t,
    stride_h,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of queries as [TOKENS * GROUP, PADDED], with zeros where there is none."""
    column = tl.arange(0, PADDED)
    heads = head + tl.arange(0, GROUP)
    first = ptr + token.to(tl.int64) * stride_t
    if TOKENS == 1:
        at = first + heads[:, None] * stride_h + column[None, :]
        rows = tl.load(at, mask=(heads < HEADS)[:, None] & (column < WIDTH)[None, :], other=0.0)
    else:
        tokens = tl.arange(0, TOKENS)
        at = first + tokens[:, None, None] * stride_t + heads[None, :, None] * stride_h + column[None, None, :]
        inside = (token + tokens < queries)[:, None, None] & (heads < HEADS)[None, :, None] & (column < WIDTH)[None, None, :]
        rows = tl.reshape(tl.load(at, mask=inside, other=0.0), (TOKENS * GROUP, PADDED))
    return rows


@triton.jit
def store_results(
    ptr,
    rows,
    token,
    queries,
    head,
    stride_t,
    stride_h,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Store a tile [TOKENS * GROUP, PADDED] of results, rounded to their dtype."""
    column = tl.arange(0, PADDED)
    heads = head + tl.arange(0, GROUP)
    first = ptr + token.to(tl.int64) * stride_t
    rows = rows.to(ptr.dtype.element_ty)
    if TOKENS == 1:
        at = first + heads[:, None] * stride_h + column[None, :]
        tl.store(at, rows, mask=(heads < HEADS)[:, None] & (column < WIDTH)[None, :])
    else:
        tokens = tl.arange(0, TOKENS)
        at = first + tokens[:, None, None] * stride_t + heads[None, :, None] * stride_h + column[None, None, :]
        inside = (token + tokens < queries)[:, None, None] & (heads < HEADS)[None, :, None] & (column < WIDTH)[None, None, :]
        tl.store(at, tl.reshape(rows, (TOKENS, GROUP, PADDED)), mask=inside)


@triton.jit
def store_numbers(ptr, numbers, token, queries, head, stride_t, stride_h, HEADS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr):
    """Store one number for each row of a tile."""
    heads = head + tl.arange(0, GROUP)
    first = ptr + token.to(tl.int64) * stride_t
    if TOKENS == 1:
        tl.store(first + heads * stride_h, numbers, mask=heads < HEADS)
    else:
        tokens = tl.arange(0, TOKENS)
        at = first + tokens[:, None] * stride_t + heads[None, :] * stride_h
        inside = (token + tokens < queries)[:, None] & (heads < HEADS)[None, :]
        tl.store(at, tl.reshape(numbers, (TOKENS, GROUP)), mask=inside)


@triton.jit
def _positions(token, offset, TOKENS: tl.constexpr, GROUP: tl.constexpr):
    """The position of each row's query among the keys, [TOKENS * GROUP, 1]; [1, 1] for one query."""
    places = (token + offset + tl.arange(0, TOKENS))[:, None]
    if TOKENS > 1:
        places = tl.reshape(tl.broadcast_to(places, (TOKENS, GROUP)), (TOKENS * GROUP, 1))
    return places


@triton.jit
def load_mask(
    ptr,
    batch,
    token,
    queries,
    first_head,
    head,
    key,
    stop,
    stride_b,
    stride_t,
    stride_h,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS_ONLY: tl.constexpr,
):
    """What the mask says of a block of keys: [BLOCK] where it says the same to all rows of the tile, else [TOKENS * GROUP, BLOCK].

    Without a mask, which keys there are.
    """
    keys = key + tl.arange(0, BLOCK)
    if ptr is None:
        said = keys < stop
    elif KEYS_ONLY:
        said = tl.load(ptr + batch.to(tl.int64) * stride_b + first_head * stride_h + keys, mask=keys < stop, other=0)
    else:
        first = ptr + batch.to(tl.int64) * stride_b + first_head * stride_h + token.to(tl.int64) * stride_t
        tokens = tl.arange(0, TOKENS)
        heads = head + tl.arange(0, GROUP)
        at = first + tokens[:, None, None] * stride_t + heads[None, :, None] * stride_h + keys[None, None, :]
        inside = (token + tokens < queries)[:, None, None] & (heads < HEADS)[None, :, None] & (keys < stop)[None, None, :]
        said = tl.reshape(tl.load(at, mask=inside, other=0), (TOKENS * GROUP, BLOCK))
    return said


@triton.jit
def masked(
    logits,
    mask_ptr,
    said,
    shown,
    token,
    offset,
    key,
    window,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS_ONLY: tl.constexpr,
    ADDITIVE: tl.constexpr,
):
    """The logits with what the mask adds, and -inf where the mask or the structure hides a key, or where it is not `shown`."""
    visible = shown[None, :]
    if mask_ptr is not None:
        if KEYS_ONLY:
            said = said[None, :]
        if ADDITIVE:
            logits += said.to(tl.float32)
        else:
            visible = visible & (said != 0)
    if CAUSAL or WINDOW:
        back = _positions(token, offset, TOKENS, GROUP) - (key + tl.arange(0, BLOCK))[None, :]  # how far back a key lies
        if CAUSAL:
            visible = visible & (back >= 0)
        if WINDOW:
            visible = visible & (back < window)
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def load_keys(
    ptr,
    table_ptr,
    batch,
    key,
    stop,
    shown,
    stride_b,
    stride_t,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Keys (or values) from `key` to before `stop` as [BLOCK, PADDED], with zeros in place of those that are not `shown` to any row.

    `ptr` points to the head, `table_ptr` to the row's pages. PAGE is 0 for keys in one piece.
    """
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    if PAGE == 0:
        at = ptr + batch.to(tl.int64) * stride_b + key.to(tl.int64) * stride_t + row[:, None] * stride_t + column[None, :]
    elif PAGE % BLOCK == 0:
        page = tl.load(table_ptr + key // PAGE).to(tl.int64)
        at = ptr + page * stride_b + (key % PAGE).to(tl.int64) * stride_t + row[:, None] * stride_t + column[None, :]
    else:
        page = tl.load(table_ptr + (key + row) // PAGE, mask=key + row < stop, other=0).to(tl.int64)
        at = ptr + (page * stride_b + ((key + row) % PAGE) * stride_t)[:, None] + column[None, :]
    if WIDTH == PADDED:
        keys = tl.load(at, mask=shown[:, None], other=0.0)
    else:
        keys = tl.load(at, mask=shown[:, None] & (column < WIDTH)[None, :], other=0.0)
    return keys


@triton.jit
def finished(total, top, acc, sinks_ptr, head, HEADS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr):
    """The weighted sums divided by the sums of weights, with the sinks among these; zeros where no key was seen."""
    if sinks_ptr is not None:
        heads = head + tl.arange(0, GROUP)
        sinks = tl.load(sinks_ptr + heads, mask=heads < HEADS, other=0.0).to(tl.float32)
        if TOKENS > 1:
            sinks = tl.reshape(tl.broadcast_to(sinks[None, :], (TOKENS, GROUP)), (TOKENS * GROUP,))
        highest = tl.maximum(top, sinks)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        factor = tl.exp(top - highest)
        acc *= factor[:, None]
        total = total * factor + tl.exp(sinks - highest)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]
