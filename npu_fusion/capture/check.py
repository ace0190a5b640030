"""The static check: what of a graph cannot be captured, read off the graph before anything runs.

A capture records device launches and nothing else. What the host does in between (reading a value back, finding a size, copying from host
memory) happens once, and is not repeated by a replay; most devices refuse it outright.

Host scalars are fine: a 0-d tensor on the CPU is part of the key of a capture, and so is all that the host computes from such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .. import torch_private
from ..provenance import module_of, source_of
from .facts import hazard_of

CAPTURING = ("cuda", "npu")
_BRANCHES = {"cond", "while_loop"}  # higher-order ops that read a condition on the host


@dataclass(frozen=True)
class Obstacle:
    """One thing that a capture cannot hold.

    Attributes:
        reason: what is in the way, in words that follow the op's name; a whole sentence where it is no single op.
        node: the node in the lowered graph, or None.
        op: what the node calls, or None.
        source: `file.py:line` in the author's code, or None.
        module: path of the nn.Module, or None.
    """

    reason: str
    node: str | None = None
    op: str | None = None
    source: str | None = None
    module: str | None = None

    def __str__(self) -> str:
        what = f"{self.node} ({self.op}) {self.reason}" if self.node else self.reason
        where = [place for place in (self.source, self.module) if place]
        return f"{what}, at {' in '.join(where)}" if where else what


def find_obstacles(gm: GraphModule) -> list[Obstacle]:
    """Everything that keeps a graph from being captured; an empty list where nothing does.

    Args:
        gm: a lowered graph whose nodes carry `meta["val"]`. Nothing of it runs.
    """
    device = captured_device(gm)
    if isinstance(device, str):
        return [Obstacle(device)]
    graph_inputs = origins(gm)
    found: list[Obstacle] = []
    for node in gm.graph.nodes:
        reasons = (rule(node, graph_inputs) for rule in _RULES)
        found += [Obstacle(reason, node.name, _called(node), source_of(node), module_of(node)) for reason in reasons if reason]
    return found


def captured_device(gm: GraphModule) -> torch.device | str:
    """The device that a graph runs on, or why there is none that could capture it."""
    devices = {val.device for node in gm.graph.nodes for val in _tensors(node)}
    others = sorted(str(device) for device in devices if device.type not in CAPTURING)
    devices = {device for device in devices if device.type in CAPTURING}
    if len(devices) == 1:
        return devices.pop()
    if devices:
        return f"the graph runs on {' and '.join(sorted(map(str, devices)))}, and a capture is of one device"
    if others:
        return f"the graph runs on {', '.join(others)}, and only {' and '.join(CAPTURING)} graphs can be captured"
    return "the graph has no tensors"


def origins(gm: GraphModule) -> dict[Node, frozenset[Node]]:
    """For each node the graph inputs whose memory it may share, as schemas have it."""
    found: dict[Node, frozenset[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            found[node] = frozenset([node])
        elif isinstance(node.target, OpOverload):
            aliased = [value for argument, value in _arguments(node) if argument.alias_info is not None]
            if torch_private.is_composite(node.target):  # its schema does not say what it aliases
                aliased = list(node.all_input_nodes)
            found[node] = frozenset().union(*(found.get(value, frozenset()) for value in _nodes(aliased)))
        elif node.op == "call_function":  # getitem of an op with several results
            found[node] = frozenset().union(*(found.get(value, frozenset()) for value in node.all_input_nodes))
    return found


def written_inputs(gm: GraphModule) -> set[Node]:
    """The inputs whose memory the graph writes, directly or through a view."""
    graph_inputs = origins(gm)
    return {place for node in gm.graph.nodes for written in _written(node) for place in graph_inputs.get(written, ())}


# Rules. Each takes a node and the graph's `origins`, and returns why a capture cannot hold the node, or None.


def _lies_on_the_host(node: Node, graph_inputs: dict[Node, frozenset[Node]]) -> str | None:
    if node.op not in ("placeholder", "get_attr") or not node.users:
        return None
    if any(_on_host(val) and val.dim() for val in _tensors(node)):
        return "is a tensor in host memory, whose contents a replay would not read again"
    return None


def _reads_back(node: Node, graph_inputs: dict[Node, frozenset[Node]]) -> str | None:
    if isinstance(node.target, HigherOrderOperator) and node.target.name() in _BRANCHES:
        return "decides on the host which way to go"
    if not isinstance(node.target, OpOverload) or not any(not _on_host(val) for val in _input_tensors(node)):
        return None
    if torch.Tag.data_dependent_output in node.target.tags or any(_on_host(val) for val in _tensors(node)):
        return "reads a value back to the host"
    return None


def _takes_host_memory(node: Node, graph_inputs: dict[Node, frozenset[Node]]) -> str | None:
    """A scalar goes to a launch by value, unless the op copies it first; an array is always copied."""
    if not isinstance(node.target, OpOverload):
        return None
    inputs = _input_tensors(node)
    if all(_on_host(val) for val in (*inputs, *_tensors(node))):
        return None
    copied = [val for val in inputs if _on_host(val) and (val.dim() or node.target in _COPIES)]
    return "copies from the host to the device" if copied else None


def _shape_depends_on_data(node: Node, graph_inputs: dict[Node, frozenset[Node]]) -> str | None:
    """The tag says that an op's shape may depend on data; metadata says whether that of this call does."""
    if not isinstance(node.target, OpOverload) or torch.Tag.dynamic_output_shape not in node.target.tags:
        return None
    results = _tensors(node)
    if results and all(isinstance(val, torch_private.FakeTensor) for val in results):
        known = {symbol for val in _input_tensors(node) for symbol in torch_private.unbacked_symbols(val)}
        made = {symbol for val in results for symbol in torch_private.unbacked_symbols(val)} - known
        return "has a result whose shape depends on data" if made else None
    return None if _indices(node) and not _masks(node) else "has a result whose shape depends on data"


def _counts_a_mask(node: Node, graph_inputs: dict[Node, frozenset[Node]]) -> str | None:
    """A boolean index is turned into positions first, the number of which the host has to know."""
    if not isinstance(node.target, OpOverload) or torch.Tag.dynamic_output_shape in node.target.tags:
        return None
    return "indexes with a boolean mask, whose elements the host counts" if _masks(node) else None


def _rebinds(node: Node, graph_inputs: dict[Node, frozenset[Node]]) -> str | None:
    """`set_`, `resize_`, `t_`: the caller's tensor would have to look otherwise after every replay, which launches cannot bring about."""
    if not isinstance(node.target, OpOverload) or torch.Tag.inplace_view not in node.target.tags:
        return None
    rebound = sorted(place.name for written in _written(node) for place in graph_inputs.get(written, ()))
    return f"gives input {', '.join(rebound)} other memory or another shape in place" if rebound else None


def _writes_to_the_host(node: Node, graph_inputs: dict[Node, frozenset[Node]]) -> str | None:
    places = {place for written in _written(node) for place in graph_inputs.get(written, ())}
    if any(_on_host(val) for place in places for val in _tensors(place)):
        return "writes to an input in host memory"
    return None


def _draws_on_the_host(node: Node, graph_inputs: dict[Node, frozenset[Node]]) -> str | None:
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return None
    return "draws random numbers on the host" if any(_on_host(val) for val in _tensors(node)) else None


def _has_a_hazard(node: Node, graph_inputs: dict[Node, frozenset[Node]]) -> str | None:
    return hazard_of(node.target)


_RULES: tuple[Callable[[Node, dict[Node, frozenset[Node]]], str | None], ...] = (
    _lies_on_the_host,
    _reads_back,
    _takes_host_memory,
    _shape_depends_on_data,
    _counts_a_mask,
    _rebinds,
    _writes_to_the_host,
    _draws_on_the_host,
    _has_a_hazard,
)
_COPIES = {
    torch.ops.aten.where.self,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.copy.default,
    torch.ops.prims.device_put.default,
}


# Words about nodes


def _called(node: Node) -> str | None:
    if node.op == "placeholder":
        return "input"
    return str(node.target) if node.op == "call_function" else f"constant {node.target}"


def _on_host(val: Tensor) -> bool:
    return val.device.type == "cpu"


def _tensors(node: Node) -> list[Tensor]:
    """The tensors that a node computes."""
    return [val for val in pytree.tree_leaves(node.meta.get("val")) if isinstance(val, Tensor)]


def _input_tensors(node: Node) -> list[Tensor]:
    return [val for source in node.all_input_nodes for val in _tensors(source)]


def _arguments(node: Node) -> Iterator[tuple[Any, Any]]:
    """The arguments of an operator call that are given, each with its declaration in the schema."""
    for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if place < len(node.args) and not argument.kwarg_only:
            yield argument, node.args[place]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _nodes(values: Any) -> list[Node]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Node)]


def _written(node: Node) -> list[Node]:
    """The nodes whose memory a node writes."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    return _nodes([value for argument, value in _arguments(node) if argument.alias_info is not None and argument.alias_info.is_write])


def _indices(node: Node) -> Sequence[Node]:
    """What an op takes as a list of optional tensors: the indices of `index` and `index_put`."""
    return _nodes([value for argument, value in _arguments(node) if str(argument.type) == "List[Optional[Tensor]]"])


def _masks(node: Node) -> bool:
    return any(val.dtype in (torch.bool, torch.uint8) for index in _indices(node) for val in _tensors(index))
