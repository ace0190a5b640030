"""Gated linear units: `glu`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..semantic import semantic_op
from ._common import (
    ACTIVATIONS,
    Size,
    broadcast_sizes,
    check_choice,
    check_floating,
    check_floating_dtype,
    check_min_rank,
    check_value,
    compute_dtype,
    known_different,
    stored_like,
)

LAYOUTS = ("halves", "swapped", "interleaved")


def _check_glu(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    layout: str,
    alpha: float,
    round_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> None:
    op = "glu"
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_choice(op, "layout", layout, LAYOUTS)
    check_value(op, activation == "silu" or alpha == 1.0, f"alpha belongs to silu, not to {activation}")
    check_floating(op, gate=gate, up=up)
    check_floating_dtype(op, "round_dtype", round_dtype)
    check_floating_dtype(op, "out_dtype", out_dtype)
    if up is None:
        check_min_rank(op, 1, gate=gate)
        check_value(op, not known_different(gate.shape[-1] % 2, 0), "a merged gate and up needs an even last dimension")
    else:
        broadcast_sizes(op, gate.shape, up.shape)


def _split(merged: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gate and up of one merged [..., 2I] tensor, as views."""
    if layout == "interleaved":
        return merged[..., 0::2], merged[..., 1::2]
    first, second = merged.chunk(2, dim=-1)
    return (first, second) if layout == "halves" else (second, first)


def _activate(gate: Tensor, activation: str, alpha: float) -> Tensor:
    return gate * torch.sigmoid(alpha * gate) if alpha != 1.0 else ACTIVATIONS[activation](gate)


@semantic_op(
    "glu",
    '(Tensor gate, Tensor? up, *, str activation="silu", str layout="halves", float alpha=1.0, float? gate_limit=None, '
    "float? up_limit=None, float up_offset=0.0, ScalarType? round_dtype=None, ScalarType? out_dtype=None) -> Tensor",
)
def glu(
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str = "silu",
    layout: str = "halves",
    alpha: float = 1.0,
    gate_limit: float | None = None,
    up_limit: float | None = None,
    up_offset: float = 0.0,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Gated linear unit: an activation of one tensor times another.

    Maths: `act(min(gate, gate_limit)) * (clamp(up, -up_limit, up_limit) + up_offset)`; `silu` is `g * sigmoid(alpha * g)`, `gelu` the
    erf form, `gelu_tanh` its tanh approximation, `relu2` the square of relu.

    Args:
        gate: [..., I], or, when `up` is None, the merged [..., 2I].
        up: a shape that broadcasts with `gate`, or None.
        activation: `silu`, `gelu`, `gelu_tanh`, `sigmoid`, `tanh`, `relu`, `relu2` or `identity`.
        layout: of a merged tensor: `halves` (gate first), `swapped` (up first), `interleaved` (gate at even, up at odd positions).
            It says nothing when `up` is given.
        alpha: slope inside silu's sigmoid; 1 for every other activation.
        gate_limit: upper limit of the gate, or None.
        up_limit: limit of the magnitude of up, or None.
        up_offset: added to up after clamping.
        round_dtype: dtype to which the activated gate is rounded before the product; None keeps the internal precision.
        out_dtype: dtype of the result; None is what the dtypes of `gate` and `up` promote to.

    Returns:
        [..., I] in `out_dtype`; stored in the order of `gate` where `gate` is not broadcast, otherwise contiguous, as is the result of
        a merged tensor.

    Rounding: fp32 inside (fp64 if an input is), the activated gate rounded to `round_dtype`, one cast at the end.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: an unknown activation or layout, shapes that do not broadcast, an odd merged dimension, alpha without silu.

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202; limits, alpha and offset: gpt-oss, https://github.com/openai/gpt-oss.
    """
    _check_glu(gate, up, activation, layout, alpha, round_dtype, out_dtype)
    like = gate
    dtype = out_dtype or (gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype))
    if up is None:
        gate, up = _split(gate, layout)
    compute = compute_dtype(gate, up)
    g, u = gate.to(compute), up.to(compute)
    if gate_limit is not None:
        g = g.clamp_max(gate_limit)
    if up_limit is not None:
        u = u.clamp(-up_limit, up_limit)
    if up_offset:
        u = u + up_offset
    activated = _activate(g, activation, alpha)
    if round_dtype is not None:
        activated = activated.to(round_dtype)
    result = (activated.to(compute) * u).to(dtype)
    return stored_like(result, like) if result.shape == like.shape else result.contiguous()


@glu.fake
def _(
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str = "silu",
    layout: str = "halves",
    alpha: float = 1.0,
    gate_limit: float | None = None,
    up_limit: float | None = None,
    up_offset: float = 0.0,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_glu(gate, up, activation, layout, alpha, round_dtype, out_dtype)
    if up is None:
        return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2), dtype=out_dtype)
    dtype = out_dtype or torch.promote_types(gate.dtype, up.dtype)
    sizes = broadcast_sizes("glu", gate.shape, up.shape)
    if _same_sizes(sizes, gate.shape):
        return torch.empty_like(gate, dtype=dtype)
    return gate.new_empty(sizes, dtype=dtype)


def _same_sizes(left: list[Size], right: torch.Size) -> bool:
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right))
