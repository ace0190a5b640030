"""Simplify: what a model writes down for clarity, and a device would launch kernels for.

`merge_equal` keeps one of several calls of the same op on the same operands (every layer of a model computes the position of the new token
anew), and takes out arithmetic that changes nothing (`cos * 1.0`, `position + arange(1)`): what is left is bit for bit the same.

`fold_constants` makes small tensors that depend on no input (index ranges, frequencies) constants of the graph.

Neither touches what is written to, or returned: such a tensor has an identity besides its value.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .cost import mutated_arguments, node_launches, tensor_bytes
from .layout import memory_of, own_tensor, returned_memory, same_strides, seen_through
from .metadata import Metadata
from .provenance import PROVENANCE
from .reinplace import written_back
from .torch_private import fake_mode_of, without_fake
from .view import View
from .view.materialize import Materializer
from .view.value import attribute_key

FOLDED_BYTES = 1 << 16
"""Constants beyond this size cost more memory than their launch does time."""

LEAST = "npu_fusion_least"
"""Key of the meta of a folded constant: the least of its integers."""
NUMBER = "npu_fusion_number"
"""Key of the meta of a folded constant of one element: its value."""

aten = torch.ops.aten
_VIEWS = frozenset({"reshape", "permute", "expand", "slice"})
_PERMUTATIONS = frozenset({aten.transpose.int, aten.permute.default, aten.t.default})


def merge_equal(gm: GraphModule, view: View) -> int:
    """Take out calls whose result the graph has already, in place. Returns how many.

    Args:
        gm: a functional graph, some of whose nodes may have been replaced since `view` was built.
        view: its canonical view.
    """
    return _Merger(gm, view).run()


class _Merger:
    def __init__(self, gm: GraphModule, view: View) -> None:
        self.graph = gm.graph
        self.view = view
        self.metadata = Metadata(fake_mode_of(gm))
        self.materializer = Materializer(view, gm.graph, self._emit)
        self.returned = returned_memory(gm.graph)
        self.written_back = {memory_of(node) for node in written_back(gm.graph)}
        self.first: dict[Hashable, Node] = {}
        self.template: Node | None = None
        self.restrided: set[Node] = set()

    def run(self) -> int:
        merged = 0
        for node in list(self.graph.nodes):
            key = None if node._erased else _key(node)
            if key is None:
                continue
            self._restride(node)
            known = self.first.setdefault(key, node)
            other = known if known is not node else self._unchanged(node)
            if other is not None and self._can_replace(node, other):
                node.replace_all_uses_with(other)
                self._erase(node)
                merged += 1
        return merged

    def _restride(self, node: Node) -> None:
        """A node in place of another may lie otherwise in memory: so do permutations of it, of which a copy may then change nothing."""
        source = node.args[0] if node.target in _PERMUTATIONS else None
        if isinstance(source, Node) and (source not in self.view.of or source in self.restrided):
            node.meta["val"] = self.metadata.of(node.target, node.args, node.kwargs)
            self.restrided.add(node)

    def _can_replace(self, node: Node, other: Node) -> bool:
        """Whether users of `node` can use `other`: it lies in memory as that does, nobody writes to either, and one result is not two."""
        if {node, other} & self.view.overwritten.keys():
            return False
        memories = [memory_of(node), memory_of(other)]
        if self.returned.intersection(memories) and self.written_back.intersection(memories):
            return False  # what is returned would be the input that the value is written back to
        if node in self.returned:
            if other in self.returned or memory_of(other).op != "call_function":
                return False
            self.returned.add(other)
        a, b = node.meta.get("val"), other.meta.get("val")
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return not isinstance(a, Tensor) and not isinstance(b, Tensor)
        return (a.dtype, a.device) == (b.dtype, b.device) and same_strides(a, b)

    def _erase(self, node: Node) -> None:
        """Erase a node that nobody uses, and what only it used."""
        operands, key = node.all_input_nodes, _key(node)
        self.graph.erase_node(node)
        if key is not None and self.first.get(key) is node:
            del self.first[key]
        for operand in operands:
            if not operand.users and operand.op == "call_function" and not operand.is_impure():
                self._erase(operand)

    def _unchanged(self, node: Node) -> Node | None:
        """What a launch computes nothing new from: its own operand, or a view of what the graph has."""
        value = self.view.of.get(node)
        if value is None or not node_launches(node) or not isinstance(node.meta.get("val"), Tensor):
            return None
        for operand in node.all_input_nodes:
            if self.view.of.get(operand) is value:
                return operand
        if value.op not in _VIEWS or value.args[0].node not in node.all_input_nodes or value.args[0].node in self.view.overwritten:
            return None
        self.template = node
        with self.graph.inserting_before(node):
            return self.materializer.emit_anew(value)

    def _emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.metadata.of(target, args, kwargs)
        assert self.template is not None
        node.meta.update({key: self.template.meta[key] for key in PROVENANCE if key in self.template.meta})
        return node


def _key(node: Node) -> Hashable | None:
    """What calls of the same op on the same operands have in common; None for what must not be merged."""
    if node.op != "call_function" or node.is_impure():
        return None
    target = node.target
    if isinstance(target, OpOverload) and (target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags):
        return None
    return target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items())))


def _frozen(value: Any) -> Hashable:
    if isinstance(value, Node):
        return ("node", value)
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, slice):
        return ("slice", _frozen((value.start, value.stop, value.step)))
    key: Hashable = attribute_key(value)
    return key


# -------------------------------------------------------------------- constants


def fold_constants(gm: GraphModule, dry_run: bool = False) -> int:
    """Make small tensors that depend on no input constants of the graph, in place. Returns how many kernels are no longer launched.

    Args:
        gm: a graph with `meta["val"]`.
        dry_run: the device may be absent: the constants have no memory.
    """
    kept = returned_memory(gm.graph) | _written(gm)
    on_host: dict[Node, Tensor] = {}  # for what is said of them: the device's own may not be there, and reading them would wait for it
    known: dict[Node, Tensor] = {}
    with without_fake(), torch.no_grad():
        for node in gm.graph.nodes:
            if _is_foldable(node, on_host) and node not in kept:
                on_host[node] = _computed(node, on_host, torch.device("cpu"))
                known[node] = node.meta["val"] if dry_run else _computed(node, known)
        facts = {node: _facts(constant) for node, constant in on_host.items()}
    used = [node for node in known if any(user not in known for user in node.users)]
    launches = sum(node_launches(node) for node in known)
    if not launches:
        return 0
    for node in used:
        with gm.graph.inserting_before(node):
            constant = gm.graph.get_attr(own_tensor(gm, known[node]))
        constant.meta = {**node.meta, **facts[node]}
        node.replace_all_uses_with(constant)
    for node in reversed(known):
        gm.graph.erase_node(node)
    return launches


def _computed(node: Node, known: dict[Node, Tensor], device: torch.device | None = None) -> Tensor:
    """What a node computes from constants, on the given device in place of its own."""
    args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
    if device is not None and kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": device}
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def _facts(constant: Tensor) -> dict[str, Any]:
    """What a lowering may ask of a constant, also where that has no memory: the least of its integers, the one number that it holds."""
    if constant.is_complex() or constant.dtype == torch.bool or not constant.numel():
        return {}
    least = {} if constant.is_floating_point() else {LEAST: int(constant.min())}
    return {**least, **({NUMBER: constant.item()} if constant.numel() == 1 else {})}


def _is_foldable(node: Node, known: dict[Node, Tensor]) -> bool:
    """Whether a node computes one small tensor from constants alone, the same at every run."""
    target, val = node.target, node.meta.get("val")
    if node.op != "call_function" or not isinstance(target, OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    if (
        not isinstance(val, Tensor)
        or target in _UNINITIALISED
        or _key(node) is None
        or any(arg not in known for arg in node.all_input_nodes)
    ):
        return False
    size = tensor_bytes(node)
    return isinstance(size, sympy.Integer) and int(size) <= FOLDED_BYTES


_UNINITIALISED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.empty_permuted.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)


def _written(gm: GraphModule) -> set[Node]:
    """Nodes whose memory the graph writes to, directly or through a view."""
    return seen_through(arg for node in gm.graph.nodes for arg in mutated_arguments(node))
