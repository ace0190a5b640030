"""Causal depthwise convolution along the tokens, with a state of the last inputs before them: many tokens of a sequence, or a few.

    y[t, c] = activation(bias[c] + sum over i < TAPS of weight[i, c] * x[t - (TAPS - 1) + i, c])

where x before a sequence's first token is its state [LENGTH, channels], the last input last. Tiles are [tokens, channels]. A sequence's
first tile alone needs the state, and replaces it by the one after the last token: no other program reads it, so that it may be replaced in
place.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import Device, Launch, dividing_block, power_of_2, vector_grid
from .numeric import activate, dtype_of, rounded


@triton.jit
def _along(at, stride, DENSE: tl.constexpr):
    """Offsets of channels, which lie side by side where DENSE."""
    if DENSE:
        places = at
    else:
        places = at * stride
    return places


@triton.jit
def _tap(weight_ptr, tap, at, CHANNELS: tl.constexpr, TAP_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr):
    """Weights [1, BLOCK] of one tap, as fp32."""
    return tl.load(weight_ptr + tap * TAP_STRIDE + at * CHANNEL_STRIDE, mask=at < CHANNELS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _span(tile, tiles, starts_ptr, tokens, sequences, STEP: tl.constexpr, HALO: tl.constexpr, SEQUENCES: tl.constexpr):
    """The sequence of a tile, the sequence's first and last (exclusive) token, and the tile's own; a tile may be empty.

    Without `starts_ptr` each sequence has `tokens` tokens, counted from 0, and `tiles` tiles. With it tokens are counted through. The
    first tiles then begin where the sequences do; of the others, one at each multiple of STEP, those are used that begin HALO tokens or
    more after a start, up to which the first ones reach.
    """
    if starts_ptr is None:
        sequence = tile // tiles
        start = tile * 0
        end = start + tokens
        first = (tile % tiles) * STEP
        last = tl.minimum(first + STEP, end)
    else:
        begins = tile < sequences
        at_step = (tile - sequences) * STEP
        index = tl.arange(0, SEQUENCES)
        ends = tl.load(starts_ptr + 1 + index, mask=index < sequences, other=2147483647).to(tl.int32)
        holding = tl.minimum(tl.sum((ends <= at_step).to(tl.int32), axis=0), sequences - 1)
        sequence = tl.where(begins, tile, holding)
        start = tl.load(starts_ptr + sequence).to(tl.int32)
        end = tl.load(starts_ptr + sequence + 1).to(tl.int32)
        first = tl.where(begins, start, at_step)
        limit = tl.where(begins, (start + HALO + STEP - 1) // STEP * STEP, at_step + STEP)
        last = tl.where(begins | (at_step >= start + HALO), tl.minimum(limit, end), first)
    return sequence, start, end, first, last


@triton.jit
def _inputs(x_ptr, at, token, start, last, x_token, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """ROWS tokens of x from `token`, its channels at `x_ptr` [BLOCK], as fp32; zeros for those outside of `start` to `last`."""
    row = tl.arange(0, ROWS)
    mask = ((token + row >= start) & (token + row < last))[:, None] & (at < CHANNELS)[None, :]
    return tl.load(x_ptr[None, :] + token.to(tl.int64) * x_token + (row * x_token)[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _state_part(
    state_ptr,
    weight_ptr,
    at,
    state_token,
    kept,
    CHANNELS: tl.constexpr,
    HALO: tl.constexpr,
    LENGTH: tl.constexpr,
    TAP_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What the state, its channels at `state_ptr` [BLOCK], adds to a sequence's first ROWS sums."""
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, at.shape[0]), dtype=tl.float32)
    for tap in range(HALO):
        place = LENGTH - HALO + tap + row
        mask = ((place < LENGTH) & kept)[:, None] & (at < CHANNELS)[None, :]
        state = tl.load(state_ptr[None, :] + (place * state_token)[:, None], mask=mask, other=0.0).to(tl.float32)
        total += state * _tap(weight_ptr, tap, at, CHANNELS, TAP_STRIDE, CHANNEL_STRIDE)
    return total


@triton.jit
def _replace_state(
    state_ptr,
    x_ptr,
    at,
    state_token,
    x_token,
    start,
    end,
    kept,
    CHANNELS: tl.constexpr,
    LENGTH: tl.constexpr,
    PLACES: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """The state becomes the last LENGTH inputs up to `end`, of which those before `start` were in the state."""
    place = tl.arange(0, PLACES)
    token = end - LENGTH + place
    from_x = (place < LENGTH) & (token >= start)
    from_state = (token < start) & kept
    in_channels = (at < CHANNELS)[None, :]
    x = tl.load(
        x_ptr[None, :] + (end - LENGTH).to(tl.int64) * x_token + (place * x_token)[:, None], mask=from_x[:, None] & in_channels, other=0.0
    )
    shift = end - start
    old = tl.load(
        state_ptr[None, :] + shift.to(tl.int64) * state_token + (place * state_token)[:, None],
        mask=from_state[:, None] & in_channels,
        other=0.0,
    )
    new = tl.where((token >= start)[:, None], x.to(tl.float32), old.to(tl.float32)).to(old.dtype)
    if BARRIER:  # all of a program's threads have read the state
        tl.debug_barrier()
    tl.store(state_ptr[None, :] + (place * state_token)[:, None], new, mask=(place < LENGTH)[:, None] & in_channels)


@triton.jit
def conv1d_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    starts_ptr,
    state_ptr,
    slots_ptr,
    kept_ptr,
    tokens,
    sequences,
    tiles,
    all_tiles,
    x_batch,
    x_token,
    x_channel,
    state_slot,
    state_token,
    state_channel,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    LENGTH: tl.constexpr,
    KEEP: tl.constexpr,
    TAP_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    DENSE: tl.constexpr,
    STATE_DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUND: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """y [tokens of all sequences, CHANNELS] by `all_tiles` tiles; states [slots, LENGTH, CHANNELS] are replaced.

    A sequence begins from its state where `kept` says so (KEEP without `kept_ptr`), else from zeros. One whose slot is below 0 is skipped:
    its y is zeros. With ONE_TILE each sequence has one.
    """
    HALO: tl.constexpr = TAPS - 1
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    row = tl.arange(0, ROWS)
    for item in range(tl.program_id(0), all_tiles * BLOCKS, tl.num_programs(0)):
        tile = item // BLOCKS
        at = (item % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        in_channels = (at < CHANNELS)[None, :]
        sequence, start, end, first, last = _span(tile, tiles, starts_ptr, tokens, sequences, STEP, HALO, SEQUENCES)
        if last > first:
            x_at = x_ptr + sequence.to(tl.int64) * x_batch + _along(at, x_channel, DENSE)
            y_row = sequence.to(tl.int64) * (0 if starts_ptr is not None else tokens) + first
            total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            if bias_ptr is not None:
                total += tl.load(bias_ptr + at, mask=at < CHANNELS, other=0.0).to(tl.float32)[None, :]
            if UNROLL:
                for tap in tl.static_range(TAPS):
                    if not ONE_TILE or HALO - tap < ROWS:  # in a tile of a few tokens an early tap sees the state alone
                        x = _inputs(x_at, at, first - HALO + tap, start, last, x_token, CHANNELS, ROWS)
                        total += x * _tap(weight_ptr, tap, at, CHANNELS, TAP_STRIDE, CHANNEL_STRIDE)
            else:
                for tap in range(TAPS):
                    x = _inputs(x_at, at, first - HALO + tap, start, last, x_token, CHANNELS, ROWS)
                    total += x * _tap(weight_ptr, tap, at, CHANNELS, TAP_STRIDE, CHANNEL_STRIDE)
            slot = sequence
            if slots_ptr is not None:
                slot = tl.load(slots_ptr + sequence).to(tl.int32)
            if state_ptr is not None:
                if first == start:
                    if slot >= 0:
                        kept = (slot >= 0) & KEEP
                        if kept_ptr is not None:
                            kept = tl.load(kept_ptr + sequence) != 0
                        state_at = state_ptr + slot.to(tl.int64) * state_slot + _along(at, state_channel, STATE_DENSE)
                        total += _state_part(
                            state_at, weight_ptr, at, state_token, kept, CHANNELS, HALO, LENGTH, TAP_STRIDE, CHANNEL_STRIDE, ROWS
                        )
                        _replace_state(state_at, x_at, at, state_token, x_token, start, end, kept, CHANNELS, LENGTH, PLACES, BARRIER)
            y = activate(rounded(total, ROUND), ACTIVATION)
            if slots_ptr is not None:
                y = tl.where(slot >= 0, y, 0.0)
            mask = (first + row < last)[:, None] & in_channels
            y_at = y_ptr + y_row * CHANNELS + (row * CHANNELS)[:, None] + at[None, :]
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------- plans

MOST_IN_ONE = 8
"""Sequences of up to so many tokens, all alike, are a tile each."""


def conv1d_tiles(tokens: int, sequences: int, step: int, *, varlen: bool) -> tuple[int, int]:
    """Tiles of a sequence (of `tokens` tokens), and of all; with `varlen` the sequences have `tokens` tokens together."""
    tiles = -(-tokens // step)
    return tiles, sequences + tiles if varlen else sequences * tiles


def conv1d_launch(
    tokens: int,
    sequences: int,
    channels: int,
    taps: int,
    device: Device,
    *,
    length: int | None = None,
    varlen: bool = False,
    keep: bool = True,
    weight_strides: tuple[int, int],
    dense: bool = True,
    state_dense: bool = True,
    activation: str = "identity",
    round_to: str | None = None,
) -> Launch:
    """`conv1d_kernel` for `sequences` sequences of `tokens` tokens, or with `varlen` of so many together.

    Args:
        taps: length of the filter, from 2.
        length: tokens of a state, None without states.
        keep: whether a sequence begins from its state where nothing else says so.
        weight_strides: from tap to tap, from channel to channel.
        dense, state_dense: whether channels lie side by side in x and in the state.
        activation: as in `numeric.activate`.
        round_to: dtype to which sums are rounded before the activation.
    """
    one = not varlen and tokens <= MOST_IN_ONE
    if device.kind == "npu":
        rows = power_of_2(tokens) if one else 16
        most = (4096 if length is None else 2048) // max(rows, power_of_2(length or 1))
        block, options = dividing_block(channels, 128, most), {}
    else:
        rows = power_of_2(tokens) if one else 32
        block = min(power_of_2(channels), 256 if one else 128)
        options = {"num_warps": min(max(rows * block // 1024, 1), 8) if one else 4}
    step = tokens if one else rows - taps + 2 if varlen else rows
    _, tiles = conv1d_tiles(tokens, sequences, step, varlen=varlen)
    length = taps - 1 if length is None else length
    block = min(block, power_of_2(channels))
    constants: dict[str, Any] = {
        "CHANNELS": channels,
        "TAPS": taps,
        "LENGTH": length,
        "KEEP": keep,
        "TAP_STRIDE": weight_strides[0],
        "CHANNEL_STRIDE": weight_strides[1],
        "DENSE": dense,
        "STATE_DENSE": state_dense,
        "ACTIVATION": activation,
        "ROUND": dtype_of(round_to),
        "SEQUENCES": power_of_2(sequences),
        "PLACES": power_of_2(length),
        "ROWS": rows,
        "STEP": step,
        "BLOCK": block,
        "ONE_TILE": one,
        "UNROLL": one or device.kind != "npu",
        "BARRIER": device.kind == "cuda",
    }
    return Launch(conv1d_kernel, vector_grid(tiles * -(-channels // block), device), constants, options)
