"""Quantisation: from floating to whole numbers, with scales that are found per token or per tensor (given ones: quant_given.py).

    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    q = (x / scale).round().clamp(-128, 127).to(torch.int8)

How the scale is kept from 0, whether it divides or its reciprocal multiplies, in which dtype every step is rounded, and where the zero
point comes in, is read off the graph into the arguments of `quantize`: the reference gives the model's bits. Rounding and clamping to whole
bounds commute, so their order is not captured. What is not clamped is taken only where it cannot leave the range.

The canonical view has made `x * (1 / s)` and `x / s` one value, and `a / 127` a product with a number: which of them the model computes is
told by the FX node.

Sources: SmoothQuant, torchao, torch.ao.quantization (`quantized_decomposed`), compressed-tensors, LLM.int8().
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.quant import quantize
from npu_fusion.ops.quant_core import CARRIERS, WHOLE_DTYPES
from npu_fusion.pattern import (
    AttrIs,
    Pattern,
    amax,
    any_of,
    bits,
    cast,
    lit,
    op,
    op_any_args,
    opt_cast,
    opt_round,
    opt_upcast,
    opt_view,
    reciprocal,
    relu,
    var,
)
from npu_fusion.rule import Call, Reject, Rule
from npu_fusion.view import Value
from npu_fusion.view.canon import number_of
from npu_fusion.view.shapes import known_equal, same_shape

x, given, zero = var("x"), var("given"), var("zero")

ROWS = AttrIs("the last dimension, or all", lambda dims, v: dims in ((v.ndim - 1,), tuple(range(v.ndim))))


def nearest(value: Pattern) -> Pattern:
    return op("round", value)


def _statistic(inner: Pattern) -> Pattern:
    """A number of each row, in whatever type and with its unit dimension or without."""
    return opt_cast(opt_view(inner, "reshape"))


# -------------------------------------------------------------------- the scale of a row

amin_ = op("amin", opt_upcast(x), dims=ROWS)
amax_ = amax(opt_upcast(x), dims=ROWS)
zeros = any_of(op_any_args("full", value=0.0), op("const", value=0))
low_end = any_of(op("minimum", opt_view(amin_, "reshape"), zeros, commutative=True), op("clamp", amin_, 0, low=False, high=True), amin_)
high_end = any_of(op("maximum", opt_view(amax_, "reshape"), zeros, commutative=True), relu(amax_), amax_)

largest = any_of(
    amax(opt_upcast(op("abs", opt_upcast(x))), dims=ROWS),
    op("maximum", -opt_view(low_end, "reshape"), opt_view(high_end, "reshape"), commutative=True),
).as_("amax")


def floored(value: Pattern, name: str, one: str, add: str) -> Pattern:
    """The value, kept from 0 in some way, which is bound; or not kept from it."""
    at_least = any_of(
        op("clamp", value, lit("floor"), low=True, high=False),
        op("maximum", value, lit("floor"), commutative=True),
    )
    was_zero = any_of(op("eq", value, 0), op("eq", 0, value), op("le", value, 0))
    return any_of(
        at_least.as_(f"floor.{name}"),
        (value + lit("floor")).as_(f"floor.{add}"),
        op("where", was_zero, 1, value).as_(f"floor.{one}"),
        value,
    )


range_end = floored(_statistic(largest), "amax", "one_amax", "add_amax")
symmetric_scale = (_statistic(range_end) * lit("per_step")).as_("raw_scale")
asymmetric_scale = ((_statistic(high_end) - _statistic(low_end)).as_("span") * lit("per_step")).as_("raw_scale")


def finished(raw: Pattern) -> Pattern:
    """The scale as it divides: kept from 0, rounded to a narrower type."""
    return opt_round(floored(_statistic(raw), "scale", "one", "add_scale")).as_("scale")


def over(value: Pattern, scale: Pattern) -> Pattern:
    """The value in units of the scale."""
    scale = opt_view(opt_upcast(scale), "reshape", "expand")
    narrow = (value * cast(opt_view(reciprocal(scale).as_("narrow_reciprocal"), "reshape", "expand"))).as_("quotient")
    return any_of((value / scale).as_("quotient"), narrow)


# -------------------------------------------------------------------- whole numbers


def clamped(value: Pattern) -> Pattern:
    """The value between two numbers, however that is written."""
    low, high = lit("low"), lit("high")

    def least(v: Pattern) -> Pattern:
        return any_of(op("clamp", v, low, low=True, high=False), op("maximum", v, low, commutative=True))

    def most(v: Pattern) -> Pattern:
        return any_of(op("clamp", v, high, low=False, high=True), op("minimum", v, high, commutative=True))

    both = op("clamp", value, low, high, low=True, high=True)
    return any_of(both, most(least(value)), least(most(value)), most(relu(value)).as_("from_zero"), relu(most(value)).as_("from_zero"))


def whole(value: Pattern) -> Pattern:
    """The nearest whole number within bounds, without a zero point."""
    rounded = nearest(value).as_("site")
    return any_of(clamped(opt_cast(rounded)), nearest(clamped(value)).as_("site"), rounded.as_("unclamped"))


def shifted(value: Pattern, zero: Pattern) -> Pattern:
    """The same, a zero point being added before or after rounding."""
    after = opt_cast(nearest(value).as_("site")) + zero
    before = nearest(value + zero).as_("site").as_("zero_first")
    return any_of(clamped(opt_cast(after)), clamped(opt_cast(before)), nearest(clamped(value + zero)).as_("site").as_("zero_first"))


def stored(value: Pattern) -> Pattern:
    """The whole number in its type; or still in a floating type."""
    return any_of(cast(opt_cast(value)), value)


# -------------------------------------------------------------------- what the rules share


def spelling(m: Match, value: Value) -> str | None:
    """The ATen op that computes a value in the model, in whatever shape; None for one that a handler of the view spelled out."""
    family = [value, *(user for user in value.users if user.op == "reshape")]
    for member in family:
        for node in m.view.nodes.get(member, ()):
            name = getattr(node.target, "_opname", "")
            if name in ("mul", "div", "true_divide", "multiply", "divide"):
                return "mul" if name.startswith("mul") else "div"
    return None


def _nice(number: float) -> float:
    """A number that was inverted twice, without what that did to its last bits."""
    halves = round(2 * number) / 2
    return halves if abs(halves - number) < 1e-9 * abs(number) else number


def known_numbers(m: Match, *names: str) -> Reject | None:
    for name in names:
        if name in m and m.number(name) is None:
            return Reject(f"the number {name} is not known at compile time", m["site"])
    return None


def bounds_of(m: Match) -> tuple[float, float] | None:
    """The range of q, or None where the model does not clamp."""
    if "high" not in m:
        return None
    low = 0.0 if "from_zero" in m else m.number("low")
    high = m.number("high")
    assert low is not None
    assert high is not None
    return low, high


def _range_of(dtype: torch.dtype) -> tuple[float, float]:
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        return float(info.min), float(info.max)
    whole_range = torch.iinfo(dtype)
    return float(whole_range.min), float(whole_range.max)


def check_range(m: Match) -> Reject | None:
    """Whole bounds that the type of q holds; no detour through another narrow type."""
    dtype = m.root.dtype
    if dtype not in (*WHOLE_DTYPES, *CARRIERS):
        return Reject(f"the result has the type {dtype}", m.root)
    bounds, limits = bounds_of(m), _range_of(dtype)
    if bounds is not None:
        if any(bound != round(bound) for bound in bounds) or not limits[0] <= bounds[0] < bounds[1] <= limits[1]:
            return Reject(f"the bounds {bounds} are no whole numbers in the range of {dtype}", m["site"])
        if max(map(abs, bounds)) > 2**15:
            return Reject("the bounds are wider than 16 bits: a rounding, no quantisation", m["site"])
    for value in m.visited:
        narrow = value.op == "cast" and value is not m.root and value.dtype in (torch.int8, torch.uint8)
        if narrow and value.index > m["site"].index:
            return Reject(f"the rounded value goes through {value.dtype} before it is clamped", value)
    return None


def check_source(m: Match) -> Reject | None:
    if not bits(m["x"].dtype):
        return Reject("what is quantised is not floating point", m["x"])
    if not same_shape(m["x"].shape, m.root.shape):
        return Reject("the result has another shape than what is quantised", m["site"])
    return None


def apply_of(m: Match) -> str:
    """How the scale is applied."""
    if "narrow_reciprocal" in m:
        return "narrow_reciprocal"
    return "divide" if spelling(m, m["quotient"]) == "div" else "reciprocal"


def storage(m: Match, unclamped: tuple[float, float]) -> dict[str, Any]:
    low, high = bounds_of(m) or unclamped
    return {"low": low, "high": high, "dtype": m.root.dtype, "round_last": "zero_first" in m, "value_dtype": m["quotient"].dtype}


# -------------------------------------------------------------------- scales that are found


def _steps(m: Match) -> tuple[float, bool]:
    """How many scales the range is long, and whether the model multiplies by the reciprocal of that."""
    per_step = m.number("per_step")
    assert per_step is not None
    return _nice(1.0 / per_step), spelling(m, m["raw_scale"]) == "mul"


def _floor_mode(m: Match) -> str:
    return next((name for name in ("amax", "one_amax", "add_amax", "scale", "one", "add_scale") if f"floor.{name}" in m), "none")


def _floor(m: Match) -> tuple[str, float]:
    """How the scale is kept from 0, and the number for that; a least one as the type holds it in which the model compares."""
    mode, floor = _floor_mode(m), m.number("floor") or 0.0 if "floor" in m else 0.0
    return mode, torch.tensor(floor, dtype=m[f"floor.{mode}"].dtype).item() if mode in ("amax", "scale") else floor


def check_floor(m: Match, computed: torch.dtype, kept: torch.dtype) -> Reject | None:
    """The scale is kept from 0 in no wider type than that in which it is computed, as `quantize` does both in one.

    With `rounding="exact"` a statistic is rounded nowhere else either: between x, that type, and the type of the scale. Rounding keeps the
    order of numbers, and so commutes with a least value, but not with a sum.
    """
    mode, floor = _floor(m)
    if mode == "none":
        return None
    floored, added = m[f"floor.{mode}"], mode.startswith("add")
    reason = f"the scale is kept from 0 in {floored.dtype}, and computed in {computed}"
    rounds = added or (mode == "scale" and torch.tensor(floor, dtype=computed).item() != floor)
    if bits(floored.dtype) > bits(computed) and rounds:
        return Reject(reason, floored)
    ends = (m["x"].dtype, computed) if mode.endswith("amax") else (computed, kept)
    keeps = floored.dtype is computed or (not added and (floored.dtype in ends or bits(floored.dtype) > min(map(bits, ends))))
    return Reject(f"rounding='exact': {reason}", floored) if m.exact and not keeps else None


def _reduced(m: Match) -> Value:
    """A reduction of x, as it is kept."""
    return next(value for value in m.visited if value.op in ("amax", "amin"))


def _kept(m: Match, value: Value) -> Value:
    """A statistic of the rows of x in the shape [..., 1] of a reduction that keeps its dimension."""
    return m.view.canon.reshape(value, _reduced(m).shape)


def _per_tensor(m: Match) -> bool:
    return len(_reduced(m).attrs["dims"]) > 1


def check_rows(m: Match, names: tuple[str, ...]) -> Reject | None:
    """A statistic multiplies the row that it is of: in the kept shape, or, of the whole tensor, in any."""
    kept = _reduced(m).shape
    for name in names:
        value = m[name]
        ones = all(known_equal(size, 1) for size in value.shape)
        if not ones and not same_shape(tuple(d for d in kept if d != 1), tuple(d for d in value.shape if d != 1)):
            return Reject("the scale is not that of the row", value)
    return None


def check_aligned(m: Match) -> Reject | None:
    """The operand that divides lies along the rows: reshapes between scale and division keep it [..., 1]."""
    divisor = next((arg for arg in m["quotient"].args if leads_to(arg, m["scale"])), None)
    if divisor is None:
        return Reject("the scale is not what divides", m["quotient"])
    while divisor.op == "cast":
        divisor = divisor.args[0]
    kept = _reduced(m).shape
    shape = divisor.shape if divisor.op != "reciprocal" else divisor.args[0].shape
    if all(known_equal(size, 1) for size in kept) or same_shape(shape, kept) or same_shape(shape, m["x"].shape):
        return None
    return Reject("the scale is turned before it divides", divisor)


def leads_to(value: Value, target: Value) -> bool:
    while value is not target and value.op in ("cast", "reshape", "expand", "reciprocal"):
        value = value.args[0]
    return value is target


def check_found(m: Match) -> Reject | None:
    """Scales of the rows (or the tensor) itself; bounds that hold all quotients."""
    rejected = known_numbers(m, "low", "high", "floor", "per_step") or check_source(m) or check_range(m)
    rejected = rejected or check_rows(m, ("scale",)) or check_aligned(m) or check_floor(m, m["raw_scale"].dtype, m["scale"].dtype)
    if rejected is not None:
        return rejected
    if not nonzero(m):
        return Reject("the range of a row is multiplied by a number that makes no steps of it", m["raw_scale"])
    if bounds_of(m) is None and not _stays_in_range(m):
        return Reject("the rounded value is not clamped, and may leave the range of its type", m["site"])
    return None


def nonzero(m: Match) -> bool:
    per_step = m.number("per_step")
    return per_step is not None and 0 < per_step < 1


def _stays_in_range(m: Match) -> bool:
    """The largest quotient exceeds the number of steps by less than a half, whatever the three roundings on the way to it do."""
    rounding = max(torch.finfo(m[name].dtype).eps for name in ("quotient", "scale", "raw_scale"))
    return "span" not in m and _steps(m)[0] <= 127 and _steps(m)[0] * (1 + rounding / 2) ** 3 < 127.5


def _found_arguments(m: Match) -> dict[str, Any]:
    steps, by_reciprocal = _steps(m)
    mode, floor = _floor(m)
    return {
        "x": m["x"],
        "apply": apply_of(m),
        "per_tensor": _per_tensor(m),
        "steps": steps,
        "steps_reciprocal": by_reciprocal,
        "floor_mode": mode,
        "floor": floor,
        "compute_dtype": m["raw_scale"].dtype,
        "scale_dtype": m["scale"].dtype,
    }


def rewrite_found(m: Match) -> Call:
    steps = _steps(m)[0]
    args = _found_arguments(m) | storage(m, (-round(steps), round(steps)))
    return Call(quantize, args, [m.root, _kept(m, m["scale"]), None])


QUANTIZE_ROWS = Rule(
    "quantize_rows",
    pattern=stored(whole(over(opt_upcast(x), finished(symmetric_scale)))),
    check=check_found,
    rewrite=rewrite_found,
    produces="quantize",
    idioms={"quantize": "site"},
    hidden_launches=1,
)

# ---- asymmetric

ratio = (opt_view(opt_cast(low_end), "reshape") / opt_view(opt_upcast(var("scale")), "reshape")).as_("ratio")
negated = (opt_view(-opt_cast(low_end), "reshape") / opt_view(opt_upcast(var("scale")), "reshape")).as_("ratio")
found_zero = any_of(
    lit("zero_low") - nearest(ratio),
    (nearest(any_of(-ratio, negated)) + lit("zero_low")),
    nearest(lit("zero_low") - ratio).as_("zero_rounded_last"),
    nearest(any_of(-ratio, negated)).as_("zero_from_0"),
)
whole_zero = any_of(
    op("clamp", found_zero, lit("zero_least"), lit("zero_most"), low=True, high=True),
    op("clamp", opt_cast(found_zero), lit("zero_least"), lit("zero_most"), low=True, high=True),
).as_("found_zero")


def check_found_zero(m: Match) -> Reject | None:
    rejected = known_numbers(m, "zero_low", "zero_least", "zero_most") or check_found(m)
    if rejected is not None:
        return rejected
    low = 0.0 if "zero_from_0" in m else m.number("zero_low")
    bounds = bounds_of(m)
    if bounds is None or low != bounds[0] or (m.number("zero_least"), m.number("zero_most")) != bounds:
        return Reject("the zero point has other bounds than the whole numbers", m["found_zero"])
    if ("zero_rounded_last" in m) != ("zero_first" in m):
        return Reject("the zero point is rounded in another place than the values", m["found_zero"])
    if spelling(m, m["ratio"]) not in ("div", None):
        return Reject("the zero point is of a product with a reciprocal", m["ratio"])
    return None


def rewrite_found_zero(m: Match) -> Call:
    bound = [value for value in m.visited if value.op in ("minimum", "maximum", "relu") or (value.op == "clamp" and value.attrs["high"])]
    reduced = {m.view.canon.reshape(arg, _reduced(m).shape) for value in bound for arg in value.args if arg.ndim}
    args = {
        **_found_arguments(m),
        **storage(m, (0, 0)),
        "symmetric": False,
        "with_zero": any(value.op in ("amin", "amax") for value in reduced),
    }
    return Call(quantize, args, [m.root, _kept(m, m["scale"]), _kept(m, m["found_zero"])])


QUANTIZE_ROWS_ASYMMETRIC = Rule(
    "quantize_rows_asymmetric",
    pattern=stored(shifted(over(opt_upcast(x), finished(asymmetric_scale)), opt_view(opt_cast(whole_zero), "reshape"))),
    check=check_found_zero,
    rewrite=rewrite_found_zero,
    produces="quantize",
    idioms={"quantize": "site"},
    hidden_launches=1,
)

# ---- the reciprocal of the scale is computed by itself

inverse = (lit("steps") / _statistic(range_end)).as_("inverse")


def _scale_beside(m: Match) -> Value | None:
    """The scale a / steps that the model computes beside steps / a, if it does."""
    ends: list[Value] = [m["inverse"].args[1]]
    ends += [user for end in ends for user in end.users if user.op == "cast"]
    steps = m.number("steps")
    for end in ends:
        for user in end.users:
            factor = next((number_of(arg) for arg in user.args if number_of(arg) is not None), None) if user.op == "mul" else None
            if factor and steps and _nice(1.0 / factor) == steps:
                return user
    return None


def check_inverse(m: Match) -> Reject | None:
    rejected = known_numbers(m, "low", "high", "floor", "steps") or check_source(m) or check_range(m) or check_rows(m, ("inverse",))
    if rejected is not None:
        return rejected
    kept = _scale_beside(m) or m["inverse"]  # who puts the steps into the scales of weights computes no scale
    rejected = check_floor(m, m["inverse"].dtype, kept.dtype or m["inverse"].dtype)
    if rejected is not None:
        return rejected
    if bounds_of(m) is None and not (bits(m["quotient"].dtype) >= 32 and m.number("steps") == 127 and m.root.dtype is torch.int8):
        return Reject("the rounded value is not clamped, and may leave the range of its type", m["site"])
    return None


def rewrite_inverse(m: Match) -> Call:
    scale, steps = _scale_beside(m), m.number("steps")
    assert steps is not None
    mode, floor = _floor(m)
    args = {
        "x": m["x"],
        "apply": "multiply",
        "per_tensor": _per_tensor(m),
        "steps": steps,
        "steps_reciprocal": scale is not None and spelling(m, scale) == "mul",
        "floor_mode": mode,
        "floor": floor,
        "compute_dtype": m["inverse"].dtype,
        "scale_dtype": (m["inverse"] if scale is None else scale).dtype,
        **storage(m, (-steps, steps)),
    }
    return Call(quantize, args, [m.root, None if scale is None else _kept(m, scale), None])


QUANTIZE_BY_INVERSE = Rule(
    "quantize_by_inverse",
    pattern=stored(whole((opt_upcast(x) * opt_view(opt_cast(inverse), "reshape", "expand")).as_("quotient"))),
    check=check_inverse,
    rewrite=rewrite_inverse,
    produces="quantize",
    idioms={"quantize": "site"},
    hidden_launches=1,
)
