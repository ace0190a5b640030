"""Gated units on Ascend: glu.

A merged gate and up is one launch: `npu_swiglu`, `npu_clipped_swiglu` (limits, alpha, offset, interleaved) or `npu_geglu`. Two tensors are
two launches either way: the activation and the product, where the model rounds the activated gate as they do, or else a concatenation and
one of those ops, which keeps fp32 up to the end but moves 7 times the result in place of 5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ...lower import Arguments, Builder
from ...view.shapes import same_shape, to_shape
from .provide import Npu, keeps_rounding, provides, provides_aten

aten = torch.ops.aten

_HALVES = (torch.float16, torch.bfloat16)
_GELUS = {"gelu": 0, "gelu_tanh": 1}  # to npu_geglu's `approximate`
_MODES = ("none", "tanh")  # of npu_gelu and npu_gelu_mul, by the same number
_NO_LIMIT = torch.finfo(torch.float32).max
_FAST_GELU_ALPHA = 1.702
_ACTIVATED = "the activated gate"


# -------------------------------------------------------------------- operands


def _out_dtype(b: Builder, a: Arguments) -> torch.dtype:
    """The dtype of the result."""
    dtype = b.val(a.gate).dtype
    inputs = dtype if a.up is None else torch.promote_types(dtype, b.val(a.up).dtype)
    return a.out_dtype or inputs


def _compute_dtype(b: Builder, a: Arguments) -> torch.dtype:
    """The dtype for the operand of an op that rounds once, to that dtype: the result's where the inputs have it too, else fp32."""
    out = _out_dtype(b, a)
    inputs = {b.val(tensor).dtype for tensor in (a.gate, a.up) if tensor is not None}
    return out if inputs == {out} else functools.reduce(torch.promote_types, inputs, torch.float32)


def _merged(b: Builder, a: Arguments) -> Node:
    """The merged tensor, as ops of one operand read it."""
    b.only_if(a.up is None)
    return b.contiguous(b.cast(a.gate, _compute_dtype(b, a)))


def _concatenated(b: Builder, a: Arguments) -> Node:
    """Gate and up, laid side by side in one tensor, gate first."""
    b.only_if(a.up is not None or a.layout == "swapped")
    gate, up = _parts(b, a)
    b.require(same_shape(to_shape(b.val(gate).shape), to_shape(b.val(up).shape)), "gate and up have shapes that are not known to be equal")
    dtype = _compute_dtype(b, a)
    return b.emit(aten.cat.default, [b.cast(gate, dtype), b.cast(up, dtype)], -1)


def _parts(b: Builder, a: Arguments) -> tuple[Node, Node]:
    """Gate and up: of a merged tensor, views of it."""
    if a.up is not None:
        a.layout  # noqa: B018  it says nothing of two tensors
        return a.gate, a.up
    size = b.val(a.gate).shape[-1]
    b.require(isinstance(size, int), "the merged gate and up have a symbolic last dimension")
    half, last = size // 2, b.val(a.gate).dim() - 1
    if a.layout == "interleaved":
        first, second = (b.emit(aten.slice.Tensor, a.gate, last, start, size, 2) for start in (0, 1))
    else:
        first, second = (b.emit(aten.slice.Tensor, a.gate, last, start, start + half) for start in (0, half))
    return (second, first) if a.layout == "swapped" else (first, second)


# -------------------------------------------------------------------- silu


def _is_plain(a: Arguments) -> bool:
    """Whether the unit is activation times up, without limits, slope and offset."""
    return bool(a.alpha == 1.0 and a.gate_limit is None and a.up_limit is None and a.up_offset == 0.0)


def _swiglu(b: Builder, a: Arguments, npu: Npu, merged: Callable[[Builder, Arguments], Node]) -> Node:
    b.only_if(a.activation == "silu" and _is_plain(a))
    keeps_rounding(b, None, a.round_dtype, _ACTIVATED)
    return b.cast(npu("npu::npu_swiglu", merged(b, a)), _out_dtype(b, a))


@provides("glu", "npu::npu_swiglu")
def swiglu(b: Builder, a: Arguments, npu: Npu) -> Node:
    """silu of the first half times the second."""
    b.only_if(a.up is None and a.layout == "halves")
    return _swiglu(b, a, npu, _merged)


@provides("glu", "npu::npu_swiglu", rank=2, name="aten.cat + npu.npu_swiglu")
def concatenated_swiglu(b: Builder, a: Arguments, npu: Npu) -> Node:
    """npu_swiglu of a concatenation."""
    return _swiglu(b, a, npu, _concatenated)


def _clipped_swiglu(b: Builder, a: Arguments, npu: Npu, merged: Callable[[Builder, Arguments], Node], interleaved: bool) -> Node:
    b.only_if(a.activation == "silu" and (interleaved or not _is_plain(a)))
    b.require(a.gate_limit == a.up_limit, f"it has one limit, the model has {a.gate_limit} for the gate and {a.up_limit} for up")
    b.require(not isinstance(a.gate_limit, float) or a.gate_limit > 0, f"its limit is positive, the model's is {a.gate_limit}")
    keeps_rounding(b, None, a.round_dtype, _ACTIVATED)
    limit = _NO_LIMIT if a.gate_limit is None else a.gate_limit
    y = npu("npu::npu_clipped_swiglu", merged(b, a), alpha=a.alpha, limit=limit, bias=a.up_offset, interleaved=interleaved)
    return b.cast(y, _out_dtype(b, a))


@provides("glu", "npu::npu_clipped_swiglu")
def clipped_swiglu(b: Builder, a: Arguments, npu: Npu) -> Node:
    """g * sigmoid(alpha g) * (u + offset) of the clamped gate and up."""
    b.only_if(a.up is None and a.layout != "swapped")
    return _clipped_swiglu(b, a, npu, _merged, a.layout == "interleaved")


@provides("glu", "npu::npu_clipped_swiglu", rank=2, name="aten.cat + npu.npu_clipped_swiglu")
def concatenated_clipped_swiglu(b: Builder, a: Arguments, npu: Npu) -> Node:
    """npu_clipped_swiglu of a concatenation."""
    return _clipped_swiglu(b, a, npu, _concatenated, interleaved=False)


# -------------------------------------------------------------------- gelu


def _geglu(b: Builder, a: Arguments, npu: Npu, x: Node, activate_left: bool) -> Node:
    in_fp16 = b.val(x).dtype == torch.float16 and b.config.target != "ascend950"
    keeps_rounding(b, torch.float16 if in_fp16 else None, a.round_dtype, _ACTIVATED)
    y, _ = npu("npu::npu_geglu", x, -1, _GELUS[a.activation], activate_left)
    return b.cast(y, _out_dtype(b, a))


@provides("glu", "npu::npu_geglu")
def geglu(b: Builder, a: Arguments, npu: Npu) -> Node:
    """gelu of one half times the other; on A2 and A3 it rounds the gelu in fp16."""
    b.only_if(a.activation in _GELUS and a.up is None and a.layout != "interleaved")
    return _geglu(b, a, npu, _merged(b, a), activate_left=a.layout == "halves")


@provides("glu", "npu::npu_geglu", rank=2, name="aten.cat + npu.npu_geglu")
def concatenated_geglu(b: Builder, a: Arguments, npu: Npu) -> Node:
    """npu_geglu of a concatenation."""
    b.only_if(a.activation in _GELUS and a.up is not None)
    return _geglu(b, a, npu, _concatenated(b, a), activate_left=True)


@provides("glu", "npu::npu_gelu_mul", rank=1)
def gelu_mul(b: Builder, a: Arguments, npu: Npu) -> Node:
    """gelu of the first half times the second, for small tensors; keeps the gelu in fp32."""
    b.only_if(a.activation in _GELUS and a.up is None and a.layout == "halves")
    keeps_rounding(b, None, a.round_dtype, _ACTIVATED)
    return b.cast(npu("npu::npu_gelu_mul", _merged(b, a), approximate=_MODES[_GELUS[a.activation]]), _out_dtype(b, a))


# -------------------------------------------------------------------- activation and product


def activated_product(b: Builder, a: Arguments, activate: Callable[[Node], Node]) -> Node:
    """The activation by one op and the product by another: the activated gate is rounded to the dtype of the gate in between."""
    gate, up = _parts(b, a)
    dtype, out = b.val(gate).dtype, _out_dtype(b, a)
    b.require(dtype != torch.float64, "the gate is float64, which activations do not take on an NPU")
    keeps_rounding(b, dtype if dtype in _HALVES else None, a.round_dtype, _ACTIVATED)
    y = b.emit(aten.mul.Tensor, activate(gate), up)
    product_dtype = b.val(y).dtype
    b.require(torch.promote_types(product_dtype, out) == product_dtype, f"it gives {product_dtype}, the model {out}")
    return b.cast(y, out)


@provides("glu", "npu::npu_gelu", rank=1, name="npu.npu_gelu + aten.mul")
def gelu_and_product(b: Builder, a: Arguments, npu: Npu) -> Node:
    """npu_gelu, because aten.gelu is its tanh approximation on an NPU whatever is asked for."""
    b.only_if(a.activation in _GELUS)
    return activated_product(b, a, lambda gate: npu("npu::npu_gelu", gate, approximate=_MODES[_GELUS[a.activation]]))


@provides("glu", "npu::npu_fast_gelu", rank=1, name="npu.npu_fast_gelu + aten.mul")
def fast_gelu_and_product(b: Builder, a: Arguments, npu: Npu) -> Node:
    """QuickGELU, x * sigmoid(1.702 x), times up."""
    b.only_if(a.activation == "silu" and a.alpha == _FAST_GELU_ALPHA)
    return activated_product(b, a, lambda gate: npu("npu::npu_fast_gelu", gate))


_ATEN: dict[str, tuple[Any, ...]] = {
    "silu": (aten.silu.default,),
    "sigmoid": (aten.sigmoid.default,),
    "tanh": (aten.tanh.default,),
    "relu": (aten.relu.default,),
    "relu2": (aten.relu.default, aten.square.default),
}


def _provide_product(activation: str, ops: tuple[Any, ...]) -> None:
    @provides_aten("glu", " + ".join(f"aten.{op.overloadpacket.__name__}" for op in (*ops, aten.mul.Tensor)), rank=1)
    def activation_and_product(b: Builder, a: Arguments) -> Node:
        b.only_if(a.activation == activation)

        def activate(gate: Node) -> Node:
            for op in ops:
                gate = b.emit(op, gate)
            return gate

        return activated_product(b, a, activate)


for _activation, _ops in _ATEN.items():
    _provide_product(_activation, _ops)
