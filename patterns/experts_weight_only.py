"""Routed experts whose matrices are four-bit numbers packed into words, unpacked and dequantised in front of their products.

    gate_up = (unpack(words) - zeros) * scales                        # [E, H, 2I], in any spelling that int4_linear.py reads
    grouped_mm(x[order // k], gate_up, ends) ...                      # or of matrices that are gathered by id

It starts from routed experts in floating point, whose matrices are read as those of a linear layer are: all outputs of all experts, one
below the other. So spellings do not matter here either.

Sources: AutoAWQ's and AutoGPTQ's layers, stacked by expert.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.experts_weight_only import moe_experts_weight_only
from npu_fusion.packed import Packed
from npu_fusion.pattern import any_of, bits, sem
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value

from .int4_linear import Prefixed, Weight, check_subtraction, dequantised, weight_of

_UNIT = ("activation", "layout", "alpha", "gate_limit", "up_limit", "up_offset", "round_dtype", "product_dtype", "out_dtype")

_gate_up, _up, _down = (dequantised(f"{name}.") for name in ("gate_up", "up", "down"))
experts = any_of(sem("moe_experts", gate_up=_gate_up, up=None, down=_down), sem("moe_experts", gate_up=_gate_up, up=_up, down=_down))


def _matrices(m: Match) -> dict[str, Prefixed]:
    return {name: Prefixed(m, name) for name in ("gate_up", "up", "down") if f"{name}.operand" in m}


def _layout(packed: Packed) -> tuple[Any, ...]:
    return packed.shifts, packed.packs_inputs, packed.plane, packed.signed, packed.offset


def check_experts_weight_only(m: Match) -> Reject | None:
    """All matrices are nibbles of words, packed in one way, with scales and zero points by groups of each output's inputs."""
    form, site = m.form("experts"), m["experts"]
    if not form.args.get("gated", True) or any(form.args.get(f"{name}_bias") is not None for name in ("gate_up", "up", "down")):
        return Reject("the experts have biases, or no gate", site)
    x: Value = form.args["x"]
    layouts = set()
    for name, matrix in _matrices(m).items():
        weight, scale = matrix["dequantised"], matrix["scale"]
        if not bits(scale.dtype) or bits(weight.dtype) < bits(x.dtype):
            return Reject(f"{name} is dequantised in a narrower type than the activations have", weight)
        if m.exact and weight.dtype not in (x.dtype, torch.float32):
            return Reject("rounding='exact': the matrices are rounded to another type than that of the activations", weight)
        if "zero" in matrix and (wrong := check_subtraction(matrix)) is not None:
            return wrong
        found = weight_of(matrix)
        if found is None or matrix["operand"].ndim != 3:
            return Reject(f"{name} is not one nibble of a word each, or scales and zero points do not go by groups of inputs", scale)
        layouts.add(_layout(found.packed))
    return Reject("the matrices are packed in several ways", site) if len(layouts) > 1 else None


def _arguments(m: Match, name: str, weight: Weight) -> dict[str, Value | None]:
    canon, count = m.view.canon, m[f"{name}.operand"].shape[0]

    def stacked(rows: Value) -> Value:
        """[E, n, ...] of the rows of all experts."""
        return canon.reshape(rows, (count, rows.shape[0] // count, *rows.shape[1:]))

    zero = None if weight.zero is None else stacked(weight.zero)
    return {name: stacked(weight.packed.words), f"{name}_scale": stacked(weight.scale), f"{name}_zero": zero}


def rewrite_experts_weight_only(m: Match) -> Call:
    form = m.form("experts")
    args = {name: form.args[name] for name in ("x", "indices", "weights", *_UNIT) if name in form.args}
    args |= dict.fromkeys(("up", "up_scale", "up_zero"))
    weight = None
    for name, matrix in _matrices(m).items():
        weight = weight_of(matrix)
        assert weight is not None
        args |= _arguments(m, name, weight)
    assert weight is not None
    args |= dict(zip(("shifts", "packs_inputs", "plane", "signed", "offset"), _layout(weight.packed), strict=True))
    return Call(moe_experts_weight_only, args, [m["experts"]])


MOE_EXPERTS_WEIGHT_ONLY = Rule(
    "moe_experts_weight_only",
    pattern=experts.as_("experts"),
    check=check_experts_weight_only,
    rewrite=rewrite_experts_weight_only,
    produces="moe_experts_weight_only",
    idioms={"dequantize": "experts"},
)

register_builtin(MOE_EXPERTS_WEIGHT_ONLY)
