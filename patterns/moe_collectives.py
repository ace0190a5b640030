"""MoE collectives with what stands around them.

    h = residual + combine(experts(dispatch(x)))         # a block of a model with expert_parallel, and the norm of the next one
    y = rms_norm(h)

Shared experts are added by the combine: `combine(...) + shared(x)`. A sum that a norm is taken of is no such sum, but a residual one: both
go into one op with the combine. The rows of a dispatch that go through grouped products and a gated unit into its combine are a whole.

A collective that is needed for something else too is left as it is: it must not be made twice.
"""

from __future__ import annotations

from itertools import chain, combinations
from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.moe_collectives import moe_combine, moe_dispatch
from npu_fusion.ops.moe_fused import fused_deep_moe, grouped_linear, moe_combine_add_rms_norm
from npu_fusion.pattern import Pattern, any_of, bits, op, op_any_args, opt_cast, opt_view, sem, torch_op, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.semantic import SemanticOp
from npu_fusion.view import Value
from npu_fusion.view.shapes import known_equal, same_shape

from .experts import ANY, FIRST_DIM

COMBINE, DISPATCH = "npu_fusion::moe_combine", "npu_fusion::moe_dispatch"


def arguments_of(value: Value, called: SemanticOp) -> dict[str, Any]:
    """The arguments of a call that the view knows as it stands in the graph, by the names of the schema."""
    operands = iter(value.args)
    names = [spec.name for spec in called.overload._schema.arguments]
    return {name: next(operands) if f"@{name}" in value.attrs else value.attrs.get(name) for name in names}


def _one_call(m: Match, *names: str) -> Reject | None:
    """Calls that the view cannot tell apart are several all the same."""
    for name in names:
        if len(m.view.nodes[m[name]]) != 1:
            return Reject("the same collective is called twice", m[name])
    return None


# -------------------------------------------------------------------- shared experts

combined = op_any_args(COMBINE).as_("combined")
with_shared = (opt_view(combined, "reshape") + var("shared")).as_("with_shared")


def _check_shared(m: Match) -> Reject | None:
    value, shared = m["combined"], m["shared"]
    if arguments_of(value, moe_combine)["shared"] is not None:
        return Reject("the combine has shared experts already", value)
    if shared.dtype is not value.dtype or m["with_shared"].dtype is not value.dtype:
        return Reject("what is added is of another dtype", shared)
    if not same_shape(shared.shape, m["with_shared"].shape):
        return Reject("what is added is broadcast", shared)
    if not known_equal(shared.shape[-1], value.shape[-1]):
        return Reject("what is added is no row for each token", shared)
    if m.exact and bits(value.dtype) < 32:
        return Reject("rounding='exact': the model rounds the combined rows before it adds", value)
    return None


def check_combine_shared(m: Match) -> Reject | None:
    total = m["with_shared"]
    if any(form.op.startswith("add_rms_norm") for value in (total, *total.users) for form in value.forms):
        return Reject("it is the sum of a residual stream, of which a norm is taken", total)
    return _one_call(m, "combined") or _check_shared(m)


def _combine_arguments(m: Match) -> dict[str, Any]:
    args = arguments_of(m["combined"], moe_combine)
    if "shared" in m:
        args["shared"] = m.view.canon.reshape(m["shared"], m["combined"].shape)
    return args


def rewrite_combine_shared(m: Match) -> Call:
    return Call(moe_combine, _combine_arguments(m), [m.view.canon.reshape(m.root, m["combined"].shape)])


MOE_COMBINE_SHARED = Rule(
    "moe_combine_shared",
    pattern=with_shared,
    check=check_combine_shared,
    rewrite=rewrite_combine_shared,
    produces="moe_combine",
    starts_from=frozenset({"add_rms_norm"}),
)

# -------------------------------------------------------------------- the next norm

came_home = opt_view(any_of(with_shared, combined), "reshape")


def check_combine_norm(m: Match) -> Reject | None:
    args, value = m.form("norm").args, m["combined"]
    if args.get("bias") is not None:
        return Reject("a bias is added as well", m["norm"])
    if not known_equal(m["norm"].shape[-1], value.shape[-1]):
        return Reject("the norm goes over something else than the rows", m["norm"])
    if any(args[name].dtype is not value.dtype for name in ("x", "residual")):
        return Reject("the residual stream is of another dtype", m["norm"])
    return _one_call(m, "combined") or (_check_shared(m) if "shared" in m else None)


def rewrite_combine_norm(m: Match) -> Call:
    form, canon, rows = m.form("norm"), m.view.canon, m["combined"].shape
    names = ("weight", "eps", "weight_offset", "norm_unrounded", "sum_dtype", "round_dtype", "out_dtype")
    norm = {name: form.args[name] for name in names if form.args.get(name) is not None or name == "weight"}
    args = {**_combine_arguments(m), **norm, "residual": canon.reshape(m["stream"], rows)}
    return Call(
        moe_combine_add_rms_norm, args, [None if value is None else canon.reshape(value, rows) for value in form.match.call.outputs]
    )


MOE_COMBINE_ADD_RMS_NORM = Rule(
    "moe_combine_add_rms_norm",
    pattern=any_of(
        sem("add_rms_norm", x=came_home, residual=var("stream")).as_("norm"),
        sem("add_rms_norm", x=var("stream"), residual=came_home).as_("norm"),
    ),
    check=check_combine_norm,
    rewrite=rewrite_combine_norm,
    produces="moe_combine_add_rms_norm",
)

# -------------------------------------------------------------------- grouped products

_ends = opt_cast(torch_op("cumsum", opt_cast(var("counts")), dim=FIRST_DIM, dtype=ANY, overload="default", tensors="self"))


def check_grouped(m: Match) -> Reject | None:
    counts, x, weight = m["counts"], m["x"], m["weight"]
    if counts.dtype not in (torch.int32, torch.int64):
        return Reject("the rows of each group are counted in floats", counts)
    if (x.ndim, weight.ndim, counts.ndim) != (2, 3, 1) or x.dtype is not weight.dtype or m.root.dtype is not x.dtype:
        return Reject("not rows of one dtype times a matrix for each group", m.root)
    if not known_equal(counts.shape[0], weight.shape[0]):
        return Reject("there are not as many groups as matrices", counts)
    return None


def rewrite_grouped(m: Match) -> Call:
    return Call(grouped_linear, {name: m[name] for name in ("x", "weight", "counts")}, [m.root])


GROUPED_LINEAR = Rule(
    "grouped_linear",
    pattern=any_of(
        torch_op("_grouped_mm", var("x"), var("weight"), _ends, bias=None, tensors="self mat2 offs"),
        op("transformers::grouped_mm_fallback", var("x"), var("weight"), _ends),
    ),
    check=check_grouped,
    rewrite=rewrite_grouped,
    produces="grouped_linear",
    hidden_launches=1,  # of what sets the groups up
)

# -------------------------------------------------------------------- a layer's experts as a whole

dispatched = op_any_args(DISPATCH).as_("dispatched")
_rows, _counts, _handle = (op("getitem", dispatched, index=index) for index in (0, 2, 3))
_unit = sem("glu", gate=sem("grouped_linear", x=_rows, weight=var("gate_up"), counts=_counts), up=None).as_("unit")
_results = sem("grouped_linear", x=_unit, weight=var("down"), counts=_counts)


def _combine_of(results: Pattern) -> Pattern:
    """The combine of results, whichever of its optional operands it has."""
    optional = ("active", "placement", "shared", "max_tokens")
    subsets = chain.from_iterable(combinations(optional, count) for count in range(len(optional) + 1))
    given = (results, var("ids"), var("weights"), _handle)
    return any_of(
        *(torch_op(COMBINE, *given, *map(var, names), tensors=" ".join(("x", "ids", "weights", "handle", *names))) for names in subsets)
    )


_SAME = ("ids", "weights", "active", "placement", "group", "ranks", "experts", "max_tokens")
_PLAIN = {"alpha": 1.0, "gate_limit": None, "up_limit": None, "up_offset": 0.0}


def check_whole(m: Match) -> Reject | None:
    there, home = arguments_of(m["dispatched"], moe_dispatch), arguments_of(m.root, moe_combine)
    if any(there[name] is not home[name] and there[name] != home[name] for name in _SAME):
        return Reject("the combine is not told what the dispatch was", m.root)
    if there["quant"] != "none":
        return Reject("the rows travel quantised", m["dispatched"])
    unit = m.form("unit").args
    if any(unit.get(name, default) not in (default, None) for name, default in _PLAIN.items()):
        return Reject("the gated unit has limits, a slope or an offset", m["unit"])
    if m["unit"].dtype is not there["x"].dtype:
        return Reject("the gated unit gives another dtype", m["unit"])
    return _one_call(m, "dispatched") or (Reject("the same collective is called twice", m.root) if len(m.view.nodes[m.root]) != 1 else None)


def rewrite_whole(m: Match) -> Call:
    there, home, unit = arguments_of(m["dispatched"], moe_dispatch), arguments_of(m.root, moe_combine), m.form("unit").args
    args = {name: there[name] for name in ("x", *_SAME)} | {"shared": home["shared"], "gate_up": m["gate_up"], "down": m["down"]}
    args |= {name: unit[name] for name in ("activation", "layout", "round_dtype") if unit.get(name) is not None}
    return Call(fused_deep_moe, args, [m.root])


FUSED_DEEP_MOE = Rule(
    "fused_deep_moe",
    pattern=_combine_of(_results),
    check=check_whole,
    rewrite=rewrite_whole,
    produces="fused_deep_moe",
)

register_builtin(MOE_COMBINE_SHARED, MOE_COMBINE_ADD_RMS_NORM, GROUPED_LINEAR, FUSED_DEEP_MOE)
