"""How functional collectives are read: `all_reduce`, `all_gather`, `reduce_scatter` and `wait` of one tensor.

A collective is a value equal to no other: what it gives depends on other ranks, and each call is one of its own. A coalesced one is
several, of one tensor each. What is not one of these stays opaque.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .build import ViewBuilder, handles, meta_of
from .shapes import to_shape
from .value import Value

_NAMESPACE = "_c10d_functional"
_NAMES = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}


def _attributes(node: Node, args: list[Any]) -> dict[str, Any] | None:
    """The group's name, and where there are such the number of ranks and the reduction; None where one is known at run time only."""
    names = [spec.name for spec in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, args, strict=True))
    group = getattr(given["group_name"], "group_name", given["group_name"])  # a name, or a process group
    attrs: dict[str, Any] = {"group": group}
    if "group_size" in given:
        attrs["ranks"] = given["group_size"]
    if "reduce_op" in given:
        attrs["reduction"] = str(given["reduce_op"]).lower()
    known = isinstance(group, str) and isinstance(attrs.get("ranks", 1), int)
    return attrs if known else None


@handles(*(f"{_NAMESPACE}::{name}" for name in _NAMES))
def _collective(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    attrs = _attributes(node, args)
    if attrs is None:
        return b.opaque(node)
    shape, dtype = meta_of(node)
    name = _NAMES[node.target._opname]  # type: ignore[union-attr]
    return b.table.unique(name, (b.operand(args[0]),), attrs, shape, dtype)


@handles(*(f"{_NAMESPACE}::{name}_coalesced" for name in _NAMES))
def _coalesced(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    attrs = _attributes(node, args)
    if attrs is None:
        return b.opaque(node)
    name = _NAMES[node.target._opname.removesuffix("_coalesced")]  # type: ignore[union-attr]
    operands = [b.operand(tensor) for tensor in args[0]]
    parts = tuple(
        b.table.unique(name, (operand,), attrs, to_shape(val.shape), val.dtype)
        for operand, val in zip(operands, node.meta["val"], strict=True)
    )
    return b.table.unique("coalesced", operands, {"parts": parts}, (), None)


@handles(f"{_NAMESPACE}::wait_tensor")
def _wait(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """What a collective gives once it is there: another value than the collective's, whose memory nobody may read yet. All waits for one
    collective give the same; DTensor waits anew wherever it reads it."""
    shape, dtype = meta_of(node)
    return b.table.intern("wait", (b.operand(args[0]),), {}, shape, dtype)
