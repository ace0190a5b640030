"""What `simplify` takes out, bit for bit, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from npu_fusion import report
from npu_fusion.cost import launches
from npu_fusion.simplify import FOLDED_BYTES, fold_constants, merge_equal
from npu_fusion.view import build_view
from tests.blocks import compiled
from tests.graphs import aten_graph

X = torch.randn(3, 4)


def merged(fn: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> tuple[GraphModule, int]:
    gm = aten_graph(fn, *inputs, dynamic=dynamic)
    count = merge_equal(gm, build_view(gm.graph))
    gm.graph.lint()
    gm.recompile()
    return gm, count


def same(gm: GraphModule, fn: Callable[..., Any], *inputs: Any) -> bool:
    ours, theirs = gm(*(x.clone() for x in inputs)), fn(*(x.clone() for x in inputs))
    pairs = [(ours, theirs)] if isinstance(ours, Tensor) else zip(ours, theirs, strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


EQUAL: dict[str, tuple[Callable[..., Any], int]] = {
    "the same call twice": (lambda x: torch.sin(x) + torch.sin(x), 2),
    "a chain of calls twice": (lambda x: (x * 2).exp() - (x * 2).exp(), 3),
    "views between": (lambda x: (x[None].cos() * x[None].cos()).sum(), 3),
    "times one": (lambda x: torch.cos(x) * 1.0, 1),
    "plus zero": (lambda x: torch.cos(x) + 0, 1),
    "a cast to what it is": (lambda x: torch.cos(x).to(torch.float32), 1),
    "several results": (lambda x: x.max(-1)[0] + x.max(-1)[0], 2),
}


@pytest.mark.parametrize("name", EQUAL)
def test_what_computes_nothing_new_goes(name: str) -> None:
    fn, most = EQUAL[name]
    gm, _ = merged(fn, X)
    assert same(gm, fn, X)
    assert launches(gm) <= most
    assert launches(gm) < launches(aten_graph(fn, X)) or name == "a cast to what it is"


def test_a_position_plus_a_range_of_one_is_a_view() -> None:
    def positions(seen: Tensor) -> Tensor:
        return (torch.arange(1) + seen) * 2

    seen = torch.tensor(7)
    gm, count = merged(positions, seen)
    assert count
    assert same(gm, positions, seen)
    assert launches(gm) <= 2  # the product, and the range that nobody reads


def test_symbolic_sizes() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.arange(x.shape[0])[:, None] * x + torch.arange(x.shape[0])[:, None] * x

    gm, count = merged(fn, X, dynamic=True)
    assert count
    assert same(gm, fn, torch.randn(5, 4))


KEPT: dict[str, Callable[..., Any]] = {
    "both are returned": lambda x: (torch.sin(x), torch.sin(x)),
    "a copy is returned beside its source": lambda x: (y := torch.sin(x), y.clone()),
    "random numbers": lambda x: torch.rand_like(x) - torch.rand_like(x),
    "another memory order": lambda x: torch.sin(x).t().contiguous().view(-1),
    "another type": lambda x: torch.sin(x).to(torch.bfloat16).float(),
    "rounded on the way": lambda x: (x + 1.0) - 1.0,
    "other arguments": lambda x: x.sum(0, keepdim=True) + x.sum(1, keepdim=True),
    "true is not one": lambda x: torch.full((), True) + torch.full((), 1) + x,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_differs_stays(name: str) -> None:
    fn = KEPT[name]
    gm, _ = merged(fn, X)
    assert launches(gm) == launches(aten_graph(fn, X))


def test_what_is_written_to_stays() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        before = x.clone()
        x.copy_(y)
        return before + x

    def compute(x: Tensor) -> Tensor:
        a, b = x.sin(), x.sin()
        a.add_(1)
        return a * b

    inputs = torch.randn(3), torch.randn(3)
    kept = torch.compile(fn, backend="npu_fusion", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(kept(*(x.clone() for x in inputs)), fn(*(x.clone() for x in inputs)))
        assert torch.equal(torch.compile(compute, backend="npu_fusion")(inputs[0]), compute(inputs[0]))


def copied(cache: Tensor, at: Tensor, x: Tensor) -> Any:
    cache.index_copy_(0, at, x)
    return cache.clone()


def copied_through_a_view(cache: Tensor, at: Tensor, x: Tensor) -> Any:
    cache.view(-1).view(4, 3).index_copy_(0, at, x)
    return cache.clone().view(2, 6)


def copied_between_writes(cache: Tensor, at: Tensor, x: Tensor) -> Any:
    cache.index_copy_(0, at, x)
    first = cache.clone()
    cache.index_copy_(0, at - 1, x * 2)
    return first


def a_part_copied(cache: Tensor, at: Tensor, x: Tensor) -> Any:
    cache[2] = x[0]
    return cache[2].clone()


def a_part_written_and_copied(cache: Tensor, at: Tensor, x: Tensor) -> Any:
    half = cache[2:]
    half.index_copy_(0, at - 1, x)
    return half.clone()


def written_and_computed_alike(cache: Tensor, at: Tensor, x: Tensor) -> Any:
    new = cache.index_copy(0, at, x)
    cache.index_copy_(0, at, x)
    return new


def a_counter(cache: Tensor, at: Tensor, x: Tensor) -> Any:
    at.add_(1)
    return at.clone()


@pytest.mark.parametrize(
    "step",
    [
        copied,
        copied_through_a_view,
        copied_between_writes,
        a_part_copied,
        a_part_written_and_copied,
        written_and_computed_alike,
        a_counter,
    ],
)
def test_a_copy_of_what_is_written_back_is_a_copy(step: Callable[..., Any]) -> None:
    """The caller keeps the first step's result while the second one writes: they must not be the same memory."""
    mine, theirs = ([torch.zeros(4, 3), torch.tensor([1]), torch.ones(1, 3)] for _ in range(2))
    run = torch.compile(step, backend="npu_fusion", fullgraph=True)
    with torch.no_grad():
        kept = [(run(*mine), step(*theirs))]
        mine[2], theirs[2] = mine[2] * 5, theirs[2] * 5
        kept.append((run(*mine), step(*theirs)))
    for actual, expected in (*kept, *zip(mine, theirs, strict=True)):
        assert torch.equal(actual, expected)


# -------------------------------------------------------------------- constants


def folded(fn: Callable[..., Any], *inputs: Any, dynamic: bool = False, dry_run: bool = False) -> GraphModule:
    gm = aten_graph(fn, *inputs, dynamic=dynamic)
    fold_constants(gm, dry_run)
    gm.graph.lint()
    gm.recompile()
    return gm


def test_ranges_and_what_is_made_of_them_are_constants() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * (1.0 / (10000.0 ** (torch.arange(0, 4).float() / 4)))

    gm = folded(fn, X)
    assert same(gm, fn, X)
    assert launches(gm) == 1
    assert torch.equal(gm(X), gm(X))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.arange(4),
        lambda x: x.sum() + torch.ones(FOLDED_BYTES),
        lambda x: x[:1] + torch.arange(x.shape[0])[:, None],
        lambda x: x + torch.zeros(4).index_fill_(0, torch.zeros(1, dtype=torch.long), 2.0),
    ],
    ids=["returned", "large", "symbolic", "written to"],
)
def test_what_is_no_constant_is_computed(fn: Callable[..., Any]) -> None:
    gm = folded(fn, X, dynamic=True)
    assert same(gm, fn, X)
    assert same(gm, fn, X)
    assert launches(gm) > 1 or gm(X) is not gm(X)


def test_random_numbers_are_no_constants() -> None:
    gm = folded(lambda x: x + torch.rand(4), X)
    assert not torch.equal(gm(X), gm(X))


def test_constants_of_a_dry_run_have_no_memory() -> None:
    gm = folded(lambda x: x + torch.arange(4), X, dry_run=True)
    (constant,) = gm.graph.find_nodes(op="get_attr")
    assert type(getattr(gm, str(constant.target))).__name__ == "FakeTensor"


def test_compiled_graphs_are_simplified() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.cos(x) * 1.0 + torch.cos(x) * torch.arange(4)

    ours = compiled(fn)
    with torch.no_grad():
        assert torch.equal(ours(X), fn(X))
    assert report(ours).launches_before == 6
    assert report(ours).launches_after == 3


def test_a_copy_of_what_a_fused_op_stores_in_order_goes() -> None:
    """Attention written out gives [B, N, S, D], which `contiguous` brings into the order in which the fused op stores it anyway."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.2, dim=-1)
        return (weights @ v).transpose(1, 2).contiguous().reshape(2, 5, -1) + 1

    ours = compiled(fn)
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(q, k, v), fn(q, k, v))
    assert "clone" not in report(ours).graph("fused").code


def test_equal_calls_of_what_was_taken_out_are_taken_out() -> None:
    def fn(x: Tensor) -> Tensor:
        return x + (torch.arange(3) + 0).unsqueeze(0) + (torch.arange(3) + 0)

    gm, _ = merged(fn, torch.randn(4, 3))
    gm.graph.lint()
    assert same(gm, fn, torch.randn(4, 3))
