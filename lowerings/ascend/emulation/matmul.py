"""CPU kernel of npu_transpose_batchmatmul.

Source: op-plugin doc and test_npu_transpose_batchmatmul; ops-nn `matmul/transpose_batch_mat_mul` op_api (limits).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .registry import FLOATS, check, emulates, refuse

_OP = "npu_transpose_batchmatmul"
_INNER = 65536  # batches, K and N stay below it


def _permutations(
    perm_x1: Sequence[int] | None, perm_x2: Sequence[int] | None, perm_y: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The permutations of both factors, checked; that of the result can only be [1, 0, 2]."""
    x1, x2, y = tuple(perm_x1 or (0, 1, 2)), tuple(perm_x2 or (0, 1, 2)), tuple(perm_y or (1, 0, 2))
    check(_OP, x1 in ((0, 1, 2), (1, 0, 2)), f"perm_x1 should be [0, 1, 2] or [1, 0, 2], not {list(x1)}")
    check(_OP, x2 in ((0, 1, 2), (0, 2, 1)), f"perm_x2 should be [0, 1, 2] or [0, 2, 1], not {list(x2)}")
    check(_OP, y == (1, 0, 2), f"perm_y should be [1, 0, 2], not {list(y)}")
    return x1, x2


def _check_sizes(x1: Tensor, x2: Tensor, transposed: tuple[bool, bool], split: int) -> None:
    """Check the factors, permuted to [B, M, K] and [B, K, N]."""
    batch, _, k = x1.shape
    check(_OP, x2.shape[0] == batch, f"input has {batch} batches, weight has {x2.shape[0]}")
    check(_OP, x2.shape[1] == k, f"the K axis is {k} in input and {x2.shape[1]} in weight")
    check(_OP, x1.numel() > 0 and x2.numel() > 0, "empty tensors are not supported")
    check(_OP, batch < _INNER and x2.shape[2] < _INNER, f"the batches {batch} and N {x2.shape[2]} must be below {_INNER}")
    check(_OP, transposed[0] or k < _INNER, f"K {k} must be below {_INNER} where perm_x1 is [0, 1, 2]")
    check(_OP, not transposed[1] or (transposed[0] and split == 1), "perm_x2=[0, 2, 1] needs perm_x1=[1, 0, 2] and batch_split_factor=1")
    check(_OP, not transposed[0] or split == 1 or batch * k < _INNER, f"batch_split_factor needs B * K below {_INNER}, not {batch * k}")
    check(_OP, split >= 1 and batch % split == 0, f"batch_split_factor {split} must divide the {batch} batches")


@emulates("npu::npu_transpose_batchmatmul")
def npu_transpose_batchmatmul(
    input: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    perm_x1: Sequence[int] | None = None,
    perm_x2: Sequence[int] | None = None,
    perm_y: Sequence[int] | None = None,
    batch_split_factor: int | None = 1,
) -> Tensor:
    """`(input^perm_x1 @ weight^perm_x2)^perm_y`, accumulated in fp32: [M, B, N], or [split, M, B * N / split]."""
    x1_order, x2_order = _permutations(perm_x1, perm_x2, perm_y)
    for name, tensor in (("input", input), ("weight", weight)):
        check(_OP, tensor.dtype in FLOATS, f"{name}'s type supported for float16, float32 and bfloat16, but now is {tensor.dtype}")
        check(_OP, tensor.dim() == 3, f"{name} must have 3 dimensions, not {tensor.dim()}")
    check(_OP, bias is None, "bias is not supported by the operator")
    refuse(_OP, scale=scale)
    check(_OP, input.dtype == weight.dtype, f"input is {input.dtype}, weight is {weight.dtype}: they must have one dtype")
    x1, x2, split = input.permute(x1_order), weight.permute(x2_order), 1 if batch_split_factor is None else batch_split_factor
    _check_sizes(x1, x2, (x1_order == (1, 0, 2), x2_order == (0, 2, 1)), split)
    y = torch.bmm(x1.float(), x2.float()).to(input.dtype).transpose(0, 1)
    if split == 1:
        return y.contiguous()
    return y.reshape(y.shape[0], split, -1).transpose(0, 1).contiguous()


@npu_transpose_batchmatmul.fake
def _(
    input: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    perm_x1: Sequence[int] | None = None,
    perm_x2: Sequence[int] | None = None,
    perm_y: Sequence[int] | None = None,
    batch_split_factor: int | None = 1,
) -> Tensor:
    x1_order, x2_order = _permutations(perm_x1, perm_x2, perm_y)
    batch, rows, columns = input.shape[x1_order[0]], input.shape[x1_order[1]], weight.shape[x2_order[2]]
    dtype, sizes = input.dtype, [rows, batch, columns]
    if scale is not None:
        dtype, sizes = torch.int8, [rows, 1, batch * columns]
    if batch_split_factor is not None and batch_split_factor > 1:
        sizes = [batch_split_factor, rows, batch * columns // batch_split_factor]
    return input.new_empty(sizes, dtype=dtype)
