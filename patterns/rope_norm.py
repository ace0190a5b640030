"""Rotary position embeddings with what stands around them: the norms of q and k, and the split of a merged QKV projection.

The rules start from the semantic forms of the norms and of the joint rotation of q and k. The norms must agree in everything but their
weights, and come both before the rotation (Qwen3, Gemma3; moved heads first in between or not) or both after it (Hunyuan, nanochat).

Sources: q/k normalisation https://arxiv.org/abs/2010.04245; transformers' model code for the order of the steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from npu_fusion.match import Match
from npu_fusion.ops.rope import qk_norm_rotary, qkv_norm_rotary
from npu_fusion.pattern import LAST, Pattern, any_of, opt_round, permute, reshape, sem, sliced, var
from npu_fusion.rule import Call, GroupRule, Reject, Rule, register_builtin
from npu_fusion.view import Form, Value
from npu_fusion.view.shapes import known_equal, same_shape

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
    order = {"norm_last": False, "heads_first": "q_heads_first" in m}
    args = {"q": q.args["x"], "k": k.args["x"], **_norm_arguments(q, k), **_rotary_arguments(rotated), **order}
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
        args.update({name: rotated.args[name] for name in ("q_weight", "k_weight", *_NORM_ARGUMENTS) if name in rotated.args}, norm=True)
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

register_builtin(QK_NORM_ROTARY, QK_ROTARY_NORM, QKV_NORM_ROTARY)
