"""The keys and values of an attention call: plain, filled up to a length, or in pages.

Lengths that the host knows (sizes of the graph) are what the ops take, and a capture can update them before a replay. Lengths that only a
tensor on the device holds become a mask, which a capture holds as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ....lower import Builder
from .layout import Operands
from .mask import past_lengths

aten = torch.ops.aten

_SHAPES_AND_CASTS = frozenset({aten.reshape.default, aten.view.default, aten.expand.default, aten._to_copy.default, aten.unsqueeze.default})


def host_lengths(lengths: Node) -> tuple[Any, ...] | None:
    """The lengths [B] as numbers that the host has: one for all rows, or one a row; None if only the device has them."""
    node = lengths
    while node.target in _SHAPES_AND_CASTS:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is aten.full.default:
        return (node.args[1],)
    if node.target is aten.scalar_tensor.default:
        return (node.args[0],)
    if node.target in (aten.cat.default, aten.stack.default):
        parts = [host_lengths(part) for part in node.args[0]]  # type: ignore[union-attr, arg-type]
        if all(part is not None and len(part) == 1 for part in parts):
            return tuple(part[0] for part in parts if part is not None)
    return None


def filled(b: Builder, operands: Operands, lengths: Node) -> tuple[Operands, Node | None]:
    """Operands whose keys are filled up to `lengths` [B], and those lengths where the op cannot be told and a mask must say it.

    What lies past the length has no effect even if it is NaN, which the weight 0 times NaN is not: the values there become 0.
    """
    known = host_lengths(lengths)
    if known is not None:
        return Operands(operands.query, operands.key, operands.value, known), None
    unused = past_lengths(b, b.size(operands.key, 2), lengths)
    column = b.emit(aten.transpose.int, unused, 2, 3)
    value = b.emit(aten.masked_fill.Scalar, operands.value, column, 0.0)
    return Operands(operands.query, operands.key, value), lengths


def gathered(b: Builder, cache: Node, block_table: Node) -> Node:
    """A paged cache [pages, Nkv, page_size, D] as [B, Nkv, max_pages * page_size, D]."""
    # Entries past a row's length may hold anything: what they gather is hidden by the length.
    pages = b.size(cache, 0)
    last = pages - 1 if isinstance(pages, int) else b.emit(operator.sub, pages, 1)
    table = b.emit(aten.clamp.default, b.cast(block_table, torch.int64), 0, last)
    found = b.emit(aten.index.Tensor, cache, [table])
    heads, _, dim = b.val(cache).shape[1:]
    return b.reshape(b.transpose(found, 1, 2), [b.size(block_table, 0), heads, -1, dim])
