"""Rotary position embeddings: one rotated tensor, and q and k by one table.

A rotation turns pairs (x1, x2) of channels into (x1 cos - x2 sin, x2 cos + x1 sin). Models write it in two ways: `x * cos + turn(x) * sin`,
where `turn` takes the pairs to (-x2, x1), or pair by pair. The canonical view has made products of complex numbers the second.
What remains is which channels are pairs (halves, or neighbours), where the result puts them, which way they turn, how wide the tables are,
and which channels pass through.

Whether a tensor really is `turn(x)`, or a slice the first half of x, is decided by building what it would have to be: the view holds equal
computations once, so that the two are one value or the model computes something else.

Sources: Su et al. 2021, https://arxiv.org/abs/2104.09864; transformers' model code for the spellings.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from npu_fusion.match import Match
from npu_fusion.ops.rope import rotary
from npu_fusion.pattern import (
    LAST,
    VIEW_OPS,
    Pattern,
    any_of,
    anything,
    bits,
    cat,
    op,
    opt_round,
    opt_upcast,
    sem,
    var,
)
from npu_fusion.rule import Call, GroupRule, Reject, Rule, register_builtin
from npu_fusion.view import Form, Value
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import known_equal, same_shape

# -------------------------------------------------------------------- patterns

turned = any_of(
    cat(-anything(), anything(), dim=LAST),
    cat(anything(), -anything(), dim=LAST),
    op("interleave", -anything(), anything()),
    op("interleave", anything(), -anything()),
)


def _rotation(x: Pattern, cos: Pattern, sin: Pattern) -> Pattern:
    """x * cos + turn(x) * sin, or minus for the other way round."""
    along, across = opt_upcast(x) * opt_upcast(cos), opt_upcast(opt_round(turned).as_("turned")) * opt_upcast(sin)
    return any_of(along + across, along - across)


def _rotated_pairs() -> Pattern:
    """x1 * cos - x2 * sin and x2 * cos + x1 * sin (or + and - for the other way round) side by side, before what passes through."""
    x1, x2, cos1, cos2, sin1, sin2 = (opt_upcast(var(name)) for name in ("x1", "x2", "cos1", "cos2", "sin1", "sin2"))
    first = any_of(x1 * cos1 - x2 * sin1, x1 * cos1 + x2 * sin1).as_("first")
    second = any_of(x2 * cos2 + x1 * sin2, x2 * cos2 - x1 * sin2).as_("second")
    return any_of(
        cat(first, second, dim=LAST),
        cat(first, second, opt_upcast(var("rest")), dim=LAST),
        op("interleave", first, second),
    )


# -------------------------------------------------------------------- what is rotated


@dataclass(frozen=True)
class _Rotation:
    """The arguments of the semantic op that computes a matched rotation."""

    x: Value
    cos: Value
    sin: Value
    layout: str
    sign: int
    rotary_dim: int = -1


def _halves(canon: Canon, x: Value, layout: str) -> tuple[Value, Value]:
    """The first and the second members of x's pairs, as the model would write them. The last dimension is an even int."""
    width = x.shape[-1]
    bounds = ((0, width, 2), (1, width, 2)) if layout == "interleaved" else ((0, width // 2, 1), (width // 2, width, 1))
    first, second = (canon.slice(x, -1, *bound) for bound in bounds)
    return first, second


def _turn(canon: Canon, x: Value, layout: str, sign: int) -> Value:
    """(-x2, x1) for sign 1, (x2, -x1) for sign -1, in the places of x1 and x2."""
    first, second = _halves(canon, x, layout)
    pair = (canon.unary("neg", second), first) if sign > 0 else (second, canon.unary("neg", first))
    return canon.cat(pair, -1) if layout == "half" else canon.reshape(canon.stack(pair, -1), x.shape)


def _check_width(x: Value) -> Reject | None:
    if x.dtype is None or not x.dtype.is_floating_point:
        return Reject("what is rotated is not a real floating-point tensor", x)
    if x.ndim == 0 or not isinstance(x.shape[-1], int):
        return Reject("the number of rotated channels is known at run time only, so that their halves cannot be told", x)
    return Reject("an odd number of channels cannot be rotated", x) if x.shape[-1] % 2 else None


def _read_rotation(m: Match) -> _Rotation | Reject:
    """What `x * cos + turn(x) * sin` rotates, by what."""
    canon, flipped = m.view.canon, m["turned"]
    x = canon.reshape(m["x"], flipped.shape) if m["x"].ndim < flipped.ndim else m["x"]  # the view drops leading unit dimensions
    wrong = _check_width(x)
    if wrong is not None:
        return wrong
    core = flipped.args[0] if flipped.op == "cast" else flipped
    layout = "half" if core.op == "cat" else "interleaved"
    sign = 1 if core.args[0].op == "neg" else -1
    if not same_shape(x.shape, flipped.shape) or _turn(canon, x, layout, sign) is not flipped:
        return Reject("what is multiplied with sin is not made of the halves, one of them negated, of what is multiplied with cos", flipped)
    cos, sin = m["cos"], m["sin"]
    if not _is_table(x.shape[-1], cos, sin):
        return Reject("cos and sin do not have one entry for every rotated channel", cos, progress=1)
    cos, sin = _per_pair(canon, cos, sin, layout)
    x, layout = _deinterleaved(canon, x, layout)
    return _Rotation(x, cos, sin, layout, sign if m["site"].op == "add" else -sign)


def _is_table(width: Any, *tables: Value) -> bool:
    return all(table.ndim > 0 and known_equal(table.shape[-1], width) for table in tables)


def _deinterleaved(canon: Canon, x: Value, layout: str) -> tuple[Value, str]:
    """What x was before its even channels were put before its odd ones (DeepSeek), and the layout that does so in passing."""
    source = _before_deinterleaving(canon, x) if layout == "half" else None
    return (x, layout) if source is None else (source, "mla")


def _before_deinterleaving(canon: Canon, x: Value) -> Value | None:
    if x.op == "cast" and x.dtype is not None:
        inner = _before_deinterleaving(canon, x.args[0])
        return None if inner is None else canon.cast(inner, x.dtype)
    if x.op == "cat" and len(x.args) == 2:
        return _joined(canon, x.args[0], x.args[1], "interleaved")
    if x.op == "reshape" and x.args[0].op == "permute" and x.args[0].ndim == x.ndim + 1:
        swapped, last = x.args[0], x.ndim
        pairs = swapped.args[0]
        if swapped.attrs["dims"] == (*range(last - 1), last, last - 1) and same_shape(pairs.shape, (*x.shape[:-1], x.shape[-1] // 2, 2)):
            return canon.reshape(pairs, x.shape)
    return None


def _per_pair(canon: Canon, cos: Value, sin: Value, layout: str) -> tuple[Value, Value]:
    """The tables of half the width from which the model made these by writing every entry twice, if the graph has them, else these."""
    halves = [half for table in (cos, sin) if (half := _unrepeated(canon, table, layout)) is not None and _is_there(half)]
    return (halves[0], halves[1]) if len(halves) == 2 else (cos, sin)


def _unrepeated(canon: Canon, table: Value, layout: str) -> Value | None:
    """One entry a pair of a table that was made by cat or stack of one tensor with itself, or by repeat_interleave."""
    if table.op == "cast" and table.dtype is not None:
        inner = _unrepeated(canon, table.args[0], layout)
        return None if inner is None else canon.cast(inner, table.dtype)
    if table.op == ("interleave" if layout == "interleaved" else "cat"):
        return table.args[0] if len(table.args) == 2 and table.args[0] is table.args[1] else None
    if layout == "interleaved" and table.op == "reshape" and table.args[0].op == "expand":
        pairs = table.args[0]
        single, shape = pairs.args[0], (*table.shape[:-1], table.shape[-1] // 2)
        if same_shape(single.shape, (*shape, 1)) and same_shape(pairs.shape, (*shape, 2)):
            return canon.reshape(single, shape)
    return None


def _is_there(value: Value) -> bool:
    """Whether the graph computes the value, or what it is a view of."""
    return value.node is not None or (value.op in (*VIEW_OPS, "slice", "view_as_real") and _is_there(value.args[0]))


def _read_pairs(m: Match) -> _Rotation | Reject:
    """What a rotation written pair by pair rotates, by what."""
    canon, site = m.view.canon, m["site"]
    if {m["first"].op, m["second"].op} != {"sub", "add"}:
        return Reject("the two products have signs that are no rotation", m["second"])
    found = _rotated_tensor(canon, m["x1"], m["x2"], "half" if site.op == "cat" else "interleaved")
    if isinstance(found, Reject):
        return found
    x, layout = found
    cos, sin = _joined_tables(canon, m, "half" if site.op == "cat" else "interleaved")
    if cos is None or sin is None:
        return Reject("the two halves of the result are made with different cos or sin", m["second"], progress=1)
    if cos is m["cos1"] and not _is_table(m["x1"].shape[-1], cos, sin):
        return Reject("cos and sin do not have one entry for every pair of channels", cos, progress=1)
    rotation = _Rotation(x, cos, sin, layout, 1 if m["first"].op == "sub" else -1)
    return rotation if "rest" not in m else _with_rest(canon, rotation, m["rest"])


def _rotated_tensor(canon: Canon, x1: Value, x2: Value, written: str) -> tuple[Value, str] | Reject:
    """The tensor whose pairs are (x1, x2), and the layout that takes it to the one in which the result is written."""
    halves, pairs = (_joined(canon, x1, x2, layout) for layout in ("half", "interleaved"))
    x = pairs if halves is None else halves
    if x is None:
        return Reject("the rotated parts are not the two halves, nor the even and odd channels, of one tensor", x1)
    wrong = _check_width(x)
    if wrong is not None:
        return wrong
    if halves is None:
        return x, "mla" if written == "half" else "interleaved"
    if written == "interleaved":
        return Reject("the rotated channels are paired as halves, but the result has them interleaved", x1, progress=1)
    return _deinterleaved(canon, x, "half")


def _joined_tables(canon: Canon, m: Match, layout: str) -> tuple[Value | None, Value | None]:
    """The tables of a rotation written pair by pair: one entry a pair, or two full tables whose halves were taken."""
    if m["cos1"] is m["cos2"] and m["sin1"] is m["sin2"]:
        return m["cos1"], m["sin1"]
    return _joined(canon, m["cos1"], m["cos2"], layout), _joined(canon, m["sin1"], m["sin2"], layout)


def _joined(canon: Canon, first: Value, second: Value, layout: str) -> Value | None:
    """The value whose pairs, in this layout, have the given first and second members."""
    if first.op == "cast" and second.op == "cast" and first.dtype is not None and first.dtype == second.dtype:
        inner = _joined(canon, first.args[0], second.args[0], layout)
        return None if inner is None else canon.cast(inner, first.dtype)
    whole = _whole_of(canon, first, second, layout)
    if whole is None or whole.ndim == 0 or not isinstance(whole.shape[-1], int) or whole.shape[-1] % 2:
        return None
    return whole if _halves(canon, whole, layout) == (first, second) else None


def _whole_of(canon: Canon, first: Value, second: Value, layout: str) -> Value | None:
    """The only value of the graph that can have the two as its pairs."""
    source, other = (part.args[0] if part.op == "slice" and part.attrs["dim"] == part.ndim - 1 else None for part in (first, second))
    if layout == "interleaved":
        return source
    if source is not None and source is other:
        return canon.slice(source, -1, first.attrs["start"], second.attrs["stop"])
    if not same_shape(first.shape, second.shape):
        return None
    whole = canon.cat((first, second), -1)
    return whole if _is_there(whole) else None


def _with_rest(canon: Canon, rotation: _Rotation, rest: Value) -> _Rotation | Reject:
    """The rotation of the leading channels of a tensor whose others pass through."""
    x = rotation.x
    whole = _tensor_of(canon, x, rest)
    if whole is None:
        return Reject("what is concatenated behind the rotated channels is not the rest of the same tensor", rest, progress=2)
    return _Rotation(whole, rotation.cos, rotation.sin, rotation.layout, rotation.sign, int(x.shape[-1]))


def _tensor_of(canon: Canon, x: Value, rest: Value) -> Value | None:
    """The value of the graph that is x, then rest, along the last dimension."""
    if x.op == "cast" and rest.op == "cast" and x.dtype is not None and x.dtype == rest.dtype:
        inner = _tensor_of(canon, x.args[0], rest.args[0])
        return None if inner is None else canon.cast(inner, x.dtype)
    if x.op == "slice" and x.attrs["dim"] == x.ndim - 1:
        whole = x.args[0]
    elif x.dtype == rest.dtype and same_shape(x.shape[:-1], rest.shape[:-1]):
        whole = canon.cat((x, rest), -1)
    else:
        return None
    width, size = x.shape[-1], whole.shape[-1]
    parts = canon.slice(whole, -1, 0, width), canon.slice(whole, -1, width, size)
    return whole if parts == (x, rest) and _is_there(whole) else None


# -------------------------------------------------------------------- one tensor


def _checker(read: Callable[[Match], _Rotation | Reject]) -> Callable[[Match], Reject | None]:
    """Checks that what was matched is a rotation, of the shape and at the precision of the fused op."""

    def check(m: Match) -> Reject | None:
        rotation = read(m)
        if isinstance(rotation, Reject):
            return rotation
        x, site = rotation.x, m["site"]
        if not same_shape(x.shape, site.shape):
            return Reject("cos and sin have more rows than the tensor that they rotate", rotation.cos, progress=2)
        if any(table.dtype is None or not table.dtype.is_floating_point for table in (rotation.cos, rotation.sin)):
            return Reject("cos or sin is not a real floating-point tensor", rotation.cos, progress=2)
        if bits(site.dtype) > 32 and all(bits(value.dtype) <= 32 for value in (x, rotation.cos, rotation.sin)):
            return Reject(f"the model rotates in {site.dtype}, the fused op in fp32", site, progress=2)
        if m.exact and bits(site.dtype) < 32:
            return Reject(f"rounding='exact': the model rounds each product to {site.dtype}, the fused op only the sum", site, progress=2)
        return None

    return check


def _rewriter(read: Callable[[Match], _Rotation | Reject]) -> Callable[[Match], Call]:
    def rewrite(m: Match) -> Call:
        found = read(m)
        assert isinstance(found, _Rotation)
        args = {"cos": found.cos, "sin": found.sin, "layout": found.layout, "rotary_dim": found.rotary_dim, "sign": found.sign}
        return Call(rotary, {"xs": [found.x], **args, "out_dtype": m.root.dtype}, [m.root])

    return rewrite


def _turns_slices(site: Value) -> bool:
    """Whether a factor of the first product is a slice: else it is the product of two complex tensors, which need be no rotation."""
    factors = [factor.args[0] if factor.op == "cast" else factor for product in site.args[0].args for factor in product.args]
    return any(factor.op == "slice" for factor in factors)


rotation = _rotation(var("x"), var("cos"), var("sin")).as_("site")
rotated_pairs = _rotated_pairs().as_("site")

ROTARY = Rule(
    "rotary",
    pattern=opt_round(rotation),
    check=_checker(_read_rotation),
    rewrite=_rewriter(_read_rotation),
    produces="rotary",
    idioms={"rope": "site"},
    gist=_rotation(anything(), anything(), anything()).as_("site"),
)

ROTARY_PAIRS = Rule(
    "rotary_pairs",
    pattern=opt_round(rotated_pairs),
    check=_checker(_read_pairs),
    rewrite=_rewriter(_read_pairs),
    produces="rotary",
    idioms={"rope": "site"},
    gist=rotated_pairs.where(_turns_slices, "not a rotation of the parts of a tensor"),
)


# -------------------------------------------------------------------- leading channels


def _read_partial(m: Match) -> _Rotation | Reject:
    args = m.form("rotated").args
    rotation = _Rotation(args["xs"][0], args["cos"], args["sin"], args["layout"], args["sign"])
    return _with_rest(m.view.canon, rotation, m["rest"])


def _check_partial(m: Match) -> Reject | None:
    found = _read_partial(m)
    if isinstance(found, Reject):
        return found
    if m.exact and bits(m["rotated"].dtype) < bits(m.root.dtype):
        return Reject("rounding='exact': the model rounds the rotated channels before it concatenates them", m["rotated"])
    return None


ROTARY_PARTIAL = Rule(
    "rotary_partial",
    pattern=opt_round(cat(opt_upcast(sem("rotary", rotary_dim=-1, xs=[anything()]).as_("rotated")), opt_upcast(var("rest")), dim=LAST)),
    check=_check_partial,
    rewrite=_rewriter(_read_partial),
    produces="rotary",
)


# -------------------------------------------------------------------- q and k


def _shared_table(form: Form) -> Hashable:
    """What rotations have in common that one call can make. A form of several tensors is a group already."""
    args = form.args
    return tuple(args[name] for name in ("cos", "sin", "layout", "rotary_dim", "sign", "out_dtype")) if len(args["xs"]) == 1 else None


def _rotate_together(forms: Sequence[Form]) -> Call:
    return Call(rotary, {**forms[0].args, "xs": [form.args["xs"][0] for form in forms]}, [form.match.outputs[0] for form in forms])


ROTARY_GROUP = GroupRule("rotary_q_and_k", member="rotary", key=_shared_table, combine=_rotate_together, produces="rotary")

register_builtin(ROTARY, ROTARY_PAIRS, ROTARY_PARTIAL, ROTARY_GROUP)
