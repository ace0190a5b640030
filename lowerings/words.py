"""What the targets' lowerings of four-bit weights share: words of eight nibbles, and zero points as kernels take them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..layout import row_major
from ..lower import Builder

aten = torch.ops.aten

PER_WORD = 8
IN_ORDER = tuple(range(PER_WORD))
SIGN_BITS = 0x88888888 - 2**32
"""As an int32: with it, `xor` makes four-bit two's complement of nibbles less 8, and the other way."""


def transposed(b: Builder, node: Node) -> Node:
    """A matrix, or every one of a stack, transposed; of one that is the transpose of another in the graph, that one."""
    if node.target is aten.permute.default and list(node.args[1]) in ([1, 0], [0, 2, 1]):  # type: ignore[arg-type]
        source = node.args[0]
        assert isinstance(source, Node)
        return source
    return b.transpose(node, -2, -1)


def in_words(b: Builder, a: Any) -> tuple[Node, tuple[int, ...]]:
    """The packed weight as int32 words along the packed dimension, and which element of its eight each nibble of a word holds.

    Read are `a.weight`, `a.shifts`, `a.plane` and `a.packs_inputs`. Bytes of pairs become words where they lie in one row each.

    Raises:
        Refused: the layout has planes, or bytes of columns.
    """
    weight, shifts = a.weight, tuple(a.shifts)
    b.require(a.plane == 1, f"of {a.plane} words in a row each holds numbers that lie as far apart")
    if len(shifts) < PER_WORD:
        b.require(a.packs_inputs and row_major(b.val(weight)), "bytes of two numbers of one input do not make up words")
        columns = b.val(weight).shape[-1]
        b.require(isinstance(columns, int) and columns % 4 == 0, f"rows of {columns} bytes are no whole words")
        if b.val(weight).dtype != torch.int32:
            weight = b.emit(aten.view.dtype, weight, torch.int32)
        shifts = tuple(8 * byte + shift for byte in range(4) for shift in shifts)
    return weight, tuple(shifts.index(4 * nibble) for nibble in range(PER_WORD))


def with_other_sign(b: Builder, words: Node) -> Node:
    return b.emit(aten.bitwise_xor.Scalar, words, SIGN_BITS)


def zero_point(b: Builder, a: Any, dtype: torch.dtype, base: int) -> Node | int:
    """All that is subtracted from codes whose nibble 0 stands for `base`: a number, or [N, G] in a type that holds it.

    Read are `a.zero` and `a.offset`.
    """
    constant: int = a.offset + base
    if a.zero is None:
        return constant
    zero = a.zero if b.val(a.zero).dtype == torch.float32 else b.cast(a.zero, dtype)
    return b.emit(aten.add.Scalar, zero, constant) if constant else zero
