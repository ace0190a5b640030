"""Routed experts: tokens sorted by expert, grouped products, and the weighted sum of what the experts made of each.

    order = sort(ids);  ends = cumsum(histc(ids))
    h = act(grouped_mm(x[order // k], gate_up, ends))
    y = grouped_mm(h, down, ends) * weights[order]
    out = y[inverse of order].view(T, k, H).sum(1)

The weights may come before the way back or after it, the sum may be a scatter_add over tokens, and the rows may be repeated before they
are sorted. Whoever sorts by other ids than he counts, or takes the weights in another order, computes another thing, and is left alone.

Sources: transformers' integrations/moe.py; torchtitan's models/moe.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npu_fusion.match import Match
from npu_fusion.ops.experts import moe_experts
from npu_fusion.pattern import (
    AttrAs,
    AttrIs,
    Pattern,
    any_of,
    bits,
    expand,
    op,
    op_any_args,
    opt_cast,
    reshape,
    sem,
    sum_,
    torch_op,
    var,
)
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Form, Value
from npu_fusion.view.shapes import known_equal, product, same_shape

from .activation import activation, activation_of

ANY = AttrIs("anything", lambda attr, value: True)
FIRST_DIM = AttrIs("the first dimension", lambda dim, value: dim in (0, -value.ndim))
ONLY_DIM = AttrIs("the only dimension", lambda dim, value: dim in (0, -1) and value.args[0].ndim == 1)


def at(values: Pattern, places: Pattern) -> Pattern:
    """values[places], along the first dimension."""
    return torch_op("index", values, places, overload="Tensor", tensors="self indices[]")


# -------------------------------------------------------------------- the order of the experts

ids = var("ids")
sorting = any_of(
    torch_op("sort", ids, overload="default", dim=ONLY_DIM, descending=False, tensors="self"),
    torch_op("sort", ids, overload="stable", dim=ONLY_DIM, descending=False, tensors="self"),
)
order = op("getitem", sorting, index=1).as_("order")
ordered = any_of(op("getitem", sorting, index=0), at(ids, order))
token = torch_op("floor_divide", order, other=AttrAs("k"), overload="default", tensors="self").as_("token")
counts = torch_op(
    "histc", opt_cast(any_of(ordered, ids)), bins=AttrAs("bins"), min=0, max=AttrAs("highest"), overload="default", tensors="self"
)
ends = opt_cast(torch_op("cumsum", opt_cast(counts), dim=FIRST_DIM, dtype=ANY, overload="default", tensors="self"))

spread_token = expand(reshape(token)).as_("spread")
inverse = any_of(
    torch_op(
        "index_put",
        op_any_args("empty_like"),
        order,
        op("arange", 0, 1),
        accumulate=False,
        tensors="self indices[] values",
    ),
    op("getitem", torch_op("sort", order, dim=ONLY_DIM, descending=False, tensors="self"), index=1),
)


def taken(source: Pattern, stored: Callable[[Pattern], Pattern] = lambda rows: rows) -> Pattern:
    """The rows of the tokens, each as often as it has experts, in the order of these; `stored` is applied to rows that are repeated."""
    return any_of(
        at(source, token),
        torch_op("gather", source, spread_token, dim=0, overload="default", tensors="self index"),
        at(stored(reshape(expand(reshape(source)).as_("repeated"))), order),
    )


chosen = opt_cast(taken(var("x"))).as_("chosen")


# -------------------------------------------------------------------- products


def grouped(rows: Pattern, matrices: str) -> Pattern:
    """The rows, sorted by expert, times the matrices of their experts."""
    return any_of(
        torch_op("_grouped_mm", rows, var(matrices), ends, bias=None, tensors="self mat2 offs"),
        op("transformers::grouped_mm_fallback", rows, var(matrices), ends),
    )


def biased(rows: Pattern, matrices: str) -> Pattern:
    values = grouped(rows, matrices)
    return any_of(values + at(var(f"{matrices}_bias"), ordered), values)


first = biased(chosen, "gate_up").as_("first")
hidden = opt_cast(
    any_of(
        sem("glu", gate=first, up=None).as_("unit"),
        sem("glu", gate=first, up=biased(chosen, "up").as_("second")).as_("unit"),
        activation(first).as_("ungated"),
    )
)
results = biased(hidden, "down").as_("results")

# -------------------------------------------------------------------- the weighted sum


def weighted_sum(results: Pattern) -> Pattern:
    """The sum of each token's results, times their weights."""
    weights_in_order = opt_cast(reshape(opt_cast(at(opt_cast(var("weights")), order)))).as_("factor")
    weights_by_token = opt_cast(reshape(var("weights"))).as_("factor")
    weighted = opt_cast((opt_cast(results) * weights_in_order).as_("products"))
    by_token = any_of(
        reshape(at(weighted, inverse)),
        opt_cast((opt_cast(reshape(at(opt_cast(results), inverse))) * weights_by_token).as_("products")),
    ).as_("by_token")
    zeros = op_any_args("full", value=AttrIs("0", lambda value, _: value == 0))
    summed = any_of(
        sum_(opt_cast(by_token), dims=(1,)).as_("sum"),
        torch_op("scatter_add", zeros, spread_token, weighted, dim=0, overload="default", tensors="self index src").as_("added"),
        torch_op("index_add", zeros, token, weighted, dim=0, alpha=1, tensors="self index source").as_("added"),
    )
    return opt_cast(any_of(reshape(opt_cast(summed)), summed))


# -------------------------------------------------------------------- what routed experts are


def check_experts(m: Match) -> Reject | None:
    """Routed experts in one dtype."""
    if (wrong := check_routing(m, m["x"])) is not None:
        return wrong
    site, dtypes = m["results"], {m[name].dtype for name in ("x", "chosen", "gate_up", "down", "first", "results")}
    if len(dtypes) > 1:
        return Reject(f"the products are of several dtypes: {', '.join(sorted(map(str, dtypes)))}", site, 3)
    if m.exact and "added" in m and bits(m["added"].dtype) < 32 and chosen_each(m) > 2:
        return Reject(f"rounding='exact': the model adds up in {m['added'].dtype}, the fused op in fp32", m["added"], 4)
    return None


def check_routing(m: Match, x: Value) -> Reject | None:
    """Every row of x goes through the expert that it was sorted by, with its own weight, back to its own token."""
    k, site = chosen_each(m), m["results"]
    rows = m["ids"].shape[0]
    if not isinstance(k, int) or k < 1:
        return Reject("how many experts a token has is not known", site)
    if x.ndim != 2 or not known_equal(rows, x.shape[0] * k):
        return Reject(f"the ids are not {k} for each token", m["ids"], 1)
    experts, highest = m["bins"], m["highest"]
    if m["gate_up"].ndim != 3 or not known_equal(experts, m["gate_up"].shape[0]) or highest not in (experts - 1, experts):
        return Reject("the ids are not counted for each expert", site, 1)
    if "repeated" in m and not same_shape(m["repeated"].shape, (x.shape[0], k, x.shape[1])):
        return Reject("the tokens are not repeated one by one", m["repeated"], 2)
    if "spread" in m and not same_shape(m["spread"].shape, (rows, m["spread"].shape[-1])):
        return Reject("the rows are not taken whole", m["spread"], 2)
    if "spread" in m and not (known_equal(m["spread"].shape[-1], x.shape[1]) and known_equal(x.shape[1], m["down"].shape[2])):
        return Reject("the rows are not taken whole", m["spread"], 2)
    return _check_sum(m, x.shape[0], k)


def chosen_each(m: Match) -> Any:
    """How many experts each token has; None where that cannot be told."""
    if "repeated" in m:
        return m["repeated"].shape[1] if m["repeated"].ndim == 3 else None
    return m["k"]


def _check_sum(m: Match, tokens: Any, k: int) -> Reject | None:
    factor, products, width = m["factor"], m["products"], m["down"].shape[2]
    if not known_equal(product(m["weights"].shape), product((tokens, k))):
        return Reject("the weights are not one for each chosen expert", m["weights"], 2)
    wanted = (tokens, k, 1) if products.ndim == 3 else (product((tokens, k)), 1)
    if not same_shape(factor.shape, wanted):
        return Reject("the weights are not one for each chosen expert", factor, 2)
    if "by_token" in m and not same_shape(m["by_token"].shape, (tokens, k, width)):
        return Reject("what is summed are not the experts of one token", m["by_token"], 2)
    if "added" in m and not same_shape(m["added"].shape, (tokens, width)):
        return Reject("the sum is not one row for each token", m["added"], 2)
    return None


# -------------------------------------------------------------------- rewriting

_UNIT = ("activation", "layout", "alpha", "gate_limit", "up_limit", "up_offset", "round_dtype")


def unit_arguments(m: Match) -> dict[str, Any]:
    """What `moe_experts` must know of the gated unit that the match absorbs."""
    return unit_of(m.form("unit"))


def unit_of(form: Form) -> dict[str, Any]:
    """What `moe_experts` must know of a gated unit."""
    return {name: form.args[name] for name in _UNIT if form.args.get(name) is not None}


def routing_arguments(m: Match, x: Value) -> dict[str, Any]:
    """x, ids and weights of each token, and the dtypes of the weighted sum."""
    pairs = (x.shape[0], chosen_each(m))
    ids, weights = (m.view.canon.reshape(m[name], pairs) for name in ("ids", "weights"))
    return {"x": x, "indices": ids, "weights": weights, "product_dtype": m["products"].dtype, "out_dtype": m.root.dtype}


def rewrite_experts(m: Match) -> Call:
    x = m["x"]
    args = {**routing_arguments(m, x), "gate_up": m["gate_up"], "up": m.get("up"), "down": m["down"]}
    args |= {name: m[name] for name in ("gate_up_bias", "up_bias", "down_bias") if name in m}
    args |= unit_arguments(m) if "unit" in m else {"gated": False, "activation": activation_of(m)}
    return Call(moe_experts, args, [m.view.canon.reshape(m.root, (x.shape[0], m["down"].shape[2]))])


_BETWEEN = 12  # operators between the two products of an expert, limits and slopes included


def is_second_product(value: Value) -> bool:
    """Whether the rows of a grouped product are made of those of another."""
    seen = [value.args[0]]
    for _ in range(_BETWEEN):
        if any(found.op == "_grouped_mm" for found in seen):
            return True
        seen = list(dict.fromkeys(arg for found in seen for arg in found.args))
    return False


MOE_EXPERTS = Rule(
    "moe_experts",
    pattern=weighted_sum(results),
    check=check_experts,
    rewrite=rewrite_experts,
    produces="moe_experts",
    idioms={"experts": "results"},
    gist=op_any_args("_grouped_mm").where(is_second_product, "not the second of two grouped products").as_("site"),
)

register_builtin(MOE_EXPERTS)
