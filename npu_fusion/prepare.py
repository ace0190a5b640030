"""Weights as kernels want them: laid out at every call, or kept.

Where a lowering lays out a packed weight, a scale or a zero point anew, the nodes that do it stand in the graph and are pure functions of
parameters and buffers. At every call they give what the weights are then, whoever wrote to them and how; nothing is held from one call to
the next, and no weight is in memory twice but for the one that is being used.

With `keep_prepared_weights=True` these nodes are taken out of the graph and recorded. The graph gets their results as inputs of its own;
`WeightPreparer` computes each once, at the first call, and keeps it beside the model's own weight: that is faster, and takes the memory of
such a weight twice. All graphs that want the same of a weight share it. It is computed anew, into the same memory, when its weight was
rebound, moved, or written to in a way that PyTorch counts: `load_state_dict`, `copy_`, an optimiser. What PyTorch does not count, a write
to `weight.data` or by a foreign kernel, is announced with `npu_fusion.reload_weights(compiled)`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.weak import WeakIdKeyDictionary

from . import torch_private
from .view.value import attribute_key
from .weights import erase_dead

PREPARED = "npu_fusion_prepared"
"""Key in the `meta` of a node that lays out a weight for a kernel; what it is made from need not be marked."""

Boxed = Callable[[list[Any]], Any]
_Stamp = tuple[tuple[int, int], ...]


def prepared(node: Node) -> Node:
    """Mark what a lowering made of weights alone."""
    if node.op == "call_function":
        node.meta[PREPARED] = True
    return node


# -------------------------------------------------------------------- recording


@dataclass(frozen=True, eq=False)
class Recipe:
    """How one prepared tensor is computed.

    Attributes:
        graph: of placeholders, the weights in order, and pure calls.
        positions: of the weights among the inputs of the graph that it was taken from.
        constants: the tensors of its `get_attr` nodes.
        key: equal for recipes that compute the same.
    """

    graph: Graph
    positions: tuple[int, ...]
    constants: dict[str, Tensor]
    key: Hashable

    def run(self, weights: Sequence[Tensor]) -> Tensor:
        """The prepared tensor, in memory of its own."""
        known: dict[Node, Any] = {}
        given = iter(weights)
        with torch.inference_mode(False), torch.no_grad():
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    known[node] = next(given)
                elif node.op == "get_attr":
                    known[node] = self.constants[node.target]
                elif node.op == "call_function":
                    args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                    known[node] = node.target(*args, **kwargs)
                else:
                    result: Tensor = known[node.args[0]]
        return result.clone() if any(result.untyped_storage()._cdata == w.untyped_storage()._cdata for w in weights) else result


def take_out(gm: GraphModule, real_inputs: Sequence[Any]) -> WeightPreparer | None:
    """Take what is computed from weights alone, and marked so, out of a lowered graph, in place.

    Args:
        gm: graph whose nodes carry `meta["val"]`.
        real_inputs: for each of its first placeholders the tensor that will be passed, or None.

    Returns:
        what supplies the graph's new inputs at each call, or None where there was nothing to take out.
    """
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    static = set(torch_private.static_input_indices())
    position = {
        node: i
        for i, (node, real) in enumerate(zip(placeholders, real_inputs))
        if i in static and isinstance(real, Tensor) and not _written(node)
    }
    recipes: list[Recipe] = []
    last = placeholders[-1] if placeholders else None
    for node in [node for node in gm.graph.nodes if PREPARED in node.meta]:
        recipe = _recipe(gm, node, position)
        if recipe is None:
            continue
        assert last is not None
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"prepared_{len(recipes)}")
        last.meta["val"] = node.meta["val"]
        last.meta[torch_private.STATIC_INPUT] = True
        node.replace_all_uses_with(last)
        erase_dead(node)
        recipes.append(recipe)
    if not recipes:
        return None
    gm.recompile()
    return WeightPreparer(recipes)


def _written(node: Node) -> bool:
    return any(isinstance(user.target, OpOverload) and user.target._schema.is_mutable for user in node.users)


def _recipe(gm: GraphModule, node: Node, position: dict[Node, int]) -> Recipe | None:
    """How the node is computed, or None where that needs more than weights, or it is but a view of one."""
    needed: dict[Node, None] = {}
    stack = [node]
    while stack:
        at = stack.pop()
        if at in needed:
            continue
        if at not in position and at.op != "get_attr" and not _is_pure(at):
            return None
        needed[at] = None
        stack += [] if at in position else at.all_input_nodes
    weights = [at for at in needed if at in position]
    calls = [at.target for at in needed if at.op == "call_function" and at not in position]
    if not weights or all(isinstance(target, OpOverload) and target.is_view for target in calls):
        return None
    graph, copies, lines = Graph(), {}, []
    for at in weights:
        copies[at] = graph.placeholder(at.name)
    constants: dict[str, Tensor] = {}
    for at in gm.graph.nodes:
        if at in needed and at not in position:
            if at.op == "get_attr":
                constants[str(at.target)] = getattr(gm, str(at.target))
            copies[at] = graph.node_copy(at, copies.__getitem__)
            lines.append(_line(at, list(copies), constants))
    graph.output(copies[node])
    return Recipe(graph, tuple(position[at] for at in weights), constants, tuple(lines))


def _is_pure(node: Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and not node.is_impure()


def _line(node: Node, known: list[Node], constants: dict[str, Tensor]) -> Hashable:
    if node.op == "get_attr":
        held = constants[str(node.target)]
        return "constant", str(held.dtype), tuple(held.shape), tuple(held.flatten().tolist())
    args, kwargs = map_arg((node.args, node.kwargs), lambda arg: f"%{known.index(arg)}")
    return str(node.target), attribute_key(tuple(args)), attribute_key(tuple(sorted(kwargs.items())))


# -------------------------------------------------------------------- at run time


@dataclass(eq=False)
class _Kept:
    """A prepared tensor, what it was made of, and how that was then."""

    key: Hashable
    weights: tuple[weakref.ref[Tensor], ...]
    tensor: Tensor
    stamp: _Stamp | None

    def is_of(self, key: Hashable, weights: Sequence[Tensor]) -> bool:
        return self.key == key and all(ref() is weight for ref, weight in zip(self.weights, weights, strict=True))

    def refresh(self, recipe: Recipe, weights: Sequence[Tensor]) -> bool:
        """Bring the tensor up to date, in its memory; False where the weights now make one of another shape."""
        stamp = _stamp(weights)
        if stamp is None or stamp != self.stamp:
            tensor = recipe.run(weights)
            if (tensor.shape, tensor.dtype, tensor.device) != (self.tensor.shape, self.tensor.dtype, self.tensor.device):
                return False
            with torch.inference_mode(False), torch.no_grad():
                self.tensor.copy_(tensor)
            self.stamp = stamp
        return True


def _stamp(weights: Sequence[Tensor]) -> _Stamp | None:
    """Where weights lie and how often they were written to; None for inference tensors, of which PyTorch does not know."""
    if any(weight.is_inference() for weight in weights):
        return None
    return tuple((weight.data_ptr(), weight._version) for weight in weights)


# First weight -> what is kept of it. It lives as long as the weight, and all graphs that want the same share it.
_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()


class WeightPreparer:
    """Supplies the prepared weights of one graph.

    Args:
        recipes: one for each further input of the graph, in order.
    """

    def __init__(self, recipes: Iterable[Recipe]) -> None:
        self.recipes = list(recipes)

    def __call__(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The prepared weights for these inputs of the graph."""
        return [_find_or_make(recipe, [inputs[i] for i in recipe.positions]) for recipe in self.recipes]

    def supply(self, run: Boxed) -> Boxed:
        """The boxed function `run` of the rewritten graph as one of the inputs of the original graph."""

        def call(inputs: list[Any]) -> Any:
            inputs.extend(self(inputs))
            return run(inputs)

        return torch_private.boxed(call)

    @property
    def note(self) -> str:
        """What is kept, for the report."""
        return f"{len(self.recipes)} weights, scales and zero points are kept as kernels want them (keep_prepared_weights=True)"

    def forget(self) -> None:
        """Compute everything anew at the next call."""
        wanted = {recipe.key for recipe in self.recipes}
        for entries in list(_KEPT.values()):
            for kept in entries:
                if kept.key in wanted:
                    kept.stamp = None


def _find_or_make(recipe: Recipe, weights: Sequence[Tensor]) -> Tensor:
    entries: list[_Kept] = _KEPT.setdefault(weights[0], [])
    for kept in entries:
        if kept.is_of(recipe.key, weights):
            if kept.refresh(recipe, weights):
                return kept.tensor
            entries.remove(kept)
            break
    made = _Kept(recipe.key, tuple(weakref.ref(weight) for weight in weights), recipe.run(weights), _stamp(weights))
    entries.append(made)
    return made.tensor
