"""Numerics, layouts, metadata and errors of `bmm_transpose`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.matmul import bmm_transpose
from tests.ops.checks import DTYPES, check_op, check_traceable

H, K, N = 3, 8, 5


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize("lead", [(4,), (2, 3), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_meets_the_numeric_contract(dtype: torch.dtype, lead: tuple[int, ...], row_major: bool) -> None:
    x, weight = torch.randn(*lead, H, K, dtype=dtype), torch.randn(H, K, N, dtype=dtype)
    actual = check_op(bmm_transpose, x, weight, row_major=row_major)
    plain = torch.einsum("...hk,hkn->...hn", x, weight)
    assert_within_contract(actual, plain, torch.einsum("...hk,hkn->...hn", x.double(), weight.double()), dtype)


def test_layouts() -> None:
    x, weight = torch.randn(2, 4, H, K), torch.randn(H, K, N)
    assert bmm_transpose(x, weight).is_contiguous()
    assert bmm_transpose(x, weight, row_major=False).movedim(-2, 0).is_contiguous()


def test_input_of_another_layout() -> None:
    x, weight = torch.randn(2, 4, H, 2 * K)[..., K:], torch.randn(H, N, K).transpose(1, 2)
    torch.testing.assert_close(check_op(bmm_transpose, x, weight), torch.einsum("bshk,hkn->bshn", x, weight))


def test_traceable() -> None:
    first, second = ([torch.randn(m, H, K), torch.randn(H, K, N)] for m in (3, 7))
    check_traceable(bmm_transpose, lambda x, w: bmm_transpose(x, w), first, second)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.ones(2, H, K), torch.ones(H, K, N).half()), TypeError, "one dtype"),
        ((torch.ones(2, H, K).int(), torch.ones(H, K, N).int()), TypeError, "floating point"),
        ((torch.ones(H, K), torch.ones(H, K, N)), ValueError, "x must have at least 3 dimensions"),
        ((torch.ones(2, H, K), torch.ones(K, N)), ValueError, "weight must have 3 dimensions"),
        ((torch.ones(2, H, K + 1), torch.ones(H, K, N)), ValueError, "heads and inputs"),
        ((torch.ones(2, H + 1, K), torch.ones(H, K, N)), ValueError, "heads and inputs"),
    ],
)
def test_errors(args: tuple[Tensor, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bmm_transpose(*args)
    meta: list[Any] = [tensor.to("meta") for tensor in args]
    with pytest.raises(error, match=message):
        bmm_transpose(*meta)
