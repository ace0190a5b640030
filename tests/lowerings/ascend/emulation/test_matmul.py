"""The CPU kernel of npu_transpose_batchmatmul against float64, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.ascend.emulation import EmulationError
from npu_fusion.numerics import assert_within_contract
from tests.lowerings.ascend.checks import DTYPES, check_kernel

M, B, K, N = 3, 4, 16, 32


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("perm", [None, [0, 1, 2], [1, 0, 2]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(dtype: torch.dtype, perm: list[int] | None, split: int) -> None:
    x, weight = torch.randn((M, B, K) if perm == [1, 0, 2] else (B, M, K), dtype=dtype), torch.randn(B, K, N, dtype=dtype)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        y = torch.bmm(x.permute(perm or [0, 1, 2]), weight).transpose(0, 1)
        return y if split == 1 else y.reshape(M, split, -1).transpose(0, 1)

    actual = check_kernel("npu::npu_transpose_batchmatmul", x, weight, perm_x1=perm, batch_split_factor=split)
    assert actual.is_contiguous()
    assert_within_contract(actual, product(x, weight), product(x.double(), weight.double()), dtype)


def test_transposed_weight() -> None:
    x, weight = torch.randn(M, B, K), torch.randn(B, N, K)
    actual = check_kernel("npu::npu_transpose_batchmatmul", x, weight, perm_x1=[1, 0, 2], perm_x2=[0, 2, 1], perm_y=[1, 0, 2])
    torch.testing.assert_close(actual, torch.einsum("mbk,bnk->mbn", x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perm_x1": [1, 1, 2]}, "perm_x1 should be"),
        ({"perm_x2": [1, 1, 2]}, "perm_x2 should be"),
        ({"perm_y": [0, 1, 2]}, "perm_y should be"),
        ({"input": torch.ones(M, B, K, dtype=torch.int64)}, "input's type supported for float16, float32 and bfloat16"),
        ({"weight": torch.ones(B, K, N, dtype=torch.int64)}, "weight's type supported for float16, float32 and bfloat16"),
        ({"weight": torch.ones(B, K, N).half()}, "they must have one dtype"),
        ({"weight": torch.ones(B, K + 1, N)}, "K axis"),
        ({"weight": torch.ones(B + 1, K, N)}, "batches"),
        ({"bias": torch.ones(N)}, "bias"),
        ({"scale": torch.ones(B * N, dtype=torch.int64)}, "scale"),
        ({"batch_split_factor": 3}, "batch_split_factor 3"),
        ({"perm_x1": [0, 1, 2], "perm_x2": [0, 2, 1], "input": torch.ones(B, M, K), "weight": torch.ones(B, N, K)}, "perm_x2"),
        ({"input": torch.ones(0, B, K)}, "empty"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"input": torch.ones(M, B, K), "weight": torch.ones(B, K, N), "perm_x1": [1, 0, 2]}
    with pytest.raises(EmulationError, match=message):
        torch.ops.npu.npu_transpose_batchmatmul(**{**arguments, **change})
