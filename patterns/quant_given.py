"""Quantisation with scales that are given: per tensor, per channel, per group, to whole numbers or float8; and smoothing before it.

    q = torch.clamp(torch.round(x / scale) + zero_point, -128, 127).to(torch.int8)

What is read off the graph, and how bounds and rounding are told, is said in patterns/quant.py, which finds scales.

Sources: torch.ao.quantization (`quantized_decomposed`), SmoothQuant, torchao, compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.quant import quantize
from npu_fusion.ops.quant_core import FLOAT8_DTYPES
from npu_fusion.pattern import (
    AttrIs,
    any_of,
    anything,
    bits,
    cast,
    lit,
    opt_cast,
    opt_upcast,
    opt_view,
    sem,
    var,
)
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.shapes import broadcast, known_equal, same_shape

from .quant import (
    QUANTIZE_BY_INVERSE,
    QUANTIZE_ROWS,
    QUANTIZE_ROWS_ASYMMETRIC,
    apply_of,
    bounds_of,
    check_aligned,
    check_floor,
    check_range,
    check_rows,
    check_source,
    clamped,
    finished,
    given,
    known_numbers,
    leads_to,
    nearest,
    nonzero,
    over,
    rewrite_found,
    shifted,
    spelling,
    storage,
    stored,
    symmetric_scale,
    whole,
    x,
    zero,
)

# -------------------------------------------------------------------- scales that are given

by_given = any_of(
    over(opt_upcast(x), given),
    (opt_upcast(x) * opt_view(opt_cast(given), "reshape", "expand")).as_("quotient").as_("product"),
    (opt_upcast(x) * lit("given_number")).as_("quotient"),
)
given_zero = any_of(lit("zero_number"), opt_view(opt_cast(zero), "reshape", "expand"))


def _is_factor(value: Value, source: Value) -> bool:
    """Whether the value broadcasts along x: a scale of the tensor, of channels, rows or groups, not a tensor of x's own size."""
    if not bits(value.dtype) or value.ndim > source.ndim or not same_shape(broadcast(value.shape, source.shape), source.shape):
        return False
    return value.ndim < source.ndim or any(known_equal(a, 1) and not known_equal(b, 1) for a, b in zip(value.shape, source.shape))


def _tensor_of(m: Match, name: str, literal: str) -> Value | None:
    """A scale or zero point: the tensor as it is applied, or one of no dimensions for a number."""
    if name in m:
        return _as_applied(m, name)
    if literal not in m:
        return None
    number = m.number(literal)
    if literal == "given_number" and number and spelling(m, m["quotient"]) == "div":
        number = 1.0 / number
    dtype = m["quotient"].dtype if bits(m["quotient"].dtype) >= 32 else torch.float32
    return _constant(m, number, dtype)


def _constant(m: Match, number: Any, dtype: torch.dtype) -> Value:
    device = m["x"].node.meta["val"].device if m["x"].node is not None else torch.device("cpu")
    return m.view.table.intern("full", (), {"value": float(number), "shape": (), "device": device}, (), dtype)


def _as_applied(m: Match, name: str) -> Value:
    """The tensor bound as `name` with the reshapes under which it meets x, but without casts and expansions."""
    holders = [m["quotient"]] if name == "given" else [user for user in m.visited if user.op == "add"]
    for holder in holders:
        for arg in holder.args:
            value = arg
            while value.op in ("cast", "expand", "reciprocal"):
                value = value.args[0]
            if leads_to(value, m[name]) or value is m[name]:
                return value if value.op == "reshape" else m[name]
    found: Value = m[name]
    return found


def check_given(m: Match) -> Reject | None:
    """Scale and zero point broadcast along x, and the result is clamped."""
    rejected = known_numbers(m, "low", "high", "given_number", "zero_number") or check_source(m) or check_range(m)
    if rejected is not None:
        return rejected
    if bounds_of(m) is None:
        return Reject("the rounded value is not clamped, and may leave the range of its type", m["site"])
    if "given" in m and not _is_factor(_as_applied(m, "given"), m["x"]):
        return Reject("the scale is not one number, nor one a channel, row or group", m["given"])
    if "given_number" in m and not m.number("given_number"):
        return Reject("the scale is 0", m["site"])
    if "zero" in m and not _is_zero_point(_as_applied(m, "zero"), m["x"]):
        return Reject("the zero point is not one number, nor one a channel, row or group", m["zero"])
    return None


def _is_zero_point(value: Value, source: Value) -> bool:
    if value.dtype is None or value.dtype is torch.bool or value.ndim > source.ndim:
        return False
    fits = same_shape(broadcast(value.shape, source.shape), source.shape)
    smaller = value.ndim < source.ndim or any(known_equal(a, 1) and not known_equal(b, 1) for a, b in zip(value.shape, source.shape))
    return fits and smaller


def rewrite_given(m: Match) -> Call:
    scale = _tensor_of(m, "given", "given_number")
    zero_point = _tensor_of(m, "zero", "zero_number")
    apply = "multiply" if "product" in m else apply_of(m)
    if "given_number" in m:
        apply = "divide" if spelling(m, m["quotient"]) == "div" else "multiply"
    args = {"x": m["x"], "scale": scale, "zero_point": zero_point, "apply": apply, **storage(m, (0, 0))}
    return Call(quantize, args, [m.root, None, None])


_betrayed = nearest(anything()).as_("site")

QUANTIZE = Rule(
    "quantize",
    pattern=stored(any_of(whole(by_given), shifted(by_given, given_zero))),
    check=check_given,
    rewrite=rewrite_given,
    produces="quantize",
    idioms={"quantize": "site"},
    hidden_launches=1,
    gist=cast(
        opt_cast(
            any_of(clamped(opt_cast(any_of(_betrayed + var("any_zero"), _betrayed))), nearest(clamped(anything())).as_("site"), _betrayed)
        )
    ).where(lambda value: value.dtype in (torch.int8, torch.uint8), "the result is not stored in a byte"),
)

# -------------------------------------------------------------------- float8

eighth = any_of(clamped(by_given), by_given)


def check_float8(m: Match) -> Reject | None:
    """A cast to float8 of what is clamped to its range."""
    rejected = known_numbers(m, "low", "high", "given_number")
    if rejected is not None or "high" not in m:
        return rejected or Reject("the value is not clamped to the range of float8", m["site"])
    if not bits(m["x"].dtype) or not same_shape(m["x"].shape, m.root.shape):
        return Reject("what is quantised is not floating point, or of another shape", m["x"])
    if "given" in m and not _is_factor(_as_applied(m, "given"), m["x"]):
        return Reject("the scale is not one number, nor one a channel, row or group", m["given"])
    return None


QUANTIZE_FLOAT8 = Rule(
    "quantize_float8",
    pattern=cast(opt_cast(eighth), dtype=AttrIs("float8", lambda dtype, value: dtype in FLOAT8_DTYPES)).as_("site"),
    check=check_float8,
    rewrite=rewrite_given,
    produces="quantize",
    idioms={"quantize": "site"},
    hidden_launches=1,
)


def check_float8_rows(m: Match) -> Reject | None:
    rejected = known_numbers(m, "low", "high", "floor", "per_step")
    if rejected is not None or "high" not in m or not nonzero(m):
        return rejected or Reject("the value is not clamped to the range of float8", m["site"])
    if not bits(m["x"].dtype) or not same_shape(m["x"].shape, m.root.shape):
        return Reject("what is quantised is not floating point, or of another shape", m["x"])
    return check_rows(m, ("scale",)) or check_aligned(m) or check_floor(m, m["raw_scale"].dtype, m["scale"].dtype)


QUANTIZE_FLOAT8_ROWS = Rule(
    "quantize_float8_rows",
    pattern=cast(
        opt_cast(clamped(over(opt_upcast(x), finished(symmetric_scale)))),
        dtype=AttrIs("float8", lambda dtype, value: dtype in FLOAT8_DTYPES),
    ).as_("site"),
    check=check_float8_rows,
    rewrite=rewrite_found,
    produces="quantize",
    idioms={"quantize": "site"},
    hidden_launches=1,
)

# -------------------------------------------------------------------- smoothing

smooth = var("smooth")


def _vectors(product: Value) -> Iterator[tuple[Value, Value]]:
    for a, b in ((0, 1), (1, 0)):
        yield product.args[a], product.args[b]


def check_smoothed(m: Match) -> Reject | None:
    """The factor is a vector along the channels, and the product is rounded to no narrower type."""
    form, product = m.form("q"), m["smoothed"]
    if form.args.get("smooth") is not None:
        return Reject("it is smoothed already", m["q"])
    vector = m["smooth"]
    if not bits(vector.dtype) or vector.ndim != 1 or not known_equal(vector.shape[0], product.shape[-1]):
        return Reject("the factor is no vector along the channels", vector)
    if product.dtype != torch.promote_types(m["source"].dtype, vector.dtype) or not same_shape(m["source"].shape, product.shape):
        return Reject("the product is computed in another type than its factors promote to", product)
    return None


def rewrite_smoothed(m: Match) -> Call:
    divides = m["smoothed"].op == "div" and spelling(m, m["smoothed"]) == "div"
    vector = m["smooth"]
    if m["smoothed"].op == "div" and not divides:
        vector = m.view.canon.unary("reciprocal", vector)
    form = m.form("q")
    args = {**form.args, "x": m["source"], "smooth": vector, "smooth_divide": divides}
    return Call(quantize, args, [*form.match.call.outputs])


source = var("source")
smoothed = any_of(opt_upcast(source) * opt_upcast(smooth), opt_upcast(source) / opt_upcast(smooth)).as_("smoothed")

SMOOTHED_QUANTIZE = Rule(
    "smoothed_quantize",
    pattern=sem("quantize", x=smoothed).as_("q"),
    check=check_smoothed,
    rewrite=rewrite_smoothed,
    produces="quantize",
)

# The order decides between calls that save as many launches: were found scales registered first, the same scale taken as given would win.
register_builtin(
    QUANTIZE, QUANTIZE_ROWS, QUANTIZE_ROWS_ASYMMETRIC, QUANTIZE_BY_INVERSE, QUANTIZE_FLOAT8, QUANTIZE_FLOAT8_ROWS, SMOOTHED_QUANTIZE
)
