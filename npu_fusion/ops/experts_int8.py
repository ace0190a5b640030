"""Mixture of experts in int8: `moe_experts_int8`, whose products are of quantised rows and int8 matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..semantic import semantic_op
from ._common import (
    check_choice,
    check_floating,
    check_floating_dtype,
    check_index,
    check_rank,
    check_sizes,
    check_type,
    check_value,
    compute_dtype,
)
from .experts import Routing
from .glu import LAYOUTS, glu
from .quant_core import QUANTIZE_SCHEMA, Quantization

_OP = "moe_experts_int8"
_UNIT_NAMES = ("activation", "layout", "alpha", "gate_limit", "up_limit", "up_offset", "round_dtype")
_DTYPES = ("sum_dtype", "hidden_dtype", "result_dtype", "product_dtype", "out_dtype")


def _taken(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The options of the unit, the dtypes, and the options of quantising."""
    unit = {name: options[name] for name in _UNIT_NAMES if name in options}
    dtypes = {name: options.get(name) for name in _DTYPES}
    quantising = {name: value for name, value in options.items() if name not in unit and name not in dtypes}
    return unit, dtypes, quantising


def _check(x: Tensor, indices: Tensor, weights: Tensor, matrices: dict[str, Tensor | None], options: dict[str, Any]) -> None:
    unit, dtypes, quantising = _taken(options)
    gate_up, up, down = matrices["gate_up"], matrices["up"], matrices["down"]
    assert gate_up is not None
    assert down is not None
    check_floating(_OP, x=x, weights=weights)
    check_index(_OP, indices=indices)
    check_rank(_OP, 2, x=x, indices=indices, weights=weights)
    check_choice(_OP, "layout", unit.get("layout", "halves"), LAYOUTS)
    for name, dtype in dtypes.items():
        check_floating_dtype(_OP, name, dtype)
    experts, hidden, width = gate_up.shape
    check_value(_OP, up is not None or not statically_known_true(width % 2 != 0), "a merged gate and up needs an even last dimension")
    for name in ("gate_up", "up", "down"):
        matrix, scale = matrices[name], matrices[f"{name}_scale"]
        check_value(_OP, (matrix is None) == (scale is None), f"{name} and {name}_scale go together")
        if matrix is not None and scale is not None:
            check_rank(_OP, 3, **{name: matrix})
            check_type(_OP, matrix.dtype == torch.int8, f"{name} must be int8, not {matrix.dtype}")
            check_floating(_OP, **{f"{name}_scale": scale})
            check_sizes(_OP, f"{name}_scale", scale.shape, (experts, matrix.shape[2]))
    check_sizes(_OP, "x", x.shape, (x.shape[0], hidden))
    check_sizes(_OP, "indices", indices.shape, (x.shape[0], indices.shape[1]))
    check_sizes(_OP, "weights", weights.shape, indices.shape)
    check_sizes(_OP, "down", down.shape, (experts, width if up is not None else width // 2, down.shape[2]))
    if up is not None:
        check_sizes(_OP, "up", up.shape, gate_up.shape)
    how = Quantization(**quantising)
    how.check(_OP, x)
    whole = how.stored == torch.int8 and how.symmetric and not how.per_tensor and how.smooth is None
    check_value(_OP, whole, "rows are quantised symmetrically, to int8, with a scale of their own and no smoothing vector")


@semantic_op(
    "moe",
    "(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor gate_up_scale, Tensor? up, Tensor? up_scale, Tensor down, "
    'Tensor down_scale, *, str activation="silu", str layout="halves", float alpha=1.0, float? gate_limit=None, float? up_limit=None, '
    "float up_offset=0.0, ScalarType? round_dtype=None, ScalarType? sum_dtype=None, ScalarType? hidden_dtype=None, "
    f"ScalarType? result_dtype=None, ScalarType? product_dtype=None, ScalarType? out_dtype=None, {QUANTIZE_SCHEMA}) -> Tensor",
)
def moe_experts_int8(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    up: Tensor | None,
    up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    **options: Any,
) -> Tensor:
    """Routed experts of int8 matrices: what enters a product is quantised, each row by a scale of its own.

    Maths::

        q, s = quantize(v)
        y[t] = sum_j weights[t, j] * mlp(x[t], indices[t, j])
        mlp(v, e) = linear(glu(linear(v, gate_up[e])), down[e])
        linear(v, W) = (q(v) @ W) * s(v) * scale of W's columns

    With `up`, gate and up are two products, as in `moe_experts`.

    Args:
        x: [T, H], floating point.
        indices: [T, k] int32 or int64, experts from 0 to E - 1; another one (-1, say) adds nothing.
        weights: [T, k], floating point.
        gate_up: int8 [E, H, 2I]; [E, H, I] with `up`; stored in any order. gate_up_scale: [E, 2I] or [E, I], floating point.
        up: int8 [E, H, I], or None. up_scale: [E, I], or None.
        down: int8 [E, I, N]. down_scale: [E, N].
        options: `activation`, `layout`, `alpha`, `gate_limit`, `up_limit`, `up_offset`, `round_dtype` as in `glu`; `sum_dtype`, to which
            the scaled sums are rounded for the unit (None: fp32); `hidden_dtype`, of its result (None: `sum_dtype`); `result_dtype`, to
            which the scaled sums of `down` are rounded (None: fp32); `product_dtype`, `out_dtype` as in `moe_experts`; and those of
            `quantize`, which hold for both products: they find a scale for each row, symmetrically: `smooth`, `smooth_divide`, `apply`,
            `symmetric`, `with_zero`, `per_tensor`, `steps`, `steps_reciprocal`, `floor_mode`, `floor`, `round_last`, `low`, `high`,
            `dtype`, `compute_dtype`, `scale_dtype`, `value_dtype`.

    Returns:
        [T, N] in `out_dtype` (None: that of x), contiguous.

    Rounding: sums of int8 products are exact; the scales multiply in fp32; then to `sum_dtype` or `result_dtype`; the unit and the
        weighted sum round as in `glu` and `moe_experts`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: an unknown choice, another kind of quantising, or shapes that do not fit.

    Source: SmoothQuant, https://arxiv.org/abs/2211.10438; torch_npu's npu_grouped_matmul_swiglu_quant_v2 and npu_grouped_matmul.
    """
    matrices = {"gate_up": gate_up, "gate_up_scale": gate_up_scale, "up": up, "up_scale": up_scale}
    _check(x, indices, weights, matrices | {"down": down, "down_scale": down_scale}, options)
    unit, dtypes, quantising = _taken(options)
    routing, how, compute = Routing.of(indices, gate_up.shape[0]), Quantization(**quantising), compute_dtype(x)

    def linear(q: Tensor, s: Tensor, matrix: Tensor, scale: Tensor, dtype: torch.dtype | None) -> Tensor:
        wide = _whole_grouped(q, matrix, routing.ends).to(compute) * s.to(compute) * scale.to(compute)[routing.expert_of]
        return wide.to(dtype or compute)

    q, s, _ = how.quantize(x)
    q, s = q[routing.token], s[routing.token]
    gate = linear(q, s, gate_up, gate_up_scale, dtypes["sum_dtype"])
    other = None if up is None or up_scale is None else linear(q, s, up, up_scale, dtypes["sum_dtype"])
    hidden = glu.reference(gate, other, **unit, out_dtype=dtypes["hidden_dtype"])
    q, s, _ = how.quantize(hidden)
    rows = linear(q, s, down, down_scale, dtypes["result_dtype"])
    return routing.summed(rows, weights, dtypes["product_dtype"], dtypes["out_dtype"] or x.dtype)


def _whole_grouped(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """x [S, K] int8, rows sorted by expert, times the int8 matrix [K, N] of each row's expert, in int32; rows of no expert hold anything.

    On a CPU expert by expert; elsewhere, where nothing may wait for the ends, all by all, in float64, which holds every sum.
    """
    if x.device.type == "cpu":
        y = torch.zeros(x.shape[0], matrices.shape[2], dtype=torch.int32)
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                y[start:end] = torch._int_mm(x[start:end], matrices[expert])
            start = end
        return y
    expert_of = torch.searchsorted(ends, torch.arange(x.shape[0], device=x.device), right=True).unsqueeze(-1)
    wide = x.double()
    y = wide @ matrices[0].double()
    for expert in range(1, matrices.shape[0]):
        y = torch.where(expert_of == expert, wide @ matrices[expert].double(), y)
    return y.to(torch.int32)


@moe_experts_int8.fake
def _(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    up: Tensor | None,
    up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    **options: Any,
) -> Tensor:
    matrices = {"gate_up": gate_up, "gate_up_scale": gate_up_scale, "up": up, "up_scale": up_scale}
    _check(x, indices, weights, matrices | {"down": down, "down_scale": down_scale}, options)
    return x.new_empty((x.shape[0], down.shape[2]), dtype=options.get("out_dtype"))
