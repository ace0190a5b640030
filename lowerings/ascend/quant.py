"""Quantising ops on Ascend: quantize, quant_linear, and the norms and gated units whose result is quantised.

What the kernels of dynamic quantisation have in common: scales of 127 steps a row, in fp32, found of unrounded products, and no floor. A
row of zeros has the scale 0. So a model's floor is passed over where it is too small to matter (`_SMALL`), and where the scale only
multiplies; any other is a refusal. The quotient is a product with 127 / max, whose last bit may differ from the model's division: with
`rounding="exact"` none of them is taken.

Not emitted: `npu_dynamic_quant_asymmetric`, whose zero point is not rounded, `npu_rms_norm_quant`, which quantises in fp16, and
`npu_rms_norm_quant_v2`, which is for one SoC: those norms are taken apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ...lower import Arguments, Builder
from ...semantic import find_semantic_op
from ..quant_forms import bias_of_channels, channels, roles_of, rows_of
from .norm import keeps_sum, weight_or_ones
from .provide import Npu, keeps_rounding, provides

aten = torch.ops.aten

_HALVES = (torch.float16, torch.bfloat16)
_STEPS = 127.0
_SMALL = 1e-4  # a floor of the largest magnitude of a row; below it a row is quantised in steps finer than a floor would make them
CODES = {torch.float16: 5, torch.bfloat16: 15, torch.int32: 3, torch.int8: 12, torch.uint8: 13}
"""Dtypes by their numbers in torch, under which ops of torch_npu take them; quantised ones as qint8, quint8."""


def _not_exact(b: Builder, what: str) -> None:
    b.require(b.config.rounding != "exact", f"{what}: rounding is 'exact'")


def _flat(b: Builder, x: Node) -> Node:
    """[rows, H]."""
    width = b.val(x).shape[-1]
    b.require(isinstance(width, int), "the last dimension is symbolic")
    return x if b.val(x).dim() == 2 else b.emit(aten.reshape.default, x, [-1, width])


# -------------------------------------------------------------------- scales that are found


def require_dynamic(b: Builder, a: Arguments) -> None:
    """Refuse what is not max / 127 of each row, floors apart."""
    b.require(a.symmetric, "it quantises symmetrically; npu_dynamic_quant_asymmetric does not round the zero point")
    b.require(a.dtype in (None, torch.int8), f"it stores int8, the model {a.dtype}")
    b.require(a.high == 127 and a.low in (-128, -127), f"its numbers go up to 127, the model's are in [{a.low}, {a.high}]")
    b.require(a.steps == _STEPS, f"it makes 127 steps, the model {a.steps}")
    b.require(not a.per_tensor, "it finds a scale for each row, the model one for all")
    b.require(a.smooth is None or not a.smooth_divide, "it multiplies by the smoothing vector, the model divides")
    b.require(torch.float64 not in (a.compute_dtype, a.scale_dtype, a.value_dtype), "the model computes in float64")
    _not_exact(b, "it multiplies by 127 / max, the model rounds otherwise")
    for name in ("apply", "steps_reciprocal", "round_last", "with_zero"):
        getattr(a, name)  # they change the last bit of a quotient, or are of zero points


def _dynamic(b: Builder, a: Arguments) -> Callable[[Node], Node]:
    """Refuse what is not max / 127 of each row; how the op's scale becomes that of the model's rows of zeros."""
    require_dynamic(b, a)
    return _floor(b, a)


def require_small_floor(b: Builder, a: Arguments) -> None:
    """Refuse floors of scales that matter."""
    mode, floor = a.floor_mode, a.floor
    b.require(mode in ("none", "one", "one_amax", "amax", "scale"), f"it has no floor of the kind {mode!r}")
    if mode in ("amax", "scale"):
        b.require(isinstance(floor, (int, float)), "the floor of the scale is known at run time only")
        least = floor if mode == "amax" else floor * _STEPS
        b.require(least <= _SMALL, f"it has no floor of the scale, and the model's, {floor} ({mode}), is no small one")


def _floor(b: Builder, a: Arguments) -> Callable[[Node], Node]:
    mode = a.floor_mode
    require_small_floor(b, a)
    if mode in ("one", "one_amax"):
        of_zeros = 1.0 if mode == "one" else 1.0 / _STEPS
        return lambda scale: b.emit(aten.where.ScalarSelf, b.emit(aten.eq.Scalar, scale, 0), of_zeros, scale)
    if mode in ("amax", "scale"):
        b.require(_only_multiplies(b.node), "it has no floor of the scale, and the model does more with it than multiply")
    return lambda scale: scale


_KEEPING = (aten.reshape, aten.view, aten._unsafe_view, aten._to_copy, aten.expand, aten.unsqueeze, aten.squeeze, aten.slice, aten.clone)


def _only_multiplies(call: Node) -> bool:
    """Whether the scale among the results of a call is but a factor: never a divisor, nor compared or counted."""
    stack = [user for user in call.users if user.args[1] == 1]
    seen = set(stack)
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or find_semantic_op(user.target) is not None or user.target is aten.mul.Tensor:
                continue
            if getattr(user.target, "overloadpacket", None) not in _KEEPING:
                return False
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return True


def _scale(b: Builder, a: Arguments, x: Node, scale: Node, source: torch.dtype) -> Node:
    """The scale [...] of the rows of x as the model has it: [..., 1]."""
    return b.cast(b.reshape(scale, [*rows_of(b, x), 1]), a.scale_dtype or a.compute_dtype or source)


@provides("quantize", "npu::npu_dynamic_quant")
def dynamic_quant(b: Builder, a: Arguments, npu: Npu) -> list[Node | None]:
    """q = rint(x * smooth / s), s = max |x * smooth| / 127 of each row."""
    b.only_if(a.scale is None)
    finish = _dynamic(b, a)
    source = b.val(a.x).dtype if a.smooth is None else torch.promote_types(b.val(a.x).dtype, b.val(a.smooth).dtype)
    q, scale = npu("npu::npu_dynamic_quant", a.x, smooth_scales=a.smooth)
    return [q, _scale(b, a, a.x, finish(scale), source), None]


@provides("add_rms_norm_quant", "npu::npu_add_rms_norm_dynamic_quant")
def add_rms_norm_dynamic_quant(b: Builder, a: Arguments, npu: Npu) -> list[Node | None]:
    """s = x + residual; y = s * rsqrt(mean(s^2) + eps) * weight, quantised by rows. Sum and norm are unrounded in between."""
    b.only_if(a.scale is None)
    dtype = _sum_dtype(b, a)
    finish = _dynamic(b, a)
    _unrounded(b, a)
    options = {"smooth_scale1": a.smooth, "epsilon": a.eps, "output_mask": [True, False]}
    q, _, total, scale, _ = npu("npu::npu_add_rms_norm_dynamic_quant", a.x, a.residual, weight_or_ones(b, a.x, a.weight), **options)
    source = a.norm_dtype or dtype
    return [q, _scale(b, a, a.x, finish(scale), source), None, None, total]


def _sum_dtype(b: Builder, a: Arguments) -> torch.dtype:
    """The one dtype of both addends, the weight and the sum."""
    dtype = b.val(a.x).dtype
    b.only_if(a.weight_offset == 0)
    b.require(b.val(a.residual).dtype == dtype, f"x is {dtype}, the residual {b.val(a.residual).dtype}")
    b.require(a.weight is None or b.val(a.weight).dtype == dtype, "the weight is of another dtype than x")
    b.require(a.sum_dtype in (None, dtype), f"it gives the sum in {dtype}, the model in {a.sum_dtype}")
    b.require(a.bias is None, "it adds no bias to the sum")
    b.require(not a.return_norm, "the model reads the norm too, and it gives only its quantised numbers")
    return dtype


def _unrounded(b: Builder, a: Arguments) -> None:
    """The op keeps fp32 from the sum to the quotient: `rounding="exact"` has been refused."""
    for name in ("round_dtype", "norm_dtype", "norm_unrounded", "value_dtype"):
        b.require(getattr(a, name) != torch.float64, "the model computes in float64")


# -------------------------------------------------------------------- scales that are given


def _static(b: Builder, a: Arguments, width: Any, source: torch.dtype) -> tuple[Node, Node | None, bool]:
    """The given scale and zero point, of channels or of all, and whether the model divides."""
    b.require(a.dtype in (None, torch.int8, torch.uint8), f"it stores bytes, the model {a.dtype}")
    limits = torch.iinfo(a.dtype or torch.int8)
    b.require((a.low, a.high) == (limits.min, limits.max), f"it clamps to the range of bytes, the model to [{a.low}, {a.high}]")
    b.require(a.smooth is None, "it has no smoothing vector beside the scale")
    b.require(a.apply in ("divide", "multiply"), "the model multiplies by the reciprocal of the scale")
    fp32 = (a.value_dtype or torch.promote_types(source, b.val(a.scale).dtype)) == torch.float32
    if not fp32:
        _not_exact(b, f"it computes the quotient in fp32, the model in {a.value_dtype}")
    if a.zero_point is not None and not a.round_last:
        _not_exact(b, "it adds the zero point before it rounds")
    for name in (
        "round_last",
        "steps",
        "steps_reciprocal",
        "floor_mode",
        "floor",
        "compute_dtype",
        "scale_dtype",
        "with_zero",
        "symmetric",
    ):
        getattr(a, name)  # they are of scales that are found
    scale = channels(b, "scale", a.scale, width)
    assert scale is not None
    return scale, channels(b, "zero_point", a.zero_point, width), a.apply == "divide"


def _vector(b: Builder, node: Node, like: Node | None = None) -> Node:
    """A scale or zero point of one dimension; one number as often as `like` has some, where that is given."""
    node = b.reshape(node, [1]) if b.val(node).dim() == 0 else node
    if like is None or not b.equal(b.val(node).shape[0], 1) or b.equal(b.val(like).shape[0], 1):
        return node
    return b.contiguous(b.emit(aten.expand.default, node, [b.size(like, 0)]))


def _whole_zero(b: Builder, node: Node | None) -> Node | None:
    """A zero point as division takes it: whole, or bfloat16."""
    if node is None or b.val(node).dtype in (torch.int8, torch.uint8, torch.int32, torch.bfloat16):
        return node
    b.require(not b.val(node).is_floating_point(), f"the zero point is {b.val(node).dtype}")
    return b.cast(node, torch.int32)


@provides("quantize", "npu::npu_quantize")
def static_quant(b: Builder, a: Arguments, npu: Npu) -> list[Node | None]:
    """q = rint(x / s + z), or rint(x * s + z); a factor that is wider than x takes x along: it is not rounded."""
    b.only_if(a.scale is not None)
    x = a.x
    scale, zero, divides = _static(b, a, b.val(x).shape[-1], b.val(x).dtype)
    out = a.dtype or torch.int8
    if divides:
        zero = _whole_zero(b, zero)
    else:
        dtype = torch.promote_types(b.val(x).dtype, b.val(scale).dtype)
        x, scale, zero = b.cast(x, dtype), b.cast(scale, dtype), None if zero is None else b.cast(zero, dtype)
    scale = _vector(b, scale)
    if zero is not None:
        zero = _vector(b, zero, scale)
        scale = _vector(b, scale, zero)
    return [npu("npu::npu_quantize", x, scale, zero, CODES[out], -1, divides), None, None]


@provides("add_rms_norm_quant", "npu::npu_add_rms_norm_quant")
def add_rms_norm_quant(b: Builder, a: Arguments, npu: Npu) -> list[Node | None]:
    """s = x + residual; y = s * rsqrt(mean(s^2) + eps) * weight; rint(y / scale + zero_point) or rint(y * scale + zero_point)."""
    b.only_if(a.scale is not None)
    dtype = _sum_dtype(b, a)
    b.require(a.dtype in (None, torch.int8), f"it stores int8, the model {a.dtype}")
    scale, zero, divides = _static(b, a, b.val(a.x).shape[-1], a.norm_dtype or dtype)
    keeps_sum(b, a, dtype)
    if dtype == torch.float16:
        keeps_rounding(b, dtype, a.round_dtype if a.weight is not None else dtype, "the normalised sum before the weight")
        keeps_rounding(b, dtype, a.norm_dtype or dtype, "the norm")
    else:
        keeps_rounding(b, None, a.round_dtype, "the normalised sum before the weight")
        keeps_rounding(b, None, None if a.norm_dtype == torch.float32 else dtype, "the norm")
    gamma = weight_or_ones(b, a.x, a.weight)
    scale = _vector(b, scale, gamma)
    zero = None if zero is None else _vector(b, _zero_beside(b, zero), gamma)
    q, _, total = npu("npu::npu_add_rms_norm_quant", a.x, a.residual, gamma, scale, zero, epsilon=a.eps, div_mode=divides)
    return [q, None, None, None, total]


def _zero_beside(b: Builder, zero: Node) -> Node:
    """A zero point as the norm takes it: int32 or bfloat16."""
    whole = _whole_zero(b, zero)
    assert whole is not None
    return whole if b.val(whole).dtype == torch.bfloat16 else b.cast(whole, torch.int32)


# -------------------------------------------------------------------- gated units


def _unit(b: Builder, a: Arguments) -> bool:
    """Refuse what is not silu of one half times the other; whether the left half is activated."""
    b.require(a.activation == "silu", f"its activation is silu, the model's {a.activation}")
    plain = a.alpha == 1.0 and a.gate_limit is None and a.up_limit is None and a.up_offset == 0.0
    b.require(plain, "it has no limits, slope or offset")
    b.require(a.layout != "interleaved", "it takes halves, the model interleaves gate and up")
    for name in ("round_dtype", "product_dtype"):
        b.require(getattr(a, name) != torch.float64, "the model computes in float64")
    return bool(a.layout == "halves")


def _smooth_row(b: Builder, a: Arguments, width: int, like: Node) -> Node:
    """The smoothing vector as [1, I] in fp32; of ones where the model has none."""
    if a.smooth is not None:
        b.require(b.val(a.smooth).dtype != torch.float64, "the smoothing vector is float64")
        return b.reshape(b.cast(a.smooth, torch.float32), [1, width])
    device = b.val(like).device
    return b.constant(("ones", width, device), lambda: torch.ones(1, width, device=device))


@provides("glu_quant", "npu::npu_swiglu_quant")
def swiglu_quant(b: Builder, a: Arguments, npu: Npu) -> list[Node | None]:
    """silu(gate) * up, quantised by rows. The op gives 127 / max: the scale is the reciprocal of that."""
    b.only_if(a.scale is None)
    b.require(a.up is None, "it takes gate and up as one tensor")
    left = _unit(b, a)
    finish = _dynamic(b, a)
    width = b.val(a.gate).shape[-1]
    b.require(isinstance(width, int), "the last dimension is symbolic")
    smooth = _smooth_row(b, a, width // 2, a.gate)
    q, factor = npu("npu::npu_swiglu_quant", b.contiguous(a.gate), smooth_scales=smooth, activate_left=left, quant_mode=1)
    scale = finish(b.emit(aten.reciprocal.default, factor))
    return [q, _scale(b, a, q, scale, a.product_dtype or b.val(a.gate).dtype), None]


@provides("dequant_glu_quant", "npu::npu_dequant_swiglu_quant")
def dequant_swiglu_quant(b: Builder, a: Arguments, npu: Npu) -> list[Node | None]:
    """silu(gate) * up of int32 sums, which are scaled by the weight's channels and by the rows; quantised by rows."""
    b.only_if(a.scale is None)
    left = _unit(b, a)
    finish = _dynamic(b, a)
    for name in ("sum_compute_dtype", "sum_round_dtype", "sum_out_dtype"):
        b.require(getattr(a, name) != torch.float64, "the model multiplies in float64")
    a.sum_combined  # noqa: B018  it changes the last bit
    b.require(a.sum_bias is None or a.sum_bias_first, "it adds whole biases only")
    rows = rows_of(b, a.x)
    found = roles_of(b, (a.sum_scale, a.sum_scale2), b.val(a.x).shape[:-1], b.val(a.x).shape[-1])
    if found.rows is None or found.channels is None:
        b.refuse("it takes a scale of the weight's channels and one of the rows")
    x = _flat(b, a.x)
    width = b.val(x).shape[-1]
    weight = b.cast(b.reshape(_vector(b, found.channels, _channels_of(b, x, width)), [1, width]), torch.float32)
    bias = bias_of_channels(b, a.sum_bias, width)
    options: dict[str, Any] = {"weight_scale": weight, "bias": bias, "quant_scale": _smooth_row(b, a, width // 2, x)}
    activation = b.cast(b.reshape(found.rows, [b.size(x, 0)]), torch.float32)
    q, scale = npu("npu::npu_dequant_swiglu_quant", x, activation_scale=activation, activate_left=left, quant_mode=1, **options)
    q = b.reshape(q, [*rows, width // 2])
    return [q, _scale(b, a, q, finish(scale), a.product_dtype or torch.float32), None]


def _channels_of(b: Builder, x: Node, width: int) -> Node:
    """A vector as long as a row of x."""
    device = b.val(x).device
    return b.constant(("ones", width, device, "vector"), lambda: torch.ones(width, device=device))


# -------------------------------------------------------------------- products


def _int8_operands(b: Builder, a: Arguments) -> tuple[Node, Node]:
    """x as rows, and the weight, which may be transposed but must lie in one piece."""
    b.require(all(isinstance(size, int) for size in b.val(a.weight).shape), "the weight has symbolic sizes")
    x = b.contiguous(_flat(b, a.x))
    stride = b.val(a.weight).stride()
    b.require(1 in stride, "the weight is not stored in one piece")
    return x, a.weight


def _out_dtype(a: Arguments) -> torch.dtype:
    return a.out_dtype or a.round_dtype or a.compute_dtype or torch.float32


@provides("quant_linear", "npu::npu_quant_matmul")
def quant_matmul(b: Builder, a: Arguments, npu: Npu) -> Node:
    """(x W) * scale * scale2 + bias, or (x W + bias) * scale * scale2, in fp32 and rounded once."""
    x, weight = _int8_operands(b, a)
    rows, width = rows_of(b, a.x), b.val(weight).shape[1]
    if a.scale is None:
        b.require(a.out_dtype in (None, torch.int32), f"sums that are not scaled are int32, the model's {a.out_dtype}")
        b.require(a.bias is None or a.bias_first, "the sums are whole and the bias is not")
        return _corrected_sums(b, a, npu, x, weight)
    out = _out_dtype(a)
    b.require(out in _HALVES, f"it gives float16 or bfloat16, the model {out}")
    b.require(a.compute_dtype != torch.float64, "the model multiplies in float64")
    _not_exact(b, "it multiplies by two scales in fp32, in an order of its own, and rounds once")
    a.combined, a.round_dtype  # noqa: B018  they round more often
    found = roles_of(b, (a.scale, a.scale2), b.val(a.x).shape[:-1], width)
    scale = _vector(b, found.channels) if found.channels is not None else _one(b, x)
    scale = b.cast(scale, torch.float32)
    of_rows = None if found.rows is None else b.cast(b.reshape(found.rows, [b.size(x, 0)]), torch.float32)
    if of_rows is None and out == torch.float16:  # its scales are cut to 19 bits where there are none of the rows
        of_rows = b.emit(aten.full.default, [b.size(x, 0)], 1.0, dtype=torch.float32, device=b.val(x).device)
    if a.zero_point is None:
        a.column_sums  # noqa: B018  they go with a zero point
        bias = _linear_bias(b, a, width)
    else:
        b.require(_is_one(b, a.zero_point), "its bias goes with the columns, the zero points of the activations with the rows")
        b.require(a.bias is None or a.bias_first, "it adds one bias: that of the zero point, or the model's")
        bias = _whole_bias(b, a, width)
    y: Node = npu("npu::npu_quant_matmul", x, weight, scale, pertoken_scale=of_rows, bias=bias, output_dtype=CODES[out])
    return b.reshape(y, [*rows, width])


def _is_one(b: Builder, node: Node) -> bool:
    return all(b.equal(size, 1) for size in b.val(node).shape)


def _whole_bias(b: Builder, a: Arguments, width: Any) -> Node | None:
    """What is added to the sums, one a channel, in int32: `bias - zero_point * column_sums` of one zero point; None for nothing."""
    bias = bias_of_channels(b, a.bias, width) if a.bias_first else None
    if a.zero_point is None:
        a.column_sums  # noqa: B018  they go with a zero point
        return bias
    sums = b.cast(b.reshape(a.column_sums, [width]), torch.int32)
    shift = b.emit(aten.mul.Tensor, sums, b.cast(b.reshape(a.zero_point, [1]), torch.int32))
    return b.emit(aten.neg.default, shift) if bias is None else b.emit(aten.sub.Tensor, bias, shift)


def _corrected_sums(b: Builder, a: Arguments, npu: Npu, x: Node, weight: Node) -> Node:
    """`x W - zero_point * column_sums + bias` in int32 [..., N]: by the op's bias where the zero point is one number."""
    shape, width = [*rows_of(b, a.x), b.val(weight).shape[1]], b.val(weight).shape[1]
    if a.zero_point is None or _is_one(b, a.zero_point):
        return b.reshape(_sums(b, npu, x, weight, _whole_bias(b, a, width)), shape)
    sums = b.reshape(_sums(b, npu, x, weight, bias_of_channels(b, a.bias, width) if a.bias_first else None), shape)
    columns = b.cast(b.reshape(a.column_sums, [width]), torch.int32)
    return b.emit(aten.sub.Tensor, sums, b.emit(aten.mul.Tensor, b.cast(a.zero_point, torch.int32), columns))


def _linear_bias(b: Builder, a: Arguments, width: Any) -> Node | None:
    """The bias, one a channel: int32 with `bias_first`, else floating, which 16-bit dtypes other than the result's are not."""
    bias = bias_of_channels(b, a.bias, width)
    if bias is None or a.bias_first:
        return bias
    b.require(b.val(bias).dtype != torch.float64, "the bias is float64")
    return bias if b.val(bias).dtype == _out_dtype(a) else b.cast(bias, torch.float32)


def _one(b: Builder, like: Node) -> Node:
    device = b.val(like).device
    return b.constant(("one", device), lambda: torch.ones(1, device=device))


def _sums(b: Builder, npu: Npu, x: Node, weight: Node, bias: Node | None) -> Node:
    """x W + bias in int32: its scale says nothing then."""
    y: Node = npu("npu::npu_quant_matmul", x, weight, _one(b, x), bias=bias, output_dtype=CODES[torch.int32])
    return y


@provides("quant_linear", "npu::npu_quant_matmul", rank=1, name="npu.npu_quant_matmul + aten")
def quant_matmul_then_scales(b: Builder, a: Arguments, npu: Npu) -> Node:
    """The sums in int32, and the scales as the model multiplies by them, step by step: the model's own bits."""
    b.only_if(a.scale is not None)
    x, weight = _int8_operands(b, a)
    sums = _corrected_sums(b, a, npu, x, weight)
    dtype = a.compute_dtype or torch.float32
    b.require(dtype != torch.float64, "the model multiplies in float64")
    y = b.cast(sums, dtype)
    factors = [b.cast(scale, dtype) for scale in (a.scale, a.scale2) if scale is not None]
    if a.combined and len(factors) == 2:
        factors = [b.emit(aten.mul.Tensor, *factors)]
    for factor in factors:
        y = b.emit(aten.mul.Tensor, y, factor)
    if a.round_dtype is not None:
        y = b.cast(y, a.round_dtype)
    if a.bias is not None and not a.bias_first:
        y = b.emit(aten.add.Tensor, y, a.bias)
    return y if a.out_dtype is None else b.cast(y, a.out_dtype)
