"""Which nodes of a functional graph may share memory, found by data flow from the schemas of their ops."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from . import torch_private
from .layout import row_major

aten = torch.ops.aten

_ALIASES_IN_SECRET = {aten._unsafe_view.default}
READS_METADATA = {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default}
"""Ops that look at sizes and strides alone."""


class AliasClasses:
    """A union-find of nodes that may share memory, whose roots are the nodes that own it."""

    def __init__(self, graph: Graph) -> None:
        self._parent: dict[Node, Node] = {}
        self._members: dict[Node, dict[Node, None]] = {}
        for node in graph.nodes:
            if node.op in ("call_function", "call_module", "call_method"):
                for other in may_alias(node):
                    self.join(node, other)

    def root(self, node: Any) -> Node:
        while (parent := self._parent.get(node, node)) is not node:
            node = parent
        return node  # type: ignore[no-any-return]

    def join(self, node: Node, other: Node) -> None:
        """Put `node`'s class into that of `other`, whose root stays."""
        a, b = self.root(node), self.root(other)
        if a is b:
            return
        self._parent[a] = b
        self._members.setdefault(b, {b: None}).update(self._members.pop(a, {a: None}))

    def members(self, roots: Iterable[Node]) -> list[Node]:
        return [node for root in roots for node in self._members.get(root, {root: None})]

    def drop(self, node: Node) -> None:
        self._members.get(self.root(node), {}).pop(node, None)


def may_alias(node: Node) -> list[Node]:
    """The inputs whose memory a node's result may share; all of them where its schema does not tell."""
    op = node.target
    if op is operator.getitem:
        # Every result of a multi-output op belongs to the op's class, whatever else that is.
        return node.all_input_nodes
    if not isinstance(op, OpOverload) or op in _ALIASES_IN_SECRET or torch_private.is_composite(op):
        return [arg for arg in node.all_input_nodes if not isinstance(arg.meta.get("val"), (int, torch.SymInt))]
    returned = {alias for result in op._schema.returns if result.alias_info for alias in result.alias_info.before_set}
    if not returned:
        return []
    aliased: list[Any] = []
    for i, argument in enumerate(op._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info and argument.alias_info.before_set & returned:
            aliased += value if isinstance(value, (list, tuple)) else [value]
    return [value for value in aliased if isinstance(value, Node)]


def is_view(node: Node) -> bool:
    """Whether a node only says how to look at its first argument, without reading it."""
    op = node.target
    if op is operator.getitem:
        return isinstance(node.args[0], Node) and is_view(node.args[0])
    if op in _ALIASES_IN_SECRET:
        return True
    if op is aten.reshape.default:  # what views become in a graph with fused ops; of a contiguous tensor it copies nothing
        base = node.args[0].meta.get("val")  # type: ignore[union-attr]
        return isinstance(base, torch.Tensor) and row_major(base)
    if not isinstance(op, OpOverload) or torch_private.is_composite(op):
        return False
    arguments, returns = op._schema.arguments, op._schema.returns
    views = [r.alias_info for r in returns if r.alias_info]
    # contiguous and its like return their input or a copy of it: they read.
    return bool(views) and not op._schema.is_mutable and arguments[0].alias_info is not None and op is not aten.contiguous.default
