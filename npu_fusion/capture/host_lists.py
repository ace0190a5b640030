"""Host lists: lists of lengths that a kernel launch reads on the host, as `actual_seq_lengths` of Ascend's attention.

A capture freezes them. Where they depend on nothing but numbers that the graph is given, a replay works them out anew and updates the
launches that take them, so that a decode loop whose lengths grow replays one capture.

What a launch would write into memory of its own is fixed too: an op can be updated only through its `out` variant, which writes where it is
told, and with a workspace that is large enough for any lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .facts import host_lists_of

_READS_SIZES = {
    torch.ops.aten.sym_size.int,
    torch.ops.aten.sym_stride.int,
    torch.ops.aten.sym_numel.default,
    torch.ops.aten.sym_storage_offset.default,
}


@dataclass(frozen=True)
class OutVariant:
    """How to launch an op again so that it writes to the same memory.

    Attributes:
        op: the op.
        out: its `out` overload, whose last argument is the list of results.
        workspace: makes the workspace that the op needs at most, from the op's arguments; None where it needs none.
    """

    op: OpOverload
    out: OpOverload
    workspace: OpOverload | None

    @classmethod
    def find(cls, op: OpOverload) -> OutVariant | None:
        """The `out` variant of an op, or None where there is none that takes a list of results and the op's own arguments.

        torch_npu names what makes the workspace of `npu_x` `_npu_x_get_max_workspace`.
        """
        packet = op.overloadpacket
        out: OpOverload | None = getattr(packet, "out", None) if "out" in packet.overloads() else None
        if out is None:
            return None
        added = {argument.name: argument for argument in out._schema.arguments}
        for argument in op._schema.arguments:
            added.pop(argument.name, None)
        if not set(added) <= {"workspace", "out"} or "out" not in added or str(added["out"].type) != "List[Tensor]":
            return None
        if "workspace" not in added:
            return cls(op, out, None)
        maker = getattr(getattr(torch.ops, op.namespace), f"_{op._opname}_get_max_workspace", None)
        if maker is None or {a.name for a in maker.default._schema.arguments} != {a.name for a in op._schema.arguments}:
            return None
        return cls(op, out, maker.default)

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the op, by name."""
        positional = [argument.name for argument in self.op._schema.arguments if not argument.kwarg_only]
        return {**dict(zip(positional, args, strict=False)), **kwargs}

    def with_results(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the `out` variant, with new memory for the workspace and the results."""
        made = dict(arguments)
        if self.workspace is not None:
            made["workspace"] = self.workspace(**arguments)
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        results = self.op(**pytree.tree_map_only(Tensor, _sizes_of, dict(arguments)))
        made["out"] = [torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device=device) for r in pytree.tree_leaves(results)]
        return made


def _sizes_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@dataclass(frozen=True)
class FrozenList:
    """A host list that varies and cannot be updated: every new value of it is another capture."""

    node: Node
    argument: str
    reason: str


class HostLists:
    """The host lists of a graph that vary with the numbers it is given, and the numbers themselves.

    Args:
        gm: a lowered graph with `meta["val"]`.
        updatable: whether the device can update launches of a captured graph at all.

    Attributes:
        variants: for each node that a replay may have to update, how.
        free: the numbers, inputs among them, that no launch depends on but by way of updated lists.
        frozen: the lists that vary and cannot be updated.
    """

    def __init__(self, gm: GraphModule, *, updatable: bool) -> None:
        self._gm = gm
        self._computable = set(_computable(gm.graph))
        self.variants: dict[Node, OutVariant] = {}
        self.frozen: list[FrozenList] = []
        for node, name, value in _varying_lists(gm.graph):
            variant = OutVariant.find(node.target) if updatable and isinstance(node.target, OpOverload) else None
            reason = self._reason(value, variant, updatable)
            if reason is not None:
                self.frozen.append(FrozenList(node, name, reason))
            elif variant is not None:
                self.variants[node] = variant
        for entry in self.frozen:
            self.variants.pop(entry.node, None)
        self.free = self._free_numbers()

    def _reason(self, value: Any, variant: OutVariant | None, updatable: bool) -> str | None:
        if not updatable:
            return "the device cannot change captured launches"
        if variant is None:
            return "the op has no variant that writes to given memory"
        if not all(node in self._computable for node in _nodes(value)):
            return "it depends on what the graph computes"
        return None

    def _free_numbers(self) -> set[Node]:
        free: set[Node] = set()
        for node in reversed(self._gm.graph.nodes):
            if is_number(node) and node in self._computable and all(self._lets_vary(user, node, free) for user in node.users):
                free.add(node)
        return free

    def _lets_vary(self, user: Node, number: Node, free: set[Node]) -> bool:
        """Whether what `user` makes of a number is worked out anew for each replay."""
        if user.op == "output" or user in free:
            return True
        if user not in self.variants:
            return False
        lists = self.lists_of(user)
        others = {name: value for name, value in self.variants[user].arguments(user.args, user.kwargs).items() if name not in lists}
        return number not in _nodes(others)

    def lists_of(self, node: Node) -> dict[str, Any]:
        """The host lists of a node, by argument name; their elements are numbers or nodes."""
        arguments = self.variants[node].arguments(node.args, node.kwargs)
        return {name: arguments[name] for name in host_lists_of(node.target) if arguments.get(name) is not None}

    @cached_property
    def returned(self) -> list[tuple[int, Node]]:
        """The results of the graph that are numbers and may vary between replays, with their places."""
        (output,) = self._gm.graph.find_nodes(op="output")
        results: Any = output.args[0]
        results = results if isinstance(results, (list, tuple)) else [results]
        return [(i, node) for i, node in enumerate(results) if isinstance(node, Node) and node in self.free]

    def program(self, values: Any) -> Callable[..., Any]:
        """A function of the graph's inputs that works out numbers; `values` is any structure of `free` nodes and constants."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in self._gm.graph.nodes:
            if node.op == "placeholder" or (node in self._computable and is_number(node)):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(map_arg(values, copies.__getitem__))
        graph.eliminate_dead_code()
        return GraphModule(torch.nn.Module(), graph)

    @cached_property
    def _evaluate(self) -> Callable[..., Any]:
        return self.program(([self.lists_of(node) for node in self.variants], [node for _, node in self.returned]))

    def evaluate(self, arguments: Sequence[Any]) -> tuple[list[dict[str, list[int]]], list[Any]]:
        """The lists of each node in `variants`, and the numbers in `returned`, for the given inputs."""
        lists, numbers = self._evaluate(*arguments)
        return [{name: list(value) for name, value in entry.items()} for entry in lists], list(numbers)


def is_number(node: Node) -> bool:
    """Whether a node is a number of the host rather than a tensor."""
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _computable(graph: Graph) -> Iterator[Node]:
    """The inputs of a graph, and the numbers that follow from them without reading a tensor's contents."""
    found: set[Node] = set()
    for node in graph.nodes:
        reads_data = isinstance(node.target, OpOverload) and node.target not in _READS_SIZES
        follows = node.op == "call_function" and is_number(node) and not reads_data and found.issuperset(node.all_input_nodes)
        if node.op == "placeholder" or follows:
            found.add(node)
            yield node


def _varying_lists(graph: Graph) -> Iterator[tuple[Node, str, Any]]:
    """The host lists that hold numbers known at run time only: node, argument, elements."""
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        names = host_lists_of(node.target)
        positional = [argument.name for argument in node.target._schema.arguments if not argument.kwarg_only]
        given = {**dict(zip(positional, node.args, strict=False)), **node.kwargs}
        for name in names:
            if _nodes(given.get(name)):
                yield node, name, given[name]


def _nodes(value: Any) -> list[Node]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Node)]
