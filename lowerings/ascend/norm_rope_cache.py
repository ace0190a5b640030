"""Norm, rotation and cache write in one launch: npu_kv_rmsnorm_rope_cache_v2 for MLA's latent, npu_qkv_rms_norm_rope_cache for heads.

Both are providers of two cache writes that look at what is written: where one cache gets the RMS norm and the other the rotation of parts
of one projection, or one the rotated norm of its keys and the other its values, the op takes the projection itself. By now norm and
rotation are ops of the table, so what they compute and where they round is known, and their cos and sin lie as the op reads them.

The latent's op takes a cache of each layout that the library has; where that is paged, it also gives back what it wrote, for readers other
than the cache. The op for heads takes fractal caches alone, and gives back nothing but q.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...cache_writes import Absorbed, RowWrite, positions_of
from ...lower import CALLS, Builder, Refused
from ...view.shapes import product, same_shape, to_dim, to_shape
from .cache import writes
from .provide import Npu

aten = torch.ops.aten

_PAGE = 128
_ALIGNMENT = 32  # bytes, of a page's tokens
_LATENT, _ROPE = 512, 64
_RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.clone.default,
        aten.alias.default,
    }
)


@writes("npu::npu_kv_rmsnorm_rope_cache_v2", count=2, rank=-1)
def kv_rmsnorm_rope_cache(b: Builder, group: Sequence[RowWrite], npu: Npu) -> Absorbed:
    """The latent [.., 512 + 64]: the norm of its first part into one cache, the rotation of the rest into the other."""
    latent, rope = _by_op(b, group, "npu_rms_norm", "npu_interleave_rope")
    x, gamma, eps = latent.maker.args[:3]
    rotated, *tables = rope.maker.args
    projection, widths = _side_by_side(b, x, rotated)
    b.require(
        widths == [_LATENT, _ROPE], f"it takes {_LATENT} normed and {_ROPE} rotated channels, the model has {widths[0]} and {widths[1]}"
    )
    cache = _LatentCache.of(b, latent.write)
    is_output_kv = latent.read_elsewhere or rope.read_elsewhere
    b.require(cache.paged or not is_output_kv, "what is written is read elsewhere, and it gives that back for paged caches alone")
    kv, cos, sin = (
        b.contiguous(b.emit(aten.reshape.default, node, [cache.batch, 1, -1, width]))
        for node, width in ((projection, _LATENT + _ROPE), *((table, _ROPE) for table in tables))
    )
    caches = [cache.view(b, write) for write in (rope.write, latent.write)]
    options = {"epsilon": eps, "cache_mode": cache.mode, "is_output_kv": is_output_kv}
    k_rope, c_kv = npu("npu::npu_kv_rmsnorm_rope_cache_v2", kv, gamma, cos, sin, cache.index(b), *caches, **options)
    instead = {latent.result: c_kv, rope.result: k_rope} if is_output_kv else {}
    return _absorbed(b, instead, (latent, rope))


@writes("npu::npu_qkv_rms_norm_rope_cache", count=2, rank=-1)
def qkv_rms_norm_rope_cache(b: Builder, group: Sequence[RowWrite], npu: Npu) -> Absorbed:
    """Heads [T, q + k + v]: norm and rotation of q and k, keys and values into fractal caches."""
    key, value, rotation = _keys_and_values(b, group)
    norms = [norm for before in rotation.before if (norm := _norm(b, before)) is not None]
    b.only_if(len(norms) == 2)
    (q, q_gamma, eps), (k, k_gamma, k_eps) = (norm.args[:3] for norm in norms)
    b.only_if(len(key.write.indices) == 2)  # one sequence a row of the cache: nobody would make that fractal
    b.require(key.write.fractal, "it takes fractal caches [blocks, row / 16, page, 16] only")
    b.require(not key.read_elsewhere and not value.read_elsewhere, "it does not give back keys and values, which are not only written")
    b.require(eps == k_eps, "the norms of q and k have different eps")
    qkv, widths = _side_by_side(b, q, k, value.result)
    size, page = to_dim(b.val(rotation.before[1]).shape[-1]), key.write.indexed[-1]
    rows = b.contiguous(b.emit(aten.reshape.default, qkv, [-1, sum(widths)]))
    tokens = b.val(rows).shape[0]
    b.require(isinstance(tokens, int), "its sizes are part of the launch, and the number of tokens is known at run time only")
    tables = [b.contiguous(b.emit(aten.reshape.default, table, [-1, size])) for table in (rotation.cos, rotation.sin)]
    b.require(all(b.equal(b.val(table).shape[0], tokens) for table in tables), "cos and sin do not have a row a token")
    b.require(b.at_least(key.write.length, tokens), "there may be more tokens to write than the cache has")
    b.require(isinstance(page, int) and page * b.val(rows).element_size() % _ALIGNMENT == 0, f"a page is no multiple of {_ALIGNMENT} bytes")
    q_out = b.emit(aten.empty.memory_format, [tokens, widths[0]], dtype=b.val(rows).dtype, device=b.val(rows).device)
    heads = [width // size for width in widths]
    inputs = (rows, q_gamma, k_gamma, *tables, _positions(b, key.write))
    caches = (key.write.cache, value.write.cache)
    npu("npu::npu_qkv_rms_norm_rope_cache", *inputs, q_out, *caches, [1, tokens, sum(heads), size], heads, epsilon=eps)
    return _absorbed(b, {rotation.q: q_out}, (key, value), rotation.q, *rotation.before)


# -------------------------------------------------------------------- what is written


@dataclass(frozen=True)
class _Written:
    """A write with what it writes, seen through other shapes of it.

    Attributes:
        result: the node that was computed, which the write sees in another shape.
        maker: the call that computed it.
        read_elsewhere: whether something else reads it.
        calls: the semantic calls whose result it is.
    """

    write: RowWrite
    result: Node
    read_elsewhere: bool
    calls: frozenset[str]

    @property
    def maker(self) -> Node:
        first = self.result.target is operator.getitem and self.result.args[1] == 0
        return self.result.args[0] if first else self.result  # type: ignore[return-value]


def _written(b: Builder, write: RowWrite) -> _Written:
    chain = list(shapes_of(b, write.source))
    own = {*chain, write.node}
    read_elsewhere = any(user not in own for node in chain for user in node.users)
    return _Written(write, chain[-1], read_elsewhere, calls_of(chain))


def _by_op(b: Builder, group: Sequence[RowWrite], *names: str) -> list[_Written]:
    """Two writes in the order of the ops that made what they write; any other group is no business of the provider's."""
    b.only_if(len(group) == len(names))
    written = {_name(found.maker): found for found in (_written(b, write) for write in group)}
    b.only_if(set(written) == set(names))
    return [written[name] for name in names]


def _name(node: Node) -> str:
    """The name of an op of torch_npu; empty for any other node."""
    target = node.target
    return target._opname if isinstance(target, torch._ops.OpOverload) and target.namespace == "npu" else ""


def shapes_of(b: Builder, node: Node) -> Iterable[Node]:
    """The node and what it is other shapes of, back to what was computed: all hold the same elements in the same order."""
    yield node
    while isinstance(source := node.args[0] if node.args else None, Node):
        if node.target not in _RESHAPES and not _moves_nothing(b, node, source):
            return
        node = source
        yield node


def _moves_nothing(b: Builder, node: Node, source: Node) -> bool:
    """Whether a transposition leaves the elements in their order: it moves dimensions of one element only."""
    rank = b.val(source).dim() if node.target in (aten.transpose.int, aten.permute.default) else 0
    if rank == 0:
        return False
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        i, j = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
        order[i], order[j] = order[j], order[i]
    sizes = to_shape(b.val(source).shape)
    longer = [dim for dim in order if sizes[dim] != 1]
    return longer == sorted(longer)


def calls_of(nodes: Iterable[Node]) -> frozenset[str]:
    return frozenset().union(*(node.meta.get(CALLS, frozenset()) for node in nodes))


def _absorbed(b: Builder, results: dict[Node, Node], written: Sequence[_Written], *others: Node) -> Absorbed:
    """The op's results in the shapes of what they replace, and the calls whose work it does: of what is written and of other nodes."""
    instead = {old: b.reshape(new, [b.size(old, dim) for dim in range(b.val(old).dim())]) for old, new in results.items()}
    shapes = [shape for node in others for shape in (node, *node.users)]
    return Absorbed(instead, frozenset().union(*(found.calls for found in written)) | calls_of(shapes))


# -------------------------------------------------------------------- parts of a projection


@dataclass(frozen=True)
class _Part:
    """Of a tensor with the rows of tokens, the channels whose index along `dim` is in a range: all that lies behind `dim` is one row.

    Attributes:
        inner: how many channels an index along `dim` stands for.
    """

    source: Node
    dim: int
    start: int
    stop: int
    inner: int

    @property
    def width(self) -> int:
        return (self.stop - self.start) * self.inner

    def before(self, other: _Part) -> bool:
        """Whether the other part follows this one in the same rows."""
        return (self.source, self.dim, self.stop) == (other.source, other.dim, other.start)


def _part(b: Builder, node: Any) -> _Part | None:
    """What a node, seen in another shape, is part of."""
    *_, node = shapes_of(b, node)
    args: tuple[Any, ...] = tuple(node.args)
    if node.target is operator.getitem:
        return _of_split(b, *args)
    if node.target is not aten.slice.Tensor:
        return None
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    source, dim, start, stop, step = (*args, *defaults[len(args) :])
    size = to_dim(b.val(source).shape[dim])
    if step != 1 or not all(isinstance(bound, int) for bound in (size, start or 0, stop or 0)):
        return None
    first, last, _ = slice(start, stop).indices(size)
    return _part_of(b, source, dim, first, last)


def _of_split(b: Builder, split: Node, place: int) -> _Part | None:
    """One of the results of a split."""
    if split.target not in (aten.split_with_sizes.default, aten.split.Tensor):
        return None
    source, dim = split.args[0], split.args[2] if len(split.args) > 2 else 0
    assert isinstance(source, Node)
    assert isinstance(dim, int)
    widths = [to_dim(part.shape[dim]) for part in split.meta["val"]]
    if not all(isinstance(width, int) for width in widths):
        return None
    return _part_of(b, source, dim, sum(widths[:place]), sum(widths[: place + 1]))


def _part_of(b: Builder, source: Node, dim: int, start: int, stop: int) -> _Part | None:
    dim %= b.val(source).dim()
    inner = product(to_shape(b.val(source).shape[dim + 1 :]))
    return _Part(source, dim, start, stop, inner) if isinstance(inner, int) else None


def _side_by_side(b: Builder, *nodes: Any) -> tuple[Node, list[int]]:
    """The channels of nodes that are neighbouring parts of one tensor, as one tensor, and how many each has."""
    parts = [part for node in nodes if (part := _part(b, node)) is not None]
    fits = len(parts) == len(nodes) and all(first.before(second) for first, second in itertools.pairwise(parts))
    b.require(fits, "what it would take as one tensor is not side by side in one")
    first, stop, widths = parts[0], parts[-1].stop, [part.width for part in parts]
    if first.start == 0 and b.equal(b.val(first.source).shape[first.dim], stop):
        return first.source, widths
    return b.emit(aten.slice.Tensor, first.source, first.dim, first.start, stop), widths


# -------------------------------------------------------------------- heads


def _keys_and_values(b: Builder, group: Sequence[RowWrite]) -> tuple[_Written, _Written, _HeadsRotation]:
    """The write of rotated keys, that of values, and the rotation; any other group is no business of the provider's."""
    b.only_if(len(group) == 2)
    first, second = (_written(b, write) for write in group)
    of_first, of_second = (_HeadsRotation.find(b, found.result) for found in (first, second))
    if of_first is not None and of_second is None:
        return first, second, of_first
    if of_second is not None and of_first is None:
        return second, first, of_second
    raise Refused


def _norm(b: Builder, node: Any) -> Node | None:
    """The npu_rms_norm whose result a node is, in another shape."""
    *_, made = shapes_of(b, node)
    norm = made.args[0] if made.target is operator.getitem and made.args[1] == 0 else None
    return norm if isinstance(norm, Node) and _name(norm) == "npu_rms_norm" else None


@dataclass(frozen=True)
class _HeadsRotation:
    """A rotation of q and k in halves, all channels of a head.

    Attributes:
        q: the rotated q.
        before: q and k before it.
    """

    q: Node
    before: tuple[Node, Node]
    cos: Node
    sin: Node

    @staticmethod
    def find(b: Builder, k: Node) -> _HeadsRotation | None:
        """The rotation that `k` is a result of, if q was rotated with it."""
        maker: Any = k.args[0] if k.target is operator.getitem else k
        if _name(maker) == "npu_apply_rotary_pos_emb" and k.args[1] == 1 and maker.args[-1] == "half":
            q = next((user for user in maker.users if user.args[1] == 0), None)
            return None if q is None else _HeadsRotation(q, maker.args[:2], *maker.args[2:4])
        if _name(maker) != "npu_rotary_mul" or maker.args[-1] != "half":
            return None
        x, cos, sin, _ = maker.args
        others = [user for user in cos.users if user is not maker and _name(user) == "npu_rotary_mul" and user.args[1:] == maker.args[1:]]
        queries = [other for other in others if _normed_beside(b, other.args[0], x)]
        return _HeadsRotation(queries[0], (queries[0].args[0], x), cos, sin) if len(queries) == 1 else None


def _normed_beside(b: Builder, q: Any, k: Any) -> bool:
    """Whether both are norms of heads, and those of q lie before those of k in one tensor."""
    norms = [_norm(b, node) for node in (q, k)]
    parts = [None if norm is None else _part(b, norm.args[0]) for norm in norms]
    first, second = parts
    return first is not None and second is not None and first.before(second)


# -------------------------------------------------------------------- caches


def _positions(b: Builder, write: RowWrite) -> Node:
    """The place of each row among all rows of the cache: int64 [tokens]."""
    return b.cast(b.emit(aten.reshape.default, positions_of(b, write), [-1]), torch.int64)


@dataclass(frozen=True)
class _LatentCache:
    """How npu_kv_rmsnorm_rope_cache sees a cache.

    Attributes:
        write: to the cache, or to the other one at the same places.
        mode: its `cache_mode`.
        batch: how many runs of positions there are, 1 for a paged cache: an int, or a node.
        sizes: of a paged cache: blocks and page.
    """

    write: RowWrite
    mode: str
    batch: Any
    sizes: tuple[int, int] | None = None

    @property
    def paged(self) -> bool:
        return self.mode != "Norm"

    @staticmethod
    def of(b: Builder, write: RowWrite) -> _LatentCache:
        """Paged where the cache is, or can be seen so; else each sequence's positions side by side."""
        length, indexed = write.length, write.indexed
        b.require(isinstance(length, int), "the sizes of the cache are symbolic")
        tokens = product(to_shape(b.val(write.indices[0]).shape))
        b.require(b.at_least(length, tokens), "there may be more tokens to write than the cache has")
        if write.prefix != 1:
            b.require(write.dims[0] > 0 and same_shape((write.prefix,), write.sizes[:1]), "the cache has several heads")
            return _LatentCache(write, "Norm", b.size(write.cache, 0))
        blocks, page = indexed if len(indexed) == 2 else (length // _PAGE, _PAGE)
        if blocks * page == length and page * b.val(write.cache).element_size() % _ALIGNMENT == 0:
            return _LatentCache(write, "PA_NZ" if write.fractal else "PA_BNSD", 1, (blocks, page))
        b.require(not write.fractal, f"a page is no multiple of {_ALIGNMENT} bytes")
        return _LatentCache(write, "Norm", 1)

    def view(self, b: Builder, write: RowWrite) -> Node:
        """The cache of a write as the op takes it; of the fractal layout it is told by the mode, not by the shape."""
        lead = [*self.sizes, 1] if self.sizes is not None else [self.batch, 1, write.length]
        return b.emit(aten.view.default, write.cache, [*lead, write.row])

    def index(self, b: Builder) -> Node:
        """The places of the tokens: [tokens] for a paged cache, else [batch, tokens]."""
        positions = _positions(b, self.write)
        if self.paged:
            return positions
        row = b.emit(aten.unsqueeze.default, positions, 0)
        if isinstance(self.batch, int) and self.batch == 1:
            return row
        return b.contiguous(b.emit(aten.expand.default, row, [self.batch, -1]))
