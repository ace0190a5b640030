"""Weight-only linears on Ascend: `npu_weight_quant_batchmatmul`, which dequantises on the way into the matrix unit.

`w = (code + offset) * scale` in the dtype of the activations: the offset is the zero point, negated.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ...layout import row_major
from ...lower import Arguments, Builder
from .provide import Npu, provides

aten = torch.ops.aten


@provides("weight_only_linear", "npu::npu_weight_quant_batchmatmul")
def weight_only_linear(b: Builder, a: Arguments, npu: Npu) -> Node:
    """int8 weights with a scale for each output channel, [N, K] as linears store them."""
    x, weight, dtype = a.x, a.weight, b.val(a.x).dtype
    outputs, inputs = b.val(weight).shape
    b.require(isinstance(outputs, int) and isinstance(inputs, int), "the sizes of the weight are symbolic")
    b.require(b.equal(b.val(a.scale).shape[1], 1), "of int8 weights it is known to take a scale for each output, the model's has groups")
    b.require(b.val(a.scale).dtype == dtype, f"its scale has the dtype of the activations, the model's is {b.val(a.scale).dtype}")
    bias = a.bias
    if bias is not None and dtype == torch.bfloat16:
        bias = b.cast(bias, torch.float32)
    lead = [b.size(x, dim) for dim in range(b.val(x).dim() - 1)]
    rows = x if len(lead) == 1 else b.emit(aten.reshape.default, x, [-1, inputs])
    codes = b.transpose(weight, 0, 1)
    b.require(row_major(b.val(weight)) or row_major(b.val(codes)), "the weight is not stored in one piece")
    offset = None if a.zero is None else b.emit(aten.neg.default, b.reshape(b.cast(a.zero, dtype), [outputs]))
    scale = b.contiguous(b.reshape(a.scale, [outputs]))
    y: Node = npu("npu::npu_weight_quant_batchmatmul", b.contiguous(rows), codes, scale, offset, bias=bias)
    return b.reshape(y, [*lead, outputs])
