"""Routed experts in int8: quantised rows, sorted by expert, times int8 matrices; what comes out is scaled by row and by channel.

    q, s = quantize(x)                                              # each token before it is sorted, or each row after
    h = grouped_mm(q[order // k].to(bf16), gate_up.to(bf16), ends) * s[order // k] * gate_up_scale[ids[order]]
    q, s = quantize(act(h))
    y = grouped_mm(q.to(bf16), down.to(bf16), ends) * s * down_scale[ids[order]]

and the weighted sum of experts.py. Sums of products that the model rounds, the fused op keeps. A row's scale is that which its own
quantising found, and a channel's is that of the expert that the row went to; whoever takes others computes another thing.

Sources: SmoothQuant; vLLM's and SGLang's W8A8 layers, as plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.experts_int8 import moe_experts_int8
from npu_fusion.ops.quant_core import QUANTIZATION_NAMES
from npu_fusion.pattern import Pattern, any_of, bits, opt_cast, opt_upcast, opt_view, prod, sem, through, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Form, Value
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import known_equal, same_shape

from .experts import at, check_routing, grouped, ordered, routing_arguments, taken, unit_arguments, weighted_sum

_KEEPING = ("reshape", "expand", "cast")
CARRIERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)

# -------------------------------------------------------------------- pattern


def carried(whole: Pattern) -> Pattern:
    """Whole numbers of a byte, in whatever types that hold them all."""
    return opt_cast(whole, lambda value: value.dtype in CARRIERS)


def floating(number: Pattern) -> Pattern:
    """Sums or scales, in whatever floating types of 16 bits and more."""
    return opt_cast(number, lambda value: bits(value.dtype) >= 16)


def scaled(rows: Pattern, matrices: str) -> Pattern:
    """The sums of products of whole numbers, times the scales of rows and of channels, in whatever order."""
    of_rows = var(f"{matrices}_rows").where(lambda scale: scale.ndim == 2 and known_equal(scale.shape[1], 1), "no scale of the rows")
    of_channels = through(_KEEPING, at(through(_KEEPING, var(f"{matrices}_scale")), ordered)).as_(f"{matrices}_columns")
    sums = grouped(carried(rows), matrices).as_(f"{matrices}_sums")
    return floating(prod(floating(sums), of_rows, of_channels))


before = taken(opt_view(carried(sem("quantize").as_("quantised_tokens")), "reshape").as_("source"), carried)
after = sem("quantize", x=opt_upcast(taken(var("source")))).as_("quantised_rows")
rows = any_of(before, after)
first = scaled(rows, "gate_up").as_("first")
unit = any_of(
    sem("glu", gate=first, up=None).as_("unit"),
    sem("glu", gate=first, up=scaled(rows, "up").as_("second")).as_("unit"),
)
hidden = sem("quantize", x=opt_upcast(unit)).as_("quantised_hidden")
results = scaled(hidden, "down").as_("results")

# -------------------------------------------------------------------- scales


def _bare(value: Value) -> Value | None:
    """A scale before views and casts that round nothing; None where one rounds."""
    while value.op in _KEEPING:
        if value.op == "cast" and bits(value.dtype) < bits(value.args[0].dtype):
            return None
        value = value.args[0]
    return value


def found_scale(form: Form) -> Value | None:
    """The scale that quantising found."""
    scale = form.match.call.outputs[1]
    return None if scale is None else _bare(scale)


def _is_of_tokens(m: Match, value: Value, form: Form) -> bool:
    """Whether a scale of rows was taken from those of tokens as the rows were."""
    taken_ = _bare(value)
    if taken_ is None or taken_.op != "index" or len(taken_.args) != 2:
        return False
    source, place = taken_.args
    tokens = m["source"].shape[0]
    if "repeated" in m:
        spread = source.args[0] if source.op == "reshape" else source
        whole = spread.op == "expand" and same_shape(spread.shape[:2], m["repeated"].shape[:2])
        inner = spread.args[0] if whole else source
        return whole and place is m.get("order") and known_equal(inner.shape[0], tokens) and _bare(inner) is found_scale(form)
    return place is m.get("token") and known_equal(source.shape[0], tokens) and _bare(source) is found_scale(form)


def _check_rows(m: Match, name: str) -> Reject | None:
    """The scale of the rows that enter a product is what quantising them found."""
    scale, sums = m[f"{name}_rows"], m[{"gate_up": "first", "up": "second", "down": "results"}[name]]
    if not known_equal(scale.shape[0], sums.shape[0]) or not bits(scale.dtype):
        return Reject("the scale is not one for each row", scale, 2)
    if name == "down":
        own = _bare(scale) is found_scale(m.form("quantised_hidden"))
    elif "quantised_rows" in m:
        own = _bare(scale) is found_scale(m.form("quantised_rows"))
    else:
        own = _is_of_tokens(m, scale, m.form("quantised_tokens"))
    return None if own else Reject("the scale of the rows is not that by which they were quantised", scale, 2)


def _channels(m: Match, name: str) -> Value | None:
    """The scales of the columns of all matrices, [E, N]; None for others."""
    canon, matrices = m.view.canon, m[name]
    stored: Value = m[f"{name}_scale"]
    taken_: Value = m[f"{name}_columns"]
    rows, (experts, width) = m["ids"].shape[0], (matrices.shape[0], matrices.shape[2])
    index = _bare(taken_)
    if taken_.ndim != 2 or not known_equal(taken_.shape[0], rows) or not bits(stored.dtype):
        return None
    if index is None or index.op != "index" or _bare(index.args[0]) is not stored:
        return None
    lengths = [size for size in stored.shape[1:] if not known_equal(size, 1)]
    if stored.ndim == 0 or not known_equal(stored.shape[0], experts) or len(lengths) > 1:
        return None
    if lengths and not (known_equal(lengths[0], width) and known_equal(taken_.shape[1], width)):
        return None
    flat = canon.reshape(stored, (experts, lengths[0] if lengths else 1))
    return flat if lengths else canon.expand(flat, (experts, width))


def _codes(canon: Canon, matrices: Value) -> Value | None:
    """The int8 matrices behind casts, in the order in which the product reads them; None for others."""
    if matrices.op == "cast":
        inner = matrices.args[0]
        return inner if inner.dtype is torch.int8 and matrices.dtype in CARRIERS else None
    if matrices.op not in ("permute", "slice", "reshape"):
        return None
    inner_codes = _codes(canon, matrices.args[0])
    if inner_codes is None:
        return None
    if matrices.op == "permute":
        return canon.permute(inner_codes, matrices.attrs["dims"])
    if matrices.op == "reshape":
        return canon.reshape(inner_codes, matrices.shape)
    cut = {name: matrices.attrs[name] for name in ("dim", "start", "stop", "step")}
    return canon.slice(inner_codes, **cut)


# -------------------------------------------------------------------- quantising


def _tokens_form(m: Match) -> Form:
    return m.form("quantised_rows" if "quantised_rows" in m else "quantised_tokens")


def how_quantised(form: Form) -> dict[str, Any]:
    """How rows are quantised, whatever type then carries the whole numbers."""
    return {name: form.args[name] for name in QUANTIZATION_NAMES if name in form.args and name != "dtype"}


def plain_quantising(first_form: Form, second_form: Form, site: Value) -> Reject | None:
    """Both products quantise their rows in one way, symmetrically, by a scale of their own."""
    how = how_quantised(first_form)
    if how != how_quantised(second_form):
        return Reject("the two products quantise their rows differently", site, 3)
    given = how.get("scale") is not None or how.get("smooth") is not None
    if given or how.get("per_tensor") or not how.get("symmetric", True):
        return Reject("the rows are not quantised symmetrically by a scale of their own", site, 3)
    if how.get("low", -128.0) < -128 or how.get("high", 127.0) > 127:
        return Reject("the whole numbers do not fit into int8", site, 3)
    return None


# -------------------------------------------------------------------- rule


def _names(m: Match) -> tuple[str, ...]:
    return ("gate_up", "up", "down") if "up" in m else ("gate_up", "down")


def _x(m: Match) -> Value:
    """What is quantised, a row a token."""
    source: Value = m["source"]
    return source if "quantised_rows" in m else m.view.canon.reshape(m.form("quantised_tokens").args["x"], source.shape)


def check_experts_int8(m: Match) -> Reject | None:
    """Routed experts, every scale of which is of its own rows, or of the channels of its own expert."""
    if m.exact:
        return Reject("rounding='exact': the model rounds sums and scales step by step", m["results"])
    if (wrong := check_routing(m, m["source"])) is not None:
        return wrong
    if (wrong := plain_quantising(_tokens_form(m), m.form("quantised_hidden"), m["quantised_hidden"])) is not None:
        return wrong
    if not same_shape(_tokens_form(m).args["x"].shape[-1:], m["source"].shape[-1:]):
        return Reject("the rows are not quantised whole", m["source"], 2)
    for name in _names(m):
        if (wrong := _check_rows(m, name)) is not None:
            return wrong
        if _codes(m.view.canon, m[name]) is None:
            return Reject("the matrices are not int8", m[name], 2)
        if _channels(m, name) is None:
            return Reject("the scale of the channels is not that of the row's expert", m[f"{name}_columns"], 2)
    return None


def _rounded(m: Match, name: str, result: str) -> torch.dtype:
    """The narrowest type in which the model has scaled sums: it makes no difference to the rounding whether the scales come before it."""
    narrowest: torch.dtype = min(m[f"{name}_sums"].dtype, m[result].dtype, key=bits)
    return narrowest


def rewrite_experts_int8(m: Match) -> Call:
    x, canon = _x(m), m.view.canon
    args = {**routing_arguments(m, x), **unit_arguments(m), **how_quantised(_tokens_form(m))}
    args |= {name: _codes(canon, m[name]) for name in _names(m)} | {f"{name}_scale": _channels(m, name) for name in _names(m)}
    args |= {"sum_dtype": _rounded(m, "gate_up", "first"), "result_dtype": _rounded(m, "down", "results"), "hidden_dtype": m["unit"].dtype}
    none = {} if "up" in m else {"up": None, "up_scale": None}
    return Call(moe_experts_int8, {**args, **none}, [canon.reshape(m.root, (x.shape[0], m["down"].shape[2]))])


MOE_EXPERTS_INT8 = Rule(
    "moe_experts_int8",
    pattern=weighted_sum(results),
    check=check_experts_int8,
    rewrite=rewrite_experts_int8,
    produces="moe_experts_int8",
    idioms={"experts": "results", "dequantize": "first"},
)

register_builtin(MOE_EXPERTS_INT8)
