"""Writes into caches on Ascend: `npu_scatter_pa_kv_cache` for keys and values at once, `npu_scatter_nd_update_` for one tensor.

Both see a contiguous cache as rows [slots, row], of which some are overwritten: nothing else of the cache is read or written. ATen's own
index_copy_ along a dimension other than the first transposes the whole cache there and back (ops-nn index/scatter_update op_api), and
index_put_ sorts its indices, or falls back to the host, for some shapes (index/index_put_v2 op_api). `scatter_update_` is not used: its
host code copies the whole cache once (index/scatter op_api).

The slot numbers are int32, which the paged op's kernel reads whatever it is given. Where a layer has a counter of its own, as transformers'
static cache has, they are one addition; where all layers share their positions they are computed once a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ...cache_writes import Absorbed, RowWrite, WriteProvider, is_scalar, positions_of, register_write_provider
from ...config import TARGETS
from ...lower import Builder
from ...view.shapes import product, to_shape
from . import library
from .provide import Npu
from .table import ascend_ops

aten = torch.ops.aten
_LARGEST = 2**31 - 1

Lowering = Callable[[Builder, Sequence[RowWrite], Npu], Absorbed | None]


def writes(ascend_op: str, *, count: int = 1, rank: int = 0) -> Callable[[Lowering], Lowering]:
    """Register a function as the provider of cache writes that is named after an op of the table.

    Args:
        ascend_op: qualified name of the op.
        count, rank: as in `WriteProvider`.
    """
    row = ascend_ops()[ascend_op]

    def declare(function: Lowering) -> Lowering:
        def lower(builder: Builder, group: Sequence[RowWrite]) -> Absorbed | None:
            library.prepare(emulate=builder.config.emulate)
            return function(builder, group, Npu(builder))

        targets = tuple(target for target in TARGETS if target in row.targets)
        register_write_provider(WriteProvider(row.shown, targets, lower, count, rank))
        return function

    return declare


@writes("npu::npu_scatter_pa_kv_cache", count=2)
def scatter_pa_kv_cache(b: Builder, group: Sequence[RowWrite], npu: Npu) -> None:
    """Keys and values in one launch: the cache as pages [prefix, length, 1, row], each row a token of one head; a fractal one as it is."""
    b.require(len(group) == 2, "there is no second cache that is written at the same places")
    key, value = group
    slots = slots_of(b, key)
    tokens = b.val(slots).shape[0]
    for write in group:
        b.require(b.at_least(product((write.prefix, write.length)), tokens), "there may be more rows to write than the cache has")
    rows = [b.contiguous(b.reshape(write.source, [b.size(slots, 0), 1, write.row])) for write in (key, value)]
    if key.fractal:
        npu("npu::npu_scatter_pa_kv_cache", *rows, key.cache, value.cache, slots, cache_mode="PA_NZ")
        return
    runs = key.prefix if isinstance(key.prefix, int) else -1
    caches = [b.emit(aten.view.default, write.cache, [runs, write.length, 1, write.row]) for write in (key, value)]
    npu("npu::npu_scatter_pa_kv_cache", *rows, *caches, slots, cache_mode="Norm")


@writes("npu::npu_scatter_nd_update_")
def scatter_nd_update(b: Builder, group: Sequence[RowWrite], npu: Npu) -> None:
    """One tensor in one launch: the cache as rows [slots, row]."""
    (write,) = group
    b.require(not write.fractal, "the rows of the cache lie in pieces")
    slots = slots_of(b, write)
    count = b.size(slots, 0)
    indices = b.emit(aten.view.default, slots, [count, 1])
    cache = b.emit(aten.view.default, write.cache, [-1, write.row])
    npu("npu::npu_scatter_nd_update_", cache, indices, b.contiguous(b.reshape(write.source, [count, write.row])))


# -------------------------------------------------------------------- slots


def slots_of(b: Builder, write: RowWrite) -> Node:
    """For each row that is written its place among all rows of the cache: int32 [prefix * positions]."""
    prefix, length = write.prefix, write.length
    b.require(isinstance(length, int) and isinstance(write.row, int), "the sizes of the cache are symbolic")
    b.require(b.at_least(_LARGEST, product((prefix, length))), f"the cache is not known to have at most {_LARGEST} rows")
    position = positions_of(b, write)
    counted = _counted(b, position) if not write.wraps else None
    if counted is not None and isinstance(prefix, int):
        offsets, start = counted
        return b.emit(aten.add.Tensor, _table(b, write, offsets), start)
    count = product(to_shape(b.val(position).shape))
    if isinstance(count, int) and count == 1:
        # A tensor without dimensions does not widen the table's int32.
        return b.emit(aten.add.Tensor, _bases(b, write), b.emit(aten.view.default, position, []))
    flat = b.cast(b.emit(aten.reshape.default, position, [-1]), torch.int32)
    if isinstance(prefix, int) and prefix == 1:
        return flat
    grid = b.emit(aten.add.Tensor, b.emit(aten.unsqueeze.default, _bases(b, write), 1), flat)
    return b.emit(aten.view.default, grid, [-1])


def _counted(b: Builder, position: Node) -> tuple[Node, Node] | None:
    """Positions that are a count, known now, from a start that is known at run time: both."""
    if position.target is not aten.add.Tensor or position.kwargs or len(position.args) != 2:
        return None
    for offsets, start in (position.args, position.args[::-1]):
        if isinstance(offsets, Node) and isinstance(start, Node) and is_scalar(start) and _known(b, offsets):
            return offsets, start
    return None


_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def _known(b: Builder, node: Node) -> bool:
    """Whether a node is a range or a constant of the graph, of one dimension."""
    if b.val(node).dim() != 1 or not isinstance(b.val(node).shape[0], int):
        return False
    if node.op == "get_attr":
        return all(isinstance(user.target, OpOverload) and not user.target._schema.is_mutable for user in node.users)
    return node.target in _RANGES and all(isinstance(arg, int) for arg in node.args)


def _table(b: Builder, write: RowWrite, offsets: Node) -> Node:
    """The slots of a write that starts at position 0, as a constant of the graph."""
    prefix, length, device = write.prefix, write.length, b.val(write.cache).device

    def make() -> Tensor:
        if offsets.op == "get_attr":
            along = getattr(b.gm, str(offsets.target)).to(torch.int32)
        else:
            along = offsets.target(*offsets.args, dtype=torch.int32, device=device)  # type: ignore[operator]
        slots: Tensor = torch.arange(prefix, dtype=torch.int32, device=device)[:, None] * length + along
        return slots.reshape(-1)

    return b.constant(("slots", offsets.target, offsets.args, prefix, length, device), make)


def _bases(b: Builder, write: RowWrite) -> Node:
    """The first slot of each run of rows: int32 [prefix]."""
    prefix, length, device = write.prefix, write.length, b.val(write.cache).device
    if isinstance(prefix, int):
        return b.constant(("slots", prefix, length, device), lambda: torch.arange(prefix, dtype=torch.int32, device=device) * length)
    count = b.size(write.cache, 0)
    for dim in range(1, write.dims[0]):
        count = b.emit(aten.mul.Scalar, count, b.size(write.cache, dim))
    bases = b.emit(aten.arange.default, count, dtype=torch.int32, device=device)
    return b.emit(aten.mul.Tensor, bases, length)
