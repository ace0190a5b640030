"""Linear layers whose weights are integers with a scale, and whose activations are not quantised: `weight_only_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..semantic import semantic_op
from ._common import check_floating, check_min_rank, check_rank, check_same_dtype, check_sizes, check_type, check_value

_CODES = (torch.int8, torch.uint8)
_ZEROS = (*_CODES, torch.int16, torch.int32, torch.int64)
_WORDS = {torch.int32: 32, torch.uint8: 8, torch.int8: 8}


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    shifts: Sequence[int],
    packs_inputs: bool,
    plane: int,
) -> None:
    op = "weight_only_linear"
    check_floating(op, x=x, scale=scale, bias=bias)
    if zero is not None:
        check_type(op, zero.dtype in _ZEROS or zero.dtype.is_floating_point, f"zero must be an integer or floating, not {zero.dtype}")
    check_min_rank(op, 1, x=x)
    check_rank(op, 2, weight=weight, scale=scale, zero=zero)
    check_rank(op, 1, bias=bias)
    outputs, inputs = _check_weight(op, weight, shifts, packs_inputs, plane)
    check_sizes(op, "x", x.shape, (*x.shape[:-1], inputs))
    groups = scale.shape[1]
    check_sizes(op, "scale", scale.shape, (outputs, groups))
    whole = not isinstance(inputs, int) or not isinstance(groups, int) or (groups > 0 and inputs % groups == 0)
    check_value(op, whole, f"{groups} groups do not divide {inputs} inputs")
    if zero is not None:
        check_sizes(op, "zero", zero.shape, scale.shape)
    if bias is not None:
        check_same_dtype(op, x=x, bias=bias)
        check_sizes(op, "bias", bias.shape, (outputs,))


def _check_weight(op: str, weight: Tensor, shifts: Sequence[int], packs_inputs: bool, plane: int) -> tuple[int, int]:
    """Raise unless the weight is one of integers, or of words that are packed as said; its outputs and inputs."""
    if not shifts:
        check_type(op, weight.dtype in _CODES, f"weight must be int8 or uint8, not {weight.dtype}")
        return weight.shape[0], weight.shape[1]
    check_type(op, weight.dtype in _WORDS, f"packed weight must be int32, int8 or uint8, not {weight.dtype}")
    fits = sorted(shifts) == list(range(0, _WORDS[weight.dtype], 4))
    check_value(op, fits, f"shifts must name every nibble of {weight.dtype} once, not {list(shifts)}")
    outputs, inputs = weight.shape
    packed = inputs if packs_inputs else outputs
    whole = plane > 0 and (not isinstance(packed, int) or packed % plane == 0)
    check_value(op, whole, f"planes of {plane} words do not make up {packed} of them")
    return (outputs, inputs * len(shifts)) if packs_inputs else (outputs * len(shifts), inputs)


def unpack(weight: Tensor, shifts: Sequence[int], packs_inputs: bool = True, plane: int = 1, signed: bool = False) -> Tensor:
    """The nibbles of a weight, packed as `weight_only_linear` takes it, as int8 [N, K]."""
    words = weight if packs_inputs else weight.t()
    planes = words.unflatten(1, (-1, 1, plane))
    nibbles = (planes >> torch.tensor(shifts, dtype=words.dtype, device=words.device)[:, None]) & 15
    codes = nibbles.to(torch.int8).flatten(1)
    codes = (codes ^ 8) - 8 if signed else codes
    unpacked: Tensor = codes if packs_inputs else codes.t()
    return unpacked


def dequantised(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    dtype: torch.dtype,
    *,
    shifts: Sequence[int],
    packs_inputs: bool,
    plane: int,
    signed: bool,
    offset: int,
) -> Tensor:
    """The weight [N, K] that codes, scale and zero point stand for, computed in fp32 (fp64 if an operand is) and rounded to `dtype`."""
    wide = torch.float64 if torch.float64 in (dtype, scale.dtype) else torch.float32
    codes = unpack(weight, shifts, packs_inputs, plane, signed) if shifts else weight
    grouped = codes.to(wide).unflatten(1, (scale.shape[1], -1))
    if offset:
        grouped = grouped - offset
    if zero is not None:
        grouped = grouped - zero.to(wide)[..., None]
    matrix: Tensor = (grouped * scale.to(wide)[..., None]).flatten(1).to(dtype)
    return matrix


@semantic_op(
    "quant",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? zero=None, Tensor? bias=None, *, int[] shifts=[], bool packs_inputs=True, "
    "int plane=1, bool signed=False, int offset=0) -> Tensor",
)
def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    shifts: Sequence[int] = (),
    packs_inputs: bool = True,
    plane: int = 1,
    signed: bool = False,
    offset: int = 0,
) -> Tensor:
    """A linear layer with integer weights that are dequantised by a scale for each output channel, or each group of its inputs.

    Maths: `y = x @ ((code - offset - zero) * scale)^T + bias`, where the scale and zero of column k are those of group `k // (K / G)`.
    Where `shifts` is empty, `code` is the weight. Otherwise a word of the weight holds P = len(shifts) codes of four bits, of one row, or
    of one column if not `packs_inputs`: code b * P * plane + i * plane + j is `(word[b * plane + j] >> shifts[i]) & 15`, two's complement
    if `signed`. (AWQ: words [N / 8, K], shifts 0, 16, 4, 20, 8, 24, 12, 28. GPTQ: words [N, K / 8], shifts 0, 4, ..., 28. Pairs of
    nibbles: bytes [N, K / 2], shifts 0, 4 or 4, 0. Halves in planes, as HQQ has them: bytes [N / 2, K], plane N / 2.)

    Args:
        x: [..., K], floating point.
        weight: [N, K], int8 or uint8; packed int32 (P = 8), int8 or uint8 (P = 2), [N, K / P] or [N / P, K].
        scale: [N, G], floating point; G divides K, 1 is a scale for each output channel.
        zero: [N, G], an integer or floating point; None is 0.
        bias: [N] in the dtype of x, or None.
        shifts: where the codes of a word stand, in their order: every multiple of 4 below the word's bits, once.
        packs_inputs: whether the codes of a word are of one output, else of one input.
        plane: how many words lie between codes of one word.
        signed: whether packed codes are -8 to 7, else 0 to 15.
        offset: the part of the zero point that all have in common.

    Returns:
        [..., N] in the dtype of x.

    Rounding: the weight is dequantised in fp32 (fp64 for fp64), rounded once to the dtype of x, and multiplied as a matrix product of that
        dtype: accumulated in fp32, one cast at the end.

    Raises:
        TypeError: a dtype is none of those.
        ValueError: a rank, size or shift does not fit, or G does not divide K.

    Source: torchao's Int8WeightOnly; op-plugin doc npu_weight_quant_batchmatmul; AWQ, https://arxiv.org/abs/2306.00978; GPTQ,
        https://arxiv.org/abs/2210.17323.
    """
    _check(x, weight, scale, zero, bias, shifts, packs_inputs, plane)
    layout: dict[str, Any] = {"shifts": shifts, "packs_inputs": packs_inputs, "plane": plane, "signed": signed, "offset": offset}
    return torch.nn.functional.linear(x, dequantised(weight, scale, zero, x.dtype, **layout), bias).contiguous()


@weight_only_linear.fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    shifts: Sequence[int] = (),
    packs_inputs: bool = True,
    plane: int = 1,
    signed: bool = False,
    offset: int = 0,
) -> Tensor:
    _check(x, weight, scale, zero, bias, shifts, packs_inputs, plane)
    outputs = weight.shape[0] if packs_inputs or not shifts else weight.shape[0] * len(shifts)
    return x.new_empty((*x.shape[:-1], outputs))
