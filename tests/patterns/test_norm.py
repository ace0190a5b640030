"""The norm rules: every spelling that models use is found, what only looks like one is not, and the numbers are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import npu_fusion
from npu_fusion import FusionConfig
from npu_fusion.numerics import assert_within_contract
from tests.parameters import dtypes_and_shapes
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


def by_einsum(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(torch.einsum("...d,...d->...", h, h).unsqueeze(-1) / h.shape[-1] + eps)).to(x.dtype)


def row_by_itself(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt((h.unsqueeze(-2) @ h.unsqueeze(-1)).squeeze(-1) / h.shape[-1] + eps)).to(x.dtype)


def vector_dot(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(torch.linalg.vecdot(h, h)[..., None] / h.shape[-1] + eps)).to(x.dtype)


RMS_SPELLINGS: list[Spelling] = [
    by_einsum,
    row_by_itself,
    vector_dot,
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


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("spelling", RMS_SPELLINGS)
def test_every_spelling_of_rms_norm_is_one_op(spelling: Spelling, dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(Norm(spelling, dtype), tokens(dtype), dynamic=dynamic)
    assert report.idioms == {"rms_norm": 1}
    assert report.ops == {"rms_norm": 1}
    assert report.launches_after == 1
    assert not report.missed


@pytest.mark.parametrize("spelling", RMS_SPELLINGS)
def test_exact_rounding_takes_only_what_rounds_alike(spelling: Spelling) -> None:
    x, norm = tokens(torch.bfloat16), Norm(spelling, torch.bfloat16)
    outputs, report = fused(norm, x, config=EXACT)
    assert report.idioms["rms_norm"] == (spelling not in ROUNDS_EARLY)
    assert (outputs - norm(x)).abs().max() <= 2**-7 * outputs.abs().max()  # at most a last place, from another order of summation
    for missed in report.missed:
        assert "rounding='exact'" in str(missed.reason)


def test_one_plus_weight_rounded_to_bf16_is_a_weight_like_any_other() -> None:
    def in_bf16(x: Tensor, w: Tensor, eps: float) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(mean_square(h) + eps) * (1 + w)).to(x.dtype)

    x, norm = tokens(torch.bfloat16), Norm(in_bf16, torch.bfloat16)
    assert fused_within_contract(norm, x).launches_after == 1
    outputs, report = fused(norm, x, config=EXACT)
    assert report.ops == {"rms_norm": 1}
    assert report.launches_after == 2  # 1 + w is added where the model rounds it
    assert (outputs - norm(x)).abs().max() <= 2**-7 * outputs.abs().max()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [None, EXACT])
@pytest.mark.parametrize("spelling", [llama, gemma, olmo2, one_plus_after_cast])
def test_weight_of_another_type(spelling: Spelling, weight_dtype: torch.dtype, config: FusionConfig | None) -> None:
    x_dtype = torch.bfloat16 if weight_dtype is torch.float32 else torch.float32
    report = fused_within_contract(Norm(spelling, weight_dtype), tokens(x_dtype), config=config)
    assert report.ops == {"rms_norm": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keeps_fp32", [False, True])
def test_without_weight(dtype: torch.dtype, keeps_fp32: bool) -> None:
    def bare(x: Tensor) -> Tensor:
        h = x.float()
        normed = h * torch.rsqrt(mean_square(h) + 1e-6)
        return normed if keeps_fp32 else normed.to(x.dtype)

    assert fused_within_contract(bare, tokens(dtype)).ops == {"rms_norm": 1}


def test_without_eps() -> None:
    assert fused_within_contract(lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt(), tokens(torch.float32)).ops == {"rms_norm": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("eps", [None, 0.25])
def test_torch_module(dtype: torch.dtype, affine: bool, eps: float | None) -> None:
    norm = nn.RMSNorm(HIDDEN, eps=eps, elementwise_affine=affine, dtype=dtype)
    report = fused_within_contract(norm, tokens(dtype))
    assert (report.idioms, report.ops) == ({"rms_norm": 1}, {"rms_norm": 1})


def test_scalars_around_the_norm_stay_beside_it() -> None:
    def scaled(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return llama(x, w * 0.5, eps) * 3.0

    assert fused_within_contract(Norm(scaled, torch.bfloat16), tokens(torch.bfloat16)).ops == {"rms_norm": 1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_input_and_heads(dtype: torch.dtype) -> None:
    norm = Norm(lambda x, w, eps: llama(x.transpose(1, 2), w, eps).transpose(1, 2), dtype)
    assert fused_within_contract(norm, tokens(dtype, 2, 4, 3, HIDDEN)).ops == {"rms_norm": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_groups_of_channels_with_one_weight(dtype: torch.dtype, dynamic: bool) -> None:
    def grouped(x: Tensor, w: Tensor, eps: float) -> Tensor:
        h = x.float().view(*x.shape[:-1], 4, HIDDEN // 4)
        return w * (h * torch.rsqrt(mean_square(h) + eps)).view(x.shape).to(x.dtype)

    report = fused_within_contract(Norm(grouped, dtype), tokens(dtype), dynamic=dynamic)
    assert report.idioms == {"rms_norm": 1}
    assert report.launches_after == 1


def test_regrouping_that_is_no_fold_keeps_the_weight_outside() -> None:
    def other(x: Tensor, w: Tensor, eps: float) -> Tensor:
        h = x.float()
        return w * (h * torch.rsqrt(mean_square(h) + eps)).view(5, 2, HIDDEN)

    report = fused_within_contract(Norm(other, torch.float32), tokens(torch.float32))
    assert report.idioms == {"rms_norm": 1}
    assert report.launches_after == 2


# -------------------------------------------------------------------- RMSNorm: eps is the model's


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_models_of_one_class_keep_their_own_eps(dynamic: bool) -> None:
    x = tokens(torch.float32, scale=0.1)
    for eps in (1e-6, 0.5, 1e-2):
        norm = Norm(llama, torch.float32, eps)
        compiled = torch.compile(norm, backend="npu_fusion", dynamic=dynamic)
        assert_within_contract(compiled(x), norm(x), norm.double()(x.double()), torch.float32, f"eps {eps}")
        assert npu_fusion.report(compiled).idioms["rms_norm"] >= 1


@pytest.mark.parametrize("eps", [1e-12, 3e-4, 1.0])
def test_any_eps_is_captured(eps: float) -> None:
    assert fused_within_contract(Norm(llama, torch.float32, eps), tokens(torch.float32, scale=0.1)).ops == {"rms_norm": 1}


# -------------------------------------------------------------------- RMSNorm: look-alikes


def eps_outside_the_root(x: Tensor, w: Tensor) -> Tensor:
    return w * (x / (mean_square(x).sqrt() + 0.1))


def part_of_the_hidden_size(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(mean_square(x[..., : HIDDEN // 2]) + 1e-5))


def another_tensors_root(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(mean_square(x + 1) + 1e-5))


def over_tokens(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5))


def over_two_dimensions(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-5))


def third_power(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-5))


def mean_of_absolute_values(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-5))


def root_multiplied(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.sqrt(mean_square(x) + 1e-5))


def unbiased_variance(x: Tensor, w: Tensor) -> Tensor:
    return w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5))


def row_by_another(x: Tensor, w: Tensor) -> Tensor:
    return w * x * torch.rsqrt(torch.einsum("...d,...d->...", x, x.abs()).unsqueeze(-1) / HIDDEN + 1)


def rows_by_rows(x: Tensor, w: Tensor) -> Tensor:
    return w * x * torch.rsqrt(torch.einsum("btd,bsd->bts", x, x).square().sum(-1, keepdim=True) / HIDDEN + 1e-6)


def row_by_itself_over_less(x: Tensor, w: Tensor) -> Tensor:
    return w * x * torch.rsqrt(torch.einsum("...d,...d->...", x, x).unsqueeze(-1) / (HIDDEN - 1) + 1e-6)


LOOK_ALIKES = [
    row_by_another,
    rows_by_rows,
    row_by_itself_over_less,
    eps_outside_the_root,
    part_of_the_hidden_size,
    another_tensors_root,
    over_tokens,
    over_two_dimensions,
    third_power,
    mean_of_absolute_values,
    root_multiplied,
    unbiased_variance,
]


@pytest.mark.parametrize("look_alike", LOOK_ALIKES)
def test_look_alikes_stay_as_they_are(look_alike: Callable[[Tensor, Tensor], Tensor]) -> None:
    report = fused_within_contract(look_alike, tokens(torch.float32), torch.rand(HIDDEN))
    assert not report.ops


@pytest.mark.parametrize(
    ("look_alike", "reason"),
    [
        (part_of_the_hidden_size, "expected the same tensor as the other 'x'"),
        (over_tokens, "mean has dims = (1,), expected the last dimension"),
        (over_two_dimensions, "mean has dims = (1, 2), expected the last dimension"),
    ],
)
def test_a_norm_that_no_op_computes_is_reported_with_the_reason(look_alike: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    _, report = fused(look_alike, tokens(torch.float32), torch.rand(HIDDEN))
    assert [(site.idiom, site.reason) for site in report.missed] == [("rms_norm", reason)]


@pytest.mark.parametrize("weight_shape", [(5, 1), (5, HIDDEN), (2, 5, HIDDEN)])
def test_what_scales_rows_is_no_weight(weight_shape: tuple[int, ...]) -> None:
    def scaled(x: Tensor, w: Tensor) -> Tensor:
        return llama(x, w, 1e-5)

    report = fused_within_contract(scaled, tokens(torch.float32), torch.rand(weight_shape))
    assert report.ops == {"rms_norm": 1}
    assert report.launches_after == 2


def test_integers_and_float64_are_normalised_as_the_model_does() -> None:
    def of_integers(x: Tensor) -> Tensor:
        return x.float() * torch.rsqrt(mean_square(x.float()) + 1e-5)

    def in_float64(x: Tensor) -> Tensor:
        return x.double() * torch.rsqrt(mean_square(x.double()) + 1e-5)

    assert fused_within_contract(of_integers, torch.randint(1, 9, (2, 5, HIDDEN))).ops == {"rms_norm": 1}
    x = tokens(torch.float32)
    outputs, report = fused(in_float64, x)
    assert report.ops == {"rms_norm": 1}
    torch.testing.assert_close(outputs, in_float64(x), rtol=1e-14, atol=0)


def test_norm_of_a_sum_over_experts() -> None:
    """What a mixture of experts returns is a sum without its dimension: an ordinary input of the next norm, in fp32 too."""
    weight = torch.rand(32) + 0.5

    def block(x: Tensor) -> Tensor:
        mixed = (x * 2).sum(dim=1)
        return mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + 1e-6) * weight

    _, report = fused(block, torch.randn(4, 3, 32))
    report.expect(rms_norm=1)
