"""Matrix products that are more than one matrix times another: `bmm_transpose`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..semantic import semantic_op
from ._common import check_floating, check_min_rank, check_rank, check_same_dtype, check_value, known_different


def _check(x: Tensor, weight: Tensor) -> None:
    op = "bmm_transpose"
    check_floating(op, x=x, weight=weight)
    check_same_dtype(op, x=x, weight=weight)
    check_min_rank(op, 3, x=x)
    check_rank(op, 3, weight=weight)
    fits = not any(known_different(a, b) for a, b in zip(x.shape[-2:], weight.shape[:2], strict=True))
    check_value(op, fits, f"x {list(x.shape)} must end in the heads and inputs of weight {list(weight.shape)}")


def _head_major(product: Tensor, x: Tensor) -> Tensor:
    """The product [H, M, N] as [..., H, N], a view of it, with the leading dimensions of x."""
    heads, _, columns = product.shape
    return product.view(heads, *x.shape[:-2], columns).movedim(0, -2)


@semantic_op("matmul", "(Tensor x, Tensor weight, *, bool row_major=True) -> Tensor")
def bmm_transpose(x: Tensor, weight: Tensor, *, row_major: bool = True) -> Tensor:
    """A matrix of its own for each head: MLA's products with W_UK and W_UV, a batched product between two transpositions.

    Maths: `y[..., h, n] = sum_k x[..., h, k] * weight[h, k, n]`.

    Args:
        x: [..., H, K], at least three dimensions.
        weight: [H, K, N], in the dtype of x.
        row_major: whether the result is stored in the order of its dimensions; otherwise with the heads outermost, as the batched product
            leaves it.

    Returns:
        [..., H, N] in the dtype of x.

    Rounding: that of a batched product of the dtype: accumulated in fp32 (fp64 for fp64), one cast at the end.

    Raises:
        TypeError: a dtype is not floating point, or x and weight have different ones.
        ValueError: wrong ranks, heads or inputs that do not agree.

    Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434 (the absorbed form of MLA); op-plugin doc npu_transpose_batchmatmul.
    """
    _check(x, weight)
    y = _head_major(torch.bmm(x.flatten(0, -3).transpose(0, 1), weight), x)
    return y.contiguous() if row_major else y


@bmm_transpose.fake
def _(x: Tensor, weight: Tensor, *, row_major: bool = True) -> Tensor:
    _check(x, weight)
    lead, heads, columns = x.shape[:-2], weight.shape[0], weight.shape[2]
    if row_major:
        return x.new_empty((*lead, heads, columns))
    return x.new_empty((heads, *lead, columns)).movedim(0, -2)
