"""Products of int8 matrices, and what makes floating numbers of them, or of a quantised tensor, again.

    acc = torch._int_mm(x_q, weight.t())                              # or x_q.to(torch.int32) @ ..., or in floating point, where exact
    y = (acc.float() * x_scale * weight_scale + bias).to(torch.bfloat16)

The view reads `_int_mm` as the product of two casts to int32. A product in floating point is the same where every partial sum is a whole
number that its type holds. Scales keep the order in which the model multiplies by them.

Sources: LLM.int8(), SmoothQuant, torchao, `torch.ao.quantization` (`quantized_decomposed`).
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.quant import dequantize, quant_linear
from npu_fusion.ops.quant_core import FLOAT8_DTYPES
from npu_fusion.pattern import Pattern, any_of, anything, bits, cast, lit, op, opt_cast, opt_round, opt_upcast, opt_view, sem, sum_, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.shapes import broadcast, known_equal, known_ge, same_shape

# -------------------------------------------------------------------- products

_LARGEST_PRODUCT = 2**14  # of two numbers of a byte, -128 among them
_EXACT = {torch.float32: 2**24, torch.float64: 2**53}
"""Floating types of products, and the largest of the whole numbers that they hold all of."""


def check_product(m: Match) -> Reject | None:
    return _why_no_product(m["site"], m["x"], m["weight"])


def _is_product(value: Value) -> bool:
    if value.op != "matmul" or any(arg.op != "cast" for arg in value.args):
        return False
    return _why_no_product(value, *(arg.args[0] for arg in value.args)) is None


def _why_no_product(site: Value, x: Value, weight: Value) -> Reject | None:
    """None for two int8 operands, the second one a matrix, and sums that the type of the product holds."""
    if x.dtype is not torch.int8 or weight.dtype is not torch.int8:
        return Reject(f"the operands are {x.dtype} and {weight.dtype}, not int8", site)
    if weight.ndim != 2 or x.ndim < 2:
        return Reject("the second operand is no matrix that all rows share", weight)
    if site.dtype is torch.int32:
        return None
    limit = None if site.dtype is None else _EXACT.get(site.dtype)
    if limit is None:
        return Reject(f"sums of products are rounded in {site.dtype}", site)
    if not known_ge(limit // _LARGEST_PRODUCT, x.shape[-1]):
        return Reject(f"sums of {x.shape[-1]} products may be rounded in {site.dtype}", site)
    return None


def rewrite_product(m: Match) -> Call:
    out = None if m["site"].dtype is torch.int32 else m["site"].dtype
    return Call(quant_linear, {"x": m["x"], "weight": m["weight"], "out_dtype": out}, [m.root])


# torchao on a CPU multiplies x + 128 as unsigned numbers, and takes 128 times the sums of the weight's columns off again.
as_unsigned = cast(cast(cast(var("x"), dtype=torch.int32) + 128, dtype=torch.uint8), dtype=torch.int32)
column_sums = sum_(cast(var("weight"), dtype=torch.int32), dims=(0,))
shifted_back = op("matmul", as_unsigned, cast(var("weight"), dtype=torch.int32)) - 128 * column_sums

INT8_PRODUCT = Rule(
    "int8_product",
    pattern=any_of(op("matmul", cast(var("x")), cast(var("weight"))), shifted_back).as_("site"),
    check=check_product,
    rewrite=rewrite_product,
    produces="quant_linear",
)

# -------------------------------------------------------------------- scales

number, scale, scale2, zero, bias = var("number"), var("scale"), var("scale2"), var("zero"), var("bias")


def _along(tensor: Pattern) -> Pattern:
    """A tensor that broadcasts, in whatever type it is stored."""
    return opt_cast(tensor)


in_floats = op("matmul", cast(anything()), cast(anything())).where(_is_product, "no exact product of whole numbers")
whole = any_of(cast(number), any_of(sem("quantize"), opt_view(in_floats, "reshape")).as_("carried"))
biased = cast(number + opt_cast(var("whole_bias")))
in_integers = any_of(number - opt_cast(zero), number + lit("minus_zero")).as_("difference")
centred = any_of(whole - _along(zero), cast(in_integers), whole + lit("minus_zero"), biased, whole)
first_scale = any_of(lit("scale_number"), _along(scale))
scaled = any_of(
    (opt_cast((opt_cast(centred) * _along(scale)).as_("first")) * _along(scale2)).as_("site"),
    (opt_cast(centred) * opt_cast((_along(scale) * _along(scale2)).as_("combined"))).as_("site"),
    (opt_cast(centred) * first_scale).as_("site"),
)
product = opt_round(opt_view(scaled, "reshape")).as_("product")
with_bias = any_of(opt_upcast(product) + opt_upcast(bias), product)


def _numbers(m: Match) -> Value:
    """The whole numbers."""
    found: Value = m["number"] if "number" in m else m["carried"]
    return found


def _is_quantised(m: Match) -> bool:
    """Whether the whole numbers are those of a quantised tensor, or sums of its products: not positions, masks or counts."""
    n = _numbers(m)
    if "carried" in m:
        return bool(bits(n.dtype)) or n.dtype in FLOAT8_DTYPES
    bare = n
    while bare.op in ("reshape", "expand", "permute", "slice"):
        bare = bare.args[0]
    made = any(v.form("quantize") is not None or _is_product(v) for v in (n, bare))
    made = made or any(v.form("quant_linear") is not None for v in (n, bare))
    return made or n.dtype in (torch.int8, torch.uint8, *FLOAT8_DTYPES)


def _broadcasts(value: Value, n: Value) -> bool:
    return value.ndim <= n.ndim and same_shape(broadcast(value.shape, n.shape), n.shape)


def check_dequantize(m: Match) -> Reject | None:
    """Whole numbers of a quantised tensor; scales and bias that broadcast to them."""
    n, site = _numbers(m), m["site"]
    if not _is_quantised(m):
        return Reject("what is scaled are no quantised numbers", site)
    if not same_shape(site.shape, n.shape) or not bits(site.dtype):
        return Reject("the result has another shape than the quantised numbers", site)
    if not same_shape(m.root.shape, n.shape) and not _splits_rows(m.root, n):
        return Reject("the result is reshaped by more than a split of its rows", m.root)
    for name in ("scale", "scale2", "bias", "zero"):
        if name in m and not _broadcasts(m[name], n):
            return Reject(f"the {name} does not broadcast to the quantised numbers", m[name])
    for name in ("scale", "scale2"):
        if name in m and not bits(m[name].dtype):
            return Reject("the scale is not floating point", m[name])
    if "scale_number" in m and (m.number("scale_number") is None or "zero" in m):
        return Reject("the scale is not known at compile time", site)
    if "minus_zero" in m and m.number("minus_zero") is None:
        return Reject("the zero point is not known at compile time", site)
    if "difference" in m and not _holds_difference(m["difference"]):
        return Reject("the zero point is subtracted in a type in which the difference may wrap", m["difference"])
    return _check_sum(m) or _check_types(m)


def _holds_difference(difference: Value) -> bool:
    """Whether what is subtracted cannot wrap: in int32 at the least, or in a type wider than the stored numbers and zero points."""
    dtype = difference.dtype
    if dtype is None or bits(dtype) or dtype in (torch.int32, torch.int64):
        return dtype is not None
    operands = [arg.args[0] if arg.op == "cast" else arg for arg in difference.args if isinstance(arg, Value)]
    stored = [v.dtype for v in operands if v.ndim and v.dtype is not None]
    whole = all(not bits(kind) and kind is not torch.bool for kind in stored)
    return bool(stored) and whole and torch.iinfo(dtype).bits > max(torch.iinfo(kind).bits for kind in stored)


def _check_sum(m: Match) -> Reject | None:
    if "whole_bias" in m and (m["whole_bias"].dtype is not torch.int32 or _numbers(m).dtype is not torch.int32):
        return Reject("the bias of the sums is not of int32", m["whole_bias"])
    if "whole_bias" in m and not _broadcasts(m["whole_bias"], _numbers(m)):
        return Reject("the bias does not broadcast to the sums", m["whole_bias"])
    if "bias" in m and (not bits(m["bias"].dtype) or same_shape(m["bias"].shape, m["site"].shape)):
        return Reject("what is added is not one vector for all rows", m["bias"])
    return None


def _check_types(m: Match) -> Reject | None:
    """With `rounding="exact"`: nothing is rounded between the scales."""
    dtypes = {m[name].dtype for name in ("first", "combined", "site") if name in m}
    if m.exact and len(dtypes) > 1:
        return Reject("rounding='exact': the model rounds between the scales", m["site"])
    return None


def _splits_rows(root: Value, n: Value) -> bool:
    """Whether [M, N] becomes [..., N] of equally many rows."""
    return n.ndim == 2 and root.ndim > 2 and known_equal(root.shape[-1], n.shape[-1])


def _by_rows(m: Match, value: Value | None) -> Value | None:
    """What goes with the numbers, in the rows of the result."""
    n = _numbers(m)
    if value is None or value.ndim != 2 or same_shape(m.root.shape, n.shape):
        return value
    if known_equal(value.shape[0], n.shape[0]):
        return m.view.canon.reshape(value, (*m.root.shape[:-1], value.shape[1]))
    return m.view.canon.reshape(value, value.shape[1:]) if known_equal(value.shape[0], 1) else value


def _constant(m: Match, value: float, dtype: torch.dtype) -> Value:
    node = _numbers(m).node or m.root.node
    assert node is not None
    attrs = {"value": float(value), "shape": (), "device": node.meta["val"].device}
    return m.view.table.intern("full", (), attrs, (), dtype)


def rewrite_dequantize(m: Match) -> Call:
    compute = max((m[name].dtype for name in ("first", "combined", "site") if name in m), key=bits)
    product = m["product"]
    wide = compute if bits(compute) >= 32 else torch.float32
    scale_, zero_, bias_ = m.get("scale"), m.get("zero"), m.get("bias")
    if "scale_number" in m:
        scale_ = _constant(m, m.number("scale_number") or 0.0, wide)
    if "minus_zero" in m:
        zero_ = _constant(m, -(m.number("minus_zero") or 0.0), wide)
    args: dict[str, Any] = {
        "x": _by_rows(m, _numbers(m)),
        "scale": _by_rows(m, scale_),
        "scale2": _by_rows(m, m.get("scale2")),
        "zero_point": _by_rows(m, zero_),
        "bias": _by_rows(m, m.get("whole_bias", bias_)),
        "bias_first": "whole_bias" in m,
        "combined": "combined" in m,
        "compute_dtype": compute,
        "round_dtype": product.dtype if bits(product.dtype) < bits(compute) else None,
        "out_dtype": m.root.dtype,
    }
    return Call(dequantize, args, [m.root])


DEQUANTIZE = Rule(
    "dequantize",
    pattern=opt_round(opt_view(with_bias, "reshape")),
    check=check_dequantize,
    rewrite=rewrite_dequantize,
    produces="dequantize",
    idioms={"dequantize": "site"},
    hidden_launches=1,
)

# -------------------------------------------------------------------- linears

_SCALES = ("scale", "scale2", "bias", "combined", "bias_first", "compute_dtype", "round_dtype", "out_dtype")


def check_quant_linear(m: Match) -> Reject | None:
    """A product whose sums nothing has scaled yet; scales that broadcast to what the linear gives."""
    product, how = m.form("product"), m.form("y")
    if product.args.get("scale") is not None:
        return Reject("the product is scaled already", m["product"])
    if how.args.get("zero_point") is not None:
        return Reject("the sums have a zero point that is not made of the weight's columns", m["y"])
    return None


def rewrite_quant_linear(m: Match) -> Call:
    product, how = m.form("product").args, m.form("y").args
    x = product["x"]
    lead = m["y"].shape[:-1]
    args = {name: how[name] for name in _SCALES if name in how}
    return Call(quant_linear, {**args, "x": m.view.canon.reshape(x, (*lead, x.shape[-1])), "weight": product["weight"]}, [m["y"]])


QUANT_LINEAR = Rule(
    "quant_linear",
    pattern=sem("dequantize", x=opt_view(sem("quant_linear").as_("product"), "reshape")).as_("y"),
    check=check_quant_linear,
    rewrite=rewrite_quant_linear,
    produces="quant_linear",
)

register_builtin(INT8_PRODUCT, DEQUANTIZE, QUANT_LINEAR)
