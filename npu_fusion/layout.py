"""Who relies on the memory that an FX node's tensor lies in: on its strides, or on its being nobody else's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from .torch_private import Max
from .view.shapes import known_equal, known_ge, product, to_dim
from .view.value import Dim

aten = torch.ops.aten
_CONSTANT = "_npu_fusion_constant"
_OWN_NAMESPACES = ("aten", "prims", "npu_fusion", "npu_fusion_lifted")
_HIDDEN_VIEWS = (aten._unsafe_view.default, aten.lift_fresh.default)  # share memory, though their schemas do not say so

_SIZES = (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default)  # read no memory


def is_view(node: Node) -> bool:
    """Whether the node's tensor may lie in the memory of its first input."""
    if node.target is operator.getitem or node.target in _HIDDEN_VIEWS:
        return True
    if not isinstance(node.target, OpOverload):
        return False
    return any(result.alias_info is not None and not result.alias_info.is_write for result in node.target._schema.returns)


def returned_memory(graph: Graph) -> set[Node]:
    """The nodes whose memory the graph hands out, as such or as a view."""
    return seen_through(node for output in graph.find_nodes(op="output") for node in output.all_input_nodes)


def seen_through(nodes: Iterable[Node]) -> set[Node]:
    """The nodes, and those whose memory they look at."""
    stack = list(nodes)
    found: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if is_view(node):
                stack += node.all_input_nodes[:1]
    return found


def memory_of(node: Node) -> Node:
    """The node that made the memory in which the node's tensor lies, as far as that is known: behind all views."""
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def only_reader(node: Node, reader: Node) -> bool:
    """Whether the node's tensor lies in memory that the graph has made, and that nobody but `reader` reads: it may be written over."""
    stack = [memory_of(node)]
    if not _makes_memory(stack[0]):
        return False
    while stack:
        for user in stack.pop().users:
            if user is reader or user.target in _SIZES:
                continue
            if not is_view(user):
                return False
            stack.append(user)
    return True


def _makes_memory(node: Node) -> bool:
    """Whether the node's results lie in memory of their own."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    return all(result.alias_info is None for result in node.target._schema.returns)


def needs_layout(node: Node) -> bool:
    """Whether somebody may rely on the strides: the caller, `as_strided`, an op that is not PyTorch's."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or user.target is aten.as_strided.default or _is_foreign(user):
                return True
            if is_view(user) and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _is_foreign(user: Node) -> bool:
    if user.target is operator.getitem:
        return False
    return not isinstance(user.target, OpOverload) or user.target.namespace not in _OWN_NAMESPACES


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape surely have the strides of one another, in the dimensions where that matters."""
    triples = zip(a.shape, a.stride(), b.stride(), strict=True)
    if all(known_equal(to_dim(x), to_dim(y)) or known_equal(to_dim(size), 1) for size, x, y in triples):
        return True
    return row_major(a) and row_major(b)  # sizes that are equal by a guard need not make strides that are equal as terms


def row_major(tensor: Tensor) -> bool:
    """Whether the tensor is surely contiguous. An empty tensor's strides, for which torch takes sizes of at least 1, matter to nobody."""
    expected: Dim = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not known_equal(_at_least_one(to_dim(stride)), expected) and not known_equal(to_dim(size), 1):
            return False
        expected = product((expected, to_dim(size)))
    return True


def _at_least_one(stride: Dim) -> Dim:
    """The stride with `Max(1, size)` read as `size`."""
    if isinstance(stride, int):
        return stride
    return stride.replace(lambda e: isinstance(e, (sympy.Max, Max)) and 1 in e.args, lambda e: e.func(*(a for a in e.args if a != 1)))


def dims_by_stride(tensor: Tensor) -> list[int] | None:
    """The order of dimensions, outermost first, in which the tensor is dense; None if it surely is not or one cannot tell."""
    order = sorted(range(tensor.dim()), key=lambda dim: (_rank(tensor, dim), dim))
    for place, dim in enumerate(order):
        expected = product(to_dim(tensor.shape[inner]) for inner in order[place + 1 :])
        if not known_equal(to_dim(tensor.stride(dim)), expected) and not known_equal(to_dim(tensor.shape[dim]), 1):
            return None
    return order


def _rank(tensor: Tensor, dim: int) -> int:
    """How many dimensions have a larger stride for certain."""
    own = to_dim(tensor.stride(dim))
    return sum(known_ge(to_dim(stride), own) and not known_equal(to_dim(stride), own) for stride in tensor.stride())


def emit_layout(emit: Callable[..., Node], node: Node, like: Tensor) -> Node | None:
    """A copy of the node in the memory layout of `like`, of the same shape; None where that is not dense, or cannot be told.

    Args:
        emit: makes a node with metadata of a target and its arguments.
    """
    order = dims_by_stride(like)
    if order is None:
        return None
    permuted = emit(aten.permute.default, node, order)
    dense = emit(aten.clone.default, permuted, memory_format=torch.contiguous_format)
    restored = emit(aten.permute.default, dense, sorted(range(len(order)), key=order.__getitem__))
    return restored if same_strides(like, restored.meta["val"]) else None


def own_tensor(gm: GraphModule, tensor: Tensor) -> str:
    """Make a tensor a constant of the graph module, under a name of its own."""
    serial = 0
    while hasattr(gm, name := f"{_CONSTANT}{serial}"):
        serial += 1
    gm.register_buffer(name, tensor)
    return name


def is_own_constant(node: Node) -> bool:
    """Whether the node is a constant that `own_tensor` gave the graph."""
    return node.op == "get_attr" and str(node.target).startswith(_CONSTANT)
