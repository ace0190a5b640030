"""CPU kernel of npu_weight_quant_batchmatmul: int8 weights with a scale for each output channel or for all, int4 weights also in groups.

Source: op-plugin doc npu_weight_quant_batchmatmul; asc-devkit doc AscendAntiQuant; op-plugin's ConvertWeightToINT4PackKernelNpuOpApi.cpp
(int4 in int32: the lowest four bits are the first).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import check, emulates, refuse

_OP = "npu_weight_quant_batchmatmul"
_MOST = 65535
_PER_WORD = 8


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
    check(_OP, weight.dtype in (torch.int8, torch.int32), f"the CPU kernel supports int8 and int32 weights, not {weight.dtype}")
    check(_OP, x.dim() == 2 and weight.dim() == 2, "x and weight must have 2 dimensions")
    refuse(_OP, quant_scale=quant_scale, quant_offset=quant_offset, weight_dtype=weight_dtype)
    group = antiquant_group_size
    codes = _unpacked(weight) if weight.dtype == torch.int32 else weight
    inputs, outputs = codes.shape
    check(_OP, x.shape[1] == inputs, f"x has {x.shape[1]} columns, weight has {inputs} rows")
    check(_OP, max(inputs, outputs) <= _MOST, f"K and N must be at most {_MOST}, not {inputs} and {outputs}")
    check(_OP, group == 0 or weight.dtype == torch.int32, "the CPU kernel supports groups of int4 only")
    valid = group == 0 or (group % 32 == 0 and 32 <= group < inputs)
    check(_OP, valid, f"antiquant_group_size must be 0 or a multiple of 32 below {inputs}, not {group}")
    dequantised = codes.float()
    if antiquant_offset is not None:
        dequantised = dequantised + _spread("antiquant_offset", antiquant_offset, x.dtype, codes.shape, group)
    dequantised = (dequantised * _spread("antiquant_scale", antiquant_scale, x.dtype, codes.shape, group)).to(x.dtype)
    y = x.float() @ dequantised.float()
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        check(_OP, bias.dtype == wanted, f"bias must be {wanted} beside {x.dtype}, not {bias.dtype}")
        y = y + bias.float()
    return y.to(x.dtype)


def _unpacked(words: Tensor) -> Tensor:
    """Words of eight int4, the lowest bits first, along the dimension that lies in one piece: [K, N] of -8 to 7."""
    transposed = not words.is_contiguous()
    rows = words.t() if transposed else words
    check(_OP, rows.is_contiguous(), "an int4 weight must be contiguous, or the transpose of a contiguous one")
    nibbles = (rows[..., None] >> torch.arange(0, 4 * _PER_WORD, 4, dtype=torch.int32)) & 15
    codes = ((nibbles ^ 8) - 8).flatten(1)
    return codes.t() if transposed else codes


def _spread(name: str, tensor: Tensor, dtype: torch.dtype, shape: torch.Size, group: int) -> Tensor:
    """A scale or offset as it broadcasts to the weight [K, N]."""
    check(_OP, tensor.dtype == dtype, f"{name} must be {dtype}, not {tensor.dtype}")
    inputs, outputs = shape
    if group:
        wanted = (-(-inputs // group), outputs)
        check(_OP, tuple(tensor.shape) == wanted, f"{name} must be {list(wanted)} with groups of {group}, not {list(tensor.shape)}")
        return tensor.float().repeat_interleave(group, 0)[:inputs]
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
    packed_outputs = weight.dtype == torch.int32 and weight.is_contiguous()
    return x.new_empty((x.shape[0], weight.shape[1] * (_PER_WORD if packed_outputs else 1)))
