"""Linears of four-bit weights: how authors unpack, look-alikes, numbers, and new weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from npu_fusion import FusionConfig, FusionReport
from tests.patterns.support import fused, fused_within_contract

K, N, GROUP = 128, 32, 32
G = K // GROUP
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
AWQ, STRAIGHT = [0, 16, 4, 20, 8, 24, 12, 28], [0, 4, 8, 12, 16, 20, 24, 28]
Layer = Callable[..., Tensor]


def calls_of(report: FusionReport) -> list[Node]:
    """The calls with packed weights."""
    nodes = report.graph("fused").graph.nodes
    return [node for node in nodes if str(node.target) == "npu_fusion.weight_only_linear.default" and node.kwargs.get("shifts")]


def words(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, sizes).to(dtype)


def columns(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x [2, 3, K], weight [K, N / 8], zeros [G, N / 8], scale [G, N], bias [N]."""
    return torch.randn(2, 3, K).to(dtype), words(K, N // 8), words(G, N // 8), scales(dtype), torch.randn(N).to(dtype)


def rows(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x [2, 3, K], weight [K / 8, N], zeros [G, N / 8], scale [G, N], bias [N]."""
    x, _, zeros, scale, bias = columns(dtype)
    return x, words(K // 8, N), zeros, scale, bias


def pairs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x [2, 3, K], weight [N, K / 2] bytes, zeros [N, G] floating, scale [N, G], bias [N]."""
    x, _, _, scale, bias = columns(dtype)
    return x, words(N, K // 2, dtype=torch.uint8), torch.rand(N, G).to(dtype) * 15, scale.t().contiguous(), bias


def scales(dtype: torch.dtype) -> Tensor:
    return (torch.rand(G, N) / 64 + 0.01).to(dtype)


# -------------------------------------------------------------------- AWQ


def awq_by_index(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4)
    order = torch.arange(N, dtype=torch.int32).view(-1, 8)[:, ORDER].reshape(-1)

    def unpack(packed: Tensor) -> Tensor:
        nibbles = torch.bitwise_right_shift(packed[:, :, None], shifts[None, None, :]).to(torch.int8).view(packed.shape[0], -1)
        return torch.bitwise_and(nibbles[:, order], 15)

    weight = (unpack(w) - unpack(z).repeat_interleave(GROUP, dim=0)) * s.repeat_interleave(GROUP, dim=0)
    return x @ weight + bias


def awq_by_table(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    shifts = torch.tensor(ORDER) * 4
    weight, zeros = ((packed.unsqueeze(-1) >> shifts).remainder(16).flatten(1) for packed in (w, z))
    return x @ ((weight.view(G, GROUP, N) - zeros[:, None]) * s[:, None]).reshape(K, N)


def awq_in_a_loop(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    weight, zeros = (torch.stack([(packed >> 4 * i) & 0xF for i in ORDER], -1).view(-1, N) for packed in (w, z))
    zeros = zeros[:, None].expand(G, GROUP, N).reshape(K, N)
    return F.linear(x, ((weight - zeros).to(x.dtype) * s.repeat_interleave(GROUP, 0)).t(), bias)


def awq_mask_first(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    masks = [(w & 15 << 4 * i) >> 4 * i for i in range(7)] + [(w >> 28) & 15]
    weight = torch.cat([mask.unsqueeze(-1) for mask in masks], -1)[..., ORDER].reshape(K, N)
    return x @ ((weight.to(x.dtype) - 8) * s.repeat_interleave(GROUP, 0))


def awq_divided(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    weight = torch.remainder(w[..., None] // 2 ** (4 * torch.arange(8)), 16).index_select(-1, torch.tensor(ORDER)).flatten(1)
    return x @ ((weight - 8).to(x.dtype) * s.repeat_interleave(GROUP, 0))


# -------------------------------------------------------------------- GPTQ


def gptq(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)[None]
    zeros = torch.bitwise_right_shift(z.unsqueeze(2).expand(-1, -1, 8), shifts.unsqueeze(0)).to(torch.int8)
    zeros = (torch.bitwise_and(zeros, 15) + 1).reshape(s.shape)
    weight = torch.bitwise_right_shift(w.unsqueeze(1).expand(-1, 8, -1), shifts.unsqueeze(-1)).to(torch.int8)
    weight = torch.bitwise_and(weight, 15).reshape(K, N)
    group = torch.arange(K) // GROUP
    return x @ (s[group] * (weight - zeros[group])) + bias


def gptq_signed(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    shifts = torch.arange(28, -1, -4, dtype=torch.int32)
    weight = ((w.unsqueeze(1) << shifts[:, None]) >> 28).view(G, GROUP, N)
    return x @ (weight.to(x.dtype) * s.unsqueeze(1)).view(K, N)


def gptq_of_rows(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    """compressed-tensors' pack-quantized: a loop over slices, [N, K / 8]."""
    packed = w.view(N, K // 8)
    weight = torch.stack([(packed >> 4 * i) & 15 for i in range(8)], dim=2).view(N, K) - 8
    return F.linear(x, (weight.view(N, G, GROUP).to(torch.int8).to(x.dtype) * s.view(N, G, 1)).flatten(1), bias)


def slice_by_slice(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    """compressed-tensors' unpack_from_int32."""
    packed = w.view(N, K // 8)
    weight = torch.zeros((N, K), dtype=torch.int32)
    for i in range(8):
        weight[:, i::8] = (packed >> 4 * i) & 15
    weight = (weight[:, :K] - 8).to(torch.int8)
    return F.linear(x, (weight.unflatten(-1, (G, GROUP)).to(x.dtype) * s.view(N, G, 1)).flatten(1), bias)


def place_by_place(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    weight = torch.empty((N, K // 8, 8), dtype=torch.int32)
    for i in range(8):
        weight[:, :, i] = (w.view(N, K // 8) >> 4 * i) & 15
    return F.linear(x, ((weight.view(N, G, GROUP) - 8).to(x.dtype) * s.view(N, G, 1)).view(N, K))


def by_computed_index(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    k = torch.arange(K)
    weight = (w[k // 8] >> ((k % 8) * 4)[:, None]) & 15
    return x @ ((weight - 8) * s[k // GROUP])


def in_a_batch(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    weight = ((w.unsqueeze(1) >> torch.arange(0, 32, 4)[:, None]) & 15).view(G, GROUP, N) - 8
    return torch.matmul(x, (weight * s[:, None]).view(1, K, N))


def bytes_of_words(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    packed = w.view(N, K // 8).view(torch.uint8)
    weight = torch.stack([packed & 15, packed >> 4], -1).view(N, G, GROUP).to(torch.int8) - 8
    return F.linear(x, (weight * s.view(N, G, 1)).view(N, K))


# -------------------------------------------------------------------- pairs


def low_first(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    weight = torch.stack([w & 15, w >> 4], dim=-1).view(N, G, GROUP)
    return F.linear(x, ((weight.to(x.dtype) - z[..., None]) * s[..., None]).view(N, K), bias)


def high_first(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    weight = torch.stack([(w & 0xF0) >> 4, w & 0x0F], dim=-1).reshape(N, K).to(torch.int8) - 8
    return F.linear(x, (weight.view(N, G, -1) * s.unsqueeze(-1)).view(N, K))


def signed_pairs(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    weight = torch.stack([w & 15, w >> 4], dim=-1).view(N, K).to(torch.int8)
    weight = torch.where(weight > 7, weight - 16, weight)
    return F.linear(x, (weight.view(N, G, -1).to(x.dtype) * s[..., None]).view(N, K), bias)


def halves(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    """HQQ: the first half of the outputs stands in the high nibbles."""
    packed = w.view(N // 2, K)
    weight = torch.cat([packed >> 4, packed & 15], dim=0).to(x.dtype).view(N, G, GROUP)
    return F.linear(x, ((weight - z[..., None]) * s[..., None]).view(N, K))


SPELLINGS = [
    (awq_by_index, columns, AWQ, False, 0),
    (awq_by_table, columns, AWQ, False, 0),
    (awq_in_a_loop, columns, AWQ, False, 0),
    (awq_mask_first, columns, AWQ, False, 8),
    (awq_divided, columns, AWQ, False, 8),
    (gptq, rows, STRAIGHT, True, 0),
    (gptq_signed, rows, STRAIGHT, True, 0),
    (gptq_of_rows, rows, STRAIGHT, True, 8),
    (slice_by_slice, rows, STRAIGHT, True, 8),
    (place_by_place, rows, STRAIGHT, True, 8),
    (by_computed_index, rows, STRAIGHT, True, 8),
    (in_a_batch, rows, STRAIGHT, True, 8),
    (bytes_of_words, rows, [0, 4], True, 8),
    (low_first, pairs, [0, 4], True, 0),
    (high_first, pairs, [4, 0], True, 8),
    (signed_pairs, pairs, [0, 4], True, 0),
    (halves, pairs, [4, 0], False, 0),
]


FP16, BF16 = (torch.float16, False), (torch.bfloat16, None)
EACH = [(*row, *FP16) for row in SPELLINGS[::2]] + [(*row, *BF16) for row in SPELLINGS[1::2]]


@pytest.mark.parametrize(
    ("layer", "operands", "shifts", "packs_inputs", "offset", "dtype", "dynamic"), EACH, ids=[f"{row[0].__name__}-{row[5]}" for row in EACH]
)
def test_spellings(
    layer: Layer,
    operands: Callable[..., tuple[Tensor, ...]],
    shifts: list[int],
    packs_inputs: bool,
    offset: int,
    dtype: torch.dtype,
    dynamic: bool | None,
) -> None:
    x, *others = operands(dtype)
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 1)
    report = fused_within_contract(layer, x, *others, dynamic=dynamic)
    [call] = calls_of(report)
    assert report.idioms["dequantize"] == 1
    form = call.kwargs
    assert (form["shifts"], form["packs_inputs"], form["offset"]) == (shifts, packs_inputs, offset)
    assert form["signed"] == (layer in (gptq_signed, signed_pairs))
    assert call.args[2].meta["val"].shape == (N, G)  # type: ignore[union-attr]


def test_scaled_after() -> None:
    def layer(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, unpacked(w.view(N, K // 8), STRAIGHT).to(x.dtype) - 8) * s[0] + bias

    [call] = calls_of(fused_within_contract(layer, *rows(torch.bfloat16)))
    assert call.args[2].meta["val"].shape == (N, 1)  # type: ignore[union-attr]
    assert not calls_of(fused(layer, *rows(torch.bfloat16), config=FusionConfig(rounding="exact"))[1])


# -------------------------------------------------------------------- look-alikes


def unpacked(packed: Tensor, shifts: list[int] = AWQ) -> Tensor:
    return ((packed.unsqueeze(-1) >> torch.tensor(shifts)) & 15).flatten(1)


def of_columns(weight: Tensor, x: Tensor, s: Tensor) -> Tensor:
    return x @ (weight.to(x.dtype) * s.repeat_interleave(GROUP, 0))


def shifted_by_three(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return of_columns(unpacked(w, [0, 3, 6, 9, 12, 15, 18, 21]), x, s)


def one_nibble_twice(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return of_columns(unpacked(w, [0, 4, 8, 12, 16, 20, 24, 24]), x, s)


def three_bits(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return of_columns(unpacked(w) & 7, x, s)


def no_mask(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return of_columns((w.unsqueeze(-1) >> torch.tensor(STRAIGHT)).flatten(1) % 251, x, s)


def squared(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return of_columns(unpacked(w) * unpacked(w), x, s)


def tiled_scales(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return x @ (unpacked(w).to(x.dtype) * s.repeat(GROUP, 1))


def scale_of_each_weight(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return x @ (unpacked(w).to(x.dtype) * s.repeat_interleave(GROUP, 0).cumsum(0))


def scales_by_an_unknown_index(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return x @ (unpacked(w).to(x.dtype) * s[(w[:, 0] % G).long()])


def order_across_words(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return of_columns(unpacked(w)[:, torch.tensor([*range(4, N), *range(4)])], x, s)


def filled_but_for_one(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    weight = torch.zeros((K, N), dtype=torch.int32)
    for i in range(7):
        weight[:, i::8] = (w >> 4 * i) & 15
    return of_columns(weight, x, s)


def differences_that_wrap(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return of_columns(unpacked(w).to(torch.uint8) - unpacked(z).to(torch.uint8).repeat_interleave(GROUP, 0), x, s)


LOOK_ALIKES = [
    shifted_by_three,
    one_nibble_twice,
    three_bits,
    no_mask,
    squared,
    tiled_scales,
    scale_of_each_weight,
    scales_by_an_unknown_index,
    order_across_words,
    filled_but_for_one,
    differences_that_wrap,
]


def test_misses_are_reported_with_a_reason() -> None:
    [site] = [site for site in fused_within_contract(tiled_scales, *columns(torch.bfloat16)).missed if site.rule == "int4_linear"]
    assert site.idiom == "dequantize"
    assert "scales and zero points do not go by groups" in (site.reason or "")


@pytest.mark.parametrize("look_alike", LOOK_ALIKES)
def test_look_alikes(look_alike: Layer) -> None:
    report = fused_within_contract(look_alike, *columns(torch.bfloat16), config=FusionConfig(disable=("dequantize",)))
    assert not calls_of(report)


def test_zeros_in_another_order_are_taken_in_that_order() -> None:
    def layer(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bias: Tensor) -> Tensor:
        return of_columns(unpacked(w) - unpacked(z, STRAIGHT).repeat_interleave(GROUP, 0), x, s)

    inputs = columns(torch.float16)
    result, report = fused(layer, *inputs)
    assert calls_of(report)
    assert torch.equal(result, layer(*inputs))


def test_exact_rounding_takes_whole_zero_points_alone() -> None:
    config = FusionConfig(rounding="exact")
    inputs = columns(torch.float16)
    result, report = fused(awq_by_index, *inputs, config=config)  # the bias is added to what the product was rounded to
    assert calls_of(report)
    assert torch.equal(result, awq_by_index(*inputs))
    assert not calls_of(fused(low_first, *pairs(torch.float16), config=config)[1])


# -------------------------------------------------------------------- models


class Quantised(nn.Module):
    """A linear with AWQ's buffers."""

    def __init__(self) -> None:
        super().__init__()
        _, weight, zeros, scale, bias = columns(torch.float16)
        for name, buffer in {"qweight": weight, "qzeros": zeros, "scales": scale, "bias": bias}.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return awq_by_table(x, self.qweight, self.qzeros, self.scales, self.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("load", ["copy", "load_state_dict", "rebind"])
def test_new_weights_are_used(load: str) -> None:
    torch.compiler.reset()
    model, other = Quantised(), Quantised()
    compiled = torch.compile(model, backend="npu_fusion", fullgraph=True)
    x = columns(torch.float16)[0]
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        if load == "copy":
            model.qweight.data.copy_(other.qweight)  # type: ignore[union-attr]
        elif load == "rebind":
            model.qzeros = other.qzeros
        else:
            model.load_state_dict(other.state_dict())
        assert torch.equal(compiled(x), model(x))
