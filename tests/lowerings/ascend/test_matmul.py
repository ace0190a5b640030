"""`bmm_transpose` on Ascend: when npu_transpose_batchmatmul takes a call, why not, and the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion import FusionConfig
from npu_fusion.lower import REFERENCE
from npu_fusion.ops.matmul import bmm_transpose
from tests.lowerings.ascend.checks import DTYPES, lower_and_check, lower_call
from tests.patterns.support import fused_within_contract

OP = "npu.npu_transpose_batchmatmul"
M, H, K, N = 3, 4, 16, 32


def inputs(*lead: int, dtype: torch.dtype = torch.float16, k: int = K, n: int = N, heads: int = H) -> list[Tensor]:
    return [torch.randn(*lead, heads, k, dtype=dtype), torch.randn(heads, k, n, dtype=dtype)]


@pytest.mark.parametrize("lead", [(M,), (2, M)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_launch(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    found = lower_and_check(lambda x, w: bmm_transpose(x, w) + 1, lambda x, w: bmm_transpose(x, w) + 1, *inputs(*lead, dtype=dtype))
    assert found.provider == OP
    assert [op for op in found.targets() if op not in ("aten.reshape", "aten.view")] == [OP, "aten.add"]


def test_dynamic_rows() -> None:
    weight = torch.randn(H, K, N)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bshk,hkn->bshn", x, self.weight).flatten(2)

    report = fused_within_contract(Model().half(), torch.randn(2, 5, H, K).half(), dynamic=True, config=FusionConfig(emulate=True))
    assert [site.lowered_to for site in report.sites if site.idiom == "bmm_transpose"] == [OP]


def test_a_transposition_before_it_goes() -> None:
    x, weight = torch.randn(H, M, K), torch.randn(H, K, N)

    def call(x: Tensor, w: Tensor) -> Tensor:
        return bmm_transpose(x.transpose(0, 1), w) + 1

    found = lower_and_check(call, call, x, weight)
    assert found.provider == OP
    assert "[0, 1, 2], perm_x2" in found.gm.code.replace("perm_x1 = ", "")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (inputs(M, k=8), "weight[1] is 8, not known to be a multiple of 16"),
        (inputs(M, n=8), "weight[2] is 8, not known to be a multiple of 16"),
        (inputs(M, dtype=torch.float64), "input is float64"),
        (inputs(1, heads=4097), "4097 heads of 16"),
        ([torch.randn(M, H, K), torch.randn(H, N, K).transpose(1, 2)], "stored transposed"),
    ],
)
def test_what_does_not_fit_is_the_reference(given: list[Tensor], reason: str) -> None:
    found = lower_call(lambda x, w: bmm_transpose(x, w) + 1, *given)
    assert found.provider == REFERENCE
    assert reason in found.reason


def test_a_caller_that_gets_another_layout_keeps_the_reference() -> None:
    found = lower_call(lambda x, w: bmm_transpose(x, w, row_major=False), *inputs(M))
    assert found.provider == REFERENCE
    assert "heads lying outermost" in found.reason
    found = lower_call(lambda x, w: bmm_transpose(x, w, row_major=False) + 1, *inputs(M))
    assert found.provider == OP


@pytest.mark.parametrize("target", ["ascend910b", "ascend910_93", "ascend950"])
def test_targets(target: str) -> None:
    options: dict[str, Any] = {"target": target}
    assert lower_call(lambda x, w: bmm_transpose(x, w), *inputs(M), **options).provider == OP
