"""Proof that a mask leaves every query a key.

A decode step with a static cache compares key indices with a position that only a tensor holds: `arange(Skv) <= position`. Key 0 is visible
wherever the position is not negative. And it is not, where the same graph writes to its cache at that position: an index copy at a negative
index is an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from ....lower import Builder
from ....simplify import LEAST
from ....view.shapes import known_ge, to_dim

aten = torch.ops.aten

_RESHAPES = frozenset({aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.clone.default})
_VIEWS = _RESHAPES | {aten.squeeze.dim, aten.slice.Tensor, aten.transpose.int, aten.permute.default}
# Ops that fail on negative indices, and the place of these among the arguments.
_INDEXED = {
    "aten::index_copy": 2,
    "aten::index_copy_": 2,
    "npu_fusion::kv_update": 2,
    "npu::npu_scatter_nd_update": 1,
    "npu::npu_scatter_nd_update_": 1,
}


def sees_a_key(b: Builder, visible: Node) -> bool:
    """Whether every query sees a key for certain, by a bool mask [..., Sq, Skv] that shows the keys up to some index."""
    mask = _with_last_dim(b, visible)
    if mask.target in (aten.le.Tensor, aten.le.Scalar):
        keys, limit = mask.args
    elif mask.target is aten.ge.Tensor:
        limit, keys = mask.args
    else:
        return False
    return isinstance(keys, Node) and _is_row(b, keys, mask) and _starts_at_zero(b, keys) and _known_nonnegative(b, limit)


def _with_last_dim(b: Builder, node: Node) -> Node:
    """The node behind views that keep the last dimension."""
    while node.target in _RESHAPES and isinstance(node.args[0], Node):
        source = node.args[0]
        if b.val(source).dim() == 0 or not b.equal(b.val(source).shape[-1], b.val(node).shape[-1]):
            break
        node = source
    return node


def _is_row(b: Builder, keys: Node, mask: Node) -> bool:
    """Whether the keys run along the last dimension of the mask, and along no other."""
    *others, last = b.val(keys).shape
    return b.equal(last, b.val(mask).shape[-1]) and all(b.equal(size, 1) for size in others)


def _starts_at_zero(b: Builder, integers: Node) -> bool:
    """Whether they are a range from 0 up, in any shape; or constants of which 0 is the lowest."""
    while integers.target in _RESHAPES or (integers.target is aten.add.Tensor and integers.args[1] == 0):
        source = integers.args[0]
        assert isinstance(source, Node)
        integers = source
    if integers.op == "get_attr":
        return _least(integers) == 0
    return integers.target is aten.arange.default or bool(integers.target is aten.arange.start and integers.args[0] == 0)


def _known_nonnegative(b: Builder, value: object) -> bool:
    """Whether an integer, or every element of a tensor of integers, is known not to be negative."""
    if isinstance(value, int):
        return value >= 0
    if not isinstance(value, Node):
        return False
    if isinstance(value.meta.get("val"), torch.SymInt):
        return known_ge(to_dim(value.meta["val"]), 0)
    node = _behind_views(value)
    if node.op == "get_attr":
        return _least(node) >= 0
    if _starts_at_zero(b, node) or any(node is index for index in _indices(b)):
        return True
    return _is_sum(node) and all(_known_nonnegative(b, term) for term in node.args)


def _indices(b: Builder) -> Iterator[Node]:
    """The indices at which the graph writes to its caches; and x where they are `arange(n) + x`, the first of which is x."""
    for node in b.graph.nodes:
        place = _INDEXED.get(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else None
        if place is None or place >= len(node.args) or not isinstance(node.args[place], Node):
            continue
        index = _behind_views(node.args[place])
        yield index
        if _is_sum(index):
            for term, other in (index.args, index.args[::-1]):
                if isinstance(term, Node) and isinstance(other, Node) and b.equal(b.val(other).numel(), 1) and _starts_at_zero(b, term):
                    yield _behind_views(other)


def _least(constant: Node) -> int:
    """The least of a constant's integers; below all where that is not known."""
    return int(constant.meta.get(LEAST, -1))


def _is_sum(node: Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs


def _behind_views(node: Node) -> Node:
    """The tensor of which the node holds elements, in any shape and integer type."""
    while node.target in _VIEWS or node.target is aten._to_copy.default:
        source = node.args[0]
        assert isinstance(source, Node)
        if source.meta["val"].is_floating_point():
            break
        node = source
    return node
