"""Rewriting: selected matches become semantic op nodes in the FX graph.

Consumers are rewritten before their producers. Nothing is erased until all matches are in, so that any value can still be named as an
input; what is dead then goes. Metadata of a new node comes from its own fake kernel and must agree with what it replaces: a rule that gets a
shape or dtype wrong loses the site, not the model.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .match import Match, form_inputs
from .torch_private import fake_mode_of, unbacked_float
from .verify import Check, make_check
from .view import Literal, Value, View
from .view.materialize import Materializer
from .view.shapes import same_shape, to_shape

log = logging.getLogger(__name__)

_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr", "from_node", "torch_fn")


@dataclass
class Applied:
    """A match that is in the graph now: the nodes emitted for it, and old output node to new one."""

    match: Match
    call: Node
    emitted: list[Node]
    replaced: dict[Node, Node]


@dataclass
class RewriteResult:
    applied: list[Applied] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    skipped: dict[Match, str] = field(default_factory=dict)


def rewrite(gm: GraphModule, view: View, matches: Iterable[Match], keep_checks: bool = False) -> RewriteResult:
    """Apply the matches to the graph of `gm`, in place. `keep_checks` records what `verify=True` needs to compare them with the original."""
    rewriter = _Rewriter(gm, view, keep_checks)
    rewriter.run(matches)
    rewriter.finish()
    gm.recompile()
    return rewriter.result


def output_nodes(view: View, match: Match) -> list[Node]:
    """All FX nodes that compute an output of the match."""
    return [node for value in match.outputs for node in view.nodes.get(value, ())]


class _Rejected(Exception):
    """The match cannot be applied to this graph."""


class _Rewriter:
    def __init__(self, gm: GraphModule, view: View, keep_checks: bool) -> None:
        self.graph = gm.graph
        self.view = view
        self.keep_checks = keep_checks
        self.fake_mode = fake_mode_of(gm)
        self.result = RewriteResult()
        self.dead: set[Node] = set()
        self.emitted: list[Node] = []
        self.template: Node | None = None
        self.materializer = Materializer(view, self.graph, self._emit)
        self.new: dict[Node, Node] = {}

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
            self.result.skipped[match] = str(error) if isinstance(error, _Rejected) else f"{type(error).__name__}: {error}"
            level = logging.DEBUG if isinstance(error, _Rejected) else logging.WARNING
            log.log(level, "match of rule %r not applied: %s", match.rule.name, self.result.skipped[match])
            return False
        return True

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
        if self.keep_checks:
            original = {new: old.name for old, new in self.new.items()}
            self.result.checks.append(make_check(match.rule.name, self.emitted, replaced, original))
        for old, new in replaced.items():
            old.replace_all_uses_with(new)
            self.new[old] = new
            self._bury(old)
        for node in self.emitted:
            for argument in node.all_input_nodes:
                self._resurrect(argument)
        call.meta["npu_fusion_rule"] = match.rule.name
        call.meta["npu_fusion_replaced"] = sorted({n.name for v in match.visited for n in self.view.nodes.get(v, ())} | {n.name for n in replaced})
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
            old_nodes = [node for node in self.view.nodes.get(value, ()) if self._live_users(node)] if value is not None else []
            if not old_nodes:
                continue
            new = self._emit(operator.getitem, (call, position), {}) if multiple else call
            replaced.update(dict.fromkeys(old_nodes, new))
        return replaced

    def _check_metadata(self, match: Match, old: Node, new: Node) -> None:
        before, after = old.meta["val"], new.meta["val"]
        if before.dtype != after.dtype:
            raise _Rejected(f"{match.call.op.name} gives {after.dtype}, the model {before.dtype}")
        if before.device != after.device:
            raise _Rejected(f"{match.call.op.name} gives a tensor on {after.device}, the model one on {before.device}")
        if not same_shape(to_shape(before.shape), to_shape(after.shape)):
            raise _Rejected(f"{match.call.op.name} gives shape {tuple(after.shape)}, the model {tuple(before.shape)}")

    # ---------------------------------------------------------------- where

    def _place(self, inputs: Sequence[Node], outputs: Sequence[Node]) -> None:
        """Set the insertion point behind all inputs and before all users of the outputs, moving users down if need be."""
        inputs = [self._current(node) for node in inputs]
        last = max(inputs, default=None)
        first_output = min(outputs)
        if last is None or last < first_output:
            self.graph.inserting_before(first_output)
            return
        behind = last.next
        moved = self._users_before(outputs, behind)
        if moved is None:
            raise _Rejected("one of its inputs depends on one of its outputs")
        for node in reversed(moved):
            behind.prepend(node)
            behind = node
        self.graph.inserting_before(behind)

    def _users_before(self, outputs: Sequence[Node], limit: Node) -> list[Node] | None:
        """Everything that depends on the outputs and stands before `limit`, in order; None if that holds an input or a side effect."""
        found: set[Node] = set()
        stack = [user for output in outputs for user in output.users]
        while stack:
            node = stack.pop()
            if node in found or not node < limit:
                continue
            found.add(node)
            stack.extend(node.users)
        if limit.prev in found or any(node.is_impure() for node in found):
            return None
        return sorted(found)

    # ---------------------------------------------------------------- life and death

    def _live_users(self, node: Node) -> list[Node]:
        return [user for user in node.users if user not in self.dead]

    def _bury(self, node: Node) -> None:
        """Mark the node, and what only it needed, as dead."""
        stack = [node]
        while stack:
            node = stack.pop()
            if node in self.dead or node.op != "call_function" or node.is_impure() or self._live_users(node):
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
                if node.target is torch.ops.aten.view.default:
                    node.target = torch.ops.aten.reshape.default

    # ---------------------------------------------------------------- emission

    def _emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """A new node at the insertion point, its metadata computed by running only its own fake kernel."""
        args, kwargs = map_arg((args, kwargs), self._current)
        node = self.graph.call_function(target, args, kwargs)
        self.emitted.append(node)
        fake_args, fake_kwargs = map_arg((args, kwargs), _fake_argument)
        with self.fake_mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        assert self.template is not None
        node.meta.update({key: self.template.meta[key] for key in _KEPT_META if key in self.template.meta})
        return node


def _fake_argument(node: Node) -> Any:
    """What a fake kernel gets for a node. A number known at run time only is any number: metadata never depends on one."""
    val = node.meta["val"]
    return 1.0 if isinstance(val, torch.SymFloat) else val


def _real_values(match: Match) -> list[Value]:
    """The values with FX nodes from which the call's inputs are made."""
    found: list[Value] = []
    stack = list(form_inputs(match.call.args))
    while stack:
        value = stack.pop()
        if value.node is not None:
            found.append(value)
        else:
            stack.extend(value.args)
    return found
