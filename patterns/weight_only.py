"""Linear layers that dequantise integer weights before, or scale after, a product with activations that are not quantised.

    F.linear(x, weight.to(x.dtype) * scale[:, None], bias)          # a scale for each output channel
    F.linear(x, weight.to(x.dtype)) * scale + bias                  # torchao's Int8WeightOnly
    F.linear(x, ((weight.view(N, G, -1) - zero[..., None]) * scale[..., None]).view(N, K))

The weight is stored [N, K] or [K, N], in groups of its inputs or whole; where the scale stands among its dimensions says which.

Sources: torchao's quant_api (Int8WeightOnly); LLM.int8() and AWQ's dequantisation as authors write it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from npu_fusion.match import Match
from npu_fusion.ops.weight_only import weight_only_linear
from npu_fusion.pattern import any_of, bits, cast, op, opt_cast, opt_view, total, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Value
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import known_equal, same_shape
from npu_fusion.view.value import Shape

_CODES = (torch.int8, torch.uint8)

# -------------------------------------------------------------------- pattern

codes = cast(var("codes").where(lambda x: x.dtype in _CODES, "the weight is not int8 or uint8")).as_("unscaled")
shifted = any_of(codes - opt_cast(var("zero")), codes)
dequantised = (opt_cast(shifted) * opt_cast(var("scale"))).as_("dequantised")
before = op("matmul", var("x"), opt_cast(opt_view(dequantised, "reshape", "permute")).as_("operand")).as_("site")
plain = op("matmul", var("x"), codes.as_("operand")).as_("site")
after = opt_view(plain, "reshape") * opt_cast(var("scale_after"))
product = any_of(before, after)
biased = total(product, var("bias").where(lambda x: x.ndim == 1, "the bias is not one number for each output"))


# -------------------------------------------------------------------- reading the weight


@dataclass(frozen=True)
class _Weight:
    """The arguments of `weight_only_linear` that make the weight: codes [N, K], scale and zero [N, G]."""

    codes: Value
    scale: Value
    zero: Value | None


def _in_groups(canon: Canon, x: Value, shape: Shape, group: int | None, transposed: bool) -> Value | None:
    """A scale or zero that broadcasts to a weight of `shape`, whose dimension `group` runs within a group, as [N, G]; None for others."""
    full = canon.reshape(x, (1,) * (len(shape) - x.ndim) + x.shape)
    within = group if group is not None else (0 if transposed else 1)
    if full.ndim != len(shape) or not known_equal(full.shape[within], 1):
        return None
    kept = tuple(size for dim, size in enumerate(shape) if dim != within)
    full = canon.expand(full, tuple(1 if dim == within else size for dim, size in enumerate(shape)))
    narrow = canon.reshape(full, kept)
    if len(kept) == 1:
        return canon.reshape(narrow, (*kept, 1))
    return canon.permute(narrow, (1, 0)) if transposed else narrow


def _before(m: Match) -> _Weight | None:
    canon, inner, operand = m.view.canon, m["dequantised"], m["operand"]
    while operand.op == "cast":
        operand = operand.args[0]
    transposed = operand.op != "permute"  # the weight is stored [K, N]
    if operand.op == "permute":
        operand = operand.args[0]
    if operand.ndim != 2:
        return None
    group = None
    if operand is not inner:
        if operand.op != "reshape" or operand.args[0] is not inner or inner.ndim != 3:
            return None
        whole = same_shape(inner.shape[2:], operand.shape[1:]) if transposed else same_shape(inner.shape[:1], operand.shape[:1])
        if not whole:
            return None
        group = 1 if transposed else 2
    if not same_shape(m["codes"].shape, inner.shape):
        return None
    stored = canon.reshape(m["codes"], operand.shape)
    scale = _in_groups(canon, m["scale"], inner.shape, group, transposed)
    zero = _in_groups(canon, m["zero"], inner.shape, group, transposed) if "zero" in m else None
    if scale is None or (zero is None and "zero" in m):
        return None
    return _Weight(canon.permute(stored, (1, 0)) if transposed else stored, scale, zero)


def _after(m: Match) -> _Weight | None:
    canon, scale, stored = m.view.canon, m["scale_after"], m["codes"]
    if stored.ndim != 2:
        return None
    outputs = stored.shape[1]
    flat = canon.reshape(scale, scale.shape[-1:]) if all(known_equal(size, 1) for size in scale.shape[:-1]) else scale
    if flat.ndim > 1:
        return None
    return _Weight(canon.permute(stored, (1, 0)), canon.reshape(canon.expand(flat, (outputs,)), (outputs, 1)), None)


def _weight(m: Match) -> _Weight | None:
    return _after(m) if "scale_after" in m else _before(m)


# -------------------------------------------------------------------- rule


def check_weight_only(m: Match) -> Reject | None:
    """The scale is one for each output channel or group of inputs, and nothing is rounded that the fused op would not round."""
    site, x = m["site"], m["x"]
    scale = m["scale_after"] if "scale_after" in m else m["scale"]
    if not bits(scale.dtype) or not bits(x.dtype) or m.root.dtype != x.dtype or site.dtype != x.dtype:
        return Reject("the scale or the activations are not floating point, or the product has another dtype", site)
    if x.op == "cast" and not bits(x.args[0].dtype):
        return Reject("the activations are integers too", x)
    if "zero" in m and not bits(m["zero"].dtype) and m["zero"].dtype not in _CODES:
        return Reject(f"the zero points are {m['zero'].dtype}", m["zero"])
    if "bias" in m and (m["bias"].dtype != x.dtype or not known_equal(m["bias"].shape[0], site.shape[-1])):
        return Reject("the bias is not one number for each output, in the dtype of the activations", m["bias"])
    if bits(m["unscaled"].dtype) < 16 or bits(m["dequantised" if "scale_after" not in m else "unscaled"].dtype) < bits(x.dtype):
        return Reject("the weight is dequantised in a narrower type than the activations have", site)
    if m.exact and ("scale_after" in m or ("zero" in m and bits(m["zero"].dtype))):
        return Reject("rounding='exact': the model rounds before it scales, the fused op dequantises first", site)
    if _weight(m) is None:
        return Reject("the scale is not one for each output channel, or for each group of inputs of one", scale)
    return None


def rewrite_weight_only(m: Match) -> Call:
    weight = _weight(m)
    assert weight is not None
    canon, root = m.view.canon, m.root
    arguments = {"weight": weight.codes, "scale": weight.scale, "zero": weight.zero, "bias": m.get("bias")}
    x = canon.reshape(m["x"], (*root.shape[:-1], m["x"].shape[-1]))
    return Call(weight_only_linear, {"x": x, **arguments}, [root])


WEIGHT_ONLY_LINEAR = Rule(
    "weight_only_linear",
    pattern=any_of(biased, product),
    check=check_weight_only,
    rewrite=rewrite_weight_only,
    produces="weight_only_linear",
    idioms={"dequantize": "site"},
)

register_builtin(WEIGHT_ONLY_LINEAR)
