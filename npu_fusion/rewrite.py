"""Rewriting: selected matches become semantic op nodes in the FX graph.

Consumers are rewritten before their producers. Nothing is erased until all matches are in, so that any value can still be named as an
input; what is dead then goes. Metadata of a new node comes from its own fake kernel and must agree with what it replaces: a rule that gets
a shape or dtype wrong loses the site, not the model.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .layout import emit_layout, needs_layout, returned_memory, same_strides
from .match import Match, form_inputs
from .metadata import Metadata
from .provenance import PROVENANCE
from .semantic import is_ordered
from .torch_private import fake_mode_of, unbacked_float
from .verify import Check, make_check
from .view import Literal, Value, View
from .view.materialize import Materializer
from .view.shapes import same_shape, to_shape

log = logging.getLogger(__name__)


@dataclass
class Applied:
    """A match that is in the graph now: the nodes emitted for it, and old output node to new one."""

    match: Match
    call: Node
    emitted: list[Node]
    replaced: dict[Node, Node]


@dataclass
class RewriteResult:
    """What became of the selected matches.

    Attributes:
        applied: those that are in the graph.
        checks: what `verify=True` compares.
        skipped: those that could not be applied, with the reason.
        errors: rule name to the first exception that its arguments made a kernel raise.
    """

    applied: list[Applied] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    skipped: dict[Match, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def rewrite(gm: GraphModule, view: View, matches: Iterable[Match], keep_checks: bool = False) -> RewriteResult:
    """Apply the matches to the graph of `gm`, in place; making its code anew is left to the caller.

    Args:
        keep_checks: record what `verify=True` compares.
    """
    rewriter = _Rewriter(gm, view, keep_checks)
    rewriter.run(matches)
    rewriter.finish()
    return rewriter.result


def output_nodes(view: View, match: Match) -> list[Node]:
    """All FX nodes that compute an output of the match."""
    return [node for value in match.outputs for node in (*view.nodes.get(value, ()), *_reshape_of(view, value))]


def _reshape_of(view: View, value: Value) -> list[Node]:
    """The first node that computes an output, if it computes it in another shape: no node does in its own, or those are views of it."""
    family = _in_all_shapes(value)
    nodes = [node for member in family for node in view.nodes.get(member, ())]
    first = min(nodes, key=view.position.__getitem__, default=None)
    return [] if first is None or view.of[first] is value else [first]


def _in_all_shapes(value: Value) -> list[Value]:
    """The value and its reshapes. Casts stand outside of views: those of one type of a value in all shapes are one family."""
    source, dtype = (value.args[0], value.dtype) if value.op == "cast" else (value, None)
    base = source.args[0] if source.op == "reshape" else source
    shapes = [base, *(user for user in base.users if user.op == "reshape")]
    if dtype is None:
        return shapes
    return [user for shape in shapes for user in shape.users if user.op == "cast" and user.dtype == dtype]


def _sizes_first(graph: Graph) -> None:
    """Move sizes that are computed from inputs alone behind the inputs: an op that stands before them in the model may need them."""
    placeholders = graph.find_nodes(op="placeholder")
    early = {node for node in placeholders if not isinstance(node.meta.get("val"), torch.Tensor)}
    last = placeholders[-1] if placeholders else None
    for node in [node for node in graph.nodes if node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt)]:
        if last is not None and not node.is_impure() and early.issuperset(node.all_input_nodes):
            last.append(node)
            early.add(node)
            last = node


class _Rejected(Exception):
    """The match cannot be applied to this graph."""


class _Rewriter:
    def __init__(self, gm: GraphModule, view: View, keep_checks: bool) -> None:
        self.graph = gm.graph
        self.view = view
        self.keep_checks = keep_checks
        self.fake_mode = fake_mode_of(gm)
        self.metadata = Metadata(self.fake_mode)
        self.result = RewriteResult()
        self.dead: set[Node] = set()
        self.emitted: list[Node] = []
        self.template: Node | None = None
        self.materializer = Materializer(view, self.graph, self._emit)
        self.new: dict[Node, Node] = {}
        self.absorbed: set[Node] = set()
        self.returned = returned_memory(self.graph)
        _sizes_first(self.graph)

    # ---------------------------------------------------------------- one match

    def run(self, matches: Iterable[Match]) -> None:
        """Apply the matches, consumers before producers. In place of one that does not fit, the matches that it would have absorbed."""
        pending: list[tuple[int, int, Match]] = []
        counter = itertools.count()

        def push(match: Match) -> None:
            last = max((self.view.position[node] for node in output_nodes(self.view, match)), default=0)
            heapq.heappush(pending, (-last, next(counter), match))

        for match in matches:
            push(match)
        while pending:
            _, _, match = heapq.heappop(pending)
            if not self._try(match):
                for part in match.parts:
                    push(part)

    def _try(self, match: Match) -> bool:
        """Apply one match, unless nothing needs it any more. False if it does not fit; the graph is then as it was."""
        outputs = [node for node in output_nodes(self.view, match) if self._live_users(node)]
        if not outputs:
            return True
        try:
            self._apply(match, outputs)
        except Exception as error:  # a rule's arguments may make any op's fake kernel raise: the site stays as it is
            for node in reversed(self.emitted):
                self.graph.erase_node(node)
            self._skip(match, error)
            return False
        return True

    def _skip(self, match: Match, error: Exception) -> None:
        if isinstance(error, _Rejected):
            self.result.skipped[match] = str(error)
            log.debug("match of rule %r not applied: %s", match.rule.name, error)
            return
        self.result.skipped[match] = text = f"{type(error).__name__}: {error}"
        if self.result.errors.setdefault(match.rule.name, text) is text:
            log.warning("rule %r: its semantic op cannot be called as it asks; the site stays unfused", match.rule.name, exc_info=error)

    def _apply(self, match: Match, outputs: list[Node]) -> None:
        self.emitted = []
        self.template = self._template(match, outputs)
        inputs = [value.node for value in _real_values(match) if value.node is not None]
        self._place(inputs, outputs)
        arguments = {name: self._argument(arg) for name, arg in match.call.args.items()}
        call = self._call(match, arguments)
        replaced = self._outputs(match, call)
        for old, new in replaced.items():
            self._check_metadata(match, old, new)
        self._absorb_collectives(match, call, replaced)
        replaced = {old: self._laid_out(old, new) for old, new in replaced.items()}
        if any(not argument < node for node in self.emitted for argument in node.all_input_nodes):
            raise _Rejected("a size that it needs is known later only")
        if self.keep_checks:
            original = {new: old.name for old, new in self.new.items()}
            self.result.checks.append(make_check(match.rule.name, self.emitted, replaced, original))
        for old, new in replaced.items():
            old.replace_all_uses_with(new)
            self.new[old] = new
            self._bury(old, replaced=True)
        for node in self.emitted:
            for argument in node.all_input_nodes:
                self._resurrect(argument)
        call.meta["npu_fusion_rule"] = match.rule.name
        visited = {node.name for value in match.visited for node in self.view.nodes.get(value, ())}
        call.meta["npu_fusion_replaced"] = sorted(visited | {node.name for node in replaced})
        self.result.applied.append(Applied(match, call, list(self.emitted), replaced))

    def _template(self, match: Match, outputs: list[Node]) -> Node:
        """The node whose provenance the new ones inherit: where the root of the pattern stands."""
        return match.root.node if match.root.node is not None else outputs[0]

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            return self._current(self.materializer.node(argument))
        if isinstance(argument, Literal):
            return self._literal(argument)
        if isinstance(argument, (list, tuple)):
            return [self._argument(item) for item in argument]
        return argument

    def _current(self, node: Any) -> Any:
        """The node that computes today what `node` computed in the original graph."""
        return self.new.get(node, node) if isinstance(node, Node) else node

    def _literal(self, literal: Literal) -> Any:
        if literal.source is None:
            assert literal.value is not None
            return literal.value * literal.scale if literal.scale != 1.0 else literal.value
        node = self._current(self.materializer.node(literal.source))
        if isinstance(node.meta["val"], torch.Tensor):
            node = self._item(node)
        return node if literal.scale == 1.0 else self._emit(operator.mul, (node, literal.scale), {})

    def _item(self, node: Node) -> Node:
        """The Python float in a 0-d CPU tensor: the run-time value of a float that Dynamo keeps symbolic."""
        item = self.graph.call_function(torch.ops.aten._local_scalar_dense.default, (node,))
        item.meta["val"] = unbacked_float(self.fake_mode)
        self.emitted.append(item)
        return item

    def _call(self, match: Match, arguments: Mapping[str, Any]) -> Node:
        schema = match.call.op.overload._schema
        known = {spec.name for spec in schema.arguments}
        unknown = set(arguments) - known
        if unknown:
            raise _Rejected(f"rule {match.rule.name!r} passes unknown arguments {sorted(unknown)} to {match.call.op.name}")
        positional = [arguments.get(spec.name, spec.default_value) for spec in schema.arguments if not spec.kwarg_only]
        keywords = {spec.name: arguments[spec.name] for spec in schema.arguments if spec.kwarg_only and spec.name in arguments}
        return self._emit(match.call.op.overload, tuple(positional), keywords)

    def _outputs(self, match: Match, call: Node) -> dict[Node, Node]:
        replaced: dict[Node, Node] = {}
        multiple = not isinstance(call.meta["val"], torch.Tensor)
        for position, value in enumerate(match.call.outputs):
            if value is None:
                continue
            old_nodes = self._replaceable(value)
            other_shape = [node for node in _reshape_of(self.view, value) if self._live_users(node)]
            if not old_nodes and not other_shape:
                continue
            new = self._emit(operator.getitem, (call, position), {}) if multiple else call
            replaced.update(dict.fromkeys(old_nodes, new))
            for node in other_shape:
                sizes = [self.materializer.size(size) for size in to_shape(node.meta["val"].shape)]
                replaced[node] = self._emit(torch.ops.aten.reshape.default, (new, sizes), {})
        return replaced

    def _replaceable(self, value: Value) -> list[Node]:
        """The nodes of a value that one new node can stand for.

        Copies of a value are one value, but not one tensor: of several that the graph returns only the first is replaced, and one that is
        written to is replaced only where it is alone. The others stay: copies of the new node.
        """
        nodes = [node for node in self.view.nodes.get(value, ()) if self._live_users(node)]
        if len(nodes) == 1:
            return nodes
        nodes = [node for node in nodes if node not in self.view.overwritten]
        returned = [node for node in nodes if node in self.returned]
        return [node for node in nodes if node not in returned[1:]]

    def _laid_out(self, old: Node, new: Node) -> Node:
        """The new node, copied into the memory layout of the old one where somebody might rely on that."""
        before, after = old.meta["val"], new.meta["val"]
        if same_strides(before, after) or not needs_layout(old):
            return new
        laid_out = emit_layout(lambda target, *args, **kwargs: self._emit(target, args, kwargs), new, before)
        if laid_out is None:
            raise _Rejected("its result would have another memory layout, on which something outside the graph may rely")
        return laid_out

    def _check_metadata(self, match: Match, old: Node, new: Node) -> None:
        before, after = old.meta["val"], new.meta["val"]
        if before.dtype != after.dtype:
            raise _Rejected(f"{match.call.op.name} gives {after.dtype}, the model {before.dtype}")
        if before.device != after.device:
            raise _Rejected(f"{match.call.op.name} gives a tensor on {after.device}, the model one on {before.device}")
        if not same_shape(to_shape(before.shape), to_shape(after.shape)):
            raise _Rejected(f"{match.call.op.name} gives shape {tuple(after.shape)}, the model {tuple(before.shape)}")

    def _absorb_collectives(self, match: Match, call: Node, replaced: Mapping[Node, Node]) -> None:
        """Let the collectives that the call makes by itself go, which must then be made by nothing else, nor in another order."""
        if not match.call.op.ordered:
            return
        absorbed = {node for value in match.visited for node in self.view.nodes.get(value, ()) if is_ordered(node.target)}
        gone = absorbed | set(replaced)

        def superfluous(node: Node) -> bool:
            kept = node.op != "call_function" or (node.is_impure() and node not in absorbed)
            return node in replaced or (not kept and all(map(superfluous, self._live_users(node))))

        if not all(map(superfluous, absorbed)):
            raise _Rejected("a collective that it makes is needed for something else too")
        between = itertools.takewhile(lambda node: node is not call, _nodes_from(min(absorbed))) if absorbed else ()
        if any(node.op == "call_function" and node.is_impure() and node not in gone and node not in self.dead for node in between):
            raise _Rejected("another collective or side effect stands between those that it makes")
        self.absorbed |= absorbed

    # ---------------------------------------------------------------- where

    def _place(self, inputs: Sequence[Node], outputs: Sequence[Node]) -> None:
        """Set the insertion point behind all inputs and before all users of the outputs, moving users down if need be."""
        inputs = [self._current(node) for node in inputs]
        last = max(inputs, default=None)
        first_output = min(outputs)
        place = first_output if last is None or last < first_output else last.next
        overwriting = [self.view.overwritten[node] for node in inputs if node in self.view.overwritten]
        if any(mutation < place for mutation in overwriting):
            raise _Rejected("one of its inputs is overwritten before the result is due")
        if place is not first_output:
            place = self._move_users(inputs, outputs, place)
        self.graph.inserting_before(place)

    def _move_users(self, inputs: Sequence[Node], outputs: Sequence[Node], place: Node) -> Node:
        """Move what depends on the outputs behind `place`; the node before which the call can stand then."""
        moved = self._users_before(outputs, place)
        if not moved.isdisjoint(inputs):
            raise _Rejected("one of its inputs depends on one of its outputs")
        mutations = set(self.view.overwritten.values())
        if any(node.is_impure() for node in moved) or any(min(outputs) < mutation < place for mutation in mutations):
            raise _Rejected("a side effect stands between its outputs and its inputs")
        for node in sorted(moved, reverse=True):
            place.prepend(node)
            place = node
        return place

    def _users_before(self, outputs: Sequence[Node], limit: Node) -> set[Node]:
        """Everything that depends on the outputs and stands before `limit`."""
        found: set[Node] = set()
        stack = [user for output in outputs for user in output.users]
        while stack:
            node = stack.pop()
            if node in found or not node < limit:
                continue
            found.add(node)
            stack.extend(node.users)
        return found

    # ---------------------------------------------------------------- life and death

    def _live_users(self, node: Node) -> list[Node]:
        return [user for user in node.users if user not in self.dead]

    def _bury(self, node: Node, *, replaced: bool = False) -> None:
        """Mark the node, and what only it needed, as dead. Of one that was replaced the new node has the side effects as well: the wait for
        a collective."""
        stack, first = [node], node
        while stack:
            node = stack.pop()
            if node in self.dead or node.op != "call_function" or self._live_users(node):
                continue
            if node.is_impure() and node not in self.absorbed and not (replaced and node is first):
                continue
            self.dead.add(node)
            stack.extend(node.all_input_nodes)

    def _resurrect(self, node: Node) -> None:
        stack = [node]
        while stack:
            node = stack.pop()
            if node in self.dead:
                self.dead.discard(node)
                stack.extend(node.all_input_nodes)

    def finish(self) -> None:
        for node in sorted(self.dead, reverse=True):
            if not node.users:
                self.graph.erase_node(node)
        self._make_views_tolerant()

    def _make_views_tolerant(self) -> None:
        """Turn `view` into `reshape`: a fused op's result may have other strides than the nodes that it replaces."""
        if self.result.applied:
            for node in self.graph.nodes:
                if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                    node.target = torch.ops.aten.reshape.default

    # ---------------------------------------------------------------- emission

    def _emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """A new node at the insertion point, its metadata computed by running only its own fake kernel."""
        args, kwargs = map_arg((args, kwargs), self._current)
        node = self.graph.call_function(target, args, kwargs)
        self.emitted.append(node)
        node.meta["val"] = self.metadata.of(target, args, kwargs)
        assert self.template is not None
        node.meta.update({key: self.template.meta[key] for key in PROVENANCE if key in self.template.meta})
        return node


def _nodes_from(node: Node) -> Iterator[Node]:
    """The node and those after it in its graph."""
    while node.op != "root":
        yield node
        node = node.next


def _real_values(match: Match) -> list[Value]:
    """The values with FX nodes from which the call's inputs are made."""
    found: list[Value] = []
    stack = list(form_inputs(match.call.args))
    while stack:
        value = stack.pop()
        if value.op == "overwritten":
            raise _Rejected("one of its inputs was written to in place")
        if value.node is not None:
            found.append(value)
        else:
            stack.extend(value.args)
    return found
