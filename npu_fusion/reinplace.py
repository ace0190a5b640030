"""Re-inplacing: cache writes that AOT made functional become writes into the cache again.

AOT turns `cache.index_copy_(2, pos, k)` into `new = index_copy(cache, 2, pos, k)`, reads of `new`, and `copy_(cache, new)` at the end of
the graph: two copies of the whole cache for one token. Here `index_copy` becomes `index_copy_` on the graph input, and the `copy_` goes.

What makes it sound: the input is overwritten at the end of the graph in any case, so that only readers inside the graph can notice an
earlier write. A write moves from the end of the graph to its functional op if

1. nothing reads the old contents, through whatever view, after that op, and they are not returned;
2. what is written is not itself a view of the cache;
3. the functional result lies in memory as the cache does, so that views of it stay valid.

Several writes into one cache are checked in their order. AOT guarantees two things. No other graph input overlaps an input that is mutated:
it merges such inputs into one base. And a graph returns a mutated input's new value only where the program returns that input or a view of
it, so that what is returned may be the input's own memory.

A counter that is only read and then advanced, `copy_(n, n + 1)`, is advanced in place at the end instead.

The same argument turns functional writes to a temporary of the graph (`roll` of a full sliding window, the zeros of a new cache) into
in-place ones: nothing reads the temporary afterwards.

`torch._inductor.fx_passes.reinplace` is not used. It needs Inductor's virtualised state, knows neither `index_copy` nor `scatter` (Inductor
has decomposed them into `index_put` by then), writes slices with prims that only Inductor lowers, and gives no reason where it declines.
Its condition on later readers, by overlap of storages, is the model for the one here, which follows the data flow instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .aliases import READS_METADATA, AliasClasses, is_view, may_alias
from .provenance import module_of, source_of
from .record import GraphRecord, Site

aten = torch.ops.aten

IN_PLACE: dict[Any, OpOverload] = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_put.default: aten.index_put_.default,
    aten.index_add.default: aten.index_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.copy.default: aten.copy_.default,
}
# Arithmetic on a whole input, as that of a counter.
IN_PLACE_AT_THE_END: dict[Any, OpOverload] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
}
# A scatter into a view of its first argument, and the view it scatters into; the arguments after the first two are the view's.
VIEW_OF_SCATTER: dict[Any, OpOverload] = {
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
    aten.diagonal_scatter.default: aten.diagonal.default,
}
_RESHAPES = {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims}


def written_back(graph: Graph) -> set[Node]:
    """The nodes whose values end up in memory of the graph's inputs, or pass through it: re-inplaced they are that memory."""
    stack = [copy.args[1] for copy in graph.find_nodes(op="call_function", target=aten.copy_.default)]
    found: set[Node] = set()
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in found:
            found.add(node)
            if is_view(node) or node.target in IN_PLACE:
                stack.append(node.args[0])
            elif node.target in VIEW_OF_SCATTER:
                stack += node.args[:2]
    return found


def reinplace(gm: GraphModule, record: GraphRecord | None = None) -> int:
    """Make functional cache writes in-place, in place in `gm`. Returns how many there were.

    Args:
        gm: a lowered inference graph of AOT with `meta["val"]`; mutated inputs are written by `copy_` nodes.
        record: gets a site of the idiom `kv_update` for each write into a cache (an input of three or more dimensions), in place or not.
    """
    pass_ = _Reinplacer(gm)
    written = pass_.inputs(record) + pass_.temporaries()
    if pass_.counters() or written:
        gm.graph.lint()
        gm.recompile()
    return written


@dataclass(frozen=True)
class _Write:
    """One functional write on the way from a cache to its final value.

    `node` is the functional result. Where it scatters the result of another write into a view, `inner` is that write.
    """

    node: Node
    inner: _Write | None = None

    @property
    def innermost(self) -> Node:
        """The node that becomes the in-place op: from here on the cache is changed."""
        return self.inner.innermost if self.inner else self.node

    def nodes(self) -> Iterator[Node]:
        yield self.node
        if self.inner:
            yield from self.inner.nodes()


@dataclass
class _Chain:
    """The writes from a graph input to the value that the `copy_` at the end gives it, first to last."""

    cache: Node
    epilogue: Node
    writes: list[_Write] = field(default_factory=list)


class _Reinplacer:
    def __init__(self, gm: GraphModule) -> None:
        self.graph = gm.graph
        self.place = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.aliases = AliasClasses(gm.graph)
        self.epilogues = {node.args[0]: node for node in gm.graph.find_nodes(op="call_function", target=aten.copy_.default)}

    def inputs(self, record: GraphRecord | None) -> int:
        """Writes into graph inputs."""
        written = 0
        for chain in list(self._chains()):
            reason = _layout_reason(chain)
            for write in chain.writes:
                lowered_to = str(_in_place_op(write.innermost))
                reason = reason or self._unsafe(write, chain)
                if record is not None and _is_cache(chain.cache):
                    record.sites.append(_site(write, lowered_to, reason))
                if reason is None:
                    self._commit(write, chain.cache)
                    written += 1
            if reason is None:
                chain.epilogue.replace_all_uses_with(chain.cache)
                self._erase(chain.epilogue)
        return written

    def temporaries(self) -> int:
        """Writes into tensors that the graph itself allocated and reads no more."""
        written = 0
        for node in list(self.graph.nodes):
            if node.target not in IN_PLACE:
                continue
            base = node.args[0]
            owner = self.aliases.root(base)
            owned = _is_fresh(owner) and all(member.op == "call_function" for member in self.aliases.members({owner}))
            if owned and _same_layout(base, node) and not self._self_read(node) and self._reader(node, {owner}, set()) is None:
                node.target = IN_PLACE[node.target]
                self.aliases.join(node, base)
                written += 1
        return written

    def counters(self) -> int:
        """Inputs that get their own value plus or times a number."""
        advanced = 0
        for cache, epilogue in list(self.epilogues.items()):
            node = epilogue.args[1]
            if epilogue._erased or not isinstance(node, Node) or node.target not in IN_PLACE_AT_THE_END:
                continue
            tensors = [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)]
            alone = len(node.users) == 1 and not epilogue.users and _same_layout(cache, node)
            if alone and tensors == [cache] and node.args[0] is cache and node.args[1] is not cache:
                with self.graph.inserting_before(epilogue):
                    new = self.graph.call_function(IN_PLACE_AT_THE_END[node.target], node.args, dict(node.kwargs))
                new.meta = dict(node.meta)
                self._erase(epilogue)
                self._erase(node)
                advanced += 1
        return advanced

    def _chains(self) -> Iterator[_Chain]:
        for cache, epilogue in self.epilogues.items():
            if cache.op != "placeholder":
                continue
            chain = _Chain(cache, epilogue)
            node = epilogue.args[1]
            while isinstance(node, Node) and node is not cache:
                if (write := self._write(node)) is not None:
                    chain.writes.insert(0, write)
                elif not is_view(node):
                    break
                node = node.args[0]
            if node is cache and chain.writes:
                yield chain

    def _write(self, node: Any) -> _Write | None:
        """`node` as a functional write, through as many views as it scatters into."""
        if not isinstance(node, Node):
            return None
        if node.target in IN_PLACE:
            return _Write(node)
        view = VIEW_OF_SCATTER.get(node.target)
        if view is None:
            return None
        inner = self._write(_reshaped_from(node.args[1]))
        if inner is not None and _views(inner.node.args[0], view, node):
            return _Write(node, inner)
        return _Write(node)

    def _unsafe(self, write: _Write, chain: _Chain) -> str | None:
        """Why a write cannot move from the end of the graph to where it is computed, or None."""
        if self._self_read(write.innermost):
            return "what is written is a view of the cache itself"
        known = {*write.nodes(), chain.epilogue}
        reader = self._reader(write.innermost, {self.aliases.root(chain.cache)}, known)
        if reader is None:
            return None
        if reader.op == "output":
            return "the cache's old contents are returned"
        return f"{reader.name} reads the cache's old contents after the write"

    def _self_read(self, node: Node) -> bool:
        """Whether a write reads, apart from its base, memory of that base."""
        base = node.args[0]
        root = self.aliases.root(base)
        others = [arg for arg in node.all_input_nodes if arg is not base]
        return node.args.count(base) > 1 or any(self.aliases.root(arg) is root for arg in others)

    def _reader(self, write: Node, roots: set[Node], known: set[Node]) -> Node | None:
        """The first node after `write` that reads memory of the alias classes `roots`; views are followed, not counted."""
        for member in self.aliases.members(roots):
            for user in member.users:
                if self.place[user] <= self.place[write] or user in known or user.target in READS_METADATA:
                    continue
                if not is_view(user):
                    return user
        return None

    def _commit(self, write: _Write, cache: Node) -> None:
        """Turn one write into its in-place form."""
        if write.inner is not None:
            source = write.node.args[1]
            self._commit(write.inner, cache)
            self._become(write.node, write.node.args[0])
            while isinstance(source, Node) and source.target in _RESHAPES and not source.users:
                unused, source = source, source.args[0]
                self._erase(unused)
        elif write.node.target in IN_PLACE:
            write.node.target = IN_PLACE[write.node.target]
            self.aliases.join(write.node, cache)
        else:
            self._scatter_into_view(write.node)

    def _scatter_into_view(self, node: Node) -> None:
        base, source, *rest = node.args
        view_op = VIEW_OF_SCATTER[node.target]
        with self.graph.inserting_before(node):
            view = self.graph.call_function(view_op, (base, *rest), dict(node.kwargs))
            copied = self.graph.call_function(aten.copy_.default, (view, source))
        assert isinstance(base, Node)
        for new in (view, copied):
            new.meta = {key: value for key, value in node.meta.items() if key != "val"}
            new.meta["val"] = _view_of(view_op, base, rest, node.kwargs)
            self.place[new] = self.place[node]
            self.aliases.join(new, base)
        self._become(node, base)

    def _become(self, node: Node, base: Any) -> None:
        """The functional result is the mutated base itself."""
        node.replace_all_uses_with(base)
        self._erase(node)

    def _erase(self, node: Node) -> None:
        self.aliases.drop(node)
        self.graph.erase_node(node)


def _reshaped_from(node: Any) -> Any:
    """What a node is a reshape of, without other users on the way; None where it has others itself."""
    while isinstance(node, Node) and len(node.users) == 1 and node.target in _RESHAPES:
        node = node.args[0]
    return node if isinstance(node, Node) and len(node.users) == 1 else None


def _views(target: Any, view: OpOverload, scatter: Node) -> bool:
    """Whether a node is the view that a scatter writes, or a reshape of it: numbering the elements row by row, the same ones."""
    while isinstance(target, Node) and target.target in _RESHAPES:
        target = target.args[0]
    if not isinstance(target, Node) or target.target is not view or target.args[0] is not scatter.args[0]:
        return False
    return _view_arguments(target, 1) == _view_arguments(scatter, 2)


def _view_arguments(node: Node, first: int) -> tuple[Any, ...]:
    """The arguments from position `first` on, with the schema's defaults filled in."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema.arguments
    given = {arg.name: value for arg, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    return tuple(given.get(arg.name, arg.default_value) for arg in schema[first:])


def _view_of(view_op: OpOverload, base: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    def value(arg: Any) -> Any:
        return arg.meta["val"] if isinstance(arg, Node) else arg

    return view_op(*torch.fx.node.map_aggregate((base, *args), value), **torch.fx.node.map_aggregate(kwargs, value))


def _in_place_op(node: Node) -> OpOverload:
    return IN_PLACE.get(node.target, aten.copy_.default)


def _is_fresh(node: Node) -> bool:
    """Whether a node's result is memory that the graph allocates for it alone."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, OpOverload) or not isinstance(node.meta.get("val"), Tensor):
        return False
    return not op._schema.is_mutable and not may_alias(node)


def _layout_reason(chain: _Chain) -> str | None:
    """Why views of a functional result would not fit the cache, or None.

    The result of an inner write is read by its scatter alone, whatever its layout.
    """
    if any(not _same_layout(write.node.args[0], write.node) for write in chain.writes):
        return "the cache does not lie in memory as a copy of it would: it is not dense"
    final = chain.epilogue.args[1]
    assert isinstance(final, Node)
    return None if _same_layout(chain.cache, final) else "the cache is written through a view of another layout"


def _same_layout(a: Any, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dtype != y.dtype or x.dim() != y.dim():
        return False
    pairs = [*zip(x.shape, y.shape, strict=True), *zip(x.stride(), y.stride(), strict=True)]
    return all(statically_known_true(left == right) for left, right in pairs)


def _is_cache(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dim() >= 3


def _site(write: _Write, lowered_to: str, reason: str | None) -> Site:
    node, fused = write.node, reason is None
    return Site(
        idiom="kv_update",
        fused=fused,
        op="kv_update" if fused else None,
        lowered_to=lowered_to.removesuffix(".default") if fused else None,
        reason=reason,
        source=source_of(node),
        module=module_of(node),
        node=node.name,
        rule="reinplace",
        call=write.innermost.name if fused else None,
    )
