"""Norms with what stands before and after them: residual additions and gates; and the relatives of RMSNorm: l2 norm and LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_fusion import FusionConfig
from tests.parameters import dtypes_and_shapes
from tests.patterns.support import fused, fused_within_contract

HIDDEN = 32
DTYPES = [torch.float32, torch.bfloat16]
EXACT = FusionConfig(rounding="exact")


def tokens(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, HIDDEN))).to(dtype)


def weight(dtype: torch.dtype) -> Tensor:
    return (torch.rand(HIDDEN) + 0.5).to(dtype)


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-5) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


# -------------------------------------------------------------------- residual add + RMSNorm

Block = Callable[[Tensor, Tensor, Tensor], Any]


def sum_goes_on(x: Tensor, residual: Tensor, w: Tensor) -> Any:
    total = residual + x
    return rms_norm(total, w), total


def other_order(x: Tensor, residual: Tensor, w: Tensor) -> Any:
    total = x + residual
    return rms_norm(total, w), total * 2


def sum_ends_here(x: Tensor, residual: Tensor, w: Tensor) -> Any:
    return rms_norm(residual + x, w)


def torchs_own_norm(x: Tensor, residual: Tensor, w: Tensor) -> Any:
    total = residual + x
    return F.rms_norm(total, (HIDDEN,), w, 1e-5), total


def exact_sum_normalised(x: Tensor, residual: Tensor, w: Tensor) -> Any:
    total = x.float() + residual.float()
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
    return normed.to(x.dtype) * w, total.to(x.dtype)


def one_plus_weight(x: Tensor, residual: Tensor, w: Tensor) -> Any:
    total = residual + x
    h = total.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + w.float())).to(x.dtype), total


def without_weight(x: Tensor, residual: Tensor, w: Tensor) -> Any:
    total = residual + x * w
    return total * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + 1e-5), total


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize(
    "block", [sum_goes_on, other_order, sum_ends_here, torchs_own_norm, exact_sum_normalised, one_plus_weight, without_weight]
)
def test_residual_addition_joins_the_norm(block: Block, dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(block, tokens(dtype), tokens(dtype), weight(dtype), dynamic=dynamic)
    assert report.idioms == {"rms_norm": 1, "residual_add": 1}
    assert report.ops == {"add_rms_norm": 1}


@pytest.mark.parametrize("config", [None, EXACT])
def test_sum_in_fp32_is_normalised_unrounded(config: FusionConfig | None) -> None:
    _, report = fused(exact_sum_normalised, *(tokens(torch.bfloat16) for _ in range(2)), weight(torch.bfloat16), config=config)
    call = next(node for node in report.graph("fused").graph.nodes if "add_rms_norm" in str(node.target))
    assert call.kwargs["norm_unrounded"] is True
    assert call.kwargs["sum_dtype"] is torch.bfloat16
    assert report.launches_after == 1


def test_fp32_residual_stream_of_a_bf16_model() -> None:
    """Mamba: the sum is kept in fp32 and rounded for the norm only."""

    def block(x: Tensor, residual: Tensor, w: Tensor) -> Any:
        total = x + residual
        return rms_norm(total.to(w.dtype), w), total

    inputs = tokens(torch.bfloat16), tokens(torch.float32), weight(torch.bfloat16)
    report = fused_within_contract(block, *inputs)
    assert report.idioms == {"rms_norm": 1, "residual_add": 1}
    assert report.launches_after == 1
    outputs, exact = fused(block, *inputs, config=EXACT)
    assert exact.launches_after == 2  # the norm is taken of the rounded sum, the exact one is added once more
    assert (outputs[0] - block(*inputs)[0]).abs().max() <= 2**-7 * outputs[0].abs().max()


def test_a_chain_of_blocks_hands_the_sum_on() -> None:
    def chain(x: Tensor, y: Tensor, w: Tensor) -> Any:
        first = x + y
        second = first + rms_norm(first, w) * y
        third = rms_norm(second, w) + second
        return rms_norm(third, w), third

    report = fused_within_contract(chain, tokens(torch.bfloat16), tokens(torch.bfloat16), weight(torch.bfloat16))
    assert report.ops == {"add_rms_norm": 3}
    assert report.idioms == {"rms_norm": 3, "residual_add": 3}


def test_one_sum_under_two_norms_is_added_once() -> None:
    def parallel(x: Tensor, y: Tensor, w: Tensor, v: Tensor) -> Any:
        return rms_norm(x + y, w), rms_norm(x + y, v)

    report = fused_within_contract(parallel, *(tokens(torch.float32) for _ in range(2)), weight(torch.float32), weight(torch.float32))
    assert report.idioms == {"rms_norm": 2, "residual_add": 1}
    assert report.ops == {"rms_norm": 1, "add_rms_norm": 1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_added_beside_the_residual(dtype: torch.dtype) -> None:
    def block(x: Tensor, residual: Tensor, bias: Tensor, w: Tensor) -> Any:
        total = residual + (x + bias)
        return rms_norm(total, w), total

    inputs = tokens(dtype), tokens(dtype), weight(dtype), weight(dtype)
    assert fused_within_contract(block, *inputs).launches_after == 1
    _, exact = fused(block, *inputs, config=EXACT)
    assert exact.launches_after == (1 if dtype is torch.float32 else 2)  # in bf16 the model rounds the sum with the bias


def test_bias_of_a_linear_stays_with_it() -> None:
    linear = nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16).requires_grad_(False)

    def block(x: Tensor, residual: Tensor, w: Tensor) -> Any:
        return rms_norm(F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype)) + residual, w)

    _, report = fused(block, tokens(torch.bfloat16), tokens(torch.bfloat16), weight(torch.bfloat16))
    assert report.ops == {"add_rms_norm": 1}
    assert report.launches_after == 2
    assert any("addmm" in str(node.target) for node in report.graph("fused").graph.nodes)


def test_addition_that_broadcasts_is_no_residual() -> None:
    def positions(x: Tensor, table: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x + table, w)

    report = fused_within_contract(positions, tokens(torch.float32), tokens(torch.float32, 5, HIDDEN), weight(torch.float32))
    assert report.ops == {"rms_norm": 1}
    assert not report.missed


def test_sum_that_is_normalised_in_another_shape_is_reported() -> None:
    """Hyper-connections: the norm runs over all streams, the sum goes on stream by stream."""

    def streams(x: Tensor, residual: Tensor, w: Tensor) -> Any:
        total = x + residual
        return rms_norm(total.flatten(2), w), total

    report = fused_within_contract(streams, *(tokens(torch.float32, 2, 5, 4, HIDDEN // 4) for _ in range(2)), weight(torch.float32))
    assert report.ops == {"rms_norm": 1}
    assert [(site.idiom, site.reason) for site in report.missed] == [("residual_add", "expected add, found reshape")]


@pytest.mark.parametrize("rank", [3, 2])
def test_one_row(rank: int) -> None:
    """The view strips leading unit dimensions of operands: the fused op gets them back."""

    def block(x: Tensor, residual: Tensor, w: Tensor) -> Any:
        total = residual + (x.unsqueeze(0) if rank == 2 else x)
        return rms_norm(total, w), total

    x = tokens(torch.bfloat16, *((1, 5, HIDDEN) if rank == 3 else (5, HIDDEN)))
    assert fused_within_contract(block, x, tokens(torch.bfloat16, 1, 5, HIDDEN), weight(torch.bfloat16)).ops == {"add_rms_norm": 1}


# -------------------------------------------------------------------- gated RMSNorm


def gated_delta_net(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    return (rms_norm(x, w) * F.silu(gate.float())).to(x.dtype)


def kimi_delta(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (w.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)) * torch.sigmoid(gate.float())).to(x.dtype)


def gate_in_the_models_type(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    return F.silu(gate) * rms_norm(x, w)


def mamba2(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    h = x.float() * F.silu(gate.float())
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def zamba2(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    h = (x.float() * F.silu(gate.float())).view(*x.shape[:-1], 4, HIDDEN // 4)
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).view(x.shape).to(x.dtype)


def spelt_out_silu(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    z = gate.float()
    return (rms_norm(x, w) * (z * torch.sigmoid(z))).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [gated_delta_net, kimi_delta, gate_in_the_models_type, mamba2, zamba2, spelt_out_silu])
def test_gated_norm_is_one_op_and_one_occurrence(form: Block, dtype: torch.dtype) -> None:
    report = fused_within_contract(form, tokens(dtype), tokens(dtype), weight(dtype))
    assert report.idioms == {"gated_rms_norm": 1}
    assert report.ops == {"rms_norm": 1}
    assert report.launches_after == 1
    assert not report.missed


@pytest.mark.parametrize("form", [gated_delta_net, kimi_delta, mamba2])
def test_gated_norm_with_dynamic_sizes(form: Block) -> None:
    report = fused_within_contract(form, *(tokens(torch.bfloat16) for _ in range(2)), weight(torch.bfloat16), dynamic=True)
    assert report.idioms == {"gated_rms_norm": 1}


@pytest.mark.parametrize(("form", "gated"), [(gated_delta_net, 1), (kimi_delta, 1), (mamba2, 1), (gate_in_the_models_type, 0)])
def test_exact_rounding_of_gates(form: Block, gated: int) -> None:
    inputs = tokens(torch.bfloat16), tokens(torch.bfloat16), weight(torch.bfloat16)
    outputs, report = fused(form, *inputs, config=EXACT)
    assert (report.idioms["gated_rms_norm"], report.idioms["rms_norm"]) == (gated, 1 - gated)
    assert (outputs - form(*inputs)).abs().max() <= 2**-7 * outputs.abs().max()


def tanh_gate(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    return rms_norm(x, w) * torch.tanh(gate)


def ungated_product(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    return rms_norm(x, w) * gate


def gate_a_token(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    return rms_norm(x, w) * torch.sigmoid(gate[..., :1])


def one_channel_gated(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    return rms_norm(x[..., :1] * F.silu(gate), w)


@pytest.mark.parametrize("look_alike", [tanh_gate, ungated_product, gate_a_token, one_channel_gated])
def test_other_products_are_no_gates(look_alike: Block) -> None:
    report = fused_within_contract(look_alike, tokens(torch.float32), tokens(torch.float32), weight(torch.float32))
    assert (report.idioms["rms_norm"], report.idioms["gated_rms_norm"]) == (1, 0)


# -------------------------------------------------------------------- l2 norm


def delta_rule(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def delta_rule_scaled(x: Tensor) -> Tensor:
    return delta_rule(x.float()).to(x.dtype) * HIDDEN**-0.5


def normalize(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def normalize_scaled(x: Tensor) -> Tensor:
    return F.normalize(x.float(), p=2.0, dim=-1, eps=0.5).to(x.dtype) * HIDDEN**0.5


def by_vector_norm(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6)


def no_eps(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("form", [delta_rule, delta_rule_scaled, normalize, normalize_scaled, by_vector_norm, no_eps])
def test_l2_norm(form: Callable[[Tensor], Tensor], dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(form, tokens(dtype), dynamic=dynamic)
    assert (report.idioms, report.ops) == ({"l2_norm": 1}, {"l2_norm": 1})
    assert report.launches_after == 1


class L2Norm(nn.Module):
    def __init__(self, eps: float, scale: float) -> None:
        super().__init__()
        self.eps, self.scale = eps, scale

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps) * self.scale


@pytest.mark.parametrize("dynamic", [False, True])
def test_eps_and_scale_of_an_l2_norm_are_the_models(dynamic: bool) -> None:
    for eps, scale in ((1e-6, 3.0), (0.5, 0.25)):
        assert fused_within_contract(L2Norm(eps, scale), tokens(torch.float32), dynamic=dynamic).ops == {"l2_norm": 1}


def test_sum_and_mean_are_not_confused() -> None:
    def both(x: Tensor, w: Tensor) -> Tensor:
        return delta_rule(x) + rms_norm(x, w)

    report = fused_within_contract(both, tokens(torch.float32), weight(torch.float32))
    assert report.ops == {"l2_norm": 1, "rms_norm": 1}


@pytest.mark.parametrize(
    "look_alike",
    [
        lambda x: F.normalize(x, p=1.0, dim=-1),
        lambda x: F.normalize(x, dim=1),
        lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.1),
        lambda x: x / x.norm(dim=-1, keepdim=True).clamp(0.1, 2.0),
    ],
    ids=["l1", "over_tokens", "eps_outside", "clamped_above"],
)
def test_other_lengths_are_no_l2_norm(look_alike: Callable[[Tensor], Tensor]) -> None:
    assert not fused_within_contract(look_alike, tokens(torch.float32)).ops


def test_l2_norm_exact() -> None:
    x = tokens(torch.bfloat16)
    assert fused(lambda x: delta_rule(x.float()).to(x.dtype), x, config=EXACT)[1].ops == {"l2_norm": 1}
    _, report = fused(delta_rule, x, config=EXACT)
    assert not report.ops
    assert [site.reason for site in report.missed] == [
        "rounding='exact': the model rounds the squares to torch.bfloat16, the fused op keeps fp32"
    ]


# -------------------------------------------------------------------- LayerNorm


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (HIDDEN,), w, b, 1e-3)


def not_affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (HIDDEN,))


def only_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (HIDDEN,), w)


def cohere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    return (w.float() * ((h - mean) * torch.rsqrt(variance + 1e-5))).to(x.dtype)


def by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    centred = h - h.mean(-1, keepdim=True)
    return w * (centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) + b


def variance_of_torch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    return (w * (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, keepdim=True, unbiased=False) + 1e-5) + b).to(x.dtype)


def standard_deviation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    return ((h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True, correction=0)).to(x.dtype) * w + b


def mean_of_squares(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    return (w * ((h - mean) * torch.rsqrt((h * h).mean(-1, keepdim=True) - mean * mean + 1e-5)) + b).to(x.dtype)


LAYER_NORMS = [layer_norm, not_affine, only_weight, cohere, by_hand, variance_of_torch, standard_deviation, mean_of_squares]


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("form", LAYER_NORMS)
def test_layer_norm_is_no_rms_norm(form: Block, dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(form, tokens(dtype) + 1, weight(dtype), weight(dtype), dynamic=dynamic)
    assert (report.idioms, report.ops) == ({"layer_norm": 1}, {"layer_norm": 1})
    assert report.launches_after == 1
    assert not report.missed


@pytest.mark.parametrize("form", [layer_norm, cohere, by_hand])
def test_layer_norm_exact(form: Block) -> None:
    inputs = tokens(torch.bfloat16) + 1, weight(torch.bfloat16), weight(torch.bfloat16)
    outputs, report = fused(form, *inputs, config=EXACT)
    assert report.ops == {"layer_norm": 1}
    assert (outputs - form(*inputs)).abs().max() <= 2**-7 * outputs.abs().max()


def test_a_weight_for_each_head_stays_outside() -> None:
    """Cohere's q and k norms: weight [heads, head size]."""

    def per_head(x: Tensor, w: Tensor) -> Tensor:
        return cohere(x, w, w)

    report = fused_within_contract(per_head, tokens(torch.bfloat16, 2, 5, 4, 8), tokens(torch.bfloat16, 4, 8))
    assert report.ops == {"layer_norm": 1}


def test_layer_norm_whose_statistics_are_used_stays() -> None:
    def with_statistics(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return torch.ops.aten.native_layer_norm(x, [HIDDEN], w, b, 1e-5)

    assert not fused_within_contract(with_statistics, tokens(torch.float32), weight(torch.float32), weight(torch.float32)).ops


def test_layer_norm_over_two_dimensions_is_reported() -> None:
    _, report = fused(lambda x: F.layer_norm(x, x.shape[-2:]), tokens(torch.float32))
    assert [(site.idiom, site.reason) for site in report.missed] == [("layer_norm", "mean has dims = (1, 2), expected the last dimension")]


def test_unbiased_variance_is_no_layer_norm() -> None:
    def unbiased(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)

    report = fused_within_contract(unbiased, tokens(torch.float32))
    assert not report.ops
    assert not report.missed
