"""Latent attention: naive assembly of keys in its spellings, the absorbed form, and look-alikes that stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from npu_fusion import FusionReport
from tests.patterns.support import fused_within_contract

BATCH, HEADS, TOKENS, KEYS, NOPE, ROPE, VALUE, LATENT = 2, 4, 5, 7, 16, 8, 12, 16
SCALE = (NOPE + ROPE) ** -0.5
Assembly = Callable[[Tensor, Tensor], Tensor]


def calls_of(report: FusionReport, op: str = "mla_attention") -> list[Node]:
    return [node for node in report.graph("fused").graph.nodes if str(node.target) == f"npu_fusion.{op}.default"]


def operands(dtype: torch.dtype, heads: int = HEADS, tokens: int = TOKENS) -> tuple[Tensor, ...]:
    """q_nope, q_rope, k_nope [B, N, S, D], k_rope [B, 1, S, D], value."""
    sizes = (heads, NOPE), (heads, ROPE), (heads, NOPE), (1, ROPE), (heads, VALUE)
    return tuple(torch.randn(BATCH, n, tokens, size).to(dtype) for n, size in sizes)


# -------------------------------------------------------------------- naive


def joined(nope: Tensor, rope: Tensor) -> Tensor:
    return torch.cat((nope, rope.expand(*nope.shape[:-1], -1)), dim=-1)


def rope_first(nope: Tensor, rope: Tensor) -> Tensor:
    return torch.cat((rope.expand(*nope.shape[:-1], -1), nope), dim=-1)


def repeated(nope: Tensor, rope: Tensor) -> Tensor:
    return torch.cat((nope, rope.repeat_interleave(nope.shape[1] // rope.shape[1], dim=1)), dim=-1)


def assigned(nope: Tensor, rope: Tensor) -> Tensor:
    whole = nope.new_empty((*nope.shape[:-1], NOPE + ROPE))
    whole[..., :NOPE] = nope
    whole[..., NOPE:] = rope
    return whole


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    scores = (query @ key.mT * SCALE).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


@pytest.mark.parametrize("assemble", [joined, rope_first, repeated, assigned])
@pytest.mark.parametrize(
    ("attend", "dtype", "dynamic"), [(sdpa, torch.bfloat16, False), (eager, torch.float32, True)], ids=["sdpa-bf16", "eager-fp32-dynamic"]
)
def test_naive_keys_are_not_assembled(assemble: Assembly, attend: Callable[..., Tensor], dtype: torch.dtype, dynamic: bool) -> None:
    def fn(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> Tensor:
        return attend(assemble(q_nope, q_rope), assemble(k_nope, k_rope), value)

    report = fused_within_contract(fn, *operands(dtype), dynamic=dynamic)
    [call] = calls_of(report)
    assert report.idioms["attention"] == 1
    assert call.kwargs["is_causal"]
    assert [arg.meta["val"].shape[1] for arg in call.args] == [HEADS, HEADS, HEADS, 1, HEADS]  # type: ignore[union-attr]
    assert not [node for node in report.graph("fused").graph.nodes if "cat" in node.name]


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_of_the_heads(shards: int) -> None:
    """A shard with several heads has separate parts; one with a single head has nothing that is shared."""

    def fn(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> Tensor:
        return sdpa(joined(q_nope, q_rope), joined(k_nope, k_rope), value)

    report = fused_within_contract(fn, *operands(torch.bfloat16, heads=HEADS // shards))
    assert len(calls_of(report)) == (shards < HEADS)
    assert report.idioms["attention"] == 1


def test_queries_that_nothing_rotated_are_cut_where_the_keys_are() -> None:
    """Latent attention without positions, as in Kimi Linear: the queries come in one piece."""

    def fn(query: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> Tensor:
        return sdpa(query, assigned(k_nope, k_rope), value)

    q_nope, q_rope, *keys = operands(torch.bfloat16)
    report = fused_within_contract(fn, torch.cat((q_nope, q_rope), -1), *keys)
    [call] = calls_of(report)
    assert [arg.meta["val"].shape[-1] for arg in call.args[:4]] == [NOPE, ROPE, NOPE, ROPE]  # type: ignore[union-attr]


def partial_rotary(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> Tensor:
    return sdpa(torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, q_rope), -1), value)


def all_shared(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> Tensor:
    return sdpa(torch.cat((q_nope, q_rope), -1), joined(k_nope[:, :1], k_rope).expand(-1, HEADS, -1, -1), value)


def cut_elsewhere(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> Tensor:
    return sdpa(torch.cat((q_rope, q_nope), -1), joined(k_nope, k_rope), value)


def two_heads_tiled(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> Tensor:
    return sdpa(joined(q_nope, q_rope), torch.cat((k_nope, q_rope[:, :2].repeat(1, 2, 1, 1)), -1), value)


def half_assigned(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> Tensor:
    key = k_nope.new_zeros((*k_nope.shape[:-1], NOPE + ROPE))
    key[..., :NOPE] = k_nope
    key[..., NOPE + 2 :] = k_rope[..., 2:]
    return sdpa(joined(q_nope, q_rope), key, value)


@pytest.mark.parametrize("look_alike", [partial_rotary, all_shared, cut_elsewhere, two_heads_tiled, half_assigned])
def test_look_alikes_stay_attention(look_alike: Callable[..., Tensor]) -> None:
    report = fused_within_contract(look_alike, *operands(torch.bfloat16))
    assert not calls_of(report)
    assert report.idioms["attention"] == 1


# -------------------------------------------------------------------- absorbed


def with_einsum(q_nope: Tensor, q_pe: Tensor, kv: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
    """DeepSeek-V3's inference/model.py."""
    scores = (torch.einsum("bshc,btc->bsht", q_nope, kv[:, :KEYS]) + torch.einsum("bshr,btr->bsht", q_pe, pe[:, :KEYS])) * SCALE
    if mask is not None:
        scores += mask.unsqueeze(1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(q_nope)
    return torch.einsum("bsht,btc->bshc", weights, kv[:, :KEYS])


def with_matmul(q_nope: Tensor, q_pe: Tensor, kv: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
    """The heads first, the latent repeated by broadcasting."""
    latent, rope = kv[:, None, :KEYS], pe[:, None, :KEYS]
    scores = (q_nope.transpose(1, 2) @ latent.mT + q_pe.transpose(1, 2) @ rope.mT) * SCALE
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1, dtype=torch.float32).to(kv.dtype) @ latent).transpose(1, 2)


def latents(dtype: torch.dtype, tokens: int, heads: int = HEADS) -> tuple[Tensor, ...]:
    """q_nope, q_pe [B, S, N, C], and caches [B, T, C] that are longer than the keys in use."""
    sizes = (tokens, heads, LATENT), (tokens, heads, ROPE), (KEYS + 2, LATENT), (KEYS + 2, ROPE)
    return tuple(torch.randn(BATCH, *size).to(dtype) for size in sizes)


def causal(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.full((tokens, KEYS), -torch.inf, dtype=dtype).triu(KEYS - tokens + 1)


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, False), (torch.bfloat16, True)], ids=["fp32", "bf16-masked"])
@pytest.mark.parametrize(("fn", "tokens"), [(with_einsum, 1), (with_matmul, 1), (with_matmul, 3)], ids=["einsum", "matmul", "prefill"])
def test_absorbed_attention(fn: Callable[..., Tensor], tokens: int, masked: bool, dtype: torch.dtype) -> None:
    inputs = latents(dtype, tokens)
    report = fused_within_contract(fn, *inputs, *([causal(tokens, dtype)] if masked else []))
    [call] = calls_of(report)
    shapes = [tuple(arg.meta["val"].shape) for arg in call.args]  # type: ignore[union-attr]
    wide, narrow = (BATCH, HEADS, tokens, LATENT), (BATCH, HEADS, tokens, ROPE)
    assert shapes == [wide, narrow, (BATCH, 1, KEYS, LATENT), (BATCH, 1, KEYS, ROPE), (BATCH, 1, KEYS, LATENT)]
    assert call.args[2] is call.args[4]
    assert report.idioms["attention"] == 1


@pytest.mark.parametrize("heads", [1, 2])
def test_absorbed_shards(heads: int) -> None:
    [call] = calls_of(fused_within_contract(with_einsum, *latents(torch.bfloat16, 1, heads)))
    assert call.args[0].meta["val"].shape[1] == heads  # type: ignore[union-attr]


def other_values(q_nope: Tensor, q_pe: Tensor, kv: Tensor, pe: Tensor) -> Tensor:
    latent, rope = kv[:, None], pe[:, None]
    scores = (q_nope.transpose(1, 2) @ latent.mT + q_pe.transpose(1, 2) @ rope.mT) * SCALE
    return scores.softmax(-1) @ (latent * 2)


def scaled_apart(q_nope: Tensor, q_pe: Tensor, kv: Tensor, pe: Tensor) -> Tensor:
    latent, rope = kv[:, None], pe[:, None]
    scores = q_nope.transpose(1, 2) @ latent.mT * SCALE + q_pe.transpose(1, 2) @ rope.mT
    return scores.softmax(-1) @ latent


def weights_kept(q_nope: Tensor, q_pe: Tensor, kv: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    latent, rope = kv[:, None], pe[:, None]
    weights = ((q_nope.transpose(1, 2) @ latent.mT + q_pe.transpose(1, 2) @ rope.mT) * SCALE).softmax(-1)
    return weights @ latent, weights


def prefill_with_einsum(q_nope: Tensor, q_pe: Tensor, kv: Tensor, pe: Tensor) -> Tensor:
    return with_einsum(q_nope, q_pe, kv, pe, causal(q_nope.shape[1], q_nope.dtype))


@pytest.mark.parametrize("look_alike", [other_values, scaled_apart, weights_kept, prefill_with_einsum])
def test_look_alikes_of_the_absorbed_form(look_alike: Callable[..., Any]) -> None:
    """One that is fused all the same is `attention` with the other product as its bias, which is right."""
    assert not calls_of(fused_within_contract(look_alike, *latents(torch.bfloat16, 3)))
