"""Sums of any number of terms of one form, as a loop over experts leaves them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..view.value import Value
from .core import Pattern, State

MOST_TERMS = 512


@dataclass(frozen=True)
class Term:
    """One term of a sum: its value, and what the pattern bound in it."""

    value: Value
    bindings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Terms(Pattern):
    """A sum of two or more terms, each of which fits the pattern by itself; bound under the name as a tuple of `Term`s, in order.

    Variables of the term are each term's own. The sum is the largest: one to which a term more is added is part of a larger one.
    """

    name: str
    term: Pattern

    def match(self, value: Value, state: State) -> Iterator[None]:
        if value.op != "add" or any(self._continues(value, user) for user in value.users):
            return
        sums, leaves = _summands(value)
        terms = [self._one(leaf, state) for leaf in leaves]
        if any(term is None for term in terms) or len(leaves) > MOST_TERMS:
            return state.fail("a sum of which not every term is of one form", value)
        visited, forms = len(state.visited), len(state.forms)
        state.visited += sums
        for _, found in filter(None, terms):
            state.visited += found.visited
            state.forms += found.forms
        state.bindings[self.name] = tuple(term for term, _ in filter(None, terms))
        yield
        del state.bindings[self.name], state.visited[visited:], state.forms[forms:]

    def _one(self, leaf: Value, outer: State) -> tuple[Term, State] | None:
        state = State()
        for _ in self.term.match(leaf, state):
            return Term(leaf, dict(state.bindings)), State({}, list(state.visited), list(state.forms))
        if state.failure is not None:
            outer.fail(state.failure.reason, state.failure.value)
        return None

    def _continues(self, value: Value, user: Value) -> bool:
        if user.op != "add":
            return False
        other = user.args[1] if user.args[0] is value else user.args[0]
        return self._one(other, State()) is not None

    def roots(self) -> frozenset[str]:
        return frozenset({"add"})

    def required(self) -> list[frozenset[str]]:
        return [self.roots(), *self.term.required()]

    def operators(self) -> frozenset[str]:
        return super().operators() | self.roots()

    def children(self) -> Sequence[Pattern]:
        return (self.term,)

    def depth(self) -> int:
        return self.term.depth() + MOST_TERMS


def _summands(total: Value) -> tuple[list[Value], list[Value]]:
    """The sums inside a sum, itself included, and what they add up, from left to right."""
    sums: list[Value] = []
    leaves: list[Value] = []
    stack = [total]
    while stack:
        value = stack.pop()
        if value.op == "add":
            sums.append(value)
            stack += reversed(value.args)
        else:
            leaves.append(value)
    return sums, leaves
