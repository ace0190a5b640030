"""Weight-only linears by Triton: four-bit weights in groups, by `w4a16_linear`, which picks GEMV or GEMM by the number of rows it gets.

The kernels want words of inputs that lie a plane apart (kernels/w4a16.py). Where a model packs neighbouring inputs into a word, as GPTQ
does, its words stay as they are, and the few activations change places instead: a block of inputs is of one group, and a sum has no order.
Where it packs outputs, as AWQ does, the words are laid out anew.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    plane = kernels.plane_rows(inputs, group)
    b.require(plane > 0, f"it takes groups of a multiple of 32 inputs, the model's are of {group}")
    x, words = _inputs_packed(b, a, x, plane) if a.packs_inputs else (x, _outputs_packed(b, a, group))
    words = prepared(with_other_sign(b, words) if a.signed else words)
    scales = prepared(b.contiguous(transposed(b, a.scale)))
    zeros = _zeros(b, a, dtype)
    vector_cores, matrix_cores = cores_of(b.config, b.dry_run)
    form = {"group_size": group, "cores": vector_cores, "matrix_cores": matrix_cores}
    return b.emit(ops.w4a16_linear.overload, x, words, scales, zeros, a.bias, **form)


def _zeros(b: Builder, a: Arguments, dtype: torch.dtype) -> Node | None:
    zero = zero_point(b, a, dtype, _MIDDLE if a.signed else 0)
    if isinstance(zero, Node):
        return prepared(b.contiguous(transposed(b, zero)))
    if zero == _MIDDLE:
        return None
    return prepared(b.emit(aten.full_like.default, b.contiguous(transposed(b, a.scale)), zero))


def _inputs_packed(b: Builder, a: Arguments, x: Node, plane: int) -> tuple[Node, Node]:
    """Activations and words [K / 8, N]: nibble i of a block's words is the plane i of its activations."""
    words, nibbles = in_words(b, a)
    return _in_planes(b, x, plane, nibbles), b.contiguous(transposed(b, words))


def _in_planes(b: Builder, x: Node, plane: int, nibbles: Sequence[int]) -> Node:
    """x [..., K] with element `nibbles[i]` of word j of a block at place i * plane + j of the block."""
    lead = [b.size(x, dim) for dim in range(b.val(x).dim() - 1)]
    inputs = b.val(x).shape[-1]
    words = b.reshape(x, [*lead, inputs // (PER_WORD * plane), plane, PER_WORD])
    if tuple(nibbles) != IN_ORDER:
        words = b.emit(aten.index_select.default, words, len(lead) + 2, _order(b, nibbles))
    return b.reshape(b.transpose(words, -1, -2), [*lead, inputs])


def _outputs_packed(b: Builder, a: Arguments, group: int) -> Node:
    """The words [K / 8, N] of ones [N / 8, K] that hold eight outputs."""
    words, nibbles = in_words(b, a)
    cores, _ = cores_of(b.config, b.dry_run)
    columns = b.contiguous(transposed(b, words))
    repacked = b.emit(ops.w4a16_repack_awq.overload, columns, group_size=group, cores=cores)
    if tuple(nibbles) == kernels.AWQ_ORDER:
        return repacked
    rows, outputs = b.val(repacked).shape
    apart = b.reshape(repacked, [rows, outputs // PER_WORD, PER_WORD])
    places = [kernels.AWQ_ORDER[nibbles.index(element)] for element in range(PER_WORD)]
    return b.reshape(b.emit(aten.index_select.default, apart, 2, _order(b, places)), [rows, outputs])


def _order(b: Builder, order: Sequence[int]) -> Node:
    device = b.val(b.node).device
    return b.constant(("order", tuple(order), str(device)), lambda: torch.tensor(list(order), device=device))
