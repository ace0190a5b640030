"""Dispatch, experts and combine by the index arithmetic of all ranks equal the dense weighted sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_fusion.moe import plan

from .simulated import dense, dispatch_and_combine

HIDDEN = 4


def routing(kind: str, tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    """Choices [tokens, top_k], different in a row: random, all at one place, or partly absent."""
    if kind == "one":  # every token of every rank wants the same experts
        return torch.arange(top_k).expand(tokens, top_k).clone()
    if kind == "last":
        return (experts - 1 - torch.arange(top_k)).expand(tokens, top_k).clone()
    scores = torch.rand(tokens, experts, generator=generator)
    ids = scores.topk(top_k, dim=1).indices
    if kind == "absent":
        ids[torch.rand(tokens, top_k, generator=generator) < 0.4] = -1
    return ids


def check(ranks: int, experts: int, top_k: int, tokens: list[int], kind: str, seed: int, copies: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    logical = experts - ranks if copies else experts
    xs = [torch.randn(t, HIDDEN, generator=generator, dtype=torch.float64) for t in tokens]
    ids = [routing(kind, t, top_k, logical, generator) for t in tokens]
    weights = [torch.rand(t, top_k, generator=generator, dtype=torch.float64) for t in tokens]
    active = [torch.rand(t, generator=generator) < 0.8 for t in tokens]
    placement = None
    scale = torch.rand(experts, generator=generator, dtype=torch.float64) + 0.5
    if copies:  # a shuffled placement in which the first experts have a second copy
        slots = torch.randperm(experts, generator=generator)
        placement = torch.full((logical, 2), -1)
        placement[:, 0] = slots[:logical]
        doubled = min(experts - logical, logical)
        placement[:doubled, 1] = slots[logical : logical + doubled]
        scale[placement[:doubled, 1]] = scale[placement[:doubled, 0]]
    results = dispatch_and_combine(xs, ids, weights, experts, max(tokens), expert_scale=scale, active=active, placement=placement)
    slots = [plan.physical_experts(ids[rank], experts, active[rank], placement, rank) for rank in range(ranks)]
    torch.testing.assert_close(torch.cat(results), dense(torch.cat(xs), torch.cat(slots), torch.cat(weights), scale))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_equals_dense_sum(data: st.DataObject) -> None:
    ranks = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    experts = ranks * data.draw(st.integers(2, 6))
    top_k = data.draw(st.integers(1, min(experts - ranks, 6)))
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks).filter(any))
    kind = data.draw(st.sampled_from(["random", "one", "last", "absent"]))
    check(ranks, experts, top_k, tokens, kind, data.draw(st.integers(0, 1000)), data.draw(st.sampled_from([0, 1])))


_SMALLER = [(ranks, experts) for ranks in (2, 4, 8, 16, 32) for experts in (256, 512)]


@pytest.mark.parametrize(("ranks", "experts"), [*_SMALLER, (64, 512), (128, 256), (144, 512), (160, 256)])
def test_many_ranks(ranks: int, experts: int) -> None:
    """256 or 512 experts, in as many slots as the ranks can share equally."""
    slots = -(-experts // ranks) * ranks
    kind = ["random", "one", "absent"][(ranks + experts // 256) % 3]
    check(ranks, slots, 8, [rank % 4 for rank in range(ranks)], kind, ranks)


def test_token_travels_once_a_rank() -> None:
    slots = torch.tensor([[0, 1, 5, 4], [2, 3, 0, 1], [-1, 7, -1, 6]])
    assert plan.route(slots, 4, 2, 8).tolist() == [[0, -1, 16, -1], [8, -1, 1, -1], [-1, 24, -1, -1]]


def test_places_are_ordered_by_expert_then_row() -> None:
    expansion = plan.expand(torch.tensor([[1, -1], [0, 1], [-1, -1], [1, 0]]), 2, 8)
    assert expansion.place.tolist() == [[2, -1], [0, 3], [-1, -1], [4, 1]]
    assert expansion.counts.tolist() == [2, 3]
    assert expansion.source.tolist() == [1, 3, 0, 1, 3, 0, 0, 0]


def test_an_expert_chosen_twice_beyond_the_rows_is_loud() -> None:
    expansion = plan.expand(torch.tensor([[0, 0]]), 1, 1)
    assert plan.reduce_rows(torch.ones(1, 2), expansion.place, None).isnan().all()


def test_ids_out_of_range_choose_nothing() -> None:
    assert plan.physical_experts(torch.tensor([[-1, 4, 3]]), 4, None, None, 0).tolist() == [[-1, -1, 3]]


def test_shared_experts_are_choices_of_weight_one() -> None:
    ids, weights = plan.with_shared_experts(torch.tensor([[3], [1]]), torch.tensor([[0.5], [0.25]]), 8, 2, 2, rank=1)
    assert ids.tolist() == [[3, 10, 11], [1, 8, 9]]
    assert weights.tolist() == [[0.5, 1, 1], [0.25, 1, 1]]
