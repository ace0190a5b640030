"""What the providers of rotary embeddings share: tensors seen token by token, and cos and sin in the shape and width that an op reads.

Models keep heads first, as a view of what a projection wrote token by token, and tables that broadcast to that. The ops read [B, S, N, D],
where neither needs to be moved, and tables [B, S, 1, R]. What is made of the tables is the same for all layers, and computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..layout import row_major
from ..lower import Arguments, Builder
from ..view.shapes import same_shape, to_dim, to_shape

aten = torch.ops.aten

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Rotation:
    """The arguments that the semantic ops of this family share; they are described there."""

    cos: Node
    sin: Node
    layout: str
    rotary_dim: int
    sign: int

    @staticmethod
    def of(a: Arguments) -> Rotation:
        return Rotation(a.cos, a.sin, a.layout, a.rotary_dim, a.sign)

    def width(self, b: Builder, x: Node) -> int:
        """How many channels of x are rotated."""
        size = b.val(x).shape[-1] if self.rotary_dim == -1 else self.rotary_dim
        b.require(isinstance(size, int), "the number of rotated channels is known at run time only")
        return int(size)

    def per_pair(self, b: Builder, width: int) -> bool:
        """Whether the tables have one entry for each pair of channels."""
        return b.equal(2 * b.val(self.cos).shape[-1], width)


def compute_dtype(b: Builder, xs: Sequence[Node], r: Rotation) -> torch.dtype:
    """The dtype in which an op may rotate: that of x and of the tables, or fp32 where they differ, since no table may lose precision."""
    dtypes = {b.val(node).dtype for node in (*xs, r.cos, r.sin)}
    b.require(dtypes <= {*_FLOATS}, f"it takes no {', '.join(sorted(map(str, dtypes - {*_FLOATS})))}")
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


_ELEMENTWISE = frozenset({aten.cos.default, aten.sin.default, aten.neg.default, aten._to_copy.default})
_SCALED = frozenset({aten.mul.Tensor, aten.div.Tensor})
_OUTER_VIEWS = frozenset({aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.transpose.int})
_RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_SAME = frozenset({aten.clone.default, aten.alias.default, aten.detach.default, aten.expand.default})


def halved(b: Builder, r: Rotation, width: int) -> Rotation:
    """The rotation with tables of one entry a pair, views of the model's, where both entries of each pair surely are equal."""
    full = all(b.equal(b.val(table).shape[-1], width) for table in (r.cos, r.sin))
    if not full or not all(_repeats(b, table, r.layout) for table in (r.cos, r.sin)):
        return r
    bounds = (0, width, 2) if r.layout == "interleaved" else (0, width // 2)
    cos, sin = (b.emit(aten.slice.Tensor, table, -1, *bounds) for table in (r.cos, r.sin))
    return replace(r, cos=cos, sin=sin)


def _repeats(b: Builder, table: Node, layout: str) -> bool:
    """Whether both entries of each pair are equal: the table is made, element by element, of a tensor that the model repeated."""
    while table.op == "call_function":
        if _is_doubled(b, table, layout):
            return True
        args, last = table.args, b.val(table).dim() - 1
        scaled = table.target in _SCALED and not isinstance(args[1], Node)
        outer = table.target in _OUTER_VIEWS and _keeps_last(table, last)
        if not (table.target in _ELEMENTWISE or table.target in _SAME or scaled or outer):
            return False
        assert isinstance(args[0], Node)
        if not b.equal(b.val(args[0]).shape[-1], b.val(table).shape[-1]):
            return False
        table = args[0]
    return False


def _is_doubled(b: Builder, table: Node, layout: str) -> bool:
    """Whether the node puts a tensor beside itself, or each of its entries twice where neighbours are pairs."""
    if layout != "interleaved":
        return _joins_with_itself(b, table, aten.cat.default)
    if table.target is aten.repeat_interleave.self_int:  # whole on an npu device
        last = b.val(table).dim() - 1
        return table.args[1:] in ((2, -1), (2, last)) and not table.kwargs
    if table.target not in _RESHAPES:
        return False
    pairs = table.args[0]
    assert isinstance(pairs, Node)
    sizes = b.val(table).shape
    if not same_shape(to_shape(b.val(pairs).shape), (*to_shape(sizes[:-1]), to_dim(sizes[-1] // 2), 2)):
        return False
    while pairs.target is aten.clone.default:
        pairs = pairs.all_input_nodes[0]
    if pairs.target is aten.expand.default:
        return b.equal(b.val(pairs.all_input_nodes[0]).shape[-1], 1)
    return _joins_with_itself(b, pairs, aten.stack.default)


def _joins_with_itself(b: Builder, node: Node, target: Any) -> bool:
    """Whether the node is `target` of twice one tensor along its last dimension."""
    if node.target is not target:
        return False
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    return isinstance(parts, Sequence) and len(parts) == 2 and parts[0] is parts[1] and dim in (-1, b.val(node).dim() - 1)


def _keeps_last(view: Node, last: int) -> bool:
    """Whether a view leaves the last dimension, number `last` of its result, as it is."""
    if view.target is aten.select.int:
        return view.args[1] not in (-1, last + 1)
    dims = view.args[1:] if view.target is aten.transpose.int else view.args[1:2] or (0,)
    return not any(dim in (-1, last) for dim in dims)


# -------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Heads:
    """A tensor of heads, seen token by token.

    Attributes:
        source: the tensor, in four dimensions.
        node: the same as [B, S, N, D].
        dim: the dimension of `source` in which it has its heads, 1 or 2; 3 where it has none, and source is [B, S, D].
        shape: the sizes of the tensor, which may have fewer dimensions than `source`.
    """

    source: Node
    node: Node
    dim: int
    shape: Sequence[Any]

    def restored(self, b: Builder, y: Node) -> Node:
        """A result [B, S, N, D] in the shape and memory order of the tensor."""
        y = b.transpose(y, 1, 2) if self.dim == 1 else y
        return y if len(self.shape) == 4 else b.reshape(y, self.shape)


def as_heads(b: Builder, x: Node, r: Rotation) -> Heads:
    """The tensor by tokens and heads: the heads are in that dimension over which the tables broadcast."""
    rank = b.val(x).dim()
    b.require(2 <= rank <= 4, f"it takes up to 4 dimensions, the tensor has {rank}")
    shape = [b.size(x, dim) for dim in range(rank)]
    source = x if rank == 4 else b.reshape(x, [1] * (4 - rank) + shape)
    for dim, tokens in ((1, 2), (2, 1)):
        if all(_table_size(b, table, dim) == 1 and _covers(b, table, tokens, source) for table in (r.cos, r.sin)):
            return Heads(source, b.transpose(source, 1, 2) if dim == 1 else source, dim, shape)
    b.require(rank == 3, "the tables differ from head to head")
    source = b.reshape(x, [*shape[:2], 1, shape[2]])
    return Heads(source, source, 3, shape)


def _table_size(b: Builder, table: Node, dim: int) -> Any:
    """The size of a table in a dimension of four, to which it broadcasts."""
    val = b.val(table)
    return val.shape[dim - 4] if val.dim() >= 4 - dim else 1


def _covers(b: Builder, table: Node, dim: int, x: Node) -> bool:
    return b.equal(_table_size(b, table, dim), b.val(x).shape[dim])


# -------------------------------------------------------------------- tables


def tables_of(b: Builder, r: Rotation, heads: Heads, dtype: torch.dtype | None) -> tuple[Node, Node]:
    """cos and sin as [B or 1, S, 1, R or R / 2] in a dtype (None is their own), the sign taken into sin."""
    cos, sin = (table if dtype is None else b.cast(table, dtype) for table in (r.cos, r.sin))
    if r.sign < 0:
        sin = b.emit(aten.neg.default, sin)
    return _by_token(b, cos, heads), _by_token(b, sin, heads)


def _by_token(b: Builder, table: Node, heads: Heads) -> Node:
    sizes = [b.size(table, dim) for dim in range(b.val(table).dim())]
    width = sizes.pop()
    b.require(len(sizes) <= 3, f"the tables have {len(sizes) + 1} dimensions")
    if heads.dim == 3:
        b.require(len(sizes) <= 2, "the tables have more dimensions than the tensor")
        sizes = [1] * (2 - len(sizes)) + sizes
    else:
        sizes = [1] * (3 - len(sizes)) + sizes
        del sizes[heads.dim]
    return b.reshape(table, [*sizes, 1, width])


def per_channel(b: Builder, table: Node, width: int, layout: str) -> Node:
    """A table of one entry for each of `width` channels, from one for each pair."""
    if b.equal(b.val(table).shape[-1], width):
        return table
    if layout != "interleaved":
        return b.emit(aten.cat.default, [table, table], -1)
    sizes = [b.size(table, dim) for dim in range(b.val(table).dim() - 1)]
    return b.reshape(b.emit(aten.stack.default, [table, table], -1), [*sizes, width])


def padded(b: Builder, table: Node, width: int, value: float) -> Node:
    """A table with `value` for the channels behind it, up to `width`."""
    missing = width - int(b.val(table).shape[-1])
    return b.emit(aten.constant_pad_nd.default, table, [0, missing], value) if missing else table


def with_batch(b: Builder, table: Node, heads: Heads) -> Node:
    """A table with as many batches as the tensor; written out where it has one for all."""
    batch = b.val(heads.node).shape[0]
    b.require(b.equal(b.val(heads.node).shape[1], b.val(table).shape[1]), "the tables have another number of tokens than the tensor")
    if b.equal(b.val(table).shape[0], batch):
        return table
    b.require(b.equal(b.val(table).shape[0], 1), "the tables have another batch than the tensor")
    return b.contiguous(b.emit(aten.expand.default, table, [b.size(heads.node, 0), -1, -1, -1]))


def by_row(b: Builder, node: Node) -> Node:
    """[B, S, N, D] as [B * S, N * D]."""
    sizes = b.val(node).shape
    b.require(all(isinstance(size, int) for size in sizes[2:]), "the number of heads is known at run time only")
    return b.emit(aten.reshape.default, node, [-1, sizes[2] * sizes[3]])


def rows_are_views(b: Builder, node: Node) -> bool:
    """Whether [B, S, N, D] is [B * S, N * D] without a copy: heads lie side by side in a row, and rows at one distance."""
    val = b.val(node)
    if row_major(val):
        return True
    batch, tokens, heads, width = val.shape
    strides = val.stride()
    side_by_side = b.equal(strides[3], 1) and (b.equal(heads, 1) or b.equal(strides[2], width))
    return side_by_side and (b.equal(batch, 1) or b.equal(strides[0], tokens * strides[1]))
