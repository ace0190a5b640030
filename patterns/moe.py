"""Routers: the choice of a token's experts by score, and the weights of those chosen.

A router scores the experts (softmax, sigmoid, root of softplus), chooses k of them by score, perhaps with a bias that balances their load
and perhaps within the best groups alone, and takes the scores of those chosen as weights: divided by their sum or not, times a factor or
not. Others choose by logits and score the chosen ones alone. A weight that holds the balancing bias, or one divided by a sum over tokens,
is another thing, and stays as it is.

Sources: DeepSeek-V2 and -V3, https://arxiv.org/abs/2405.04434 and https://arxiv.org/abs/2412.19437; transformers' model code for the
spellings.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.moe import moe_gating
from npu_fusion.pattern import (
    LAST,
    AttrAs,
    AttrIs,
    Pattern,
    amax,
    any_of,
    anything,
    bits,
    cast,
    lit,
    op,
    op_any_args,
    opt_cast,
    opt_upcast,
    opt_view,
    reshape,
    sigmoid,
    softmax,
    sqrt,
    sum_,
    torch_op,
    var,
)
from npu_fusion.pattern.core import Named
from npu_fusion.pattern.values import describe
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.canon_views import only_leading_ones
from npu_fusion.view.shapes import known_equal, same_shape

from .router_sites import chooses_by_scores, is_choice_of_experts

LAST_DIM = AttrIs("the last dimension", lambda dim, value: dim in (-1, value.args[0].ndim - 1))
FIRST = AttrIs("0", lambda index, value: index == 0)


def rows(inner: Pattern) -> Pattern:
    """The pattern, whose rows [..., E] lie in other leading dimensions or not."""
    return any_of(inner, reshape(inner).where(_keeps_rows, "a reshape cuts the rows of experts"))


def _keeps_rows(view: Value) -> bool:
    inner = view.args[0]
    return view.ndim > 0 and inner.ndim > 0 and known_equal(view.shape[-1], inner.shape[-1])


# -------------------------------------------------------------------- scores

logits = var("logits")
scored = opt_upcast(logits)
score = any_of(
    softmax(scored, dim=AttrIs("the last dimension", lambda dim, value: dim == value.ndim - 1)).as_("score.softmax"),
    sigmoid(scored).as_("score.sigmoid"),
    sqrt(torch_op("softplus", scored, beta=1, threshold=20, overload="default", tensors="self")).as_("score.sqrt_softplus"),
)
unscored = anything().where(lambda value: value.ndim > 1, "the scores are one row for all tokens").as_("unscored")
scores = opt_cast(rows(any_of(score, unscored))).as_("scores")  # other scores are matched to name them


def chosen_by(values: Pattern) -> Pattern:
    """The top-k of the values, along the last dimension."""
    attrs: dict[str, Any] = {"k": AttrAs("k"), "dim": LAST_DIM, "largest": True, "sorted": AttrAs("sorted"), "overload": "default"}
    return Named("topk", torch_op("topk", values, tensors="self", **attrs))


def indices_of(topk: Pattern) -> Pattern:
    return op("getitem", topk, index=1)


def values_of(topk: Pattern) -> Pattern:
    return op("getitem", topk, index=0)


def gathered(values: Pattern, indices: Pattern) -> Pattern:
    """The values at the indices, along the last dimension."""
    return torch_op("gather", values, indices, dim=LAST_DIM, overload="default", tensors="self index")


# -------------------------------------------------------------------- groups


def full(number: float) -> Pattern:
    """A tensor full of the number."""
    return op_any_args("full", value=AttrIs(str(number), lambda value, _: value == number))


def choice_of(values: Pattern) -> Pattern:
    """What the choice goes by: the values, with a bias an expert or not."""
    one_row = reshape(var("bias")).where(only_leading_ones, "a reshape of the bias is not one row")
    return any_of(opt_cast(rows(values)) + opt_cast(any_of(one_row, var("bias"))), values).as_("choice")


def limited(choice: Pattern) -> Pattern:
    """The choice within the best groups: those outside count as `excluded`."""
    parts = reshape(choice).as_("groups")
    best_two = torch_op("topk", parts, k=2, dim=LAST_DIM, largest=True, overload="default", tensors="self", sorted=AttrAs("sorted2"))
    merit = opt_view(any_of(amax(parts, dims=LAST).as_("by_max"), sum_(values_of(best_two), dims=LAST).as_("by_two")), "reshape").as_(
        "merit"
    )
    attrs: dict[str, Any] = {
        "k": AttrAs("top_groups"),
        "dim": LAST_DIM,
        "largest": True,
        "overload": "default",
        "sorted": AttrAs("sorted1"),
    }
    best = indices_of(torch_op("topk", merit, tensors="self", **attrs))
    at: dict[str, Any] = {"dim": LAST_DIM, "overload": "value", "tensors": "self index"}
    marked = any_of(
        torch_op("scatter", full(0), best, value=AttrIs("1", lambda v, _: v == 1), **at),
        torch_op("scatter", full(0), best, full(1), dim=LAST_DIM, overload="src", tensors="self index src"),
    ).as_("marked")
    unmarked = torch_op("scatter", full(1), best, value=AttrIs("0", lambda v, _: v == 0), **at).as_("marked")
    kept, dropped = spread(marked), spread(unmarked)
    true_kept = any_of(truth(kept), op("not", truth(dropped)), is_zero(dropped))
    true_dropped = any_of(op("not", truth(kept)), is_zero(kept), truth(dropped))
    masked = any_of(
        op("where", true_dropped, lit("excluded"), rows_or_groups(choice)),
        op("where", true_kept, rows_or_groups(choice), lit("excluded")),
        op("mul", opt_cast(kept), rows_or_groups(choice), commutative=True).as_("excluded.zero"),
    )
    return any_of(masked, reshape(masked)).as_("limited")


def spread(marks: Pattern) -> Pattern:
    """Marks of groups [..., G], spread over their members."""
    return opt_view(marks, "reshape", "expand").as_("mask")


def truth(mask: Pattern) -> Pattern:
    return any_of(cast(mask, dtype=torch.bool), mask.where(lambda value: value.dtype is torch.bool, "the mask is no truth value"))


def is_zero(mask: Pattern) -> Pattern:
    return op("eq", opt_cast(mask), 0)


def rows_or_groups(choice: Pattern) -> Pattern:
    return any_of(choice, reshape(choice))


# -------------------------------------------------------------------- weights

by_score = any_of(limited(choice_of(scores)), choice_of(scores))
taken_scores = any_of(gathered(scores, indices_of(chosen_by(by_score))), values_of(chosen_by(by_score)).as_("values"))

choice_of_logits = any_of(limited(choice_of(scored)), choice_of(scored))
taken_logits = opt_cast(
    any_of(gathered(scored, indices_of(chosen_by(choice_of_logits))), values_of(chosen_by(choice_of_logits)).as_("values"))
)
late_softmax = softmax(taken_logits, dim=AttrIs("the last dimension", lambda dim, value: dim == value.ndim - 1)).as_("late.softmax")
late_score = any_of(late_softmax, sigmoid(taken_logits).as_("late.sigmoid"))

other_than_scores = gathered(anything().as_("other"), indices_of(chosen_by(by_score)))  # matched to name it
taken = opt_cast(any_of(taken_scores, late_score, other_than_scores))


def divided(weights: Pattern) -> Pattern:
    """The weights, each token's divided by their sum or not."""
    raw = weights.as_("raw")
    norm_of_positive = torch_op(  # the sum of magnitudes of what is not negative
        "linalg_vector_norm:default",
        opt_cast(var("raw")),
        ord=1,
        dim=AttrIs("the last dimension", lambda dim, value: dim in ((-1,), (value.args[0].ndim - 1,))),
        keepdim=True,
        overload="default",
        dtype=AttrIs("any type", lambda dtype, value: True),
        tensors="self",
    )
    total = opt_cast(any_of(sum_(opt_cast(var("raw")), dims=LAST), norm_of_positive).as_("total"))
    guarded = any_of(
        opt_cast(total) + lit("eps"),
        op("clamp", total, lit("floor"), low=True, high=False),
        total,
    )
    return any_of(op("div", opt_cast(raw), opt_cast(guarded)), raw)


weights = opt_cast(any_of(divided(taken) * lit("scale"), divided(taken)))

dense_logits = torch_op(
    "scatter",
    full(float("-inf")),
    indices_of(chosen_by(scored)),
    values_of(Named("topk", anything())),
    dim=LAST_DIM,
    overload="src",
    tensors="self index src",
)
dense_sigmoid = opt_cast(sigmoid(opt_cast(dense_logits)).as_("late.sigmoid")).as_("dense")
dense_weights = torch_op(
    "scatter", full(0), op("getitem", anything(), index=1), weights, dim=LAST_DIM, overload="src", tensors="self index src"
).as_("dense")

# Phi-3.5-MoE's sparse mixer: the best expert, weighted by a softmax of only those logits that come near its own; then the second best.
near_best = softmax(opt_cast(op("where", anything(), float("-inf"), anything())))
sparse_mixer = gathered(
    opt_cast(near_best.where(lambda value: not _is_second(value), "the second expert of a sparse mixer")),
    op_any_args("argmax").as_("best"),
).as_("sparse_mixer")

gating = any_of(weights, dense_sigmoid, dense_weights, sparse_mixer)


# -------------------------------------------------------------------- what is a router


def _is_second(near: Value) -> bool:
    """Whether a softmax of masked logits leaves out an expert that was chosen before: it is written as -inf into them."""
    masked = near.args[0]
    while masked.op == "cast":
        masked = masked.args[0]
    return masked.args[2].op == "scatter"


def check_gating(m: Match) -> Reject | None:
    """The choice is one of experts, its weights are plain scores, its bias is one an expert, and its groups are equal parts."""
    if "sparse_mixer" in m:
        return Reject("each expert is weighted by a softmax of the logits near its own (a sparse mixer), which no fused op has", m["best"])
    topk = m["topk"]
    if "other" in m and m["other"] is not m.get("scores"):
        return Reject("the weights are not made of the scores that the choice goes by", m["other"], 1)
    if "unscored" in m:
        made = describe(m["unscored"])
        return Reject(
            f"the scores are made by {made}; fused ops have softmax, sigmoid and the root of softplus of the logits", m["unscored"]
        )
    if not is_choice_of_experts(topk):
        return Reject("not a router: the choice is not among a fixed number of experts", topk)
    if "bias" in m and not _is_per_expert(m["bias"], topk):
        return Reject("what is added to the scores is not one number an expert", m["bias"], 1)
    if "bias" in m and "values" in m:
        return Reject("the weights hold the bias of the choice", topk, 2)
    if "dense" in m and m["dense"].args[0].op == "full" and m["dense"].args[1].args[0] is not topk:
        return Reject("the weights are written at the indices of another choice", m["dense"], 2)
    if "limited" in m and (wrong := _check_groups(m)) is not None:
        return wrong
    if bits(m["logits"].dtype) < 64 and any(value.dtype is torch.float64 for value in m.visited):
        return Reject("the router computes in float64, which the fused op does not do for narrower logits", topk, 3)
    return _check_exact(m) if m.exact else None


def _is_per_expert(bias: Value, topk: Value) -> bool:
    return bias.ndim == 1 and known_equal(bias.shape[0], topk.args[0].shape[-1])


def _check_groups(m: Match) -> Reject | None:
    groups, merit, marked, choice = m["groups"], m["merit"], m["marked"], m["choice"]
    if groups.ndim != choice.ndim + 1 or not same_shape(groups.shape[:-2], choice.shape[:-1]):
        return Reject("the groups are not equal parts of a token's experts", groups, 2)
    if not same_shape(merit.shape, groups.shape[:-1]) or not same_shape(marked.shape, merit.shape):
        return Reject("the merit of groups is not one number a group", merit, 2)
    if not _is_spread(m["mask"], marked, groups):
        return Reject("the mask of groups is not spread over their members", m["mask"], 2)
    top_groups, k = m["top_groups"], m["k"]
    if not all(isinstance(size, int) for size in (*groups.shape[-2:], top_groups)) or groups.shape[-1] * top_groups < k:
        return Reject("more experts are chosen than the best groups have", m["topk"], 2)
    excluded = _excluded(m)
    if excluded is None:
        return Reject("what experts of other groups count as is known at run time only", m["limited"], 2)
    if "values" in m and not (excluded == float("-inf") or ("scores" in m and excluded <= 0)):
        return Reject("a weight may be that of an excluded expert", m["limited"], 2)
    return None


def _is_spread(mask: Value, marked: Value, groups: Value) -> bool:
    """Whether the mask has, for each member of a group, the mark of the group: as [..., G, 1], [..., G, S] or [..., G * S]."""
    if mask.op == "reshape" and mask.args[0].op == "expand":
        lead, (count, size) = groups.shape[:-2], groups.shape[-2:]
        if not same_shape(mask.shape, (*lead, count * size)):
            return False
        mask = mask.args[0]
    if mask.op == "expand":
        if not same_shape(mask.shape, groups.shape):
            return False
        mask = mask.args[0]
    return mask.op == "reshape" and mask.args[0] is marked and same_shape(mask.shape, (*marked.shape, 1))


def _excluded(m: Match) -> float | None:
    return 0.0 if "excluded.zero" in m else m.number("excluded")


def _check_exact(m: Match) -> Reject | None:
    """The fused op computes in fp32, but for the scores, and rounds once, at the end: so must the model."""
    steps = [m[name] for name in ("choice", "raw", "total") if name in m]
    steps = [value for value in steps if value is not m.root and value is not m.get("scores")]
    early = next((value for value in steps if 0 < bits(value.dtype) < 32), None)
    if early is not None and not (early is m["choice"] if "choice" in m and "bias" not in m else False):
        return Reject(f"rounding='exact': the model computes {early.op} in {early.dtype}, the fused op in fp32", early, 4)
    return None


# -------------------------------------------------------------------- rewriting


def rewrite_gating(m: Match) -> Call:
    topk: Value = m["topk"]
    lead, experts = topk.args[0].shape[:-1], topk.args[0].shape[-1]
    args: dict[str, Any] = {
        "logits": m.view.canon.reshape(m["logits"], (*lead, experts)),
        "bias": m.get("bias"),
        "k": m["k"],
        "score": next(name for kind in ("score", "late") for name in _NAMES if f"{kind}.{name}" in m),
        "weights_dtype": m.root.dtype,
    }
    if "scores" not in m:
        args["score_first"] = False
    elif (rounded := min((m["scores"], m[f"score.{args['score']}"]), key=lambda value: bits(value.dtype))) and bits(rounded.dtype) < 32:
        args["score_dtype"] = rounded.dtype
    if "limited" in m:
        excluded = _excluded(m)
        args.update(groups=m["groups"].shape[-2], top_groups=m["top_groups"], group_score="max" if "by_max" in m else "top2")
        args["excluded"] = None if "values" in m or excluded == float("-inf") else excluded
    args.update(_division(m, experts))
    if "scale" in m:
        args["scale"] = m["scale"]
    if "dense" in m:
        args["dense"] = True
    if not m["sorted"]:
        args["sorted"] = False
    return Call(moe_gating, args, [m.root, next((user for user in topk.users if user.op == "getitem" and user.attrs["index"] == 1), None)])


_NAMES = ("softmax", "sigmoid", "sqrt_softplus")


def _division(m: Match, experts: int) -> dict[str, Any]:
    """The arguments that say by what the weights are divided."""
    if "total" not in m:
        return {}
    if "floor" not in m:
        return {"renormalize": True, "eps": m["eps"]} if "eps" in m else {"renormalize": True}
    floor = m.number("floor")
    # The best of E probabilities is at least 1 / E: a floor below that is never reached.
    reached = "bias" in m or "limited" in m or "score.softmax" not in m or floor is None or floor * experts >= 1
    return {"renormalize": True, "eps": m["floor"], "guard": "clamp"} if reached else {"renormalize": True}


MOE_GATING = Rule(
    "moe_gating",
    pattern=gating,
    check=check_gating,
    rewrite=rewrite_gating,
    produces="moe_gating",
    idioms={"router": "topk"},
    gist=any_of(
        op_any_args("topk").where(chooses_by_scores, "no choice of experts").as_("site"),
        any_of(sparse_mixer).as_("site"),
    ),
)

register_builtin(MOE_GATING)
