"""Mixture of experts: `moe_experts`, the sum of what a token's experts make of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..semantic import semantic_op
from ._common import (
    ACTIVATIONS,
    check_choice,
    check_floating,
    check_floating_dtype,
    check_index,
    check_rank,
    check_same_dtype,
    check_sizes,
    check_value,
)
from .glu import LAYOUTS, glu


def _check_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_up_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gated: bool,
    activation: str,
    layout: str,
    dtypes: tuple[torch.dtype | None, ...],
) -> None:
    op = "moe_experts"
    check_rank(op, 2, x=x, indices=indices, weights=weights, gate_up_bias=gate_up_bias, up_bias=up_bias, down_bias=down_bias)
    check_rank(op, 3, gate_up=gate_up, up=up, down=down)
    check_index(op, indices=indices)
    check_floating(op, x=x, weights=weights)
    matrices = {
        "x": x,
        "gate_up": gate_up,
        "up": up,
        "down": down,
        "gate_up_bias": gate_up_bias,
        "up_bias": up_bias,
        "down_bias": down_bias,
    }
    check_same_dtype(op, **{name: tensor for name, tensor in matrices.items() if tensor is not None})
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_choice(op, "layout", layout, LAYOUTS)
    for dtype in dtypes:
        check_floating_dtype(op, "a dtype", dtype)
    check_value(op, gated or up is None, "up belongs to gated experts")
    check_value(op, up is not None or up_bias is None, "up_bias belongs to up")
    experts, hidden, width = gate_up.shape
    merged = gated and up is None
    check_value(op, not (merged and statically_known_true(width % 2 != 0)), "a merged gate and up needs an even last dimension")
    check_sizes(op, "x", x.shape, (x.shape[0], hidden))
    check_sizes(op, "indices", indices.shape, (x.shape[0], indices.shape[1]))
    check_sizes(op, "weights", weights.shape, indices.shape)
    check_sizes(op, "down", down.shape, (experts, width // 2 if merged else width, down.shape[2]))
    for name, matrix, bias in (("gate_up_bias", gate_up, gate_up_bias), ("up_bias", up, up_bias), ("down_bias", down, down_bias)):
        if matrix is not None and bias is not None:
            check_sizes(op, name, bias.shape, (experts, matrix.shape[2]))
    if up is not None:
        check_sizes(op, "up", up.shape, gate_up.shape)


@dataclass(frozen=True)
class Routing:
    """The rows [T * k] of a routed layer in the order of their experts; those of no expert come last.

    Attributes:
        inside: [T, k], whether an id is that of an expert.
        order: [T * k], the flat id of each row.
        ends: [E], how many rows there are up to each expert.
        expert_of: [T * k], the expert of each row; of a row of none some other.
    """

    inside: Tensor
    order: Tensor
    ends: Tensor
    expert_of: Tensor

    @classmethod
    def of(cls, indices: Tensor, experts: int) -> Routing:
        inside = (indices >= 0) & (indices < experts)
        ordered, order = torch.sort(torch.where(inside, indices, experts).reshape(-1), stable=True)
        numbers = torch.arange(experts, device=indices.device, dtype=ordered.dtype)
        ends = torch.searchsorted(ordered, numbers, right=True)
        return cls(inside, order, ends, ordered.clamp_max(experts - 1))

    @property
    def token(self) -> Tensor:
        """[T * k], the token of each row."""
        return self.order // self.inside.shape[1]

    def summed(self, rows: Tensor, weights: Tensor, product_dtype: torch.dtype | None, out_dtype: torch.dtype) -> Tensor:
        """The weighted sum [T, N] of each token's rows [T * k, N], in fp32 (fp64 if an operand is); products are rounded if so asked."""
        results = torch.empty_like(rows).index_copy(0, self.order, rows).view(*self.inside.shape, -1)
        compute = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)
        products = results.masked_fill(~self.inside.unsqueeze(-1), 0).to(compute) * weights.to(compute).unsqueeze(-1)
        if product_dtype is not None:
            products = products.to(product_dtype)
        return products.to(compute).sum(1).to(out_dtype)


def grouped_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """x [S, K], rows sorted by expert, times the matrix [K, N] of each row's expert; rows of no expert hold anything."""
    if x.device.type == "cpu":
        y = x.new_zeros(x.shape[0], matrices.shape[2])
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                y[start:end] = x[start:end] @ matrices[expert]
            start = end
        return y
    if x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, matrices, offs=ends.to(torch.int32))
    rows = torch.arange(x.shape[0], device=x.device)
    expert_of = torch.searchsorted(ends, rows, right=True).clamp_max(matrices.shape[0] - 1)
    y = x @ matrices[0]
    for expert in range(1, matrices.shape[0]):
        y = torch.where((expert_of == expert).unsqueeze(-1), x @ matrices[expert], y)
    return y


@semantic_op(
    "moe",
    "(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor? up, Tensor down, *, Tensor? gate_up_bias=None, "
    'Tensor? up_bias=None, Tensor? down_bias=None, bool gated=True, str activation="silu", str layout="halves", float alpha=1.0, '
    "float? gate_limit=None, float? up_limit=None, float up_offset=0.0, ScalarType? round_dtype=None, "
    "ScalarType? product_dtype=None, ScalarType? out_dtype=None) -> Tensor",
)
def moe_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    activation: str = "silu",
    layout: str = "halves",
    alpha: float = 1.0,
    gate_limit: float | None = None,
    up_limit: float | None = None,
    up_offset: float = 0.0,
    round_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Routed experts: the weighted sum of what each token's experts make of it.

    Maths::

        y[t] = sum_j weights[t, j] * mlp(x[t], indices[t, j])
        mlp(v, e) = glu(v @ gate_up[e] + gate_up_bias[e]) @ down[e] + down_bias[e]

    With `up`, gate and up are two products: `act(v @ gate_up[e]) * (v @ up[e])`. With `gated=False` there is no up: `act(v @ gate_up[e])`.

    Args:
        x: [T, H].
        indices: [T, k] int32 or int64, experts from 0 to E - 1; another one (-1, say) adds nothing.
        weights: [T, k], of whatever floating dtype.
        gate_up: [E, H, 2I], or [E, H, I] with `up` or without gate; stored in any order, so that a transposed [E, 2I, H] is as good.
        up: [E, H, I], or None.
        down: [E, I, N].
        gate_up_bias, up_bias, down_bias: [E, 2I] ([E, I]), [E, I], [E, N], or None.
        gated: as above.
        activation, layout, alpha, gate_limit, up_limit, up_offset: of the gated unit, as in `glu`; without gate the activation alone.
        round_dtype: dtype to which the activated gate is rounded before the product with up; None keeps the internal precision.
        product_dtype: dtype to which each weighted product is rounded before the sum; None keeps the internal precision.
        out_dtype: dtype of the result; None is that of `x`.

    Returns:
        [T, N], contiguous.

    Rounding: the products of matrices, the sums with biases and the unit's result are rounded to the dtype of `x`, the weighted products
    to `product_dtype`; the sum is in fp32 (fp64 if `x` is) and is rounded once.

    Raises:
        TypeError: a dtype is not floating point, matrices and biases are not of the dtype of `x`, or indices are no integers.
        ValueError: an unknown activation or layout, or shapes that do not fit.

    Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Mixtral, https://arxiv.org/abs/2401.04088; biases and limits: gpt-oss,
    https://github.com/openai/gpt-oss; torch_npu's npu_moe_init_routing_v2, npu_grouped_matmul, npu_moe_finalize_routing.
    """
    dtypes = (round_dtype, product_dtype, out_dtype)
    _check_experts(x, indices, weights, gate_up, up, down, gate_up_bias, up_bias, down_bias, gated, activation, layout, dtypes)
    routing = Routing.of(indices, gate_up.shape[0])

    def linear(source: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        y = grouped_product(source, matrices, routing.ends)
        return y if bias is None else y + bias[routing.expert_of]

    chosen = x[routing.token]
    gate = linear(chosen, gate_up, gate_up_bias)
    if gated:
        other = None if up is None else linear(chosen, up, up_bias)
        limits = {"gate_limit": gate_limit, "up_limit": up_limit, "up_offset": up_offset}
        rounding = {"round_dtype": round_dtype, "out_dtype": x.dtype}
        hidden = glu.reference(gate, other, activation=activation, layout=layout, alpha=alpha, **limits, **rounding)
    else:
        hidden = ACTIVATIONS[activation](gate)
    return routing.summed(linear(hidden, down, down_bias), weights, product_dtype, out_dtype or x.dtype)


@moe_experts.fake
def _(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    activation: str = "silu",
    layout: str = "halves",
    round_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    **_: object,
) -> Tensor:
    dtypes = (round_dtype, product_dtype, out_dtype)
    _check_experts(x, indices, weights, gate_up, up, down, gate_up_bias, up_bias, down_bias, gated, activation, layout, dtypes)
    return x.new_empty((x.shape[0], down.shape[2]), dtype=out_dtype)
