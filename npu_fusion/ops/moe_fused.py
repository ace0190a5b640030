"""Collectives of MoE with what comes before or after them: `moe_combine_add_rms_norm`, `fused_deep_moe`; and `grouped_linear`.

What makes a collective is one itself: all ranks must make these calls in the same order. What no target has as one op is taken apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import torch_private
from ..semantic import semantic_op
from ._common import Size, check_floating, check_index, check_rank, check_same_dtype, check_sizes
from .experts import grouped_product
from .glu import glu
from .moe_collectives import keep_order_in_inductor, moe_combine, moe_dispatch
from .norm import add_rms_norm

_FAMILY = "moe"
LOOP = 64
"""Launches of a loop over experts: how many there are depends on the model, and is more than a fused op's in any."""


def _check_grouped(x: Tensor, weight: Tensor, counts: Tensor) -> None:
    op = "grouped_linear"
    check_rank(op, 2, x=x)
    check_rank(op, 3, weight=weight)
    check_rank(op, 1, counts=counts)
    check_floating(op, x=x)
    check_same_dtype(op, x=x, weight=weight)
    check_index(op, counts=counts)
    check_sizes(op, "weight", weight.shape, (counts.shape[0], x.shape[1], weight.shape[2]))


@semantic_op(_FAMILY, "(Tensor x, Tensor weight, Tensor counts) -> Tensor", launches=LOOP)
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows in the order of their groups, each times the matrix of its group.

    Maths: `y[a] = x[a] @ weight[g]` for the rows a of group g, of which there are `counts[g]`, those of group 0 first.

    Args:
        x: [A, K], floating point.
        weight: [G, K, N] in the dtype of x, stored in any order.
        counts: [G] int32 or int64, together at most A.

    Returns:
        [A, N] in the dtype of x; rows of no group have no meaning.

    Rounding: fp32 inside (fp64 if x is), rounded once.

    Raises:
        TypeError: dtypes that differ, or counts that are no integers.
        ValueError: shapes that do not fit.

    Source: torch._grouped_mm; torch_npu's npu_grouped_matmul with group_list_type 1.
    """
    _check_grouped(x, weight, counts)
    return grouped_product(x, weight, counts.cumsum(0))


@grouped_linear.fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    _check_grouped(x, weight, counts)
    return x.new_empty((x.shape[0], weight.shape[2]))


# -------------------------------------------------------------------- combine, residual sum and norm


@semantic_op(
    _FAMILY,
    "(Tensor x, Tensor ids, Tensor weights, Tensor handle, Tensor residual, Tensor? weight, float eps, Tensor? active=None, "
    "Tensor? placement=None, Tensor? shared=None, *, str group, int ranks, int experts, SymInt max_tokens, int weight_offset=0, "
    "bool norm_unrounded=False, ScalarType? sum_dtype=None, ScalarType? round_dtype=None, ScalarType? out_dtype=None) -> (Tensor, Tensor)",
    parts=("moe_combine", "add_rms_norm"),
    ordered=True,
)
def moe_combine_add_rms_norm(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    handle: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    active: Tensor | None = None,
    placement: Tensor | None = None,
    shared: Tensor | None = None,
    *,
    group: str,
    ranks: int,
    experts: int,
    max_tokens: int,
    weight_offset: int = 0,
    norm_unrounded: bool = False,
    sum_dtype: torch.dtype | None = None,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The experts' results come home, are added to the residual stream, and the sum is normalised: `moe_combine` and `add_rms_norm`.

    Maths: `s = residual + moe_combine(x, ...)`; `y = s / sqrt(mean(s^2, -1) + eps) * (weight_offset + weight)`.

    Args:
        x, ids, weights, handle, active, placement, shared, group, ranks, experts, max_tokens: as `moe_combine`.
        residual: [T, H], floating point.
        weight, eps, weight_offset, norm_unrounded, sum_dtype, round_dtype, out_dtype: as `add_rms_norm`.

    Returns:
        `y` and the sum, both [T, H], of the dtypes of `add_rms_norm`.

    Rounding: that of the two ops one after the other.

    Raises:
        TypeError, ValueError, CollectiveError: as the two.

    Source: torch_npu's npu_moe_distribute_combine_add_rms_norm.
    """
    form = {"group": group, "ranks": ranks, "experts": experts, "max_tokens": max_tokens}
    combined = moe_combine(x, ids, weights, handle, active, placement, shared, **form)
    rounding = {"norm_unrounded": norm_unrounded, "sum_dtype": sum_dtype, "round_dtype": round_dtype, "out_dtype": out_dtype}
    y, total = add_rms_norm(combined, residual, weight, eps, weight_offset=weight_offset, **rounding)
    return y, total


@moe_combine_add_rms_norm.fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    handle: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    active: Tensor | None = None,
    placement: Tensor | None = None,
    shared: Tensor | None = None,
    *,
    group: str,
    ranks: int,
    experts: int,
    max_tokens: Size,
    **norm: object,
) -> tuple[Tensor, Tensor]:
    _keep_order()
    form = {"group": group, "ranks": ranks, "experts": experts, "max_tokens": max_tokens}
    combined = moe_combine(x, ids, weights, handle, active, placement, shared, **form)
    y, total = add_rms_norm(combined, residual, weight, eps, **norm)
    return y, total


# -------------------------------------------------------------------- all of a layer's experts


@semantic_op(
    _FAMILY,
    "(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, Tensor? active=None, Tensor? placement=None, "
    "Tensor? shared=None, *, str group, int ranks, int experts, SymInt max_tokens, str activation='silu', str layout='halves', "
    "ScalarType? round_dtype=None) -> Tensor",
    parts=("moe_dispatch", "grouped_linear", "glu", "grouped_linear", "moe_combine"),
    ordered=True,
    launches=2 * LOOP,
)
def fused_deep_moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    active: Tensor | None = None,
    placement: Tensor | None = None,
    shared: Tensor | None = None,
    *,
    group: str,
    ranks: int,
    experts: int,
    max_tokens: int,
    activation: str = "silu",
    layout: str = "halves",
    round_dtype: torch.dtype | None = None,
) -> Tensor:
    """Expert-parallel experts as a whole: the way there, both grouped products with the gated unit between them, and the way home.

    Maths: `y[t] = shared[t] + sum over k of weights[t, k] * (glu(x[t] @ gate_up[e]) @ down[e])` with `e = ids[t, k]`, each computed on
    the rank that has e.

    Args:
        x, ids, weights, active, placement, group, ranks, experts, max_tokens: as `moe_dispatch`.
        gate_up: [L, H, 2I] in the dtype of x: this rank's experts, stored in any order.
        down: [L, I, H], likewise.
        shared: [T, H] in the dtype of x, added.
        activation, layout, round_dtype: as `glu`.

    Returns:
        [T, H] in the dtype of x.

    Rounding: that of the five ops one after the other.

    Raises:
        TypeError, ValueError, CollectiveError: as the five.

    Source: sgl-kernel-npu's deep_ep, `Buffer.fused_deep_moe`.
    """
    form = {"group": group, "ranks": ranks, "experts": experts, "max_tokens": max_tokens}
    rows, _, counts, handle = moe_dispatch(x, ids, weights, active, placement, **form)
    unit = {"activation": activation, "layout": layout, "round_dtype": round_dtype}
    hidden = glu(grouped_linear(rows, gate_up, counts), None, **unit)
    result: Tensor = moe_combine(grouped_linear(hidden, down, counts), ids, weights, handle, active, placement, shared, **form)
    return result


@fused_deep_moe.fake
def _(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    active: Tensor | None = None,
    placement: Tensor | None = None,
    shared: Tensor | None = None,
    *,
    ranks: int,
    experts: int,
    **_: object,
) -> Tensor:
    _keep_order()
    op, local = "fused_deep_moe", experts // ranks
    check_floating(op, x=x, weights=weights)
    check_index(op, ids=ids)
    check_rank(op, 2, x=x, ids=ids, weights=weights)
    check_rank(op, 3, gate_up=gate_up, down=down)
    check_same_dtype(op, x=x, gate_up=gate_up, down=down)
    check_sizes(op, "gate_up", gate_up.shape, (local, x.shape[1], gate_up.shape[2]))
    check_sizes(op, "down", down.shape, (local, gate_up.shape[2] // 2, x.shape[1]))
    return x.new_empty(x.shape)


for _op in (moe_combine_add_rms_norm, fused_deep_moe):
    torch_private.keep_in_graphs(_op.overload)
    torch_private.keep_order(_op.overload)


def _keep_order() -> None:
    keep_order_in_inductor(moe_combine_add_rms_norm, fused_deep_moe)
