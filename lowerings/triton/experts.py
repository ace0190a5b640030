"""Routed experts by Triton and cuBLAS/CUTLASS: sorted rows, torch's grouped product, the unit, grouped product, weighted sum.

Nothing waits for the device and no size depends on the routing: a graph capture holds it. Rows keep their number T * k whatever the routing
is; those of no expert lie behind the last group, hold anything, and add nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...lower import Arguments, Builder
from ...view.shapes import known_equal, to_dim
from .checks import FLOATS
from .glu import glu
from .permute import MOST_CHOSEN, MOST_EXPERTS, moe_permute, moe_unpermute
from .provide import provides, require_width

aten = torch.ops.aten

_ALIGNED = 8  # bfloat16 numbers of 16 bytes: rows of a grouped product start there
_ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "silu": (aten.silu.default,),
    "sigmoid": (aten.sigmoid.default,),
    "tanh": (aten.tanh.default,),
    "gelu": (aten.gelu.default,),
    "relu": (aten.relu.default,),
    "relu2": (aten.relu.default, aten.square.default),
    "identity": (),
}


def require_matrices(b: Builder, **matrices: Node | None) -> None:
    """Refuse matrices [E, K, N] that a grouped product cannot read: sizes known and aligned, rows or columns packed."""
    for name, node in matrices.items():
        if node is None:
            continue
        val = b.val(node)
        sizes = [to_dim(size) for size in val.shape]
        b.require(all(isinstance(size, int) for size in sizes), f"the sizes of {name} are symbolic")
        b.require(
            all(size % _ALIGNED == 0 for size in sizes[1:]), f"{name} has rows of {sizes[1]} and {sizes[2]}, not multiples of {_ALIGNED}"
        )
        strides = [to_dim(stride) for stride in val.stride()[1:]]
        packed = any(known_equal(strides[i], 1) and isinstance(strides[1 - i], int) and strides[1 - i] % _ALIGNED == 0 for i in (0, 1))
        b.require(packed, f"{name} has neither packed rows nor packed columns")


@provides("moe_experts", "triton.moe_permute + aten._grouped_mm + triton.moe_unpermute", launches=5)
def _moe_experts(b: Builder, a: Arguments, cores: int) -> Node:
    x, experts, k = a.x, to_dim(b.val(a.gate_up).shape[0]), to_dim(b.val(a.indices).shape[1])
    b.require(b.val(x).dtype == torch.bfloat16, f"x is {b.val(x).dtype}, and torch's grouped product is for bfloat16")
    require_width(b, x=x, indices=a.indices)
    require_matrices(b, gate_up=a.gate_up, up=a.up, down=a.down)
    fits = isinstance(experts, int) and isinstance(k, int) and experts <= MOST_EXPERTS and k <= MOST_CHOSEN
    b.require(fits, f"{k} of {experts} experts: it chooses {MOST_CHOSEN} of {MOST_EXPERTS} at most")
    out_dtype = a.out_dtype or b.val(x).dtype
    for name, dtype in {"weights": b.val(a.weights).dtype, "product_dtype": a.product_dtype, "out_dtype": out_dtype}.items():
        b.require(dtype is None or dtype in FLOATS, f"{name} is {dtype}")
    sort = b.emit(moe_permute.overload, x, a.indices, experts, zero_unused=False, group_list="sums", group_dtype=torch.int32, cores=cores)
    rows, _, places, source, ends = b.results(sort, 5)
    row_experts = _row_experts(b, a, source) if a.gate_up_bias is not None else None

    def product(source: Node, matrices: Node, bias: Node | None) -> Node:
        y = b.emit(aten._grouped_mm.default, source, matrices, ends)
        return y if bias is None else b.emit(aten.add.Tensor, y, b.emit(aten.index.Tensor, bias, [row_experts]))

    gate = product(rows, a.gate_up, a.gate_up_bias)
    hidden = _unit(b, a, gate, None if a.up is None else product(rows, a.up, a.up_bias), cores)
    result = b.emit(aten._grouped_mm.default, hidden, a.down, ends)
    rounded = a.product_dtype if b.config.rounding == "exact" else None
    biased = {} if a.down_bias is None else {"bias": a.down_bias, "expert_ids": a.indices}
    b.require(
        not biased or b.config.rounding != "exact", "it keeps the sum with the bias in fp32, the model rounds it: rounding is 'exact'"
    )
    return b.emit(moe_unpermute.overload, result, places, a.weights, **biased, round_dtype=rounded, out_dtype=out_dtype, cores=cores)


def _row_experts(b: Builder, a: Arguments, source: Node) -> Node:
    """The expert of each sorted row; of a row of no expert, some expert."""
    ids = b.emit(aten.index.Tensor, b.reshape(a.indices, [-1]), [source])
    return b.emit(aten.clamp.default, ids, 0, to_dim(b.val(a.gate_up).shape[0]) - 1)


def _unit(b: Builder, a: Arguments, gate: Node, up: Node | None, cores: int) -> Node:
    form = {"activation": a.activation, "layout": a.layout, "alpha": a.alpha}
    limits = {"gate_limit": a.gate_limit, "up_limit": a.up_limit, "up_offset": a.up_offset}
    rounds = a.round_dtype if b.config.rounding == "exact" else None
    if a.gated:
        return b.emit(glu.overload, gate, up, **form, **limits, round_dtype=rounds, out_dtype=b.val(gate).dtype, cores=cores)
    b.require(a.activation in _ACTIVATIONS or a.activation == "gelu_tanh", f"the activation is {a.activation}")
    if a.activation == "gelu_tanh":
        return b.emit(aten.gelu.default, gate, approximate="tanh")
    for function in _ACTIVATIONS[a.activation]:
        gate = b.emit(function, gate)
    return gate
