"""Multi-head latent attention whose queries and keys come in two parts, without and with rotary position.

    key = torch.cat((k_nope, k_rope.expand(-1, heads, -1, -1)), dim=-1)     # or new_empty and two assignments
    attention(torch.cat((q_nope, q_rope), dim=-1), key, value)          # or queries that nothing rotated, in one piece

What tells it from partial rotary embeddings is that one part of the keys is a single head which all heads share. The parts stay apart: no
key is assembled for each head. The rule starts from `attention`, so that whatever that reads (SDPA, eager spellings, masks) counts here.

Sources: DeepSeek-V2, https://arxiv.org/abs/2405.04434; transformers' DeepseekV3Attention; DeepSeek-V3's inference/model.py (naive).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from npu_fusion.heads import unrepeated
from npu_fusion.match import Match
from npu_fusion.ops.attention import mla_attention
from npu_fusion.pattern import LAST, any_of, anything, op_any_args, sem
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.canon import Canon, is_number
from npu_fusion.view.shapes import known_equal
from npu_fusion.view.value import Dim

HEADS = 1
_KEPT = ("scale", "mask", "is_causal", "causal_offset")
_ABSENT = ("softcap", "sinks", "kv_lengths", "block_table", "out_dtype")

# -------------------------------------------------------------------- the parts of queries and keys


def _cuts(parts: Sequence[Value]) -> Iterator[tuple[int, Dim]]:
    """Where a concatenation can be cut in two: the number of parts before the cut, and their channels together."""
    channels: Dim = 0
    for count, part in enumerate(parts[:-1], start=1):
        channels = channels + part.shape[-1]
        yield count, channels


def _cut_query(canon: Canon, query: Value, channels: Dim) -> tuple[Value, Value] | None:
    """The queries before and behind that many channels; None where they are put together otherwise."""
    if query.op != "cat":
        last = query.ndim - 1
        return canon.slice(query, last, 0, channels), canon.slice(query, last, channels, query.shape[-1])
    at = next((count for count, found in _cuts(query.args) if known_equal(found, channels)), None)
    return None if at is None else (canon.cat(query.args[:at], -1), canon.cat(query.args[at:], -1))


def _shared(canon: Canon, parts: Sequence[Value], heads: Dim) -> Value | None:
    """The one head [B, 1, S, D] that the concatenated parts repeat for each of several heads; None where heads differ."""
    bases = []
    for part in parts:
        base, repeats = unrepeated(canon, part, HEADS)
        if not known_equal(base.shape[HEADS], 1) or not known_equal(repeats, heads):
            return None
        bases.append(base)
    return canon.cat(bases, -1)


def _parts(m: Match) -> tuple[Value, Value, Value, Value] | Reject:
    """q_nope, q_rope, k_nope and k_rope."""
    canon, query, key = m.view.canon, m["query"], m["key"]
    heads = query.shape[HEADS]
    if known_equal(heads, 1):
        return Reject("of one head there is nothing that heads could share", key)
    if not known_equal(key.shape[HEADS], heads):
        return Reject("keys have fewer heads than queries", key)
    for count, channels in _cuts(key.args):
        queries = _cut_query(canon, query, channels)
        if queries is None:
            continue
        keys = (key.args[:count], key.args[count:])
        shared = [_shared(canon, side, heads) for side in keys]
        if (shared[0] is None) == (shared[1] is None):
            continue
        rope = 0 if shared[1] is None else 1
        one_head = shared[rope]
        assert one_head is not None
        return queries[1 - rope], queries[rope], canon.cat(keys[1 - rope], -1), one_head
    return Reject("no part of the keys is one head that all heads share, cut as the queries are", key)


# -------------------------------------------------------------------- rule


def check_mla_attention(m: Match) -> Reject | None:
    """Nothing is asked for that the fused op lacks, and the keys' parts are those of MLA."""
    form = m.form("attention")
    for name in _ABSENT:
        if form.args.get(name) is not None:
            return Reject(f"latent attention with {name} is not fused", m.root)
    window = form.args.get("window")
    if window is not None and window != 0 and not (isinstance(window, Value) and is_number(window, 0)):
        return Reject("latent attention with a window is not fused", m.root)
    value = form.args["value"]
    if not known_equal(value.shape[HEADS], m["query"].shape[HEADS]):
        return Reject("values have fewer heads than queries", value)
    found = _parts(m)
    return found if isinstance(found, Reject) else None


def rewrite_mla_attention(m: Match) -> Call:
    form, parts = m.form("attention"), _parts(m)
    assert not isinstance(parts, Reject)
    args = dict(zip(("q_nope", "q_rope", "k_nope", "k_rope"), parts, strict=True))
    kept = {name: form.args[name] for name in _KEPT if form.args.get(name) is not None}
    return Call(mla_attention, {**args, "value": form.args["value"], **kept}, form.match.outputs)


MLA_ATTENTION = Rule(
    "mla_attention",
    pattern=sem(
        "attention", query=any_of(op_any_args("cat", dim=LAST), anything()).as_("query"), key=op_any_args("cat", dim=LAST).as_("key")
    ).as_("attention"),
    check=check_mla_attention,
    rewrite=rewrite_mla_attention,
    produces="mla_attention",
)

register_builtin(MLA_ATTENTION)
