"""Linear layers whose weights are four-bit numbers packed into words, unpacked and dequantised in front of a product.

    codes = (words[..., None] >> shifts) & 15                       # in any spelling: loops, masks first, remainders, stacks, planes
    zeros = ((zero_words[..., None] >> shifts) & 15)[:, order]      # or stored unpacked, or one number
    x @ ((codes - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0))

Which nibble of which word each weight is, which number it becomes, and how scales and zero points are spread over the weight is not
matched but computed (npu_fusion/nibbles.py), so that spellings do not matter, and an order that zero points have and weights have not does.

Sources: AutoAWQ's WQLinear and dequantize_gemm; AutoGPTQ's QuantLinear; HQQ's 4-bit packing; compressed-tensors' pack-quantized format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from npu_fusion.factors import Factor
from npu_fusion.match import Match
from npu_fusion.nibbles import VIEWS, Places, Reader, expanded, viewed
from npu_fusion.ops.weight_only import weight_only_linear
from npu_fusion.packed import Packed, arranged, packed_matrix
from npu_fusion.pattern import Pattern, any_of, anything, bits, op, opt_cast, opt_upcast, opt_view, through, total, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value, View
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import known_equal

_UNPACKED = frozenset({torch.int8, torch.uint8})


def _is_nibbles(value: Value) -> bool:
    return value.ndim > 1 and Reader().nibbles(value) is not None


# -------------------------------------------------------------------- pattern


def _unscaled(prefix: str = "") -> Pattern:
    codes = var(f"{prefix}codes").where(_is_nibbles, "the weight is not made of nibbles of words")
    return through((*VIEWS, "cast"), any_of(codes, codes - var(f"{prefix}zero")).as_(f"{prefix}shifted"))


def dequantised(prefix: str = "") -> Pattern:
    """A weight that is computed of nibbles, scales and zero points, which are bound under names that begin with the prefix."""
    product = (_unscaled(prefix) * opt_upcast(var(f"{prefix}scale"))).as_(f"{prefix}dequantised")
    return through((*VIEWS, "cast"), product).as_(f"{prefix}operand")


unscaled = _unscaled()
before = op("matmul", var("x"), dequantised()).as_("site")
after = opt_view(op("matmul", var("x"), unscaled.as_("operand")).as_("site"), "reshape") * opt_cast(var("scale_after"))
product = any_of(before, after)
biased = total(product, var("bias").where(lambda x: x.ndim == 1, "the bias is not one number for each output"))


# -------------------------------------------------------------------- reading the weight


@dataclass(frozen=True)
class Weight:
    """The arguments of `weight_only_linear` that make the weight; scale and zero are [N, G]."""

    packed: Packed
    scale: Value
    zero: Value | None


@dataclass(frozen=True)
class Prefixed:
    """What a match has bound of one of several stacked weights, under names that begin with its own."""

    match: Match
    prefix: str

    def __getitem__(self, name: str) -> Any:
        return self.match[f"{self.prefix}.{name}"]

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}.{name}" in self.match

    def get(self, name: str, default: Any = None) -> Any:
        return self.match.get(f"{self.prefix}.{name}", default)

    @property
    def view(self) -> View:
        return self.match.view

    @property
    def exact(self) -> bool:
        return self.match.exact


def _between(top: Value, bottom: Value) -> Iterator[Value]:
    """The views and casts that make `top` of `bottom`, the innermost first."""
    chain = []
    while top is not bottom:
        chain.append(top)
        top = top.args[0]
    return reversed(chain)


Bound = Match | Prefixed


def _as_weight(m: Bound, places: Places | None, since: str) -> Places | None:
    """The places of a factor of the weight, known as it broadcasts to the value bound as `since`, as they are in the weight [N, K].

    Of stacked weights [E, K, N] all outputs stand one below the other: [E * N, K].
    """
    inner = m.get("dequantised")
    if since == "shifted" and inner is not None:
        left, right = inner.args
        places = _through(places, left if _reaches(left, m["shifted"]) else right, m["shifted"])
    places = _through(places, m["operand"], m["shifted"] if inner is None else inner)
    if places is not None and isinstance(m, Prefixed) and len(places.dims) == 3:
        return places.moved(((*places.dims[0], *places.dims[2]), places.dims[1]))
    if places is None or any(factor.axis is not None for dim in places.dims[:-2] for factor in dim):
        return None  # of a batch of weights each is another one
    return places.moved((places.dims[-1], places.dims[-2]))


def _through(places: Places | None, top: Value, bottom: Value) -> Places | None:
    """Places that broadcast to `bottom`, as the views that make `top` of it leave them."""
    places = None if places is None else expanded(places, bottom.shape)
    for view in _between(top, bottom):
        places = None if places is None else viewed(places, view)
    return places


def _reaches(top: Value, bottom: Value) -> bool:
    while top is not bottom and top.op in (*VIEWS, "cast"):
        top = top.args[0]
    return top is bottom


def _in_groups(canon: Canon, places: Places | None) -> Value | None:
    """A tensor that is the same for all inputs of a group, as [N, G]; None for others."""
    if places is None:
        return None
    outputs, inputs = (list(dim) for dim in places.dims)
    if inputs and inputs[-1].axis is None:
        inputs.pop()
    elif inputs:
        return None  # a number for each input
    alike = bool(outputs) and all(factor.axis is None for factor in outputs)
    if any(factor.axis is None for factor in (*inputs, *([] if alike else outputs))):
        return None
    size = _size(outputs)
    found = arranged(canon, places, [[] if alike else outputs, inputs])
    return canon.expand(found, (size, _size(inputs))) if found is not None and alike else found


def _size(factors: list[Factor]) -> int:
    size = 1
    for factor in factors:
        size *= factor.size
    return size


def _zero_of(m: Bound) -> Value:
    """The zero point, before casts that changed nothing."""
    zero: Value = m["zero"]
    while zero.op == "cast" and (zero.args[0].dtype in _UNPACKED or _range(zero) is not None) and not bits(zero.args[0].dtype):
        zero = zero.args[0]
    return zero


def _after(m: Bound) -> Value | None:
    """A scale of the results, one for each output or one for all, as [N, 1]."""
    canon, scale, outputs = m.view.canon, m["scale_after"], m["operand"].shape[-1]
    if not all(known_equal(size, 1) for size in scale.shape[:-1]):
        return None
    flat = canon.reshape(scale, scale.shape[-1:]) if scale.ndim else canon.reshape(scale, (1,))
    return canon.reshape(canon.expand(flat, (outputs,)), (outputs, 1))


def weight_of(m: Bound) -> Weight | None:
    canon, reader = m.view.canon, Reader()
    nibbles = _as_weight(m, reader.nibbles(m["codes"]), "shifted")
    packed = packed_matrix(canon, nibbles) if nibbles is not None else None
    scale = _after(m) if "scale_after" in m else _in_groups(canon, _as_weight(m, reader.spread(m["scale"]), "dequantised"))
    if packed is None or scale is None:
        return None
    if "zero" not in m:
        return Weight(packed, scale, None)
    zero = _in_groups(canon, _as_weight(m, reader.spread(_zero_of(m)), "shifted"))
    if zero is None:
        return None
    counts = {scale.shape[1], zero.shape[1]}
    if len(counts) == 2 and 1 not in counts:
        return None
    shape = (scale.shape[0], scale.shape[1] if zero.shape[1] == 1 else zero.shape[1])
    return Weight(packed, canon.expand(scale, shape), canon.expand(zero, shape))


# -------------------------------------------------------------------- numbers


def _range(zero: Value) -> tuple[float, float] | None:
    """The least and the largest zero point, where they are known to be whole numbers."""
    places = Reader().nibbles(zero)
    if places is not None and places.numbers is not None:
        whole = all(number.is_integer() for number in places.numbers)
        return (min(places.numbers), max(places.numbers)) if whole else None
    while zero.op == "cast":
        zero = zero.args[0]
    if zero.dtype not in _UNPACKED:
        return None
    limits = torch.iinfo(zero.dtype)
    return limits.min, limits.max


def check_subtraction(m: Bound) -> Reject | None:
    """A reason why `codes - zero` is not what the fused op computes."""
    shifted, zero = m["shifted"], m["zero"]
    if zero.dtype is None or zero.dtype in (torch.bool, torch.complex64, torch.complex128):
        return Reject(f"the zero points are {zero.dtype}", zero)
    limits = _range(zero)
    places = Reader().nibbles(m["codes"])
    assert places is not None
    assert places.numbers is not None
    if bits(shifted.dtype):
        if m.exact and limits is None:
            return Reject("rounding='exact': the model rounds before it scales, the fused op dequantises first", shifted)
        return None
    numbers = places.numbers
    if limits is None:
        return Reject(f"zero points of {zero.dtype} may be larger than the fused op keeps exact", zero)
    held = torch.iinfo(shifted.dtype)
    if min(numbers) - limits[1] < held.min or max(numbers) - limits[0] > held.max:
        return Reject(f"the difference of weight and zero point may not fit {shifted.dtype}, in which the model computes it", shifted)
    return None


# -------------------------------------------------------------------- rule


def check_int4_linear(m: Match) -> Reject | None:
    """Every weight is a nibble of its own, scales and zero points go by group, and nothing is rounded that the fused op would not round."""
    site, x, scale = m["site"], m["x"], m["scale_after" if "scale_after" in m else "scale"]
    weight = m.get("dequantised", m["operand"])
    if not bits(scale.dtype) or not bits(x.dtype) or m.root.dtype != x.dtype or site.dtype != x.dtype:
        return Reject("the scale or the activations are not floating point, or the product has another dtype", site)
    if x.op == "cast" and not bits(x.args[0].dtype):
        return Reject("the activations are integers too", x)
    if "bias" in m and (m["bias"].dtype != x.dtype or not known_equal(m["bias"].shape[0], site.shape[-1])):
        return Reject("the bias is not one number for each output, in the dtype of the activations", m["bias"])
    if bits(weight.dtype) < bits(x.dtype):
        return Reject("the weight is dequantised in a narrower type than the activations have", site)
    if m.exact and "scale_after" in m:
        return Reject("rounding='exact': the model rounds before it scales, the fused op dequantises first", site)
    if m.exact and weight.dtype not in (x.dtype, torch.float32):
        return Reject("rounding='exact': the weight is rounded to another type than that of the activations", site)
    if m.exact and "bias" in m and site.node is not None:
        return Reject("rounding='exact': the model rounds the product before it adds the bias", site)
    rejected = check_subtraction(m) if "zero" in m else None
    if rejected is not None:
        return rejected
    if weight_of(m) is None:
        return Reject(
            "the weight is not one nibble of a word each, or scales and zero points do not go by groups of one output's inputs", scale
        )
    return None


def rewrite_int4_linear(m: Match) -> Call:
    weight = weight_of(m)
    assert weight is not None
    packed, root = weight.packed, m.root
    x = m.view.canon.reshape(m["x"], (*root.shape[:-1], m["x"].shape[-1]))
    tensors = {"x": x, "weight": packed.words, "scale": weight.scale, "zero": weight.zero, "bias": m.get("bias")}
    layout = {"shifts": packed.shifts, "packs_inputs": packed.packs_inputs, "plane": packed.plane}
    return Call(weight_only_linear, {**tensors, **layout, "signed": packed.signed, "offset": packed.offset}, [root])


INT4_LINEAR = Rule(
    "int4_linear",
    pattern=any_of(biased, product),
    check=check_int4_linear,
    rewrite=rewrite_int4_linear,
    produces="weight_only_linear",
    idioms={"dequantize": "site"},
    gist=op("matmul", anything(), through((*VIEWS, "cast"), any_of(unscaled * anything(), unscaled))).as_("site"),
)

register_builtin(INT4_LINEAR)
