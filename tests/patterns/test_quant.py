"""Quantisation: spellings that fuse, with the model's own bits; look-alikes that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor

from npu_fusion import FusionConfig
from tests.patterns.support import fused, fused_within_contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
H, N = 16, 24
WEIGHT = torch.randint(-127, 128, (N, H), dtype=torch.int8)
SCALE = torch.rand(N) * 0.01 + 0.001
BIAS = torch.randn(N)
CHANNELS = torch.rand(H) + 0.1


def to_int8(x: Tensor, low: int = -128) -> Tensor:
    return x.clamp(low, 127).to(torch.int8)


def over_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return to_int8((x / scale).round()), scale


def clamp_first(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.clamp(x.float().abs().max(dim=-1, keepdim=True)[0] / 127.0, min=1e-7)
    return torch.round(torch.clamp(x / scale, -127, 127)).to(torch.int8), scale


def squeezed(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().max(dim=-1)[0] / 127.0
    return torch.round(x / scale.unsqueeze(-1)).to(torch.int8), scale


def by_reciprocal(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.maximum(x.abs().amax(-1, keepdim=True).float() * (1 / 127), torch.tensor(1e-8))
    return to_int8(torch.round(x * (1.0 / scale)), -127), scale


def by_inverse(x: Tensor) -> tuple[Tensor, Tensor]:
    amax = x.abs().amax(-1, keepdim=True).float() + 1e-6
    return torch.round(x * (127 / amax)).to(torch.int8), amax / 127


def by_inverse_alone(x: Tensor) -> tuple[Tensor, Tensor]:
    """LLM.int8(): the 127 goes into the weight's scale."""
    absmax = x.float().abs().amax(-1, keepdim=True)
    return torch.round(x.float() * (127.0 / absmax)).to(torch.int8), absmax


def of_min_and_max(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    scale = torch.clamp(torch.max(-low, high) / 127.5, min=1e-5)
    return to_int8(torch.round(x * (1.0 / scale))), scale


def no_zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.clamp(torch.round(x / scale).to(torch.int32), -128, 127).to(torch.int8), scale


def per_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().max().float() / 127
    return to_int8((x.float() / scale).round()), scale


def by_one_number(x: Tensor) -> tuple[Tensor, Tensor]:
    """A number of float32 divides without being rounded to the type of x, in which the quotient is."""
    scale = x.float().abs().max() / 127
    return to_int8((x / scale).round()), scale


def per_group(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (2, H // 2))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return (groups / scale).round().clamp(-8, 7).to(torch.int8).flatten(-2), scale.squeeze(-1)


def asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / 255 if x.dtype == torch.float32 else ((high - low) / 255).clamp(min=1e-5)
    zero = torch.clamp(-128 - torch.round(low / scale), -128, 127)
    return to_int8(torch.round(x / scale) + zero), scale, zero


def decomposed_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    zero = torch.zeros(scale.shape, dtype=torch.int64)
    return torch.ops.quantized_decomposed.quantize_per_token(x, scale, zero, -128, 127, torch.int8), scale


def smoothed(x: Tensor) -> tuple[Tensor, Tensor]:
    return over_scale(x * CHANNELS.to(x.dtype))


def float8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float(), scale


FOUND = (
    over_scale, clamp_first, squeezed, by_reciprocal, by_inverse, of_min_and_max, no_zeros, per_tensor, per_group, by_one_number,
    decomposed_per_token, smoothed, float8,
)  # fmt: skip


def equal_to_eager(fn: Callable[..., Any], *inputs: Tensor, dynamic: bool = False, config: FusionConfig | None = None) -> Any:
    """The report of a function that gives the model's own bits."""
    with torch.no_grad():
        eager = fn(*inputs)
    actual, report = fused(fn, *inputs, dynamic=dynamic, config=config)
    assert not report.rule_errors, report.rule_errors
    for a, e in zip(actual, eager, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)
    return report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", FOUND, ids=lambda fn: fn.__name__)
def test_found_scales(spelling: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, H, dtype=dtype)
    report = equal_to_eager(spelling, x)
    report.expect(quantize=1)
    assert report.ops["quantize"] == 1
    assert report.launches_after <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_of_which_the_reciprocal_alone_is_computed(dtype: torch.dtype) -> None:
    """The largest magnitude is kept, too."""
    report = equal_to_eager(by_inverse_alone, torch.randn(3, 5, H, dtype=dtype))
    assert report.ops["quantize"] == report.idioms["quantize"] == 1


@pytest.mark.parametrize("spelling", [over_scale, squeezed, asymmetric], ids=lambda fn: fn.__name__)
def test_sizes_may_be_symbols(spelling: Callable[[Tensor], Any]) -> None:
    equal_to_eager(spelling, torch.randn(3, 5, H), dynamic=True).expect(quantize=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_zero_points_that_are_found(dtype: torch.dtype) -> None:
    report = equal_to_eager(asymmetric, torch.randn(3, 5, H, dtype=dtype))
    report.expect(quantize=1)
    assert report.launches_after == 1


def _kept_from_0(floor: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = floor(x.abs().amax(-1, keepdim=True))
        return to_int8((x / scale).round()), scale

    return quantised


FLOORS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "a least magnitude, rounded": (lambda a: a.clamp(min=1e-3).float() / 127, True),
    "a least magnitude, in fp32": (lambda a: a.float().clamp(min=1e-3) / 127, True),
    "added and rounded": (lambda a: (a + 1e-3).float() / 127, False),
    "a least scale, rounded": (lambda a: (a.float() / 127).to(a.dtype).clamp(min=1e-3), True),
    "a least scale, wider than the scale": (lambda a: (a / 127).float().clamp(min=1e-3), False),
}


@pytest.mark.parametrize("floor", FLOORS)
def test_the_type_in_which_a_scale_is_kept_from_0(floor: str) -> None:
    """With exact rounding a scale is found in one op where that gives the model's bits, and taken as given elsewhere."""
    keep, one_op = FLOORS[floor]
    x = torch.randn(6, H, dtype=torch.bfloat16)
    x[:3] *= 1e-4
    report = equal_to_eager(_kept_from_0(keep), x, config=FusionConfig(rounding="exact"))
    report.expect(quantize=1)
    assert (report.launches_after == 1) == one_op


def _static(x: Tensor) -> list[Tensor]:
    scale, zero = torch.tensor(0.05), torch.tensor(3)
    ops = torch.ops.quantized_decomposed
    return [
        to_int8(torch.round(x / CHANNELS)),
        to_int8(torch.round(x * CHANNELS)),
        to_int8(torch.round(x / scale) + zero),
        to_int8(torch.round(x / 0.05 + 3)),
        torch.clamp(torch.round(x / 0.07) + 128, 0, 255).to(torch.uint8),
        ops.quantize_per_tensor(x.float(), 0.05, 3, -128, 127, torch.int8),
        ops.quantize_per_channel(x.float(), CHANNELS, torch.ones(H, dtype=torch.int64), 2, -128, 127, torch.int8),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_scales(dtype: torch.dtype) -> None:
    report = equal_to_eager(_static, torch.randn(3, 5, H, dtype=dtype))
    report.expect(quantize=7)


def test_in_place_of_storing_a_model_may_round_only() -> None:
    def fake_quantised(x: Tensor) -> tuple[Tensor]:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        return ((x / scale).round().clamp(-128, 127) * scale,)

    report = equal_to_eager(fake_quantised, torch.randn(4, H))
    report.expect(quantize=1, dequantize=1)


# -------------------------------------------------------------------- linears


def _int_mm(q: Tensor) -> Tensor:
    return torch._int_mm(q.flatten(0, 1), WEIGHT.t()).float()


LINEARS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "_int_mm, rows first": lambda q, s: (_int_mm(q) * s.flatten(0, 1) * SCALE).unflatten(0, q.shape[:2]),
    "_int_mm, weight first": lambda q, s: (_int_mm(q) * SCALE * s.flatten(0, 1)).unflatten(0, q.shape[:2]),
    "scales first": lambda q, s: (q.to(torch.int32) @ WEIGHT.t().to(torch.int32)).float() * (s * SCALE),
    "in floats": lambda q, s: q.float() @ WEIGHT.t().float() * s * SCALE + BIAS,
    "in doubles": lambda q, s: (q.double() @ WEIGHT.t().double()).float() * s * SCALE,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", LINEARS)
def test_linears(spelling: str, dtype: torch.dtype) -> None:
    def linear(x: Tensor) -> Tensor:
        q, scale = clamp_first(x)
        return LINEARS[spelling](q, scale).to(x.dtype)

    report = equal_to_eager(lambda x: (linear(x),), torch.randn(4, 5, H, dtype=dtype))
    report.expect(quantize=1, dequantize=1)
    assert report.ops == {"quantize": 1, "quant_linear": 1}
    assert report.launches_after == 2


# -------------------------------------------------------------------- what must not fuse

LOOK_ALIKES: dict[str, Callable[[Tensor], Any]] = {
    "truncated": lambda x: (x / x.abs().amax(-1, keepdim=True) * 127).to(torch.int8),
    "halves up": lambda x: torch.floor(x / 0.05 + 0.5).clamp(-128, 127).to(torch.int8),
    "to decimals": lambda x: torch.round(x / 0.05, decimals=1).clamp(-128, 127).to(torch.int8),
    "not clamped": lambda x: torch.round(x / 0.05).to(torch.int8),
    "clamped too late": lambda x: torch.round(x / 0.05).to(torch.int8).clamp(-100, 100),
    "bounds between numbers": lambda x: torch.round(x / 0.05).clamp(-127.5, 127.5).to(torch.int32),
    "a scale of every element": lambda x: torch.round(x / (x.exp() + 1)).clamp(-128, 127).to(torch.int8),
    "rounded alone": lambda x: torch.round(x * 4) * 0.25,
}


@pytest.mark.parametrize("spelling", LOOK_ALIKES)
def test_look_alikes_of_quantisation(spelling: str) -> None:
    report = fused(LOOK_ALIKES[spelling], torch.randn(4, H))[1]
    assert not report.ops, report.ops


def test_the_scale_of_another_row_is_a_given_one() -> None:
    def other_rows(x: Tensor) -> tuple[Tensor]:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (to_int8((x / scale.flip(0)).round()),)

    report = equal_to_eager(other_rows, torch.randn(4, H) + 1)
    assert report.launches_after > 1


def test_the_largest_magnitude_of_something_else_is_a_given_scale() -> None:
    def other(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (to_int8((x / (y.abs().amax(-1, keepdim=True) / 127)).round()),)

    report = equal_to_eager(other, torch.randn(4, H), torch.randn(4, H))
    assert report.launches_after > 1


SCALED_ALIKES: dict[str, Callable[[Tensor], Any]] = {
    "positions": lambda x: x.to(torch.int64).float() * 0.5,
    "counts": lambda x: (x > 0).to(torch.int32).float() * SCALE[:H],
    "a table of angles": lambda x: torch.arange(4, dtype=torch.int32).float()[:, None] * SCALE,
}


@pytest.mark.parametrize("spelling", SCALED_ALIKES)
def test_look_alikes_of_dequantisation(spelling: str) -> None:
    report = fused(SCALED_ALIKES[spelling], torch.randn(4, H))[1]
    assert report.ops["dequantize"] == 0


def test_sums_that_floats_round_are_not_whole() -> None:
    def linear(x: Tensor) -> Tensor:
        q, scale = clamp_first(x)
        weight = torch.ones(2048, N, dtype=torch.int8)
        return q.float() @ weight.float() * scale * SCALE

    report = fused_within_contract(linear, torch.randn(4, 2048))
    assert report.ops == {"quantize": 1}


@pytest.mark.parametrize(
    "centred",
    [
        lambda w, z: w - z,
        lambda w, z: w - 8,
        lambda w, z: w.to(torch.int16) - z,
        lambda w, z: w.int() - z.int(),
        lambda w, z: w.float() - z.float(),
    ],
    ids=["uint8", "uint8 constant", "int16", "int32", "float"],
)
def test_a_zero_point_that_is_subtracted_in_bytes_wraps(centred: Any) -> None:
    """What is dequantised then is the difference as it wrapped."""
    w = torch.randint(0, 256, (24, 16), dtype=torch.uint8)
    z, s = torch.randint(0, 256, (24, 1), dtype=torch.uint8), torch.rand(24, 1)
    w[0], z[0] = 3, 200
    fn = lambda w, z, s: centred(w, z).to(torch.float32) * s  # noqa: E731
    actual, report = fused(fn, w, z, s)
    assert [site.op for site in report.sites if site.fused] == ["dequantize"]
    torch.testing.assert_close(actual, fn(w, z, s), rtol=1e-6, atol=0)
