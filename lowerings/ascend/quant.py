"""Quantisation on Ascend: quantize and quant_linear.

`npu_dynamic_quant` finds the scale of a row in fp32: its largest magnitude over 127. It has no least one: a row of zeros has scale 0, and
comes back as zeros. `npu_quant_matmul` multiplies its int32 sums by the scales in fp32 and rounds once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...layout import row_major
from ...lower import Arguments, Builder
from ..quant_forms import bias_of_channels, is_exact, require_fp32, roles_of, rows_of, scales_of, scaling
from .provide import Npu, provides

aten = torch.ops.aten
_CODES = {torch.float16: 5, torch.bfloat16: 15}
"""Numbers of dtypes (`c10::ScalarType`), as `npu_quant_matmul` takes them."""


@provides("quantize", "npu::npu_dynamic_quant")
def dynamic_quant(b: Builder, a: Arguments, npu: Npu) -> list[Node | None]:
    """Per token, symmetric, int8."""
    b.only_if(a.scale is None and a.symmetric)
    b.require(a.dtype in (None, torch.int8), f"it stores int8, the model {a.dtype}")
    b.require(a.high == 127 and a.low in (-128, -127), f"it keeps to 127, the model to [{a.low}, {a.high}]")
    b.require(a.steps == 127, f"it has 127 steps, the model {a.steps}")
    b.require(not a.per_tensor, "it finds a scale for each row, the model one for all")
    b.require(a.smooth is None or not a.smooth_divide, "it multiplies by the smoothing vector, the model divides")
    b.require(a.floor_mode in ("none", "amax", "scale"), f"it has no floor of the kind {a.floor_mode!r}")
    b.require(a.floor <= _SMALL, f"it has no least scale, the model's is {a.floor}")
    _keeps_exact(b, a)
    a.round_last, a.with_zero  # noqa: B018  there is no zero point
    q, scale = npu("npu::npu_dynamic_quant", a.x, smooth_scales=a.smooth)
    return [q, scales_of(b, a, a.x, scale), None]


_SMALL = 1e-4
"""A least scale or magnitude up to which rows that have less are as good as zero."""


def _keeps_exact(b: Builder, a: Arguments) -> None:
    """With exact rounding: the steps of the model are those of the op, in fp32."""
    require_fp32(b, "the scale", a.compute_dtype or b.val(a.x).dtype, a.scale_dtype)
    require_fp32(b, "the quotient", a.value_dtype)
    plain = a.apply == "divide" and not a.steps_reciprocal and a.smooth is None and a.floor_mode == "none"
    b.require(plain or not is_exact(b), "the model finds or applies the scale in another way: rounding is 'exact'")


@provides("quant_linear", "npu::npu_quant_matmul")
def quant_matmul(b: Builder, a: Arguments, npu: Npu) -> Node:
    """int8 times int8, dequantised by scales of channels and of tokens."""
    weight = a.weight
    inputs, outputs = b.val(weight).shape
    b.require(isinstance(inputs, int) and isinstance(outputs, int), "the sizes of the weight are symbolic")
    out = a.out_dtype or (torch.int32 if a.scale is None else torch.float32)
    b.require(out in _CODES, f"it gives float16 and bfloat16 of such sums, the model has {out}")
    b.require(row_major(b.val(weight)) or row_major(b.val(b.transpose(weight, 0, 1))), "the weight is not stored in one piece")
    scaling(b, a)
    roles = roles_of(b, (a.scale, a.scale2), b.val(a.x).shape[:-1], outputs)
    b.require(roles.rows is not None or out == torch.bfloat16, "without scales of tokens float16 takes a scale that is encoded beforehand")
    lead = rows_of(b, a.x)
    x = a.x if len(lead) == 1 else b.emit(aten.reshape.default, a.x, [-1, inputs])
    tokens = None if roles.rows is None else b.cast(_flat(b, roles.rows), torch.float32)
    bias = _bias(b, a, outputs, with_tokens=tokens is not None)
    given: dict[str, Any] = {"pertoken_scale": tokens, "bias": bias, "output_dtype": _CODES[out]}
    y: Node = npu("npu::npu_quant_matmul", b.contiguous(x), weight, _scale(b, roles.channels), **given)
    return b.reshape(y, [*lead, outputs])


def _flat(b: Builder, rows: Node) -> Node:
    return rows if b.val(rows).dim() == 1 else b.emit(aten.reshape.default, rows, [-1])


def _scale(b: Builder, scale: Node | None) -> Node:
    """The scale of the channels as fp32 [N] or [1]."""
    if scale is None:
        device = b.val(b.node).device
        return b.constant(("quant_matmul_one", device), lambda: torch.ones(1, device=device))
    return b.cast(b.reshape(scale, [1]) if b.val(scale).dim() == 0 else b.contiguous(scale), torch.float32)


def _bias(b: Builder, a: Arguments, outputs: int, *, with_tokens: bool) -> Node | None:
    """int32 added to the sums; or floating, added last, which only products with scales of tokens have."""
    bias = bias_of_channels(b, a.bias, outputs)
    if bias is None or a.bias_first:
        return bias
    b.require(with_tokens, "a bias that is added last needs scales of tokens")
    require_fp32(b, "the product before the bias", a.round_dtype)
    return b.cast(bias, torch.float32)
