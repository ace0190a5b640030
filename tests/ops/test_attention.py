"""Numerics, visibility, paging, metadata and errors of the attention family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops import attention as attention_module
from npu_fusion.ops.attention import attention, kv_update, mla_attention
from tests.ops.checks import DTYPES, assert_same_metadata, check_op, check_traceable

SCALE = 0.3


def visible(i: int, j: int, kwargs: dict[str, Any], row: int) -> bool:
    """Whether query i of batch row `row` sees key j, straight from the definition."""
    position = i + kwargs.get("causal_offset", 0)
    if kwargs.get("is_causal") and j > position:
        return False
    if kwargs.get("window", 0) and j <= position - kwargs["window"]:
        return False
    lengths = kwargs.get("kv_lengths")
    return lengths is None or j < int(lengths[row])


def plain_attention(query: Tensor, key: Tensor, value: Tensor, softmax_dtype: torch.dtype, scale: float = SCALE, **kwargs: Any) -> Tensor:
    """The eager form of modelling code: repeated heads, whole logits, masked by loops over the definition."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(-1, -2) * scale
    if kwargs.get("softcap"):
        logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
    mask = kwargs.get("mask")
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
    batch, _, query_len, kv_len = logits.shape
    for b in range(batch):
        for i in range(query_len):
            for j in range(kv_len):
                if not visible(i, j, kwargs, b):
                    logits[b, :, i, j] = -math.inf
    sinks = kwargs.get("sinks")
    if sinks is not None:
        column = sinks.to(logits.dtype)[None, :, None, None].expand(batch, -1, query_len, 1)
        logits = torch.cat((logits, column), -1)
    weights = torch.softmax(logits.to(softmax_dtype), -1).nan_to_num(0.0)[..., :kv_len]
    return weights.to(value.dtype) @ value


def qkv(
    dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, query_len: int = 5, kv_len: int = 7, dim: int = 8, dv: int = 8
) -> list[Tensor]:
    shapes = (2, heads, query_len, dim), (2, kv_heads, kv_len, dim), (2, kv_heads, kv_len, dv)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def doubled(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


STRUCTURES: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_offset": 2},
    {"is_causal": True, "causal_offset": 2, "window": 3},
    {"is_causal": True, "window": 2},
    {"causal_offset": 2, "window": 3},
    {"is_causal": True, "causal_offset": -2},
    {"kv_lengths": torch.tensor([4, 7])},
    {"kv_lengths": torch.tensor([0, 3], dtype=torch.int32), "is_causal": True},
]
EXTRAS = ("none", "bool", "additive", "wide", "softcap", "sinks", "all")


def extra_arguments(extra: str, dtype: torch.dtype) -> dict[str, Any]:
    keep = torch.rand(2, 1, 5, 7) > 0.3
    keep[0, 0, 1] = False
    additive = torch.randn(4, 5, 7).masked_fill(torch.rand(5, 7) > 0.7, -math.inf)
    return {
        "none": {},
        "bool": {"mask": keep},
        "additive": {"mask": additive.to(dtype)},
        "wide": {"mask": additive},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.randn(4).to(dtype)},
        "all": {"mask": keep[:, :, :1], "softcap": 1.5, "sinks": torch.randn(4)},
    }[extra]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extra", EXTRAS)
def test_attention_meets_the_numeric_contract(extra: str, dtype: torch.dtype) -> None:
    """Every structure with every extra."""
    for structure in STRUCTURES:
        query, key, value = qkv(dtype)
        kwargs = {**structure, **extra_arguments(extra, dtype)}
        reference = plain_attention(query.double(), key.double(), value.double(), torch.float64, **doubled(kwargs))
        eager = plain_attention(query, key, value, torch.float32, **kwargs)
        actual = attention(query, key, value, scale=SCALE, **kwargs)
        assert actual.dtype == dtype
        assert actual.transpose(1, 2).is_contiguous()
        assert_within_contract(actual, eager, reference, dtype, str(structure))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_attention_metadata(structure: dict[str, Any], extra: str) -> None:
    query, key, value = qkv(torch.bfloat16, dv=6)
    check_op(attention, query, key, value, scale=SCALE, out_dtype=torch.float32, **structure, **extra_arguments(extra, torch.bfloat16))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize(("query_len", "kv_len", "dim", "dv"), [(1, 9, 8, 8), (3, 3, 5, 7), (0, 4, 8, 8), (4, 0, 8, 8), (1, 1, 1, 1)])
def test_shapes_and_heads(heads: int, kv_heads: int, query_len: int, kv_len: int, dim: int, dv: int) -> None:
    query, key, value = qkv(torch.float32, heads, kv_heads, query_len, kv_len, dim, dv)
    for kwargs in ({}, {"sinks": torch.randn(heads)}, {"softcap": 2.0, "is_causal": True}):
        reference = plain_attention(query.double(), key.double(), value.double(), torch.float64, **doubled(kwargs))
        eager = plain_attention(query, key, value, torch.float32, **kwargs)
        actual = check_op(attention, query, key, value, scale=SCALE, **kwargs)
        assert_within_contract(actual, eager, reference, torch.float32, str(kwargs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_forms_are_sdpa_bit_for_bit(dtype: torch.dtype) -> None:
    query, key, value = qkv(dtype)
    mask = extra_arguments("bool", dtype)["mask"]
    for kwargs in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": torch.randn(5, 7).to(dtype)}):
        expected = F.scaled_dot_product_attention(query, key, value, scale=SCALE, enable_gqa=True, **kwargs)
        renamed = {name.replace("attn_mask", "mask"): option for name, option in kwargs.items()}
        assert torch.equal(attention(query, key, value, scale=SCALE, **renamed), expected)


@settings(max_examples=40, deadline=None)
@given(
    query_len=st.integers(1, 5),
    kv_len=st.integers(1, 6),
    is_causal=st.booleans(),
    causal_offset=st.integers(-3, 8),
    window=st.integers(0, 7),
    lengths=st.none() | st.lists(st.integers(0, 8), min_size=2, max_size=2),
    sinks=st.booleans(),
)
def test_visibility(
    query_len: int, kv_len: int, is_causal: bool, causal_offset: int, window: int, lengths: list[int] | None, sinks: bool
) -> None:
    """Causality, window and lengths hide the keys that the definition hides, through SDPA and through the general path."""
    query, key, value = qkv(torch.float32, query_len=query_len, kv_len=kv_len)
    kwargs: dict[str, Any] = {"is_causal": is_causal, "causal_offset": causal_offset, "window": window}
    kwargs["kv_lengths"] = None if lengths is None else torch.tensor(lengths)
    kwargs["sinks"] = torch.zeros(4) if sinks else None
    reference = plain_attention(query.double(), key.double(), value.double(), torch.float64, **doubled(kwargs))
    eager = plain_attention(query, key, value, torch.float32, **kwargs)
    assert_within_contract(attention(query, key, value, scale=SCALE, **kwargs), eager, reference, torch.float32)


@pytest.mark.parametrize("kwargs", [{}, {"softcap": 3.0}, {"mask": torch.ones(5, 7, dtype=torch.bool)}], ids=" ".join)
def test_a_query_without_keys_gives_zeros(kwargs: dict[str, Any]) -> None:
    query, key, value = qkv(torch.float32)
    actual = attention(query, key, value, scale=SCALE, is_causal=True, causal_offset=-2, **kwargs)
    assert torch.equal(actual[:, :, :2], torch.zeros(2, 4, 2, 8))
    assert actual[:, :, 2:].abs().min() > 0


def test_the_most_negative_finite_mask_is_not_infinity() -> None:
    """A row masked with finfo(float32).min is an even average, not zeros, also where the query's dtype cannot hold that number."""
    query, key, value = qkv(torch.bfloat16)
    mask = torch.full((5, 7), torch.finfo(torch.float32).min)
    actual = attention(query, key, value, scale=SCALE, mask=mask)
    expected = value.float().mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 5, 8)
    assert torch.allclose(actual.float(), expected, atol=1e-2)


def test_blocks_of_queries_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = qkv(torch.float32)
    sinks, offset = torch.randn(4), {"is_causal": True, "causal_offset": 1, "window": 4}
    masks = [None, torch.randn(2, 1, 5, 7), torch.rand(1, 4, 1, 7) > 0.3]
    whole = [attention(query, key, value, scale=SCALE, mask=mask, sinks=sinks, **offset) for mask in masks]
    monkeypatch.setattr(attention_module, "LOGITS_BLOCK", 2 * 4 * 7 * 2)
    for mask, expected in zip(masks, whole):
        assert torch.allclose(attention(query, key, value, scale=SCALE, mask=mask, sinks=sinks, **offset), expected, atol=1e-6)


@pytest.mark.parametrize("extra", ["none", "softcap", "sinks"])
def test_paged_caches(extra: str) -> None:
    """Pages in any order give what the dense cache gives; pages and rows past the length may hold anything."""
    kwargs = extra_arguments(extra, torch.float32)
    query, key, value = qkv(torch.float32, query_len=2, kv_len=12)
    lengths = torch.tensor([5, 12])
    table = torch.tensor([[3, 1, -1], [0, 4, 2]], dtype=torch.int32)
    caches = [torch.full((6, 2, 4, 8), math.nan) for _ in range(2)]
    for cache, dense in zip(caches, (key, value)):
        for row in range(2):
            for position in range(int(lengths[row])):
                cache[table[row, position // 4], :, position % 4] = dense[row, :, position]
    actual = check_op(attention, query, *caches, scale=SCALE, kv_lengths=lengths, block_table=table, **kwargs)
    expected = attention(query, key, value, scale=SCALE, kv_lengths=lengths, **kwargs)
    assert torch.allclose(actual, expected, atol=1e-6)


def test_contents_past_the_length_have_no_effect() -> None:
    query, key, value = qkv(torch.float32)
    lengths = torch.tensor([3, 6])
    expected = attention(query, key, value, scale=SCALE, kv_lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        key[row, :, length:], value[row, :, length:] = math.nan, math.inf
    assert torch.equal(attention(query, key, value, scale=SCALE, kv_lengths=lengths), expected)


def test_strided_inputs() -> None:
    query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(torch.float32))
    for kwargs in ({}, {"softcap": 2.0}):
        actual = check_op(attention, query, key[..., ::1], value.flip(-1).flip(-1), scale=SCALE, **kwargs)
        expected = attention(query.contiguous(), key.contiguous(), value.contiguous(), scale=SCALE, **kwargs)
        assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope_heads", [1, 4])
@pytest.mark.parametrize(
    "kwargs", [{}, {"is_causal": True, "causal_offset": 2}, {"mask": torch.arange(35).view(1, 1, 5, 7) % 4 > 0}], ids=" ".join
)
def test_mla_attention_meets_the_numeric_contract(kwargs: dict[str, Any], rope_heads: int, dtype: torch.dtype) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    q_nope, q_rope = random(2, 4, 5, 8), random(2, 4, 5, 4)
    k_nope, k_rope, value = random(2, 4, 7, 8), random(2, rope_heads, 7, 4), random(2, 4, 7, 6)
    query, key = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope.expand(2, 4, 7, 4)), -1)
    reference = plain_attention(query.double(), key.double(), value.double(), torch.float64, **kwargs)
    eager = plain_attention(query, key, value, torch.float32, **kwargs)
    actual = check_op(mla_attention, q_nope, q_rope, k_nope, k_rope, value, scale=SCALE, **kwargs)
    assert actual.transpose(1, 2).is_contiguous()
    assert_within_contract(actual, eager, reference, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_kv_update(dtype: torch.dtype) -> None:
    cache = torch.randint(-9, 9, (2, 3, 6, 4)).to(dtype)
    kept = cache.clone()
    for dim, positions in ((2, [4, 1]), (-2, [5]), (0, [1]), (2, [])):
        index = torch.tensor(positions, dtype=torch.int64)
        shape = list(cache.shape)
        shape[dim] = len(positions)
        new = torch.randint(-9, 9, shape).to(dtype)
        actual = check_op(kv_update, cache, new, index, dim)
        expected = kept.clone()
        for i, position in enumerate(positions):
            expected.select(dim, position).copy_(new.select(dim, i))
        assert torch.equal(actual, expected)
        assert torch.equal(cache, kept)
    strided = cache.transpose(1, 2)
    actual = check_op(kv_update, strided, strided[:, 1:2], torch.tensor([0], dtype=torch.int32), 1)
    assert actual.stride() == strided.stride()


def test_traced_with_symbols() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(
            query, key, value, scale=SCALE, is_causal=True, causal_offset=key.shape[2] - query.shape[2], window=key.shape[2] - 1
        )

    check_traceable(attention, attend, qkv(torch.float32), qkv(torch.float32, query_len=3, kv_len=9))

    def latent(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        offset = key.shape[2] - query.shape[2]
        return mla_attention(query, query, key, key[:, :1], value, scale=SCALE, is_causal=True, causal_offset=offset)

    check_traceable(mla_attention, latent, qkv(torch.float32, 4, 4), qkv(torch.float32, 4, 4, query_len=3, kv_len=9))
    first = [torch.randn(2, 3, 6, 4), torch.randn(2, 3, 2, 4), torch.tensor([1, 4])]
    second = [torch.randn(1, 3, 8, 4), torch.randn(1, 3, 3, 4), torch.tensor([1, 4, 7])]
    check_traceable(kv_update, lambda cache, new, positions: kv_update(cache, new, positions, 2), first, second)


def test_meta_tensors() -> None:
    query, key, value = (t.to("meta") for t in qkv(torch.float16))
    assert_same_metadata(attention(query, key, value, scale=SCALE), torch.empty(2, 5, 4, 8, dtype=torch.float16).transpose(1, 2))


Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
LENGTHS = torch.tensor([1, 2])
CACHE = torch.randn(2, 3, 6, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: attention(Q, K.half(), V, scale=1.0), TypeError, "must have one dtype"),
        (lambda: attention(Q.int(), K.int(), V.int(), scale=1.0), TypeError, "query must be floating point"),
        (lambda: attention(Q, K, V, scale=1.0, mask=torch.ones(5, 7, dtype=torch.int32)), TypeError, "mask must be bool"),
        (lambda: attention(Q, K, V, scale=1.0, kv_lengths=LENGTHS.float()), TypeError, "kv_lengths must be int32"),
        (lambda: attention(Q, K, V, scale=1.0, out_dtype=torch.int8), TypeError, "out_dtype"),
        (lambda: attention(Q[0], K, V, scale=1.0), ValueError, "query must have 4 dimensions"),
        (lambda: attention(Q, K[..., :4], V, scale=1.0), ValueError, "key must have shape"),
        (lambda: attention(Q, K, V[:, :, :4], scale=1.0), ValueError, "value must have shape"),
        (lambda: attention(Q[:, :3], K, V, scale=1.0), ValueError, "2 key heads do not divide 3"),
        (lambda: attention(Q, K, V, scale=1.0, mask=torch.ones(7, dtype=torch.bool)), ValueError, "at least 2 dimensions"),
        (lambda: attention(Q, K, V, scale=1.0, mask=torch.ones(5, 6, dtype=torch.bool)), ValueError, "does not broadcast"),
        (lambda: attention(Q, K, V, scale=1.0, window=-1), ValueError, "window must not be negative"),
        (lambda: attention(Q, K, V, scale=1.0, softcap=-1.0), ValueError, "softcap must not be negative"),
        (lambda: attention(Q, K, V, scale=1.0, sinks=torch.zeros(2)), ValueError, "sinks must have shape"),
        (lambda: attention(Q, K, V, scale=1.0, kv_lengths=LENGTHS[:1]), ValueError, "kv_lengths must have shape"),
        (lambda: attention(Q, K, V, scale=1.0, block_table=TABLE), ValueError, "needs kv_lengths"),
        (lambda: attention(Q, K, V, scale=1.0, kv_lengths=LENGTHS, block_table=TABLE[0]), ValueError, "block_table must have 2"),
        (lambda: attention(Q, K, V, scale=1.0, kv_lengths=LENGTHS, block_table=TABLE[:1]), ValueError, "block_table must have shape"),
        (lambda: mla_attention(Q, Q, K[..., 1:], K, V, scale=1.0), ValueError, "k_nope must have shape"),
        (lambda: mla_attention(Q, Q, Q, K, Q, scale=1.0), ValueError, "k_rope of shape"),
        (lambda: mla_attention(Q, Q, Q, Q.half(), Q, scale=1.0), TypeError, "must have one dtype"),
        (lambda: kv_update(CACHE, CACHE.half(), LENGTHS, 0), TypeError, "must have one dtype"),
        (lambda: kv_update(CACHE, CACHE, LENGTHS.float(), 0), TypeError, "positions must be int32"),
        (lambda: kv_update(CACHE, CACHE, LENGTHS[None], 0), ValueError, "positions must have 1 dimension"),
        (lambda: kv_update(CACHE, CACHE, LENGTHS, 1), ValueError, "new must have shape"),
        (lambda: kv_update(CACHE, CACHE, LENGTHS, 4), ValueError, "dim 4 is out of range"),
    ],
)
def test_wrong_calls(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(error, match=match):
        call()


def test_positions_out_of_range_are_an_error() -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        kv_update(CACHE, CACHE[:, :, :1], torch.tensor([6]), 2)
