"""Routed experts in int8 by gathered matrices: each quantised row times copies of the int8 matrices of its experts, in floating point.

    q, s = quantize(x)
    h = bmm(q[:, None].float(), gate_up[ids].float()) * s * gate_up_scale[ids]
    q, s = quantize(act(h))
    y = bmm(q[:, None].float(), down[ids].float()) * s * down_scale[ids]

and the weighted sum of experts_gathered.py, by the names of dimensions of which it is found how they come together.

Sources: SmoothQuant; transformers' integrations/moe.py (batched_mm).
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.experts_int8 import moe_experts_int8
from npu_fusion.pattern import Pattern, any_of, anything, bits, op, opt_cast, opt_upcast, prod, sem, sum_, through, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Form, Value
from npu_fusion.view.shapes import known_equal, product
from npu_fusion.view.value import Dim

from .axes import Axes, AxisNames, names_of
from .experts import at, unit_arguments
from .experts_gathered import leading
from .experts_int8 import CARRIERS, found_scale, how_quantised, plain_quantising
from .experts_parts import base_of

_VIEWS = ("reshape", "permute", "expand")
_KEEPING = (*_VIEWS, "cast")


def scaled(rows: Pattern, matrices: str) -> Pattern:
    """Rows of whole numbers times the chosen matrices, times the scales of rows and of the chosen channels."""
    rows = through(_KEEPING, rows)
    chosen = through(_KEEPING, at(var(matrices), var("ids")).as_(f"chosen_{matrices}"))
    sums = any_of(op("matmul", rows, chosen), op("matmul", chosen, rows)).as_(f"{matrices}_sums")
    of_channels = through(_KEEPING, at(var(f"{matrices}_scale"), var("ids")).as_(f"chosen_{matrices}_scale"))
    return opt_cast(prod(through(_KEEPING, sums), anything().as_(f"{matrices}_rows"), of_channels))


first = scaled(sem("quantize").as_("quantised_tokens"), "gate_up").as_("first")
unit = sem("glu", gate=first, up=None).as_("unit")
hidden = sem("quantize", x=opt_upcast(through(_VIEWS, unit))).as_("quantised_hidden")
results = scaled(hidden, "down").as_("results")
weighted = opt_cast((opt_cast(through(_VIEWS, results)) * anything().as_("factor")).as_("products"))
summed = sum_(opt_cast(through(_VIEWS, weighted))).as_("sum")

# -------------------------------------------------------------------- what is computed


class _Reading:
    """Follows the names of dimensions (t token, k choice, h hidden, i inner, n output) through a match."""

    def __init__(self, m: Match) -> None:
        self.m = m
        self.tokens_form, self.hidden_form = m.form("quantised_tokens"), m.form("quantised_hidden")
        self.x, self.ids, self.weights = base_of(self.tokens_form.args["x"]), base_of(m["ids"]), base_of(m["factor"])
        self.turned: set[str] = set()
        self.leaves: dict[Value, Axes] = {}
        self.sizes: dict[str, Dim] = {}

    def fits(self) -> bool:
        """Whether what the match computes is the weighted sum of routed experts."""
        if min(self.x.ndim, self.ids.ndim, self.weights.ndim) < 2:
            return False
        lead = max((leading(base.shape[:-1]) for base in (self.x, self.ids)), key=len)
        tokens = tuple(f"t{place}" for place in range(len(lead)))
        self.sizes = {**dict(zip(tokens, lead, strict=True)), "h": self.x.shape[-1], "k": self.ids.shape[-1]}
        pairs = (*tokens, "k") if not known_equal(self.sizes["k"], 1) else tokens
        for base, names in ((self.x, (*tokens, "h")), (self.ids, pairs), (self.weights, pairs)):
            axes = AxisNames({}, self.sizes).regrouped(names, base.shape)
            if axes is None:
                return False
            self.leaves[base] = axes
        merged = self._projection("gate_up", "first", self.tokens_form, "h", "o")
        if merged is None or names_of(merged) != (*pairs, "o") or merged[-1] != ("o",) or self.m["unit"].ndim != len(merged):
            return False
        self.sizes["i"] = self.m["unit"].shape[-1]
        self.leaves[self.m["unit"]] = (*merged[:-1], ("i",))
        out = self._projection("down", "results", self.hidden_form, "i", "n")
        if out is None or sorted(names_of(out)) != sorted((*pairs, "n")):
            return False
        self.leaves[self.m["results"]] = out
        total = self._axes(self.m["sum"])
        return total is not None and names_of(total) == (*tokens, "n")

    def _axes(self, value: Value, leaves: dict[Value, Axes] | None = None, sizes: dict[str, Dim] | None = None) -> Axes | None:
        named = AxisNames(self.leaves if leaves is None else leaves, sizes or self.sizes)
        axes = named.of(value)
        self.sizes |= named.broadcast
        return axes

    def _projection(self, name: str, end: str, form: Form, inner: str, outer: str) -> Axes | None:
        """The axes of scaled sums, whose rows, matrices and scales come together as they must; notes how the matrices are stored."""
        rows, ids, scale = self._axes(form.args["x"]), self._axes(self.m["ids"]), form.match.call.outputs[1]
        stored, of_channels = self.m[name], self.m[f"{name}_scale"]
        quantised = self.m["quantised_tokens" if name == "gate_up" else "quantised_hidden"]
        if rows is None or ids is None or scale is None or rows[-1] != (inner,) or stored.ndim != 3 or of_channels.ndim not in (2, 3):
            return None
        known = {**self.leaves, quantised: rows, scale: (*rows[:-1], ())}
        for names in ((outer, inner), (inner, outer)):
            width = stored.shape[1 + names.index(outer)]
            if not known_equal(stored.shape[1 + names.index(inner)], self.sizes[inner]):
                continue
            kept = [size for size in of_channels.shape[1:] if not known_equal(size, 1)]
            if len(kept) != 1 or not known_equal(kept[0], width) or not known_equal(of_channels.shape[0], stored.shape[0]):
                continue
            spread = tuple((outer,) if known_equal(size, width) else () for size in of_channels.shape[1:])
            chosen = {self.m[f"chosen_{name}"]: (*ids, *((axis,) for axis in names)), self.m[f"chosen_{name}_scale"]: (*ids, *spread)}
            axes = self._axes(self.m[end], {**known, **chosen}, {**self.sizes, outer: width})
            if axes is not None and inner not in names_of(axes):
                self.sizes[outer] = width
                if names[0] == outer:
                    self.turned.add(name)
                return axes
        return None


def _carries(value: Value) -> bool:
    """Whether a cast keeps whole numbers of a byte, or floating numbers of 16 bits and more."""
    before, after = value.args[0].dtype, value.dtype
    if bits(after) >= 16:
        return True
    quantised = value.form("quantize") is not None or base_of(value.args[0]).form("quantize") is not None
    return after in CARRIERS and (quantised or (before in CARRIERS and not bits(before) and after.itemsize >= before.itemsize))


def _scale_of_rows(m: Match, name: str, form: Form) -> bool:
    scale: Value = m[f"{name}_rows"]
    while scale.op in _KEEPING:
        if scale.op == "cast" and bits(scale.dtype) < bits(scale.args[0].dtype):
            return False
        scale = scale.args[0]
    return scale is found_scale(form)


def check_gathered_int8(m: Match) -> Reject | None:
    """The names of the dimensions come together as those of routed experts, every scale is of its own rows or channels."""
    site, reading = m["results"], _Reading(m)
    if m.exact:
        return Reject("rounding='exact': the model rounds sums and scales step by step", site)
    if any(value.op == "cast" and not _carries(value) for value in m.visited):
        return Reject("whole numbers go through a type that does not hold them all", site)
    for name, form in (("gate_up", reading.tokens_form), ("down", reading.hidden_form)):
        if m[name].dtype is not torch.int8 or not bits(m[f"{name}_scale"].dtype):
            return Reject("the matrices are not int8, or their scales not floating point", m[name])
        if not (bits(m[f"{name}_sums"].dtype) or m[f"{name}_sums"].dtype in (torch.int32, torch.int64)):
            return Reject(f"sums of products may wrap in {m[f'{name}_sums'].dtype}", m[f"{name}_sums"])
        if not _scale_of_rows(m, name, form):
            return Reject("the scale of the rows is not that by which they were quantised", m[f"{name}_rows"])
    if (wrong := plain_quantising(reading.tokens_form, reading.hidden_form, site)) is not None:
        return wrong
    return None if reading.fits() else Reject("the products are not those of each token with the matrices of its experts", site, 1)


def rewrite_gathered_int8(m: Match) -> Call:
    canon, reading = m.view.canon, _Reading(m)
    assert reading.fits()
    x, ids, weights = reading.x, reading.ids, reading.weights
    pairs = (product(x.shape[:-1]), ids.shape[-1])
    args: dict[str, Any] = {
        "x": canon.reshape(x, (pairs[0], x.shape[-1])),
        "indices": canon.reshape(ids, pairs),
        "weights": canon.reshape(weights, pairs),
        "up": None,
        "up_scale": None,
        "product_dtype": m["products"].dtype,
        "out_dtype": m.root.dtype,
        "hidden_dtype": m["unit"].dtype,
        **how_quantised(reading.tokens_form),
        **unit_arguments(m),
    }
    for name, end, kind in (("gate_up", "first", "sum_dtype"), ("down", "results", "result_dtype")):
        matrices = canon.permute(m[name], (0, 2, 1)) if name in reading.turned else m[name]
        args |= {name: matrices, f"{name}_scale": canon.reshape(m[f"{name}_scale"], (matrices.shape[0], matrices.shape[2]))}
        floating = [value.dtype for value in (m[f"{name}_sums"], m[end]) if bits(value.dtype)]
        args[kind] = min(floating, key=bits)
    return Call(moe_experts_int8, args, [canon.reshape(m.root, (pairs[0], args["down"].shape[2]))])


GATHERED_EXPERTS_INT8 = Rule(
    "gathered_experts_int8",
    pattern=opt_cast(any_of(op("reshape", opt_cast(summed)), summed)),
    check=check_gathered_int8,
    rewrite=rewrite_gathered_int8,
    produces="moe_experts_int8",
    idioms={"experts": "results", "dequantize": "first"},
)

register_builtin(GATHERED_EXPERTS_INT8)
