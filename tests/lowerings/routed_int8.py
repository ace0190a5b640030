"""Routed experts in int8 as the tests of their lowerings call them; beside routed.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_fusion.ops.experts_int8 import moe_experts_int8
from tests.lowerings.routed import BF16, EXPERTS, K

TOKENS, HIDDEN, INNER = 5, 64, 64


def matrices(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Whole numbers [E, inputs, outputs] in bfloat16, which holds them, stored by outputs; and the scales of their columns."""
    codes = torch.randint(-127, 128, (EXPERTS, outputs, inputs)).to(BF16)
    return codes.mT, (torch.rand(EXPERTS, outputs) + 0.5) * inputs**-0.5 / 70


def tensors(dtype: torch.dtype = BF16, *, up: bool = False) -> list[Tensor]:
    """x, weights, then matrices and their scales: gate_up, down, and up if asked for."""
    torch.manual_seed(0)
    found = [torch.randn(TOKENS, HIDDEN).to(dtype), torch.rand(TOKENS, K)]
    sizes = [(HIDDEN, INNER if up else 2 * INNER), (INNER, HIDDEN)] + [(HIDDEN, INNER)] * up
    return [*found, *(tensor for size in sizes for tensor in matrices(*size))]


def call(**options: Any) -> Any:
    """A function of the tensors that calls the op; ids and matrices come as floats, as all inputs of `lower_and_check`."""

    def experts(ids: Tensor, x: Tensor, weights: Tensor, *held: Tensor) -> Tensor:
        gate_up, s1, down, s2, up, s3 = (held[i] if i < len(held) else None for i in range(6))
        whole = [None if matrix is None else matrix.to(torch.int8) for matrix in (gate_up, up, down)]
        kinds = dict.fromkeys(("sum_dtype", "hidden_dtype", "result_dtype"), x.dtype)
        given = {**kinds, "compute_dtype": torch.promote_types(x.dtype, torch.float32), **options}
        return moe_experts_int8(x, ids.long(), weights, whole[0], s1, whole[1], s3, whole[2], s2, **given) + 0

    return experts
