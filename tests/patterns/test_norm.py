"""The norm rules: every spelling that models use is found, what only looks like one is not, and the numbers are right."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import npu_fusion
from npu_fusion import FusionConfig
from npu_fusion.numerics import assert_within_contract
from tests.patterns.support import fused, fused_within_contract

HIDDEN = 32
DTYPES = [torch.float32, torch.bfloat16]
EXACT = FusionConfig(rounding="exact")

Spelling = Callable[[Tensor, Tensor, float], Tensor]


class Norm(nn.Module):
    """A norm with its weight and eps, as models have it: with dynamic=True, Dynamo makes an input of the float."""

    def __init__(self, spelling: Spelling, dtype: torch.dtype, eps: float = 1e-5) -> None:
        super().__init__()
        self.spelling = spelling
        self.eps = eps
        self.weight = nn.Parameter(torch.rand(HIDDEN).to(dtype) + 0.5, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x, self.weight, self.eps)


def tokens(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*(shape or (2, 5, HIDDEN))) * scale).to(dtype)


def mean_square(h: Tensor) -> Tensor:
    return h.pow(2).mean(-1, keepdim=True)


# -------------------------------------------------------------------- RMSNorm: spellings


def llama(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.to(torch.float32)
    return w * (h * torch.rsqrt(mean_square(h) + eps)).to(x.dtype)


def llama4(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return (x.float() * torch.rsqrt(mean_square(x.float()) + eps)).type_as(x) * w


def gemma(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return (x.float() * torch.rsqrt(mean_square(x.float()) + eps) * (1.0 + w.float())).type_as(x)


def olmo2(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (w * (h * torch.rsqrt(mean_square(h) + eps))).to(x.dtype)


def helium(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (w.float() * (h * torch.rsqrt(mean_square(h) + eps))).to(x.dtype)


def one_plus_after_cast(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(mean_square(h) + eps)).to(x.dtype) * (w + 1)


def reciprocal_rounded_early(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(mean_square(x.float()) + eps).to(x.dtype) * w


def in_the_models_type(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(mean_square(x) + eps) * w


def sum_over_n(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return w * (h / torch.sqrt((h * h).sum(-1, keepdim=True) / x.shape[-1] + eps)).to(x.dtype)


def sum_times_inverse_n(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return w * (h / torch.sqrt(torch.sum(h.square(), dim=-1, keepdim=True) * (1 / x.shape[-1]) + eps)).to(x.dtype)


def vector_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(torch.linalg.vector_norm(h, dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps)).to(x.dtype)


def norm_over_root_n(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return w * (h / (h.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5)).to(x.dtype)


def power_of_minus_half(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return ((mean_square(h) + eps).pow(-0.5) * h).to(x.dtype) * w


def reciprocal_of_root(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return w * (torch.reciprocal(torch.sqrt((h * h).mean(-1, keepdim=True) + eps)) * h).to(x.dtype)


def root_rounded_then_divided(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return w * (x / (mean_square(x.float()) + eps).sqrt().to(x.dtype))


def weight_first(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return ((w.float() * h) / torch.sqrt(eps + mean_square(h))).to(x.dtype)


def weight_on_the_reciprocal(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (h * (torch.rsqrt(mean_square(h) + eps) * w.float())).to(x.dtype)


def mean_without_keepdim(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1) + eps).unsqueeze(-1)).to(x.dtype)


def mean_widens(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.float32) + eps)).to(x.dtype)


def viewed_weight(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(mean_square(h) + eps)).to(x.dtype) * w.view(1, 1, -1).expand_as(x)


def functional(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (HIDDEN,), w, eps)


RMS_SPELLINGS: list[Spelling] = [
    llama,
    llama4,
    gemma,
    olmo2,
    helium,
    one_plus_after_cast,
    reciprocal_rounded_early,
    in_the_models_type,
    sum_over_n,
    sum_times_inverse_n,
    vector_norm,
    norm_over_root_n,
    power_of_minus_half,
    reciprocal_of_root,
    root_rounded_then_divided,
    weight_first,
    weight_on_the_reciprocal,
    mean_without_keepdim,
    mean_widens,
    viewed_weight,
    functional,
]
# Where bf16 models round at points at which the fused op keeps fp32.
ROUNDS_EARLY = {reciprocal_rounded_early, in_the_models_type, root_rounded_then_divided, mean_widens}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spelling", RMS_SPELLINGS)
def test_every_spelling_of_rms_norm_is_one_op(spelling: Spelling, dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(Norm(spelling, dtype), tokens(dtype), dynamic=dynamic)
    assert report.idioms == {"rms_norm": 1}
    assert report.ops == {"rms_norm": 1}
    assert report.launches_after == 1
    assert not report.missed
