"""`moe_experts_weight_only` on Ascend: npu_grouped_matmul with antiquant, and what it leaves to Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.experts_weight_only import moe_experts_weight_only
from tests.int4 import AWQ, GPTQ
from tests.lowerings.ascend.checks import Lowered, lower_call
from tests.lowerings.routed import EXPERTS, IDS, TOKENS, K

BF16 = torch.bfloat16
PROVIDER = "npu.npu_grouped_matmul (antiquant, init_routing_v2, finalize_routing)"
HIDDEN, INNER = 64, 32


def matrix(outputs: int, inputs: int, groups: int, zeros: bool) -> list[Tensor | None]:
    packed = torch.randint(-(2**31), 2**31, (EXPERTS, inputs, outputs // 8)).to(torch.int32).mT
    zero = torch.randint(0, 16, (EXPERTS, outputs, groups), dtype=torch.int8) if zeros else None
    return [packed, ((torch.rand(EXPERTS, outputs, groups) + 0.5) / 6 / inputs**0.5).to(BF16), zero]


def lowered(groups: int = 2, zeros: bool = False, shifts: Sequence[int] = GPTQ, **options: Any) -> Lowered:
    torch.manual_seed(0)
    held = [*matrix(2 * INNER, HIDDEN, groups, zeros), None, None, None, *matrix(HIDDEN, INNER, groups, zeros)]
    inputs = [torch.randn(TOKENS, HIDDEN).to(BF16), torch.rand(TOKENS, K), IDS, *(tensor for tensor in held if tensor is not None)]
    form = {"shifts": shifts, "packs_inputs": False, **options}

    def fn(x: Tensor, w: Tensor, ids: Tensor, *given: Tensor) -> Tensor:
        left = iter(given)
        return moe_experts_weight_only(x, ids, w, *(None if tensor is None else next(left) for tensor in held), **form) + 0

    found = lower_call(fn, *inputs)
    exact = fn(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs))
    assert_within_contract(found.gm(*inputs), fn(*inputs), exact, BF16)
    return found


@pytest.mark.parametrize(
    "options",
    [{"offset": 8}, {"signed": True}, {"shifts": AWQ, "offset": 8}, {"groups": 1, "zeros": True}, {"groups": 1, "offset": 3}],
    ids=["groups", "signed", "another order", "zeros of channels", "one zero"],
)
def test_what_it_takes(options: dict[str, Any]) -> None:
    found = lowered(**options)
    assert found.provider == PROVIDER, found.reason
    assert [target for target in found.targets() if target.startswith("npu.")][1:4:2] == ["npu.npu_grouped_matmul"] * 2


def test_zero_points_of_groups_are_left_to_others() -> None:
    found = lowered(zeros=True, shifts=AWQ)
    assert found.provider != PROVIDER
    assert "its zero points go by output channel alone, the model's gate_up has 2 groups of inputs" in found.reason
