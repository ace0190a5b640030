"""CPU kernel of npu_weight_quant_batchmatmul, for int8 weights with a scale for each output channel or one for all.

Source: op-plugin doc npu_weight_quant_batchmatmul; asc-devkit doc AscendAntiQuant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import check, emulates, refuse

_OP = "npu_weight_quant_batchmatmul"
_MOST = 65535


@emulates("npu::npu_weight_quant_batchmatmul")
def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """`x @ ((weight + offset) * scale) + bias`, the weight rounded to the dtype of x, accumulated in fp32: [M, N]."""
    check(_OP, x.dtype in (torch.float16, torch.bfloat16), f"x must be float16 or bfloat16, not {x.dtype}")
    check(_OP, weight.dtype == torch.int8, f"the CPU kernel supports int8 weights, not {weight.dtype}")
    check(_OP, x.dim() == 2 and weight.dim() == 2, "x and weight must have 2 dimensions")
    refuse(_OP, quant_scale=quant_scale, quant_offset=quant_offset, weight_dtype=weight_dtype)
    check(_OP, antiquant_group_size == 0, "the CPU kernel supports no groups")
    inputs, outputs = weight.shape
    check(_OP, x.shape[1] == inputs, f"x has {x.shape[1]} columns, weight has {inputs} rows")
    check(_OP, max(inputs, outputs) <= _MOST, f"K and N must be at most {_MOST}, not {inputs} and {outputs}")
    dequantised = weight.float()
    if antiquant_offset is not None:
        dequantised = dequantised + _row("antiquant_offset", antiquant_offset, x.dtype, outputs)
    dequantised = (dequantised * _row("antiquant_scale", antiquant_scale, x.dtype, outputs)).to(x.dtype)
    y = x.float() @ dequantised.float()
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        check(_OP, bias.dtype == wanted, f"bias must be {wanted} beside {x.dtype}, not {bias.dtype}")
        y = y + bias.float()
    return y.to(x.dtype)


def _row(name: str, tensor: Tensor, dtype: torch.dtype, outputs: int) -> Tensor:
    check(_OP, tensor.dtype == dtype, f"{name} must be {dtype}, not {tensor.dtype}")
    shapes = [(1,), (1, 1), (outputs,), (1, outputs)]
    check(_OP, tuple(tensor.shape) in shapes, f"{name} must be one number, or one for each of {outputs} outputs, not {list(tensor.shape)}")
    return tensor.float().reshape(-1)


@npu_weight_quant_batchmatmul.fake
def _(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))
