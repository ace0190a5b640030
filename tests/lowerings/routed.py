"""Routed experts as the tests of their lowerings call them: a small layer, its ids, and the op as a function of tensors alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_fusion.ops.experts import moe_experts

BF16 = torch.bfloat16
TOKENS, HIDDEN, INNER, EXPERTS, K = 5, 16, 8, 4, 2
IDS = torch.tensor([[0, 3], [3, 0], [2, 3], [0, 2], [3, 0]])  # nothing for expert 1


def tensors(dtype: torch.dtype = BF16, *, width: int = 2 * INNER, up: bool = False, biases: bool = False) -> list[Tensor]:
    """Weights, x, gate_up, down, then up, then the biases of gate_up and down."""
    torch.manual_seed(0)
    found = [
        torch.rand(TOKENS, K),
        torch.randn(TOKENS, HIDDEN),
        torch.randn(EXPERTS, width, HIDDEN).mT / 4,
        torch.randn(EXPERTS, HIDDEN, INNER).mT / 3,
    ]
    found += [torch.randn(EXPERTS, HIDDEN, INNER) / 4] * up
    found += [torch.randn(EXPERTS, width), torch.randn(EXPERTS, HIDDEN)] * biases
    return [tensor.to(dtype) for tensor in found]


def call(**options: Any) -> Any:
    """A function of the tensors that calls the op; the ids come as a float tensor, as all inputs of `lower_and_check`."""

    def experts(ids: Tensor, weights: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, *rest: Tensor) -> Tensor:
        up = rest[0] if len(rest) % 2 else None
        named = dict(zip(("gate_up_bias", "down_bias"), rest[len(rest) % 2 :], strict=False))
        return moe_experts(x, ids.long(), weights, gate_up, up, down, **named, **options) + 0

    return experts
