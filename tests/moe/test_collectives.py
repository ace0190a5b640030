"""Dispatch and combine over gloo processes: values, gradients, compilation, odd routing, errors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from npu_fusion import moe

from .ranks import Ranks

EXPERTS, TOP_K, HIDDEN, MOST = 8, 3, 16, 8

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("moe")]


def scaled(
    x: Tensor, ids: Tensor, weights: Tensor, quant: str = "none", active: Tensor | None = None, placement: Tensor | None = None
) -> Tensor:
    """MoE whose expert in slot e multiplies by e + 1."""
    sent = moe.dispatch(x, ids, weights, EXPERTS, max_tokens=MOST, quant=quant, active=active, placement=placement)
    local = EXPERTS // dist.get_world_size()
    rows = torch.arange(sent.rows.shape[0])
    slot = torch.searchsorted(sent.counts.cumsum(0), rows, right=True) + dist.get_rank() * local
    received = sent.rows.to(x.dtype) * sent.scales[:, None].to(x.dtype)
    return moe.combine(received * (slot + 1)[:, None].to(x.dtype), sent)


def expected(x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return (x[:, None] * (torch.where(slots >= 0, slots + 1, 0) * weights)[..., None]).sum(1)


def inputs(kind: str = "random", step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of unequal numbers of tokens, none of them the same on two ranks."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    tokens = (5 + dist.get_rank() + step) % (MOST + 1)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    if kind == "one":
        ids = torch.arange(TOP_K).expand(tokens, TOP_K)
    if kind == "absent":
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, -1, ids)
    return torch.randn(tokens, HIDDEN, generator=generator), ids, torch.rand(tokens, TOP_K, generator=generator)


def many_steps(steps: int) -> None:
    for step in range(steps):
        x, ids, weights = inputs(("random", "one", "absent")[step % 3], step)
        torch.testing.assert_close(scaled(x, ids, weights), expected(x, ids, weights))


def gradients(backend: str | None) -> None:
    x, ids, weights = inputs("absent")
    x.requires_grad_(), weights.requires_grad_()
    function = scaled if backend is None else torch.compile(scaled, backend=backend, fullgraph=True, dynamic=True)
    y, reference = function(x, ids, weights), expected(x, ids, weights)
    torch.testing.assert_close(y, reference)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, (x, weights), upstream), torch.autograd.grad(reference, (x, weights), upstream))
    with torch.no_grad():
        torch.testing.assert_close(function(x[:3], ids[:3], weights[:3]), reference[:3])


def quantised() -> None:
    x, ids, weights = inputs()
    reference = expected(x, ids, weights)
    for quant, step in (("int8", 1 / 254), ("fp8", 1 / 16)):
        bound = step * x.abs().amax(dim=1, keepdim=True) * ((ids + 1) * weights).sum(1, keepdim=True)
        assert ((scaled(x, ids, weights, quant) - reference).abs() <= bound + 1e-5).all(), quant


def placed_and_masked() -> None:
    x, ids, weights = inputs()
    placement = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(3))
    active = torch.arange(len(x)) % 2 == 0
    slots = torch.where(active[:, None], placement[ids], -1)
    torch.testing.assert_close(scaled(x, ids, weights, active=active, placement=placement), expected(x, slots, weights))


def unequal_blocks() -> str:
    x, ids, weights = inputs()
    with pytest.raises(moe.CollectiveError) as caught:
        moe.dispatch(x, ids, weights, EXPERTS)  # max_tokens left out, unequal tokens
    return str(caught.value)


def unused_stays() -> int:
    """How many collectives are left in a graph whose dispatch nobody uses."""
    graphs = []

    def function(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        moe.dispatch(x, ids, weights, EXPERTS, max_tokens=MOST)
        return x + 1

    def backend(gm: torch.fx.GraphModule, _: object) -> object:
        gm.graph.eliminate_dead_code()
        graphs.append(sum("moe_dispatch" in str(node.target) for node in gm.graph.nodes))
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*inputs())
    return graphs[0]


def test_steps_of_changing_routing(two: Ranks) -> None:
    two.run(many_steps, 60)


@pytest.mark.parametrize("backend", [None, "npu_fusion"])
def test_gradients(two: Ranks, backend: str | None) -> None:
    two.run(gradients, backend)


def test_quantised(two: Ranks) -> None:
    two.run(quantised)


def test_placement_and_mask(two: Ranks) -> None:
    two.run(placed_and_masked)


def test_unequal_blocks_are_an_error_with_the_ranks(two: Ranks) -> None:
    assert all("rank 0" in message and "rank 1" in message and "max_tokens" in message for message in two.run(unequal_blocks))


def test_a_dispatch_is_never_dropped(two: Ranks) -> None:
    assert two.run(unused_stays) == [1, 1]
