"""Rules of patterns/rope.py: every spelling of a rotation, layouts of tokens and tables, q and k together, rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion import FusionConfig
from tests.parameters import dtypes_and_shapes
from tests.patterns.rope_checks import BATCH, DIM, HEADS, KV_HEADS, SEQ, Rotate, arguments, both, inputs, llama, rotate_half, static_last
from tests.patterns.support import fused, fused_within_contract

# -------------------------------------------------------------------- spellings


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def llama_reordered(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return sin * torch.cat((x2.neg(), x1), -1) + cos * x


def table_of_twice_the_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = DIM // 2
    cos, sin = torch.cat((cos[..., :half], cos[..., :half]), -1), torch.cat((sin[..., :half], sin[..., :half]), -1)
    return llama(x, cos, sin)


def olmo(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama(x, cos.float(), sin.float()).to(x.dtype)


def upcast(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype)


def ernie(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (table[..., : DIM // 2].repeat_interleave(2, dim=-1) for table in (cos, sin))
    return (x.float() * cos + rotate_pairs(x).float() * sin).to(x.dtype)


def cohere(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return (wide * cos + rotate_pairs(wide) * sin).to(x.dtype)


def roformer(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.stack([table[..., :8], table[..., :8]], dim=-1).reshape_as(table) for table in (cos, sin))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape_as(x) * sin


def pairwise_unbind(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-x2, x1), -1).flatten(-2) * sin


def halves_unbind(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.unflatten(-1, (2, -1)).unbind(-2)
    return x * cos + torch.cat((-x2, x1), -1) * sin


def gpt_oss(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def halves_of_full_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), (cos1, cos2), (sin1, sin2) = (tensor.chunk(2, dim=-1) for tensor in (x, cos, sin))
    return torch.cat((x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2), dim=-1)


def gpt_fast(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    table = torch.stack((cos[..., :8], sin[..., :8]), -1)
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1], pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1])
    return torch.stack(turned, -1).flatten(3).type_as(x)


def deepseek(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def deepseek_remote_code(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x.view(*x.shape[:-1], x.shape[-1] // 2, 2).transpose(-1, -2).reshape(x.shape)
    return llama(x, cos, sin)


def deinterleaved_by_cat(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama(torch.cat((x[..., 0::2], x[..., 1::2]), -1), cos, sin)


def nanochat(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((x2, -x1), dim=-1) * sin


def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos - rotate_half(x) * sin


def backwards_by_sin(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_pairs(x) * -sin


def backwards_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x1 * -sin + x2 * cos), dim=-1)


def complex_product(x: Tensor, cos: Tensor, sin: Tensor, conjugate: bool = False) -> Tensor:
    table = torch.complex(cos[..., : DIM // 2].float(), sin[..., : DIM // 2].float())
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * (table.conj() if conjugate else table)).flatten(3).type_as(x)


def complex_conjugate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return complex_product(x, cos, sin, conjugate=True)


def partial(rotate: Rotate) -> Rotate:
    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = DIM // 2
        return torch.cat((rotate(x[..., :width], cos[..., :width], sin[..., :width]), x[..., width:]), -1)

    rotated.__name__ = f"partial_{rotate.__name__}"
    return rotated


def partial_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, rest = x.split((12, 4), -1)
    return torch.cat((llama(rotated, cos[..., :12], sin[..., :12]), rest), -1)


def partial_gpt_oss(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The parts of the rotation and the rest in one cat."""
    cos, sin = cos[..., :4], sin[..., :4]
    x1, x2, rest = x[..., :4], x[..., 4:8], x[..., 8:]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1)


def partial_in_fp32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return torch.cat((llama(wide[..., :8], cos[..., :8].float(), sin[..., :8].float()), wide[..., 8:]), -1).to(x.dtype)


def rotated_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """DeepSeek-V4: what passes through stands first, so only the slice is rotated."""
    return torch.cat((x[..., :8], llama(x[..., 8:], cos[..., :8], sin[..., :8])), -1)


SPELLINGS: list[tuple[Rotate, dict[str, Any]]] = [
    (llama, {"layout": "half"}),
    (llama_reordered, {"layout": "half"}),
    (table_of_twice_the_half, {"layout": "half"}),
    (olmo, {"layout": "half"}),
    (upcast, {"layout": "half"}),
    (halves_unbind, {"layout": "half"}),
    (gpt_oss, {"layout": "half"}),
    (halves_of_full_tables, {"layout": "half"}),
    (ernie, {"layout": "interleaved"}),
    (cohere, {"layout": "interleaved"}),
    (roformer, {"layout": "interleaved"}),
    (pairwise_unbind, {"layout": "interleaved"}),
    (gpt_fast, {"layout": "interleaved"}),
    (complex_product, {"layout": "interleaved"}),
    (complex_conjugate, {"layout": "interleaved", "sign": -1}),
    (deepseek, {"layout": "mla"}),
    (deepseek_remote_code, {"layout": "mla"}),
    (deinterleaved_by_cat, {"layout": "mla"}),
    (nanochat, {"layout": "half", "sign": -1}),
    (backwards, {"layout": "half", "sign": -1}),
    (backwards_by_sin, {"layout": "interleaved", "sign": -1}),
    (backwards_pairs, {"layout": "half", "sign": -1}),
    (partial(llama), {"layout": "half", "rotary_dim": 8}),
    (partial(cohere), {"layout": "interleaved", "rotary_dim": 8}),
    (partial_split, {"layout": "half", "rotary_dim": 12}),
    (partial_gpt_oss, {"layout": "half", "rotary_dim": 8}),
    (partial_in_fp32, {"layout": "half", "rotary_dim": 8}),
    (rotated_last, {"layout": "half"}),
]


@dtypes_and_shapes([torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rotate", "expected"), SPELLINGS, ids=lambda item: getattr(item, "__name__", ""))
def test_spelling(rotate: Rotate, expected: dict[str, Any], dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(both(rotate), *inputs(dtype), dynamic=dynamic)
    assert report.idioms["rope"] == 2
    assert not report.missed
    assert report.ops == {"rotary": 1}
    assert arguments(report).items() >= {"rotary_dim": -1, "sign": 1, "out_dtype": dtype, **expected}.items()


@pytest.mark.parametrize("rotate", [llama, gpt_oss, complex_product], ids=lambda rotate: rotate.__name__)
def test_half_precision(rotate: Rotate) -> None:
    report = fused_within_contract(both(rotate), *inputs(torch.float16))
    assert report.idioms["rope"] == 2


def test_wide_result_stays_wide() -> None:
    report = fused_within_contract(both(llama), *inputs(torch.bfloat16, table_dtype=torch.float32))
    assert arguments(report)["out_dtype"] is torch.float32


def test_float64() -> None:
    report = fused_within_contract(both(llama), *inputs(torch.float64))
    assert report.idioms["rope"] == 2


def test_float64_products_of_narrower_tensors_stay_float64() -> None:
    """The fused op computes in the widest of its inputs: the casts before it must not go."""

    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return llama(x.double(), cos.double(), sin.double())

    x, _, cos, sin = inputs()
    outputs, report = fused(fn, x, cos, sin)
    assert report.idioms["rope"] == 1
    assert torch.allclose(outputs, fn(x, cos, sin), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rotate", "width"),
    [(ernie, 8), (roformer, 8), (table_of_twice_the_half, 8), (gpt_oss, 8), (complex_product, 8), (cohere, 16), (llama, 16)],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_tables_that_repeat_their_entries_are_read_once(rotate: Rotate, width: int) -> None:
    report = fused_within_contract(both(rotate), *inputs())
    call = next(node for node in report.graph("fused").graph.nodes if "rotary" in str(node.target))
    assert [table.meta["val"].shape[-1] for table in call.args[1:3]] == [width, width]


# -------------------------------------------------------------------- layouts of tokens, tables


def test_tokens_before_heads() -> None:
    """[B, S, N, D], with the view of the projection that leaves no other reshape between."""

    def fn(hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.view(BATCH, SEQ, HEADS, DIM)
        return complex_product(x, cos, sin), llama(x, cos, sin)

    report = fused_within_contract(
        fn, torch.randn(BATCH, SEQ, HEADS * DIM), torch.randn(BATCH, SEQ, 1, DIM), torch.randn(BATCH, SEQ, 1, DIM)
    )
    assert report.idioms["rope"] == 2
    assert report.ops["rotary"] == 2


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_tokens_flattened(dynamic: bool) -> None:
    """[T, N, D] with a table gathered by position."""

    def fn(q: Tensor, k: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        cos, sin = table[positions].chunk(2, dim=-1)
        return tuple(gpt_oss(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k))

    q, k, table = static_last(torch.randn(7, HEADS, DIM)), static_last(torch.randn(7, KV_HEADS, DIM)), static_last(torch.randn(32, DIM))
    report = fused_within_contract(fn, q, k, table, torch.randint(0, 32, (7,)), dynamic=dynamic)
    assert report.idioms["rope"] == 2
    assert report.ops["rotary"] == 1


@pytest.mark.parametrize("seq", [1, 6], ids=["decode", "prefill"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_tables_from_frequencies(dynamic: bool, seq: int) -> None:
    """The tables of transformers, scaled by attention_scaling, with the heads moved first."""

    class Attention(torch.nn.Module):
        inv_freq: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", 1.0 / 10000.0 ** (torch.arange(0, DIM, 2) / DIM))
            self.attention_scaling = 1.25

        def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            angles = (self.inv_freq[None, :, None] @ positions[:, None, :].to(q.dtype)).transpose(1, 2)
            angles = torch.cat((angles, angles), -1)
            cos, sin = ((table * self.attention_scaling).to(q.dtype).unsqueeze(1) for table in (angles.cos(), angles.sin()))
            return tuple(llama(x.view(*x.shape[:-1], -1, DIM).transpose(1, 2), cos, sin) for x in (q, k))

    q, k = static_last(torch.randn(BATCH, seq, HEADS * DIM)), static_last(torch.randn(BATCH, seq, KV_HEADS * DIM))
    report = fused_within_contract(Attention(), q, k, torch.arange(seq).expand(BATCH, seq), dynamic=dynamic)
    assert report.idioms["rope"] == 2
    assert report.ops["rotary"] == 1
    assert not report.missed


def test_slice_of_an_input_with_an_offset() -> None:
    """MLA: the rotated channels stand behind others in the projection."""

    def fn(q: Tensor, compressed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return deepseek(q[..., 8:24], cos, sin), deepseek(compressed[..., 5:].unsqueeze(1), cos, sin)

    q, compressed = torch.randn(BATCH, HEADS, SEQ, 24), torch.randn(BATCH, SEQ, 5 + DIM)
    report = fused_within_contract(fn, q, compressed, *inputs()[2:])
    assert report.idioms["rope"] == 2
    assert report.ops["rotary"] == 1
    assert arguments(report)["layout"] == "mla"


def test_input_rounded_before_the_rotation() -> None:
    """A cast that narrows x belongs to x, and must not be skipped."""

    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return llama((x * 3.0).to(torch.bfloat16), cos.bfloat16(), sin.bfloat16())

    q, _, cos, sin = inputs(torch.float32)
    report = fused_within_contract(fn, q, cos, sin)
    assert report.idioms["rope"] == 1
    x = next(node for node in report.graph("fused").graph.nodes if "rotary" in str(node.target)).args[0][0]
    assert x.meta["val"].dtype is torch.bfloat16


# -------------------------------------------------------------------- q and k together


def test_other_users_of_the_parts_keep_them() -> None:
    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        turned = rotate_half(q)
        return q * cos + turned * sin, llama(k, cos, sin), turned

    report = fused_within_contract(fn, *inputs())
    assert report.idioms["rope"] == 2
    assert report.ops == {"rotary": 1}


def test_tensors_with_different_tables_stay_apart() -> None:
    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return llama(q, cos, sin), llama(k, cos * 2, sin)

    report = fused_within_contract(fn, *inputs())
    assert report.idioms["rope"] == 2
    assert report.ops == {"rotary": 2}


def test_tensors_that_turn_differently_stay_apart() -> None:
    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return llama(q, cos, sin), nanochat(k, cos, sin)

    report = fused_within_contract(fn, *inputs())
    assert report.idioms["rope"] == 2
    assert report.ops == {"rotary": 2}


def test_a_rotation_of_a_rotation_stays_apart() -> None:
    report = fused_within_contract(lambda q, k, cos, sin: llama(llama(q, cos, sin), cos, sin), *inputs())
    assert report.idioms["rope"] == 2
    assert report.ops == {"rotary": 2}


# -------------------------------------------------------------------- rounding

EXACT = FusionConfig(rounding="exact")


@pytest.mark.parametrize(
    ("rotate", "dtype", "count"),
    [
        (llama, torch.float32, 2),
        (llama, torch.bfloat16, 0),
        (upcast, torch.bfloat16, 2),
        (cohere, torch.bfloat16, 2),
        (gpt_oss, torch.bfloat16, 0),
    ],
    ids=lambda item: getattr(item, "__name__", str(item)),
)
def test_exact_rounding(rotate: Rotate, dtype: torch.dtype, count: int) -> None:
    """The fused op rounds once: where the model rounds every product, `exact` leaves it alone; else the results are the same bits."""
    args = inputs(dtype)
    outputs, report = fused(both(rotate), *args, config=EXACT)
    assert report.idioms["rope"] == count
    assert all(torch.equal(a, b) for a, b in zip(outputs, both(rotate)(*args), strict=True))
    assert len(report.missed) == 2 - count
    assert all("rounding='exact'" in (site.reason or "") for site in report.missed)


def test_exact_rounding_of_leading_channels() -> None:
    """What passes through is not rounded at all."""

    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat((upcast(x[..., :8], cos[..., :8], sin[..., :8]), x[..., 8:]), -1)

    args = inputs(torch.bfloat16)[1:]
    outputs, report = fused(fn, *args, config=EXACT)
    assert report.idioms["rope"] == 1
    assert arguments(report)["rotary_dim"] == 8
    assert torch.equal(outputs, fn(*args))
