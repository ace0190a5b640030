"""Matching: every rule against the canonical view, in one sweep, without touching the graph.

A rule is tried where the rarest operator that it needs occurs: from there the search climbs through operators of the pattern to the values
that may be its root, and matches downwards from each. A match gives its outputs a semantic form, from which later rules start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import FusionConfig
from .pattern import Failure, Pattern, State
from .rule import AnyRule, Call, GroupRule, Reject, Rule
from .view import Form, Literal, Value, View

log = logging.getLogger(__name__)

_REJECTED = 1 << 20  # progress of a match that was complete but for its check


@dataclass(eq=False)
class Match:
    """One occurrence of a rule's pattern.

    Attributes:
        rule: the rule.
        root: the value at which the pattern's root stands.
        bindings: name to value, literal, attribute or form.
        visited: values that the pattern ran through, among them those of absorbed semantic forms.
        config: the configuration in force.
        parts: the matches whose semantic forms it absorbs.
        call: the semantic call that replaces the match's outputs.
        sites: (idiom, value) pairs that the match covers, those of absorbed forms included.
    """

    rule: AnyRule
    root: Value
    bindings: Mapping[str, Any]
    visited: frozenset[Value]
    config: FusionConfig
    view: View
    parts: tuple[Match, ...] = ()
    call: Call = None  # type: ignore[assignment]  # set once the rule has accepted the match
    sites: tuple[tuple[str, Value], ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def __contains__(self, name: object) -> bool:
        return name in self.bindings

    def get(self, name: str, default: Any = None) -> Any:
        return self.bindings.get(name, default)

    def form(self, name: str) -> Form:
        """The semantic form of the value bound as `name`."""
        form: Form = self.bindings[f"{name}.form"]
        return form

    def number(self, name: str) -> float | None:
        """The captured number, or None if it is known at run time only."""
        literal: Literal = self.bindings[name]
        return None if literal.value is None else float(literal.value)

    @property
    def exact(self) -> bool:
        """Whether the config allows only fused ops that round where the model rounds."""
        return self.config.rounding == "exact"

    @property
    def idioms(self) -> frozenset[str]:
        """The idioms of its sites, and of those of its parts that count under another idiom now (`Rule.instead_of`)."""
        return frozenset(idiom for idiom, _ in self.sites).union(*(part.idioms for part in self.parts))

    @property
    def outputs(self) -> list[Value]:
        return [value for value in self.call.outputs if value is not None]


@dataclass
class MatchResult:
    """All matches of all rules, and what is known of those that failed.

    Attributes:
        matches: in the order in which they were found.
        failures: rule name to anchor value to the deepest failure of an attempt from there.
        errors: rule name to the first exception raised by it.
    """

    matches: list[Match] = field(default_factory=list)
    failures: dict[str, dict[Value, Failure]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def find_matches(view: View, rules: Iterable[AnyRule], config: FusionConfig) -> MatchResult:
    """Run the rules, given in order (`rule.in_order`), over the view."""
    matcher = _Matcher(view, config)
    for rule in rules:
        if isinstance(rule, GroupRule):
            matcher.run_group(rule)
        else:
            matcher.run(rule)
    return matcher.result


def find_gists(view: View, rule: Rule) -> Iterator[tuple[Value, frozenset[Value]]]:
    """The places where the rule's gist matches: the value bound as `site`, and what the gist ran through. Run after `find_matches`."""
    assert rule.gist is not None
    index = _Index(view)
    for value in view.table:
        for form in value.forms:
            index.add_form(form.op, value)
    seen: set[Value] = set()
    for _, roots in index.candidates(rule.gist):
        for root in roots:
            state = State()
            for _ in rule.gist.match(root, state):
                site: Value = state.bindings["site"]
                if site not in seen:
                    seen.add(site)
                    yield site, frozenset(state.visited)
                break


class _Index:
    """Values by operator and by semantic form."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.by_form: dict[str, dict[Value, None]] = {}

    def add_form(self, name: str, value: Value) -> None:
        self.by_form.setdefault(name, {})[value] = None

    def values(self, name: str) -> Iterable[Value]:
        if name.startswith("form:"):
            return self.by_form.get(name[5:], ())
        return self.view.table.by_op.get(name, ())

    def candidates(self, pattern: Pattern) -> Iterator[tuple[Value, Iterator[Value]]]:
        """Each anchor, a value of the rarest set of operators that every match contains one of, with the roots above it."""
        footprint = pattern.footprint
        found = [[value for name in sorted(names) for value in self.values(name)] for names in footprint.required]
        search = _Search(footprint.operators, footprint.roots or frozenset(), footprint.depth)
        for anchor in min(found, key=len):
            yield anchor, search.climb(anchor)


class _Matcher:
    def __init__(self, view: View, config: FusionConfig) -> None:
        self.view = view
        self.config = config
        self.result = MatchResult()
        self.index = _Index(view)

    # ---------------------------------------------------------------- rules

    def run(self, rule: Rule) -> None:
        tried: dict[Value, Failure | None] = {}
        failures = self.result.failures.setdefault(rule.name, {})
        for anchor, roots in self.index.candidates(rule.pattern):
            for root in roots:
                if root not in tried:
                    tried[root] = self._guarded(rule, root)
                failure = tried[root]
                if failure is not None and (anchor not in failures or failure.progress > failures[anchor].progress):
                    failures[anchor] = failure

    def _guarded(self, rule: Rule, root: Value) -> Failure | None:
        """Match at one root. A rule that raises skips the site; it must not take the model with it."""
        try:
            return self._match_root(rule, root)
        except Exception as error:
            self._note_error(rule, error)
            return Failure(_REJECTED, f"rule {rule.name!r} raised {type(error).__name__}: {error}", root)

    def _note_error(self, rule: AnyRule, error: Exception) -> None:
        if rule.name not in self.result.errors:
            self.result.errors[rule.name] = f"{type(error).__name__}: {error}"
            log.warning("rule %r raised; its sites stay unfused", rule.name, exc_info=error)

    def _match_root(self, rule: Rule, root: Value) -> Failure | None:
        state = State()
        for _ in rule.pattern.match(root, state):
            parts = tuple(dict.fromkeys(form.match for form in state.forms))
            match = Match(rule, root, dict(state.bindings), _visited(state), self.config, self.view, parts)
            rejected = rule.check(match) if rule.check is not None else None
            if rejected is None:
                beside = rule.beside(match) if rule.beside is not None else ()
                match.parts = tuple(dict.fromkeys((*parts, *(form.match for form in beside))))
                match.visited = match.visited.union(*(form.match.visited for form in beside))
                self._accept(match, rule.rewrite(match), _sites(rule, match, [*state.forms, *beside]))
                return None
            state.failure = _keep_deepest(state.failure, rejected, root)
        return state.failure

    def _accept(self, match: Match, call: Call, sites: tuple[tuple[str, Value], ...]) -> None:
        match.call, match.sites = call, sites
        self.result.matches.append(match)
        for position, output in enumerate(call.outputs):
            if output is not None:
                output.forms.append(Form(call.op.name, dict(call.args), position, match))
                self.index.add_form(call.op.name, output)

    # ---------------------------------------------------------------- groups

    def run_group(self, rule: GroupRule) -> None:
        try:
            self._run_group(rule)
        except Exception as error:
            self._note_error(rule, error)

    def _run_group(self, rule: GroupRule) -> None:
        """Group neighbours, in graph order, with equal keys, none of which depends on another."""
        open_groups: dict[Any, list[Form]] = {}
        for form in self._members(rule):
            key = rule.key(form)
            if key is None:
                continue
            group = open_groups.get(key, [])
            if group and (len(group) >= rule.most or any(self._depends(form, member) for member in group)):
                self._close_group(rule, group)
                group = []
            open_groups[key] = [*group, form]
        for group in open_groups.values():
            self._close_group(rule, group)

    def _members(self, rule: GroupRule) -> list[Form]:
        """The newest forms of the member op in graph order. Of two that cover the same sites (a sum, and its cast) the outer one counts."""
        values = sorted(self.index.values(f"form:{rule.member}"), key=self._position)
        forms = [form for value in values if (form := value.form(rule.member)) is not None]
        inner: set[Value] = set()
        for form in forms:
            inner |= {value for value in form.match.visited if (known := value.form(rule.member)) is not None and _covers(form, known)}
        return [form for form in forms if not inner.issuperset(form.match.outputs)]

    def _close_group(self, rule: GroupRule, group: list[Form]) -> None:
        call = rule.combine(group) if len(group) > 1 else None
        if call is None:
            return
        members = tuple(form.match for form in group)
        absorbed = [found.match for form in group for find in rule.absorbs.values() if (found := find(form)) is not None]
        parts = tuple(dict.fromkeys((*members, *absorbed)))
        visited = frozenset().union(*(part.visited for part in parts))
        bindings = {f"member{i}": member for i, member in enumerate(members)}
        match = Match(rule, members[0].root, bindings, visited, self.config, self.view, parts)
        self._accept(match, call, tuple(dict.fromkeys(site for part in parts for site in part.sites)))

    def _position(self, value: Value) -> int:
        return self.view.position[value.node] if value.node is not None else -1

    def _depends(self, form: Form, earlier: Form) -> bool:
        """Whether one of the form's inputs is computed from an output of the earlier one."""
        targets = set(earlier.match.outputs)
        oldest = min(value.index for value in targets)
        stack = list(form_inputs(form.args))
        seen: set[Value] = set()
        while stack:
            value = stack.pop()
            if value in targets:
                return True
            if value in seen or value.index < oldest:
                continue
            seen.add(value)
            stack.extend(value.args)
        return False


@dataclass(frozen=True)
class _Search:
    """Climbing from an anchor to possible roots through the pattern's operators."""

    operators: frozenset[str]
    roots: frozenset[str]
    depth: int

    def climb(self, anchor: Value) -> Iterator[Value]:
        frontier, seen = [anchor], {anchor}
        for _ in range(self.depth + 1):
            above: list[Value] = []
            for value in frontier:
                if self._is(value, self.roots):
                    yield value
                for user in value.users:
                    if user not in seen and self._is(user, self.operators):
                        seen.add(user)
                        above.append(user)
            frontier = above

    @staticmethod
    def _is(value: Value, names: frozenset[str]) -> bool:
        return value.op in names or (bool(value.forms) and any(f"form:{form.op}" in names for form in value.forms))


def form_inputs(args: Mapping[str, Any]) -> Iterator[Value]:
    """The values among a semantic call's arguments, sources of run-time literals included."""
    for argument in args.values():
        for item in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(item, Value):
                yield item
            elif isinstance(item, Literal) and item.source is not None:
                yield item.source


def _covers(outer: Form, inner: Form) -> bool:
    """Whether a match has all sites of another, and an output that the other does not run through."""
    if outer.match is inner.match or not set(inner.match.sites) <= set(outer.match.sites):
        return False
    return not inner.match.visited.issuperset(outer.match.outputs)


def _visited(state: State) -> frozenset[Value]:
    return frozenset(state.visited).union(*(form.match.visited for form in state.forms))


def _sites(rule: Rule, match: Match, forms: Iterable[Form]) -> tuple[tuple[str, Value], ...]:
    own = [(idiom, match[name]) for idiom, name in rule.idioms.items() if name in match]
    absorbed = [site for form in forms for site in form.match.sites if site[0] not in rule.instead_of]
    return tuple(dict.fromkeys([*absorbed, *own]))


def _keep_deepest(failure: Failure | None, rejected: Reject, root: Value) -> Failure:
    progress = _REJECTED + rejected.progress
    if failure is not None and failure.progress >= progress:
        return failure
    return Failure(progress, rejected.reason, rejected.value or root)
