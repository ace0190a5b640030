"""Masks of the attention rules: what is recovered of their structure, what stays a tensor, and what is no mask."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.attention_checks import (
    BATCH,
    DTYPES,
    HEADS,
    SCALE,
    TOKENS,
    after,
    assert_fused,
    assert_missed,
    causal,
    heads,
    lowest,
    plain,
    repeat_kv,
)
from tests.patterns.support import fused, fused_within_contract


def padding(dtype: torch.dtype, fill: float) -> Tensor:
    """[B, 1, 1, T] additive: the first row of the batch has two keys less."""
    mask = torch.zeros(BATCH, 1, 1, TOKENS, dtype=dtype)
    mask[0, ..., :2] = fill
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_from_outside_stays_additive(dtype: torch.dtype) -> None:
    (call,) = assert_fused(fused_within_contract(plain, *heads(dtype), padding(dtype, torch.finfo(dtype).min)))
    assert call.kwargs["mask"].meta["val"].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_all_hidden_keeps_its_average(dtype: torch.dtype) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        visible = causal(q, k) & keep[:, None, None, :]
        return plain(q, k, v, torch.where(visible, torch.zeros((), dtype=q.dtype), lowest(q)))

    keep = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    keep[0, :2] = False  # so that the first queries of the first row see nothing
    (call,) = assert_fused(fused_within_contract(fn, *heads(dtype), keep), is_causal=None)
    assert call.kwargs["mask"].meta["val"].dtype == dtype


def test_finite_biases_stay() -> None:
    def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
        bias = distance * (2.0 ** -torch.arange(1, HEADS + 1))[:, None, None]
        return plain(q, k, v, bias + torch.where(causal(q, k), 0.0, lowest(q)))

    (call,) = assert_fused(fused_within_contract(alibi, *heads(torch.float32)), is_causal=None)
    assert call.kwargs["mask"] is not None


def test_a_soft_mask_is_a_bias() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v, torch.where(causal(q, k), 0.0, -2.0))

    (call,) = assert_fused(fused_within_contract(fn, *heads(torch.float32)), is_causal=None)
    assert call.kwargs["mask"] is not None


def test_filling_with_a_soft_number_is_no_mask() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ repeat_kv(k).mT).masked_fill(~causal(q, k), -2.0).softmax(-1) @ repeat_kv(v)

    assert_missed(fused_within_contract(fn, *heads(torch.float32)), "does not hide a key")


@pytest.mark.parametrize("hidden", [False, True])
def test_boolean_masks_from_outside(hidden: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        w = q @ repeat_kv(k).mT * SCALE
        w = w.masked_fill(mask, -math.inf) if hidden else torch.where(mask, w, -math.inf)
        return w.softmax(-1) @ repeat_kv(v)

    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    (call,) = assert_fused(fused_within_contract(fn, *heads(torch.float32), ~mask if hidden else mask))
    assert call.kwargs["mask"].meta["val"].dtype == torch.bool


def test_two_masks_and_a_floor() -> None:
    """GPT-Neo fills, then adds; XGLM keeps the sum above the lowest number; CodeGen scales last."""

    def filled_then_added(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor) -> Tensor:
        w = torch.where(visible, q @ repeat_kv(k).mT, torch.tensor(lowest(q)))
        return (w + bias).softmax(-1) @ repeat_kv(v)

    def floored(q: Tensor, k: Tensor, v: Tensor, _: Tensor, bias: Tensor) -> Tensor:
        w = torch.max(q @ repeat_kv(k).mT + bias, torch.tensor(lowest(q)))
        return w.softmax(-1) @ repeat_kv(v)

    def scaled_last(q: Tensor, k: Tensor, v: Tensor, _: Tensor, bias: Tensor) -> Tensor:
        return ((q @ repeat_kv(k).mT + bias) / 4.0).softmax(-1) @ repeat_kv(v)

    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for fn, fill in ((filled_then_added, lowest(torch.zeros(()))), (floored, -math.inf), (scaled_last, -3.0)):
        (call,) = assert_fused(fused_within_contract(fn, *heads(torch.float32), visible, padding(torch.float32, fill)))
        assert call.kwargs["mask"] is not None


def test_zeros_for_queries_without_a_key() -> None:
    """CPM-Ant fills the probabilities of hidden keys with zeros."""

    def fn(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        w = (q @ repeat_kv(k).mT).masked_fill(hidden, -math.inf)
        return w.softmax(-1).masked_fill(hidden, 0.0) @ repeat_kv(v)

    hidden = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    hidden[0] = hidden[2, 1:] = True
    outputs, report = fused(fn, *heads(torch.float32), hidden)
    assert_fused(report)
    assert torch.equal(outputs[:, :, 0], torch.zeros_like(outputs[:, :, 0]))
    assert not outputs.isnan().any()


@pytest.mark.parametrize("kv", [TOKENS, 12])
def test_sliding_window(kv: int) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2]), torch.arange(k.shape[2])
        visible = (columns <= rows) & (columns > rows - 3)
        return plain(q, k, v, torch.where(visible, 0.0, lowest(q)))

    assert_fused(fused_within_contract(fn, *heads(torch.float32, kv=kv)), is_causal=True, window=3, causal_offset=(kv - TOKENS) or None)


def test_static_cache_keeps_its_mask() -> None:
    """The position is in a tensor: nothing is known of it when the graph is made."""

    def fn(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        visible = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None] + position
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=visible)

    (call,) = assert_fused(fused_within_contract(fn, *heads(torch.bfloat16, tokens=1, kv=12), torch.tensor(4)), is_causal=None)
    assert call.kwargs["mask"].meta["val"].dtype == torch.bool


class Decode(nn.Module):
    """A step with a cache that grows: with dynamic=True its length is a symbol."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        return after(q, torch.cat((past_k, k), 2), torch.cat((past_v, v), 2))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_growing_cache(tokens: int, dynamic: bool) -> None:
    inputs = (*heads(torch.float32, tokens=tokens, kv=tokens), *heads(torch.float32, kv=7)[1:])
    (call,) = assert_fused(fused_within_contract(Decode(), *inputs, dynamic=dynamic))
    assert call.kwargs.get("mask") is None
    assert bool(call.kwargs.get("is_causal")) == (tokens > 1)
