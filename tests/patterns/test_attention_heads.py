"""Attention of grouped heads: keys and values are never repeated, whatever repeats them; other layouts of heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.attention_checks import BATCH, HEADS, KV_HEADS, SCALE, SIZE, TOKENS, assert_fused, heads, kv_heads_of, repeat_kv
from tests.patterns.support import fused_within_contract


def _repeated_by(name: str) -> Callable[[Tensor], Tensor]:
    repeats = HEADS // KV_HEADS
    return {
        "expand": repeat_kv,
        "repeat_interleave": lambda x: x.repeat_interleave(repeats, dim=1),
        "repeat": lambda x: x[:, :, None].repeat(1, 1, repeats, 1, 1).flatten(1, 2),
        "stack": lambda x: torch.stack([x] * repeats, dim=2).flatten(1, 2),
        "cat of slices": lambda x: torch.cat([x[:, i // repeats : i // repeats + 1] for i in range(HEADS)], dim=1),
        "before the transpose": lambda x: x.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3).transpose(1, 2),
        "gathered": lambda x: x[:, torch.arange(HEADS) // repeats],
        "gathered by a list": lambda x: x[:, [i // repeats for i in range(HEADS)]],
        "index_select": lambda x: x.index_select(1, torch.arange(KV_HEADS).repeat_interleave(repeats)),
    }[name]


REPEATS = ["expand", "repeat_interleave", "repeat", "stack", "cat of slices", "before the transpose"]
GATHERED = ["gathered", "gathered by a list", "index_select"]


@pytest.mark.parametrize("name", REPEATS)
@pytest.mark.parametrize("sdpa", [False, True])
def test_repeated_heads_are_never_made(name: str, sdpa: bool) -> None:
    repeat = _repeated_by(name)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if sdpa:
            return F.scaled_dot_product_attention(q, repeat(k), repeat(v))
        return (q @ repeat(k).mT * SCALE).softmax(-1) @ repeat(v)

    (call,) = assert_fused(fused_within_contract(fn, *heads(torch.float32)))
    assert kv_heads_of(call) == [KV_HEADS] * 2


@pytest.mark.parametrize("name", GATHERED)
def test_gathered_heads(name: str) -> None:
    repeat = _repeated_by(name)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ repeat(k).mT * SCALE).softmax(-1) @ repeat(v)

    assert_fused(fused_within_contract(fn, *heads(torch.float32)))


def test_one_head_for_all() -> None:
    (call,) = assert_fused(fused_within_contract(lambda q, k, v: (q @ k.mT * SCALE).softmax(-1) @ v, *heads(torch.bfloat16, kv_heads=1)))
    assert kv_heads_of(call) == [1, 1]


def test_tiled_heads_stay() -> None:
    """k.repeat(1, R, 1, 1) puts head 1 beside query head 1, not the same grouping."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.repeat(1, 2, 1, 1).mT * SCALE).softmax(-1) @ v.repeat(1, 2, 1, 1)

    (call,) = assert_fused(fused_within_contract(fn, *heads(torch.float32)))
    assert kv_heads_of(call) == [HEADS] * 2


def test_only_the_keys_are_repeated() -> None:
    q, k, _ = heads(torch.float32)
    v = torch.randn(BATCH, HEADS, TOKENS, SIZE)
    (call,) = assert_fused(fused_within_contract(lambda q, k, v: (q @ repeat_kv(k).mT).softmax(-1) @ v, q, k, v))
    assert kv_heads_of(call) == [HEADS] * 2


def test_no_heads_at_all() -> None:
    q, k, v = (torch.randn(BATCH, TOKENS, SIZE) for _ in range(3))
    assert_fused(fused_within_contract(lambda q, k, v: (q @ k.mT * SCALE).softmax(-1) @ v, q, k, v))
    assert_fused(fused_within_contract(F.scaled_dot_product_attention, q, k, v))


def test_keys_stored_transposed() -> None:
    q, k, v = heads(torch.float32, kv_heads=HEADS)
    assert_fused(fused_within_contract(lambda q, kt, v: (q @ kt * SCALE).softmax(-1) @ v, q, k.mT.contiguous(), v))
