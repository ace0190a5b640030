"""Patterns as objects: what each part of the language matches, and what the search may know of it beforehand."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..view.canon import number_of
from ..view.value import Form, Value
from .values import describe, literal_of

_COMMON_OPS = frozenset({"add", "mul", "cast", "sub", "slice", "reshape", "permute", "expand", "neg", "cat", "matmul"})


@dataclass
class Failure:
    """The point at which an attempt to match got stuck: how many parts had matched, where, and what was missing."""

    progress: int
    reason: str
    value: Value | None


@dataclass
class State:
    """Bindings and trail of one attempt to match."""

    bindings: dict[str, Any] = field(default_factory=dict)
    visited: list[Value] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    failure: Failure | None = None

    def fail(self, reason: str | Callable[[], str], value: Value | None) -> None:
        """Note where the attempt got stuck; the words are made only for the deepest point."""
        progress = len(self.visited)
        if self.failure is None or progress > self.failure.progress:
            self.failure = Failure(progress, reason if isinstance(reason, str) else reason(), value)


@dataclass(frozen=True)
class Footprint:
    """What a search must know of a pattern: see the methods of `Pattern` of these names."""

    roots: frozenset[str] | None
    required: tuple[frozenset[str], ...]
    operators: frozenset[str]
    depth: int


class Pattern(ABC):
    """Base of all patterns. Subclasses yield from `match` once for each way to fit."""

    @cached_property
    def footprint(self) -> Footprint:
        return Footprint(self.roots(), tuple(self.required()), self.operators(), self.depth())

    @abstractmethod
    def match(self, value: Value, state: State) -> Iterator[None]:
        """Yield once for each way in which the value fits, with the bindings in `state` for as long as the caller looks."""

    def roots(self) -> frozenset[str] | None:
        """Operators (forms as `form:name`) that a value matched by this pattern can have; None: any."""
        return None

    def required(self) -> list[frozenset[str]]:
        """Sets of operators; a match contains at least one operator of every set."""
        return []

    def operators(self) -> frozenset[str]:
        """All operators that a match may run through."""
        return frozenset().union(*(child.operators() for child in self.children()))

    def children(self) -> Sequence[Pattern]:
        return ()

    def depth(self) -> int:
        """Upper bound of the operators from the root to a leaf."""
        return 1 + max((child.depth() for child in self.children()), default=0)

    def as_(self, name: str) -> Pattern:
        """Bind the matched value (of a semantic form also the form, as `name.form`) under a name."""
        return Named(name, self)

    def where(self, predicate: Callable[[Value], bool], reason: str) -> Pattern:
        """Restrict the pattern by a predicate on the matched value; `reason` says what is wrong when it fails."""
        return Where(self, predicate, reason)

    def __add__(self, other: Pattern | float) -> Pattern:
        return _binary("add", self, other, commutative=True)

    def __radd__(self, other: float) -> Pattern:
        return _binary("add", other, self, commutative=True)

    def __sub__(self, other: Pattern | float) -> Pattern:
        return _binary("sub", self, other) if isinstance(other, Pattern) else self + (-other)

    def __mul__(self, other: Pattern | float) -> Pattern:
        return _binary("mul", self, other, commutative=True)

    def __rmul__(self, other: float) -> Pattern:
        return _binary("mul", other, self, commutative=True)

    def __truediv__(self, other: Pattern) -> Pattern:
        return _binary("div", self, other)

    def __neg__(self) -> Pattern:
        return Op("neg", (self,), {})

    def __or__(self, other: Pattern) -> Pattern:
        return alternatives(self, other)


def as_pattern(item: Pattern | float) -> Pattern:
    return item if isinstance(item, Pattern) else Number(item)


def _binary(name: str, a: Pattern | float, b: Pattern | float, commutative: bool = False) -> Pattern:
    return Op(name, (as_pattern(a), as_pattern(b)), {}, commutative)


def alternatives(*patterns: Pattern) -> Pattern:
    """Any of the patterns; alternatives among them are taken one by one."""
    flat = [p for pattern in patterns for p in (pattern.alternatives if isinstance(pattern, AnyOf) else (pattern,))]
    return AnyOf(tuple(flat))


def match_all(patterns: Sequence[Pattern], values: Sequence[Value], state: State) -> Iterator[None]:
    """All ways to match the patterns to the values, pairwise."""
    if not patterns:
        yield
        return
    for _ in patterns[0].match(values[0], state):
        yield from match_all(patterns[1:], values[1:], state)


@dataclass(frozen=True, eq=False)
class Var(Pattern):
    name: str

    def match(self, value: Value, state: State) -> Iterator[None]:
        bound = state.bindings.get(self.name)
        if bound is None:
            if value.dtype is None:
                return state.fail(lambda: f"expected a tensor for {self.name!r}", value)
            state.bindings[self.name] = value
            yield
            del state.bindings[self.name]
        elif bound is value:
            yield
        else:
            state.fail(lambda: f"expected the same tensor as the other {self.name!r}", value)

    def depth(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class Lit(Pattern):
    name: str

    def match(self, value: Value, state: State) -> Iterator[None]:
        literal = literal_of(value)
        if literal is None:
            return state.fail(lambda: f"expected a number for {self.name!r}, found a tensor", value)
        bound = state.bindings.get(self.name)
        if bound is None:
            state.bindings[self.name] = literal
            yield
            del state.bindings[self.name]
        elif bound == literal:
            yield
        else:
            state.fail(lambda: f"expected the number {bound.value} again for {self.name!r}, found {literal.value}", value)

    def depth(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class Number(Pattern):
    number: float

    def match(self, value: Value, state: State) -> Iterator[None]:
        found = number_of(value)
        if found is not None and not isinstance(found, bool) and math.isclose(found, self.number, rel_tol=1e-6):
            yield
        else:
            state.fail(lambda: f"expected the number {self.number}, found {found if found is not None else value.op}", value)

    def depth(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class Anything(Pattern):
    def match(self, value: Value, state: State) -> Iterator[None]:
        yield

    def depth(self) -> int:
        return 0


# ---------------------------------------------------------------- operators


@dataclass(frozen=True, eq=False)
class Op(Pattern):
    name: str
    args: tuple[Pattern, ...] | None
    attrs: dict[str, Any]
    commutative: bool = False

    def match(self, value: Value, state: State) -> Iterator[None]:
        if value.op != self.name:
            return state.fail(lambda: f"expected {self.name}, found {describe(value)}", value)
        bound = [wanted.name for wanted in self.attrs.values() if isinstance(wanted, AttrAs) and wanted.name not in state.bindings]
        if all(_attr_fits(name, wanted, value, state) for name, wanted in self.attrs.items()):
            state.visited.append(value)
            yield from self._match_args(value, state)
            state.visited.pop()
        for name in bound:
            state.bindings.pop(name, None)

    def _match_args(self, value: Value, state: State) -> Iterator[None]:
        if self.args is None:
            yield
            return
        args = self.args
        if len(args) != len(value.args):
            return state.fail(lambda: f"expected {self.name} of {len(args)} operands, found {len(value.args)}", value)
        yield from match_all(args, value.args, state)
        if self.commutative and value.args[0] is not value.args[1]:
            yield from match_all(args, value.args[::-1], state)

    def roots(self) -> frozenset[str]:
        return frozenset({self.name})

    def required(self) -> list[frozenset[str]]:
        return [frozenset({self.name}), *itertools.chain.from_iterable(child.required() for child in self.children())]

    def operators(self) -> frozenset[str]:
        return super().operators() | {self.name}

    def children(self) -> Sequence[Pattern]:
        return self.args or ()


@dataclass(frozen=True, eq=False)
class Sem(Pattern):
    """A value known as output `output` of a semantic op."""

    name: str
    args: dict[str, Any]
    output: int

    def match(self, value: Value, state: State) -> Iterator[None]:
        found = False
        for form in reversed(value.forms):
            if form.op == self.name and form.output == self.output:
                found = True
                state.visited.append(value)
                state.forms.append(form)
                yield from self._match_args(form, list(self.args.items()), state)
                state.forms.pop()
                state.visited.pop()
        if not found:
            state.fail(lambda: f"expected {self.name}, found {describe(value)}", value)

    def _match_args(self, form: Form, wanted: list[tuple[str, Any]], state: State) -> Iterator[None]:
        if not wanted:
            yield
            return
        (name, pattern), rest = wanted[0], wanted[1:]
        actual = form.args.get(name)
        if isinstance(pattern, Pattern) and isinstance(actual, Value):
            for _ in pattern.match(actual, state):
                yield from self._match_args(form, rest, state)
        elif isinstance(pattern, (list, tuple)) and isinstance(actual, (list, tuple)) and len(pattern) == len(actual):
            for _ in match_all(pattern, actual, state):
                yield from self._match_args(form, rest, state)
        elif actual == pattern:
            yield from self._match_args(form, rest, state)
        else:
            state.fail(lambda: f"{self.name} has {name} = {actual}, expected {pattern}", form.match.root)

    def roots(self) -> frozenset[str]:
        return frozenset({f"form:{self.name}"})

    def required(self) -> list[frozenset[str]]:
        # The form's arguments are no operands of the value: from them one cannot climb to it.
        return [self.roots()]

    def operators(self) -> frozenset[str]:
        return super().operators() | self.roots()

    def children(self) -> Sequence[Pattern]:
        found: list[Pattern] = []
        for pattern in self.args.values():
            found += [p for p in (pattern if isinstance(pattern, (list, tuple)) else [pattern]) if isinstance(p, Pattern)]
        return found


@dataclass(frozen=True, eq=False)
class Through(Pattern):
    """The inner pattern behind zero or more (at most `most`) of the given operators, innermost first."""

    names: frozenset[str]
    inner: Pattern
    most: int = 8
    accept: Callable[[Value], bool] | None = None

    def match(self, value: Value, state: State) -> Iterator[None]:
        return self._descend(value, state, self.most)

    def _descend(self, value: Value, state: State, most: int) -> Iterator[None]:
        if value.op in self.names and most > 0 and (self.accept is None or self.accept(value)):
            state.visited.append(value)
            yield from self._descend(value.args[0], state, most - 1)
            state.visited.pop()
        yield from self.inner.match(value, state)

    def roots(self) -> frozenset[str] | None:
        inner = self.inner.roots()
        return None if inner is None else inner | self.names

    def required(self) -> list[frozenset[str]]:
        return self.inner.required()

    def operators(self) -> frozenset[str]:
        return self.inner.operators() | self.names

    def children(self) -> Sequence[Pattern]:
        return (self.inner,)

    def depth(self) -> int:
        return self.inner.depth() + min(self.most, 3)


@dataclass(frozen=True, eq=False)
class AnyOf(Pattern):
    alternatives: tuple[Pattern, ...]

    def match(self, value: Value, state: State) -> Iterator[None]:
        for alternative in self.alternatives:
            yield from alternative.match(value, state)

    def roots(self) -> frozenset[str] | None:
        found = [alternative.roots() for alternative in self.alternatives]
        return None if any(roots is None for roots in found) else frozenset().union(*(roots for roots in found if roots))

    def required(self) -> list[frozenset[str]]:
        chosen = []
        for alternative in self.alternatives:
            sets = alternative.required()
            if not sets:
                return []
            chosen.append(min(sets, key=lambda names: (len(names & _COMMON_OPS), len(names))))
        return [frozenset().union(*chosen)]

    def children(self) -> Sequence[Pattern]:
        return self.alternatives


@dataclass(frozen=True, eq=False)
class Prod(Pattern):
    """A product (or sum) of the factors, however it associates and in whatever order."""

    name: str
    factors: tuple[Pattern, ...]

    def match(self, value: Value, state: State) -> Iterator[None]:
        yield from self._split(value, self.factors, state)

    def _split(self, value: Value, factors: tuple[Pattern, ...], state: State) -> Iterator[None]:
        if len(factors) == 1:
            yield from factors[0].match(value, state)
            return
        if value.op != self.name:
            return state.fail(lambda: f"expected {self.name} of {len(factors)} operands, found {describe(value)}", value)
        state.visited.append(value)
        for size in range(len(factors) - 1, 0, -1):
            for picked in itertools.combinations(range(len(factors)), size):
                left = tuple(factors[i] for i in picked)
                right = tuple(f for i, f in enumerate(factors) if i not in picked)
                for _ in self._split(value.args[0], left, state):
                    yield from self._split(value.args[1], right, state)
        state.visited.pop()

    def roots(self) -> frozenset[str]:
        return frozenset({self.name})

    def required(self) -> list[frozenset[str]]:
        return [self.roots(), *itertools.chain.from_iterable(factor.required() for factor in self.factors)]

    def operators(self) -> frozenset[str]:
        return super().operators() | self.roots()

    def children(self) -> Sequence[Pattern]:
        return self.factors

    def depth(self) -> int:
        return len(self.factors) + max(factor.depth() for factor in self.factors)


@dataclass(frozen=True, eq=False)
class Wrapper(Pattern):
    inner: Pattern

    def roots(self) -> frozenset[str] | None:
        return self.inner.roots()

    def required(self) -> list[frozenset[str]]:
        return self.inner.required()

    def children(self) -> Sequence[Pattern]:
        return (self.inner,)

    def depth(self) -> int:
        return self.inner.depth()


class Named(Wrapper):
    def __init__(self, name: str, inner: Pattern) -> None:
        super().__init__(inner)
        object.__setattr__(self, "name", name)

    name: str

    def match(self, value: Value, state: State) -> Iterator[None]:
        if self.name in state.bindings:
            if state.bindings[self.name] is value:
                yield
            else:
                state.fail(lambda: f"expected the same tensor as the other {self.name!r}", value)
            return
        for _ in self.inner.match(value, state):
            form = next((form for form in reversed(state.forms) if form in value.forms), None)
            state.bindings[self.name] = value
            state.bindings[f"{self.name}.form"] = form
            yield
            del state.bindings[self.name], state.bindings[f"{self.name}.form"]


class Where(Wrapper):
    def __init__(self, inner: Pattern, predicate: Callable[[Value], bool], reason: str) -> None:
        super().__init__(inner)
        object.__setattr__(self, "predicate", predicate)
        object.__setattr__(self, "reason", reason)

    predicate: Callable[[Value], bool]
    reason: str

    def match(self, value: Value, state: State) -> Iterator[None]:
        for _ in self.inner.match(value, state):
            if self.predicate(value):
                yield
            else:
                state.fail(self.reason, value)


# ---------------------------------------------------------------- attributes


@dataclass(frozen=True)
class AttrIs:
    """An attribute that must satisfy a predicate of (attribute, value)."""

    description: str
    predicate: Callable[[Any, Value], bool]


@dataclass(frozen=True)
class AttrAs:
    """An attribute bound under a name; where the name occurs twice, the attributes must be equal."""

    name: str


LAST = AttrIs("the last dimension", lambda dims, value: dims in (value.ndim - 1, (value.ndim - 1,)))


def _attr_fits(name: str, wanted: Any, value: Value, state: State) -> bool:
    actual = value.attrs.get(name)
    if isinstance(wanted, AttrIs):
        if not wanted.predicate(actual, value):
            state.fail(lambda: f"{value.op} has {name} = {actual}, expected {wanted.description}", value)
            return False
    elif isinstance(wanted, AttrAs):
        if state.bindings.setdefault(wanted.name, actual) != actual:
            state.fail(lambda: f"{value.op} has {name} = {actual}, expected {state.bindings[wanted.name]} as before", value)
            return False
    elif actual != wanted:
        state.fail(lambda: f"{value.op} has {name} = {actual}, expected {wanted}", value)
        return False
    return True
