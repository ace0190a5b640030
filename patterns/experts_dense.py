"""Routed experts by weights of all experts: every expert makes something of every token, and counts 0 where it was not chosen.

    h = act(einsum("th,efh->tef", x, gate_up))
    y = einsum("tef,ehf->teh", h, down)
    out = (y * combine[..., None]).sum(1)                    # combine [T, E], see combine.py

Here too a name for each dimension (t token, e expert, i inner, h hidden) tells what is computed, however einsum or bmm laid it out. The
fused op has each expert make something of its own tokens alone: k of E products.

llama4 weighs what goes into an expert, not what comes out: `mlp(x * score)`, which for one that is not chosen is `mlp(0) = 0`. That is the
same thing only where the expert makes nothing of nothing (no bias, an activation that is 0 there), and each token has one expert: then the
weighted tokens are the fused op's tokens, and its weights are ones.

Sources: GShard, https://arxiv.org/abs/2006.16668 (one-hot combine); transformers' models/llama4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npu_fusion.match import Match
from npu_fusion.ops.experts import moe_experts
from npu_fusion.pattern import Pattern, any_of, op, opt_cast, opt_view, reshape, sum_, through, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.shapes import known_equal, same_shape
from npu_fusion.view.value import Dim

from .activation import activation_of
from .axes import Axes, AxisNames, names_of
from .combine import Combined, combined
from .experts import unit_arguments
from .experts_parts import VIEWS, activation_arguments, base_of, results_of, weighted_sum_of


def stored(name: str, rank: int) -> Pattern:
    """A tensor [E, ...] of all experts, behind views."""
    return through(VIEWS, var(name).where(lambda value: value.ndim == rank and value.op not in VIEWS, f"{name} has not {rank} dimensions"))


def projected(rows: Pattern, matrices: str) -> Pattern:
    """Rows times the matrices of all experts, in either order, with their biases or not."""
    rows = rows.as_(f"rows_of_{matrices}")
    product = any_of(op("matmul", rows, stored(matrices, 3)), op("matmul", stored(matrices, 3), rows))
    return any_of(opt_view(product) + stored(f"{matrices}_bias", 2), opt_view(product))


results = results_of(projected)
# llama4 has weighed the rows that go in.
summed = any_of(weighted_sum_of(results), sum_(opt_cast(through(VIEWS, results))).as_("sum"))

# -------------------------------------------------------------------- what is computed


@dataclass(frozen=True)
class _Found:
    """Tokens [T, H], the weights of all experts, whether they weigh the tokens, and which matrices are stored [E, out, in]."""

    x: Value
    weights: Combined
    early: bool
    turned: frozenset[str]


def read(m: Match) -> _Found | None:
    """What the match computes, or None where it is not the weighted sum of all experts."""
    rows = base_of(m["rows_of_gate_up"])
    early = "factor" not in m
    if early:
        found = _weighted_rows(rows)
    else:
        known = _combined(m["factor"])
        found = None if known is None else (rows, known)
    if found is None:
        return None
    x, weights = found
    if x.ndim != 2 or not known_equal(x.shape[0], weights.matrix.shape[0]):
        return None
    if "up" in m and base_of(m["rows_of_up"]) is not rows:
        return None
    sizes: dict[str, Dim] = {"t": x.shape[0], "h": x.shape[1], "e": weights.matrix.shape[-1]}
    leaves: dict[Value, Axes] = {x: (("t",), ("h",)), weights.matrix: (("t",), *((),) * (weights.matrix.ndim - 2), ("e",))}
    turned = _follow(m, leaves, sizes)
    return None if turned is None else _Found(x, weights, early, turned)


def _weighted_rows(rows: Value) -> tuple[Value, Combined] | None:
    """Tokens and the weights of all experts that they are multiplied by."""
    if rows.op != "mul":
        return None
    for x, factor in (rows.args, rows.args[::-1]):
        if (weights := _combined(factor)) is not None:
            return base_of(x), weights
    return None


def _combined(factor: Value) -> Combined | None:
    """The weights of all experts that a factor is a view of, read at the outermost cast of which they can be."""
    value = factor
    while True:
        if (found := combined(value)) is not None:
            return found
        if value.op not in (*VIEWS, "cast"):
            return None
        value = value.args[0]


def _follow(m: Match, leaves: dict[Value, Axes], sizes: dict[str, Dim]) -> frozenset[str] | None:
    """The matrices that are stored [E, out, in], where names come together as they must; else None."""
    turned: set[str] = set()
    merged: Axes | None = None
    for name, end in (("gate_up", "first"), ("up", "second")):
        if end not in m:
            continue
        axes = _projection(m, name, m[end], leaves, sizes, "h", "o", turned)
        if axes is None or sorted(names_of(axes)) != ["e", "o", "t"] or axes[-1] != ("o",) or merged not in (None, axes):
            return None
        merged = axes
    if merged is None or m["hidden"].ndim != len(merged) or not same_shape(m["hidden"].shape[:-1], m["first"].shape[:-1]):
        return None
    sizes["i"] = m["hidden"].shape[-1]
    leaves = {**leaves, m["hidden"]: (*merged[:-1], ("i",))}
    out = _projection(m, "down", m["results"], leaves, sizes, "i", "n", turned)
    if out is None or sorted(names_of(out)) != ["e", "n", "t"]:
        return None
    total = AxisNames({**leaves, m["results"]: out}, sizes).of(m["sum"])
    return frozenset(turned) if total is not None and names_of(total) == ("t", "n") else None


def _projection(
    m: Match, matrices: str, end: Value, leaves: dict[Value, Axes], sizes: dict[str, Dim], inner: str, outer: str, turned: set[str]
) -> Axes | None:
    """The axes of a projection whose matrices contract `inner` and yield `outer`; notes whether they are stored [E, outer, inner]."""
    matrix = m[matrices]
    known = dict(leaves)
    if (bias := m.get(f"{matrices}_bias")) is not None:
        known[bias] = (("e",), (outer,))
    for names in ((outer, inner), (inner, outer)):
        width = matrix.shape[1 + names.index(outer)]
        if not known_equal(matrix.shape[0], sizes["e"]) or not known_equal(matrix.shape[1 + names.index(inner)], sizes[inner]):
            continue
        axes = AxisNames({**known, matrix: (("e",), *((name,) for name in names))}, {**sizes, outer: width}).of(end)
        if axes is not None and inner not in names_of(axes):
            sizes[outer] = width
            if names[0] == outer:
                turned.add(matrices)
            return axes
    return None


def check_dense(m: Match) -> Reject | None:
    """The names of the dimensions come together as those of routed experts, and experts that are not chosen add nothing."""
    site = m["results"]
    found = read(m)
    if found is None:
        return Reject("the products are not those of all tokens with all experts, weighted by experts chosen for each token", site, 1)
    dtypes = {m[name].dtype for name in ("rows_of_gate_up", "gate_up", "down", "first", "results")}
    if len(dtypes) > 1:
        return Reject(f"the products are of several dtypes: {', '.join(sorted(map(str, dtypes)))}", site, 2)
    if not found.early:
        return None
    if not known_equal(found.weights.ids.shape[1], 1):
        return Reject("the weights multiply the tokens of several experts, which no fused op does", site, 2)
    if not _is_zero_at_zero(m):
        return Reject("an expert that is not chosen makes something of a token of zeros", site, 2)
    return None


def _is_zero_at_zero(m: Match) -> bool:
    if any(f"{name}_bias" in m for name in ("gate_up", "up", "down")):
        return False
    if "unit" not in m:
        return activation_of(m) != "sigmoid"
    unit = unit_arguments(m)
    return not any(unit.get(name) for name in ("gate_limit", "up_limit", "up_offset"))


# -------------------------------------------------------------------- rewriting


def rewrite_dense(m: Match) -> Call:
    found, canon = read(m), m.view.canon
    assert found is not None
    x, weights = found.x, found.weights.values(canon)
    if found.early:
        x, weights = _weighted_tokens(m, x, weights)

    def matrices(name: str) -> Value:
        return canon.permute(m[name], (0, 2, 1)) if name in found.turned else m[name]

    args: dict[str, Any] = {
        "x": x,
        "indices": found.weights.ids,
        "weights": weights,
        "gate_up": matrices("gate_up"),
        "up": matrices("up") if "up" in m else None,
        "down": matrices("down"),
        "product_dtype": m["products"].dtype if "products" in m else None,
        "out_dtype": m.root.dtype,
    }
    args |= {name: m[name] for name in ("gate_up_bias", "up_bias", "down_bias") if name in m}
    args |= activation_arguments(m)
    return Call(moe_experts, args, [canon.reshape(m.root, (x.shape[0], args["down"].shape[2]))])


def _weighted_tokens(m: Match, x: Value, weights: Value) -> tuple[Value, Value]:
    """Each token times its weight, in the type of the model's own product, and ones as weights."""
    canon, dtype = m.view.canon, base_of(m["rows_of_gate_up"]).dtype
    assert dtype is not None
    tokens = canon.binary("mul", canon.cast(x, dtype), canon.cast(weights, dtype), x.shape)
    device = next(value.node.meta["val"].device for value in (m["results"], m["first"], m["gate_up"]) if value.node is not None)
    attrs = {"value": 1.0, "shape": weights.shape, "device": device}
    return tokens, m.view.table.intern("full", (), attrs, weights.shape, dtype)


DENSE_EXPERTS = Rule(
    "dense_experts",
    pattern=opt_cast(any_of(reshape(opt_cast(summed)), summed)),
    check=check_dense,
    rewrite=rewrite_dense,
    produces="moe_experts",
    idioms={"experts": "results"},
)

register_builtin(DENSE_EXPERTS)
