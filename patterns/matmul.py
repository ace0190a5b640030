"""Batched products between two transpositions: a matrix of its own for each head, as MLA's W_UK and W_UV.

    torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)      # x [M, H, K], weight [H, K, N]
    torch.einsum("bshk,hkn->bshn", x, weight)
    torch.matmul(x.transpose(1, 2), weight).transpose(1, 2)   # x [B, S, H, K]

What all of them have in common is where each dimension of the operand comes from and where each of the product goes: that is followed
through reshapes and permutations, by a name for every dimension. The heads of x must come last but one on both sides, and the dimensions
before them must keep their order.

The transpositions are views, and cost nothing to look at; a batched product that wants its operands in order copies them first. So the
fused op is preferred where the plain ops have as many launches. Where it runs as its reference it is these very ops, in their memory
layout.

Sources: DeepSeek-V2, https://arxiv.org/abs/2405.04434, and its inference code (einsum); SGLang and vLLM (bmm between transposes).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from npu_fusion.match import Match
from npu_fusion.ops.matmul import bmm_transpose
from npu_fusion.pattern import any_of, op, through, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.shapes import known_equal, product, same_shape
from npu_fusion.view.value import Shape

Axes = tuple[str, ...]
UNIT = ""
"""The name of a dimension of size 1 that a reshape added."""

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.contiguous.default)

batched = op("matmul", var("operand"), var("weight")).as_("site")
transposed = op("permute", through(("reshape",), batched))

# -------------------------------------------------------------------- names of dimensions


def _named(axes: Axes) -> Axes:
    return tuple(axis for axis in axes if axis != UNIT)


def _without_units(shape: Shape) -> list[int]:
    """The places of the dimensions that are not 1 for certain."""
    return [place for place, size in enumerate(shape) if not known_equal(size, 1)]


def _places(axes: Axes, places: Sequence[int], ndim: int) -> Axes:
    """The names at their places, units elsewhere."""
    out = [UNIT] * ndim
    for axis, place in zip(axes, places, strict=True):
        out[place] = axis
    return tuple(out)


def _reshaped(axes: Axes, before: Shape, after: Shape) -> Axes | None:
    """The names behind a reshape that adds or drops unit dimensions, and splits `m` into `m0`, `m1`, ... at most; None for another one."""
    old, new = _without_units(before), _without_units(after)
    names = tuple(axes[place] for place in old)
    sizes, wanted = tuple(before[place] for place in old), tuple(after[place] for place in new)
    if UNIT in names or len(names) != len(_named(axes)):
        return None
    if same_shape(sizes, wanted):
        return _places(names, new, len(after))
    at, extra = (names.index("m") if "m" in names else -1), len(wanted) - len(sizes)
    if at < 0 or extra < 1 or not same_shape(sizes[:at], wanted[:at]) or not same_shape(sizes[at + 1 :], wanted[at + 1 + extra :]):
        return None
    split = tuple(f"m{i}" for i in range(extra + 1))
    return _places((*names[:at], *split, *names[at + 1 :]), new, len(after))


def _axes_of(value: Value, base: Value, axes: Axes) -> Axes | None:
    """The names of a value's dimensions, which is made of `base` by views alone."""
    if value is base:
        return axes
    if value.op not in ("permute", "reshape"):
        return None
    inner = value.args[0]
    found = _axes_of(inner, base, axes)
    if found is None:
        return None
    if value.op == "permute":
        return tuple(found[dim] for dim in value.attrs["dims"])
    return _reshaped(found, inner.shape, value.shape)


def _heads_inner(axes: Axes, last: str) -> bool:
    """Whether the names are those of [..., heads, last], the leading ones in their order."""
    named = _named(axes)
    lead = named[:-2]
    return named[-2:] == ("h", last) and axes[-2:] == named[-2:] and lead == tuple(sorted(lead)) and bool(lead)


def _source(operand: Value, axes: Axes) -> Value | None:
    """The value behind the operand's views in which the heads are the last dimension but one, whatever its unit dimensions."""
    value = operand
    while True:
        named = _named(axes)
        if named[-2:] == ("h", "k") and named[:-2] == tuple(sorted(named[:-2])):
            return value
        if value.op == "permute":
            inner = [UNIT] * len(axes)
            for axis, dim in zip(axes, value.attrs["dims"], strict=True):
                inner[dim] = axis
            value, axes = value.args[0], tuple(inner)
        elif value.op == "reshape":
            found = _reshaped(axes, value.shape, value.args[0].shape)
            if found is None:
                return None
            value, axes = value.args[0], found
        else:
            return None


# -------------------------------------------------------------------- rule


def _operand_axes(site: Value) -> Axes | None:
    """The names of the product's dimensions, the last one the operand's: [h, m, k], or with a batch before them."""
    return {3: ("h", "m", "k"), 4: ("l", "h", "m", "k")}.get(site.ndim)


def weight_of_heads(m: Match) -> Value | None:
    """The weight [H, K, N], which a batch of operands shares."""
    weight, site = m["weight"], m["site"]
    shape = (*site.shape[-3:-2], m["operand"].shape[-1], site.shape[-1])
    while weight.op in ("expand", "reshape") and weight.ndim != 3:
        weight = weight.args[0]
    if weight.ndim == 4 and known_equal(weight.shape[0], 1):
        weight = m.view.canon.reshape(weight, weight.shape[1:])
    return weight if same_shape(weight.shape, shape) else None


def _input(m: Match) -> Value | None:
    """The input [..., H, K] in the leading dimensions of the result."""
    axes = _operand_axes(m["site"])
    source = None if axes is None else _source(m["operand"], axes)
    if source is None:
        return None
    return m.view.canon.reshape(source, (*m.root.shape[:-1], m["operand"].shape[-1]))


def check_bmm_transpose(m: Match) -> Reject | None:
    """The heads lie inside on both sides, nothing else moves, and all batches share one weight."""
    site, axes = m["site"], _operand_axes(m["site"])
    if axes is None:
        return Reject("the product is not one matrix for each head", site)
    after = _axes_of(m.root, site, (*axes[:-1], "n"))
    if after is None or not _heads_inner(after, "n"):
        return Reject("the product's heads do not become its last dimension but one", site)
    if m["operand"].op not in ("permute", "reshape") or _source(m["operand"], axes) is None:
        return Reject("the heads of the operand are not its last dimension but one before the product", site)
    if not site.dtype.is_floating_point or m["operand"].dtype != m["weight"].dtype:
        return Reject("the operands are not of one floating-point dtype", site)
    rows = product(m.root.shape[:-2])
    if known_equal(rows, 1):
        return Reject("there is one row only, whose transposition moves nothing", site)
    return None if weight_of_heads(m) is not None else Reject("the matrices differ from batch to batch", m["weight"])


def rewrite_bmm_transpose(m: Match) -> Call:
    copied = any(node.target in _COPIES for node in m.view.nodes.get(m.root, ()))
    return Call(bmm_transpose, {"x": _input(m), "weight": weight_of_heads(m), "row_major": copied}, [m.root])


BMM_TRANSPOSE = Rule(
    "bmm_transpose",
    pattern=any_of(transposed, op("reshape", transposed)),
    check=check_bmm_transpose,
    rewrite=rewrite_bmm_transpose,
    produces="bmm_transpose",
    idioms={"bmm_transpose": "site"},
    hidden_launches=1,
)

register_builtin(BMM_TRANSPOSE)
