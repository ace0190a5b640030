"""Products of int8 matrices whose activations have a zero point.

    acc = torch._int_mm(x_q, weight.t()) - x_zero * weight.sum(-1)              # in whole numbers, before the scales
    y = acc * x_scale - x_zero * x_scale * weight.sum(-1)                       # in floating point, after them; times weight_scale

Both are `(x - zero_point) W`, which `quant_linear` computes in int32. Where the model subtracts in floating point, the zero points
must be such that their products with the sums of columns stay within int32, and the sums must be those of the weight.

Sources: torchao's Int8Tensor; gemmlowp, https://arxiv.org/abs/1712.05877, section 2.3; `torch.ao.quantization`.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.quant import quant_linear
from npu_fusion.pattern import any_of, bits, lit, opt_cast, opt_round, opt_upcast, opt_view, prod, sem, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import broadcast, known_equal, known_ge, same_shape
from npu_fusion.view.value import Shape

_BYTES = (torch.int8, torch.uint8)
_MOST_INPUTS = 2**31 // 2**15 - 1
"""So many products of an int8 number and the difference of two bytes add up within int32."""
_EXACT_SUMS = {torch.int32: 2**24, torch.int64: 2**24, torch.float32: 2**17, torch.float64: 2**24}
"""Types of sums of int8 numbers, and how many of these they add up exactly."""

zero, columns = opt_cast(var("zero")), opt_cast(var("columns"))

_AFTER = frozenset({"dequantize"})
"""What the rules of products that are scaled already wait for: those of patterns/quant_linear.py, which scale them, start from it."""

# -------------------------------------------------------------------- zero points and sums of columns


def _bare(value: Value, *names: str) -> Value:
    while value.op in names:
        value = value.args[0]
    return value


def _is_byte(value: Value) -> bool:
    """Whether the numbers are known to be whole and those of a byte, in whatever type: stored in one, or a zero point that was found."""
    while value.dtype not in _BYTES and value.op in ("cast", "reshape", "expand"):
        value = value.args[0]
    if value.dtype in _BYTES:
        return True
    if value.op == "full":
        return bool(-128 <= value.attrs["value"] <= 255) and value.attrs["value"] == round(value.attrs["value"])
    form = value.form("quantize")
    return form is not None and form.output == 2 and form.args["low"] >= -128 and form.args["high"] <= 255


def _is_of_rows(value: Value, shape: Shape) -> bool:
    """Whether a number goes with each row of a result of the shape, or one with all."""
    rows = (*shape[:-1], 1)
    return value.ndim <= len(rows) and same_shape(broadcast(value.shape, rows), rows)


def _are_column_sums(value: Value, weight: Value) -> bool:
    """Whether the values are the exact sums of the columns of a weight [K, N]."""
    total = _bare(value, "cast", "reshape")
    if total.op != "sum" or total.dtype not in _EXACT_SUMS or not known_ge(_EXACT_SUMS[total.dtype], weight.shape[0]):
        return False
    flat = same_shape(value.shape[-1:], weight.shape[1:]) and all(known_equal(size, 1) for size in value.shape[:-1])
    summed, dims = _bare(total.args[0], "cast"), total.attrs["dims"]
    turned = [x.op == "permute" for x in (summed, weight)]
    same = _bare(summed, "permute") is _bare(weight, "permute") and weight.ndim == summed.ndim == 2
    return flat and same and dims == ((0,) if turned[0] == turned[1] else (1,))


def _flat_sums(canon: Canon, value: Value) -> Value:
    """Sums of columns as whole numbers [N]."""
    while value.op == "cast" and not bits(value.args[0].dtype):
        value = value.args[0]
    flat = canon.reshape(value, value.shape[-1:])
    return canon.cast(flat, torch.int32) if bits(flat.dtype) else flat


def _check_zero(zero_point: Value, sums: Value, weight: Value, shape: Shape) -> Reject | None:
    if not _is_of_rows(zero_point, shape):
        return Reject("the zero point is not one number, nor one a row", zero_point)
    if not _are_column_sums(sums, weight):
        return Reject("what the zero point multiplies are not the sums of the weight's columns", sums)
    if not _is_byte(zero_point) or not known_ge(_MOST_INPUTS, weight.shape[0]):
        return Reject("products of the zero point with sums of columns may leave the range of int32", zero_point)
    return None


def _in_lead(canon: Canon, value: Any, numbers: Shape, lead: Shape) -> Any:
    """What broadcasts to the rows of `numbers`, in the leading dimensions of the result."""
    if not isinstance(value, Value) or value.ndim != len(numbers) or same_shape(numbers[:-1], lead):
        return value
    if same_shape(value.shape[:-1], numbers[:-1]):
        return canon.reshape(value, (*lead, value.shape[-1]))
    ones = all(known_equal(size, 1) for size in value.shape[:-1])
    return canon.reshape(value, value.shape[-1:]) if ones else value


# -------------------------------------------------------------------- in whole numbers

correction = opt_view(any_of(prod(lit("zero_number"), columns), prod(zero, columns)), "reshape")


def _zero_of(m: Match) -> Value | None:
    """The zero point; None for a number that is none of a byte."""
    if "zero" in m:
        found: Value = m["zero"]
        return found
    number, node = m.number("zero_number"), m["y"].node or m["product"].node
    if number is None or number != round(number) or not -128 <= number <= 255 or node is None:
        return None
    attrs = {"value": int(number), "shape": (), "device": node.meta["val"].device}
    return m.view.table.intern("full", (), attrs, (), torch.int16)


def _columns_of(m: Match) -> Value:
    """The sums of columns as they lie along the product; times a number they are multiplied in the shape of their reduction."""
    found: Value = m["columns"]
    return m.view.canon.reshape(found, m.form("y").args["zero_point"].shape) if "zero_number" in m else found


def check_whole_zero(m: Match) -> Reject | None:
    """A product of int8 matrices that is dequantised, of which a zero point times the sums of the weight's columns is taken off."""
    product, how = m.form("product"), m.form("y")
    if any(product.args.get(name) is not None for name in ("scale", "zero_point")):
        return Reject("the product is scaled already, or has a zero point", m["product"])
    if how.args.get("bias_first"):
        return Reject("the sums have a bias besides the zero point", m["y"])
    product_shape, shape = m["product"].shape, m["y"].shape
    if not same_shape(product_shape[-1:], shape[-1:]):
        return Reject("the sums are reshaped by more than their rows", m["y"])
    zero_point = _zero_of(m)
    if zero_point is None:
        return Reject("the zero point is no number of a byte", m["y"])
    apart = zero_point.ndim == len(product_shape)  # the zero point is taken off before the rows are split, or after
    return _check_zero(zero_point, _columns_of(m), product.args["weight"], product_shape if apart else shape)


def rewrite_whole_zero(m: Match) -> Call:
    canon, product, how = m.view.canon, m.form("product").args, m.form("y").args
    x, lead = product["x"], m["y"].shape[:-1]
    args = {name: how[name] for name in _SCALES if name in how}
    zero_point = _in_lead(canon, _zero_of(m), (*x.shape[:-1], m["y"].shape[-1]), lead)
    tensors = {"x": canon.reshape(x, (*lead, x.shape[-1])), "weight": product["weight"]}
    return Call(quant_linear, {**args, **tensors, "zero_point": zero_point, "column_sums": _flat_sums(canon, _columns_of(m))}, [m["y"]])


_SCALES = ("scale", "scale2", "bias", "combined", "bias_first", "compute_dtype", "round_dtype", "out_dtype")

QUANT_LINEAR_ZERO = Rule(
    "quant_linear_zero",
    pattern=sem("dequantize", x=opt_view(sem("quant_linear").as_("product"), "reshape"), zero_point=correction).as_("y"),
    check=check_whole_zero,
    rewrite=rewrite_whole_zero,
    produces="quant_linear",
)

# -------------------------------------------------------------------- in floating point

scaled = sem("quant_linear").as_("scaled")
one_scale = prod(zero, opt_cast(var("scale")), columns)
two_scales = prod(zero, opt_cast(var("scale")), opt_cast(var("scale2")), columns)
difference = (opt_round(scaled) - opt_round(any_of(one_scale, two_scales))).as_("difference")


def check_scaled_zero(m: Match) -> Reject | None:
    """What is taken off has the scales of the product."""
    form = m.form("scaled")
    if m.exact:
        return Reject("rounding='exact': the model takes the zero point off after it has rounded the product", m["difference"])
    if form.args.get("scale") is None or form.args.get("bias") is not None or form.args.get("zero_point") is not None:
        return Reject("the product is not scaled, or has a bias or a zero point already", m["scaled"])
    scales = {_bare(scale, "cast", "reshape") for name in ("scale", "scale2") if (scale := form.args.get(name)) is not None}
    if scales != {_bare(m[name], "cast", "reshape") for name in ("scale", "scale2") if name in m}:
        return Reject("what is taken off has other scales than the product", m["difference"])
    if not same_shape(m["scaled"].shape, m["difference"].shape) or not bits(m["difference"].dtype):
        return Reject("what is taken off has another shape than the product", m["difference"])
    return _check_zero(m["zero"], m["columns"], form.args["weight"], m["scaled"].shape)


def rewrite_scaled_zero(m: Match) -> Call:
    args = {**m.form("scaled").args, "zero_point": m["zero"], "column_sums": _flat_sums(m.view.canon, m["columns"])}
    return Call(quant_linear, {**args, "round_dtype": None, "out_dtype": m["difference"].dtype}, [m["difference"]])


QUANT_LINEAR_SCALED_ZERO = Rule(
    "quant_linear_scaled_zero",
    pattern=difference,
    check=check_scaled_zero,
    rewrite=rewrite_scaled_zero,
    produces="quant_linear",
    starts_from=_AFTER,
)

# ---- and multiplied by the other scale


def _has_zero_point(value: Value) -> bool:
    form = value.form("quant_linear")
    return form is not None and form.args.get("zero_point") is not None


corrected = sem("quant_linear", scale2=None, bias=None).as_("scaled").where(_has_zero_point, "the activations have no zero point")
rescaled = opt_round(opt_view((opt_cast(corrected) * opt_cast(var("scale2"))).as_("site"), "reshape")).as_("product")
with_bias = any_of(opt_upcast(rescaled) + opt_upcast(var("bias")), rescaled)


def check_rescaled(m: Match) -> Reject | None:
    """Another scale of columns, and a bias of them; reshapes that split rows."""
    width = m["scaled"].shape[-1:]
    for name in ("scale2", "bias"):
        value = m.get(name)
        of_columns = value is None or (value.ndim < 2 and same_shape(broadcast(value.shape, width), width) and bits(value.dtype))
        if not of_columns:
            return Reject("what the product is multiplied by, or what is added, is not one a column", value)
    if not same_shape(m["site"].shape, m["scaled"].shape) or not same_shape(m.root.shape[-1:], width):
        return Reject("the result is reshaped by more than its rows", m.root)
    return None


def rewrite_rescaled(m: Match) -> Call:
    canon, form, site, product = m.view.canon, m.form("scaled").args, m["site"], m["product"]
    shape, lead = m["scaled"].shape, m.root.shape[:-1]
    compute = max((form.get("compute_dtype") or torch.float32, site.dtype), key=bits)
    args = {name: _in_lead(canon, form.get(name), shape, lead) for name in ("scale", "zero_point")}
    rounding = {"compute_dtype": compute, "round_dtype": product.dtype if bits(product.dtype) < bits(compute) else None}
    tensors = {"x": canon.reshape(form["x"], (*lead, form["x"].shape[-1])), "scale2": m["scale2"], "bias": m.get("bias")}
    return Call(quant_linear, {**form, **args, **tensors, **rounding, "out_dtype": m.root.dtype}, [m.root])


QUANT_LINEAR_RESCALED = Rule(
    "quant_linear_rescaled",
    pattern=opt_round(opt_view(with_bias, "reshape")),
    check=check_rescaled,
    rewrite=rewrite_rescaled,
    produces="quant_linear",
    starts_from=_AFTER,
)

register_builtin(QUANT_LINEAR_ZERO, QUANT_LINEAR_SCALED_ZERO, QUANT_LINEAR_RESCALED)
