"""What the Ascend provider gives to the two ops, and what it makes of their results, with ops that hold callers to their documentation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.moe import ascend, plan
from npu_fusion.moe.transport import Group

from .test_plan import routing

EXPERTS, TOP_K, MOST, HIDDEN = 12, 4, 8, 4
ALONE = Group("alone", None, 0, 1)


def checked(x: Tensor, ids: Tensor, mask: Tensor | None, form: dict[str, Any]) -> Tensor:
    """Which choices the ops send; asserts what their documentation asks of callers."""
    assert 0 < len(x) <= MOST
    assert ids.dtype == torch.int32
    assert ((ids >= 0) & (ids < EXPERTS)).all()
    assert all(len(set(row)) == TOP_K for row in ids.tolist())
    assert form["global_bs"] == MOST
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    assert len(x) == MOST, "with a mask, all ranks have equally many tokens"
    assert mask.shape == ids.shape
    return mask


def dispatch_op(x: Tensor, ids: Tensor, *, x_active_mask: Tensor | None, quant_mode: int, expert_token_nums_type: int, **form: Any) -> Any:
    sent = checked(x, ids, x_active_mask, form)
    order = torch.where(sent, ids, EXPERTS).flatten().argsort(stable=True)[: int(sent.sum())]
    rows = torch.full((MOST * TOP_K, HIDDEN), torch.nan)
    rows[: len(order)] = x[order // TOP_K]
    assist = torch.full((len(rows), ascend.ASSIST_WORDS), -1, dtype=torch.int32)
    assist[: len(order), 0] = order.to(torch.int32)
    counts = torch.bincount(ids[sent].long(), minlength=EXPERTS)
    return rows, None, assist.flatten(), counts, counts.cumsum(0).to(torch.int32), None, None


def combine_op(
    x: Tensor, ids: Tensor, assist: Tensor, received: Tensor, weights: Tensor, *, x_active_mask: Tensor | None,
    shared_expert_x: Tensor | None, **form: Any,
) -> Tensor:  # fmt: skip
    sent = checked(weights, ids, x_active_mask, form)
    order = assist.view(-1, ascend.ASSIST_WORDS)[: int(received[-1]), 0].long()
    y = torch.zeros(len(ids), HIDDEN) if shared_expert_x is None else shared_expert_x.clone()
    y.index_add_(0, order // TOP_K, x[: len(order)] * weights.flatten()[order][:, None])
    return torch.where(sent.any(dim=1, keepdim=True), y, torch.nan)  # the documentation says nothing of the others


@pytest.mark.parametrize("masks_choices", [True, False])
@pytest.mark.parametrize("kind", ["random", "absent", "none", "active", "placement"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [MOST, 5, 0])
def test_choices_that_do_not_count_add_nothing(
    masks_choices: bool, kind: str, shared: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ascend, "communicator", lambda group, rank: "hccl")
    monkeypatch.setattr(ascend, "_masks_choices", lambda: masks_choices)
    ops = SimpleNamespace(npu_moe_distribute_dispatch_v2=dispatch_op, npu_moe_distribute_combine_v2=combine_op)
    monkeypatch.setattr(torch.ops, "npu", ops, raising=False)
    generator = torch.Generator().manual_seed(tokens)
    ids = routing("absent" if kind == "absent" else "random", tokens, TOP_K, EXPERTS, generator)
    ids = torch.full_like(ids, -1) if kind == "none" else ids
    active = torch.rand(tokens, TOP_K, generator=generator) < 0.5 if kind == "active" else None
    placement = torch.randperm(EXPERTS, generator=generator) if kind == "placement" else None
    x, weights = torch.randn(tokens, HIDDEN, generator=generator), torch.rand(tokens, TOP_K, generator=generator)
    slots = plan.physical_experts(ids, EXPERTS, active, placement, 0)
    x = torch.where((slots >= 0).any(dim=1, keepdim=True), x, torch.inf)  # what is not sent is not read
    extra = torch.randn(tokens, HIDDEN, generator=generator) if shared else None

    rows, _, counts, handle = ascend.dispatch(x, ids, weights, ALONE, EXPERTS, MOST, active, placement, "none")
    assert handle.shape == (ascend.handle_size(len(rows), 1, EXPERTS),)
    expert = torch.arange(EXPERTS).repeat_interleave(counts)
    out = torch.full_like(rows, torch.nan)
    out[: len(expert)] = rows[: len(expert)] * (expert + 1)[:, None]
    y = ascend.combine(out, ids, weights, handle, ALONE, EXPERTS, MOST, active, placement, extra)

    factor = torch.where(slots >= 0, weights * (slots + 1), 0).sum(dim=1, keepdim=True)
    expected = torch.where((slots >= 0).any(dim=1, keepdim=True), x, 0) * factor
    torch.testing.assert_close(y, expected if extra is None else expected + extra)
