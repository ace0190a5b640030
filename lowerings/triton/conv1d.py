"""Causal depthwise convolution by Triton: the ops causal_conv1d and causal_conv1d_update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels import conv1d as kernels
from ...ops._common import Size, check_choice, check_index, check_rank, check_sizes, check_type, check_value
from .checks import FLOATS, LIMIT_32, check_cores, check_dtypes, check_row_length, check_together, name_of
from .define import device_for, launch, triton_op

TAPS = range(2, 9)
LONGEST_STATE = 16

# -------------------------------------------------------------------- ops


@triton_op(
    "(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? cu_seqlens=None, Tensor(a!)? state=None, Tensor? slots=None, "
    "Tensor? has_state=None, bool from_state=True, str activation='identity', ScalarType? round_dtype=None, ScalarType? out_dtype=None, "
    "int cores) -> Tensor"
)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    slots: Tensor | None = None,
    has_state: Tensor | None = None,
    from_state: bool = True,
    activation: str = "identity",
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    """Depthwise convolution along the tokens, each channel with its own filter, in one launch; contiguous result.

        y[t, c] = activation(bias[c] + sum over i < W of weight[c, i] * x[t - (W - 1) + i, c])

    An input before the first token is of the sequence's state, or zero. The state is replaced by the last inputs, which include those of
    the old one where the sequence is shorter than it.

    Args:
        x: [B, S, C], or with `cu_seqlens` [T, C]; fp16, bf16 or fp32. Channels or tokens lie side by side, so that the transposed view of a
            [B, C, S] does; what lies otherwise is copied first, on an NPU all but the former.
        weight: [C, W], a float dtype, W from 2 to 8; on an NPU fastest as the transposed view of a [W, C].
        bias: [C], a float dtype.
        cu_seqlens: [N + 1] int32 or int64, where sequences begin in x, rising from 0. Rows of y from the last on hold anything.
        state: [slots, L, C], a float dtype, W - 1 <= L <= 16, the last input last; replaced in place. On an NPU channels lie side by side.
            Without `slots` it is [B, L, C] ([N, L, C]). A sequence without tokens leaves it as it is.
        slots: [B] ([N]) int32 or int64, which state is a sequence's, all different; a sequence whose slot is below 0 is skipped: its y is
            zeros.
        has_state: [B] ([N]) bool, which sequences begin from their state; the others begin from zeros.
        from_state: whether all do, without `has_state`.
        activation: `identity` or `silu`.
        round_dtype: sums are rounded to it before the activation.
        out_dtype: of the result, by default that of x.
        cores: vector cores of the device.

    Rounding: fp32 inside, sums rounded where `round_dtype` says, one cast at the end; a state has its own dtype.

    Source: causal-conv1d (Dao-AILab) and its use in transformers' Mamba2 and Qwen3-Next, where a state is [slots, C, L] and the view
    `state.transpose(1, 2)` is what is asked for here; torch_npu's npu_fused_causal_conv1d.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a choice or a layout does not fit, an argument lacks the one that it belongs to, tensors lie on several
            devices, or there are 2^31 tokens or more.
    """
    op = "causal_conv1d"
    check_rank(op, 3 if cu_seqlens is None else 2, x=x)
    sequences: Size = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = out_dtype or x.dtype
    _check(op, x, weight, bias, state, slots, sequences, activation, dtype, cores)
    _check_sequences(op, x, cu_seqlens, state, has_state, sequences)
    y = x.new_empty(x.shape, dtype=dtype)
    _run(x, weight, bias, y, cu_seqlens, state, slots, has_state, from_state, activation, round_dtype, cores)
    return y


@causal_conv1d.fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    slots: Tensor | None = None,
    has_state: Tensor | None = None,
    from_state: bool = True,
    activation: str = "identity",
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    op = "causal_conv1d"
    check_rank(op, 3 if cu_seqlens is None else 2, x=x)
    sequences: Size = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = out_dtype or x.dtype
    _check(op, x, weight, bias, state, slots, sequences, activation, dtype, cores)
    _check_sequences(op, x, cu_seqlens, state, has_state, sequences)
    return x.new_empty(x.shape, dtype=dtype)


@triton_op(
    "(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias=None, *, Tensor? slots=None, str activation='identity', "
    "ScalarType? round_dtype=None, ScalarType? out_dtype=None, int cores) -> Tensor"
)
def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    activation: str = "identity",
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    """`causal_conv1d` of the next token of each sequence, or the next few, from their states, in one launch; contiguous result.

    Args:
        x: [B, C] (one token), or [B, S, C].
        state, weight, bias, slots, activation, round_dtype, out_dtype, cores: as in `causal_conv1d`.

    Rounding, Source: as in `causal_conv1d`.

    Raises:
        as `causal_conv1d`.
    """
    dtype = out_dtype or x.dtype
    _check("causal_conv1d_update", x, weight, bias, state, slots, x.shape[0], activation, dtype, cores)
    y = x.new_empty(x.shape, dtype=dtype)
    tokens = x.unsqueeze(1) if x.dim() == 2 else x
    _run(tokens, weight, bias, y, None, state, slots, None, True, activation, round_dtype, cores)
    return y


@causal_conv1d_update.fake
def _(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    activation: str = "identity",
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    dtype = out_dtype or x.dtype
    _check("causal_conv1d_update", x, weight, bias, state, slots, x.shape[0], activation, dtype, cores)
    return x.new_empty(x.shape, dtype=dtype)


# -------------------------------------------------------------------- checks


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    slots: Tensor | None,
    sequences: Size,
    activation: str,
    out_dtype: torch.dtype,
    cores: int,
) -> None:
    check_value(op, x.dim() in (2, 3), f"x must have 2 or 3 dimensions, not {x.dim()}")
    check_rank(op, 2, weight=weight)
    check_rank(op, 3, state=state)
    check_dtypes(op, FLOATS, x=x, weight=weight, bias=bias, state=state)
    check_value(op, out_dtype in FLOATS, f"out_dtype must be one of float16, bfloat16, float32, not {out_dtype}")
    check_index(op, slots=slots)
    check_together(op, x=x, weight=weight, bias=bias, state=state, slots=slots)
    check_cores(op, cores)
    check_choice(op, "activation", activation, ("identity", "silu"))
    channels, taps = x.shape[-1], weight.shape[1]
    check_row_length(op, "x", channels)
    check_value(op, not statically_known_true(x.numel() >= LIMIT_32 * channels), "there are 2^31 tokens or more")
    check_sizes(op, "weight", weight.shape, (channels, taps))
    wrong = statically_known_true(taps < TAPS[0]) or statically_known_true(taps > TAPS[-1])
    check_value(op, not wrong, f"weight must have {TAPS[0]} to {TAPS[-1]} taps, not {taps}")
    if bias is not None:
        check_sizes(op, "bias", bias.shape, (channels,))
    if slots is not None:
        check_value(op, state is not None, "slots needs state")
        check_sizes(op, "slots", slots.shape, (sequences,))
    if state is not None:
        length = state.shape[1]
        check_sizes(op, "state", state.shape, (state.shape[0] if slots is not None else sequences, length, channels))
        short = statically_known_true(length < taps - 1) or statically_known_true(length > LONGEST_STATE)
        check_value(op, not short, f"state must hold {taps} - 1 to {LONGEST_STATE} tokens, not {length}")
        strided = state.device.type == "npu" and statically_known_true(state.stride(2) != 1)
        check_value(op, not strided, "channels of state must lie side by side on an NPU")


def _check_sequences(
    op: str, x: Tensor, cu_seqlens: Tensor | None, state: Tensor | None, has_state: Tensor | None, sequences: Size
) -> None:
    """What belongs to the sequences of `causal_conv1d`."""
    check_rank(op, 1, cu_seqlens=cu_seqlens)
    check_index(op, cu_seqlens=cu_seqlens)
    check_together(op, x=x, cu_seqlens=cu_seqlens, has_state=has_state)
    check_value(op, not statically_known_true(sequences < 0), "cu_seqlens must have an element more than there are sequences")
    if has_state is not None:
        check_value(op, state is not None, "has_state needs state")
        check_type(op, has_state.dtype == torch.bool, f"has_state must be bool, not {has_state.dtype}")
        check_sizes(op, "has_state", has_state.shape, (sequences,))


# -------------------------------------------------------------------- launch


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    slots: Tensor | None,
    has_state: Tensor | None,
    from_state: bool,
    activation: str,
    round_dtype: torch.dtype | None,
    cores: int,
) -> None:
    """Launch the kernel for x [B, S, C], or [T, C] with `cu_seqlens`; y is contiguous."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if y.numel() == 0 or sequences == 0:
        return
    device, varlen = device_for(x, cores), cu_seqlens is not None
    x = _addressable(x, dense=device.kind == "npu")
    if device.kind == "npu":
        weight = weight.t().contiguous().t()
    tokens, channels = x.shape[-2:]
    plan = kernels.conv1d_launch(
        tokens,
        sequences,
        channels,
        weight.shape[1],
        device,
        length=None if state is None else state.shape[1],
        varlen=varlen,
        keep=from_state,
        weight_strides=(weight.stride(1), weight.stride(0)),
        dense=x.stride(-1) == 1,
        state_dense=state is None or state.stride(2) == 1,
        activation=activation,
        round_to=name_of(round_dtype),
    )
    tiles, all_tiles = kernels.conv1d_tiles(tokens, sequences, plan.constants["STEP"], varlen=varlen)
    state_strides = (0, 0, 0) if state is None else state.stride()
    launch(
        plan,
        x,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        starts_ptr=None if cu_seqlens is None else cu_seqlens.contiguous(),
        state_ptr=state,
        slots_ptr=None if slots is None else slots.contiguous(),
        kept_ptr=None if has_state is None else has_state.contiguous().view(torch.int8),
        tokens=tokens,
        sequences=sequences,
        tiles=tiles,
        all_tiles=all_tiles,
        x_batch=0 if varlen else x.stride(0),
        x_token=x.stride(-2),
        x_channel=x.stride(-1),
        state_slot=state_strides[0],
        state_token=state_strides[1],
        state_channel=state_strides[2],
    )


def _addressable(x: Tensor, *, dense: bool) -> Tensor:
    """x, or a copy where neither channels nor tokens (`dense`: channels) lie side by side, or what is in a tile lies too far apart."""
    token, channel = x.stride()[-2:]
    near = max(32 * token, x.shape[-1] * channel) < LIMIT_32
    return x if near and (channel == 1 or (token == 1 and not dense)) else x.contiguous()
