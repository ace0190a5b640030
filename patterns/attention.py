"""Attention: lifted scaled_dot_product_attention, and softmax(scale * q @ k^T + mask) @ v written out.

The canonical view has already unfolded batches (`bmm` on [B * N, S, D]), made `baddbmm`, `einsum` and `matmul` one product, dropped dropout
outside training and the maximum subtracted before a softmax. What remains is where the scale stands, how the mask is applied, softcap and
sinks, and how often the key and value heads are repeated.

Sources: Vaswani et al. 2017; Gemma 2 (softcap), gpt-oss (sinks); transformers' `eager_attention_forward` and its kin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from npu_fusion.heads import times, unrepeated, unscaled
from npu_fusion.masks import boolean_of, hides, structure_of
from npu_fusion.match import Match
from npu_fusion.ops.attention import attention
from npu_fusion.pattern import (
    LAST,
    Pattern,
    any_of,
    anything,
    as_pattern,
    bits,
    cat,
    lit,
    op,
    op_any_args,
    opt_cast,
    opt_upcast,
    prod,
    sliced,
    softmax,
    tanh,
    through,
    total,
    var,
)
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Literal, Value
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import broadcast, known_equal, product, same_shape
from npu_fusion.view.value import Shape

ONE = Literal(1.0)

# -------------------------------------------------------------------- logits

logits = op("matmul", var("query"), var("key_t"))
scaled = any_of(prod(logits, lit("scale")), logits * var("factor"), op("div", logits, var("divisor")), logits)
capped = any_of(
    tanh(opt_cast(op("div", scaled, lit("softcap")))) * lit("softcap"),
    tanh(opt_cast(prod(opt_cast(scaled), lit("inverse_softcap")))) * lit("softcap"),
    scaled,
)
MASK_LAYERS = (1, 2, 3)


def masked(layer: int, unmasked: Pattern = capped) -> Pattern:
    """The logits behind at most `layer` masks, added or filled in; layer 1 is applied first."""
    if layer == 0:
        return opt_cast(unmasked)
    inner = masked(layer - 1, unmasked)
    return opt_cast(
        any_of(
            op("where", var(f"visible{layer}"), inner, lit(f"fill{layer}")),
            op("where", var(f"hidden{layer}"), lit(f"fill{layer}"), inner),
            total(inner, opt_upcast(var(f"bias{layer}"))),
            op("maximum", inner, lit(f"floor{layer}"), commutative=True),
            inner,
        )
    )


scores = any_of(masked(MASK_LAYERS[-1]), opt_cast(prod(masked(1), lit("outer_scale"))))

# -------------------------------------------------------------------- probabilities and values

without_sinks = softmax(scores, dim=LAST).as_("softmax")
with_sinks = sliced(softmax(opt_cast(cat(scores, var("sinks"), dim=LAST)), dim=LAST).as_("softmax"), dim=LAST, start=0, step=1).as_("kept")
zeroed = op("where", var(f"hidden{MASK_LAYERS[-1]}"), as_pattern(0.0), opt_cast(without_sinks))  # queries without a key get zeros, not NaN
probabilities = opt_cast(any_of(without_sinks, with_sinks, zeroed.as_("zeroed")))


def check_eager(m: Match) -> Reject | None:
    """The shapes are those of heads, numbers are known where they decide the meaning, and nobody else wants the probabilities."""
    if m.root.ndim < 3 or any(m[name].ndim != m.root.ndim for name in ("query", "key_t", "value")):
        return Reject("query, key and value are not [batch, heads, length, size]", m.root)
    mask = mask_of(m)
    if mask is not None and m.root.ndim > 4 and mask.ndim > 2 and mask.ndim != m.root.ndim:
        return Reject("the mask has other dimensions than the logits", mask)
    for name in ("factor", "divisor"):
        if name in m and m[name].ndim > 0 and not known_equal(m[name].shape[-1], 1):
            return Reject("the logits are multiplied with a tensor that differs from key to key", m[name])
    if "sinks" in m and (_sinks(m) is None or not known_equal(m["kept"].shape[-1], m["key_t"].shape[-1])):
        return Reject("what is concatenated to the logits is not one number a head, sliced off again", m["sinks"])
    if m.exact and bits(m["query"].dtype) < 32:
        return Reject(f"rounding='exact': the model rounds the logits to {m['query'].dtype}, the fused op keeps them in fp32", m["query"])
    user = _other_user(m)
    if user is not None:
        return Reject("the attention probabilities are used elsewhere too, so that they have to be computed anyway", user)
    return _check_numbers(m)


def _check_numbers(m: Match) -> Reject | None:
    for layer in MASK_LAYERS:
        if f"fill{layer}" in m:
            fill = m.number(f"fill{layer}")
            if fill is None or not hides(fill, m["query"].dtype):
                return Reject(f"the logits are filled with {fill}, which does not hide a key", m["softmax"])
        if f"floor{layer}" in m and ((floor := m.number(f"floor{layer}")) is None or not hides(floor, m["query"].dtype)):
            return Reject(f"the logits are kept above {floor}", m["softmax"])
    if "zeroed" in m and m.number(f"fill{MASK_LAYERS[-1]}") != -math.inf:
        return Reject("the probabilities are masked otherwise than the logits", m["zeroed"])
    for name in ("softcap", "outer_scale"):
        if name in m and (number := m.number(name)) is not None and number <= 0:
            return Reject(f"a negative number ({number}) takes the place of {name}", m["softmax"])
    if "outer_scale" in m and m.number("outer_scale") is None and mask_of(m) is not None:
        return Reject("the mask is multiplied with a number that is known at run time only", m["softmax"])
    if _scale(m) is None:
        return Reject("the scale is a product of several numbers that are known at run time only", m["softmax"])
    return None


def _other_user(m: Match) -> Value | None:
    """A user of the probabilities other than a product with values. Two products with different values are two calls of the fused op."""
    pending: list[Value] = [m["softmax"]]
    while pending:
        value = pending.pop()
        if any(user.op == "output" for node in m.view.nodes.get(value, ()) for user in node.users):
            return value
        for user in value.users:
            if user.op == "matmul" and user.args[0] is value:
                continue
            if user is not m.get("zeroed") and user.op not in ("cast", "reshape", "slice", "permute", "expand"):
                return user
            pending.append(user)
    return None


# -------------------------------------------------------------------- the mask


def mask_of(m: Match) -> Value | None:
    """All masks as one: boolean where that says the same, else additive; None without any."""
    canon, mask = m.view.canon, None
    for layer in MASK_LAYERS:
        if f"bias{layer}" in m:
            mask = _biased(canon, mask, m[f"bias{layer}"])
        elif f"fill{layer}" in m:
            visible = m.get(f"visible{layer}") or canon.unary("not", m[f"hidden{layer}"])
            mask = _filled(canon, mask, visible, float(m.number(f"fill{layer}") or 0.0), m["query"].dtype)
        elif f"floor{layer}" in m and mask is not None:
            floor = m.number(f"floor{layer}") or 0.0
            mask = _filled(canon, None, mask, floor, m["query"].dtype) if mask.dtype is torch.bool else _floored(canon, mask, floor)
    if mask is not None and "outer_scale" in m and mask.dtype is not torch.bool:
        mask = canon.binary("mul", mask, canon.const(m.number("outer_scale") or 1.0), mask.shape)
    return mask


def _biased(canon: Canon, mask: Value | None, bias: Value) -> Value:
    if mask is None:
        return bias
    if mask.dtype is torch.bool:
        return _where(canon, mask, bias, canon.const(-math.inf), bias.dtype)
    wide = max((mask, bias), key=lambda value: bits(value.dtype)).dtype
    assert wide is not None
    return canon.binary("add", canon.cast(mask, wide), canon.cast(bias, wide))


def _filled(canon: Canon, mask: Value | None, visible: Value, fill: float, dtype: torch.dtype | None) -> Value:
    if fill == -math.inf and (mask is None or mask.dtype is torch.bool):
        return visible if mask is None else _both(canon, mask, visible)
    if mask is not None and mask.dtype is torch.bool:
        mask = _where(canon, mask, canon.const(0.0), canon.const(-math.inf), dtype)
    return _where(canon, visible, mask or canon.const(0.0), canon.const(fill), dtype if mask is None else mask.dtype)


def _floored(canon: Canon, mask: Value, floor: float) -> Value:
    return canon.table.intern("maximum", (mask, canon.const(floor)), {}, mask.shape, mask.dtype)


def _where(canon: Canon, test: Value, then: Value, otherwise: Value, dtype: torch.dtype | None) -> Value:
    return canon.table.intern("where", (test, then, otherwise), {}, broadcast(test.shape, then.shape), dtype)


def _both(canon: Canon, a: Value, b: Value) -> Value:
    a, b = sorted((a, b), key=lambda value: value.index)
    return canon.table.intern("and", (a, b), {}, broadcast(a.shape, b.shape), torch.bool)


def mask_arguments(canon: Canon, mask: Value | None, shape: Shape) -> dict[str, object]:
    """The arguments of `attention` that say what a mask over logits of `shape` says."""
    if mask is None:
        return {}
    structure = structure_of(mask, shape[-2], shape[-1])
    if structure is None:
        mask = boolean_of(mask) or mask
        return {"mask": canon.reshape(mask, (1,) * (2 - mask.ndim) + mask.shape) if mask.ndim < 2 else mask}
    offset = structure.causal_offset if structure.is_causal or structure.window != 0 else 0
    return {"is_causal": structure.is_causal, "causal_offset": canon.sym(offset), "window": canon.sym(structure.window)}


# -------------------------------------------------------------------- operands


def _scale(m: Match) -> Literal | None:
    """All numbers that the logits are multiplied with."""
    found = ONE
    for factor in _factors(m):
        product = times(found, factor)
        if product is None:
            return None
        found = product
    return found


def _factors(m: Match) -> Iterator[Literal]:
    canon = m.view.canon
    yield from (m[name] for name in ("scale", "outer_scale", "inverse_softcap") if name in m)
    if "inverse_softcap" in m:
        yield m["softcap"]
    for name in ("query", "key_t"):
        factor = unscaled(canon, m[name])[1]
        if factor is not None:
            yield factor


def _sinks(m: Match) -> Value | None:
    """The [N] behind a column [B, N, Sq, 1] that is the same for every query."""
    column: Value = m["sinks"]
    while column.op == "expand":
        column = column.args[0]
    heads = column.args[0] if column.op == "reshape" else column
    if heads.ndim != 1 or not same_shape(column.shape[-3:], (m["kept"].shape[1], 1, 1)):
        return None
    return heads


def _output(m: Match) -> Value:
    """The result as [B, N, Sq, Dv]."""
    *lead, length, size = m.root.shape
    batch, heads = (lead[0], 1) if len(lead) == 1 else (lead[0], product(lead[1:]))
    return m.view.canon.reshape(m.root, (batch, heads, length, size))


def _with_heads(canon: Canon, x: Value, lead: Shape) -> Value:
    """A key, value, query or mask that broadcasts over the leading dimensions `lead` of the result, as [B, N, S, D]."""
    if len(lead) == 1:
        return canon.reshape(x, (*x.shape[:1], 1, *x.shape[1:])) if x.ndim == 3 else x
    if len(lead) == 2:
        return x
    grouped = canon.expand(x, (*x.shape[:1], *lead[1:], *x.shape[-2:]))
    return canon.reshape(grouped, (x.shape[0], product(lead[1:]), *x.shape[-2:]))


def _call(m: Match, heads: tuple[Value, Value, Value], mask: Value | None, output: Value, extra: dict[str, object]) -> Call:
    """One call of `attention` on query, key and value [B, N, S, D], the repetition of heads and of batches taken off."""
    canon, lead = m.view.canon, m.root.shape[:-2]
    query, key, value = (_with_heads(canon, x, lead) for x in heads)
    if mask is not None and mask.ndim > 2:
        mask = _with_heads(canon, mask, lead)
    logits_shape = (*query.shape[:-1], key.shape[-2])
    key_once, key_repeats = unrepeated(canon, key, 1)
    value_once, value_repeats = unrepeated(canon, value, 1)
    if known_equal(key_repeats, value_repeats):
        key, value = key_once, value_once
    key, value = (canon.expand(x, (query.shape[0], *x.shape[1:])) for x in (key, value))
    query, key, value = _one_dtype(canon, (query, key, value), output.dtype)
    args = {"query": query, "key": key, "value": value, **mask_arguments(canon, mask, logits_shape), **extra}
    if query.dtype != output.dtype:
        args["out_dtype"] = output.dtype
    return Call(attention, args, [output])


def _one_dtype(canon: Canon, heads: tuple[Value, Value, Value], result: torch.dtype | None) -> list[Value]:
    """Query, key and value in one type: without the casts to fp32 that the fused op does inside, where the result is not wider."""
    narrow = [_before_upcast(x) for x in heads]
    if len({x.dtype for x in narrow}) == 1 and bits(result) <= bits(narrow[0].dtype):
        return narrow
    wide = max((x.dtype for x in heads), key=bits)
    assert wide is not None
    return [canon.cast(x, wide) for x in heads]


def _before_upcast(x: Value) -> Value:
    return x.args[0] if x.op == "cast" and bits(x.args[0].dtype) and bits(x.args[0].dtype) < bits(x.dtype) else x


def rewrite_eager(m: Match) -> Call:
    canon = m.view.canon
    key_t = unscaled(canon, m["key_t"])[0]
    swapped = (*range(key_t.ndim - 2), key_t.ndim - 1, key_t.ndim - 2)
    key = canon.permute(key_t, swapped)
    query = _tempered(m, unscaled(canon, m["query"])[0])
    extra: dict[str, object] = {"scale": _scale(m)}
    if "softcap" in m:
        extra["softcap"] = m["softcap"]
    if "sinks" in m:
        extra["sinks"] = _sinks(m)
    return _call(m, (query, key, m["value"]), mask_of(m), _output(m), extra)


def _tempered(m: Match, query: Value) -> Value:
    """The query times a scale that is a tensor (one number, or one a head or a query), in place of the logits."""
    assert query.dtype is not None
    for name, operation in (("factor", "mul"), ("divisor", "div")):
        if name in m:
            factor = m[name] if m[name].ndim == 0 else m.view.canon.cast(m[name], query.dtype)
            query = m.view.canon.binary(operation, query, factor, query.shape)
    return query


EAGER = Rule(
    "attention",
    pattern=op("matmul", probabilities, var("value")).as_("site"),
    check=check_eager,
    rewrite=rewrite_eager,
    produces="attention",
    idioms={"attention": "site"},
    gist=op("matmul", through(("cast", "reshape", "slice", "where"), softmax(anything(), dim=LAST)), anything()).as_("site"),
)


# -------------------------------------------------------------------- scaled_dot_product_attention


def check_sdpa(m: Match) -> Reject | None:
    if m.root.ndim < 3 or any(m[name].ndim != m.root.ndim for name in ("query", "key", "value")):
        return Reject("query, key and value are not [batch, heads, length, size]", m.root)
    if "mask" in m and m.root.ndim > 4 and m["mask"].ndim > 2 and m["mask"].ndim != m.root.ndim:
        return Reject("the mask has other dimensions than the logits", m["mask"])
    return None


def rewrite_sdpa(m: Match) -> Call:
    """Torch's own op: masks and scale as given; `is_causal` is aligned to the top left, as in the fused op."""
    query, key, value = m["query"], m["key"], m["value"]
    extra: dict[str, object] = {"scale": m["scale"]}
    if m.root.attrs["is_causal"]:
        extra["is_causal"] = True
    return _call(m, (query, key, value), m.get("mask"), _output(m), extra)


_operands = (var("query"), var("key"), var("value"), lit("scale"))
SDPA = Rule(
    "scaled_dot_product_attention",
    pattern=any_of(op("sdpa", *_operands), op("sdpa", *_operands, var("mask"))).as_("site"),
    check=check_sdpa,
    rewrite=rewrite_sdpa,
    produces="attention",
    idioms={"attention": "site"},
    gist=op_any_args("sdpa").as_("site"),
)

register_builtin(EAGER, SDPA)
