"""Normalisation: RMSNorm in every spelling, residual add + RMSNorm, gated RMSNorm, l2 norm, LayerNorm.

The canonical view has already made `x*x`, `pow(x, 2)`, `square`; `mean`, `sum / N`, `vector_norm(x)**2 / N`; `rsqrt`, `1/sqrt`, `pow(-.5)`
and division by a root the same, and has spelled out `F.rms_norm`, `F.layer_norm`, `var` and `std`. What remains is where the model casts,
how it applies the weight, and what else it does in passing.

Sources: Zhang & Sennrich 2019 (RMSNorm, l2 forms), Ba et al. 2016 (LayerNorm); transformers' model code for the cast points.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.norm import add_rms_norm, l2_norm, layer_norm, rms_norm
from npu_fusion.pattern import (
    LAST,
    AttrIs,
    Pattern,
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
    reshape,
    rsqrt,
    sem,
    sigmoid,
    silu,
    sqrt,
    square,
    sum_,
    var,
)
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Form, Value
from npu_fusion.view.shapes import known_equal, same_shape
from npu_fusion.view.value import Shape

x, weight, bias, eps = var("x"), var("weight"), var("bias"), lit("eps")

# -------------------------------------------------------------------- what the rules share


def rounded(inner: Pattern, name: str) -> Pattern:
    """The pattern, maybe rounded to a narrower type, maybe widened again. The narrowest is bound: it tells where the model rounds."""
    return opt_upcast(opt_round(inner).as_(name))


def over_root(value: Pattern, under_root: Pattern) -> Pattern:
    """`value / sqrt(under_root)`; the root, inverted or not, is bound as `root`, rounded as the model rounds it."""
    return value * rounded(rsqrt(under_root), "root") | value / rounded(sqrt(under_root), "root")


def stabilised(energy: Pattern) -> Pattern:
    """`energy + eps`, or just `energy` where the model adds nothing."""
    return opt_upcast(energy) + eps | opt_upcast(energy)


factor = rounded((1 + opt_upcast(weight)).as_("one_plus_weight"), "rounded_one_plus_weight") | opt_upcast(weight)


def _compute_dtype(*values: Value) -> torch.dtype:
    """The type in which a semantic op computes, given its inputs."""
    return torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32


def _narrower(a: Value, b: torch.dtype) -> bool:
    return bits(a.dtype) < bits(b)


def _same_but_for_leading_ones(value: Value, shape: Shape) -> bool:
    """Whether the value has the shape, which the view may have stripped of leading unit dimensions."""
    missing = len(shape) - value.ndim
    return missing >= 0 and all(known_equal(d, 1) for d in shape[:missing]) and same_shape(value.shape, shape[missing:])


def _vector(m: Match, value: Value) -> Value:
    """The vector [H] in a value of shape [1, ..., 1, H]."""
    return m.view.canon.reshape(value, value.shape[-1:])


def _check_operands(m: Match, *names: str) -> Reject | None:
    """The op takes floating-point x, and vectors along its last dimension for the named operands."""
    source = m["x"]
    if not bits(source.dtype) or source.ndim < 1:
        return Reject("what is normalised is not a floating-point tensor", source)
    for name in names:
        if name in m and not _is_vector_along(m[name], m.get("regrouped", source)):
            return Reject(f"the {name} is not one vector along the normalised dimension", m[name])
    return None


def _is_vector_along(value: Value, source: Value) -> bool:
    """Whether the value is [H], or a parameter [1, ..., 1, H]: an activation of that shape (one token) is something else."""
    if not bits(value.dtype) or not 1 <= value.ndim <= source.ndim or not known_equal(value.shape[-1], source.shape[-1]):
        return False
    return value.ndim == 1 or (all(known_equal(d, 1) for d in value.shape[:-1]) and _is_parameter(value))


def _is_parameter(value: Value) -> bool:
    while value.op in ("cast", "reshape", "expand", "permute"):
        value = value.args[0]
    return value.op == "input"


def _check_early_rounding(m: Match, *names: str) -> Reject | None:
    """With `rounding="exact"`: the named intermediates, which the fused op holds in fp32 or wider, are no narrower in the model."""
    if not m.exact:
        return None
    for name in names:
        if name in m and bits(m[name].dtype) < 32:
            return Reject(f"rounding='exact': the model rounds {_PLAIN[name]} to {m[name].dtype}, the fused op keeps fp32", m[name])
    return None


_PLAIN = {
    "squares": "the squares",
    "energy": "the mean (or sum) of squares",
    "mean": "the mean",
    "root": "the root of the mean square",
    "unscaled": "the norm before the scalar factor",
    "activation": "the activated gate",
    "rounded_activation": "the activated gate",
    "gated": "the product with the gate",
    "rounded_gated": "the product with the gate",
    "site": "the result",
    "with_bias": "the sum with the bias",
}


def _source(m: Match) -> Value:
    """x, without the casts that the fused op makes by itself; a cast to float64 it does not."""
    source: Value = m["x"] if _compute_dtype(m["x"]) == _compute_dtype(m["squared"]) else m["squared"]
    return source


class _Scaling:
    """How a match applies the weight: the arguments that make a semantic op do the same, or keep precision longer, never shorter.

    The op multiplies in the type that `round_dtype` (or its internal type) and the weight's type promote to, and adds the offset in it.
    """

    def __init__(self, m: Match) -> None:
        self.match = m
        internal = _compute_dtype(_source(m))
        normed: Value | None = m.get("normed")
        self.round_dtype = normed.dtype if normed is not None and _narrower(normed, internal) else None
        base = self.round_dtype or internal
        steps = ("one_plus_weight", "scaled", "rounded_scaled")
        self.model_dtypes: list[torch.dtype] = [m[name].dtype for name in steps if name in m]
        self.weight: Value = m["weight"]
        self.dtype = torch.promote_types(base, self.weight.dtype)
        widest = max(self.model_dtypes, key=bits)
        if bits(widest) > bits(self.dtype):  # the model widens what it stores narrow
            self.weight, self.dtype = m.view.canon.cast(self.weight, widest), widest

    def arguments(self) -> dict[str, Any]:
        return {"weight": _vector(self.match, self.weight), "round_dtype": self.round_dtype}

    def check_exact(self) -> Reject | None:
        """With `rounding="exact"`: the op adds the offset and multiplies in the types in which the model does."""
        differs = next((dtype for dtype in self.model_dtypes if dtype != self.dtype), None)
        if not self.match.exact or differs is None:
            return None
        return Reject(f"rounding='exact': the model applies the weight in {differs}, the fused op in {self.dtype}", self.match["scaled"])


# -------------------------------------------------------------------- RMSNorm

squares = square(opt_upcast(x).as_("squared")).as_("squares")
mean_square = mean(opt_upcast(squares), dims=LAST).as_("energy")
normed = over_root(opt_upcast(x), stabilised(mean_square))
inverse_root = rounded(rsqrt(stabilised(mean_square)), "root")
regrouped = any_of(normed, reshape(normed).as_("regrouped"))
scaled = any_of(rounded(regrouped, "normed") * factor, prod(opt_upcast(x), inverse_root, factor)).as_("scaled")


def _is_centred(value: Value) -> bool:
    """Whether the value is some tensor less its own mean over the last dimension, and maybe others."""
    if value.op != "sub":
        return False
    whole, average = (_uncast(arg) for arg in value.args)
    return average.op == "mean" and value.ndim - 1 in average.attrs["dims"] and _uncast(average.args[0]) is whole


def _uncast(value: Value) -> Value:
    while value.op == "cast":
        value = value.args[0]
    return value


not_centred = x.where(lambda value: not _is_centred(value), "the mean is subtracted first")


def check_rms_norm(m: Match) -> Reject | None:
    """The mean runs over the last dimension of x itself, which is not centred; the weight is a vector along it."""
    if _is_centred(_uncast(m["x"])):
        return Reject("the mean is subtracted first: this is a LayerNorm", m["x"])
    rejected = _check_operands(m, "weight") or _check_groups(m) or _check_early_rounding(m, "squares", "energy", "root")
    if rejected is None and "weight" in m:
        rejected = _Scaling(m).check_exact()
    return rejected


def _check_groups(m: Match) -> Reject | None:
    """A norm over groups of channels, put together again before the weight: [..., G, H/G] to [..., H]."""
    if "regrouped" not in m:
        return None
    groups, whole = m["x"].shape, m["regrouped"].shape
    folds = len(groups) == len(whole) + 1 and same_shape(groups[:-2], whole[:-1]) and known_equal(groups[-2] * groups[-1], whole[-1])
    if not folds or not isinstance(groups[-1], int):
        return Reject("the norm is reshaped before the weight is applied, and not just its last two dimensions folded", m["regrouped"])
    return None


def rewrite_rms_norm(m: Match) -> Call:
    args: dict[str, Any] = {"x": _source(m), "weight": None, "eps": m.get("eps", 0.0), "out_dtype": m.root.dtype}
    if "weight" in m:
        args |= _Scaling(m).arguments()
        args["weight_offset"] = int("one_plus_weight" in m)
    if "regrouped" in m:
        args["x"] = m.view.canon.reshape(args["x"], m["regrouped"].shape)
        args["group_size"] = m["x"].shape[-1]
    return Call(rms_norm, args, [m.root])


RMS_NORM = Rule(
    "rms_norm",
    pattern=opt_round(any_of(scaled, normed).as_("site")),
    check=check_rms_norm,
    rewrite=rewrite_rms_norm,
    produces="rms_norm",
    idioms={"rms_norm": "site"},
    gist=rsqrt(stabilised(mean(opt_cast(square(opt_cast(not_centred)))))).as_("site"),
)


# -------------------------------------------------------------------- gated RMSNorm

gate = var("gate")
activated = rounded(any_of(silu(opt_upcast(gate)), sigmoid(opt_upcast(gate))).as_("activation"), "rounded_activation")


def check_gated_rms_norm(m: Match) -> Reject | None:
    """The gate and what it multiplies have one shape, and the norm is not gated yet."""
    norm = m.form("norm")
    shape = norm.args["x"].shape
    if norm.args.get("gate") is not None:
        return Reject("the norm has a gate already", m["norm"])
    for operand in (m["gate"], *([m["x"]] if "gated" in m else [])):
        if not bits(operand.dtype) or not _same_but_for_leading_ones(operand, shape):
            return Reject("the gate and what it multiplies have not the shape of what is normalised", operand)
    if m.exact and "gated" not in m and bits(m["norm"].dtype) < bits(_scaling_dtype(norm)):
        return Reject("rounding='exact': the model rounds the norm before the gate, the fused op does not", m["norm"])
    return _check_early_rounding(m, "activation", "rounded_activation", "gated", "rounded_gated", "site")


def _normalised(m: Match) -> Value:
    """What goes into the fused norm; the view may have stripped a gated product's operands of leading unit dimensions."""
    source: Value = m.form("norm").args["x"]
    return m.view.canon.reshape(m["x"], source.shape) if "gated" in m else source


def _scaling_dtype(norm: Form) -> torch.dtype:
    """The type in which an rms_norm is scaled, before the cast to its result's type."""
    dtype: torch.dtype = norm.args.get("round_dtype") or _compute_dtype(norm.args["x"])
    weight_ = norm.args.get("weight")
    return dtype if weight_ is None else torch.promote_types(dtype, weight_.dtype)


def rewrite_gated_rms_norm(m: Match) -> Call:
    args = {
        **m.form("norm").args,
        "x": _normalised(m),
        "gate": m.view.canon.reshape(m["gate"], _normalised(m).shape),
        "gate_activation": m["activation"].op,
        "gate_first": "gated" in m,
        "out_dtype": m.root.dtype,
    }
    return Call(rms_norm, args, [m.root])


GATED_RMS_NORM = Rule(
    "gated_rms_norm",
    pattern=opt_round((opt_upcast(sem("rms_norm").as_("norm")) * activated).as_("site")),
    check=check_gated_rms_norm,
    rewrite=rewrite_gated_rms_norm,
    produces="rms_norm",
    idioms={"gated_rms_norm": "site"},
    instead_of=frozenset({"rms_norm"}),
)

RMS_NORM_OF_GATED = Rule(
    "rms_norm_of_gated",
    pattern=sem("rms_norm", x=rounded((opt_upcast(x) * activated).as_("gated"), "rounded_gated")).as_("norm"),
    check=check_gated_rms_norm,
    rewrite=rewrite_gated_rms_norm,
    produces="rms_norm",
    idioms={"gated_rms_norm": "norm"},
    instead_of=frozenset({"rms_norm"}),
)

# -------------------------------------------------------------------- residual add + RMSNorm

branch, residual = var("branch"), var("residual")


def _adds_like_to_like(total: Value) -> bool:
    """A residual addition joins two tensors of one shape; a bias or a position table that broadcasts is none."""
    return total.ndim > 0 and all(bits(arg.dtype) and _same_but_for_leading_ones(arg, total.shape) for arg in total.args)


# The operand that was computed first is the residual stream.
residual_sum = op("add", opt_upcast(residual), opt_upcast(branch)).where(_adds_like_to_like, "the addends differ in shape").as_("sum")
with_bias = opt_upcast(branch) + opt_upcast(bias)
biased_sum = (opt_upcast(residual) + rounded(with_bias, "with_bias")).where(_adds_like_to_like, "the addends differ in shape").as_("sum")


def check_add_rms_norm(m: Match) -> Reject | None:
    norm = m.form("norm")
    if norm.args.get("gate") is not None or norm.args.get("group_size"):
        return Reject("the norm has a gate or runs over groups of channels", m["norm"])
    addends = [m[name] for name in ("residual", "branch", "bias") if name in m]
    if not all(bits(addend.dtype) for addend in addends) or bits(m["sum"].dtype) > bits(_compute_dtype(*addends)):
        return Reject("the addends are converted to a wider type than the fused op adds in", m["sum"])
    if "bias" in m and not _is_vector_along(m["bias"], m["sum"]):
        return Reject("the bias is not one vector along the normalised dimension", m["bias"])
    if "bias" in m and m["branch"].node is None:
        return Reject("the bias belongs to a linear", m["bias"])
    return _check_early_rounding(m, "with_bias")


def rewrite_add_rms_norm(m: Match) -> Call:
    norm = m.form("norm").args
    total, unrounded = _kept_sum(m)
    args: dict[str, Any] = {
        "x": m.view.canon.reshape(m["branch"], total.shape),
        "residual": m.view.canon.reshape(m["residual"], total.shape),
        "bias": _vector(m, m["bias"]) if "bias" in m else None,
        "norm_unrounded": unrounded,
        "sum_dtype": total.dtype,
    }
    args |= {name: norm[name] for name in ("weight", "eps", "weight_offset", "round_dtype", "out_dtype") if name in norm}
    return Call(add_rms_norm, args, [m.root, total])


def _kept_sum(m: Match) -> tuple[Value, bool]:
    """The sum in the form in which the rest of the model reads it, and whether the norm is taken of the sum before it is rounded to that.

    Models that add in fp32 may normalise the exact sum and pass it on rounded, or normalise the rounded sum and pass on the exact one. The
    op does the former; of the latter it makes a norm of the exact sum, unless rounding must be the model's.
    """
    total: Value = m["sum"]
    readers = [user for user in total.users if user not in m.visited]
    returned = any(user.op == "output" for node in m.view.nodes.get(total, ()) for user in node.users)
    if m["summed"] is not total:
        keeps_exact = (readers or returned) and not m.exact
        return (total if keeps_exact else m["summed"]), False
    if not returned and len(readers) == 1 and readers[0].op == "cast" and bits(readers[0].dtype) and _narrower(readers[0], total.dtype):
        return readers[0], True
    return total, False


ADD_RMS_NORM = Rule(
    "add_rms_norm",
    pattern=sem("rms_norm", x=opt_round(biased_sum | residual_sum).as_("summed")).as_("norm"),
    check=check_add_rms_norm,
    rewrite=rewrite_add_rms_norm,
    produces="add_rms_norm",
    idioms={"residual_add": "sum"},
    gist=sem("rms_norm", x=opt_cast(opt_view(residual_sum.as_("site"), "reshape"))),
)

# -------------------------------------------------------------------- l2 norm

sum_of_squares = sum_(opt_upcast(squares), dims=LAST).as_("energy")
clamped_length = op("clamp", rounded(sqrt(opt_upcast(sum_of_squares)), "root"), eps, low=True, high=False).as_("clamped")
unit = over_root(opt_upcast(x), stabilised(sum_of_squares)) | opt_upcast(x) / opt_upcast(clamped_length)


def check_l2_norm(m: Match) -> Reject | None:
    return _check_operands(m) or _check_early_rounding(m, "squares", "energy", "root", "unscaled", "site")


def rewrite_l2_norm(m: Match) -> Call:
    mode = "max" if "clamped" in m else "add"
    args = {"x": _source(m), "eps": m.get("eps", 0.0), "eps_mode": mode, "scale": m.get("scale", 1.0), "out_dtype": m.root.dtype}
    return Call(l2_norm, args, [m.root])


L2_NORM = Rule(
    "l2_norm",
    pattern=opt_round(any_of(rounded(unit, "unscaled") * lit("scale"), unit).as_("site")),
    check=check_l2_norm,
    rewrite=rewrite_l2_norm,
    produces="l2_norm",
    idioms={"l2_norm": "site"},
    gist=any_of(rsqrt(stabilised(sum_of_squares)), clamped_length).as_("site"),
)

# -------------------------------------------------------------------- LayerNorm

average = rounded(mean(opt_upcast(x), dims=LAST), "mean")
centred = opt_upcast(x).as_("squared") - average
deviations = any_of(
    mean(opt_upcast(square(centred).as_("squares")), dims=LAST),
    mean(opt_upcast(squares), dims=LAST) - square(average),
).as_("energy")
whitened = over_root(centred, stabilised(deviations))
inverse_deviation = rounded(rsqrt(stabilised(deviations)), "root")
scaled_whitened = any_of(
    rounded(whitened, "normed") * opt_upcast(weight),
    prod(centred, inverse_deviation, opt_upcast(weight)),
).as_("scaled")


def _are_trailing(dims: tuple[int, ...], value: Value) -> bool:
    return dims == tuple(range(value.ndim - len(dims), value.ndim))


TRAILING = AttrIs("the last dimensions", _are_trailing)


def check_layer_norm(m: Match) -> Reject | None:
    rejected = _check_operands(m, "weight", "bias") or _check_early_rounding(m, "squares", "energy", "mean", "root")
    if rejected is None and "weight" in m:
        rejected = _Scaling(m).check_exact()
    return rejected


def rewrite_layer_norm(m: Match) -> Call:
    args: dict[str, Any] = {"x": _source(m), "weight": None, "bias": None, "eps": m.get("eps", 0.0), "out_dtype": m.root.dtype}
    if "weight" in m:
        scaling = _Scaling(m)
        args |= scaling.arguments()
        if "bias" in m:
            narrow = bits(torch.promote_types(scaling.dtype, m["bias"].dtype)) < bits(m["site"].dtype)
            args["bias"] = _vector(m, m.view.canon.cast(m["bias"], m["site"].dtype) if narrow else m["bias"])
    return Call(layer_norm, args, [m.root])


LAYER_NORM = Rule(
    "layer_norm",
    pattern=opt_round(any_of(rounded(scaled_whitened, "rounded_scaled") + opt_upcast(bias), scaled_whitened, whitened).as_("site")),
    check=check_layer_norm,
    rewrite=rewrite_layer_norm,
    produces="layer_norm",
    idioms={"layer_norm": "site"},
    gist=rsqrt(
        stabilised(mean(opt_cast(square(x.where(_is_centred, "the mean is not subtracted"))), dims=TRAILING)),
    ).as_("site"),
)

register_builtin(
    RMS_NORM,
    GATED_RMS_NORM,
    RMS_NORM_OF_GATED,
    ADD_RMS_NORM,
    L2_NORM,
    LAYER_NORM,
)
