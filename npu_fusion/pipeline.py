"""View, match, select, rewrite: from an ATen graph to one with semantic ops."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from .config import FusionConfig
from .cost import node_bytes, node_launches, tensor_bytes
from .lift import find_lifted, lift_aten
from .lower import launches_of, lower_graph
from .match import Match, MatchResult, find_gists, find_matches, form_inputs
from .provenance import module_of, source_of
from .record import GraphRecord, Site
from .rewrite import Applied, RewriteResult, output_nodes, rewrite
from .rule import Rule, rules_of
from .select import Candidate, Operation, select
from .semantic import is_ordered
from .simplify import merge_equal
from .torch_private import fake_mode_of, lazy_graph_module
from .view import Value, View, build_view
from .view.shapes import size_facts
from .weight_storage import note_formats
from .weights import merge_linears

log = logging.getLogger(__name__)


_NOT_CHEAPER = "recognised, but the fused op would launch no fewer kernels and move no fewer bytes than the model's own ops"


def fuse_graph(gm: GraphModule, config: FusionConfig, record: GraphRecord, real_inputs: Sequence[Any] = ()) -> None:
    """Rewrite a functional ATen graph in place: every selected match becomes a semantic op. The module's code is not made anew.

    Args:
        gm: graph module whose nodes carry `meta["val"]`.
        config: rules and rounding contract.
        record: gets the stages `aten` and `fused`, the sites, the exceptions of rules and the seconds spent.
        real_inputs: the tensors behind the placeholders, where they are known: weights among them may be merged (`record.weights` then
            supplies the graph's new inputs).
    """
    mode = fake_mode_of(gm)
    with size_facts(None if mode is None else mode.shape_env):
        _fuse_graph(gm, config, record, real_inputs)


def _fuse_graph(gm: GraphModule, config: FusionConfig, record: GraphRecord, real_inputs: Sequence[Any]) -> None:
    record.stages["aten"] = _snapshot(gm)
    note_formats(gm, real_inputs)
    if real_inputs and config.merge_weights:
        with _timed(record, "weights"):
            record.weights = merge_linears(gm, real_inputs)
    if record.weights is not None:
        record.notes.append(record.weights.note)
        if config.verify:
            record.stages["merged"] = _snapshot(gm)
    with _timed(record, "view"):
        view = build_view(gm.graph)
    with _timed(record, "match"):
        rules = rules_of(config)
        found = find_matches(view, rules, config)
    with _timed(record, "select"):
        chosen = select_matches(view, found.matches, lambda op: launches_of(op, config, record.dry_run))
    with _timed(record, "rewrite"):
        result = rewrite(gm, view, chosen, keep_checks=config.verify)
        merge_equal(gm, view)
    record.sites.extend(sites_of(view, found, result, rules))
    record.rule_errors.update({**result.errors, **found.errors})
    record.checks.extend(result.checks)
    record.stages["fused"] = _snapshot(gm)


def fuse(gm: GraphModule, example_inputs: Sequence[Any] | None = None, config: FusionConfig | None = None) -> GraphModule:
    """Fuse an ATen FX graph (from `make_fx`, `torch.export` or an adapter's own compiler) in place, and lower it for the target.

    Args:
        gm: functional ATen graph whose nodes carry fake tensors in `meta["val"]`.
        example_inputs: the graph's inputs; the target `auto` is taken from their device.
        config: rules, rounding contract, target.

    Returns:
        `gm`; what happened to it is in `gm.meta["npu_fusion_record"]`, a `GraphRecord`.
    """
    from .backend import resolve

    resolved = resolve(config or FusionConfig(), gm, example_inputs or [])
    record = GraphRecord(resolved)
    lift_aten(gm)
    fuse_graph(gm, resolved, record)
    lower_graph(gm, resolved, record)
    gm.meta["npu_fusion_record"] = record
    return gm


def select_matches(view: View, matches: list[Match], launches: Callable[[str], int] = lambda op: 1) -> list[Match]:
    """The matches that make the graph cheapest, where a call of a semantic op launches so many kernels."""
    operations = {node: _operation(view, node) for node in view.graph.nodes}
    needed = list(_needed(view.graph))
    matches = [match for match in matches if output_nodes(view, match)]  # a match may end at a value that exists in canonical form only
    candidates = [_candidate(view, match, launches(match.call.op.name)) for match in matches]
    by_id = {id(candidate): match for candidate, match in zip(candidates, matches, strict=True)}
    return [by_id[id(candidate)] for candidate in select(operations, needed, candidates)]


def _needed(graph: Graph) -> Iterator[Node]:
    """The output, and calls with side effects. Whether an operator has any is asked once: that takes longer than to match a node.

    A collective whose results are used is needed by what uses them: a fused op may make the call in its place.
    """
    impure: dict[OpOverload, bool] = {}
    for node in graph.nodes:
        if node.op == "output":
            yield node
        elif isinstance(node.target, OpOverload):
            known = impure.get(node.target)
            if known is None:
                known = impure[node.target] = node.is_impure()
            if known and not (node.users and is_ordered(node.target)):
                yield node
        elif node.op == "call_function" and node.is_impure():
            yield node


def _operation(view: View, node: Node) -> Operation:
    if node.op != "call_function":
        return Operation(tuple(node.all_input_nodes), 0, lambda: node_bytes(node), node.op)
    launches = node_launches(node)
    launches += find_lifted(node.target) is not None  # one that no rule takes is put back, and is several kernels then
    value = view.of[node]
    return Operation(tuple(node.all_input_nodes), launches, lambda: node_bytes(node), (node.target, value.shape, value.dtype))


def _candidate(view: View, match: Match, launches: int) -> Candidate:
    outputs = tuple(output_nodes(view, match))
    values = list(_input_values(match))
    read = frozenset(value.node for value in values if value.node is not None).difference(outputs)
    span = _span(view, match, outputs, {node for value in values for node in view.nodes[value]})
    label = (match.rule.name, tuple((value.shape, value.dtype) for value in values))
    written = [view.nodes[value][0] for value in match.outputs if value in view.nodes]  # once, whatever aliases and copies it has
    hidden = match.rule.hidden_launches if isinstance(match.rule, Rule) else 0
    return Candidate(outputs, read, frozenset(span), launches, lambda: _bytes(read, written), label, hidden)


def _input_values(match: Match) -> Iterable[Value]:
    """Inputs of the call, those of values without a node replaced by what they are made from."""
    stack = list(form_inputs(match.call.args))
    while stack:
        value = stack.pop()
        if value.node is not None:
            yield value
        else:
            stack.extend(value.args)


def _span(view: View, match: Match, outputs: Iterable[Node], inputs: set[Node]) -> set[Node]:
    """The nodes between inputs and outputs, outputs included.

    Where inputs are named past which the pattern did not run, the way back ends at nodes that are older than all of them.
    """
    oldest = min((view.position[node] for node in inputs), default=0)
    span: set[Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in span or node in inputs or node.op != "call_function":
            continue
        if view.position[node] < oldest and view.of[node] not in match.visited:
            continue
        span.add(node)
        stack.extend(node.all_input_nodes)
    return span | set(outputs)


def _bytes(inputs: Iterable[Node], outputs: Iterable[Node]) -> sympy.Expr:
    return sympy.Add(*(tensor_bytes(node) for node in (*inputs, *outputs)))


# -------------------------------------------------------------------- sites


def sites_of(view: View, found: MatchResult, result: RewriteResult, rules: Iterable[object]) -> list[Site]:
    """Every occurrence of an idiom, covered by a fused op or not, in graph order."""
    covered: dict[tuple[str, Value], Applied] = {}
    for applied in result.applied:
        for site in applied.match.sites:
            covered.setdefault(site, applied)
    sites = [(value, _site(view, idiom, value, applied)) for (idiom, value), applied in covered.items()]
    visited: dict[str, set[Value]] = {}
    for applied in result.applied:
        for idiom in applied.match.idioms:
            visited.setdefault(idiom, set()).update(applied.match.visited)
    absorbed = frozenset[Value]().union(*(applied.match.visited for applied in result.applied))
    for rule in rules:
        if isinstance(rule, Rule) and rule.gist is not None:
            try:
                sites += list(_missed(view, rule, found, result, absorbed, visited.get(rule.missed_idiom, set())))
            except Exception as error:  # a gist runs its author's predicates too
                log.warning("the gist of rule %r raised; its misses are not reported", rule.name, exc_info=error)
                found.errors.setdefault(rule.name, f"{type(error).__name__}: {error}")
    order = sorted(_unique(sites), key=lambda pair: pair[0].index)
    return [site for _, site in order]


def _unique(sites: list[tuple[Value, Site]]) -> Iterator[tuple[Value, Site]]:
    """One miss a place: of several rules of one idiom that failed there, the one that got furthest comes first."""
    seen: set[tuple[str, Value]] = set()
    for value, site in sites:
        if site.fused or (site.idiom, value) not in seen:
            seen.add((site.idiom, value))
            yield value, site


def _site(view: View, idiom: str, value: Value, applied: Applied) -> Site:
    node = _node_near(value)
    op = applied.match.call.op.name
    return Site(
        idiom,
        True,
        op,
        None,
        None,
        source_of(node),
        module_of(node),
        node.name if node else None,
        applied.match.rule.name,
        applied.call.name,
    )


def _missed(
    view: View, rule: Rule, found: MatchResult, result: RewriteResult, absorbed: frozenset[Value], covered: set[Value]
) -> Iterator[tuple[Value, Site]]:
    """Where the rule's gist matches and nothing covers it.

    Args:
        absorbed: what fused ops compute inside, whatever their idiom: a gated product inside a gated norm is no missed gated unit.
        covered: what fused ops of the rule's own idiom ran through.
    """
    failures = found.failures.get(rule.name, {})
    skipped = {value: _NOT_CHEAPER for match in found.matches for value in match.visited if match.rule is rule}
    skipped |= {value: reason for match, reason in result.skipped.items() for value in match.visited if match.rule is rule}
    for site, visited in find_gists(view, rule):
        if site in absorbed or visited & covered:
            continue
        parts = (user for user in site.users if user.op == "getitem")  # an op of several results is tried from them
        near = [failures[value] for value in (site, *visited, *parts) if value in failures]
        best = max(near, key=lambda failure: failure.progress, default=None)
        reason = skipped.get(site) or (best.reason if best else "no value that the pattern could end at uses this one")
        node = _node_near(best.value if best and best.value is not None else site) or _node_near(site)
        origin = _node_near(site)
        yield (
            site,
            Site(
                rule.missed_idiom, False, None, None, reason, source_of(origin), module_of(origin), node.name if node else None, rule.name
            ),
        )


def _node_near(value: Value) -> Node | None:
    """The node of a value, or of the nearest value that it is made from or that uses it."""
    seen: set[Value] = set()
    stack = [value]
    while stack:
        value = stack.pop(0)
        if value.node is not None:
            return value.node
        if value not in seen:
            seen.add(value)
            stack += [*value.users, *value.args]
    return None


# -------------------------------------------------------------------- helpers


def _snapshot(gm: GraphModule) -> GraphModule:
    """The graph as it is now, sharing parameters and metadata with the one that goes on changing."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    original = next(iter(reversed(gm.graph.nodes)))
    node = graph.output(output)
    node.meta = original.meta.copy()
    return lazy_graph_module(gm, graph)


@contextmanager
def _timed(record: GraphRecord, stage: str) -> Iterator[None]:
    start = time.process_time()
    try:
        yield
    finally:
        record.seconds[stage] = record.seconds.get(stage, 0.0) + time.process_time() - start
