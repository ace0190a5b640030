"""Buffers that are filled slice by slice, as AOT leaves `k = x.new_empty(...); k[..., :n] = a; k[..., n:] = b`: a concatenation.

Functionalisation writes such an assignment as `slice_scatter(buffer, copy(slice(buffer), a))`.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .build import ViewBuilder, handles, meta_of
from .shapes import known_equal, known_ge, normal_dim
from .value import Value


@handles("copy")
def _copy(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """copy(into, source): the source in the shape and type of what it is written into. What is written to an input is left as a write."""
    shape, dtype = meta_of(node)
    if args[0].op == "placeholder":
        return None
    if args[1].meta["val"].device != node.meta["val"].device or dtype is None:
        return None
    source = b.operand(args[1])
    if source.ndim > len(shape):
        return None
    return b.canon.expand(b.canon.cast(source, dtype), shape)


@handles("slice_scatter")
def _slice_scatter(b: ViewBuilder, node: Node, args: list[Any]) -> Value | None:
    """What lies before the slice, the slice, and what lies behind it, one after another."""
    buffer, part, dim, start, stop, step = args
    shape, _ = meta_of(node)
    dim = normal_dim(dim, len(shape))
    x, written = b.operand(buffer), b.operand(part)
    start = 0 if start is None else b.dim(start)
    stop = shape[dim] if stop is None else b.dim(stop)
    stop = shape[dim] if known_ge(stop, shape[dim]) else stop
    inside = known_ge(start, 0) and known_ge(stop, start) and known_ge(shape[dim], stop)
    if step != 1 or not inside or not known_equal(stop - start, written.shape[dim]) or written.dtype != x.dtype:
        return None
    before, after = b.canon.slice(x, dim, 0, start), b.canon.slice(x, dim, stop, shape[dim])
    return b.canon.cat([before, written, after], dim)
