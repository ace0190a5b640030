"""The attention rules: every spelling that models use is found, what only looks like one is not, and the numbers are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_fusion import FusionConfig
from tests.parameters import dtypes_and_shapes
from tests.patterns.attention_checks import (
    BATCH,
    DTYPES,
    HEADS,
    KV_HEADS,
    SCALE,
    SIZE,
    TOKENS,
    after,
    assert_fused,
    assert_missed,
    calls_of,
    causal,
    heads,
    kv_heads_of,
    lowest,
    repeat_kv,
)
from tests.patterns.support import fused, fused_within_contract

EXACT = FusionConfig(rounding="exact")


# -------------------------------------------------------------------- eager spellings, causal


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q @ repeat_kv(k).mT) / math.sqrt(SIZE)
    w = w.masked_fill(~causal(q, k), -math.inf)
    return w.softmax(-1) @ repeat_kv(v)


def before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q * SCALE) @ repeat_kv(k).transpose(-1, -2)
    return torch.where(causal(q, k), w, lowest(q)).softmax(-1) @ repeat_kv(v)


def on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = math.sqrt(SCALE)
    w = (q * root) @ (repeat_kv(k) * root).transpose(-1, -2)
    return (w + torch.full((q.shape[2], k.shape[2]), -math.inf).triu(1 + k.shape[2] - q.shape[2])).softmax(-1).to(q.dtype) @ repeat_kv(v)


def in_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n, s, d = q.shape
    t = k.shape[2]
    mask = torch.where(causal(q, k), torch.zeros((), dtype=q.dtype), lowest(q)).expand(b * n, s, t)
    w = torch.baddbmm(mask, q.reshape(b * n, s, d), repeat_kv(k).reshape(b * n, t, d).transpose(1, 2), beta=1.0, alpha=SCALE)
    return torch.bmm(w.softmax(-1), repeat_kv(v).reshape(b * n, t, -1)).view(b, n, s, -1)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batches and heads in one dimension; the mask is added apart (OPT)."""
    b, n, s, d = q.shape
    t = k.shape[2]
    w = torch.bmm((q * SCALE).reshape(b * n, s, d), repeat_kv(k).reshape(b * n, t, d).transpose(1, 2))
    w = w.view(b, n, s, t) + torch.where(causal(q, k), torch.zeros((), dtype=q.dtype), lowest(q))
    w = w.view(b * n, s, t).softmax(-1)
    return torch.bmm(w, repeat_kv(v).reshape(b * n, t, -1)).view(b, n, s, -1).transpose(1, 2).reshape(b, s, -1)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens before heads, as einsum has it in many models."""
    q, k, v = q.transpose(1, 2), repeat_kv(k).transpose(1, 2), repeat_kv(v).transpose(1, 2)
    w = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    w = w.masked_fill(~causal(q.transpose(1, 2), k.transpose(1, 2)), lowest(q))
    return torch.einsum("bhqk,bkhd->bqhd", w.softmax(-1), v)


def float_logits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries and keys in fp32 (GPT-J)."""
    w = torch.matmul(q.float(), repeat_kv(k).float().transpose(-1, -2))
    w = torch.where(causal(q, k), w, torch.tensor(torch.finfo(torch.float32).min)) * SCALE
    return w.softmax(-1).to(v.dtype) @ repeat_kv(v)


def written_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.where(causal(q, k), (q @ repeat_kv(k).mT) * SCALE, -math.inf)
    e = torch.exp(w - w.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ repeat_kv(v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The groups in a dimension of their own, keys broadcast."""
    b, n, s, d = q.shape
    w = q.view(b, KV_HEADS, n // KV_HEADS, s, d) @ k[:, :, None].transpose(-1, -2) * SCALE
    w = w.masked_fill(~causal(q, k), -math.inf)
    return (w.softmax(-1) @ v[:, :, None]).reshape(b, n, s, -1)


SPELLINGS = [after, divided, before, on_both, in_baddbmm, folded, einsum, written_softmax, grouped]


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: Callable[..., Tensor], dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(spelling, *heads(dtype), dynamic=dynamic)
    (call,) = assert_fused(report, **({} if dynamic else {"scale": SCALE, "is_causal": True, "mask": None}))
    assert kv_heads_of(call) == [KV_HEADS] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_in_fp32(dtype: torch.dtype) -> None:
    (call,) = assert_fused(fused_within_contract(float_logits, *heads(dtype)), is_causal=True)
    assert call.args[0].meta["val"].dtype == dtype  # the fused op upcasts by itself


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spelling", [after, before, folded])
def test_the_last_query_needs_no_mask(spelling: Callable[..., Tensor], dtype: torch.dtype) -> None:
    report = fused_within_contract(spelling, *heads(dtype, tokens=1, kv=9))
    assert_fused(report, scale=SCALE, mask=None, is_causal=None)


def test_queries_at_the_end_of_the_keys() -> None:
    assert_fused(fused_within_contract(after, *heads(torch.float32, tokens=3, kv=9)), is_causal=True, causal_offset=6)


def test_values_of_another_size() -> None:
    assert_fused(fused_within_contract(after, *heads(torch.bfloat16, size=5)), is_causal=True)


class Scaled(nn.Module):
    """The scale as a module has it: with dynamic=True, Dynamo makes an input of the float."""

    def __init__(self, softcap: float | None = None) -> None:
        super().__init__()
        self.scale = 0.25
        self.softcap = softcap

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ repeat_kv(k).mT * self.scale
        if self.softcap is not None:
            w = torch.tanh(w / self.softcap) * self.softcap
        return w.softmax(-1) @ repeat_kv(v)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_numbers_of_a_module(softcap: float | None, dynamic: bool) -> None:
    report = fused_within_contract(Scaled(softcap), *heads(torch.float32), dynamic=dynamic)
    assert_fused(report, **({} if dynamic else {"scale": 0.25, "softcap": softcap}))


# -------------------------------------------------------------------- softcap and sinks


@dtypes_and_shapes(DTYPES)
def test_softcap(dtype: torch.dtype, dynamic: bool) -> None:
    def gemma2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = torch.tanh(q @ repeat_kv(k).mT * SCALE / 2.0) * 2.0
        w = w + torch.where(causal(q, k), torch.zeros((), dtype=q.dtype), lowest(q))
        return w.softmax(-1, dtype=torch.float32).to(q.dtype) @ repeat_kv(v)

    assert_fused(fused_within_contract(gemma2, *heads(dtype), dynamic=dynamic), softcap=2.0, **({} if dynamic else {"scale": SCALE}))


def test_softcap_with_two_different_numbers() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.tanh(q @ repeat_kv(k).mT / 4.0) * 2.0).softmax(-1) @ repeat_kv(v)

    assert_fused(fused_within_contract(fn, *heads(torch.float32)), softcap=2.0, scale=0.5)


def gpt_oss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    w = q @ repeat_kv(k).mT * SCALE + torch.where(causal(q, k), torch.zeros((), dtype=q.dtype), lowest(q))
    combined = torch.cat((w, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)), dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1] @ repeat_kv(v)


@dtypes_and_shapes(DTYPES)
def test_sinks(dtype: torch.dtype, dynamic: bool) -> None:
    (call,) = assert_fused(fused_within_contract(gpt_oss, *heads(dtype), torch.randn(HEADS).to(dtype), dynamic=dynamic))
    assert call.kwargs["sinks"].meta["val"].shape == (HEADS,)


def test_a_sink_for_every_query_is_none_of_ours() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return torch.cat((q @ repeat_kv(k).mT, sinks), dim=-1).softmax(-1)[..., :-1] @ repeat_kv(v)

    assert_missed(fused_within_contract(fn, *heads(torch.float32), torch.randn(BATCH, HEADS, TOKENS, 1)), "not one number a head")


# -------------------------------------------------------------------- scaled_dot_product_attention


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "scale": 0.3}],
    ids=["plain", "causal", "scale", "causal, scale"],
)
def test_sdpa(arguments: dict[str, Any], dtype: torch.dtype, dynamic: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **arguments)

    report = fused_within_contract(fn, *heads(dtype), dynamic=dynamic)
    assert_fused(report, **({} if dynamic else {"scale": arguments.get("scale", SCALE)}), is_causal=arguments.get("is_causal"), mask=None)


@pytest.mark.parametrize("fill", [None, -math.inf, -1.5])
def test_sdpa_masks(fill: float | None) -> None:
    visible = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    mask = visible if fill is None else torch.where(visible, 0.0, fill)
    report = fused_within_contract(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True), *heads(torch.float32), mask
    )
    (call,) = assert_fused(report)
    assert call.kwargs["mask"].meta["val"].dtype == mask.dtype


def test_sdpa_recovers_structure() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal(q, k)[None, None].expand(q.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask)

    (call,) = assert_fused(fused_within_contract(fn, *heads(torch.bfloat16)), is_causal=True, mask=None)
    assert kv_heads_of(call) == [KV_HEADS] * 2


def test_sdpa_is_causal_from_the_top_left() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    assert_fused(fused_within_contract(fn, *heads(torch.float32, kv=11)), is_causal=True, causal_offset=None)


def test_multi_head_latent_attention() -> None:
    """Keys assembled of a part for each head and one for all; values of another size: the assembly is never made (test_mla.py)."""

    def fn(q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor) -> Tensor:
        k = torch.cat((k_nope, k_rope.expand(-1, HEADS, -1, -1)), dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = heads(torch.bfloat16, kv_heads=HEADS, size=5)
    report = fused_within_contract(fn, q, k[..., :5].contiguous(), k[:, :1, :, 5:].contiguous(), v)
    assert (report.idioms["attention"], report.ops["mla_attention"]) == (1, 1)
    assert not report.missed


# -------------------------------------------------------------------- what must not fuse, or only with care


def test_softmax_over_the_queries() -> None:
    report = fused_within_contract(lambda q, k, v: (q @ repeat_kv(k).mT).softmax(-2) @ repeat_kv(v), *heads(torch.float32))
    assert not calls_of(report)
    assert not [site for site in report.missed if site.idiom == "attention"]


def test_probabilities_that_are_returned() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        w = (q @ repeat_kv(k).mT * SCALE).softmax(-1)
        return w @ repeat_kv(v), w

    assert_missed(fused_within_contract(fn, *heads(torch.float32)), "used elsewhere")


def test_probabilities_that_are_changed() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return ((q @ repeat_kv(k).mT * SCALE).softmax(-1) * weight) @ repeat_kv(v)

    assert not calls_of(fused_within_contract(fn, *heads(torch.float32), torch.rand(TOKENS)))


def test_two_products_with_the_same_probabilities() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        w = (q @ repeat_kv(k).mT * SCALE).softmax(-1)
        return w @ repeat_kv(v), w @ repeat_kv(u)

    q, k, v = heads(torch.float32)
    assert_fused(fused_within_contract(fn, q, k, v, torch.randn_like(v)), count=2)


def test_dropout_that_is_on() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ repeat_kv(k).mT).softmax(-1), 0.5, training=True) @ repeat_kv(v)

    _, report = fused(fn, *heads(torch.float32))
    assert not calls_of(report)
    _, report = fused(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True), *heads(torch.float32))
    assert not calls_of(report)


@pytest.mark.parametrize("shape", [(), (HEADS, 1, 1), (TOKENS, 1)])
def test_a_learned_scale_goes_to_the_query(shape: tuple[int, ...]) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        return (q @ repeat_kv(k).mT * temperature).softmax(-1) @ repeat_kv(v)

    assert_fused(fused_within_contract(fn, *heads(torch.float32), torch.rand(shape) + 0.5))


def test_a_scale_for_every_key_is_none() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return (q @ repeat_kv(k).mT * weight).softmax(-1) @ repeat_kv(v)

    assert_missed(fused_within_contract(fn, *heads(torch.float32), torch.rand(TOKENS)), "differs from key to key")


def test_scale_before_and_after() -> None:
    report = fused_within_contract(lambda q, k, v: ((q * 0.5) @ repeat_kv(k).mT * 0.25).softmax(-1) @ repeat_kv(v), *heads(torch.float32))
    assert_fused(report, scale=0.125)


def test_a_negative_scale_after_the_mask() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ((q @ repeat_kv(k).mT + bias) * -0.5).softmax(-1) @ repeat_kv(v)

    assert not calls_of(fused_within_contract(fn, *heads(torch.float32), torch.randn(TOKENS, TOKENS)))


def test_exact_rounding() -> None:
    assert_missed(fused_within_contract(after, *heads(torch.bfloat16), config=EXACT), "rounding='exact'")
    assert_fused(fused_within_contract(after, *heads(torch.float32), config=EXACT))
    sdpa = fused_within_contract(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *heads(torch.bfloat16), config=EXACT
    )
    assert_fused(sdpa)


def test_two_sizes_in_one_process() -> None:
    for scale in (0.1, 0.7):
        report = fused_within_contract(lambda q, k, v, s=scale: (q @ repeat_kv(k).mT * s).softmax(-1) @ repeat_kv(v), *heads(torch.float32))
        assert_fused(report, scale=scale)
