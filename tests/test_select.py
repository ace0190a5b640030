"""Selection: the cheapest set of matches, against brute force."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_fusion import select as select_module
from npu_fusion.select import Candidate, Operation, select, surely_less

Graph = dict[int, Operation]


def operation(*args: int, launches: int = 1, size: int = 1) -> Operation:
    return Operation(args, launches, lambda: sympy.Integer(size), (launches, size))


def candidate(outputs: Iterable[int], inputs: Iterable[int], span: Iterable[int], launches: int = 1, size: int = 1) -> Candidate:
    return Candidate(tuple(outputs), frozenset(inputs), frozenset(span), launches, lambda: sympy.Integer(size), (launches, size))


def cost(operations: Mapping[int, Operation], needed: Iterable[int], chosen: Sequence[Candidate]) -> tuple[int, int]:
    """Launches and bytes of the graph in which the chosen candidates make their outputs."""
    maker = {output: c for c in chosen for output in c.outputs}
    used: list[Candidate] = []
    alive: set[int] = set()
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node in maker:
            if maker[node] not in used:
                used.append(maker[node])
                stack.extend(maker[node].inputs)
        elif node not in alive:
            alive.add(node)
            stack.extend(operations[node].args)
    parts: list[Operation | Candidate] = [*(operations[node] for node in alive), *used]
    return sum(part.launches for part in parts), sum(int(part.bytes()) for part in parts)


def best(operations: Mapping[int, Operation], needed: Sequence[int], candidates: Sequence[Candidate]) -> tuple[int, int]:
    """The lowest cost of any set of candidates that do not make the same output."""
    costs = []
    for count in range(len(candidates) + 1):
        for chosen in itertools.combinations(candidates, count):
            outputs = [output for c in chosen for output in c.outputs]
            if len(set(outputs)) == len(outputs):
                costs.append(cost(operations, needed, chosen))
    return min(costs)


@st.composite
def problems(draw: st.DrawFn, most: int = 6) -> tuple[Graph, list[int], list[Candidate]]:
    """A random graph with random connected matches. Every operation is one launch; a match makes one or two of its nodes."""
    size = draw(st.integers(3, 12))
    operations: Graph = {0: operation(launches=0), 1: operation(launches=0)}
    for node in range(2, size + 2):
        args = draw(st.lists(st.integers(0, node - 1), min_size=1, max_size=2, unique=True))
        operations[node] = operation(*args, launches=draw(st.sampled_from([0, 1, 1, 1])), size=draw(st.integers(1, 4)))
    needed = draw(st.lists(st.integers(2, size + 1), min_size=1, max_size=3, unique=True))
    candidates = [_match(draw, operations) for _ in range(draw(st.integers(1, most)))]
    return operations, needed, candidates


def _match(draw: st.DrawFn, operations: Graph) -> Candidate:
    root = draw(st.sampled_from([node for node in operations if node > 1]))
    span, frontier = {root}, set(operations[root].args)
    for _ in range(draw(st.integers(0, 3))):
        inner = [node for node in frontier if node > 1]
        if not inner:
            break
        node = draw(st.sampled_from(inner))
        span.add(node)
        frontier = (frontier | set(operations[node].args)) - span
    outputs = {root} | ({draw(st.sampled_from(sorted(span)))} if draw(st.booleans()) else set())
    return candidate(sorted(outputs), frontier, span, size=draw(st.integers(1, 4)))


def check(problem: tuple[Graph, list[int], list[Candidate]]) -> None:
    operations, needed, candidates = problem
    chosen = select(operations, needed, candidates)
    outputs = [output for c in chosen for output in c.outputs]
    assert len(set(outputs)) == len(outputs), "two matches make one node"
    assert chosen == [c for c in candidates if c in chosen], "the given order is kept"
    assert cost(operations, needed, chosen) == best(operations, needed, candidates)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problems())
def test_selection_is_optimal(problem: tuple[Graph, list[int], list[Candidate]]) -> None:
    check(problem)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(most=3), st.integers(2, 4))
def test_equal_groups_are_solved_once_and_alike(problem: tuple[Graph, list[int], list[Candidate]], layers: int) -> None:
    """Layers of one shape: the copies share no node."""
    operations, needed, candidates = problem
    shift = len(operations)
    stacked: Graph = {}
    for layer in range(layers):
        for node, op in operations.items():
            stacked[node + layer * shift] = Operation(tuple(arg + layer * shift for arg in op.args), op.launches, op.bytes, op.label)
    copies = [
        Candidate(
            tuple(o + layer * shift for o in c.outputs),
            frozenset(i + layer * shift for i in c.inputs),
            frozenset(n + layer * shift for n in c.span),
            c.launches,
            c.bytes,
            c.label,
        )
        for layer in range(layers)
        for c in candidates
    ]
    solved: list[int] = []
    solve = select_module._solve
    select_module._solve = lambda group, *rest: (solved.append(len(group.candidates)), solve(group, *rest))[1]
    try:
        chosen = select(stacked, [node + layer * shift for layer in range(layers) for node in needed], copies)
    finally:
        select_module._solve = solve
    assert sum(solved) <= len(candidates)
    lowest = best(operations, needed, candidates)
    assert cost(stacked, [n + layer * shift for layer in range(layers) for n in needed], chosen) == (lowest[0] * layers, lowest[1] * layers)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(most=14))
def test_large_groups_are_never_worse_than_nothing(problem: tuple[Graph, list[int], list[Candidate]]) -> None:
    operations, needed, candidates = problem
    chosen = select(operations, needed, candidates)
    assert cost(operations, needed, chosen)[0] <= cost(operations, needed, [])[0]


def chain(length: int) -> Graph:
    return {0: operation(launches=0), **{node: operation(node - 1) for node in range(1, length + 1)}}


def test_a_large_match_beats_the_small_ones_inside_it() -> None:
    small = [candidate([2], [0], [1, 2]), candidate([4], [2], [3, 4])]
    large = candidate([4], [0], [1, 2, 3, 4])
    assert select(chain(4), [4], [*small, large]) == [large]


def test_two_small_matches_beat_a_large_one_that_leaves_more() -> None:
    small = [candidate([2], [0], [1, 2]), candidate([5], [2], [3, 4, 5])]
    large = candidate([4], [0], [1, 2, 3, 4], launches=2)
    assert select(chain(5), [5], [large, *small]) == small


def test_a_match_that_saves_nothing_is_left_out() -> None:
    used_elsewhere = {**chain(3), 9: operation(1), 10: operation(2)}
    match = candidate([3], [0], [1, 2, 3])
    assert select(chain(3), [3], [match]) == [match]
    assert select(used_elsewhere, [3, 9, 10], [match]) == []


def test_bytes_break_ties() -> None:
    reads_less, reads_more = candidate([2], [0], [1, 2], size=3), candidate([2], [0], [1, 2], size=5)
    assert select(chain(2), [2], [reads_more, reads_less]) == [reads_less]


def test_a_tie_is_not_broken_by_what_is_not_known_to_be_less() -> None:
    s, t = sympy.symbols("s t", integer=True, nonnegative=True)
    first = Candidate((2,), frozenset({0}), frozenset({1, 2}), 1, lambda: s, "first")
    second = Candidate((2,), frozenset({0}), frozenset({1, 2}), 1, lambda: t, "second")
    assert select(chain(2), [2], [first, second]) == [first]
    less = Candidate((2,), frozenset({0}), frozenset({1, 2}), 1, lambda: s, "less")
    more = Candidate((2,), frozenset({0}), frozenset({1, 2}), 1, lambda: 2 * s + t, "more")
    assert select(chain(2), [2], [more, less]) == [less]


def test_groups_that_differ_in_bytes_only_are_solved_apart() -> None:
    """Equal in shape and launches, but what is cheaper in one is dearer in the other."""
    graph = {**chain(2), 10: operation(launches=0), 11: operation(10), 12: operation(11)}
    first = [candidate([2], [0], [1, 2], size=1), candidate([2], [0], [1, 2], size=2)]
    second = [candidate([12], [10], [11, 12], size=2), candidate([12], [10], [11, 12], size=1)]
    assert select(graph, [2, 12], [*first, *second]) == [first[0], second[1]]


def test_descent_replaces_what_it_chose_first() -> None:
    """Above the exact limit: many overlapping matches, of which the largest one is the best."""
    length = select_module.EXACT_LIMIT + 4
    pairs = [candidate([n + 1], [n - 1], [n, n + 1]) for n in range(1, length)]
    everything = candidate([length], [0], range(1, length + 1))
    assert select(chain(length), [length], [*pairs, everything]) == [everything]


def test_a_widely_shared_node_does_not_join_groups() -> None:
    """A mask built once for all layers: its readers are decided apart, so that many layers stay exact."""
    graph = {0: operation(launches=0), 1: operation(0)}
    matches = []
    for layer in range(12):
        a, b = 10 + 2 * layer, 11 + 2 * layer
        graph |= {a: operation(1), b: operation(a)}
        matches.append(candidate([b], [0], [1, a, b]))
    needed = [11 + 2 * layer for layer in range(12)]
    assert select(graph, needed, matches) == matches


@pytest.mark.parametrize(
    ("a", "b", "less"),
    [
        ("s", "2*s", True),
        ("s", "s", False),
        ("s", "t", False),
        ("s", "s*t", True),
        ("s*t", "s", False),
        ("s", "t*t", False),
        ("3", "s + 3", True),
        ("2*s", "s", False),
    ],
)
def test_surely_less(a: str, b: str, less: bool) -> None:
    symbols = {name: sympy.Symbol(name, integer=True, nonnegative=True) for name in "st"}
    assert surely_less(sympy.sympify(a, symbols), sympy.sympify(b, symbols)) is less


def test_hidden_launches_break_ties_before_bytes() -> None:
    operations = {0: operation(launches=0), 1: operation(0), 2: operation(1, size=1)}
    plain, sparing = candidate([2], [1], [2], size=9), candidate([2], [1], [2], size=9)
    sparing = dataclasses.replace(sparing, hidden=1)
    assert select(operations, [2], [plain]) == []
    assert select(operations, [2], [plain, sparing]) == [sparing]
    assert select(operations, [2], [dataclasses.replace(sparing, launches=2)]) == []
