"""Normalisation: RMSNorm in every spelling, residual add + RMSNorm, gated RMSNorm, LayerNorm, l2 norm.

The canonical view has already made `x*x`, `pow(x, 2)`, `square`; `mean`, `sum / N`, `vector_norm(x)**2 / N`; `rsqrt`, `1/sqrt`, `pow(-.5)` and
division by a root the same. What remains is where the model casts, how it applies the weight, and what else it does in passing.

Sources: Zhang & Sennrich 2019 (RMSNorm, l2 forms), Ba et al. 2016 (LayerNorm); transformers' model code for the cast points.
"""

from __future__ import annotations

from npu_fusion.match import Match
from npu_fusion.ops.norm import add_rms_norm, l2_norm, layer_norm, rms_norm
from npu_fusion.pattern import (
    LAST,
    any_of,
    bits,
    lit,
    mean,
    op,
    opt_cast,
    opt_round,
    opt_upcast,
    opt_view,
    prod,
    rsqrt,
    sem,
    sigmoid,
    silu,
    sqrt,
    square,
    sum_,
    total,
    var,
)
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.shapes import known_equal

# -------------------------------------------------------------------- RMSNorm

x, weight, eps = var("x"), var("weight"), lit("eps")

inverse_rms = opt_cast(rsqrt(mean(square(opt_upcast(x)), dims=LAST).as_("mean_square") + eps)).as_("inverse_rms")
normed = (opt_upcast(x) * inverse_rms).as_("normed")
rounded = opt_cast(normed)
scaled = any_of(
    rounded * opt_upcast(weight),
    rounded * opt_cast(1 + opt_upcast(weight)).as_("one_plus_weight"),
    prod(opt_upcast(x), inverse_rms, opt_upcast(weight)),
)


def _is_weight(value: Value, hidden: Value) -> bool:
    """Whether the value is one vector along the last dimension."""
    return value.ndim >= 1 and known_equal(value.shape[-1], hidden.shape[-1]) and all(d == 1 for d in value.shape[:-1])


def _is_centred(value: Value) -> bool:
    return value.op == "sub" and any(arg.op == "mean" for arg in value.args)


def check_rms_norm(m: Match) -> Reject | None:
    """The mean runs over the whole last dimension of x itself, the weight is a vector along it, x is not centred (that is a LayerNorm)."""
    if _is_centred(m["x"]):
        return Reject("the mean is subtracted first: this is a LayerNorm", m["x"])
    if "weight" in m and not _is_weight(m["weight"], m["x"]):
        return Reject("the weight is not one vector along the normalised dimension", m["weight"])
    if m.exact:
        return _check_exact(m)
    return None


def _check_exact(m: Match) -> Reject | None:
    """The fused op computes in fp32 up to the weight: the model must not round earlier."""
    if bits(m["mean_square"].dtype) < 32:
        return Reject(f"rounding='exact': the model normalises in {m['mean_square'].dtype}, the fused op in fp32", m["mean_square"])
    if bits(m["inverse_rms"].dtype) < 32:
        return Reject("rounding='exact': 1/rms is rounded before it is multiplied with x", m["inverse_rms"])
    if "one_plus_weight" in m and bits(m["one_plus_weight"].dtype) < 32 and _rounding(m) is None:
        return Reject("rounding='exact': 1 + weight is rounded before it is applied", m["one_plus_weight"])
    return None


def rewrite_rms_norm(m: Match) -> Call:
    args = {"x": m["x"], "weight": m.get("weight"), "eps": m["eps"], "out_dtype": m.root.dtype}
    if "weight" in m:
        args["weight"] = m["weight"]
        args["weight_offset"] = int("one_plus_weight" in m)
        args["round_dtype"] = _rounding(m)
    return Call(rms_norm, args, [m.root])


def _rounding(m: Match) -> object:
    """The type in which the normalised x reaches the weight, None where it keeps its precision."""
    cast_to = [user.dtype for user in m["normed"].users if user.op == "cast" and user in m.visited] if "normed" in m else []
    return cast_to[0] if cast_to and cast_to[0] != m["inverse_rms"].dtype else None


RMS_NORM = Rule(
    "rms_norm",
    pattern=opt_round(scaled.as_("site")),
    check=check_rms_norm,
    rewrite=rewrite_rms_norm,
    produces="rms_norm",
    idioms={"rms_norm": "site"},
    gist=rsqrt(mean(square(opt_cast(x))) + eps).as_("site"),
)

RMS_NORM_BARE = Rule(
    "rms_norm_without_weight",
    pattern=opt_round(normed.as_("site")),
    check=check_rms_norm,
    rewrite=rewrite_rms_norm,
    produces="rms_norm",
    idioms={"rms_norm": "site"},
)

register_builtin(RMS_NORM, RMS_NORM_BARE)
