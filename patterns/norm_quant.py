"""Norms and gated units of which the result is quantised at once.

These start from what other rules found: a norm whose result is quantised is quantised in the norm's kernel. Where the norm has other
readers, a router say, or a second projection that is not quantised, it is returned beside q. A linear that flattens its tokens before it
quantises them changes nothing: the fused op quantises the rows where the norm has them.

Source: SmoothQuant; `npu_add_rms_norm_quant`, `npu_add_rms_norm_dynamic_quant`, `npu_swiglu_quant`, `npu_dequant_swiglu_quant`.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.norm_quant import add_rms_norm_quant, dequant_glu_quant, glu_quant, rms_norm_quant
from npu_fusion.ops.quant_core import QUANTIZATION_NAMES
from npu_fusion.pattern import Pattern, opt_upcast, opt_view, sem
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.semantic import SemanticOp
from npu_fusion.view import Form, Value
from npu_fusion.view.shapes import known_equal, same_shape

_NORM_NAMES = ("weight", "eps", "weight_offset", "round_dtype")
_SUM_NAMES = ("x", "residual", "bias", "norm_unrounded", "sum_dtype")
_UNIT_NAMES = ("gate", "up", "activation", "layout", "alpha", "gate_limit", "up_limit", "up_offset", "round_dtype")
_SCALE_NAMES = ("scale", "scale2", "bias", "combined", "bias_first", "compute_dtype", "round_dtype", "out_dtype")


def in_rows(source: Pattern) -> Pattern:
    """What is quantised: the source, in whatever leading dimensions and in its type or a wider one."""
    return opt_upcast(opt_view(source, "reshape"))


def _quantising(form: Form) -> dict[str, Any]:
    return {name: form.args[name] for name in QUANTIZATION_NAMES if name in form.args}


def _named(form: Form, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: form.args[name] for name in names if name in form.args}


def _keeps_types(m: Match, name: str) -> Reject | None:
    """Quantising starts from the norm's result as the norm gives it: a widening in between is the fused op's own."""
    form, q = m.form(name), m.form("q")
    if q.args.get("smooth") is not None and q.args["x"].dtype is not m[name].dtype:
        return Reject("the result is widened before it is smoothed", m[name])
    if q.args.get("smooth") is not None and any(_is_norm(part.call.args["x"]) for part in q.match.parts if part.call.op.name == "quantize"):
        return Reject("what looks like a smoothing is the norm's own weight", m[name])
    if form.args.get("gate") is not None or form.args.get("group_size"):
        return Reject("the norm has a gate or runs over groups of channels", m[name])
    return None


def _is_norm(value: Value) -> bool:
    return any(value.form(name) is not None for name in ("rms_norm", "add_rms_norm"))


def _steps_apart(m: Match, name: str) -> dict[str, Any]:
    """The arguments of quantising, with the types that followed from what was quantised written out, for rows where the source has them."""
    q, source = m.form("q"), m[name]
    args = _quantising(q)
    if q.args.get("scale") is None:
        args.setdefault("compute_dtype", q.args["x"].dtype)
    given: dict[str, Any] = {key: _in_rows(m, args[key], source.shape[:-1], q.args["x"]) for key in ("scale", "zero_point") if key in args}
    return {**args, **given}


def _in_rows(m: Match, value: Any, rows: tuple[Any, ...], numbers: Value) -> Any:
    """What goes with the numbers, row by row or for all, in other leading dimensions."""
    if not isinstance(value, Value) or value.ndim != numbers.ndim or same_shape(numbers.shape[:-1], rows):
        return value
    if same_shape(value.shape[:-1], numbers.shape[:-1]):
        return m.view.canon.reshape(value, (*rows, value.shape[-1]))
    return m.view.canon.reshape(value, value.shape[-1:])


def _keeps_rows(m: Match, name: str) -> Reject | None:
    """Between the source and what is quantised leading dimensions alone are reshaped."""
    quantised, source = m.form("q").args["x"], m[name]
    if not known_equal(quantised.shape[-1], source.shape[-1]):
        return Reject("what is quantised are not the rows of the result: a group of channels, say", quantised)
    return None


def _read_elsewhere(m: Match, value: Value) -> bool:
    """Whether the value, or its rows on the way to being quantised, have readers besides those that are quantising them."""
    inside = m.form("q").match.visited
    path = [m.form("q").args["x"]]
    while path[-1] is not value:
        path.append(path[-1].args[0])
    return any(
        any(user not in inside and user not in path for user in rows.users)
        or any(node in _returned(m) for node in m.view.nodes.get(rows, ()))
        for rows in path
    )


def _returned(m: Match) -> set[Any]:
    return set(next(iter(m.view.graph.find_nodes(op="output"))).all_input_nodes)


def _outputs(m: Match, name: str) -> list[Value | None]:
    """q, its scale and its zero point, in the leading dimensions of the source."""
    lead, canon = m[name].shape[:-1], m.view.canon
    found: list[Value | None] = []
    for value in m.form("q").match.call.outputs:
        rows = value is not None and same_shape(value.shape[:-1], m.form("q").args["x"].shape[:-1])
        shape = (*lead, value.shape[-1]) if value is not None and rows else (1,) * (len(lead) + 1)
        found.append(None if value is None else canon.reshape(value, shape))
    return found


def rewrite_norm(m: Match) -> Call:
    norm, y = m.form("norm"), m["norm"]
    args = {**_named(norm, ("x", *_NORM_NAMES)), "norm_dtype": y.dtype, **_steps_apart(m, "norm")}
    returned = _read_elsewhere(m, y)
    return Call(rms_norm_quant, {**args, "return_norm": returned}, [*_outputs(m, "norm"), y if returned else None])


def rewrite_add_norm(m: Match) -> Call:
    norm, y = m.form("norm"), m["norm"]
    args = {**_named(norm, (*_SUM_NAMES, *_NORM_NAMES)), "norm_dtype": y.dtype, **_steps_apart(m, "norm")}
    returned = _read_elsewhere(m, y)
    total = norm.match.call.outputs[1]
    return Call(add_rms_norm_quant, {**args, "return_norm": returned}, [*_outputs(m, "norm"), y if returned else None, total])


def check_norm(m: Match) -> Reject | None:
    return _keeps_types(m, "norm") or _keeps_rows(m, "norm")


def _norm_rule(name: str, norm: str, rewrite: Any, produces: SemanticOp) -> Rule:
    pattern = sem("quantize", x=in_rows(sem(norm).as_("norm"))).as_("q")
    return Rule(name, pattern=pattern, check=check_norm, rewrite=rewrite, produces=produces.name)


RMS_NORM_QUANT = _norm_rule("rms_norm_quant", "rms_norm", rewrite_norm, rms_norm_quant)
ADD_RMS_NORM_QUANT = _norm_rule("add_rms_norm_quant", "add_rms_norm", rewrite_add_norm, add_rms_norm_quant)

# -------------------------------------------------------------------- gated units


def rewrite_glu(m: Match) -> Call:
    unit = m.form("unit")
    args = {**_named(unit, _UNIT_NAMES), "product_dtype": m["unit"].dtype, **_steps_apart(m, "unit")}
    return Call(glu_quant, args, _outputs(m, "unit"))


def check_glu(m: Match) -> Reject | None:
    if m.form("q").args.get("smooth") is not None and m.form("q").args["x"].dtype is not m["unit"].dtype:
        return Reject("the result is widened before it is smoothed", m["unit"])
    return _keeps_rows(m, "unit")


GLU_QUANT = Rule(
    "glu_quant",
    pattern=sem("quantize", x=in_rows(sem("glu").as_("unit"))).as_("q"),
    check=check_glu,
    rewrite=rewrite_glu,
    produces="glu_quant",
)


def check_sums(m: Match) -> Reject | None:
    """One merged tensor of int32 sums, in whatever leading dimensions."""
    unit, sums = m.form("unit"), m.form("sums")
    numbers: Value = sums.args["x"]
    if unit.args.get("up") is not None:
        return Reject("gate and up are two tensors", m["unit"])
    if numbers.dtype is not torch.int32 or sums.args.get("zero_point") is not None:
        return Reject("what is dequantised are no int32 sums", m["sums"])
    if not known_equal(numbers.shape[-1], unit.args["gate"].shape[-1]):
        return Reject("the sums are reshaped by more than their leading dimensions", m["sums"])
    return _keeps_rows(m, "unit")


def rewrite_sums(m: Match) -> Call:
    unit, sums = m.form("unit"), m.form("sums")
    numbers, rows = sums.args["x"], unit.args["gate"].shape[:-1]
    scales = {f"sum_{name}": _in_rows(m, value, rows, numbers) for name, value in _named(sums, _SCALE_NAMES).items()}
    args = {**scales, **_named(unit, _UNIT_NAMES[2:]), "product_dtype": m["unit"].dtype, **_steps_apart(m, "unit")}
    return Call(dequant_glu_quant, {**args, "x": _in_rows(m, numbers, rows, numbers)}, _outputs(m, "unit"))


DEQUANT_GLU_QUANT = Rule(
    "dequant_glu_quant",
    pattern=sem("quantize", x=in_rows(sem("glu", gate=opt_view(sem("dequantize").as_("sums"), "reshape")).as_("unit"))).as_("q"),
    check=check_sums,
    rewrite=rewrite_sums,
    produces="dequant_glu_quant",
)

register_builtin(RMS_NORM_QUANT, ADD_RMS_NORM_QUANT, GLU_QUANT, DEQUANT_GLU_QUANT)
