"""From an FX graph to its canonical view."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from .. import torch_private
from ..torch_private import is_wrapper_subclass
from .canon import Canon
from .shapes import to_dim, to_shape
from .value import Dim, Shape, Value, ValueTable

_COLLECTIVE_NAMESPACES = frozenset({"_c10d_functional", "c10d_functional", "c10d", "symm_mem"})

Handler = Callable[["ViewBuilder", Node, "list[Any]"], "Value | None"]
_HANDLERS: dict[str, Handler] = {}
_HANDLED: set[str] = set()  # names of ATen ops of which some overload has a handler


class View:
    """The canonical view of one graph.

    Attributes:
        table: all values.
        of: FX node to its value; tuple-valued nodes have a value too, and their `getitem`s another.
        nodes: value to every FX node that computes it, in graph order.
        position: FX node to its place in the graph.
        overwritten: FX node to the first node that writes into its memory. Its value stands for what it held before.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.table = ValueTable()
        self.canon = Canon(self.table)
        self.of: dict[Node, Value] = {}
        self.nodes: dict[Value, list[Node]] = {}
        self.position: dict[Node, int] = {}
        self.overwritten: dict[Node, Node] = {}

    def bind(self, node: Node, value: Value) -> None:
        self.of[node] = value
        self.nodes.setdefault(value, []).append(node)
        if value.node is None:
            value.node = node


def build_view(graph: Graph) -> View:
    """The canonical view of a functional ATen graph whose nodes carry `meta["val"]`. The graph is only read."""
    builder = ViewBuilder(View(graph))
    for position, node in enumerate(graph.nodes):
        builder.view.position[node] = position
        builder.visit(node)
        if is_mutating(node):
            builder.overwrite(node)
    return builder.view


class ViewBuilder:
    def __init__(self, view: View) -> None:
        self.view = view
        self.canon = view.canon
        self.table = view.table
        self._handlers: dict[Any, tuple[Handler | None, Any]] = {}
        self._changed: dict[Node, Value] = {}
        self._by_storage: dict[int, list[Node]] = {}
        self._indexed = 0

    def visit(self, node: Node) -> None:
        if node.op == "output":
            return
        if node.op != "call_function":
            self.view.bind(node, self._leaf(node))
            return
        value = self._symbolic(node)
        if value is None:
            value = self._call(node)
        self.view.bind(node, value)

    def overwrite(self, mutation: Node) -> None:
        """Everything that shares memory with what the node writes has another value from here on."""
        written = _written_by(mutation)
        self._index_storages()
        for storage in {storage for node in written for storage in _storages(node)}:
            for node in self._by_storage[storage]:
                self.view.overwritten.setdefault(node, mutation)
                shape, dtype = meta_of(node)
                self._changed[node] = self.table.unique("overwritten", (self.view.of[mutation],), {}, shape, dtype)

    def value_of(self, node: Node) -> Value:
        """The value that a node's memory holds by now."""
        return self._changed.get(node) or self.view.of[node]

    def _index_storages(self) -> None:
        """Enter the nodes visited since the last time. Only graphs with mutations pay for this."""
        nodes = list(self.view.position)
        for node in nodes[self._indexed :]:
            for storage in _storages(node):
                self._by_storage.setdefault(storage, []).append(node)
        self._indexed = len(nodes)

    # ---------------------------------------------------------------- nodes

    def _leaf(self, node: Node) -> Value:
        value = self._symbolic(node)
        if value is not None:
            return value
        shape, dtype = meta_of(node)
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant") and shape == () and dtype is not None:
            number = torch_private.constant_number(getattr(self.view.graph.owning_module, str(node.target), None))
            if number is not None:  # `torch.tensor(-1e9)` in the model's code
                return self.table.intern("full", (), {"value": number, "shape": (), "device": node.meta["val"].device}, (), dtype)
        return self.table.unique("input", (), {}, shape, dtype)

    def _symbolic(self, node: Node) -> Value | None:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            return self.canon.sym(to_dim(val))
        if type(val) is int:
            return self.canon.const(val)
        if isinstance(val, torch.SymFloat):
            return self.table.unique("symfloat", (), {}, (), None)
        return None

    def _call(self, node: Node) -> Value:
        target = node.target
        found = self._handlers.get(target)
        if found is None:
            found = self._handlers[target] = (_find_handler(target), _is_effectful(target))
        handler, effectful = found
        if target is operator.getitem:
            return self._getitem(node)
        if effectful and handler is None:
            return self.opaque(node)
        assert isinstance(target, OpOverload)  # what is not is effectful
        arguments = _bind_arguments(node, target)
        if handler is not None:
            value = handler(self, node, arguments)
            if value is not None:
                return value
        if torch.Tag.nondeterministic_seeded in target.tags:  # after the handlers: dropout outside training is not random
            return self.opaque(node)
        return self._generic(node, target._schema, arguments)

    def _getitem(self, node: Node) -> Value:
        source, index = node.args
        assert isinstance(source, Node)
        owner = self.value_of(source)
        parts = owner.attrs.get("parts")
        if parts is not None and isinstance(index, int):
            part: Value = parts[index]
            return part
        shape, dtype = meta_of(node)
        return self.table.intern("getitem", (owner,), {"index": index}, shape, dtype)

    def opaque(self, node: Node) -> Value:
        """A value equal to no other, with the node's tensor inputs as operands."""
        shape, dtype = meta_of(node)
        name = _name_of(node.target) if isinstance(node.target, OpOverload) else str(node.target)
        return self.table.unique(name, [self.value_of(n) for n in node.all_input_nodes], {"opaque": True}, shape, dtype)

    def _generic(self, node: Node, schema: Any, arguments: list[Any]) -> Value:
        """Any other pure op: operands by value, everything else by schema name.

        An overload of a known op that no handler understands gets another name, so that no pattern takes it for the canonical one.
        """
        operands: list[Value] = []
        attrs: dict[str, Any] = {}
        for spec, argument in zip(schema.arguments, arguments, strict=True):
            if isinstance(argument, Node):
                operands.append(self.value_of(argument))
                attrs[f"@{spec.name}"] = 1
            elif isinstance(argument, (list, tuple)) and any(isinstance(item, Node) for item in argument):
                operands.extend(self.operand(item) for item in argument if item is not None)
                attrs[f"@{spec.name}"] = tuple(item is not None for item in argument)
            elif spec.name not in ("pin_memory", "memory_format"):
                attrs[spec.name] = _hashable(argument)
        shape, dtype = meta_of(node)
        target = node.target
        assert isinstance(target, OpOverload)
        attrs["overload"] = target._overloadname
        name = _name_of(target)
        if target.namespace == "aten" and name in _HANDLED:
            name = f"{name}:{target._overloadname}"
        return self.table.intern(name, operands, attrs, shape, dtype)

    # ---------------------------------------------------------------- operands

    def operand(self, argument: Any) -> Value:
        """The value of an argument that is a node or a Python number."""
        if isinstance(argument, Node):
            return self.value_of(argument)
        return self.canon.const(argument)

    def dim(self, argument: Any) -> Dim:
        """The size or index that an argument holds."""
        if isinstance(argument, Node):
            return to_dim(argument.meta["val"])
        return int(argument)

    def cast_operand(self, argument: Any, dtype: torch.dtype | None, shape: Shape = ()) -> Value:
        """The operand in the type in which the op computes: type promotion, made explicit.

        Numbers stay numbers, and so do 0-d tensors in an op whose result has dimensions: they do not promote.
        """
        value = self.operand(argument)
        if value.dtype is None or dtype is None or (value.ndim == 0 and shape):
            return value
        return self.canon.cast(value, dtype)


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Declare the handler of ATen ops by name, with or without overload, or of another namespace's as `namespace::name`."""

    def register(handler: Handler) -> Handler:
        for name in names:
            _HANDLERS[name] = handler
            _HANDLED.add(name.partition(".")[0])
        return handler

    return register


def _find_handler(target: Any) -> Handler | None:
    if isinstance(target, OpOverload) and target.namespace == "aten":
        return _HANDLERS.get(f"{target._opname}.{target._overloadname}") or _HANDLERS.get(target._opname)
    if isinstance(target, OpOverload):
        return _HANDLERS.get(f"{target.namespace}::{target._opname}")
    return None


def _name_of(target: OpOverload) -> str:
    """The operator's name in the view: ATen's ops, and torch functions lifted before AOT, are known by their bare names."""
    return target._opname if target.namespace in ("aten", "npu_fusion_lifted") else f"{target.namespace}::{target._opname}"


def is_mutating(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _written_by(mutation: Node) -> list[Node]:
    """The nodes into whose memory an op writes, by its schema."""
    target = mutation.target
    assert isinstance(target, OpOverload)
    written = []
    for spec, argument in zip(target._schema.arguments, _bind_arguments(mutation, target), strict=True):
        if spec.is_write:
            written += [item for item in (argument if isinstance(argument, (list, tuple)) else [argument]) if isinstance(item, Node)]
    return written


def _storages(node: Node) -> list[int]:
    """Identities of the memory behind a node's tensors."""
    val = node.meta.get("val")
    tensors = [item for item in (val if isinstance(val, (list, tuple)) else [val]) if isinstance(item, torch.Tensor)]
    return [t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided and not is_wrapper_subclass(t)]


def _is_effectful(target: Any) -> bool:
    if not isinstance(target, OpOverload):
        return True
    return target._schema.is_mutable or target.namespace in _COLLECTIVE_NAMESPACES


def _bind_arguments(node: Node, target: OpOverload) -> list[Any]:
    """The node's arguments in schema order, defaults filled in."""
    kwargs = node.kwargs
    return [*node.args, *(kwargs.get(name, default) for name, default in _defaults(target)[len(node.args) :])]


@lru_cache(maxsize=4096)
def _defaults(target: OpOverload) -> tuple[tuple[str, Any], ...]:
    """Names and default values of an op's arguments; None where there is no default."""
    return tuple((spec.name, spec.default_value if spec.has_default_value() else None) for spec in target._schema.arguments)


def meta_of(node: Node) -> tuple[Shape, torch.dtype | None]:
    """Shape and dtype of a tensor-valued node; empty and None for everything else."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor) and not is_wrapper_subclass(val):
        return to_shape(val.shape), val.dtype
    return (), None


def _hashable(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(_hashable(item) for item in argument)
    return argument


from . import collectives as _collectives  # noqa: E402,F401  (fills _HANDLERS)
from . import handlers as _handlers  # noqa: E402,F401  (and so do these)
from . import norms as _norms  # noqa: E402,F401
from . import npu as _npu  # noqa: E402,F401
from . import quantized as _quantized  # noqa: E402,F401
from . import scatter as _scatter  # noqa: E402,F401
