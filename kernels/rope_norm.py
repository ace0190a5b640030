"""RMSNorm of query and key heads with their rotary embedding, and the same from a merged projection: values copied, a paged cache written.

The tiles are those of kernels/rope.py; a head's statistics are a row's sum over both tiles, and over that of what is not rotated.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Device, Launch, power_of_2
from .numeric import dtype_of, rounded
from .rope import head_tiles, load_angles, load_entries, load_heads, load_pairs, rotation_constants, store_heads, store_pairs


@triton.jit
def _load_factors(
    ptr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    OFFSET: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """OFFSET + weight for the first and the second members of the pairs, and for what is not rotated; ones without a weight."""
    if ptr is None:
        first = tl.full((1, BLOCK), 1.0, tl.float32)
        second = first
        rest = tl.full((1, REST_BLOCK), 1.0, tl.float32)
    else:
        first, second = load_entries(ptr, HALF, BLOCK, NEIGHBOURS)
        rest = first
        if REST > 0:
            rest = load_heads(ptr + 2 * HALF, 0, 0, 1, False, REST, 1, REST_BLOCK, 1).to(tl.float32)
        if OFFSET != 0:
            first, second, rest = rounded(first + OFFSET, PRODUCT), rounded(second + OFFSET, PRODUCT), rounded(rest + OFFSET, PRODUCT)
    return first, second, rest


@triton.jit
def _load_whole(
    ptr,
    stride,
    head,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """The pairs of heads, and what is not rotated: nothing of meaning where there is none."""
    first, second = load_pairs(ptr, stride, head, HEADS, MASKED, HALF, ROWS, BLOCK, NEIGHBOURS)
    rest = first
    if REST > 0:
        rest = load_heads(ptr + 2 * HALF, stride, head, HEADS, MASKED, REST, ROWS, REST_BLOCK, 1).to(tl.float32)
    return first, second, rest


@triton.jit
def _store_whole(
    ptr,
    first,
    second,
    rest,
    stride,
    head,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """Store what `_load_whole` reads."""
    store_pairs(ptr, first, second, stride, head, HEADS, MASKED, HALF, ROWS, BLOCK, NEIGHBOURS)
    if REST > 0:
        store_heads(ptr + 2 * HALF, rest, stride, head, HEADS, MASKED, REST, ROWS, REST_BLOCK, 1)


@triton.jit
def _normed(
    first,
    second,
    rest,
    factor1,
    factor2,
    factor_rest,
    eps,
    HEAD_DIM: tl.constexpr,
    REST: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Heads over the root of their mean square, rounded to ROUND, times the factors, rounded to PRODUCT."""
    squares = tl.sum(first * first + second * second, axis=1)
    if REST > 0:
        squares += tl.sum(rest * rest, axis=1)
    scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    first = rounded(rounded(first * scale, ROUND) * factor1, PRODUCT)
    second = rounded(rounded(second * scale, ROUND) * factor2, PRODUCT)
    if REST > 0:
        rest = rounded(rounded(rest * scale, ROUND) * factor_rest, PRODUCT)
    return first, second, rest


@triton.jit
def _normed_and_rotated(
    first,
    second,
    rest,
    cos1,
    cos2,
    sin1,
    sin2,
    factor1,
    factor2,
    factor_rest,
    eps,
    HEAD_DIM: tl.constexpr,
    REST: tl.constexpr,
    NORM: tl.constexpr,
    NORM_LAST: tl.constexpr,
    ROUND: tl.constexpr,
    PRODUCT: tl.constexpr,
    BETWEEN: tl.constexpr,
):
    """Norm, then rotation; with NORM_LAST the other way round. What the first gives the second is rounded to BETWEEN."""
    if NORM and not NORM_LAST:
        first, second, rest = _normed(first, second, rest, factor1, factor2, factor_rest, eps, HEAD_DIM, REST, ROUND, PRODUCT)
        first, second = rounded(first, BETWEEN), rounded(second, BETWEEN)
    first, second = first * cos1 - second * sin1, second * cos2 + first * sin2
    if NORM and NORM_LAST:
        first, second = rounded(first, BETWEEN), rounded(second, BETWEEN)
        first, second, rest = _normed(first, second, rest, factor1, factor2, factor_rest, eps, HEAD_DIM, REST, ROUND, PRODUCT)
    return first, second, rest


@triton.jit
def qkv_norm_rotary_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    rows,
    tokens,
    page,
    eps,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    q_out_batch,
    q_out_token,
    q_out_head,
    k_out_batch,
    k_out_token,
    k_out_head,
    v_out_batch,
    v_out_token,
    v_out_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    positions_batch,
    positions_token,
    key_cache_block,
    key_cache_token,
    key_cache_head,
    value_cache_block,
    value_cache_token,
    value_cache_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    FULL: tl.constexpr,
    PAIRS_IN: tl.constexpr,
    PAIRS_OUT: tl.constexpr,
    SIGN: tl.constexpr,
    NORM: tl.constexpr,
    NORM_LAST: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    Q_PRODUCT: tl.constexpr,
    K_PRODUCT: tl.constexpr,
    BETWEEN: tl.constexpr,
    PARTS: tl.constexpr,
    SPREAD: tl.constexpr,
    Q_ROWS: tl.constexpr,
    K_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """q and k normalised over HEAD_DIM and rotated, v as it is.

    Absent are v with its results, the results k and v where only the cache is written, and the cache with its slots. Slot s of the cache is
    row s % page of block s // page; a token of a negative slot is not written.
    """
    HALF: tl.constexpr = ROTARY // 2
    REST: tl.constexpr = HEAD_DIM - ROTARY
    Q_MASKED: tl.constexpr = PARTS * Q_ROWS != Q_HEADS
    K_MASKED: tl.constexpr = PARTS * K_ROWS != K_HEADS
    BY_PAIRS: tl.constexpr = PAIRS_OUT if NORM_LAST else PAIRS_IN
    qf1, qf2, qf_rest = _load_factors(q_weight_ptr, HALF, REST, BLOCK, REST_BLOCK, BY_PAIRS, OFFSET, Q_PRODUCT)
    kf1, kf2, kf_rest = _load_factors(k_weight_ptr, HALF, REST, BLOCK, REST_BLOCK, BY_PAIRS, OFFSET, K_PRODUCT)
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
        q, q_out = q_ptr + batch * q_batch + token * q_token, q_out_ptr + batch * q_out_batch + token * q_out_token
        k = k_ptr + batch * k_batch + token * k_token
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + row).to(tl.int64)
        for part in range(unit % SPREAD, PARTS, SPREAD):
            # All loads come before the first store, so that they are in flight together.
            q_head_0, k_head_0 = part * Q_ROWS, part * K_ROWS
            q1, q2, q_rest = _load_whole(q, q_head, q_head_0, Q_HEADS, Q_MASKED, HALF, REST, Q_ROWS, BLOCK, REST_BLOCK, PAIRS_IN)
            k1, k2, k_rest = _load_whole(k, k_head, k_head_0, K_HEADS, K_MASKED, HALF, REST, K_ROWS, BLOCK, REST_BLOCK, PAIRS_IN)
            if v_ptr is not None:
                v = v_ptr + batch * v_batch + token * v_token
                value = load_heads(v, v_head, k_head_0, K_HEADS, K_MASKED, HEAD_DIM, K_ROWS, VALUE_BLOCK, 1)
            q1, q2, q_rest = _normed_and_rotated(
                q1, q2, q_rest, cos1, cos2, sin1, sin2, qf1, qf2, qf_rest, eps, HEAD_DIM, REST, NORM, NORM_LAST, ROUND, Q_PRODUCT, BETWEEN
            )
            _store_whole(q_out, q1, q2, q_rest, q_out_head, q_head_0, Q_HEADS, Q_MASKED, HALF, REST, Q_ROWS, BLOCK, REST_BLOCK, PAIRS_OUT)
            k1, k2, k_rest = _normed_and_rotated(
                k1, k2, k_rest, cos1, cos2, sin1, sin2, kf1, kf2, kf_rest, eps, HEAD_DIM, REST, NORM, NORM_LAST, ROUND, K_PRODUCT, BETWEEN
            )
            if k_out_ptr is not None:
                k_out = k_out_ptr + batch * k_out_batch + token * k_out_token
                _store_whole(
                    k_out, k1, k2, k_rest, k_out_head, k_head_0, K_HEADS, K_MASKED, HALF, REST, K_ROWS, BLOCK, REST_BLOCK, PAIRS_OUT
                )
            if v_out_ptr is not None:
                v_out = v_out_ptr + batch * v_out_batch + token * v_out_token
                store_heads(v_out, value, v_out_head, k_head_0, K_HEADS, K_MASKED, HEAD_DIM, K_ROWS, VALUE_BLOCK, 1)
            if slots_ptr is not None:
                if slot >= 0:
                    key_row = key_cache_ptr + (slot // page) * key_cache_block + (slot % page) * key_cache_token
                    value_row = value_cache_ptr + (slot // page) * value_cache_block + (slot % page) * value_cache_token
                    _store_whole(
                        key_row,
                        k1,
                        k2,
                        k_rest,
                        key_cache_head,
                        k_head_0,
                        K_HEADS,
                        K_MASKED,
                        HALF,
                        REST,
                        K_ROWS,
                        BLOCK,
                        REST_BLOCK,
                        PAIRS_OUT,
                    )
                    store_heads(value_row, value, value_cache_head, k_head_0, K_HEADS, K_MASKED, HEAD_DIM, K_ROWS, VALUE_BLOCK, 1)


# -------------------------------------------------------------------- plans


def qkv_norm_rotary_launch(
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
    norm: bool = True,
    norm_last: bool = False,
    weight_offset: int = 0,
    round_to: str | None = None,
    q_product: str | None = None,
    k_product: str | None = None,
    between: str | None = None,
) -> Launch:
    """`qkv_norm_rotary_kernel` for `rows` tokens, with or without values and a cache.

    Args:
        rows, q_heads, k_heads, head_dim, rotary_dim, layout, sign, full: as in `rotary_launch`; there is a key.
        norm, norm_last: whether q and k are normalised, and whether after their rotation.
        weight_offset: 1 scales by `1 + weight`.
        round_to, q_product, k_product: dtypes to which the normalised heads, and their products with the weights, are rounded in between.
        between: dtype to which what the norm gives the rotation, or the rotation the norm, is rounded.
    """
    constants = rotation_constants(head_dim, rotary_dim, layout=layout, sign=sign, full=full)
    pairs = constants["BLOCK"] + constants["REST_BLOCK"] // 2
    most = 4096 if device.kind != "npu" else 2560 if layout != "interleaved" else 2048
    grid, tiles, options = head_tiles(rows, (q_heads, k_heads), pairs, device, most=most)
    if device.kind != "npu" and rotary_dim < head_dim and norm:
        # Three tiles of each head are live at once: left alone, the compiler takes so many registers that an SM holds one program.
        options = {"num_warps": 8 if options["num_warps"] > 2 else options["num_warps"], "maxnreg": 128}
    norms = {"NORM": norm, "NORM_LAST": norm_last, "OFFSET": weight_offset}
    rounding = {
        "ROUND": dtype_of(round_to),
        "Q_PRODUCT": dtype_of(q_product),
        "K_PRODUCT": dtype_of(k_product),
        "BETWEEN": dtype_of(between),
    }
    heads = {"Q_HEADS": q_heads, "K_HEADS": k_heads, "VALUE_BLOCK": power_of_2(head_dim)}
    return Launch(qkv_norm_rotary_kernel, grid, {**heads, **constants, **norms, **rounding, **tiles}, options)
