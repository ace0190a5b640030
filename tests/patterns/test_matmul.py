"""A matrix for each head: every spelling, dtype and shape that fuses; near misses that do not; numerics against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion import FusionConfig
from tests.parameters import dtypes_and_shapes
from tests.patterns.support import fused_within_contract

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
H, K, N = 4, 16, 32


class PerHead(nn.Module):
    """A product of an input with one matrix a head, in some spelling."""

    def __init__(self, spelling: Callable[[Tensor, Tensor], Any], shape: tuple[int, ...] = (H, K, N)) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(shape) / shape[-2] ** 0.5)

    def forward(self, x: Tensor) -> Any:
        # What follows reads the result, as attention would: nobody relies on its memory layout.
        return self.spelling(x, self.weight) * 0.5


FLAT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm": lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1),
    "bmm, flattened": lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1).flatten(1),
    "bmm, contiguous": lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1).contiguous(),
    "bmm, permuted": lambda x, w: torch.bmm(x.permute(1, 0, 2), w).permute(1, 0, 2),
    "matmul": lambda x, w: (x.transpose(0, 1) @ w).transpose(0, 1),
    "einsum": lambda x, w: torch.einsum("mhk,hkn->mhn", x, w),
    "einsum, stored transposed": lambda x, w: torch.einsum("mhk,hnk->mhn", x, w.transpose(1, 2)),
    "a slice of the input": lambda x, w: torch.bmm(x[..., :8].transpose(0, 1), w[:, :8]).transpose(0, 1),
}
BATCHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda x, w: torch.einsum("bshk,hkn->bshn", x, w),
    "einsum, flattened": lambda x, w: torch.einsum("bshk,hkn->bshn", x, w).flatten(2),
    "matmul": lambda x, w: torch.matmul(x.transpose(1, 2), w).transpose(1, 2),
    "matmul, flattened": lambda x, w: torch.matmul(x.transpose(1, 2), w.unsqueeze(0)).transpose(1, 2).flatten(2),
    "bmm of all rows": lambda x, w: torch.bmm(x.flatten(0, 1).transpose(0, 1), w).transpose(0, 1).view(*x.shape[:2], H, N),
}


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("spelling", FLAT)
def test_rows(spelling: str, dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(PerHead(FLAT[spelling]).to(dtype), torch.randn(6, H, K, dtype=dtype), dynamic=dynamic)
    report.expect(bmm_transpose=1)
    assert report.ops["bmm_transpose"] == 1


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("spelling", BATCHED)
def test_batches_of_rows(spelling: str, dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(PerHead(BATCHED[spelling]).to(dtype), torch.randn(2, 6, H, K, dtype=dtype), dynamic=dynamic)
    report.expect(bmm_transpose=1)


def test_one_batch() -> None:
    for spelling in BATCHED.values():
        fused_within_contract(PerHead(spelling), torch.randn(1, 6, H, K)).expect(bmm_transpose=1)


def test_exact_rounding_is_kept() -> None:
    model, x = PerHead(FLAT["bmm"]).bfloat16(), torch.randn(6, H, K, dtype=torch.bfloat16)
    fused_within_contract(model, x, config=FusionConfig(rounding="exact")).expect(bmm_transpose=1)


def test_the_copy_of_the_result_is_spared() -> None:
    report = fused_within_contract(PerHead(FLAT["bmm, flattened"]), torch.randn(6, H, K))
    assert report.launches_after == report.launches_before - 1
    assert "row_major = True" in report.graph("fused").code


def test_where_the_model_copies_nothing_the_reference_copies_nothing() -> None:
    report = fused_within_contract(PerHead(FLAT["bmm"]), torch.randn(6, H, K))
    assert report.launches_after == report.launches_before
    assert "row_major = False" in report.graph("fused").code


def test_both_of_mla() -> None:
    """W_UK before attention and W_UV after it."""

    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_uk, self.w_uv = (nn.Parameter(torch.randn(shape) / 4) for shape in ((H, K, N), (H, N, K)))

        def forward(self, q: Tensor, latent: Tensor) -> Tensor:
            q = torch.bmm(q.transpose(0, 1), self.w_uk).transpose(0, 1)
            scores = torch.softmax(torch.einsum("thc,sc->hts", q, latent) * 0.25, dim=-1)
            out = torch.einsum("hts,sc->thc", scores, latent)
            return torch.bmm(out.transpose(0, 1), self.w_uv).transpose(0, 1).flatten(1)

    report = fused_within_contract(Latent(), torch.randn(6, H, K), torch.randn(9, N))
    assert report.idioms["bmm_transpose"] >= 1
    assert all(site.op == "bmm_transpose" for site in report.sites if site.idiom == "bmm_transpose")


# -------------------------------------------------------------------- what must not fuse

NEAR_MISSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "the result stays head-major": (lambda x, w: torch.bmm(x.transpose(0, 1), w), (6, H, K)),
    "the input is head-major": (lambda x, w: torch.bmm(x, w).transpose(0, 1), (H, 6, K)),
    "the result is transposed otherwise": (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(1, 2), (6, H, K)),
    "the result is turned around": (lambda x, w: torch.bmm(x.transpose(0, 1), w).permute(2, 1, 0), (6, H, K)),
    "the rows are split behind the heads": (lambda x, w: torch.einsum("abhk,hkn->ahbn", x, w), (2, 3, H, K)),
    "the rows change their order": (lambda x, w: torch.einsum("abhk,hkn->bahn", x, w), (2, 3, H, K)),
    "one matrix for all heads": (lambda x, w: (x.transpose(0, 1) @ w[0]).transpose(0, 1), (6, H, K)),
    "one row": (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (1, H, K)),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case: str) -> None:
    spelling, shape = NEAR_MISSES[case]
    report = fused_within_contract(PerHead(spelling), torch.randn(shape))
    assert report.ops["bmm_transpose"] == 0


def test_a_matrix_of_its_own_for_each_batch_is_none() -> None:
    weight = torch.randn(2, H, K, N)
    report = fused_within_contract(lambda x, w: (x.transpose(1, 2) @ w).transpose(1, 2) + 1, torch.randn(2, 6, H, K), weight)
    assert report.ops["bmm_transpose"] == 0


def test_attention_is_none() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (torch.softmax(q @ k.transpose(2, 3), -1) @ v).transpose(1, 2).flatten(2)

    report = fused_within_contract(attend, *(torch.randn(2, 6, H, K) for _ in range(3)), config=FusionConfig(rules=("bmm_transpose",)))
    assert report.ops["bmm_transpose"] == 0


def test_a_product_that_is_used_head_major_too_stays() -> None:
    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.bmm(x.transpose(0, 1), w)
        return y * 2, y.transpose(0, 1) * 3

    report = fused_within_contract(both, torch.randn(6, H, K), torch.randn(H, K, N))
    assert report.ops["bmm_transpose"] == 0
    assert report.launches_after <= report.launches_before
