"""Numerics, metadata and errors of the ops of routed experts whose matrices are quantised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.ops.experts import moe_experts
from npu_fusion.ops.experts_int8 import moe_experts_int8
from npu_fusion.ops.experts_weight_only import moe_experts_weight_only
from tests.int4 import AWQ
from tests.ops.checks import check_op

TOKENS, HIDDEN, INNER, EXPERTS, K = 3, 16, 8, 4, 2


def routing(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(TOKENS, HIDDEN).to(dtype), torch.tensor([[0, 3], [-1, 2], [3, 0]]), torch.rand(TOKENS, K)]


def int8_matrix(inputs: int, outputs: int) -> list[Tensor]:
    return [torch.randint(-127, 128, (EXPERTS, inputs, outputs), dtype=torch.int8), torch.rand(EXPERTS, outputs) / 100]


def words(inputs: int, outputs: int) -> list[Tensor]:
    packed = torch.randint(-(2**31), 2**31, (EXPERTS, outputs // 8, inputs)).to(torch.int32)
    return [packed, torch.rand(EXPERTS, outputs, 2) / 10, torch.randint(0, 16, (EXPERTS, outputs, 2))]


@pytest.mark.parametrize("up", [False, True])
def test_int8_is_what_its_parts_are(up: bool) -> None:
    gate_up, s1 = int8_matrix(HIDDEN, INNER if up else 2 * INNER)
    second, s3 = int8_matrix(HIDDEN, INNER) if up else (None, None)
    down, s2 = int8_matrix(INNER, HIDDEN)
    y = check_op(moe_experts_int8, *routing(), gate_up, s1, second, s3, down, s2)
    matrices = [None if m is None else m.float() * s[:, None] for m, s in ((gate_up, s1), (second, s3), (down, s2))]
    near = moe_experts(*routing(), matrices[0], matrices[1], matrices[2])
    torch.testing.assert_close(y, near, rtol=0.05, atol=0.02 * near.abs().max().item())


def test_weight_only_is_what_its_matrices_are() -> None:
    first, second = words(HIDDEN, 2 * INNER), words(INNER, HIDDEN)
    y = check_op(moe_experts_weight_only, *routing(), *first, None, None, None, *second, shifts=AWQ, packs_inputs=False)

    def matrix(packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        codes = ((packed.unsqueeze(2) >> torch.tensor(AWQ)[:, None]) & 15).flatten(1, 2)
        grouped = codes.unflatten(2, (2, -1)) - zero.unsqueeze(-1)
        return (grouped * scale.unsqueeze(-1)).flatten(2).mT

    torch.testing.assert_close(y, moe_experts(*routing(), matrix(*first), None, matrix(*second)))


@pytest.mark.parametrize(
    ("place", "wrong", "options", "error", "message"),
    [
        (3, torch.ones(EXPERTS, HIDDEN, 2 * INNER), {}, TypeError, "gate_up must be int8"),
        (4, torch.ones(EXPERTS, INNER), {}, ValueError, "gate_up_scale must have shape"),
        (5, torch.ones(EXPERTS, HIDDEN, 2 * INNER, dtype=torch.int8), {}, ValueError, "up and up_scale go together"),
        (1, torch.ones(TOKENS, K), {}, TypeError, "indices must be int32 or int64"),
        (0, torch.ones(TOKENS, HIDDEN), {"per_tensor": True}, ValueError, "with a scale of their own"),
    ],
)
def test_int8_errors(place: int, wrong: Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    args: list[Any] = [*routing(), *int8_matrix(HIDDEN, 2 * INNER), None, None, *int8_matrix(INNER, HIDDEN)]
    args[place] = wrong
    with pytest.raises(error, match=message):
        moe_experts_int8(*args, **options)


@pytest.mark.parametrize(
    ("place", "wrong", "options", "error", "message"),
    [
        (3, torch.ones(EXPERTS, 2, HIDDEN), {}, TypeError, "packed gate_up must be int32, int8 or uint8"),
        (4, torch.ones(EXPERTS, 2 * INNER, 3), {}, ValueError, "3 groups do not divide 16 inputs"),
        (4, None, {}, (RuntimeError, ValueError), "gate_up"),
        (5, torch.ones(EXPERTS, 2 * INNER, 1), {}, ValueError, "gate_up_zero must have shape"),
        (0, torch.ones(TOKENS, HIDDEN), {"shifts": AWQ[:4]}, ValueError, "shifts must name every nibble"),
    ],
)
def test_weight_only_errors(place: int, wrong: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    args: list[Any] = [*routing(), *words(HIDDEN, 2 * INNER), None, None, None, *words(INNER, HIDDEN)]
    args[place] = wrong
    with pytest.raises(error, match=message):
        moe_experts_weight_only(*args, **{"shifts": AWQ, "packs_inputs": False, **options})
