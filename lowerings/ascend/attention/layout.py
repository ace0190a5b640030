"""How the operands of an attention op lie in memory, and in which layout it takes them with the fewest copies.

A model's queries come as [B, N, S, D] views of projections [B, S, N, D]; keys and values are such views too, or caches that are stored as
[B, N, S, D]. The ops take one layout for all of them, and contiguous tensors only: what lies otherwise is copied. One query lies the same
way in [B, 1, N, D] and [B, N, 1, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ....layout import row_major
from ....lower import Builder
from ....view.shapes import known_equal, to_dim
from ....view.value import Dim

aten = torch.ops.aten

MOST_QUERIES_A_KEY = 64  # heads; op-plugin doc npu_fused_infer_attention_score


def dim_of(size: Any) -> Dim:
    """A size, or a node that holds one, as an int or an expression."""
    return to_dim(size.meta["val"] if isinstance(size, Node) else size)


@dataclass(frozen=True)
class Operands:
    """Query [B, N, Sq, D], key [B, Nkv, Skv, D] and value [B, Nkv, Skv, Dv] of one call.

    Attributes:
        lengths: how many keys there are, on the host: one int (or a node that holds it) for all rows, or one a row; empty where all are.
    """

    query: Node
    key: Node
    value: Node
    lengths: tuple[Any, ...] = ()

    def sizes(self, b: Builder) -> tuple[Dim, Dim]:
        """Number of queries, and of keys by the shape of the key tensor."""
        return to_dim(b.val(self.query).shape[2]), to_dim(b.val(self.key).shape[2])

    def heads(self, b: Builder) -> tuple[int, int]:
        """Number of query heads and of key heads."""
        heads, kv_heads = b.val(self.query).shape[1], b.val(self.key).shape[1]
        b.require(type(heads) is int and type(kv_heads) is int, "the number of heads is symbolic")
        b.require(
            heads <= MOST_QUERIES_A_KEY * kv_heads,
            f"{heads} query heads are more than {MOST_QUERIES_A_KEY} for each of {kv_heads} key heads",
        )
        return heads, kv_heads


@dataclass(frozen=True)
class Arranged:
    """Operands in the layout of a call of an op, and how its result becomes the [B, N, Sq, Dv] of the semantic op."""

    input_layout: str
    query: Node
    key: Node
    value: Node
    restore: Callable[[Node], Node]


def arrange(b: Builder, operands: Operands) -> Arranged:
    """The operands in BSND or BNSD, whichever needs fewer copies; the result is token-major either way where the op can do that."""
    nodes = (operands.query, operands.key, operands.value)
    one_query = known_equal(operands.sizes(b)[0], 1)
    several = b.at_least(b.val(operands.query).shape[2], 2)
    head_major_copies = sum(not row_major(b.val(node)) for node in nodes) + (not one_query and not several)
    token_major_copies = sum(not row_major(b.val(node).transpose(1, 2)) for node in nodes)
    if token_major_copies <= head_major_copies:
        query, key, value = (token_major(b, node) for node in nodes)
        return Arranged("BSND", query, key, value, lambda out: b.transpose(out, 1, 2))
    query, key, value = (b.contiguous(node) for node in nodes)
    if several:  # with one query the op has no BNSD_BSND, and needs none
        return Arranged("BNSD_BSND", query, key, value, lambda out: b.transpose(out, 1, 2))
    return Arranged("BNSD", query, key, value, lambda out: out)


def arrange_heads_first(b: Builder, operands: Operands) -> Arranged:
    """The operands in BNSD, with the result in BNSD too."""
    query, key, value = (b.contiguous(node) for node in (operands.query, operands.key, operands.value))
    return Arranged("BNSD", query, key, value, lambda out: out)


def arrange_packed(b: Builder, operands: Operands) -> Arranged:
    """The operands in TND: the tokens of all rows one after another, as in a contiguous [B, S, N, D]."""
    query, key, value = (packed(b, node) for node in (operands.query, operands.key, operands.value))
    batch, tokens = b.size(operands.query, 0), b.size(operands.query, 2)

    def restore(out: Node) -> Node:
        return b.transpose(b.reshape(out, [batch, tokens, *b.val(out).shape[1:]]), 1, 2)

    return Arranged("TND", query, key, value, restore)


def token_major(b: Builder, node: Node) -> Node:
    """[B, N, S, D] as a contiguous [B, S, N, D]."""
    return b.contiguous(b.transpose(node, 1, 2))


def packed(b: Builder, node: Node) -> Node:
    """[B, N, S, D] as a contiguous [B * S, N, D]."""
    tokens = token_major(b, node)
    return b.reshape(tokens, [-1, *b.val(tokens).shape[2:]])


def unsliced(b: Builder, operands: Operands) -> Operands:
    """Keys and values that are the filled front of a cache as the whole cache and a length: then no copy makes them contiguous."""
    if row_major(b.val(operands.key)) or operands.lengths:
        return operands
    key, value = _front_of(operands.key), _front_of(operands.value)
    if key is None or value is None or not b.equal(key[1], value[1]) or not b.equal(b.val(key[0]).shape[2], b.val(value[0]).shape[2]):
        return operands
    if not row_major(b.val(key[0])) or not row_major(b.val(value[0])):
        return operands
    return replace(operands, key=key[0], value=value[0], lengths=(b.size(operands.key, 2),))


def _front_of(node: Node) -> tuple[Node, Any] | None:
    """The tensor whose front along dimension 2 the node is, and how much of it."""
    if node.target is not aten.slice.Tensor:
        return None
    arguments = dict(zip(("source", "dim", "start", "end", "step"), node.args, strict=False))
    source, dim, start, step = (arguments.get(name) for name in ("source", "dim", "start", "step"))
    if dim not in (2, -2) or start not in (None, 0) or step not in (None, 1) or not isinstance(source, Node):
        return None
    return source, node.meta["val"].shape[2]
