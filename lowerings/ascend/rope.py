"""Rotary embeddings on Ascend: rotary, qk_norm_rotary, qkv_norm_rotary.

Ways to rotate, best first:

- `npu_apply_rotary_pos_emb`: q and k in one launch, where they are. It writes over its inputs, though its schema does not say so: only
  tensors that nobody else reads are given to it.
- `npu_mrope`: q and k in one launch, also their leading channels alone, and rows of a merged projection; where the model's tables have
  one entry a pair. Its positions are the rows of a table made of the model's own.
- `npu_rotary_mul`: one launch a tensor, tables of any kind.
- `npu_interleave_rope`: one launch a tensor, for neighbouring channels in and halves out (DeepSeek).

The norms of q and k are launches of their own, but in `split_qkv_rmsnorm_rope` of sgl-kernel-npu, which does all from a merged projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from ...layout import memory_of, only_reader, row_major
from ...lower import Arguments, Builder
from ..rope_tables import (
    Heads,
    Rotation,
    as_heads,
    by_row,
    compute_dtype,
    halved,
    padded,
    per_channel,
    rows_are_views,
    tables_of,
    with_batch,
)
from . import sgl
from .provide import Npu, keeps_rounding, provides
from .table import ascend_ops

aten = torch.ops.aten

Rotate = Callable[[Builder, Npu, Sequence[Node], Rotation, Sequence[torch.dtype]], list[Node]]
"""Emits the rotation of tensors, each into a dtype of its own."""

_HALVES = (torch.float16, torch.bfloat16)
_MODES = {"half": "half", "interleaved": "interleave"}
_MOST_BATCHES = 999  # of npu_rotary_mul, where tables have one batch for all


# -------------------------------------------------------------------- ways to rotate


def _rotates(ascend_op: str, *, rank: int, name: str | None = None) -> Callable[[Rotate], Rotate]:
    """Register a way to rotate: by itself for `rotary`, and beside the norms of q and k for the others."""
    shown = name or ascend_ops()[ascend_op].shown

    def declare(rotate: Rotate) -> Rotate:
        @provides("rotary", ascend_op, rank=rank, name=shown)
        def rotary(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
            return rotate(b, npu, a.xs, Rotation.of(a), [a.out_dtype or b.val(x).dtype for x in a.xs])

        @provides("qk_norm_rotary", ascend_op, rank=rank, name=f"norms + {shown}", launches=3)
        def qk_norm_rotary(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
            xs = [b.transpose(x, 1, 2) if a.heads_first else x for x in (a.q, a.k)]
            return _normed_and_rotated(b, npu, xs, a, rotate, norm_last=a.norm_last)

        @provides("qkv_norm_rotary", ascend_op, rank=rank, name=f"split + {shown}", launches=4)
        def qkv_norm_rotary(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
            q, k, v = _split(b, a)
            if a.norm:
                q, k = _normed_and_rotated(b, npu, [q, k], a, rotate, norm_last=False)
            else:
                a.eps  # noqa: B018  without meaning there
                q, k = rotate(b, npu, [q, k], Rotation.of(a), [b.val(a.qkv).dtype] * 2)
            return [q, k, b.transpose(b.contiguous(b.transpose(v, 1, 2)), 1, 2)]

        return rotate

    return declare


@_rotates("npu::npu_apply_rotary_pos_emb", rank=0)
def apply_rotary_pos_emb(b: Builder, npu: Npu, xs: Sequence[Node], r: Rotation, dtypes: Sequence[torch.dtype]) -> list[Node]:
    """q and k in one launch, written over them."""
    b.only_if(len(xs) == 2 and r.layout in _MODES)
    width = r.width(b, xs[0])
    b.require(all(b.equal(b.val(x).shape[-1], width) for x in xs), "it rotates all channels, the model the leading ones")
    dtype = compute_dtype(b, xs, r)
    if dtype == torch.float16:
        keeps_rounding(b, torch.float16, None, "each product")
    q, k = (as_heads(b, x, r) for x in xs)
    cos, sin = (with_batch(b, per_channel(b, table, width, r.layout), q) for table in tables_of(b, r, q, dtype))
    query, key = b.cast(q.node, dtype), b.cast(k.node, dtype)
    b.require(all(row_major(b.val(x)) for x in (query, key)), "q and k do not lie token by token: it would copy them")
    own = memory_of(query) is not memory_of(key) and all(only_reader(x, b.node) for x in (query, key))
    b.require(own, "it writes over q and k, which are read elsewhere, or not made in this graph")
    rotated = npu("npu::npu_apply_rotary_pos_emb", query, key, cos, sin, "BSND", _MODES[r.layout])
    b.forget(query, key)
    return [b.cast(heads.restored(b, y), out) for heads, y, out in zip((q, k), rotated, dtypes, strict=True)]


@_rotates("npu::npu_mrope", rank=1)
def mrope(b: Builder, npu: Npu, xs: Sequence[Node], r: Rotation, dtypes: Sequence[torch.dtype]) -> list[Node]:
    """q and k in one launch, by rows of a table that is made of cos and sin."""
    b.only_if(len(xs) == 2 and r.layout in _MODES)
    width = r.width(b, xs[0])
    r = halved(b, r, width)
    b.require(r.per_pair(b, width), "it takes one entry a pair of channels, the model's tables have one a channel")
    dtype = compute_dtype(b, xs, r)
    q, k = (as_heads(b, x, r) for x in xs)
    head_size = b.val(q.node).shape[-1]
    b.require(b.equal(b.val(k.node).shape[-1], head_size), "heads of q and k differ in size")
    query, key = b.cast(q.node, dtype), b.cast(k.node, dtype)
    b.require(all(rows_are_views(b, x) for x in (query, key)), "q and k do not lie token by token: it would copy them")
    table = b.emit(aten.cat.default, list(tables_of(b, r, q, dtype)), -1)
    rows = by_row(b, table)
    args = (_positions(b, rows, table, q), by_row(b, query), by_row(b, key), rows, head_size)
    rotated = npu("npu::npu_mrope", *args, rotary_mode=_MODES[r.layout])
    results = []
    for heads, y, out in zip((q, k), rotated, dtypes, strict=True):
        results.append(b.cast(heads.restored(b, b.reshape(y, [b.size(heads.node, dim) for dim in range(4)])), out))
    return results


def _positions(b: Builder, rows: Node, table: Node, heads: Heads) -> Node:
    """The row of the table for each token of the tensor [B, S, N, D]."""
    batch, tokens = b.val(heads.node).shape[:2]
    b.require(b.equal(b.val(table).shape[1], tokens), "the tables have another number of tokens than the tensor")
    repeats = not b.equal(b.val(table).shape[0], batch)
    b.require(not repeats or b.equal(b.val(table).shape[0], 1), "the tables have another batch than the tensor")
    device, count = b.val(heads.node).device, b.size(rows, 0)
    if isinstance(count, int) and isinstance(batch, int):
        times = batch if repeats else 1
        return b.constant(("positions", count, times, device), lambda: torch.arange(count, device=device).repeat(times))
    positions = b.emit(aten.arange.default, count, dtype=torch.int64, device=device)
    if not repeats:
        return positions
    return b.reshape(b.emit(aten.expand.default, positions, [b.size(heads.node, 0), -1]), [-1])


@_rotates("npu::npu_rotary_mul", rank=2)
def rotary_mul(b: Builder, npu: Npu, xs: Sequence[Node], r: Rotation, dtypes: Sequence[torch.dtype]) -> list[Node]:
    """Each tensor in one launch; the leading channels alone in one where they are pairs of neighbours, else between a slice and a cat."""
    b.only_if(r.layout in _MODES)
    dtype = compute_dtype(b, xs, r)

    def rotate(heads: Heads, node: Node) -> Node:
        width, size = r.width(b, xs[0]), int(b.val(node).shape[-1])
        cos, sin = (per_channel(b, table, width, r.layout) for table in tables_of(b, r, heads, dtype))
        return _rotary_mul(b, npu, heads, b.cast(node, dtype), padded(b, cos, size, 1.0), padded(b, sin, size, 0.0), _MODES[r.layout])

    return [_leading(b, x, r, out, rotate, whole=r.layout == "interleaved") for x, out in zip(xs, dtypes, strict=True)]


def _leading(b: Builder, x: Node, r: Rotation, out: torch.dtype, rotate: Callable[[Heads, Node], Node], *, whole: bool = False) -> Node:
    """The tensor with its leading channels rotated by `rotate`, which takes the others too where `whole`."""
    heads, width = as_heads(b, x, r), r.width(b, x)
    size = b.val(x).shape[-1]
    if whole or b.equal(size, width):
        return b.cast(heads.restored(b, rotate(heads, heads.node)), out)
    first, rest = b.emit(aten.slice.Tensor, heads.node, 3, 0, width), b.emit(aten.slice.Tensor, heads.node, 3, width, size)
    y = b.emit(aten.cat.default, [b.cast(rotate(heads, first), out), b.cast(rest, out)], -1)
    return heads.restored(b, y)


def _rotary_mul(b: Builder, npu: Npu, heads: Heads, x: Node, cos: Node, sin: Node, mode: str) -> Node:
    """x [B, S, N, D] by tables [B or 1, S, 1, D], in that layout in which nothing is copied."""
    batch, _, count, width = b.val(x).shape
    shared = not b.equal(b.val(cos).shape[0], batch)
    sizes = [b.size(x, dim) for dim in range(4)]
    static = isinstance(batch, int) and batch <= _MOST_BATCHES
    first = b.transpose(x, 1, 2)
    if static and not row_major(b.val(x)) and row_major(b.val(first)) and (shared or mode == "half" or batch == 1):
        moved = [b.reshape(table, [b.size(table, 0), 1, sizes[1], width]) for table in (cos, sin)]
        return b.transpose(npu("npu::npu_rotary_mul", first, *moved, mode), 1, 2)
    if static and shared:
        return npu("npu::npu_rotary_mul", x, cos, sin, mode)  # type: ignore[no-any-return]
    rows = [b.emit(aten.reshape.default, with_batch(b, table, heads), [-1, 1, 1, width]) for table in (cos, sin)]
    y = npu("npu::npu_rotary_mul", b.emit(aten.reshape.default, x, [-1, 1, count, width]), *rows, mode)
    return b.reshape(y, sizes)


@_rotates("npu::npu_interleave_rope", rank=0)
def interleave_rope(b: Builder, npu: Npu, xs: Sequence[Node], r: Rotation, dtypes: Sequence[torch.dtype]) -> list[Node]:
    """Each tensor in one launch, pairs of neighbours in and halves out."""
    b.only_if(r.layout == "mla")
    dtype = compute_dtype(b, xs, r)

    def rotate(heads: Heads, node: Node) -> Node:
        count, width = b.val(node).shape[2:]
        cos, sin = (with_batch(b, per_channel(b, table, width, r.layout), heads) for table in tables_of(b, r, heads, dtype))
        rows = [b.contiguous(b.emit(aten.reshape.default, table, [-1, 1, 1, width])) for table in (cos, sin)]
        x = b.contiguous(b.emit(aten.reshape.default, b.cast(node, dtype), [-1, count, 1, width]))
        return b.reshape(npu("npu::npu_interleave_rope", x, *rows), [b.size(node, dim) for dim in range(4)])

    return [_leading(b, x, r, out, rotate) for x, out in zip(xs, dtypes, strict=True)]


@_rotates("npu::npu_rotary_mul", rank=2, name="aten.permute + npu.npu_rotary_mul")
def deinterleaved_rotary_mul(b: Builder, npu: Npu, xs: Sequence[Node], r: Rotation, dtypes: Sequence[torch.dtype]) -> list[Node]:
    """Pairs of neighbours moved apart, then one launch a tensor."""
    b.only_if(r.layout == "mla")
    dtype = compute_dtype(b, xs, r)

    def rotate(heads: Heads, node: Node) -> Node:
        sizes, width = [b.size(node, dim) for dim in range(4)], int(b.val(node).shape[-1])
        pairs = b.reshape(b.cast(node, dtype), [*sizes[:3], width // 2, 2])
        halves = b.reshape(b.contiguous(b.transpose(pairs, 3, 4)), sizes)
        cos, sin = (per_channel(b, table, width, r.layout) for table in tables_of(b, r, heads, dtype))
        return _rotary_mul(b, npu, heads, halves, cos, sin, "half")

    return [_leading(b, x, r, out, rotate) for x, out in zip(xs, dtypes, strict=True)]


# -------------------------------------------------------------------- with norms


def _normed_and_rotated(b: Builder, npu: Npu, xs: Sequence[Node], a: Arguments, rotate: Rotate, *, norm_last: bool) -> list[Node]:
    weights, r, dtypes = (a.q_weight, a.k_weight), Rotation.of(a), [b.val(x).dtype for x in xs]
    if norm_last:
        return [_normed(b, npu, y, weight, a) for y, weight in zip(rotate(b, npu, xs, r, dtypes), weights, strict=True)]
    return rotate(b, npu, [_normed(b, npu, x, weight, a) for x, weight in zip(xs, weights, strict=True)], r, dtypes)


def _normed(b: Builder, npu: Npu, x: Node, weight: Node | None, a: Arguments) -> Node:
    """The RMS norm of heads; of what was moved heads first, as it lay before: the op would copy it, and its result not lie by tokens."""
    if b.val(x).dim() == 4 and not row_major(b.val(x)) and x.target is aten.transpose.int:
        moved = b.transpose(x, 1, 2)
        if row_major(b.val(moved)) or moved.target is not aten.transpose.int:
            return b.transpose(_head_norm(b, npu, moved, weight, a), 1, 2)
    return _head_norm(b, npu, x, weight, a)


def _head_norm(b: Builder, npu: Npu, x: Node, weight: Node | None, a: Arguments) -> Node:
    dtype, size = b.val(x).dtype, b.val(x).shape[-1]
    b.require(isinstance(size, int), "the size of heads is known at run time only")
    _keeps_rounding_before_weight(b, a, weight)
    if weight is None:
        weight = _ones(b, x, size)
    elif a.weight_offset and b.val(weight).dtype == dtype:
        y, _ = npu("npu::npu_gemma_rms_norm", x, weight, a.eps)
        return y  # type: ignore[no-any-return]
    elif a.weight_offset:
        weight = b.emit(aten.add.Tensor, b.cast(weight, torch.float32), 1)
    elif dtype == torch.float32:
        weight = b.cast(weight, dtype)
    y, _ = npu("npu::npu_rms_norm", x, weight, a.eps)
    return y  # type: ignore[no-any-return]


def _ones(b: Builder, x: Node, size: int) -> Node:
    """The weight of a norm without one, in the dtype of x."""
    dtype, device = b.val(x).dtype, b.val(x).device
    return b.constant(("filled", size, 1.0, dtype, device), lambda: torch.ones(size, dtype=dtype, device=device))


def _keeps_rounding_before_weight(b: Builder, a: Arguments, weight: Node | None) -> None:
    rounds = a.round_dtype if weight is not None and a.round_dtype in _HALVES else None
    keeps_rounding(b, None, rounds, "the normalised heads before the weight")


# -------------------------------------------------------------------- from a merged projection


def _split(b: Builder, a: Arguments) -> list[Node]:
    """q, k and v, [B, N, S, D], as views of the projection."""
    parts, start = [], 0
    batch, tokens = b.size(a.qkv, 0), b.size(a.qkv, 1)
    for heads in (a.num_heads, a.num_kv_heads, a.num_kv_heads):
        stop = start + heads * a.head_dim
        part = b.emit(aten.slice.Tensor, a.qkv, 2, start, stop)
        parts.append(b.transpose(b.reshape(part, [batch, tokens, heads, a.head_dim]), 1, 2))
        start = stop
    return parts


@provides("qkv_norm_rotary", "npu_fusion_sgl::split_qkv_rmsnorm_rope", rank=-1, available=sgl.available)
def split_qkv_rmsnorm_rope(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
    """The split, both norms and both rotations in one launch."""
    sgl.require(b)
    r, q = Rotation.of(a), _split(b, a)[0]
    width, heads = r.width(b, q), as_heads(b, q, r)
    b.require(r.layout in _MODES, "it has no layout with neighbours in and halves out")
    b.require(r.layout == "half" or r.per_pair(b, width), "it takes one entry a pair of neighbours, the model's tables have one a channel")
    b.require(a.num_heads % a.num_kv_heads == 0, "the number of query heads is no multiple of that of key heads")
    cos, sin = (_rows(b, per_channel(b, table, width, "half"), heads) for table in tables_of(b, r, heads, None))
    sizes = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    x = b.contiguous(b.emit(aten.reshape.default, a.qkv, [-1, sizes[0] + 2 * sizes[1]]))
    args = (x, sin, cos, *sizes, a.head_dim, *_norms(b, a))
    results = npu("npu_fusion_sgl::split_qkv_rmsnorm_rope", *args, is_neox_style=r.layout == "half")
    batch, tokens = b.size(a.qkv, 0), b.size(a.qkv, 1)
    return [b.transpose(b.reshape(y, [batch, tokens, -1, a.head_dim]), 1, 2) for y in results]


def _rows(b: Builder, table: Node, heads: Heads) -> Node:
    """A table [B or 1, S, 1, R] as one row a token."""
    return b.contiguous(b.emit(aten.reshape.default, with_batch(b, table, heads), [-1, b.val(table).shape[-1]]))


def _norms(b: Builder, a: Arguments) -> tuple[float | None, Node | None, Node | None]:
    """eps and the weights of q and k; None where the model has no norms."""
    if not a.norm:
        a.eps  # noqa: B018  without meaning there
        return None, None, None
    dtype = b.val(a.qkv).dtype
    keeps_rounding(b, None, dtype if dtype in _HALVES else None, "the normalised heads before the rotation")
    _keeps_rounding_before_weight(b, a, a.q_weight)
    weights = []
    for weight in (a.q_weight, a.k_weight):
        if weight is None:
            weight = _ones(b, a.qkv, a.head_dim)
        elif a.weight_offset:
            weight = b.emit(aten.add.Tensor, b.cast(weight, torch.float32), 1)
        weights.append(weight)
    return a.eps, weights[0], weights[1]
