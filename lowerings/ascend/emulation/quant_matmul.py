"""CPU kernel of npu_quant_matmul, for int8 matrices.

Source: op-plugin doc npu_quant_matmul; ops-nn `matmul/quant_batch_matmul_v3` docs/aclnnQuantMatmulV4.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .registry import check, check_dtype, emulates, refuse

_OP = "npu_quant_matmul"
_MOST = 65535
_RESULTS = {3: torch.int32, 5: torch.float16, 15: torch.bfloat16}


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
    group_sizes: Sequence[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """`(x1 @ x2 + bias) * scale * pertoken_scale`, a floating bias added last, in fp32: [M, N]; of int32 `x1 @ x2 + bias`."""
    for name, matrix in (("x1", x1), ("x2", x2)):
        check_dtype(_OP, name, matrix, torch.int8)
        check(_OP, matrix.dim() == 2, f"the CPU kernel supports matrices, {name} has {matrix.dim()} dimensions")
        check(_OP, matrix.shape[-1] <= _MOST, f"the last dimension of {name} must be at most {_MOST}")
    check(_OP, x1.shape[1] == x2.shape[0], f"x1 has {x1.shape[1]} columns, x2 {x2.shape[0]} rows")
    types = {"x1_dtype": x1_dtype, "x2_dtype": x2_dtype, "pertoken_scale_dtype": pertoken_scale_dtype, "scale_dtype": scale_dtype}
    refuse(_OP, offset=offset, group_sizes=group_sizes, y_scale=y_scale, **types)
    check(_OP, output_dtype in _RESULTS, f"the CPU kernel supports int32, float16 and bfloat16, not output_dtype {output_dtype}")
    _check_scales(x1, x2, scale, pertoken_scale, bias, _RESULTS[output_dtype or 0])
    sums = torch._int_mm(x1, x2)
    if bias is not None and bias.dtype == torch.int32:
        sums = sums + bias
    if output_dtype == 3:
        return sums
    y = sums.float() * scale.float()
    if pertoken_scale is not None:
        y = y * pertoken_scale.unsqueeze(-1)
    if bias is not None and bias.dtype != torch.int32:
        y = y + bias.float()
    return y.to(_RESULTS[output_dtype or 0])


def _check_scales(x1: Tensor, x2: Tensor, scale: Tensor, rows: Tensor | None, bias: Tensor | None, out: torch.dtype) -> None:
    """What the table of dtypes in the document allows."""
    outputs = x2.shape[1]
    check(_OP, tuple(scale.shape) in ((1,), (outputs,)), f"scale must be [1] or [{outputs}], not {list(scale.shape)}")
    check_dtype(_OP, "scale", scale, *((torch.float32,) if out == torch.float16 else (torch.float32, torch.bfloat16)))
    if rows is not None:
        check(_OP, out != torch.int32, "int32 results have no pertoken_scale")
        check_dtype(_OP, "pertoken_scale", rows, torch.float32)
        check(_OP, rows.shape == x1.shape[:1], f"pertoken_scale must be [{x1.shape[0]}], not {list(rows.shape)}")
    check(_OP, rows is not None or out != torch.float16, "float16 results of float32 scales need pertoken_scale")
    if bias is not None:
        check(_OP, tuple(bias.shape) == (outputs,), f"bias must be [{outputs}], not {list(bias.shape)}")
        check_dtype(_OP, "bias", bias, *((torch.int32,) if out == torch.int32 else (torch.int32, torch.float32, out)))


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
    group_sizes: Sequence[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    return x1.new_empty((x1.shape[0], x2.shape[1]), dtype=_RESULTS.get(output_dtype or 1, torch.int8))
