"""Routed experts by gathered matrices: each token's rows times copies of the matrices of its experts.

    h = act(einsum("th,tkih->tki", x, gate_up[ids]) + gate_up_bias[ids])
    y = einsum("tki,tkhi->tkh", h, down[ids]) + down_bias[ids]
    out = (y * weights[..., None]).sum(1)                      # or einsum("tkh,tk->th", y, weights)

An einsum or bmm reshapes and transposes its operands for the product. What is computed is found by following a name for each dimension
(t token, k choice, i inner, h hidden); every way of writing it in which they come together as above is one and the same. The copies of the
matrices are what makes this form slow, T * k of them; the fused op reads each expert's matrix once.

Sources: transformers' integrations/moe.py (batched_mm); gpt-oss, https://github.com/openai/gpt-oss (einsum).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npu_fusion.match import Match
from npu_fusion.ops.experts import moe_experts
from npu_fusion.pattern import Pattern, any_of, op, opt_cast, opt_view, reshape, through, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.shapes import known_equal, product
from npu_fusion.view.value import Dim

from .axes import Axes, AxisNames, names_of
from .experts import at
from .experts_parts import VIEWS, activation_arguments, base_of, results_of, weighted_sum_of

# -------------------------------------------------------------------- products


def gathered(name: str) -> Pattern:
    """The matrices, or biases, of the chosen experts."""
    return through(VIEWS, at(var(name), var("ids")).as_(f"chosen_{name}"))


def projected(rows: Pattern, matrices: str) -> Pattern:
    """Rows times the chosen matrices, in either order, with the chosen biases or not."""
    rows = rows.as_(f"rows_of_{matrices}")
    product_ = any_of(op("matmul", rows, gathered(matrices)), op("matmul", gathered(matrices), rows)).as_(f"product_{matrices}")
    return any_of(opt_view(product_) + gathered(f"{matrices}_bias"), opt_view(product_))


summed = weighted_sum_of(results_of(projected))

# -------------------------------------------------------------------- what is computed


@dataclass(frozen=True)
class _Found:
    """Tensors of a match and their sizes: tokens [T, H], ids and weights [T, k], and which matrices are stored [E, out, in]."""

    x: Value
    ids: Value
    weights: Value
    tokens: Dim
    k: Dim
    turned: frozenset[str]


def leading(shape: Any) -> tuple[Dim, ...]:
    """The sizes that are not 1."""
    return tuple(size for size in shape if not known_equal(size, 1))


def read(m: Match) -> _Found | None:
    """What the match computes, or None where it is not the weighted sum of routed experts."""
    x, ids, weights = base_of(m["rows_of_gate_up"]), base_of(m["ids"]), base_of(m["factor"])
    if x.ndim < 2 or ids.ndim < 2 or weights.ndim < 2 or ("up" in m and base_of(m["rows_of_up"]) is not x):
        return None
    hidden, k = x.shape[-1], ids.shape[-1]
    tokens = product(x.shape[:-1])
    lead = max((leading(base.shape[:-1]) for base in (x, ids)), key=len)
    token_names = [f"t{i}" for i in range(len(lead))]
    sizes: dict[str, Dim] = dict(zip(token_names, lead, strict=True)) | {"h": hidden, "k": k}
    named = AxisNames({}, sizes)
    pairs = [*token_names, "k"] if not known_equal(k, 1) else token_names
    leaves = {}
    for base, names in ((x, [*token_names, "h"]), (ids, pairs), (weights, pairs)):
        axes = named.regrouped(names, base.shape)
        if axes is None:
            return None
        leaves[base] = axes
    turned = _follow(m, leaves, sizes, token_names)
    return None if turned is None else _Found(x, ids, weights, tokens, k, turned)


def _follow(m: Match, leaves: dict[Value, Axes], sizes: dict[str, Dim], tokens: list[str]) -> frozenset[str] | None:
    """The matrices that are stored [E, out, in], where names come together as they must; else None."""
    pairs = (*tokens, "k") if not known_equal(sizes["k"], 1) else tuple(tokens)
    turned: set[str] = set()
    merged: Axes | None = None
    for name, end in (("gate_up", "first"), ("up", "second")):
        if end not in m:
            continue
        merged = _projection(m, name, m[end], leaves, sizes, "h", "o", turned)
        if merged is None or names_of(merged) != (*pairs, "o") or merged[-1] != ("o",):
            return None
    if merged is None or m["hidden"].ndim != len(merged):
        return None
    sizes["i"] = m["hidden"].shape[-1]
    leaves = {**leaves, m["hidden"]: (*merged[:-1], ("i",))}
    out = _projection(m, "down", m["results"], leaves, sizes, "i", "n", turned)
    if out is None or sorted(names_of(out)) != sorted((*pairs, "n")):
        return None
    leaves[m["results"]] = out
    total = AxisNames(leaves, sizes).of(m["sum"])
    return frozenset(turned) if total is not None and names_of(total) == (*tokens, "n") else None


def _projection(
    m: Match, matrices: str, end: Value, leaves: dict[Value, Axes], sizes: dict[str, Dim], inner: str, outer: str, turned: set[str]
) -> Axes | None:
    """The axes of a projection whose matrices contract `inner` and yield `outer`; notes whether they are stored [E, outer, inner]."""
    chosen, stored = m[f"chosen_{matrices}"], m[matrices]
    ids = AxisNames(leaves, sizes).of(m["ids"])
    if ids is None or stored.ndim != 3:
        return None
    known = dict(leaves)
    if (bias := m.get(f"chosen_{matrices}_bias")) is not None:
        known[bias] = (*ids, (outer,))
    for names in ((outer, inner), (inner, outer)):
        width = stored.shape[1 + names.index(outer)]
        if not known_equal(stored.shape[1 + names.index(inner)], sizes[inner]):
            continue
        axes = AxisNames({**known, chosen: (*ids, *((name,) for name in names))}, {**sizes, outer: width}).of(end)
        if axes is not None and inner not in names_of(axes):
            sizes[outer] = width
            if names[0] == outer:
                turned.add(matrices)
            return axes
    return None


def check_gathered(m: Match) -> Reject | None:
    """The names of the dimensions come together as those of routed experts, in one dtype."""
    site = m["results"]
    if read(m) is None:
        return Reject("the products are not those of each token with the matrices of its experts", site, 1)
    dtypes = {m[name].dtype for name in ("rows_of_gate_up", "gate_up", "down", "first", "results")}
    if len(dtypes) > 1:
        return Reject(f"the products are of several dtypes: {', '.join(sorted(map(str, dtypes)))}", site, 2)
    return None


# -------------------------------------------------------------------- rewriting


def rewrite_gathered(m: Match) -> Call:
    found, canon = read(m), m.view.canon
    assert found is not None
    pairs = (found.tokens, found.k)

    def matrices(name: str) -> Value:
        return canon.permute(m[name], (0, 2, 1)) if name in found.turned else m[name]

    args: dict[str, Any] = {
        "x": canon.reshape(found.x, (found.tokens, found.x.shape[-1])),
        "indices": canon.reshape(found.ids, pairs),
        "weights": canon.reshape(found.weights, pairs),
        "gate_up": matrices("gate_up"),
        "up": matrices("up") if "up" in m else None,
        "down": matrices("down"),
        "product_dtype": m["products"].dtype if "products" in m else None,
        "out_dtype": m.root.dtype,
    }
    args |= {name: m[name] for name in ("gate_up_bias", "up_bias", "down_bias") if name in m}
    args |= activation_arguments(m)
    return Call(moe_experts, args, [canon.reshape(m.root, (found.tokens, args["down"].shape[2]))])


GATHERED_EXPERTS = Rule(
    "gathered_experts",
    pattern=opt_cast(any_of(reshape(opt_cast(summed)), summed)),
    check=check_gathered,
    rewrite=rewrite_gathered,
    produces="moe_experts",
    idioms={"experts": "results"},
)

register_builtin(GATHERED_EXPERTS)
