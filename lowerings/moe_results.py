"""What providers of routers share: tokens as rows, and weights written out for all experts."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..lower import Builder
from ..view.shapes import to_dim

aten = torch.ops.aten


def by_rows(b: Builder, node: Node) -> Node:
    """The node [..., N] as a matrix [rows, N]."""
    if b.val(node).dim() == 2:
        return node
    width = to_dim(b.val(node).shape[-1])
    return b.emit(aten.reshape.default, node, [-1, width if isinstance(width, int) else b.size(node, -1)])


def in_rows(b: Builder, node: Node, like: Node) -> Node:
    """The matrix [rows, N] with the leading dimensions of `like` [..., E]."""
    if b.val(like).dim() == 2:
        return node
    lead = [b.size(like, dim) for dim in range(b.val(like).dim() - 1)]
    return b.reshape(node, [*lead, b.val(node).shape[-1]])


def dense_weights(b: Builder, weights: Node, indices: Node, like: Node) -> Node:
    """The weights [..., k] at their places of [..., E], the size of `like`, and zeros elsewhere."""
    sizes = [b.size(like, dim) for dim in range(b.val(like).dim())]
    zeros = b.emit(aten.new_zeros.default, weights, sizes)
    return b.emit(aten.scatter.src, zeros, -1, indices, weights)
