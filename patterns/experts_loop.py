"""Routed experts by a loop over all of them, unrolled, where each makes something of every token:

    for e in range(E):
        weight = (weights * (ids == e)).sum(-1, keepdim=True)        # or a column of the weights of all experts, see combine.py
        out = out + mlp(x, gate_up[e], down[e]) * weight

All experts must be there, each once, with its own matrices and its own number. A loop over some of them, or with matrices of others, is
another thing, and stays as it is.

Source: modelling code of the models' authors, https://huggingface.co/deepseek-ai and https://github.com/mistralai/mistral-inference.
"""

from __future__ import annotations

from typing import Any

from npu_fusion.match import Match
from npu_fusion.ops.experts import moe_experts
from npu_fusion.pattern import AttrAs, AttrIs, Pattern, any_of, bits, lit, op, opt_cast, opt_view, permute, reshape, sem, sliced, sum_, var
from npu_fusion.pattern.terms import Term, Terms
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.shapes import known_equal, same_shape

from .activation import activation, activation_of
from .combine import combined
from .experts import unit_of

LAST_DIM = AttrIs("the last dimension", lambda dim, value: dim == value.ndim - 1)

# -------------------------------------------------------------------- one expert

_MATRICES = ("gate_up", "up", "down")


def linear(rows: Pattern, name: str) -> Pattern:
    """Rows times one expert's matrix, stored [in, out] or [out, in]."""
    own = reshape(sliced(var(name), dim=0, start=AttrAs(f"{name}.expert"), step=1))
    return op("matmul", rows, any_of(permute(own, dims=(1, 0)).as_(f"{name}.turned"), own))


first = linear(var("x"), "gate_up").as_("first")
hidden = any_of(
    sem("glu", gate=first, up=None).as_("unit"),
    sem("glu", gate=first, up=linear(var("x"), "up")).as_("unit"),
    activation(first).as_("ungated"),
)
result = linear(opt_cast(hidden), "down").as_("result")

is_chosen = op("eq", var("ids"), lit("number"))
other = op("ne", var("ids"), lit("number"))
of_chosen = any_of(
    op("mul", opt_cast(var("weights")), opt_cast(is_chosen), commutative=True),
    op("where", is_chosen, opt_cast(var("weights")), 0),
    op("where", any_of(other, op("not", is_chosen)), 0, opt_cast(var("weights"))),
)
weight = opt_cast(
    any_of(
        opt_view(sum_(opt_cast(of_chosen)).as_("by_number"), "reshape"),
        opt_view(sliced(var("matrix"), dim=LAST_DIM, start=AttrAs("column"), step=1).as_("by_column"), "reshape"),
        # matrix[:, e] without its dimension: every E-th number of all
        opt_view(sliced(reshape(var("matrix")), dim=0, start=AttrAs("column"), step=AttrAs("stride")).as_("by_column"), "reshape"),
    )
).as_("factor")
term = opt_cast(op("mul", opt_cast(result), weight, commutative=True).as_("products"))

# -------------------------------------------------------------------- all of them


def check_loop(m: Match) -> Reject | None:
    """Each expert is there once, by its number, its weight and its matrices, and all have the same tokens."""
    terms: tuple[Term, ...] = m["terms"]
    one = terms[0].bindings
    x, tokens = one["x"], one["x"].shape[0]
    if x.ndim != 2:
        return Reject("the tokens are not in rows", x, 1)
    numbers = [_number(term) for term in terms]
    if sorted(number for number in numbers if number is not None) != list(range(len(terms))):
        return Reject("the experts of the loop are not all experts, each once", m.root, 1)
    for term in terms:
        if (wrong := _check_term(term, one, numbers, terms)) is not None:
            return wrong
        if not same_shape(term.bindings["factor"].shape, (tokens, 1)):
            return Reject("a token has not one weight for the expert", term.bindings["factor"], 2)
    if (pairs := _pairs(m)) is None:
        return Reject("which experts are chosen for a token is not known", one["factor"], 3)
    ids, weights = pairs
    if ids.ndim != 2 or not same_shape(ids.shape, weights.shape) or not known_equal(ids.shape[0], tokens):
        return Reject("the weights are not one for each chosen expert", weights, 3)
    dtypes = {term.bindings[name].dtype for term in terms for name in ("x", "gate_up", "down", "first", "result")}
    if len(dtypes) > 1:
        return Reject(f"the products are of several dtypes: {', '.join(sorted(map(str, dtypes)))}", m.root, 4)
    if m.exact and bits(m.root.dtype) < 32 and not (isinstance(ids.shape[1], int) and ids.shape[1] <= 2):
        return Reject(f"rounding='exact': the model adds up in {m.root.dtype}, the fused op in fp32", m.root, 4)
    return None


def _check_term(term: Term, one: dict[str, Any], numbers: list[int | None], terms: tuple[Term, ...]) -> Reject | None:
    """The term is as the first, but for the number of the expert."""
    b, number = term.bindings, _number(term)
    same = ("x", "ids", "weights", "matrix", *_MATRICES)
    if any(b.get(name) is not one.get(name) for name in same) or any((f"{name}.turned" in b) != (f"{name}.turned" in one) for name in same):
        return Reject("the experts of the loop have not the same tokens, weights and matrices", term.value, 1)
    for name in _MATRICES:
        if name in b and (b[f"{name}.expert"] != number or b[name].ndim != 3 or not known_equal(b[name].shape[0], len(terms))):
            return Reject(f"the expert's {name} is not that of its number", term.value, 2)
    if "matrix" in b and not known_equal(b["matrix"].shape[-1], len(terms)):
        return Reject("the loop is not over all experts", term.value, 2)
    if "by_number" in b and not _is_row_sum(b["by_number"]):
        return Reject("the weights are not added up over a token's experts", b["by_number"], 2)
    if _unit(b) != _unit(one):
        return Reject("the experts of the loop have not one activation", term.value, 2)
    return None


def _number(term: Term) -> int | None:
    """Which expert's weight the term has."""
    b = term.bindings
    if "column" in b:
        number, column, experts = b["column"], b["by_column"], b["matrix"].shape[-1]
        if "stride" in b:
            single = column.ndim == 1 and known_equal(b["stride"], experts) and known_equal(column.attrs["stop"], column.args[0].shape[0])
        else:
            single = known_equal(column.shape[-1], 1)
        return number if single and isinstance(number, int) else None
    number = b["number"].value
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _is_row_sum(total: Value) -> bool:
    return total.attrs["dims"] == (1,) and total.args[0].ndim == 2


def _unit(bindings: dict[str, Any]) -> dict[str, Any]:
    """What `moe_experts` must know of the activation of an expert."""
    if "unit" in bindings:
        return unit_of(bindings["unit.form"])
    return {"gated": False, "activation": activation_of(bindings)}


def _pairs(m: Match) -> tuple[Value, Value] | None:
    """Ids and weights, [T, k]."""
    one = m["terms"][0].bindings
    if "ids" in one:
        return one["ids"], one["weights"]
    known = combined(one["matrix"])
    return None if known is None else (known.ids, known.values(m.view.canon))


def rewrite_loop(m: Match) -> Call:
    one, canon, pairs = m["terms"][0].bindings, m.view.canon, _pairs(m)
    assert pairs is not None

    def matrices(name: str) -> Value | None:
        return canon.permute(one[name], (0, 2, 1)) if f"{name}.turned" in one else one.get(name)

    args: dict[str, Any] = {name: matrices(name) for name in _MATRICES}
    args |= {"x": one["x"], "indices": pairs[0], "weights": pairs[1], "product_dtype": one["products"].dtype, "out_dtype": m.root.dtype}
    return Call(moe_experts, args | _unit(one), [m.root])


LOOPED_EXPERTS = Rule(
    "looped_experts",
    pattern=Terms("terms", term).as_("loop"),
    check=check_loop,
    rewrite=rewrite_loop,
    produces="moe_experts",
    idioms={"experts": "loop"},
)

register_builtin(LOOPED_EXPERTS)
