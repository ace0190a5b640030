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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .aliases import READS_METADATA, AliasClasses, is_view
from .config import FusionConfig
from .layout import row_major
from .lower import Builder, Refused
from .record import GraphRecord
from .torch_private import fake_mode_of
from .view.shapes import known_equal, product, same_shape, size_facts, to_shape
from .view.value import Dim, Shape

log = logging.getLogger(__name__)

aten = torch.ops.aten
_INDICES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class RowWrite:
    """An in-place write of whole rows: `cache`, seen as [prefix, length, row], gets `source` [prefix, positions, row] at its positions.

    Attributes:
        node: the in-place op, whose result is the cache.
        dim: the first indexed dimension.
        wraps: whether negative indices count from the end; otherwise there are none.
    """

    node: Node
    dim: int
    wraps: bool

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
        return self.sizes[self.dim : self.dim + len(self.indices)]

    @property
    def prefix(self) -> Dim:
        return product(self.sizes[: self.dim])

    @property
    def length(self) -> Dim:
        return product(self.indexed)

    @property
    def row(self) -> Dim:
        return product(self.sizes[self.dim + len(self.indices) :])

    def same_places(self, other: RowWrite) -> bool:
        """Whether the two writes fill the same places of their caches, whatever the rows are."""
        if self.indices != other.indices or self.wraps != other.wraps:
            return False
        return same_shape(self.indexed, other.indexed) and known_equal(self.prefix, other.prefix)


@dataclass(frozen=True, eq=False)
class WriteProvider:
    """One way to run `count` writes to the same places on a target.

    Args:
        name: what the report shows.
        targets: targets on which it exists.
        lower: emits the op that writes; raises `Refused`, by `builder.refuse` or `builder.require`, for writes that it cannot take.
        count: how many writes it takes at once.
        rank: of providers with one count those of lower rank are tried first; those that take more writes come before them.
    """

    name: str
    targets: tuple[str, ...]
    lower: Callable[[Builder, Sequence[RowWrite]], None]
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
        chosen = _Writes(gm, config, record).lower(providers)
    record.sites[:] = [
        dataclasses.replace(site, lowered_to=chosen[site.call][0] or site.lowered_to, reason=chosen[site.call][1])
        if site.idiom == "kv_update" and site.call in chosen
        else site
        for site in record.sites
    ]
    gm.graph.lint()
    gm.recompile()
    return sum(name is not None for name, _ in chosen.values())


class _Writes:
    """The writes of one graph on their way to a target's ops."""

    def __init__(self, gm: GraphModule, config: FusionConfig, record: GraphRecord) -> None:
        self.graph = gm.graph
        self.builder = Builder(gm, config, record.dry_run)
        self.record = record
        self.aliases = AliasClasses(gm.graph)
        self.place = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.reasons: dict[Node, list[str]] = {}
        self.done: list[tuple[int, Node]] = []  # place and owner of the memory of every write that is done

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

    def _lower_first(self, writes: list[RowWrite], providers: Sequence[WriteProvider]) -> tuple[list[RowWrite], str | None]:
        """Lower the first write, with the one that belongs to it where an op takes both; the writes that are done and how."""
        first = writes[0]
        partner = next((other for other in writes[1:] if self._joins(first, other)), None)
        for provider in providers:
            group = [first, partner][: provider.count]
            members = [write for write in group if write is not None]
            if len(members) < provider.count:
                self._pass_over(provider, members, "there is no second cache that is written at the same places")
            elif (reason := self._try(provider, members)) is None:
                return members, provider.name
            else:
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
        if any(since < place < until and root is owner for place, root in self.done):
            return True
        users = {user for member in self.aliases.members([owner]) for user in member.users}
        between = (user for user in users if since < self.place.get(user, until) < until)
        return any(user.target not in READS_METADATA and not is_view(user) for user in between)

    def _try(self, provider: WriteProvider, writes: Sequence[RowWrite]) -> str | None:
        """Replace the writes by what the provider emits at the last one's place; why it does not take them, or None."""
        last = writes[-1].node
        self.builder.begin(last)
        try:
            provider.lower(self.builder, writes)
        except Refused as refusal:
            self.builder.take_back()
            return str(refusal)
        except Exception as error:  # a provider's arguments may make any op's fake kernel raise: the next one is tried
            self.builder.take_back()
            text = f"{type(error).__name__}: {error}"
            if self.record.rule_errors.setdefault(provider.name, text) is text:
                log.warning("provider %r cannot write a cache", provider.name, exc_info=error)
            return text
        self.builder.sweep()
        for write in writes:
            self.done.append((self.place[last], self.aliases.root(write.cache)))
            write.node.replace_all_uses_with(write.cache)
            self._erase(write.node)
        return None

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
        write = RowWrite(node, int(node.args[1]) % max(node.args[0].meta["val"].dim(), 1), wraps=False)  # type: ignore[arg-type, union-attr]
    elif node.target is aten.index_put_.default:
        given = [dim for dim, index in enumerate(node.args[1]) if index is not None]  # type: ignore[arg-type]
        if len(node.args) > 3 and node.args[3]:
            return "it adds to what is there"
        if given != list(range(given[0], given[-1] + 1)):
            return "the indexed dimensions do not lie side by side"
        write = RowWrite(node, given[0], wraps=True)
    else:
        return None
    return _no_rows(write) or write


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
    expected = (*write.sizes[: write.dim], *shape, *write.sizes[write.dim + len(positions) :])
    return None if same_shape(to_shape(what.shape), expected) else "what is written is broadcast"


def positions_of(b: Builder, write: RowWrite) -> Any:
    """The positions of a write as one index into the `length` places of its indexed dimensions, in whatever shape the indices have.

    An index that wraps is brought into range. Where block and place in it were computed from one number, that is the position.
    """
    sizes = write.indexed
    if len(sizes) == 2 and (whole := _divided(write.indices, sizes[1])) is not None:
        return _in_range(b, whole, write.length) if write.wraps else whole
    indices = [_in_range(b, index, size) if write.wraps else index for index, size in zip(write.indices, sizes, strict=True)]
    position = indices[0]
    for offset, dim in enumerate(range(write.dim + 1, write.dim + len(sizes)), start=1):
        position = b.emit(aten.add.Tensor, b.emit(aten.mul.Tensor, position, b.size(write.cache, dim)), indices[offset])
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
