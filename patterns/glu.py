"""Gated linear units: an activation of one tensor times another, from SwiGLU and GeGLU to the output gates of attention.

Gate and up may come from one merged projection or from two, in either order of the product; clamps on both (DeepSeek-V4) and the offset on
up (gpt-oss) are part of the unit. A product with a narrower factor (a router's weight, a per-token gate) is not one, nor is an activation
times a function of its own input.

Sources: Shazeer 2020, https://arxiv.org/abs/2002.05202; transformers' model code for the spellings.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.glu import glu
from npu_fusion.pattern import any_of, anything, bits, lit, op, opt_cast, opt_round, opt_upcast, prod, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.shapes import known_equal, same_shape
from npu_fusion.view.value import Shape

from .activation import activation, activation_of, other_activation, slope, source_of, why_not

gate = opt_upcast(any_of(op("clamp", opt_upcast(var("gate")), lit("gate_limit"), low=False, high=True), var("gate")))
clamped_up = any_of(op("clamp", opt_upcast(var("up")), lit("up_low"), lit("up_high"), low=True, high=True), var("up"))
up = opt_cast(any_of(opt_cast(clamped_up) + lit("up_offset"), clamped_up)).as_("up_factor")

product = any_of(
    prod(gate, slope(gate), up),  # silu, its factors in whatever order: (up * x) * sigmoid(x)
    opt_cast(activation(gate)) * up,
    opt_cast(other_activation()) * var("up"),
)


# -------------------------------------------------------------------- what is a gated unit


def _full(value: Value, shape: Shape) -> bool:
    """Whether the value has an element for every element of the product; the view drops leading unit dimensions."""
    return same_shape(_without_leading_ones(value.shape), _without_leading_ones(shape))


def _without_leading_ones(shape: Shape) -> Shape:
    first = next((i for i, size in enumerate(shape) if not known_equal(size, 1)), len(shape))
    return shape[first:]


def _gates(site: Value, activated: Value, other: Value) -> bool:
    """Whether one factor of a product gates the other: both have its shape, and they are not functions of one tensor."""
    return _full(activated, site.shape) and _full(other, site.shape) and source_of(activated) is not source_of(other)


def check_glu(m: Match) -> Reject | None:
    """Gate and up have the shape of the product, neither is made of the other, and a clamp of up is symmetric."""
    if "activation.other" in m:
        return Reject(why_not(m["activation.other"]), m["activation.other"])
    g, u, site = m["gate"], m["up"], m["site"]
    if source_of(g) is source_of(u):
        return Reject("both factors are functions of one tensor: an activation, not a gate", site)
    if not _gates(site, g, u):
        return Reject("the activation is not multiplied with a tensor of its own shape", site)
    if "up_low" in m and not _symmetric(m["up_low"], m["up_high"]):
        return Reject("the clamp of up is not symmetric", u)
    if bits(g.dtype) < 64 and bits(u.dtype) < 64 and any(value.dtype is torch.float64 for value in m.visited):
        return Reject("the unit is computed in float64, which the fused op does not do for narrower inputs", site)
    return _check_exact(m) if m.exact else None


def _check_exact(m: Match) -> Reject | None:
    """The fused op computes in fp32 and rounds once, at the end: so must the model."""
    end = {m.root, m["site"]} if m.root is m["site"] and bits(m["gate"].dtype) >= 32 else {m.root}
    early = next((value for value in m.visited if 0 < bits(value.dtype) < 32 and value not in end), None)
    if early is not None:
        return Reject(f"rounding='exact': the model computes {early.op} in {early.dtype}, the fused op in fp32", early)
    return None


def _symmetric(low: Any, high: Any) -> bool:
    if low.known and high.known:
        return bool(low.value == -high.value)
    return low.source is high.source and low.scale == -high.scale


# -------------------------------------------------------------------- rewriting


def rewrite_glu(m: Match) -> Call:
    up_ = _rounded_up(m)
    merged, layout = _merged(m["gate"], up_)
    args: dict[str, Any] = {"gate": m["gate"], "up": up_, "activation": activation_of(m), "out_dtype": m.root.dtype}
    if merged is not None:
        args.update(gate=merged, up=None, layout=layout)
    if (rounded := _rounds_to(m)) is not None:
        args["round_dtype"] = rounded
    for name, binding in (("alpha", "alpha"), ("gate_limit", "gate_limit"), ("up_limit", "up_high"), ("up_offset", "up_offset")):
        if binding in m:
            args[name] = m[binding]
    return Call(glu, args, [m.root])


def _rounds_to(m: Match) -> torch.dtype | None:
    """The dtype of fewer than 32 bits to which the model rounds the activated gate before the product, or None."""
    activated = [arg for arg in m["site"].args if arg is not m["up_factor"]]
    if len(activated) != 1:
        return None  # spread over the product: there is no activated gate by itself
    values = (*activated, *activated[0].args) if activated[0].op == "cast" else activated
    narrowest: torch.dtype = min((value.dtype for value in values), key=bits)
    return narrowest if bits(narrowest) < 32 else None


def _rounded_up(m: Match) -> Value:
    """Up; rounded where the model rounds both halves of a merged tensor, so that these stay halves of one."""
    g, u, factor = m["gate"], m["up"], m["up_factor"]
    both = g.op == "cast" and factor.op == "cast" and factor.args[0] is u and factor.dtype is g.dtype and bits(u.dtype) > bits(g.dtype)
    rounded: Value = factor if both else u
    return rounded


def _merged(g: Value, u: Value) -> tuple[Value | None, str]:
    """The tensor [..., 2I] that gate and up are the two halves of, and how they lie in it; None where they are not.

    The view has moved a cast of the whole behind the halves.
    """
    if g.op == u.op == "cast" and g.dtype == u.dtype and g.args[0].node is None and u.args[0].node is None:
        whole, layout = _merged(g.args[0], u.args[0])
        return next((user for user in whole.users if user.op == "cast" and user.dtype == g.dtype), None) if whole else None, layout
    if g.op != "slice" or u.op != "slice" or g.args[0] is not u.args[0]:
        return None, "halves"
    whole, size = g.args[0], g.shape[-1]
    along_last = all(part.attrs["dim"] == whole.ndim - 1 for part in (g, u))
    if not isinstance(size, int):  # the op's own half of a symbolic size is not always provably the model's
        return None, "halves"
    if not along_last or not known_equal(whole.shape[-1], 2 * size) or not known_equal(u.shape[-1], size):
        return None, "halves"
    starts = (g.attrs["start"], u.attrs["start"])
    steps = (g.attrs["step"], u.attrs["step"])
    for layout, wanted, step in (("halves", (0, size), 1), ("swapped", (size, 0), 1), ("interleaved", (0, 1), 2)):
        if all(known_equal(a, b) for a, b in zip((*starts, *steps), (*wanted, step, step), strict=True)):
            return whole, layout
    return None, "halves"


# -------------------------------------------------------------------- rule


GLU = Rule(
    "glu",
    pattern=opt_round(product.as_("site")),
    check=check_glu,
    rewrite=rewrite_glu,
    produces="glu",
    idioms={"glu": "site"},
    gist=(opt_cast(any_of(activation(opt_cast(anything())), other_activation())) * anything())
    .where(lambda site: _gates(site, *site.args), "one factor does not gate the other")
    .as_("site"),
)

register_builtin(GLU)
