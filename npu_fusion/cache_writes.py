"""How in-place writes of rows run on a target, above all keys and values into caches.

Re-inplacing leaves `index_copy_` and `index_put_` of ATen. One launch each to look at, they may be anything inside: on Ascend an
index_copy_ along a dimension other than the first transposes the whole cache twice. So a target may have ops of its own for them. A
`WriteProvider` emits such an op in place of one write, or of two that fill the same places of two caches, as the keys and values of a layer
do; or refuses and says why. What no provider takes stays ATen's op, as does every other in-place op: a `copy_` into a slice is what it
looks like.

Two writes become one at the place of the second. That is sound if nothing between them reads or writes the first one's cache, through
whatever view, and if the two caches do not overlap.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from .aliases import READS_METADATA, AliasClasses, is_view
from .config import FusionConfig
from .layout import row_major
from .lower import CALLS, Builder, Refused
from .record import GraphRecord, Site
from .torch_private import fake_mode_of
from .view.shapes import known_equal, product, same_shape, size_facts, to_dim, to_shape
from .view.value import Dim, Shape

log = logging.getLogger(__name__)

aten = torch.ops.aten
_INDICES = (torch.int32, torch.int64)
_COPIES = (aten.reshape.default, aten.clone.default)


@dataclass(frozen=True)
class RowWrite:
    """An in-place write of whole rows: `cache`, seen as [prefix, length, row], gets `source` [prefix, positions, row] at its positions.

    A fractal cache [blocks, row / n, page, n] has no prefix and lengths `blocks * page`; a row lies in it in pieces of n elements, and
    `source` is [positions, row / n, n].

    Attributes:
        node: the in-place op, whose result is the cache.
        dims: the indexed dimensions, side by side unless the cache is fractal.
        wraps: whether negative indices count from the end; otherwise there are none.
    """

    node: Node
    dims: tuple[int, ...]
    wraps: bool

    @property
    def fractal(self) -> bool:
        """Whether the rows of the cache lie in pieces, those of one page interleaved."""
        return self.dims != tuple(range(self.dims[0], self.dims[-1] + 1))

    @property
    def cache(self) -> Node:
        """The contiguous tensor that is written."""
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def source(self) -> Node:
        """What is written, in the cache's dtype: its shape has those of the positions in place of the indexed dimensions."""
        return self.node.args[2 if self.wraps else 3]  # type: ignore[return-value]

    @property
    def indices(self) -> tuple[Node, ...]:
        """An index tensor for each indexed dimension, all of one shape; together they are the positions."""
        given = self.node.args[1] if self.wraps else self.node.args[2:3]
        return tuple(index for index in given if index is not None)  # type: ignore[union-attr, misc]

    @property
    def sizes(self) -> Shape:
        """The cache's sizes."""
        return to_shape(self.cache.meta["val"].shape)

    @property
    def indexed(self) -> Shape:
        """The sizes of the indexed dimensions."""
        return tuple(self.sizes[dim] for dim in self.dims)

    @property
    def prefix(self) -> Dim:
        return product(self.sizes[: self.dims[0]])

    @property
    def length(self) -> Dim:
        return product(self.indexed)

    @property
    def row(self) -> Dim:
        return product(size for dim, size in enumerate(self.sizes) if dim > self.dims[0] and dim not in self.dims)

    def same_places(self, other: RowWrite) -> bool:
        """Whether the two writes fill the same places of their caches, whatever the rows are."""
        if self.indices != other.indices or self.wraps != other.wraps or self.fractal != other.fractal:
            return False
        return same_shape(self.indexed, other.indexed) and known_equal(self.prefix, other.prefix)


@dataclass(frozen=True)
class Absorbed:
    """What an op that writes computes besides, in place of nodes that stood before it.

    Attributes:
        instead: nodes to the op's results that take their place.
        calls: names of the semantic calls whose work it does.
    """

    instead: dict[Node, Node] = field(default_factory=dict)
    calls: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class WriteProvider:
    """One way to run `count` writes to the same places on a target.

    Args:
        name: what the report shows.
        targets: targets on which it exists.
        lower: emits the op that writes, and returns what else that op computes, if anything; raises `Refused`, by `builder.refuse` or
            `builder.require`, for writes that it cannot take.
        count: how many writes it takes at once; it is also tried with one that has no partner.
        rank: of providers with one count those of lower rank are tried first; those that take more writes come before them.
    """

    name: str
    targets: tuple[str, ...]
    lower: Callable[[Builder, Sequence[RowWrite]], Absorbed | None]
    count: int = 1
    rank: int = 0


_PROVIDERS: list[WriteProvider] = []


def register_write_provider(*providers: WriteProvider) -> None:
    """Add providers; what lowerings/ do when they are imported."""
    _PROVIDERS.extend(providers)


def lower_writes(gm: GraphModule, config: FusionConfig, record: GraphRecord) -> int:
    """Let the target's own ops do the in-place writes of a re-inplaced graph, in place. Returns how many writes they took.

    Fills `lowered_to` of the record's sites, and `reason` where a better provider had to be passed over.
    """
    providers = sorted((p for p in _PROVIDERS if config.target in p.targets), key=lambda p: (-p.count, p.rank))
    if not providers:
        return 0
    mode = fake_mode_of(gm)
    with size_facts(None if mode is None else mode.shape_env):
        writes = _Writes(gm, config, record)
        chosen = writes.lower(providers)
    for i, site in enumerate(record.sites):
        if site.idiom == "kv_update" and site.call in chosen:
            name, reason = chosen[site.call]
            record.sites[i] = dataclasses.replace(site, lowered_to=name or site.lowered_to, reason=reason)
        elif site.call in writes.absorbed:
            record.sites[i] = dataclasses.replace(site, lowered_to=writes.runs_as(site), reason=None)
    gm.graph.lint()
    gm.recompile()
    return sum(name is not None for name, _ in chosen.values())


@dataclass(frozen=True)
class _Change:
    """That a node writes to memory: where in the graph, and the node that owns the memory."""

    writer: Node
    place: int
    owner: Node


class _Writes:
    """The writes of one graph on their way to a target's ops."""

    def __init__(self, gm: GraphModule, config: FusionConfig, record: GraphRecord) -> None:
        self.graph = gm.graph
        self.builder = Builder(gm, config, record.dry_run)
        self.record = record
        self.aliases = AliasClasses(gm.graph)
        self.place = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.reasons: dict[Node, list[str]] = {}
        self.absorbed: dict[str, str] = {}  # semantic call's name to the provider that does its work with a write
        self.mutated = [change for node in gm.graph.nodes for change in self._changes(node)]

    def _changes(self, node: Node) -> Iterable[_Change]:
        """The memory that a node's schema says it writes to."""
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            for i, argument in enumerate(node.target._schema.arguments):
                value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                if argument.is_write and isinstance(value, Node):
                    yield _Change(node, self.place[node], self.aliases.root(value))

    def lower(self, providers: Sequence[WriteProvider]) -> dict[str, tuple[str | None, str | None]]:
        """In-place node's name to the provider taken, None for ATen's own op, and to why those before it were not."""
        chosen: dict[str, tuple[str | None, str | None]] = {}
        writes: list[RowWrite] = []
        for node in self.graph.nodes:
            write = row_write(node)
            if isinstance(write, RowWrite):
                writes.append(write)
            elif write is not None:
                chosen[node.name] = (None, f"{providers[-1].name}: {write}")
        while writes:
            group, name = self._lower_first(writes, providers)
            writes = [write for write in writes if write not in group]
            for write in group:
                chosen[write.node.name] = (name, "; ".join(self.reasons.get(write.node, ())) or None)
        return chosen

    def runs_as(self, site: Site) -> str:
        """What does the work of a semantic call that a write absorbed, or a part of which it absorbed."""
        assert site.call is not None
        partly = any(site.call in node.meta.get(CALLS, ()) for node in self.graph.nodes)
        return f"{site.lowered_to} + {self.absorbed[site.call]}" if partly else self.absorbed[site.call]

    def _lower_first(self, writes: list[RowWrite], providers: Sequence[WriteProvider]) -> tuple[list[RowWrite], str | None]:
        """Lower the first write, with the one that belongs to it where an op takes both; the writes that are done and how."""
        first = writes[0]
        partner = next((other for other in writes[1:] if self._joins(first, other)), None)
        for provider in providers:
            group = [first, partner][: provider.count]
            members = [write for write in group if write is not None]
            if (reason := self._try(provider, members)) is None:
                return members, provider.name
            if reason:
                self._pass_over(provider, members, reason)
        return [first], None

    def _pass_over(self, provider: WriteProvider, members: Sequence[RowWrite], reason: str) -> None:
        for write in members:
            reasons = self.reasons.setdefault(write.node, [])
            if not any(known.startswith(f"{provider.name}: ") for known in reasons):
                reasons.append(f"{provider.name}: {reason}")

    def _joins(self, first: RowWrite, second: RowWrite) -> bool:
        """Whether the first write may wait for the second, to the same places of another cache."""
        return first.same_places(second) and self._apart(first.cache, second.cache) and not self._touched(first, second)

    def _apart(self, one: Node, other: Node) -> bool:
        """Whether two caches surely share no memory: they have different owners, or are different parts along a dimension of one tensor."""
        if self.aliases.root(one) is not self.aliases.root(other):
            return True
        one, other = _unviewed(one), _unviewed(other)
        if one.target is not aten.select.int or other.target is not aten.select.int or one.args[:2] != other.args[:2]:
            return False
        picked = (one.args[2], other.args[2])
        return all(isinstance(index, int) and index >= 0 for index in picked) and picked[0] != picked[1]

    def _touched(self, first: RowWrite, second: RowWrite) -> bool:
        """Whether something between two writes reads or writes the first one's cache."""
        since, until, owner = self.place[first.node], self.place[second.node], self.aliases.root(first.cache)
        if any(since < change.place < until and change.owner is owner for change in self.mutated):
            return True
        users = {user for member in self.aliases.members([owner]) for user in member.users}
        between = (user for user in users if since < self.place.get(user, until) < until)
        return any(user.target not in READS_METADATA and not is_view(user) for user in between)

    def _try(self, provider: WriteProvider, writes: Sequence[RowWrite]) -> str | None:
        """Replace the writes by what the provider emits at the last one's place; why it does not take them, or None."""
        last = writes[-1].node
        self.builder.begin(last)
        try:
            absorbed = provider.lower(self.builder, writes) or Absorbed()
            self._require_unchanged(writes)
            late = self._sinking(absorbed.instead, [write.node for write in writes])
        except Refused as refusal:
            self.builder.take_back()
            return str(refusal)
        except Exception as error:  # a provider's arguments may make any op's fake kernel raise: the next one is tried
            self.builder.take_back()
            text = f"{type(error).__name__}: {error}"
            if self.record.rule_errors.setdefault(provider.name, text) is text:
                log.warning("provider %r cannot write a cache", provider.name, exc_info=error)
            return text
        self._use_instead(absorbed.instead, last, late)
        self.absorbed.update(dict.fromkeys(absorbed.calls, provider.name))
        self.builder.sweep()
        for write in writes:
            self.mutated = [change for change in self.mutated if change.writer is not write.node]
            self.mutated.append(_Change(write.node, self.place[last], self.aliases.root(write.cache)))
            write.node.replace_all_uses_with(write.cache)
            self._erase(write.node)
        for old in absorbed.instead:
            if not old.users and not old._erased:
                self._erase(old)
        return None

    def _require_unchanged(self, writes: Sequence[RowWrite]) -> None:
        """Refuse where something before the last write changes what the emitted nodes read there, and the model read earlier."""
        own, until = {write.node for write in writes}, self.place[writes[-1].node]
        caches = {write.cache for write in writes}
        read = [node for node in self.builder.inputs() if node in self.place and node not in caches]
        for changed in self.mutated:
            if changed.writer not in own and any(
                self.place[node] < changed.place < until and self.aliases.root(node) is changed.owner for node in read
            ):
                self.builder.refuse("what it would read is written over before that")

    def _sinking(self, replaced: Iterable[Node], writes: Sequence[Node]) -> list[Node]:
        """Shapes before the writes of what is computed anew, in order, which can stand behind them; refuses where one is read before."""
        last = writes[-1]
        shapes: dict[Node, None] = {}
        waiting = list(replaced)
        while waiting:
            for user in waiting.pop().users:
                if user in writes or user in shapes or self.place.get(user, self.place[last]) >= self.place[last]:
                    continue
                if not is_view(user) and user.target not in _COPIES:
                    self.builder.refuse("what it would compute is read before the write")
                shapes[user] = None
                waiting.append(user)
        return sorted(shapes, key=self.place.__getitem__)

    def _use_instead(self, instead: dict[Node, Node], last: Node, shapes: Sequence[Node]) -> None:
        """Let the users of the replaced nodes use what takes their place; those that stand before the write move behind it."""
        for shape in reversed(shapes):
            last.append(shape)
            self.place[shape] = self.place[last]
            shape.meta.pop(CALLS, None)
        for old, new in instead.items():
            old.replace_all_uses_with(new)

    def _erase(self, node: Node) -> None:
        """Erase a node that has no use any more, and the arithmetic on positions that was there for it alone."""
        inputs = node.all_input_nodes
        self.aliases.drop(node)
        self.graph.erase_node(node)
        for other in inputs:
            if not other.users and (other.op == "get_attr" or (other.op == "call_function" and not other.is_impure())):
                self._erase(other)


def _unviewed(node: Node) -> Node:
    """What a node is another shape of."""
    while node.target is aten.view.default:
        node = node.args[0]  # type: ignore[assignment]
    return node


# -------------------------------------------------------------------- what is a write of rows


def row_write(node: Node) -> RowWrite | str | None:
    """A node as a write of rows; why it is none though it writes at positions; None for every other node."""
    if node.target is aten.index_copy_.default:
        write = RowWrite(node, (int(node.args[1]) % max(node.args[0].meta["val"].dim(), 1),), wraps=False)  # type: ignore[arg-type, union-attr]
    elif node.target is aten.index_put_.default:
        given = [dim for dim, index in enumerate(node.args[1]) if index is not None]  # type: ignore[arg-type]
        if len(node.args) > 3 and node.args[3]:
            return "it adds to what is there"
        if given != list(range(given[0], given[-1] + 1)) and not _may_be_fractal(node.args[0].meta["val"], given):  # type: ignore[union-attr]
            return "the indexed dimensions do not lie side by side"
        write = RowWrite(node, tuple(given), wraps=True)
    else:
        return None
    return _no_rows(write) or write


_PIECE = 32  # bytes of a row that lie together in a fractal cache


def _may_be_fractal(cache: Tensor, indexed: Sequence[int]) -> bool:
    """Whether a write to these dimensions is one of rows to a cache [blocks, row / n, page, n], where n elements are 32 bytes."""
    return list(indexed) == [0, 2] and cache.dim() == 4 and known_equal(to_dim(cache.shape[3]), _PIECE // cache.element_size())


def _no_rows(write: RowWrite) -> str | None:
    """Why a write is not one of whole rows, by what is known of its tensors; None if it is."""
    into, what = write.cache.meta["val"], write.source.meta["val"]
    positions = [index.meta["val"] for index in write.indices]
    if any(position.dtype not in _INDICES for position in positions):
        return "the index is a mask"
    if into.dtype != what.dtype:
        return f"the cache is {into.dtype}, what is written {what.dtype}"
    if not row_major(into):
        return "the cache is not contiguous"
    shape = to_shape(positions[0].shape)
    if any(not same_shape(shape, to_shape(position.shape)) for position in positions[1:]):
        return "the indices have several shapes"
    if not write.wraps:
        shape = shape or (1,)  # index_copy_ takes an index without dimensions for one of one element
    if write.fractal:
        expected = (*shape, *(size for dim, size in enumerate(write.sizes) if dim not in write.dims))
    else:
        expected = (*write.sizes[: write.dims[0]], *shape, *write.sizes[write.dims[-1] + 1 :])
    # What one token writes has lost its leading dimensions of one element where the model assigns to an index.
    lost = len(expected) - what.dim()
    given = (*expected[:lost], *to_shape(what.shape)) if lost > 0 and all(size == 1 for size in expected[:lost]) else to_shape(what.shape)
    return None if same_shape(given, expected) else "what is written is broadcast"


def positions_of(b: Builder, write: RowWrite) -> Any:
    """The positions of a write as one index into the `length` places of its indexed dimensions, in whatever shape the indices have.

    An index that wraps is brought into range. Where block and place in it were computed from one number, that is the position.
    """
    sizes = write.indexed
    if len(sizes) == 2 and (whole := _divided(write.indices, sizes[1])) is not None:
        return _in_range(b, whole, write.length) if write.wraps else whole
    indices = [_in_range(b, index, size) if write.wraps else index for index, size in zip(write.indices, sizes, strict=True)]
    position = indices[0]
    for dim, index in zip(write.dims[1:], indices[1:], strict=True):
        position = b.emit(aten.add.Tensor, b.emit(aten.mul.Tensor, position, b.size(write.cache, dim)), index)
    return position


_FLOOR_DIVISIONS = (aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode)


def _divided(indices: Sequence[Node], size: Dim) -> Node | None:
    """The number of which two indices are the quotient, rounded down, and the remainder by a size that is known now."""
    quotient, remainder = indices
    if quotient.target not in _FLOOR_DIVISIONS or quotient.kwargs.get("rounding_mode", "floor") != "floor":
        return None
    if remainder.target is not aten.remainder.Scalar or quotient.args[0] is not remainder.args[0]:
        return None
    whole, divisor = quotient.args[:2]
    return whole if isinstance(whole, Node) and isinstance(size, int) and divisor == remainder.args[1] == size else None


def _in_range(b: Builder, index: Node, size: Dim) -> Node:
    """An index with negative values brought to where they count from the end."""
    b.require(isinstance(size, int), "the indexed dimension is symbolic, and negative indices count from its end")
    return b.emit(aten.remainder.Scalar, index, size)


def is_scalar(node: Node) -> bool:
    """Whether a node is a tensor without dimensions."""
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dim() == 0
