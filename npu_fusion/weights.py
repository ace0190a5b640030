"""Weight preparation: linears that read one input become one matrix product on their merged weight.

q, k and v, or gate and up, are two or three products of the same activations. One product on the weights laid one below the other launches
once, reads the activations once, and gives rules the one tensor that fused ops want (a SwiGLU of two halves, the norm and rotation of a
packed QKV). The graph gets the merged weight as an input of its own; `WeightMerger` supplies it at every call.

No weight is kept twice. At the first call the merged weight is allocated, and the parameters become views of it, by `parameter.data = ...`:
the same Parameter objects with the same values, so that whatever writes to them (`load_state_dict`, an optimiser, `parameter.data.copy_`)
writes to the merged weight. Each call makes sure that all parameters still are where they were put. One that has been rebound, moved, or
replaced by another Parameter is merged again.

Only memory that nobody but the parameters refers to is given up: a tensor from `state_dict()` that the caller still holds, a file mapped
into memory, an array of numpy, or memory shared with another process would no longer see the model's writes, nor the model theirs. Linears
whose weights are such when the graph is compiled are not merged at all. Weights that become such later are concatenated anew at every
call, which is slow and right, and logged.

Which linears: those next to one another (children of one module, so that a router or a parallel branch does not end up between gate and
up) whose weights are parameters of one dtype and device. Their number of launches always falls by all but one and nothing more is
read or written, so that every group is merged, whatever rules then make of it.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.weak import WeakIdKeyDictionary

from . import torch_private
from .errors import UnsupportedInputError
from .provenance import PROVENANCE, module_of
from .view.shapes import same_shape, to_shape

logger = logging.getLogger(__name__)

Boxed = Callable[[list[Any]], Any]
aten = torch.ops.aten

ALIGNMENT = 16  # bytes: every linear's part of the result starts where kernels can read whole vectors
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_PRODUCTS = frozenset({aten.mm.default, aten.matmul.default})
_SAME = _VIEWS | {aten.clone.default, aten.alias.default, aten.detach.default}


# -------------------------------------------------------------------- finding linears


@dataclass(frozen=True)
class _Linear:
    """One linear in the graph.

    Attributes:
        node: the product, bias included.
        x: its input, [..., K].
        weight: placeholder of the parameter [N, K].
        bias: placeholder of the parameter [N], or None.
        result: what the rest of the graph reads: [..., N], the product itself or its only view.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    result: Node

    @property
    def size(self) -> int:
        return int(self.weight.meta["val"].shape[0])


def _linear(node: Node, parameters: set[Node]) -> _Linear | None:
    """The linear that a node computes from parameters, or None.

    On an NPU a linear whose input has leading dimensions is a `matmul`, and an `add` where it has a bias; elsewhere AOT folds them.
    """
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
    elif node.target in _PRODUCTS and not _is_biased(node, parameters):
        x, weight, bias = node.args[0], _transposed(node.args[1]), None
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args[0], node.args[1], _transposed(node.args[2])
    elif node.target is aten.add.Tensor and isinstance(node.args[0], Node) and _is_biased(node.args[0], parameters):
        x, weight, bias = node.args[0].args[0], _transposed(node.args[0].args[1]), node.args[1]
    else:
        return None
    if weight not in parameters or (bias is not None and bias not in parameters):
        return None
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    if not _is_plain(weight, 2) or (bias is not None and not _is_plain(bias, 1)):
        return None
    result = _result(node)
    if weight.meta["val"].shape[0] * weight.meta["val"].itemsize % ALIGNMENT or _leaves(result):
        return None
    return _Linear(node, x, weight, bias if isinstance(bias, Node) else None, result)


def _is_biased(node: Node, parameters: set[Node]) -> bool:
    """Whether the node is a `matmul` to which its only user adds a vector of parameters."""
    if node.target is not aten.matmul.default or len(node.users) != 1:
        return False
    [user] = node.users
    if user.target is not aten.add.Tensor or user.kwargs or user.args[0] is not node or user.args[1] not in parameters:
        return False
    bias = user.args[1].meta["val"]  # type: ignore[union-attr]
    return bias.dim() == 1 and same_shape(to_shape(bias.shape), to_shape(node.meta["val"].shape[-1:]))


def _transposed(node: Any) -> Any:
    """The matrix that the node is the transpose of, or None."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target is aten.t.default:
        return node.args[0]
    if node.target is aten.transpose.int and {int(d) % 2 for d in node.args[1:]} == {0, 1}:  # type: ignore[arg-type]
        return node.args[0]
    return node.args[0] if node.target is aten.permute.default and list(node.args[1]) in ([1, 0], [-1, -2]) else None  # type: ignore[arg-type]


def _is_plain(parameter: Any, rank: int) -> bool:
    """Whether a parameter of that rank has static sizes and lies densely in memory."""
    val = parameter.meta["val"]
    return val.dim() == rank and all(type(size) is int for size in val.shape) and val.is_contiguous()


def _result(node: Node) -> Node:
    """The one view of a product that gives it leading dimensions again, or the product."""
    [user] = node.users if len(node.users) == 1 else [node]
    if user.target not in _VIEWS or not isinstance(user.args[1], (list, tuple)) or -1 in user.args[1]:
        return node
    return user if same_shape(to_shape(user.meta["val"].shape[-1:]), to_shape(node.meta["val"].shape[-1:])) else node


def _leaves(node: Node) -> bool:
    """Whether the value, or a view of it, gets to somebody who may rely on its strides: the graph's caller, a custom op, `as_strided`."""
    for user in node.users:
        target = user.target
        if user.op == "output" or not isinstance(target, OpOverload) or target is aten.as_strided.default:
            return True
        if target.namespace not in ("aten", "prims", "npu_fusion", "npu_fusion_lifted"):
            return True
        if (target.is_view or target in _VIEWS) and _leaves(user):
            return True
    return False


def _written(node: Node) -> bool:
    """Whether the graph writes to the input, in which its merged weight would be a second name for the memory."""
    return any(isinstance(user.target, OpOverload) and user.target._schema.is_mutable for user in node.users)


def _source(x: Node) -> Node:
    """The node that x is a reshaped copy of."""
    while x.target in _SAME and isinstance(x.args[0], Node):
        x = x.args[0]
    return x


def _key(linear: _Linear) -> Hashable:
    """Equal for linears that can be merged."""
    val = linear.weight.meta["val"]
    siblings = (module_of(linear.node) or "").rpartition(".")[0]
    biased = linear.bias is not None and linear.bias.meta["val"].dtype
    has_view = linear.result is not linear.node
    shapes = to_shape(linear.x.meta["val"].shape), to_shape(linear.result.meta["val"].shape[:-1])
    return _source(linear.x), shapes, linear.node.target, val.dtype, val.device, val.shape[1], biased, has_view, siblings


def _groups(graph: Graph, parameters: set[Node]) -> list[list[_Linear]]:
    found: dict[Hashable, dict[Node, _Linear]] = {}
    for node in graph.nodes:
        linear = _linear(node, parameters) if node.op == "call_function" else None
        if linear is not None:
            found.setdefault(_key(linear), {}).setdefault(linear.weight, linear)
    return [list(group.values()) for group in found.values() if len(group) > 1]


# -------------------------------------------------------------------- rewriting the graph


def merge_linears(gm: GraphModule, real_inputs: Sequence[Any]) -> WeightMerger | None:
    """Merge the linears of a functional ATen graph that share their input, in place.

    The merged weights and biases are new placeholders behind the others.

    Args:
        gm: graph whose nodes carry `meta["val"]`.
        real_inputs: for each placeholder the tensor that will be passed, or None. Fake and meta parameters count as ones to merge.

    Returns:
        what supplies the new inputs at each call, or None where there was nothing to merge.
    """
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    if len(placeholders) != len(real_inputs):
        return None
    position = {node: i for i, node in enumerate(placeholders)}
    parameters = {
        node for node, real in zip(placeholders, real_inputs, strict=True) if isinstance(real, nn.Parameter) and not _written(node)
    }
    emitter = _Emitter(gm, placeholders[-1] if placeholders else None)
    for group in _groups(gm.graph, parameters):
        parts = [[position[linear.weight] for linear in group]]
        if group[0].bias is not None:
            parts.append([position[linear.bias] for linear in group if linear.bias is not None])
        if all(len(set(p)) == len(group) and _can_merge([real_inputs[i] for i in p]) for p in parts):
            emitter.merge(group, parts)
    if not emitter.inputs:
        return None
    emitter.finish()
    return WeightMerger(emitter.inputs)


def _can_merge(parameters: Sequence[Tensor]) -> bool:
    if any(torch_private.has_no_memory(parameter) for parameter in parameters):
        return True
    return _adjacent(parameters) or why_not_owned(parameters) is None


class _Emitter:
    def __init__(self, gm: GraphModule, last_input: Node | None) -> None:
        self.gm, self.graph = gm, gm.graph
        self.fake_mode = torch_private.fake_mode_of(gm)
        self.last_input = last_input
        self.inputs: list[tuple[int, ...]] = []
        self.parts: set[Node] = set()

    def merge(self, group: Sequence[_Linear], parts: Sequence[Sequence[int]]) -> None:
        first = min(group, key=lambda linear: linear.result)
        weight = self._input("merged_weight", [linear.weight for linear in group], parts[0])
        bias = self._input("merged_bias", [linear.bias for linear in group if linear.bias], parts[1]) if len(parts) > 1 else None
        self.graph.inserting_before(first.result)
        product = self._product(first, weight, bias)
        if first.result is not first.node:
            lead: list[Any] = list(first.result.args[1])[:-1]  # type: ignore[arg-type]
            product = self._emit(aten.reshape.default, (product, [*lead, sum(linear.size for linear in group)]), first)
        start = 0
        for linear in group:
            dim = product.meta["val"].dim() - 1
            part = self._emit(aten.slice.Tensor, (product, dim, start, start + linear.size), linear)
            linear.result.replace_all_uses_with(part)
            self.parts.add(part)
            start += linear.size
        for linear in group:
            erase_dead(linear.result)

    def _input(self, name: str, parts: Sequence[Node], positions: Sequence[int]) -> Node:
        assert self.last_input is not None
        with self.graph.inserting_after(self.last_input):
            node = self.graph.placeholder(f"{name}_{len(self.inputs)}")
        vals = [part.meta["val"] for part in parts]
        with self.fake_mode:
            node.meta["val"] = vals[0].new_empty((sum(val.shape[0] for val in vals), *vals[0].shape[1:]))
        node.meta[torch_private.STATIC_INPUT] = True
        self.last_input = node
        self.inputs.append(tuple(positions))
        return node

    def _product(self, first: _Linear, weight: Node, bias: Node | None) -> Node:
        if first.node.target is aten.linear.default:
            return self._emit(aten.linear.default, (first.x, weight, bias), first)
        transposed = self._emit(aten.t.default, (weight,), first)
        if first.node.target is aten.addmm.default:
            return self._emit(aten.addmm.default, (bias, first.x, transposed), first)
        product = self._emit(aten.mm.default if first.node.target is aten.mm.default else aten.matmul.default, (first.x, transposed), first)
        return product if bias is None else self._emit(aten.add.Tensor, (product, bias), first)

    def _emit(self, target: OpOverload, args: tuple[Any, ...], origin: _Linear) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = self._run(target, args, {})
        node.meta.update({key: origin.node.meta[key] for key in PROVENANCE if key in origin.node.meta})
        return node

    def finish(self) -> None:
        """Let views be copies where they must, and bring strides up to date: the parts of a merged product have gaps between their rows."""
        moved = self.parts
        for node in self.graph.nodes:
            if node.target in _VIEWS:
                node.target = aten.reshape.default
            is_view = isinstance(node.target, OpOverload) and (node.target.is_view or node.target is aten.reshape.default)
            if is_view and not moved.isdisjoint(node.all_input_nodes) and _has_static_sizes(node):
                node.meta["val"] = self._run(node.target, node.args, node.kwargs)
                moved.add(node)
        self.gm.recompile()

    def _run(self, target: OpOverload, args: Any, kwargs: Any) -> Any:
        args, kwargs = map_arg((args, kwargs), lambda node: node.meta["val"])
        with self.fake_mode:
            return target(*args, **kwargs)


def _has_static_sizes(node: Node) -> bool:
    """Whether all sizes are known: a view of symbolic sizes may add guards when it is computed again."""
    val = node.meta["val"]
    return isinstance(val, Tensor) and all(type(size) is int for size in val.shape)


def erase_dead(node: Node) -> None:
    """Erase a node without users, and what only it needed."""
    if not node.users and node.op == "call_function":
        operands = node.all_input_nodes
        node.graph.erase_node(node)
        for operand in operands:
            erase_dead(operand)


# -------------------------------------------------------------------- merged weights at run time


@dataclass(eq=False)
class _Merged:
    """A merged weight, and the addresses of its parts. While the tensor lives, nothing else can lie there."""

    tensor: Tensor
    addresses: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> _Merged:
        """The merged weight of parts that lie next to one another."""
        return cls(_span(parts), tuple(map(Tensor.data_ptr, parts)), tuple(map(Tensor.stride, parts)))

    def holds(self, parts: Sequence[Tensor]) -> bool:
        """Whether the tensors are the parts, in order. Where Dynamo guards the strides for which the graph was compiled, addresses tell."""
        if tuple(map(Tensor.data_ptr, parts)) != self.addresses:
            return False
        return torch_private.GUARDS_PARAMETERS or tuple(map(Tensor.stride, parts)) == self.strides


# First part -> shape -> merged weight. It lives as long as the parameter, and all graphs that merge the same parameters share it.
_MERGED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _nothing() -> None:
    return None


@dataclass
class _Slot:
    """One merged input of one graph: positions of its parts, and the merged weight of the last call."""

    positions: tuple[int, ...]
    last: Callable[[], _Merged | None] = field(default=_nothing)
    shapes: list[torch.Size] | None = None

    def tensor(self, inputs: Sequence[Any]) -> Tensor:
        parts = [inputs[i] for i in self.positions]
        if not torch_private.GUARDS_PARAMETERS:
            self._check_shapes([part.shape for part in parts])
        tensor = self._same_as_last(parts)
        if tensor is not None:
            return tensor
        merged = _find_or_merge(parts)
        if merged is None:
            return torch.cat(parts)
        self.last = weakref.ref(merged)
        return merged.tensor

    def _check_shapes(self, shapes: list[torch.Size]) -> None:
        """Raise where a parameter has another shape than the graph was compiled for, and Dynamo did not see it."""
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            raise UnsupportedInputError(
                f"a weight was rebound to another shape (now {list(map(list, shapes))}, compiled for {list(map(list, self.shapes))}), "
                f"which torch {torch.__version__} does not notice: call torch.compiler.reset() after such a change"
            )

    def _same_as_last(self, parts: Sequence[Tensor]) -> Tensor | None:
        merged = self.last()
        return merged.tensor if merged is not None and merged.holds(parts) else None


class WeightMerger:
    """Supplies the merged weights of one graph.

    Args:
        groups: for each merged input, the positions of the parameters that it is made of.
    """

    def __init__(self, groups: Iterable[tuple[int, ...]]) -> None:
        self.slots = [_Slot(positions) for positions in groups]

    def __call__(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The merged weights for these inputs of the graph, which become views of them if they are not yet."""
        return [slot.tensor(inputs) for slot in self.slots]

    def supply(self, run: Boxed) -> Boxed:
        """The boxed function `run` of the rewritten graph as one of the inputs of the original graph."""

        def call(inputs: list[Any]) -> Any:
            inputs.extend(self(inputs))
            return run(inputs)

        return torch_private.boxed(call)

    @property
    def note(self) -> str:
        """What was merged, for the report."""
        merged = sum(len(slot.positions) for slot in self.slots)
        return f"{merged} weights and biases of linears that share their input are merged into {len(self.slots)} (merge_weights=True)"


def _find_or_merge(parts: Sequence[Tensor]) -> _Merged | None:
    """The merged weight of the parts: one made before, the memory in which they lie next to one another, or a new one. None where their
    memory must stay where it is."""
    if not _adjacent(parts):
        for part in parts:
            _MERGED.pop(part, None)  # what they were part of before must not count as somebody who refers to their memory
        reason = why_not_owned(parts)
        if reason is not None:
            _warn_once(parts, reason)
            return None
        _take_over(parts)
    known: dict[torch.Size, _Merged] = _MERGED.setdefault(parts[0], {})
    merged = _Merged.of(parts)
    found = known.get(merged.tensor.shape)
    if found is None or found.addresses != merged.addresses or found.tensor.dtype is not merged.tensor.dtype:
        found = known[merged.tensor.shape] = merged
    return found


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether the parts lie one behind the other in one storage."""
    first = parts[0]
    storage, offset = first.untyped_storage()._cdata, first.storage_offset()
    for part in parts:
        if part.untyped_storage()._cdata != storage or part.storage_offset() != offset or not _same_kind(part, first):
            return False
        offset += part.numel()
    return True


def _same_kind(part: Tensor, first: Tensor) -> bool:
    """Whether two parts can be rows of one tensor."""
    return part.is_contiguous() and part.dtype is first.dtype and part.device == first.device and part.shape[1:] == first.shape[1:]


def why_not_owned(parts: Sequence[Tensor]) -> str | None:
    """Why the memory of the parts must not be replaced, or None where only they refer to it."""
    if any(type(part) not in (Tensor, nn.Parameter) or part.is_inference() or not part.is_leaf for part in parts):
        return "a weight is no plain parameter"
    if not all(_same_kind(part, parts[0]) for part in parts):
        return "the weights differ in type, device or layout"
    if any(part.device.type == "cpu" and part.is_shared() for part in parts):
        return "a weight is shared between processes"
    if any(not torch_private.is_torch_memory(part) for part in parts):
        return "a weight lies in memory that is not PyTorch's own, e.g. a mapped file"
    storages = {part.untyped_storage()._cdata: part for part in parts}
    uses = Counter(part.untyped_storage()._cdata for part in parts)
    if any(torch_private.storage_users(part) != uses[storage] for storage, part in storages.items()):
        return "another tensor refers to the memory of a weight, e.g. one from state_dict() or a tied weight"
    return None


def _take_over(parts: Sequence[Tensor]) -> None:
    """Copy the parts into new memory, one behind the other, and make them views of it."""
    with torch.inference_mode(False), torch.no_grad():
        rows = sum(part.shape[0] for part in parts)
        merged = torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device)
        start = 0
        for part in parts:
            target = merged[start : start + part.shape[0]]
            target.copy_(part)
            part.data = target
            start += part.shape[0]
    logger.debug("merged %d weights into one of shape %s", len(parts), tuple(merged.shape))


def _span(parts: Sequence[Tensor]) -> Tensor:
    """The tensor over the memory of adjacent parts. It is no view of any of them, and keeps none of them alive."""
    first = parts[0]
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    with torch.inference_mode(False), torch.no_grad():
        empty = torch.empty(0, dtype=first.dtype, device=first.device)
        return empty.set_(first.untyped_storage(), first.storage_offset(), shape, first.stride())


_WARNED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _warn_once(parts: Sequence[Tensor], reason: str) -> None:
    if _WARNED.get(parts[0]) != reason:
        _WARNED[parts[0]] = reason
        logger.warning("merged weights of shapes %s are concatenated at every call: %s", [tuple(part.shape) for part in parts], reason)
