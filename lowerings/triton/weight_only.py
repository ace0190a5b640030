"""Weight-only linears by Triton: four-bit weights in groups, by `w4a16_linear`, which picks GEMV or GEMM by the number of rows it gets.

The kernels want words of inputs that lie a plane apart (kernels/w4a16.py). Where a model packs neighbouring inputs into a word, as GPTQ
does, its words stay as they are, and the few activations change places instead: a block of inputs is of one group, and a sum has no order.
Where it packs outputs, as AWQ does, the words are laid out anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...kernels import w4a16 as kernels
from ...lower import Arguments, Builder
from ...prepare import prepared
from ..words import IN_ORDER, PER_WORD, in_words, transposed, with_other_sign, zero_point
from . import w4a16 as ops
from .checks import FLOATS, HALVES
from .provide import cores_of, provides, require_width

aten = torch.ops.aten
_MIDDLE = 8  # what the kernel subtracts where it gets no zero points


@provides("weight_only_linear", "triton.w4a16_linear", matrix=True)
def weight_only_linear(b: Builder, a: Arguments, cores: int) -> Node:
    """Words of eight nibbles, in groups of at least 32 inputs."""
    b.only_if(bool(a.shifts))
    x, dtype = a.x, b.val(a.scale).dtype
    b.require(b.config.rounding != "exact", "it may multiply weights that are not rounded, the model rounds them: rounding is 'exact'")
    b.require(b.val(x).dtype in HALVES, f"x is {b.val(x).dtype}, of float16 and bfloat16")
    b.require(dtype in FLOATS, f"the scale is {dtype}")
    require_width(b, x=x)
    outputs, groups = b.val(a.scale).shape
    inputs = b.val(x).shape[-1]
    b.require(isinstance(outputs, int) and isinstance(groups, int), "the sizes of the weight are symbolic")
    group = inputs // groups
    laid_out = packed_matrix(b, a, inputs)
    x = laid_out.moved(b, x)
    words, scales, zeros = laid_out.words, laid_out.scales, laid_out.zeros
    vector_cores, matrix_cores = cores_of(b.config, b.dry_run)
    form = {"group_size": group, "cores": vector_cores, "matrix_cores": matrix_cores}
    return b.emit(ops.w4a16_linear.overload, x, words, scales, zeros, a.bias, **form)


@dataclass(frozen=True)
class PackedMatrix:
    """A weight, or a stack of them, as the kernels want it: words [K / 8, N], scales and zeros [K / group, N], all prepared.

    `nibbles` says which element of a word's eight each nibble holds, where the activations are to change places; None where they are not.
    """

    words: Node
    scales: Node
    zeros: Node | None
    plane: int
    nibbles: tuple[int, ...] | None

    def moved(self, b: Builder, x: Node) -> Node:
        """Activations [..., K] as the words want them."""
        return x if self.nibbles is None else _in_planes(b, x, self.plane, self.nibbles)


def packed_matrix(b: Builder, a: Any, inputs: int) -> PackedMatrix:
    """What the kernels read of `a.weight`, `a.scale` [..., N, G] and `a.zero`, packed as `a.shifts`, ... say.

    Raises:
        Refused: the groups, or the words, are not of the kernels.
    """
    groups = b.val(a.scale).shape[-1]
    plane = kernels.plane_rows(inputs, inputs // groups)
    b.require(plane > 0, f"it takes groups of a multiple of 32 inputs, the model's are of {inputs // groups}")
    words, nibbles = in_words(b, a)
    words = b.contiguous(transposed(b, words)) if a.packs_inputs else _outputs_packed(b, words, nibbles, inputs // groups)
    words = prepared(with_other_sign(b, words) if a.signed else words)
    scales = prepared(b.contiguous(transposed(b, a.scale)))
    return PackedMatrix(words, scales, _zeros(b, a, b.val(a.scale).dtype), plane, nibbles if a.packs_inputs else None)


def _zeros(b: Builder, a: Any, dtype: torch.dtype) -> Node | None:
    zero = zero_point(b, a, dtype, _MIDDLE if a.signed else 0)
    if isinstance(zero, Node):
        return prepared(b.contiguous(transposed(b, zero)))
    if zero == _MIDDLE:
        return None
    return prepared(b.emit(aten.full_like.default, b.contiguous(transposed(b, a.scale)), zero))


def _in_planes(b: Builder, x: Node, plane: int, nibbles: Sequence[int]) -> Node:
    """x [..., K] with element `nibbles[i]` of word j of a block at place i * plane + j of the block."""
    lead = [b.size(x, dim) for dim in range(b.val(x).dim() - 1)]
    inputs = b.val(x).shape[-1]
    words = b.reshape(x, [*lead, inputs // (PER_WORD * plane), plane, PER_WORD])
    if tuple(nibbles) != IN_ORDER:
        words = b.emit(aten.index_select.default, words, len(lead) + 2, _order(b, nibbles))
    return b.reshape(b.transpose(words, -1, -2), [*lead, inputs])


def _outputs_packed(b: Builder, words: Node, nibbles: tuple[int, ...], group: int) -> Node:
    """The words [K / 8, N] of ones [N / 8, K] that hold eight outputs."""
    cores, _ = cores_of(b.config, b.dry_run)
    columns = b.contiguous(transposed(b, words))
    repacked = b.emit(ops.w4a16_repack_awq.overload, columns, group_size=group, cores=cores)
    if tuple(nibbles) == kernels.AWQ_ORDER:
        return repacked
    *lead, outputs = b.val(repacked).shape
    apart = b.reshape(repacked, [*lead, outputs // PER_WORD, PER_WORD])
    places = [kernels.AWQ_ORDER[nibbles.index(element)] for element in range(PER_WORD)]
    return b.reshape(b.emit(aten.index_select.default, apart, len(lead) + 1, _order(b, places)), [*lead, outputs])


def _order(b: Builder, order: Sequence[int]) -> Node:
    device = b.val(b.node).device
    return b.constant(("order", tuple(order), str(device)), lambda: torch.tensor(list(order), device=device))
