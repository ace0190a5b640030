"""What masks.structure_of reads from mask arithmetic, against the masks themselves: it is exact, or it says nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from npu_fusion.masks import Structure, boolean_of, structure_of
from npu_fusion.view import Value, build_view

LOWEST = torch.finfo(torch.float32).min
Q, K = 5, 9


def value_of(fn: Callable[..., Tensor], *inputs: Any, symbolic: bool = False) -> Value:
    """The canonical value that `fn` returns."""
    graph = make_fx(fn, tracing_mode="symbolic" if symbolic else "fake")(*inputs).graph
    view = build_view(graph)
    (result,) = next(node for node in graph.nodes if node.op == "output").all_input_nodes
    return view.of[result]


def visible_by(structure: Structure, queries: int = Q, keys: int = K) -> Tensor:
    """The boolean mask that a structure stands for."""
    last = torch.arange(queries)[:, None] + int(structure.causal_offset)
    key = torch.arange(keys)
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if structure.is_causal:
        visible &= key <= last
    if int(structure.window) > 0:
        visible &= key > last - int(structure.window)
    return visible


def rows() -> Tensor:
    return torch.arange(Q)[:, None]


def columns() -> Tensor:
    return torch.arange(K)[None, :]


def filled(visible: Tensor, fill: float = -math.inf) -> Tensor:
    return torch.where(visible, 0.0, fill)


def windowed() -> Tensor:
    return (columns() <= rows() + 4) & (columns() > rows() + 4 - 3)


def packed(positions: Tensor) -> Tensor:
    """Sequence numbers of packed sequences, as transformers finds them: the position does not go up by one where another begins."""
    before = positions[:, :1] - 1
    return (torch.diff(positions, prepend=before, dim=-1) != 1).cumsum(-1)


def unpacked(queries: int = Q) -> Tensor:
    """The causal mask of one sequence, guarded against attention between packed ones."""
    number = packed(torch.arange(queries).expand(2, -1))[0]
    rows, columns = torch.arange(queries)[:, None], torch.arange(queries)[None, :]
    return (number[rows] == number[columns]) & (columns <= rows)


BOOLEAN: dict[str, Callable[[], Tensor]] = {
    "le": lambda: columns() <= rows(),
    "ge, operands swapped": lambda: rows() >= columns(),
    "lt": lambda: columns() < rows() + 1,
    "not gt": lambda: ~(columns() > rows()),
    "offset": lambda: columns() <= rows() + 4,
    "negative offset": lambda: columns() <= rows() - 2,
    "arange with a start": lambda: columns() <= torch.arange(4, 4 + Q)[:, None],
    "arange with a step": lambda: 2 * columns() <= torch.arange(0, 2 * Q, 2)[:, None],
    "slice of a longer range": lambda: columns() <= torch.arange(20)[3 : 3 + Q][:, None],
    "int32": lambda: columns().int() <= rows().int(),
    "four dimensions, expanded": lambda: (columns() <= rows())[None, None].expand(2, 1, Q, K),
    "transposed": lambda: (torch.arange(K)[:, None] <= torch.arange(Q)[None, :]).transpose(0, 1),
    "gathered positions": lambda: (
        columns() <= torch.arange(Q)[None, :].expand(2, Q)[torch.zeros(1, dtype=torch.long), torch.arange(Q)][:, None]
    ),
    "tril": lambda: torch.ones(Q, K, dtype=torch.bool).tril(),
    "tril, diagonal": lambda: torch.ones(Q, K, dtype=torch.bool).tril(diagonal=4),
    "not triu": lambda: ~torch.ones(Q, K, dtype=torch.bool).triu(1),
    "window": windowed,
    "window alone": lambda: columns() > rows() - 3,
    "window alone, ahead": lambda: columns() >= rows() + 1,
    "two-sided window": lambda: (rows() - columns()).abs() <= 2,
    "and with true": lambda: torch.ones((), dtype=torch.bool) & (columns() <= rows()),
    "or with false": lambda: torch.zeros((), dtype=torch.bool) | (columns() <= rows()),
    "the tighter of two": lambda: (columns() <= rows() + 1) & (columns() <= rows()),
    "the wider of two": lambda: (columns() <= rows() + 1) | (columns() <= rows()),
    "where": lambda: torch.where(columns() > rows(), False, True),
    "everything": lambda: rows() * 0 + columns() >= 0,
    "bound beyond the keys": lambda: columns() <= rows() + 100,
    "bidirectional": lambda: (rows() >= 0).expand(Q, K),
    "diagonal": lambda: columns() == rows(),
    "nothing": lambda: columns() < rows() - 100,
}


@pytest.mark.parametrize("name", BOOLEAN)
def test_a_boolean_mask_is_its_structure(name: str) -> None:
    mask = BOOLEAN[name]
    structure = structure_of(value_of(mask), Q, K)
    assert structure is not None
    expected = mask()
    assert torch.equal(visible_by(structure), expected.reshape(-1, Q, K)[0])


ADDITIVE: dict[str, Callable[[], Tensor]] = {
    "where(visible, 0, -inf)": lambda: filled(columns() <= rows()),
    "where(visible, 0, lowest)": lambda: filled(columns() <= rows(), LOWEST),
    "where(hidden, -1e9, 0)": lambda: torch.where(columns() > rows(), -1e9, 0.0),
    "masked_fill of zeros": lambda: torch.zeros(Q, K).masked_fill(columns() > rows(), -math.inf),
    "triu of a full matrix": lambda: torch.full((Q, K), -math.inf).triu(1),
    "triu of a full matrix, diagonal": lambda: torch.full((Q, K), LOWEST).triu(diagonal=5),
    "product with a comparison": lambda: torch.full((Q, K), LOWEST) * (columns() > rows()),
    "triu, then product": lambda: torch.full((Q, K), LOWEST).triu(1) * (columns() > rows()),
    "(1 - visible) * lowest": lambda: (1.0 - (columns() <= rows()).float()) * LOWEST,
    "(1 - tril of ones) * lowest": lambda: (1.0 - torch.ones(Q, K).tril()) * LOWEST,
    "sum of two masks": lambda: filled(columns() <= rows() + 4, LOWEST) + filled(columns() > rows() + 1, LOWEST),
    "window": lambda: filled(windowed(), LOWEST),
    "kept above the lowest": lambda: torch.maximum(filled(columns() <= rows()), torch.tensor(LOWEST)),
    "bfloat16": lambda: torch.where(columns() <= rows(), torch.zeros((), dtype=torch.bfloat16), torch.finfo(torch.bfloat16).min),
    "float16": lambda: torch.where(columns() <= rows(), torch.zeros((), dtype=torch.float16), torch.finfo(torch.float16).min),
    "cast": lambda: filled(columns() <= rows(), LOWEST).to(torch.bfloat16),
}


@pytest.mark.parametrize("name", ADDITIVE)
def test_an_additive_mask_is_its_structure(name: str) -> None:
    mask = ADDITIVE[name]
    structure = structure_of(value_of(mask), Q, K)
    assert structure is not None
    assert torch.equal(visible_by(structure), mask().float() == 0)


UNPROVABLE: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "padding": (lambda padding: (columns() <= rows()) & padding[:, None, None, :], (torch.ones(2, K, dtype=torch.bool),)),
    "packed sequences": (
        lambda positions: (columns() <= rows()) & ((positions.diff() != 1).cumsum(-1)[:, None] == 0),
        (torch.arange(Q + 1),),
    ),
    "a position in a tensor": (lambda position: columns() <= rows() + position, (torch.tensor(3),)),
    "a mask from outside": (lambda mask: mask, (torch.ones(Q, K, dtype=torch.bool).tril(),)),
    "floating positions": (lambda: columns().bfloat16() <= rows().bfloat16(), ()),
    "chunks": (lambda: columns() // 4 == rows() // 4, ()),
    "every second key": (lambda: (columns() <= rows()) & (columns() % 2 == 0), ()),
    "a prefix beside causality": (lambda: (columns() <= rows()) | (columns() < 3), ()),
    "only the first keys": (lambda: columns() < (K - 2) + 0 * rows(), ()),
    "only the last queries": (lambda: (rows() > 1) & (columns() <= rows()), ()),
    "not equal": (lambda: columns() != rows(), ()),
    "steeper than the diagonal": (lambda: columns() <= 2 * rows(), ()),
    "flipped": (lambda: columns() <= (Q - 1) - rows(), ()),
    "by row of the batch": (lambda: torch.arange(K) <= torch.arange(2)[:, None, None, None] + rows(), ()),
    "a finite bias": (lambda: filled(columns() <= rows(), -10.0), ()),
    "ALiBi": (lambda: (columns() - rows()) * -0.5, ()),
    "a bias beside the mask": (lambda bias: bias + filled(columns() <= rows(), LOWEST), (torch.randn(Q, K),)),
    "the mask upside down": (lambda: torch.where(columns() <= rows(), -math.inf, 0.0).triu(1), ()),
    "a query that sees nothing, filled with a finite number": (lambda: filled(columns() <= rows() - 1, LOWEST), ()),
    "a window past the keys, filled with a finite number": (lambda: filled(columns() > rows() + 20, LOWEST), ()),
    "a product with infinity": (lambda: torch.full((Q, K), -math.inf) * (columns() > rows()), ()),
}


@pytest.mark.parametrize("name", UNPROVABLE)
def test_no_structure_without_proof(name: str) -> None:
    fn, inputs = UNPROVABLE[name]
    mask, structure = fn(*inputs), structure_of(value_of(fn, *inputs), Q, K)
    if structure is not None:  # said in another way, but the same
        hidden = mask if mask.dtype == torch.bool else mask == 0
        pytest.fail(f"{structure} for\n{hidden}")


def test_symbolic_lengths() -> None:
    def prefill(q: Tensor, k: Tensor) -> Tensor:
        return torch.arange(k.shape[0])[None, :] <= torch.arange(q.shape[0])[:, None] + (k.shape[0] - q.shape[0])

    value = value_of(prefill, torch.zeros(Q), torch.zeros(K), symbolic=True)
    queries, keys = value.shape
    structure = structure_of(value, queries, keys)
    assert structure is not None
    assert structure.is_causal
    assert structure.causal_offset == keys - queries


def test_one_query_at_the_end_sees_everything() -> None:
    def decode(k: Tensor) -> Tensor:
        return filled(torch.arange(k.shape[0])[None, :] <= torch.arange(1)[:, None] + (k.shape[0] - 1), LOWEST)

    value = value_of(decode, torch.zeros(K), symbolic=True)
    assert structure_of(value, 1, value.shape[-1]) == Structure()


def test_a_finite_fill_needs_every_query_to_see_a_key() -> None:
    def shifted(k: Tensor, q: Tensor) -> Tensor:  # for more queries than keys the first ones see nothing
        return filled(torch.arange(k.shape[0])[None, :] <= torch.arange(q.shape[0])[:, None] + (k.shape[0] - q.shape[0]), LOWEST)

    value = value_of(shifted, torch.zeros(K), torch.zeros(Q), symbolic=True)
    assert structure_of(value, *value.shape) is None


def test_the_boolean_inside_a_mask_of_minus_infinity() -> None:
    def mask(visible: Tensor, fill: float) -> Tensor:
        return torch.where(visible, 0.0, fill)

    visible = torch.ones(Q, K, dtype=torch.bool)
    found = boolean_of(value_of(lambda v: mask(v, -math.inf), visible))
    assert found is not None
    assert found.dtype is torch.bool
    assert boolean_of(value_of(lambda v: mask(v, LOWEST), visible)) is None
    assert boolean_of(value_of(lambda v: torch.where(v, -math.inf, 0.0), visible)) is None


def test_one_sequence_is_not_packed() -> None:
    assert structure_of(value_of(lambda: unpacked()), Q, Q) == Structure(True, 0)


def test_one_sequence_of_symbolic_length_is_not_packed() -> None:
    value = value_of(lambda x: unpacked(x.shape[0]), torch.zeros(Q), symbolic=True)
    assert structure_of(value, *value.shape) == Structure(True, 0)


@pytest.mark.parametrize(
    ("positions", "inputs"),
    [
        (lambda: torch.cat((torch.arange(2), torch.arange(3)))[None], ()),
        (lambda: 2 * torch.arange(5)[None], ()),
        (lambda: torch.arange(5).flip(0)[None], ()),
        (lambda x: x, (torch.arange(5)[None],)),
    ],
    ids=["two sequences", "every second position", "backwards", "from outside"],
)
def test_packed_sequences_keep_their_mask(positions: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    def mask(*inputs: Tensor) -> Tensor:
        number = packed(positions(*inputs))[0]
        rows, columns = torch.arange(Q)[:, None], torch.arange(Q)[None, :]
        return (number[rows] == number[columns]) & (columns <= rows)

    assert structure_of(value_of(mask, *inputs), Q, Q) is None


def test_a_running_sum_of_anything_but_zeros_is_unknown() -> None:
    assert structure_of(value_of(lambda: torch.ones(Q, K, dtype=torch.long).cumsum(0) >= columns()), Q, K) is None
    # The first element alone is another: the others do not speak for it.
    assert (
        structure_of(value_of(lambda: columns() <= torch.cat((torch.zeros(1, dtype=torch.long), torch.arange(Q - 1)))[:, None]), Q, K)
        is None
    )
