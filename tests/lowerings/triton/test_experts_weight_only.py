"""The providers of `moe_experts_weight_only` by Triton: few tokens and many, layouts of words, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.experts_weight_only import moe_experts_weight_only
from tests.int4 import AWQ, GPTQ
from tests.lowerings.ascend.checks import Lowered, lower_call

CUDA: dict[str, Any] = {"target": "cuda", "emulate": True}
FP16, FP32 = torch.float16, torch.float32
FEW, MANY = "triton.w4a16_linear (expert_ids)", "triton.moe_permute + triton.grouped_w4a16 + triton.moe_unpermute"
EXPERTS, K, HIDDEN, INNER = 4, 2, 64, 32


def words(*sizes: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, sizes).to(torch.int32)


def matrix(outputs: int, inputs: int, groups: int, packs_inputs: bool, zeros: bool) -> list[Tensor | None]:
    """Words, scales and zero points of a stack."""
    packed = words(EXPERTS, outputs, inputs // 8) if packs_inputs else words(EXPERTS, inputs, outputs // 8).mT
    zero = torch.randint(0, 16, (EXPERTS, outputs, groups), dtype=torch.int8) if zeros else None
    return [packed, ((torch.rand(EXPERTS, outputs, groups) + 0.5) / 6 / inputs**0.5).to(FP16), zero]


def lowered(
    tokens: int, *, packs_inputs: bool = False, up: bool = False, zeros: bool = True, ids: int | None = None, **options: Any
) -> Lowered:
    """Lower a layer, and hold it to the numeric contract."""
    torch.manual_seed(0)
    width = INNER if up else 2 * INNER
    stacks = [matrix(width, HIDDEN, 2, packs_inputs, zeros), [None] * 3, matrix(HIDDEN, INNER, 1, packs_inputs, zeros)]
    if up:
        stacks[1] = matrix(width, HIDDEN, 2, packs_inputs, zeros)
    held = [tensor for stack in stacks for tensor in stack]
    chosen = torch.rand(tokens, EXPERTS).topk(K).indices
    inputs = [torch.randn(tokens, HIDDEN).to(FP16), torch.rand(tokens, K), chosen if ids is None else chosen.masked_fill(chosen == 2, ids)]
    inputs += [tensor for tensor in held if tensor is not None]
    form = {"shifts": GPTQ if packs_inputs else AWQ, "packs_inputs": packs_inputs, **options}

    def fn(x: Tensor, w: Tensor, ids: Tensor, *given: Tensor) -> Tensor:
        left = iter(given)
        return moe_experts_weight_only(x, ids, w, *(None if tensor is None else next(left) for tensor in held), **form) + 0

    found = lower_call(fn, *inputs, **CUDA)
    exact = fn(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs))
    assert_within_contract(found.gm(*inputs), fn(*inputs), exact, FP16)
    return found


@pytest.mark.parametrize(
    ("tokens", "provider", "launches"),
    [
        (2, FEW, ["w4a16_linear", "glu", "w4a16_linear", "moe_unpermute"]),
        (9, MANY, ["moe_permute", "grouped_w4a16", "glu", "grouped_w4a16", "moe_unpermute"]),
    ],
)
def test_awq(tokens: int, provider: str, launches: list[str]) -> None:
    found = lowered(tokens)
    assert found.provider == provider
    own = [target.removeprefix("npu_fusion_triton.") for target in found.targets() if "triton" in target]
    assert [name for name in own if name != "w4a16_repack_awq"] == launches


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (1, {"packs_inputs": True, "zeros": False, "offset": 8}),
        (12, {"packs_inputs": True, "signed": True, "zeros": False, "up": True, "activation": "gelu_tanh"}),
        (9, {"shifts": GPTQ, "ids": -1, "layout": "interleaved", "alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.6, "up_offset": 1.0}),
        (1, {"shifts": GPTQ, "ids": -1}),
    ],
    ids=["gptq", "two", "clipped, no expert", "no expert"],
)
def test_every_argument_is_honoured(tokens: int, options: dict[str, Any]) -> None:
    assert lowered(tokens, **options).provider == (FEW if tokens <= 8 else MANY)


def test_what_does_not_fit_is_the_reference() -> None:
    x, w, ids = torch.randn(2, HIDDEN), torch.rand(2, K), torch.tensor([[0, 1], [2, 3]])
    held = [*matrix(2 * INNER, HIDDEN, 2, False, True), *matrix(HIDDEN, INNER, 1, False, True)]

    def fn(x: Tensor, w: Tensor, ids: Tensor, *held: Tensor) -> Tensor:
        return moe_experts_weight_only(x, ids, w, *held[:3], None, None, None, *held[3:], shifts=AWQ, packs_inputs=False) + 0

    found = lower_call(fn, x, w, ids, *held, **CUDA)
    assert found.provider == REFERENCE
    assert "x is torch.float32" in found.reason
