"""What a graph costs a device: kernel launches and bytes moved, as sympy expressions over the graph's symbolic sizes.

The model is deliberately simple, because it must rank candidates and not predict times: an op is one kernel launch that reads each of its
inputs once and writes each of its outputs once.

- *No launch*: views and aliases (everything whose schema says that the result shares the input's storage: `view`, `expand`, `slice`, `t`,
  `permute`, `detach`, `split`, ...), `getitem`, arithmetic on symbolic sizes, uninitialised allocations, assertions.
- *One launch*: everything else, `clone` and `copy_` included. A semantic op `npu_fusion::*` and a lifted op `npu_fusion_lifted::*` are
  one launch each, because that is what they are on the target they are meant for; the reference provider, which computes a semantic op
  from several ATen ops, is counted the same way, so that the figures of a graph do not depend on where it is being looked at.
- *Bytes*: an expanded input is read as often as it has distinct elements. Ops that gather (`embedding`, `index`, `gather`, ...) read as
  much as they return, besides their indices. In-place writes at positions (`index_copy_`, `index_put_`, `scatter_`, ...) write as much as
  they are given. An operand that an op outside ATen mutates (a paged cache) is moved as far as the op's other operands say, so it adds
  nothing. Nor does a constant that a lowering gave the graph: of the compressed mask of an attention op a kernel reads one block again
  and again.

Sizes are taken from `node.meta["val"]` as they stand: no guard is added and no hint is read. The only symbolic arithmetic is one product
for each distinct (shape, dtype), so that a graph of several thousand nodes costs milliseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import sympy
import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node

from .layout import is_own_constant

# Schemas that alias their input only when there is nothing to do; in an ATen graph they are there because there is something to do.
_COPIES = frozenset({"aten::contiguous"})
_CASTS = frozenset({"aten::to", "aten::type_as"})
_FREE = frozenset(
    {
        "aten::_unsafe_view",
        "aten::empty",
        "aten::empty_like",
        "aten::empty_permuted",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::sym_size",
        "aten::sym_stride",
        "aten::sym_numel",
        "aten::sym_storage_offset",
        "aten::_local_scalar_dense",
        "aten::_assert_scalar",
        "aten::_assert_tensor_metadata",
        "aten::_assert_async",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
        "_c10d_functional::wait_tensor",
    }
)
_GATHERS = frozenset(
    {"aten::embedding", "aten::index", "aten::_unsafe_index", "aten::index_select", "aten::gather", "aten::take", "aten::take_along_dim"}
)
_POSITION_WRITES = frozenset(
    {
        "aten::index_copy_",
        "aten::index_put_",
        "aten::_index_put_impl_",
        "aten::_unsafe_index_put_",
        "aten::index_add_",
        "aten::index_fill_",
        "aten::scatter_",
        "aten::scatter_add_",
        "aten::scatter_reduce_",
        "aten::put_",
    }
)


class _Block(NamedTuple):
    """A block of memory that is read or written: the sizes of its distinct elements and the bytes of one. The key of the tally."""

    sizes: tuple[int | sympy.Expr, ...]
    itemsize: int


def launches(graph: Graph | GraphModule) -> sympy.Expr:
    """Kernel launches of one run of the graph, subgraphs of higher-order ops included (both branches of a `cond`)."""
    return sympy.Integer(sum(node_launches(node) for node in _nodes(graph)))


def bytes_moved(graph: Graph | GraphModule) -> sympy.Expr:
    """Bytes that one run of the graph reads and writes, as an expression in its symbolic sizes."""
    tally: Counter[_Block] = Counter()
    blocks: dict[Node, tuple[_Block, ...]] = {}
    for node in _nodes(graph):
        _count(node, tally, blocks)
    return _total(tally)


def node_launches(node: Node) -> int:
    """Kernel launches of one node: 0 or 1, or those of its subgraphs for a higher-order op."""
    if node.op != "call_function" or not _computes(node):
        return 0
    subgraphs = list(_subgraphs(node))
    if subgraphs:
        return sum(node_launches(inner) for graph in subgraphs for inner in graph.nodes)
    return 1


def node_bytes(node: Node) -> sympy.Expr:
    """Bytes that one node reads and writes; 0 for a node without a launch."""
    tally: Counter[_Block] = Counter()
    _count(node, tally, {})
    return _total(tally)


def tensor_bytes(node: Node) -> sympy.Expr:
    """Bytes of the tensors that a node is, its distinct elements counted once: what reading or writing all of it costs."""
    return _total(Counter(_blocks_of(node, {})))


def _nodes(graph: Graph | GraphModule) -> Iterable[Node]:
    return (graph.graph if isinstance(graph, GraphModule) else graph).nodes


def _subgraphs(node: Node) -> Iterator[Graph]:
    if not isinstance(node.target, HigherOrderOperator):
        return
    module = node.graph.owning_module
    for arg in node.all_input_nodes:
        if arg.op == "get_attr" and module is not None:
            inner = getattr(module, str(arg.target), None)
            if isinstance(inner, GraphModule):
                yield inner.graph


def _computes(node: Node) -> bool:
    target = node.target
    if isinstance(target, HigherOrderOperator):
        return True
    if not isinstance(target, OpOverload):
        # getitem, operator.add on sizes, sym_max, ...: Python on the host, unless it makes a tensor.
        return getattr(target, "__name__", "") != "getitem" and _makes_tensor(node)
    name = target._schema.name
    if name in _FREE:
        return False
    if name in _COPIES:
        return True
    if name in _CASTS:
        return not _same_dtype(node)
    return not target.is_view


def _makes_tensor(node: Node) -> bool:
    return any(True for _ in _tensors(node.meta.get("val")))


def _same_dtype(node: Node) -> bool:
    source = node.args[0]
    before, after = (value.meta.get("val") if isinstance(value, Node) else None for value in (source, node))
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype == after.dtype


def _count(node: Node, tally: Counter[_Block], blocks: dict[Node, tuple[_Block, ...]]) -> None:
    """Adds what the node reads and writes to the tally; `blocks` caches the blocks of nodes seen before."""
    if node.op != "call_function" or not _computes(node):
        return
    subgraphs = list(_subgraphs(node))
    if subgraphs:
        for graph in subgraphs:
            for inner in graph.nodes:
                _count(inner, tally, blocks)
        return
    target = node.target
    mutated = mutated_arguments(node) if isinstance(target, OpOverload) and target._schema.is_mutable else ()
    name = target._schema.name if isinstance(target, OpOverload) else ""
    reads = [arg for arg in node.all_input_nodes if arg not in mutated]
    written = _blocks_of(node, blocks)
    if name in _GATHERS:
        tally.update(written)
        reads = reads[1:]
    elif name in _POSITION_WRITES:
        written = _source_of_write(node, reads, blocks)
    elif mutated and not name.startswith("aten::"):
        written = _without_aliases(node, mutated, written, blocks)
    elif mutated and name != "aten::copy_":
        reads.extend(mutated)
    tally.update(written)
    for arg in reads:
        if not is_own_constant(arg):
            tally.update(_blocks_of(arg, blocks))


def mutated_arguments(node: Node) -> tuple[Node, ...]:
    """Argument nodes that the op writes to, by its schema."""
    target = node.target
    if not isinstance(target, OpOverload):
        return ()
    found: list[Node] = []
    for index, argument in enumerate(target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[index] if index < len(node.args) and not argument.kwarg_only else node.kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Node):
                found.append(item)
    return tuple(found)


def _source_of_write(node: Node, reads: list[Node], blocks: dict[Node, tuple[_Block, ...]]) -> tuple[_Block, ...]:
    """What an op such as `index_copy_` writes: as much as its source holds, which is its last tensor operand."""
    return _blocks_of(reads[-1], blocks) if reads else ()


def _without_aliases(
    node: Node, mutated: tuple[Node, ...], written: tuple[_Block, ...], blocks: dict[Node, tuple[_Block, ...]]
) -> tuple[_Block, ...]:
    """The outputs of a mutating op less those that are its mutated operands, returned."""
    rest = Counter(written)
    target = node.target
    assert isinstance(target, OpOverload)
    if any(result.alias_info is not None for result in target._schema.returns):
        for arg in mutated:
            rest.subtract(_blocks_of(arg, blocks))
    return tuple((+rest).elements())


def _blocks_of(node: Node, blocks: dict[Node, tuple[_Block, ...]]) -> tuple[_Block, ...]:
    found = blocks.get(node)
    if found is None:
        found = blocks[node] = tuple(_block(value) for value in _tensors(node.meta.get("val")))
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _block(tensor: torch.Tensor) -> _Block:
    """The distinct elements of a tensor: dimensions of stride 0 repeat what is there."""
    if tensor.layout != torch.strided:
        return _Block(tuple(_expr(size) for size in tensor.shape), tensor.dtype.itemsize)
    return _Block(
        tuple(_expr(size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if _expr(stride) != 0), tensor.dtype.itemsize
    )


def _expr(size: int | torch.SymInt) -> int | sympy.Expr:
    """A size as an int or as its expression. Comparing a SymInt would add a guard; comparing the expression is structural."""
    if isinstance(size, int):
        return size
    expr: sympy.Expr = size.node.expr
    return int(expr) if expr.is_Integer else expr


def _total(tally: Counter[_Block]) -> sympy.Expr:
    known = 0
    symbolic: list[sympy.Expr] = []
    for block, count in tally.items():
        factor = count * block.itemsize
        symbols: list[sympy.Expr] = []
        for size in block.sizes:
            if isinstance(size, int):
                factor *= size
            else:
                symbols.append(size)
        if symbols and factor:
            symbolic.append(sympy.Mul(factor, *symbols))
        else:
            known += factor
    return sympy.expand(sympy.Add(sympy.Integer(known), *symbolic)) if symbolic else sympy.Integer(known)
