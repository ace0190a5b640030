"""Selection: among all matches, those that make the cheapest graph.

A value may be computed by its original nodes or by any match that has it as an output. The cost of a graph is what remains alive: kernel
launches first, those hidden inside ops and then bytes moved to break ties, all without reading a size hint. Matches that cannot influence
one another are decided apart; each group is solved exactly up to `EXACT_LIMIT` candidates, and by steepest descent beyond. Equal groups
(the layers of a model) are solved once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy

EXACT_LIMIT = 9
_SHARED_LIMIT = 8

Key = Hashable


@dataclass(frozen=True)
class Operation:
    """A node of the graph as selection sees it: what it reads and what it costs. `bytes` is asked for only to break a tie."""

    args: tuple[Key, ...]
    launches: int
    bytes: Callable[[], sympy.Expr]
    label: Hashable = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """A match as selection sees it: it can make `outputs` from `inputs`. `span` holds the nodes that it makes superfluous, if nobody else
    needs them; its outputs among them. `hidden` counts the launches inside ops of the span that their cost does not show."""

    outputs: tuple[Key, ...]
    inputs: frozenset[Key]
    span: frozenset[Key]
    launches: int
    bytes: Callable[[], sympy.Expr]
    label: Hashable = None
    hidden: int = 0


@dataclass
class _Group:
    candidates: list[Candidate]
    span: set[Key] = field(default_factory=set)


def select(operations: Mapping[Key, Operation], needed: Iterable[Key], candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates to apply.

    Args:
        operations: every node, operands before users.
        needed: nodes that must be computed whatever happens: outputs, side effects.
        candidates: the matches.

    Returns:
        the chosen candidates, each of which computes something that is needed, in the given order.
    """
    always = set(needed)
    readers: dict[Key, list[Key]] = {}
    for key in _alive(operations, always):
        for arg in set(operations[key].args):
            readers.setdefault(arg, []).append(key)
    order = {key: i for i, key in enumerate(operations)}
    solved: dict[Hashable, tuple[int, ...]] = {}
    chosen: set[int] = set()
    position = {id(candidate): i for i, candidate in enumerate(candidates)}
    for group in _groups(candidates, readers):
        nodes = sorted(group.span, key=order.__getitem__)
        roots = [n for n in nodes if n in always or any(reader not in group.span for reader in readers.get(n, ()))]
        signature = _signature(group, nodes, roots, operations)
        if signature not in solved:
            solved[signature] = _solve(group, roots, operations)
        chosen.update(position[id(group.candidates[i])] for i in solved[signature])
    return [candidates[i] for i in sorted(chosen)]


def _alive(operations: Mapping[Key, Operation], needed: Iterable[Key]) -> set[Key]:
    """The nodes that are needed, and those that they are computed from."""
    alive: set[Key] = set()
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node not in alive:
            alive.add(node)
            stack.extend(operations[node].args)
    return alive


# -------------------------------------------------------------------- groups


def _groups(candidates: Sequence[Candidate], readers: Mapping[Key, Sequence[Key]]) -> list[_Group]:
    """Candidates that share a node, unless it is one that many share anyway (a mask built once for all layers)."""
    parent = list(range(len(candidates)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[Key, int] = {}
    outputs = {output for candidate in candidates for output in candidate.outputs}
    for i, candidate in enumerate(candidates):
        for node in candidate.span:
            if node not in outputs and len(readers.get(node, ())) > _SHARED_LIMIT:
                continue
            parent[find(i)] = find(owner.setdefault(node, i))
    groups: dict[int, _Group] = {}
    for i, candidate in enumerate(candidates):
        group = groups.setdefault(find(i), _Group([]))
        group.candidates.append(candidate)
        group.span |= candidate.span
    return list(groups.values())


def _signature(group: _Group, nodes: list[Key], roots: list[Key], operations: Mapping[Key, Operation]) -> Hashable:
    index = {node: i for i, node in enumerate(nodes)}
    shape = tuple((operations[n].label, operations[n].launches, tuple(index.get(a, -1) for a in operations[n].args)) for n in nodes)
    matches = tuple(
        (c.label, c.launches, tuple(index[o] for o in c.outputs), tuple(sorted(index.get(i, -1) for i in c.inputs)), len(c.span))
        for c in group.candidates
    )
    return shape, matches, tuple(index[r] for r in roots)


# -------------------------------------------------------------------- solving


def _solve(group: _Group, roots: Sequence[Key], operations: Mapping[Key, Operation]) -> tuple[int, ...]:
    """Indices of the group's best candidates."""
    solver = _Solver(group, roots, operations)
    if len(group.candidates) <= EXACT_LIMIT:
        return solver.exact()
    return solver.descend()


class _Solver:
    def __init__(self, group: _Group, roots: Sequence[Key], operations: Mapping[Key, Operation]) -> None:
        self.candidates = group.candidates
        self.span = group.span
        self.roots = roots
        self.operations = operations

    def exact(self) -> tuple[int, ...]:
        best = self._cost(())
        indices = range(len(self.candidates))
        for size in range(1, len(self.candidates) + 1):
            for picked in itertools.combinations(indices, size):
                if self._compatible(picked):
                    best = min(best, self._cost(picked))
        return best.used

    def descend(self) -> tuple[int, ...]:
        """Steepest descent: add a candidate, in place of those that it excludes, while that makes the graph cheaper."""
        best = self._cost(())
        while True:
            options = [self._cost(self._with(best.used, i)) for i in range(len(self.candidates)) if i not in best.used]
            better = min(options, default=best)
            if not better < best:
                return best.used
            best = better

    def _compatible(self, picked: Sequence[int]) -> bool:
        outputs = [output for i in picked for output in self.candidates[i].outputs]
        return len(set(outputs)) == len(outputs)

    def _with(self, used: tuple[int, ...], added: int) -> tuple[int, ...]:
        taken = set(self.candidates[added].outputs)
        return (*(i for i in used if not taken & set(self.candidates[i].outputs)), added)

    def _cost(self, picked: Sequence[int]) -> _Cost:
        """What stays alive in the group when the picked candidates make their outputs."""
        maker = {output: i for i in picked for output in self.candidates[i].outputs}
        used: set[int] = set()
        alive: set[Key] = set()
        stack = list(self.roots)
        while stack:
            node = stack.pop()
            index = maker.get(node)
            if index is not None:
                if index not in used:
                    used.add(index)
                    stack.extend(i for i in self.candidates[index].inputs if i in self.span)
            elif node not in alive:
                alive.add(node)
                stack.extend(arg for arg in self.operations[node].args if arg in self.span)
        parts = [self.operations[node] for node in alive] + [self.candidates[i] for i in used]
        spared = sum(self.candidates[i].hidden for i in used)
        return _Cost(sum(part.launches for part in parts), spared, parts, tuple(sorted(used)))


@dataclass
class _Cost:
    launches: int
    spared: int
    parts: list[Operation | Candidate]
    used: tuple[int, ...]

    def __lt__(self, other: _Cost) -> bool:
        if self.launches != other.launches:
            return self.launches < other.launches
        if self.spared != other.spared:
            return self.spared > other.spared
        if self.used == other.used:
            return False
        return surely_less(_bytes(self), _bytes(other))


def _bytes(cost: _Cost) -> sympy.Expr:
    return sympy.Add(*(part.bytes() for part in cost.parts))


def surely_less(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a <= b for all sizes of at least one, and a < b for some.

    Sizes are counted from one up, so that `s - 1` is known not to be negative.
    """
    difference = sympy.expand(b - a)
    shifted = sympy.expand(difference.subs({s: s + 1 for s in difference.free_symbols}))
    terms = sympy.Add.make_args(shifted)
    return shifted != 0 and all(term.as_coeff_Mul()[0] > 0 for term in terms)
