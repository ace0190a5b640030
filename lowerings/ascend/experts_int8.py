"""Routed experts in int8 on Ascend: rows are quantised on their way to the experts, products scaled by row and by channel.

    npu_moe_init_routing_v2 (quant_mode 1) -> npu_grouped_matmul (int32) -> npu_dequant_swiglu_quant (group_index) -> npu_grouped_matmul
    (scale, per_token_scale) -> npu_moe_finalize_routing

These are the calls of vLLM's and SGLang's Ascend backends. They read the model's matrices as they are, stored by inputs or by outputs.
`npu_grouped_matmul_swiglu_quant_v2` would make one launch of the second and third, but takes int8 matrices in the format FRACTAL_NZ alone.
Other units than silu of halves are computed of scaled sums, and quantised by npu_dynamic_quant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...lower import Arguments, Builder
from ...prepare import prepared
from ...view.shapes import to_dim
from .experts import of_experts, routed, summed, unit_of
from .provide import Npu, keeps_rounding, provides
from .quant import CODES, require_dynamic, require_small_floor

_HALVES = (torch.float16, torch.bfloat16)
_DYNAMIC = 1


def _require_layer(b: Builder, a: Arguments) -> None:
    """Refuse what no provider here takes."""
    dtype = b.val(a.x).dtype
    b.require(dtype in _HALVES, f"x is {dtype}: npu_grouped_matmul gives float16 and bfloat16")
    require_dynamic(b, a)
    require_small_floor(b, a)
    b.require(a.smooth is None, "the model smooths what enters both products")
    keeps_rounding(b, None, a.product_dtype if a.product_dtype in _HALVES else None, "the weighted products")
    for name in ("gate_up", "up", "down"):
        if (matrix := getattr(a, name)) is not None:
            stride = [to_dim(step) for step in b.val(matrix).stride()]
            b.require(stride[1] == 1 or stride[2] == 1, f"{name} has neither packed rows nor packed columns")


def _grouped(b: Builder, npu: Npu, rows: Node, matrices: Node, counts: Node, out: torch.dtype, *scales: Node) -> Node:
    """Rows times the matrices of their experts: the sums in int32, or scaled by channel and by row in fp32 and rounded once."""
    given: dict[str, Any] = {}
    if scales:
        of_channels, of_rows = scales
        given = {"scale": [_wide(b, of_channels)], "per_token_scale": [of_rows]}
    groups = {"group_list": counts, "group_list_type": 1, "group_type": 0, "split_item": 2, "output_dtype": CODES[out]}
    return b.results(npu("npu::npu_grouped_matmul", [rows], [matrices], **given, **groups), 1)[0]


def _wide(b: Builder, scale: Node) -> Node:
    """Scales of channels as the ops read them: contiguous fp32."""
    wide = b.contiguous(b.cast(scale, torch.float32))
    return wide if wide is scale else prepared(wide)


def _narrow(b: Builder, a: Arguments, dtype: torch.dtype | None, what: str) -> torch.dtype:
    """The type in which scaled sums come: that to which the model rounds them, which must be one of 16 bits."""
    if dtype not in _HALVES:
        b.refuse(f"npu_grouped_matmul rounds {what} to 16 bits, the model keeps {dtype or torch.float32}")
    return dtype


def _routed(b: Builder, a: Arguments, npu: Npu) -> tuple[Any, Node]:
    """Quantised rows by expert, their places, the counts and the scales; and the weights."""
    experts = to_dim(b.val(a.gate_up).shape[0])
    b.require(isinstance(experts, int), "the number of experts is symbolic")
    ids, weights = of_experts(b, a.indices, a.weights, experts)
    return routed(b, npu, a.x, ids, experts, _DYNAMIC), weights


_SUMMED = "init_routing_v2, dequant_swiglu_quant, finalize_routing"


@provides("moe_experts_int8", "npu::npu_grouped_matmul", name=f"npu.npu_grouped_matmul ({_SUMMED})", launches=5)
def swiglu_of_sums(b: Builder, a: Arguments, npu: Npu) -> Node:
    """silu of one half of gate_up's sums times the other, quantised: one launch, in fp32."""
    b.only_if(a.up is None)
    _require_layer(b, a)
    plain = (a.activation, a.alpha, a.gate_limit, a.up_limit, a.up_offset) == ("silu", 1.0, None, None, 0.0)
    b.require(plain, "its unit is silu without limits, slope or offset")
    b.require(a.layout != "interleaved", "it takes halves, the model interleaves gate and up")
    a.sum_dtype, a.hidden_dtype, a.round_dtype  # noqa: B018  it keeps fp32 from the sums to the quotient
    out = _narrow(b, a, a.result_dtype, "the results")
    (rows, places, counts, scale), weights = _routed(b, a, npu)
    sums = _grouped(b, npu, rows, a.gate_up, counts, torch.int32)
    unit = {"weight_scale": _wide(b, a.gate_up_scale), "activation_scale": scale, "group_index": counts}
    hidden, scale = npu("npu::npu_dequant_swiglu_quant", sums, **unit, activate_left=a.layout == "halves", quant_mode=_DYNAMIC)
    results = _grouped(b, npu, hidden, a.down, counts, out, a.down_scale, scale)
    return summed(b, a, npu, results, weights, places)


@provides(
    "moe_experts_int8",
    "npu::npu_grouped_matmul",
    rank=1,
    name="npu.npu_grouped_matmul (init_routing_v2, the unit, dynamic_quant, finalize_routing)",
    launches=6,
)
def unit_of_scaled_sums(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Any unit: of scaled sums, rounded to 16 bits as the model rounds them; its result is quantised by rows."""
    _require_layer(b, a)
    inner = _narrow(b, a, a.sum_dtype, "what the unit gets")
    out = _narrow(b, a, a.result_dtype, "the results")
    keeps_rounding(b, inner, a.hidden_dtype or inner, "the unit's result")
    (rows, places, counts, scale), weights = _routed(b, a, npu)
    gate = _grouped(b, npu, rows, a.gate_up, counts, inner, a.gate_up_scale, scale)
    up = None if a.up is None else _grouped(b, npu, rows, a.up, counts, inner, a.up_scale, scale)
    hidden, scale = npu("npu::npu_dynamic_quant", b.contiguous(unit_of(b, a, npu, gate, up)))
    results = _grouped(b, npu, hidden, a.down, counts, out, a.down_scale, scale)
    return summed(b, a, npu, results, weights, places)
