"""CPU kernels of npu_dynamic_quant and npu_quant_matmul.

Source: op-plugin docs of each op; ops-nn quant/dynamic_quant docs/aclnnDynamicQuant.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import check, check_dtype, check_same_dtype, emulates, refuse

_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = {5: torch.float16, 15: torch.bfloat16}
_MOST = 65535


def _check_dynamic(
    op: str, input: Tensor, smooth_scales: Tensor | None, group_index: Tensor | None, dst_type: int | None, quant_mode: str, most: float
) -> None:
    check_dtype(op, "input", input, *_HALVES)
    check(op, input.dim() >= 2, f"input must have at least 2 dimensions, not {input.dim()}")
    check(op, quant_mode == "pertoken" and most == 0.0, f"the CPU kernel supports quant_mode='pertoken' alone, not {quant_mode!r}")
    refuse(op, group_index=group_index, dst_type=dst_type)
    check_same_dtype(op, input=input, smooth_scales=smooth_scales)
    if smooth_scales is not None:
        check(op, smooth_scales.dim() == 1, f"smooth_scales must be a vector, not {list(smooth_scales.shape)}")


@emulates("npu::npu_dynamic_quant")
def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`scale = max(|x * smooth|) / 127`, `y = round(x * smooth / scale)`: int8 like x, fp32 [...]; a row of zeros has scale 0 and zeros."""
    op = "npu_dynamic_quant"
    _check_dynamic(op, input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max)
    x = input.float() if smooth_scales is None else input.float() * smooth_scales.float()
    scale = x.abs().amax(-1, keepdim=True) / 127.0
    y = torch.where(scale == 0, 0.0, x / scale)
    return torch.round(y).clamp(-128, 127).to(torch.int8).contiguous(), scale.squeeze(-1)


@npu_dynamic_quant.fake
def _(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape, dtype=torch.int8), input.new_empty(input.shape[:-1], dtype=torch.float32)


@emulates("npu::npu_quant_matmul")
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """`(x1 @ x2 + int32 bias) * scale * pertoken_scale + floating bias`, in fp32 from the exact sums, rounded once: [M, N]."""
    op = "npu_quant_matmul"
    refuse(op, offset=offset, x1_dtype=x1_dtype, x2_dtype=x2_dtype, pertoken_scale_dtype=pertoken_scale_dtype, scale_dtype=scale_dtype)
    refuse(op, group_sizes=group_sizes, y_scale=y_scale)
    for name, tensor in (("x1", x1), ("x2", x2)):
        check_dtype(op, name, tensor, torch.int8)
        check(op, tensor.dim() == 2, f"the CPU kernel supports matrices, {name} is {list(tensor.shape)}")
    inputs, outputs = x2.shape
    check(op, x1.shape[1] == inputs, f"x1 has {x1.shape[1]} columns, x2 has {inputs} rows")
    check(op, max(inputs, outputs) <= _MOST, f"K and N must be at most {_MOST}, not {inputs} and {outputs}")
    check(op, output_dtype in _DTYPES, f"the CPU kernel gives float16 (5) and bfloat16 (15), not {output_dtype}")
    check_dtype(op, "scale", scale, torch.float32)
    check(op, tuple(scale.shape) in ((1,), (outputs,)), f"scale must have 1 or {outputs} elements, not {list(scale.shape)}")
    check(op, pertoken_scale is not None or output_dtype == 15, "float16 without pertoken_scale takes an int64 scale")
    sums = torch.matmul(x1.to(torch.int32), x2.to(torch.int32))
    if bias is not None and bias.dtype == torch.int32:
        sums = sums + bias
    y = sums.float() * scale
    if pertoken_scale is not None:
        check_dtype(op, "pertoken_scale", pertoken_scale, torch.float32)
        check(op, tuple(pertoken_scale.shape) == (x1.shape[0],), f"pertoken_scale must have {x1.shape[0]} elements")
        y = y * pertoken_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        check_dtype(op, "bias", bias, torch.float32)
        check(op, pertoken_scale is not None, "a floating bias needs pertoken_scale")
        y = y + bias
    return y.to(_DTYPES[output_dtype or 0])


@npu_quant_matmul.fake
def _(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    return x1.new_empty((x1.shape[0], x2.shape[1]), dtype=_DTYPES.get(output_dtype or 0, torch.int8))
