"""Matrix products of tensor-parallel layers with the collective next to them: `linear_all_reduce`, `all_gather_linear`,
`linear_reduce_scatter`.

A device that has such an op exchanges one part of the rows while it multiplies the next. They are plain: where nothing on the target takes
one, the graph holds PyTorch's matrix product and functional collective.

Like functional collectives they have no effect in the sense of AOT: they are put in after it, each where the wait for its collective was,
by rules that see the same graph on all ranks. No pass over an FX graph drops a call, as none drops a wait: other ranks take part in it.
What the ranks must agree on besides the order of their calls is which of them are fused: all must compile the same program with the same
options and target, and have weights cut into equal parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import torch_private
from ..semantic import SemanticOp, semantic_op
from ._common import check_floating, check_rank, check_same_dtype, check_sizes, check_value, known_different

_FAMILY = "parallel"
_collectives: Any = torch.ops._c10d_functional


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, ranks: int = 1) -> None:
    check_floating(op, x=x, weight=weight, bias=bias)
    check_same_dtype(op, **{name: t for name, t in (("x", x), ("weight", weight), ("bias", bias)) if t is not None})
    check_rank(op, 2, x=x, weight=weight)
    check_rank(op, 1, bias=bias)
    fits = not known_different(x.shape[1], weight.shape[0])
    check_value(op, fits, f"x {list(x.shape)} must end in the inputs of weight {list(weight.shape)}")
    if bias is not None:
        check_sizes(op, "bias", bias.shape, [weight.shape[1]])
    check_value(op, ranks >= 1, f"there cannot be {ranks} ranks")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _waited(result: Tensor) -> Tensor:
    waited: Tensor = _collectives.wait_tensor(result)
    return waited


@semantic_op(_FAMILY, "(Tensor x, Tensor weight, Tensor? bias=None, *, str group) -> Tensor", plain=True)
def linear_all_reduce(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: str) -> Tensor:
    """A row-parallel layer: each rank's product, summed over the ranks.

    Maths: `y = sum over ranks r of (x_r @ weight_r + bias_r)`, the same on all ranks.

    Args:
        x: [M, K], floating point; the inputs that are this rank's.
        weight: [K, N], in the dtype of x: their rows of the layer's matrix.
        bias: [N], in the dtype of x: this rank's addend, so that a layer's own bias is given by one rank or in equal parts by all.
        group: the process group's name.

    Returns:
        [M, N] in the dtype of x.

    Rounding: the product is accumulated in fp32 (fp64 for fp64), takes up the bias, and is rounded to the dtype of x; the ranks' sum is the
    collective's, in that dtype.

    Raises:
        TypeError: a dtype is not floating point, or they differ.
        ValueError: wrong ranks of tensors, or sizes that do not agree.

    Source: Megatron-LM, https://arxiv.org/abs/1909.08053; op-plugin doc npu_mm_all_reduce_base.
    """
    _check("linear_all_reduce", x, weight, bias)
    return _waited(_collectives.all_reduce(_product(x, weight, bias), "sum", group))


@linear_all_reduce.fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: str) -> Tensor:
    _check("linear_all_reduce", x, weight, bias)
    return x.new_empty((x.shape[0], weight.shape[1]))


@semantic_op(_FAMILY, "(Tensor x, Tensor weight, Tensor? bias=None, *, str group, int ranks) -> (Tensor, Tensor)", plain=True)
def all_gather_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: str, ranks: int) -> tuple[Tensor, Tensor]:
    """A column-parallel layer of sequence parallelism: the tokens of all ranks, times this rank's columns.

    Maths: `gathered = concatenation over ranks r of x_r`, `y = gathered @ weight + bias`.

    Args:
        x: [M, K], floating point; the tokens that are this rank's, of equal number on all ranks.
        weight: [K, N], in the dtype of x.
        bias: [N], in the dtype of x.
        group: the process group's name.
        ranks: R, the group's size.

    Returns:
        y: [R * M, N] in the dtype of x.
        gathered: [R * M, K] in the dtype of x, rank by rank: what other layers multiply.

    Rounding: accumulated in fp32 (fp64 for fp64), rounded once after the bias.

    Raises:
        TypeError: a dtype is not floating point, or they differ.
        ValueError: wrong ranks of tensors, or sizes that do not agree.

    Source: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198; op-plugin doc npu_all_gather_base_mm.
    """
    _check("all_gather_linear", x, weight, bias, ranks)
    gathered = _waited(_collectives.all_gather_into_tensor(x.contiguous(), ranks, group))
    return _product(gathered, weight, bias), gathered


@all_gather_linear.fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: str, ranks: int) -> tuple[Tensor, Tensor]:
    _check("all_gather_linear", x, weight, bias, ranks)
    rows = x.shape[0] * ranks
    return x.new_empty((rows, weight.shape[1])), x.new_empty((rows, x.shape[1]))


@semantic_op(_FAMILY, "(Tensor x, Tensor weight, Tensor? bias=None, *, str group, int ranks) -> Tensor", plain=True)
def linear_reduce_scatter(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: str, ranks: int) -> Tensor:
    """A row-parallel layer of sequence parallelism: each rank's product, summed over the ranks, of which each gets its tokens.

    Maths: `z = sum over ranks r of (x_r @ weight_r + bias_r)`; rank i has `y = z[i * M / R : (i + 1) * M / R]`.

    Args:
        x: [M, K], floating point, M a multiple of R; the inputs that are this rank's.
        weight: [K, N], in the dtype of x.
        bias: [N], in the dtype of x: this rank's addend.
        group: the process group's name.
        ranks: R, the group's size.

    Returns:
        [M / R, N] in the dtype of x.

    Rounding: as `linear_all_reduce`.

    Raises:
        TypeError: a dtype is not floating point, or they differ.
        ValueError: wrong ranks of tensors, or sizes that do not agree.

    Source: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198; op-plugin doc npu_mm_reduce_scatter_base.
    """
    _check("linear_reduce_scatter", x, weight, bias, ranks)
    return _waited(_collectives.reduce_scatter_tensor(_product(x, weight, bias), "sum", ranks, group))


@linear_reduce_scatter.fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: str, ranks: int) -> Tensor:
    _check("linear_reduce_scatter", x, weight, bias, ranks)
    return x.new_empty((x.shape[0] // ranks, weight.shape[1]))


def _keep(*ops: SemanticOp) -> None:
    for op in ops:
        torch_private.keep_in_graphs(op.overload)


_keep(linear_all_reduce, all_gather_linear, linear_reduce_scatter)
