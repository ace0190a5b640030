"""Rotary position embeddings: one rotated tensor, q and k by one table, and q/k normalisation, with or without the split of a merged QKV.

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
from npu_fusion.ops.rope import qk_norm_rotary, qkv_norm_rotary, rotary
from npu_fusion.pattern import (
    LAST,
    Pattern,
    any_of,
    anything,
    bits,
    cat,
    op,
    opt_round,
    opt_upcast,
    permute,
    reshape,
    sem,
    sliced,
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
    """x1 * cos - x2 * sin and x2 * cos + x1 * sin (or + and - for the other way round) next to each other, and what passes through behind."""
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
    x = m["x"] if m["x"].ndim == flipped.ndim else canon.reshape(m["x"], flipped.shape) if m["x"].ndim < flipped.ndim else m["x"]
    wrong = _check_width(x)
    if wrong is not None:
        return wrong
    core = flipped.args[0] if flipped.op == "cast" else flipped
    layout = "half" if core.op == "cat" else "interleaved"
    sign = 1 if core.args[0].op == "neg" else -1
    if not same_shape(x.shape, flipped.shape) or _turn(canon, x, layout, sign) is not flipped:
        return Reject("the tensor multiplied with sin is not made of the two halves, one of them negated, of that multiplied with cos", flipped)
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
    if x.op != "reshape" or x.args[0].op != "permute":
        return None
    swapped = x.args[0]
    pairs, last = swapped.args[0], swapped.ndim - 1
    swaps_last = swapped.attrs["dims"] == (*range(last - 1), last, last - 1) and swapped.ndim == x.ndim + 1
    return canon.reshape(pairs, x.shape) if swaps_last and known_equal(pairs.shape[-1], 2) and same_shape(pairs.shape[:-2], x.shape[:-1]) else None


def _per_pair(canon: Canon, cos: Value, sin: Value, layout: str) -> tuple[Value, Value]:
    """The tables of half the width from which the model made these by writing every entry twice, else these."""
    halves = [_unrepeated(canon, table, layout) for table in (cos, sin)]
    return (halves[0], halves[1]) if halves[0] is not None and halves[1] is not None else (cos, sin)


def _unrepeated(canon: Canon, table: Value, layout: str) -> Value | None:
    if table.op == "cast":
        inner = _unrepeated(canon, table.args[0], layout)
        cast_back = None if inner is None or table.dtype is None else canon.cast(inner, table.dtype)
        return cast_back if cast_back is not None and _is_there(cast_back) else None
    if table.op == ("interleave" if layout == "interleaved" else "cat") and len(table.args) == 2 and table.args[0] is table.args[1]:
        return table.args[0]
    if layout == "interleaved" and table.op == "reshape" and table.args[0].op == "expand":
        pairs = table.args[0]
        single = pairs.args[0]
        doubled = known_equal(pairs.shape[-1], 2) and same_shape(single.shape, (*pairs.shape[:-1], 1))
        if doubled and known_equal(2 * pairs.shape[-2], table.shape[-1]) and pairs.ndim == table.ndim + 1:
            return canon.reshape(single, pairs.shape[:-1])
    return None


def _is_there(value: Value) -> bool:
    """Whether the graph computes the value, or what it is a view of."""
    return value.node is not None or (value.op in ("reshape", "expand", "permute", "slice") and _is_there(value.args[0]))


def _read_pairs(m: Match) -> _Rotation | Reject:
    """What a rotation written pair by pair rotates, by what."""
    canon, site = m.view.canon, m["site"]
    if (m["first"].op, m["second"].op) not in (("sub", "add"), ("add", "sub")):
        return Reject("the two products have signs that are no rotation", m["second"])
    found = next(((x, layout) for layout in ("half", "interleaved") if (x := _joined(canon, m["x1"], m["x2"], layout)) is not None), None)
    if found is None:
        return Reject("the rotated parts are not the two halves, nor the even and odd channels, of one tensor", m["first"])
    x, layout = found
    wrong = _check_width(x)
    if wrong is not None:
        return wrong
    cos, sin = _joined_tables(canon, m, "half" if site.op == "cat" else "interleaved")
    if cos is None or sin is None:
        return Reject("the two halves of the result are made with different cos or sin", m["second"], progress=1)
    if site.op == "interleave" and layout == "half":
        return Reject("the channels are paired as halves but the result is interleaved", site, progress=1)
    if layout == "interleaved" and site.op == "cat":
        layout = "mla"
    if cos is m["cos1"] and not _is_table(m["x1"].shape[-1], cos, sin):
        return Reject("cos and sin do not have one entry for every pair of channels", cos, progress=1)
    x, layout = _deinterleaved(canon, x, layout)
    found_rotation = _Rotation(x, cos, sin, layout, 1 if m["first"].op == "sub" else -1)
    return found_rotation if "rest" not in m else _with_rest(canon, found_rotation, m["rest"])


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
    """The only value that can have the two as its pairs."""
    if first.op == "slice" and first.attrs["dim"] == first.ndim - 1 and layout == "interleaved":
        return first.args[0]
    if layout == "interleaved":
        return None
    if first.op == second.op == "slice" and first.args[0] is second.args[0] and first.attrs["dim"] == second.attrs["dim"] == first.ndim - 1:
        return canon.slice(first.args[0], -1, first.attrs["start"], second.attrs["stop"])
    whole = canon.cat((first, second), -1) if same_shape(first.shape, second.shape) else None
    return whole if whole is not None and whole.node is not None else None


def _with_rest(canon: Canon, rotation: _Rotation, rest: Value) -> _Rotation | Reject:
    """The rotation of the leading channels of a tensor whose others pass through."""
    x = rotation.x
    whole = _tensor_of(canon, x, rest)
    if whole is None:
        return Reject("what is concatenated behind the rotated channels is not the rest of the same tensor", rest, progress=2)
    return _Rotation(whole, rotation.cos, rotation.sin, rotation.layout, rotation.sign, int(x.shape[-1]))


def _tensor_of(canon: Canon, x: Value, rest: Value) -> Value | None:
    """The value that is x, then rest, along the last dimension, if the model has one."""
    if x.op == "cast" and rest.op == "cast" and x.dtype is not None and x.dtype == rest.dtype:
        inner = _tensor_of(canon, x.args[0], rest.args[0])
        return None if inner is None else canon.cast(inner, x.dtype)
    whole = x.args[0] if x.op == "slice" and x.attrs["dim"] == x.ndim - 1 else canon.cat((x, rest), -1) if x.ndim == rest.ndim else None
    if whole is None or not _is_there(whole):
        return None
    width, size = x.shape[-1], whole.shape[-1]
    matches = canon.slice(whole, -1, 0, width) is x and canon.slice(whole, -1, width, size) is rest
    return whole if matches else None


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
            return Reject(f"rounding='exact': the model rounds every product to {site.dtype}, the fused op the result only", site, progress=2)
        return None

    return check


def _rewriter(read: Callable[[Match], _Rotation | Reject]) -> Callable[[Match], Call]:
    def rewrite(m: Match) -> Call:
        found = read(m)
        assert isinstance(found, _Rotation)
        args = {"cos": found.cos, "sin": found.sin, "layout": found.layout, "rotary_dim": found.rotary_dim, "sign": found.sign}
        return Call(rotary, {"xs": [found.x], **args, "out_dtype": m.root.dtype}, [m.root])

    return rewrite


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
    gist=rotated_pairs,
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


# -------------------------------------------------------------------- q/k norm and rotation

HEADS_FIRST = (0, 2, 1, 3)
_NORM_ARGUMENTS = ("eps", "weight_offset", "round_dtype")


def _normed(name: str) -> Pattern:
    """A normalised tensor, its heads moved first or not."""
    norm = sem("rms_norm", gate=None).as_(name)
    return any_of(norm, opt_round(permute(norm, dims=HEADS_FIRST).as_(f"{name}_heads_first")))


def _norm_key(form: Form) -> tuple[Any, ...]:
    """The arguments that the norms of q and k must share."""
    return (*(form.args.get(name) or None for name in _NORM_ARGUMENTS), form.args.get("weight") is None, form.args.get("gate") is None)


def _check_norms(q: Form, k: Form, q_out: Value, k_out: Value) -> Reject | None:
    """The norms of q and k are of one kind, along the heads' channels, and keep the dtype: `q_out` is what leaves the norm of q."""
    if _norm_key(q) != _norm_key(k):
        return Reject("q and k are normalised in different ways (eps, weight, rounding)", k_out)
    for form, out in ((q, q_out), (k, k_out)):
        weight, x = form.args.get("weight"), form.args["x"]
        if weight is not None and not same_shape(weight.shape, x.shape[-1:]):
            return Reject("the weight of the norm is not one vector along the heads' channels", weight)
        if out.dtype != x.dtype:
            return Reject(f"the norm takes {x.dtype} and gives {out.dtype}, the fused op gives what it takes", out)
    if not known_equal(q.args["x"].shape[-1], k.args["x"].shape[-1]):
        return Reject("the heads of q and k have different sizes", k_out)
    return None


def _norm_arguments(q: Form, k: Form) -> dict[str, Any]:
    shared = {name: q.args[name] for name in _NORM_ARGUMENTS if name in q.args}
    return {"q_weight": q.args.get("weight"), "k_weight": k.args.get("weight"), **shared}


def _rotary_arguments(form: Form) -> dict[str, Any]:
    return {name: form.args[name] for name in ("cos", "sin", "layout", "rotary_dim", "sign")}


def check_qk_norm_rotary(m: Match) -> Reject | None:
    q, k, rotated = m.form("q"), m.form("k"), m.form("rotated")
    if ("q_heads_first" in m) != ("k_heads_first" in m):
        return Reject("the heads of one of q and k are moved first before the rotation, those of the other are not", m["k"])
    q_in, k_in = rotated.args["xs"]
    wrong = _check_norms(q, k, q_in, k_in)
    if wrong is None and any(out.dtype != x.dtype for out, x in zip(rotated.match.outputs, (q_in, k_in), strict=True)):
        return Reject("the rotation changes the dtype, the fused op does not", m.root)
    return wrong


def rewrite_qk_norm_rotary(m: Match) -> Call:
    q, k, rotated = m.form("q"), m.form("k"), m.form("rotated")
    args = {"q": q.args["x"], "k": k.args["x"], **_norm_arguments(q, k), **_rotary_arguments(rotated), "heads_first": "q_heads_first" in m, "norm_last": False}
    return Call(qk_norm_rotary, args, rotated.match.outputs)


QK_NORM_ROTARY = Rule(
    "qk_norm_rotary",
    pattern=sem("rotary", xs=[_normed("q"), _normed("k")]).as_("rotated"),
    check=check_qk_norm_rotary,
    rewrite=rewrite_qk_norm_rotary,
    produces="qk_norm_rotary",
)


def _rotated_input(form: Form) -> Form | None:
    """The rotation of q and k together whose result a norm takes."""
    found = form.args["x"].form("rotary")
    return found if found is not None and len(found.args["xs"]) == 2 else None


def _norm_after_rotation(form: Form) -> Hashable:
    rotated = _rotated_input(form)
    return None if rotated is None else (rotated.match, *_norm_key(form))


def _norm_together(forms: Sequence[Form]) -> Call | None:
    by_output = {rotated.output: form for form in forms if (rotated := _rotated_input(form)) is not None}
    if sorted(by_output) != [0, 1]:
        return None
    q, k = by_output[0], by_output[1]
    rotated = _rotated_input(q)
    assert rotated is not None
    outputs = [q.match.outputs[0], k.match.outputs[0]]
    kept = all(x.dtype == middle.dtype for x, middle in zip(rotated.args["xs"], rotated.match.outputs, strict=True))
    if not kept or _check_norms(q, k, outputs[0], outputs[1]) is not None:
        return None
    xs = rotated.args["xs"]
    args = {"q": xs[0], "k": xs[1], **_norm_arguments(q, k), **_rotary_arguments(rotated), "heads_first": False, "norm_last": True}
    return Call(qk_norm_rotary, args, outputs)


QK_ROTARY_NORM = GroupRule(
    "qk_rotary_norm",
    member="rms_norm",
    key=_norm_after_rotation,
    combine=_norm_together,
    produces="qk_norm_rotary",
    absorbs={"rotary": _rotated_input},
)


# -------------------------------------------------------------------- merged QKV


def _heads(name: str) -> Pattern:
    """The heads [B, S, N, D] of q or k, taken from the merged projection."""
    return reshape(sliced(var("qkv"), dim=LAST, step=1).as_(f"{name}_slice")).as_(name)


def _moved(name: str) -> Pattern:
    return permute(_heads(name), dims=HEADS_FIRST)


def _read_qkv(m: Match) -> tuple[int, int, int, Value] | Reject:
    """Numbers of heads of q and of k, their size, and the value tensor."""
    canon, qkv, q, k = m.view.canon, m["qkv"], m["q"], m["k"]
    if qkv.ndim != 3 or any(x.ndim != 4 or not same_shape(x.shape[:2], qkv.shape[:2]) for x in (q, k)):
        return Reject("q and k are not [batch, sequence, heads, size] parts of a [batch, sequence, channels] tensor", m["q_slice"])
    heads, kv_heads, size = q.shape[2], k.shape[2], q.shape[3]
    if not all(isinstance(number, int) for number in (heads, kv_heads, size)) or not known_equal(k.shape[3], size):
        return Reject("the numbers of heads are not known, or heads of q and k differ in size", k)
    bounds = (0, heads * size, (heads + kv_heads) * size, (heads + 2 * kv_heads) * size)
    parts = [(m[f"{name}_slice"].attrs["start"], m[f"{name}_slice"].attrs["stop"]) for name in ("q", "k")]
    if parts != [(bounds[0], bounds[1]), (bounds[1], bounds[2])] or not known_equal(qkv.shape[-1], bounds[3]):
        return Reject("the merged projection is not all heads of q, then of k, then as many of v", qkv)
    v = canon.permute(canon.reshape(canon.slice(qkv, -1, bounds[2], bounds[3]), k.shape), HEADS_FIRST)
    if v.node is None:
        return Reject("the model does not move the heads of v first", qkv)
    return heads, kv_heads, size, v


def check_qkv_rotary(m: Match) -> Reject | None:
    found = _read_qkv(m)
    if isinstance(found, Reject):
        return found
    if any(output.dtype != m["qkv"].dtype for output in m.form("rotated").match.outputs):
        return Reject("the rotation changes the dtype, the fused op does not", m.root)
    return None


def rewrite_qkv_rotary(m: Match) -> Call:
    found = _read_qkv(m)
    assert not isinstance(found, Reject)
    heads, kv_heads, size, v = found
    rotated = m.form("rotated")
    args = {"qkv": m["qkv"], "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": size, **_rotary_arguments(rotated)}
    if rotated.op == "rotary":
        args.update(q_weight=None, k_weight=None, eps=0.0, norm=False)
    else:
        args.update({name: rotated.args[name] for name in ("q_weight", "k_weight", *_NORM_ARGUMENTS) if name in rotated.args})
    return Call(qkv_norm_rotary, args, [*rotated.match.outputs, v])


QKV_NORM_ROTARY = Rule(
    "qkv_norm_rotary",
    pattern=any_of(
        sem("rotary", xs=[_moved("q"), _moved("k")]).as_("rotated"),
        sem("qk_norm_rotary", q=_heads("q"), k=_heads("k"), heads_first=True, norm_last=False).as_("rotated"),
        sem("qk_norm_rotary", q=_moved("q"), k=_moved("k"), heads_first=False, norm_last=False).as_("rotated"),
    ),
    check=check_qkv_rotary,
    rewrite=rewrite_qkv_rotary,
    produces="qkv_norm_rotary",
)

register_builtin(ROTARY, ROTARY_PAIRS, ROTARY_PARTIAL, ROTARY_GROUP, QK_NORM_ROTARY, QK_ROTARY_NORM, QKV_NORM_ROTARY)
