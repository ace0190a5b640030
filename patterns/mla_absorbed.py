"""Latent attention in its absorbed form: queries that W_UK went into, against the latent itself, which all heads share.

    scores = (torch.einsum("bshc,btc->bsht", q_nope, kv_cache) + torch.einsum("bshr,btr->bsht", q_pe, pe_cache)) * scale
    out = torch.einsum("bsht,btc->bshc", scores.softmax(-1), kv_cache)

The logits are a sum of two products. Written with the heads first, [B, N, S, C] @ [B, 1, C, T], they are those of attention; einsum leaves
the heads within the rows of one product for each batch, [B, S * N, C] @ [B, C, T], which is the same where a step decodes one token.

Sources: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1; DeepSeek-V3's inference/model.py (absorb).
"""

from __future__ import annotations

from npu_fusion.heads import unrepeated
from npu_fusion.masks import hides
from npu_fusion.match import Match
from npu_fusion.ops.attention import mla_attention
from npu_fusion.pattern import LAST, Pattern, any_of, bits, lit, op, opt_cast, opt_view, prod, softmax, total, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Literal, Value
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import known_equal, same_shape

from .attention import mask_arguments, mask_of, masked

ONE = Literal(1.0)


def _product(query: str, key_t: str, name: str) -> Pattern:
    return opt_view(op("matmul", var(query), var(key_t)).as_(name), "reshape")


logits = total(opt_cast(_product("query", "key_t", "nope")), opt_cast(_product("query_rope", "key_rope_t", "rope")))
scaled = any_of(prod(opt_cast(logits), lit("scale")), logits)
probabilities = softmax(masked(1, scaled), dim=LAST).as_("softmax")
pattern = op("matmul", opt_cast(opt_view(probabilities, "reshape")), var("value")).as_("site")

# -------------------------------------------------------------------- operands


def _latent(canon: Canon, keys: Value, heads: object, *, swapped: bool = False) -> Value | None:
    """Keys or values [B, T, C], [B, 1, T, C], or [B, N, T, C] that repeat one head, as [B, 1, T, C]; `swapped` if C comes before T."""
    if keys.ndim == 4:
        base, repeats = unrepeated(canon, keys, 1)
        if not known_equal(base.shape[1], 1) or (not known_equal(repeats, heads) and not known_equal(keys.shape[1], 1)):
            return None
        keys = canon.reshape(base, (base.shape[0], *base.shape[2:]))
    if keys.ndim != 3:
        return None
    keys = canon.permute(keys, (0, 2, 1)) if swapped else keys
    return canon.reshape(keys, (keys.shape[0], 1, *keys.shape[1:]))


def _rows_are_heads(m: Match) -> bool:
    """Whether the heads lie within the rows of a product for each batch: of keys that all share, the rows may as well be queries."""
    root, mask = m.root, mask_of(m)
    middle = () if mask is None else mask.shape[:-1] if mask.ndim < m["softmax"].ndim else mask.shape[1:-1]
    single = all(known_equal(size, 1) for size in middle)
    inside = root.ndim == 3 or known_equal(root.shape[1], 1)
    return inside and single and isinstance(root.shape[-2], int)


def _same_rows(m: Match, query: Value) -> bool:
    """Whether a query [B, rows, C], or [B, 1, rows, C], has the rows of a result in which the heads lie within the rows."""
    root = m.root
    rows = query.ndim in (3, 4) and known_equal(query.shape[0], root.shape[0]) and known_equal(query.shape[-2], root.shape[-2])
    return rows and (query.ndim == 3 or known_equal(query.shape[1], 1)) and _rows_are_heads(m)


def _heads_first(m: Match, x: Value) -> Value:
    """A query or result as [B, N, S, C]."""
    batch, rows, size = x.shape[0], x.shape[-2], x.shape[-1]
    if _rows_are_heads(m):
        return m.view.canon.reshape(x, (batch, rows, 1, size))
    return x if x.ndim == 4 else m.view.canon.reshape(x, (batch, 1, rows, size))


def _operands(m: Match) -> dict[str, Value] | Reject:
    """The arguments of `mla_attention` that are tensors."""
    canon, root = m.view.canon, m.root
    if root.ndim not in (3, 4) or any(m[name].ndim != root.ndim and not _same_rows(m, m[name]) for name in ("query", "query_rope")):
        return Reject("the products are not [batch, heads, length, size], or [batch, rows, size] of all heads", root)
    if not same_shape(m["softmax"].shape, (*root.shape[:-1], m["key_t"].shape[-1])) and not _rows_are_heads(m):
        return Reject("several tokens' heads lie within the rows of one product: only a step of one token is fused", root)
    heads = root.shape[1] if root.ndim == 4 else 1
    found = {name: _latent(canon, m[key], heads, swapped=True) for name, key in (("k_nope", "key_t"), ("k_rope", "key_rope_t"))}
    found["value"] = _latent(canon, m["value"], heads)
    if any(x is None for x in found.values()):
        return Reject("keys or values differ from head to head: what they share is no latent", m["key_t"])
    queries = {"q_nope": _heads_first(m, m["query"]), "q_rope": _heads_first(m, m["query_rope"])}
    return {**queries, **{name: x for name, x in found.items() if x is not None}}


def _mask(m: Match) -> Value | None:
    """The mask over logits [B, N, S, T]."""
    mask = mask_of(m)
    if mask is None or mask.ndim != 3 or m["softmax"].ndim != 3:
        return mask
    return m.view.canon.reshape(mask, (mask.shape[0], 1, *mask.shape[1:]))


# -------------------------------------------------------------------- rule


def check_absorbed(m: Match) -> Reject | None:
    """Shapes of MLA, the values being the keys, numbers that are known, and probabilities that nobody else reads."""
    found = _operands(m)
    if isinstance(found, Reject):
        return found
    if len({x.dtype for x in found.values()}) > 1 or found["q_nope"].dtype != m.root.dtype:
        return Reject("queries, keys and values differ in dtype", m.root)
    if found["value"] is not found["k_nope"]:
        return Reject("the values are not the latent that the keys are", m["value"])
    if m.exact and bits(m["query"].dtype) < 32:
        return Reject(f"rounding='exact': the model rounds the logits to {m['query'].dtype}, the fused op keeps them in fp32", m.root)
    if "fill1" in m and ((fill := m.number("fill1")) is None or not hides(fill, m["query"].dtype)):
        return Reject("the logits are filled with a number that does not hide a key", m["softmax"])
    if "floor1" in m:
        return Reject("the logits are kept above a number", m["softmax"])
    return _shared_probabilities(m)


def _shared_probabilities(m: Match) -> Reject | None:
    """The probabilities, or a view or cast of them, that somebody else reads too."""
    pending: list[Value] = [m["softmax"]]
    while pending:
        value = pending.pop()
        if any(user.op == "output" for node in m.view.nodes.get(value, ()) for user in node.users):
            return Reject("the attention probabilities are returned too", value)
        for user in value.users:
            if user.op in ("cast", "reshape", "permute", "expand"):
                pending.append(user)
            elif user is not m.root:
                return Reject("the attention probabilities are used elsewhere too", user)
    return None


def rewrite_absorbed(m: Match) -> Call:
    found = _operands(m)
    assert not isinstance(found, Reject)
    shape = (*found["q_nope"].shape[:3], found["k_nope"].shape[2])
    arguments = mask_arguments(m.view.canon, _mask(m), shape)
    arguments.pop("window", None)
    return Call(mla_attention, {**found, "scale": m.get("scale") or ONE, **arguments}, [_heads_first(m, m.root)])


MLA_ABSORBED = Rule(
    "mla_absorbed",
    pattern=pattern,
    check=check_absorbed,
    rewrite=rewrite_absorbed,
    produces="mla_attention",
    idioms={"attention": "site"},
)

register_builtin(MLA_ABSORBED)
