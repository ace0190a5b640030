"""Rotary position embedding of query and key heads, and what the kernels with norms share with it.

A token's heads are one tile [ROWS, pairs] for the first members of the pairs and one for the second; its cosines and sines are read once.
A tensor is seen as [batch, tokens, heads, HEAD_DIM], in any memory order but that of the last dimension; 64 bits address a token, 32 what
lies within one. Where a core cannot hold all heads, they are dealt out in PARTS: by one program in turn, or with SPREAD by several.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import Device, Launch, power_of_2, vector_grid

# -------------------------------------------------------------------- heads of a token


@triton.jit
def load_heads(
    ptr,
    stride,
    head,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Every STEP-th of WIDTH elements of the heads from `head`, [ROWS, BLOCK], as they are stored; zeros where there is none.

    MASKED says whether there may be fewer than ROWS heads.
    """
    heads, columns = head + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = ptr + heads[:, None] * stride + (columns * STEP)[None, :]
    if MASKED:
        if WIDTH == BLOCK:
            tile = tl.load(at, mask=(heads < HEADS)[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=(heads < HEADS)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == BLOCK:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_heads(
    ptr,
    tile,
    stride,
    head,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Store what `load_heads` reads, rounded to the dtype of the memory."""
    heads, columns = head + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = ptr + heads[:, None] * stride + (columns * STEP)[None, :]
    tile = tile.to(ptr.dtype.element_ty)
    if MASKED:
        if WIDTH == BLOCK:
            tl.store(at, tile, mask=(heads < HEADS)[:, None])
        else:
            tl.store(at, tile, mask=(heads < HEADS)[:, None] & (columns < WIDTH)[None, :])
    else:
        if WIDTH == BLOCK:
            tl.store(at, tile)
        else:
            tl.store(at, tile, mask=(columns < WIDTH)[None, :])


@triton.jit
def load_pairs(
    ptr,
    stride,
    head,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """The first and the second members of HALF pairs, [ROWS, BLOCK] each, as fp32.

    NEIGHBOURS are pairs (2i, 2i + 1), which are read in one piece and then parted; others (i, i + HALF).
    """
    if NEIGHBOURS:
        both = load_heads(ptr, stride, head, HEADS, MASKED, 2 * HALF, ROWS, 2 * BLOCK, 1)
        first, second = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    else:
        first = load_heads(ptr, stride, head, HEADS, MASKED, HALF, ROWS, BLOCK, 1)
        second = load_heads(ptr + HALF, stride, head, HEADS, MASKED, HALF, ROWS, BLOCK, 1)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(
    ptr,
    first,
    second,
    stride,
    head,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """Store what `load_pairs` reads."""
    if NEIGHBOURS:
        both = tl.reshape(tl.join(first, second), (ROWS, 2 * BLOCK))
        store_heads(ptr, both, stride, head, HEADS, MASKED, 2 * HALF, ROWS, 2 * BLOCK, 1)
    else:
        store_heads(ptr, first, stride, head, HEADS, MASKED, HALF, ROWS, BLOCK, 1)
        store_heads(ptr + HALF, second, stride, head, HEADS, MASKED, HALF, ROWS, BLOCK, 1)


@triton.jit
def load_entries(ptr, HALF: tl.constexpr, BLOCK: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """The entries of a vector for the first and for the second members of HALF pairs, [1, BLOCK] each, as fp32."""
    first = load_heads(ptr, 0, 0, 1, False, HALF, 1, BLOCK, 2 if NEIGHBOURS else 1)
    second = load_heads(ptr + (1 if NEIGHBOURS else HALF), 0, 0, 1, False, HALF, 1, BLOCK, 2 if NEIGHBOURS else 1)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def load_angles(
    cos_ptr,
    sin_ptr,
    positions_ptr,
    batch,
    token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    positions_batch,
    positions_token,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """A token's cosines and sines for the first and the second members of the pairs, [1, BLOCK] each; FULL tables have both."""
    if positions_ptr is not None:
        position = tl.load(positions_ptr + batch * positions_batch + token * positions_token).to(tl.int64)
        cos_ptr += position * cos_token
        sin_ptr += position * sin_token
    else:
        cos_ptr += batch * cos_batch + token * cos_token
        sin_ptr += batch * sin_batch + token * sin_token
    if FULL:
        cos1, cos2 = load_entries(cos_ptr, HALF, BLOCK, NEIGHBOURS)
        sin1, sin2 = load_entries(sin_ptr, HALF, BLOCK, NEIGHBOURS)
    else:
        cos1 = load_heads(cos_ptr, 0, 0, 1, False, HALF, 1, BLOCK, 1).to(tl.float32)
        sin1 = load_heads(sin_ptr, 0, 0, 1, False, HALF, 1, BLOCK, 1).to(tl.float32)
        cos2, sin2 = cos1, sin1
    return cos1, cos2, SIGN * sin1, SIGN * sin2


# -------------------------------------------------------------------- the kernel


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    rows,
    tokens,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    q_out_batch,
    q_out_token,
    q_out_head,
    k_out_batch,
    k_out_token,
    k_out_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    positions_batch,
    positions_token,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    FULL: tl.constexpr,
    PAIRS_IN: tl.constexpr,
    PAIRS_OUT: tl.constexpr,
    SIGN: tl.constexpr,
    PARTS: tl.constexpr,
    SPREAD: tl.constexpr,
    Q_ROWS: tl.constexpr,
    K_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Each pair (x1, x2) of the first ROTARY elements becomes (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2); the others are copied.

    Without `q_out_ptr` the results are written over q and k. PAIRS_IN and PAIRS_OUT say whether pairs are neighbours.
    """
    HALF: tl.constexpr = ROTARY // 2
    REST: tl.constexpr = HEAD_DIM - ROTARY
    Q_MASKED: tl.constexpr = PARTS * Q_ROWS != Q_HEADS
    K_MASKED: tl.constexpr = PARTS * K_ROWS != K_HEADS
    for unit in range(tl.program_id(0), rows * SPREAD, tl.num_programs(0)):
        row = unit // SPREAD
        batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
        cos1, cos2, sin1, sin2 = load_angles(
            cos_ptr,
            sin_ptr,
            positions_ptr,
            batch,
            token,
            cos_batch,
            cos_token,
            sin_batch,
            sin_token,
            positions_batch,
            positions_token,
            HALF,
            BLOCK,
            FULL,
            PAIRS_OUT,
            SIGN,
        )
        q = q_ptr + batch * q_batch + token * q_token
        q_out = q if q_out_ptr is None else q_out_ptr + batch * q_out_batch + token * q_out_token
        if k_ptr is not None:
            k = k_ptr + batch * k_batch + token * k_token
            k_out = k if k_out_ptr is None else k_out_ptr + batch * k_out_batch + token * k_out_token
        for part in range(unit % SPREAD, PARTS, SPREAD):
            # All loads come before the first store, so that they are in flight together.
            q1, q2 = load_pairs(q, q_head, part * Q_ROWS, Q_HEADS, Q_MASKED, HALF, Q_ROWS, BLOCK, PAIRS_IN)
            if k_ptr is not None:
                k1, k2 = load_pairs(k, k_head, part * K_ROWS, K_HEADS, K_MASKED, HALF, K_ROWS, BLOCK, PAIRS_IN)
            if REST > 0 and q_out_ptr is not None:
                q_rest = load_heads(q + ROTARY, q_head, part * Q_ROWS, Q_HEADS, Q_MASKED, REST, Q_ROWS, REST_BLOCK, 1)
                store_heads(q_out + ROTARY, q_rest, q_out_head, part * Q_ROWS, Q_HEADS, Q_MASKED, REST, Q_ROWS, REST_BLOCK, 1)
                if k_ptr is not None:
                    k_rest = load_heads(k + ROTARY, k_head, part * K_ROWS, K_HEADS, K_MASKED, REST, K_ROWS, REST_BLOCK, 1)
                    store_heads(k_out + ROTARY, k_rest, k_out_head, part * K_ROWS, K_HEADS, K_MASKED, REST, K_ROWS, REST_BLOCK, 1)
            y1, y2 = q1 * cos1 - q2 * sin1, q2 * cos2 + q1 * sin2
            store_pairs(q_out, y1, y2, q_out_head, part * Q_ROWS, Q_HEADS, Q_MASKED, HALF, Q_ROWS, BLOCK, PAIRS_OUT)
            if k_ptr is not None:
                y1, y2 = k1 * cos1 - k2 * sin1, k2 * cos2 + k1 * sin2
                store_pairs(k_out, y1, y2, k_out_head, part * K_ROWS, K_HEADS, K_MASKED, HALF, K_ROWS, BLOCK, PAIRS_OUT)


# -------------------------------------------------------------------- plans


def head_tiles(rows: int, heads: tuple[int, ...], pairs: int, device: Device, *, most: int) -> tuple[int, dict[str, Any], dict[str, int]]:
    """How the heads of `rows` tokens are dealt out: the grid, the constants PARTS, SPREAD, Q_ROWS and K_ROWS, and the compiler's options.

    Args:
        heads: of each tensor, q first; all are divided into as many parts.
        pairs: that a head's tile has, a power of 2.
        most: pairs of all tensors that a part has at most, if it can.
    """
    parts = 1
    while parts < max(heads) and pairs * sum(_tile_rows(count, parts) for count in heads) > most:
        parts += 1
    tile = [_tile_rows(count, parts) for count in heads]
    parts = max(-(-count // rows_) for count, rows_ in zip(heads, tile))
    spread = 1 if device.kind == "npu" else parts
    constants = {"PARTS": parts, "SPREAD": spread, "Q_ROWS": tile[0], "K_ROWS": tile[1] if len(tile) > 1 else 1}
    options = {} if device.kind == "npu" else {"num_warps": min(max(power_of_2(pairs * sum(tile) // 512 + 1) // 2, 1), 8)}
    return vector_grid(rows * spread, device), constants, options


def _tile_rows(heads: int, parts: int) -> int:
    return power_of_2(-(-heads // parts))


def rotation_constants(head_dim: int, rotary_dim: int, *, layout: str, sign: int, full: bool) -> dict[str, Any]:
    """The constants of a rotation: ROTARY and the blocks, PAIRS_IN and PAIRS_OUT, FULL, SIGN."""
    rest = head_dim - rotary_dim
    return {
        "HEAD_DIM": head_dim,
        "ROTARY": rotary_dim,
        "BLOCK": power_of_2(rotary_dim // 2),
        "REST_BLOCK": power_of_2(max(rest, 1)),
        "PAIRS_IN": layout != "half",
        "PAIRS_OUT": layout == "interleaved",
        "FULL": full,
        "SIGN": sign,
    }


def rotary_launch(
    rows: int,
    q_heads: int,
    k_heads: int,
    head_dim: int,
    rotary_dim: int,
    device: Device,
    *,
    layout: str = "half",
    sign: int = 1,
    full: bool = False,
) -> Launch:
    """`rotary_kernel` for `rows` tokens.

    Args:
        rows: tokens of all batches.
        q_heads, k_heads: heads of a token; without a key `k_heads` is 0.
        head_dim, rotary_dim: elements of a head, and how many of them, from the first, are rotated.
        layout, sign: as in `npu_fusion::rotary`.
        full: whether the tables have an entry for each member of a pair.
    """
    constants = rotation_constants(head_dim, rotary_dim, layout=layout, sign=sign, full=full)
    pairs = constants["BLOCK"] + constants["REST_BLOCK"] // 2
    heads = (q_heads, k_heads) if k_heads else (q_heads,)
    most = 4096 if device.kind != "npu" else 2560 if layout != "interleaved" else 2048
    grid, tiles, options = head_tiles(rows, heads, pairs, device, most=most)
    return Launch(rotary_kernel, grid, {"Q_HEADS": q_heads, "K_HEADS": k_heads, **constants, **tiles}, options)
