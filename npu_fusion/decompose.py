"""Taking a semantic op of several parts, or a plain one, apart: a call becomes the calls that its reference makes.

The reference of such an op is written with the semantic ops that are its parts, or with PyTorch's own. It is run on fake tensors, and every
op that it calls is emitted as a node: what an op means is written down once, and the parts compute what the whole does, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .semantic import SemanticOp

Emit = Callable[..., Node]


class NoParts(Exception):
    """The reference computes with something that is no node of the graph."""


def emit_parts(op: SemanticOp, call: Node, emit: Emit, results: Callable[[Node, int], Sequence[Node]]) -> Node | list[Node]:
    """Emit the calls that the reference of an op makes.

    Args:
        op: the semantic op.
        call: the node that calls it.
        emit: makes a node of a target and its arguments, with its metadata.
        results: the first so many results of a node that has several.

    Returns:
        the node of its result; a list of them for an op with several.

    Raises:
        NoParts: its reference reads something that is no argument and no result of an op.
    """
    return emit_calls(op.reference, call.args, call.kwargs, emit, results)


def emit_calls(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    emit: Emit,
    results: Callable[[Node, int], Sequence[Node]],
) -> Node | list[Node]:
    """Emit the calls that a function of tensors makes, given nodes in their place.

    Args:
        args, kwargs: the function's arguments: nodes, or values of their own.
        function, emit, results: as for `emit_parts`, with the function in place of the op's reference.

    Returns, Raises: as `emit_parts`.
    """
    given: list[Node] = []
    map_arg((tuple(args), dict(kwargs)), given.append)
    recorder = _Recorder(list(dict.fromkeys(given)), emit, results)
    args, kwargs = tree_map(recorder.value, (tuple(args), dict(kwargs)))
    with recorder:
        found = function(*args, **kwargs)
    return recorder.node(found) if isinstance(found, Tensor) else [recorder.node(value) for value in found]


class _Recorder(TorchDispatchMode):
    """Emits what is called while it is on; keeps which node has which value."""

    def __init__(self, nodes: Sequence[Node], emit: Emit, results: Callable[[Node, int], Sequence[Node]]) -> None:
        super().__init__()
        self._emit, self._results = emit, results
        self._nodes: dict[int, Node] = {}
        self._values: list[Any] = []  # kept, so that no other gets their identity
        for node in nodes:
            known = self._nodes.get(_identity(node.meta["val"]))
            if known is not None:
                raise NoParts(f"{known} and {node} are one tensor")
            self._keep(node)

    def _keep(self, node: Node) -> Any:
        value = node.meta["val"]
        self._nodes[_identity(value)] = node
        self._values.append(value)
        return value

    def value(self, argument: Any) -> Any:
        return argument.meta["val"] if isinstance(argument, Node) else argument

    def node(self, value: Any) -> Any:
        """The node of a tensor or a symbolic number; another value itself."""
        if not isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value
        if _identity(value) not in self._nodes:
            raise NoParts(f"{value} is no result of an op")
        return self._nodes[_identity(value)]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # a question, no call
            return func(*args)
        args, kwargs = tree_map(self.node, (tuple(args), dict(kwargs or {})))
        if func is torch.ops.aten.detach.default:  # nothing here records gradients
            return self._result(args[0])
        node = self._emit(func, *args, **kwargs)
        value = node.meta["val"]
        if isinstance(value, (tuple, list)):
            return tuple(self._result(result) for result in self._results(node, len(value)))
        return self._result(node)

    def _result(self, node: Node) -> Any:
        """What a call returns for a node: a tensor of its own, also where the node was there already."""
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return self._keep(node)
        fresh = value.detach()
        self._nodes[_identity(fresh)] = node
        self._values.append(fresh)
        return fresh


def _identity(value: Any) -> int:
    """What tells values apart; a symbolic number is wrapped anew whenever it passes the dispatcher."""
    return id(value) if isinstance(value, Tensor) else id(value.node)
