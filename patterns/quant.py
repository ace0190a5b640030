"""Quantisation: from floating to whole numbers, with scales that are given, or found per token or per tensor.

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

from collections.abc import Iterator
from typing import Any

import torch

from npu_fusion.match import Match
from npu_fusion.ops.quant import quantize
from npu_fusion.ops.quant_core import CARRIERS, FLOAT8_DTYPES, WHOLE_DTYPES
from npu_fusion.pattern import (
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
    opt_round,
    opt_upcast,
    opt_view,
    reciprocal,
    relu,
    sem,
    var,
)
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.canon import number_of
from npu_fusion.view.shapes import broadcast, known_equal, same_shape

x, given, zero = var("x"), var("given"), var("zero")

ROWS = AttrIs("the last dimension, or all", lambda dims, v: dims in ((v.ndim - 1,), tuple(range(v.ndim))))


def _round(value: Pattern) -> Pattern:
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
    rounded = _round(value).as_("site")
    return any_of(clamped(opt_cast(rounded)), _round(clamped(value)).as_("site"), rounded.as_("unclamped"))


def shifted(value: Pattern, zero: Pattern) -> Pattern:
    """The same, a zero point being added before or after rounding."""
    after = opt_cast(_round(value).as_("site")) + zero
    before = _round(value + zero).as_("site").as_("zero_first")
    return any_of(clamped(opt_cast(after)), clamped(opt_cast(before)), _round(clamped(value + zero)).as_("site").as_("zero_first"))


def stored(value: Pattern) -> Pattern:
    """The whole number in its type; or still in a floating type."""
    return any_of(cast(opt_cast(value)), value)


# -------------------------------------------------------------------- what the rules share


def _spelling(m: Match, value: Value) -> str | None:
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


def _known(m: Match, *names: str) -> Reject | None:
    for name in names:
        if name in m and m.number(name) is None:
            return Reject(f"the number {name} is not known at compile time", m["site"])
    return None


def _bounds(m: Match) -> tuple[float, float] | None:
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


def _check_range(m: Match) -> Reject | None:
    """Whole bounds that the type of q holds; no detour through another narrow type."""
    dtype = m.root.dtype
    if dtype not in (*WHOLE_DTYPES, *CARRIERS):
        return Reject(f"the result has the type {dtype}", m.root)
    bounds, limits = _bounds(m), _range_of(dtype)
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


def _check_source(m: Match) -> Reject | None:
    if not bits(m["x"].dtype):
        return Reject("what is quantised is not floating point", m["x"])
    if not same_shape(m["x"].shape, m.root.shape):
        return Reject("the result has another shape than what is quantised", m["site"])
    return None


def _apply(m: Match) -> str:
    """How the scale is applied."""
    if "narrow_reciprocal" in m:
        return "narrow_reciprocal"
    return "divide" if _spelling(m, m["quotient"]) == "div" else "reciprocal"


def _storage(m: Match, unclamped: tuple[float, float]) -> dict[str, Any]:
    low, high = _bounds(m) or unclamped
    return {"low": low, "high": high, "dtype": m.root.dtype, "round_last": "zero_first" in m, "value_dtype": m["quotient"].dtype}


# -------------------------------------------------------------------- scales that are found


def _steps(m: Match) -> tuple[float, bool]:
    """How many scales the range is long, and whether the model multiplies by the reciprocal of that."""
    per_step = m.number("per_step")
    assert per_step is not None
    return _nice(1.0 / per_step), _spelling(m, m["raw_scale"]) == "mul"


def _floor(m: Match) -> tuple[str, float]:
    mode = next((name for name in ("amax", "one_amax", "add_amax", "scale", "one", "add_scale") if f"floor.{name}" in m), "none")
    return mode, m.number("floor") or 0.0 if "floor" in m else 0.0


def _reduced(m: Match) -> Value:
    """A reduction of x, as it is kept."""
    return next(value for value in m.visited if value.op in ("amax", "amin"))


def _kept(m: Match, value: Value) -> Value:
    """A statistic of the rows of x in the shape [..., 1] of a reduction that keeps its dimension."""
    return m.view.canon.reshape(value, _reduced(m).shape)


def _per_tensor(m: Match) -> bool:
    return len(_reduced(m).attrs["dims"]) > 1


def _check_rows(m: Match, names: tuple[str, ...]) -> Reject | None:
    """A statistic multiplies the row that it is of: in the kept shape, or, of the whole tensor, in any."""
    kept = _reduced(m).shape
    for name in names:
        value = m[name]
        ones = all(known_equal(size, 1) for size in value.shape)
        if not ones and not same_shape(tuple(d for d in kept if d != 1), tuple(d for d in value.shape if d != 1)):
            return Reject("the scale is not that of the row", value)
    return None


def _check_aligned(m: Match) -> Reject | None:
    """The operand that divides lies along the rows: reshapes between scale and division keep it [..., 1]."""
    divisor = next((arg for arg in m["quotient"].args if _leads_to(arg, m["scale"])), None)
    if divisor is None:
        return Reject("the scale is not what divides", m["quotient"])
    while divisor.op == "cast":
        divisor = divisor.args[0]
    kept = _reduced(m).shape
    shape = divisor.shape if divisor.op != "reciprocal" else divisor.args[0].shape
    if all(known_equal(size, 1) for size in kept) or same_shape(shape, kept) or same_shape(shape, m["x"].shape):
        return None
    return Reject("the scale is turned before it divides", divisor)


def _leads_to(value: Value, target: Value) -> bool:
    while value is not target and value.op in ("cast", "reshape", "expand", "reciprocal"):
        value = value.args[0]
    return value is target


def check_found(m: Match) -> Reject | None:
    """Scales of the rows (or the tensor) itself; bounds that hold all quotients."""
    rejected = _known(m, "low", "high", "floor", "per_step") or _check_source(m) or _check_range(m)
    rejected = rejected or _check_rows(m, ("scale",)) or _check_aligned(m)
    if rejected is not None:
        return rejected
    if not _nonzero(m):
        return Reject("the range of a row is multiplied by a number that makes no steps of it", m["raw_scale"])
    if _bounds(m) is None and not _stays_in_range(m):
        return Reject("the rounded value is not clamped, and may leave the range of its type", m["site"])
    return None


def _nonzero(m: Match) -> bool:
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
        "apply": _apply(m),
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
    args = _found_arguments(m) | _storage(m, (-round(steps), round(steps)))
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
    lit("zero_low") - _round(ratio),
    (_round(any_of(-ratio, negated)) + lit("zero_low")),
    _round(lit("zero_low") - ratio).as_("zero_rounded_last"),
    _round(any_of(-ratio, negated)).as_("zero_from_0"),
)
whole_zero = any_of(
    op("clamp", found_zero, lit("zero_least"), lit("zero_most"), low=True, high=True),
    op("clamp", opt_cast(found_zero), lit("zero_least"), lit("zero_most"), low=True, high=True),
).as_("found_zero")


def check_found_zero(m: Match) -> Reject | None:
    rejected = _known(m, "zero_low", "zero_least", "zero_most") or check_found(m)
    if rejected is not None:
        return rejected
    low = 0.0 if "zero_from_0" in m else m.number("zero_low")
    bounds = _bounds(m)
    if bounds is None or low != bounds[0] or (m.number("zero_least"), m.number("zero_most")) != bounds:
        return Reject("the zero point has other bounds than the whole numbers", m["found_zero"])
    if ("zero_rounded_last" in m) != ("zero_first" in m):
        return Reject("the zero point is rounded in another place than the values", m["found_zero"])
    if _spelling(m, m["ratio"]) not in ("div", None):
        return Reject("the zero point is of a product with a reciprocal", m["ratio"])
    return None


def rewrite_found_zero(m: Match) -> Call:
    bound = [value for value in m.visited if value.op in ("minimum", "maximum", "relu") or (value.op == "clamp" and value.attrs["high"])]
    reduced = {m.view.canon.reshape(arg, _reduced(m).shape) for value in bound for arg in value.args if arg.ndim}
    args = {
        **_found_arguments(m),
        **_storage(m, (0, 0)),
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
    rejected = _known(m, "low", "high", "floor", "steps") or _check_source(m) or _check_range(m) or _check_rows(m, ("inverse",))
    if rejected is not None:
        return rejected
    if _scale_beside(m) is None:
        return Reject("the model does not compute the scale, only its reciprocal", m["inverse"])
    if _bounds(m) is None and not (bits(m["quotient"].dtype) >= 32 and m.number("steps") == 127 and m.root.dtype is torch.int8):
        return Reject("the rounded value is not clamped, and may leave the range of its type", m["site"])
    return None


def rewrite_inverse(m: Match) -> Call:
    scale, steps = _scale_beside(m), m.number("steps")
    assert scale is not None
    assert steps is not None
    mode, floor = _floor(m)
    args = {
        "x": m["x"],
        "apply": "multiply",
        "per_tensor": _per_tensor(m),
        "steps": steps,
        "steps_reciprocal": _spelling(m, scale) == "mul",
        "floor_mode": mode,
        "floor": floor,
        "compute_dtype": m["inverse"].dtype,
        "scale_dtype": scale.dtype,
        **_storage(m, (-steps, steps)),
    }
    return Call(quantize, args, [m.root, _kept(m, scale), None])


QUANTIZE_BY_INVERSE = Rule(
    "quantize_by_inverse",
    pattern=stored(whole((opt_upcast(x) * opt_view(opt_cast(inverse), "reshape", "expand")).as_("quotient"))),
    check=check_inverse,
    rewrite=rewrite_inverse,
    produces="quantize",
    idioms={"quantize": "site"},
    hidden_launches=1,
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
    if literal == "given_number" and number and _spelling(m, m["quotient"]) == "div":
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
            if _leads_to(value, m[name]) or value is m[name]:
                return value if value.op == "reshape" else m[name]
    found: Value = m[name]
    return found


def check_given(m: Match) -> Reject | None:
    """Scale and zero point broadcast along x, and the result is clamped."""
    rejected = _known(m, "low", "high", "given_number", "zero_number") or _check_source(m) or _check_range(m)
    if rejected is not None:
        return rejected
    if _bounds(m) is None:
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
    apply = "multiply" if "product" in m else _apply(m)
    if "given_number" in m:
        apply = "divide" if _spelling(m, m["quotient"]) == "div" else "multiply"
    args = {"x": m["x"], "scale": scale, "zero_point": zero_point, "apply": apply, **_storage(m, (0, 0))}
    return Call(quantize, args, [m.root, None, None])


_betrayed = _round(anything()).as_("site")

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
            any_of(clamped(opt_cast(any_of(_betrayed + var("any_zero"), _betrayed))), _round(clamped(anything())).as_("site"), _betrayed)
        )
    ).where(lambda value: value.dtype in (torch.int8, torch.uint8), "the result is not stored in a byte"),
)

# -------------------------------------------------------------------- float8

eighth = any_of(clamped(by_given), by_given)


def check_float8(m: Match) -> Reject | None:
    """A cast to float8 of what is clamped to its range."""
    rejected = _known(m, "low", "high", "given_number")
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
    rejected = _known(m, "low", "high", "floor", "per_step")
    if rejected is not None or "high" not in m or not _nonzero(m):
        return rejected or Reject("the value is not clamped to the range of float8", m["site"])
    if not bits(m["x"].dtype) or not same_shape(m["x"].shape, m.root.shape):
        return Reject("what is quantised is not floating point, or of another shape", m["x"])
    return _check_rows(m, ("scale",)) or _check_aligned(m)


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
    divides = m["smoothed"].op == "div" and _spelling(m, m["smoothed"]) == "div"
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

register_builtin(
    QUANTIZE, QUANTIZE_ROWS, QUANTIZE_ROWS_ASYMMETRIC, QUANTIZE_BY_INVERSE, QUANTIZE_FLOAT8, QUANTIZE_FLOAT8_ROWS, SMOOTHED_QUANTIZE
)
