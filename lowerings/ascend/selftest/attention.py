"""Self-test cases of the attention ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .case import BF16, FP16, HALVES, Arguments, Case, Inputs, case

PAGE = 128
MASK = 2048
"""Rows and columns of the one mask that stands for causality, and for windows, in the compressed sparse modes."""
LEFT_UP, RIGHT_DOWN, BAND = 2, 3, 4

_FUSED, _FUSED_V2 = "npu::npu_fused_infer_attention_score", "npu::npu_fused_infer_attention_score_v2"
_V2_NAMES = {
    "num_heads": "num_query_heads",
    "scale": "softmax_scale",
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
}


def cases() -> Iterator[Case]:
    """Layouts, grouped heads, causality and windows, masks, lengths, pages, packed sequences, MLA's second part, sinks."""
    for one in _fused_cases():
        yield one
        yield _of_second_version(one)
    yield _of_second_version(case(_FUSED, _packed, BF16, heads=(8, 2), lengths=(32, 32), dim=64, sinks=True))
    for op in ("npu::npu_fusion_attention_v3", "npu::npu_fusion_attention", "npu::npu_fusion_attention_v2"):
        for dtype in HALVES:
            yield case(op, _training, dtype, "BNSD", heads=(8, 2), length=64, mode=LEFT_UP)
        yield case(op, _training, BF16, "BNSD", heads=(4, 4), length=48, mode=0)
        yield case(op, _training, BF16, "BSND", heads=(8, 2), length=64, mode=RIGHT_DOWN)


def _fused_cases() -> Iterator[Case]:
    for layout in ("BNSD", "BSND", "BSH"):
        yield case(_FUSED, _fused, BF16, layout, heads=(8, 2), lengths=(64, 64), mode=RIGHT_DOWN)
    yield case(_FUSED, _fused, FP16, "BNSD", heads=(8, 8), lengths=(64, 64), mode=RIGHT_DOWN)
    yield case(_FUSED, _fused, BF16, "BNSD", heads=(8, 2), lengths=(16, 80), mode=RIGHT_DOWN)
    yield case(_FUSED, _fused, BF16, "BNSD", heads=(8, 2), lengths=(64, 64), mode=BAND, window=24)
    yield case(_FUSED, _fused, BF16, "BNSD", heads=(4, 4), lengths=(32, 48), mask=True)
    for dtype in HALVES:
        yield case(_FUSED, _fused, dtype, "BNSD", heads=(8, 2), lengths=(1, 384), cached=(200, 384))
    yield case(_FUSED, _fused, BF16, "BNSD", heads=(8, 2), lengths=(1, 384), cached=(130, 384), paged=True)
    yield case(_FUSED, _packed, BF16, heads=(8, 2), lengths=(5, 40, 19))
    yield case(_FUSED, _mla, BF16, heads=8, cached=(200, 256))


def _of_second_version(one: Case) -> Case:
    """The same call of npu_fused_infer_attention_score_v2, which has other names for some arguments."""
    return Case(_FUSED_V2, one.label, lambda inputs: {_V2_NAMES.get(name, name): value for name, value in one.make(inputs).items()})


def _fused(
    inputs: Inputs,
    dtype: torch.dtype,
    layout: str,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    mode: int = 0,
    window: int | None = None,
    mask: bool = False,
    cached: tuple[int, ...] | None = None,
    paged: bool = False,
    batch: int = 2,
    dim: int = 128,
) -> Arguments:
    """Two sequences of one length; `lengths` of the queries and the keys."""
    query_length, length = lengths
    arguments: dict[str, Any] = {
        "query": _laid_out(inputs, dtype, layout, batch, heads[0], query_length, dim),
        "key": _laid_out(inputs, dtype, layout, batch, heads[1], length, dim),
        "value": _laid_out(inputs, dtype, layout, batch, heads[1], length, dim),
        **_heads(heads, dim),
        "input_layout": layout,
        "sparse_mode": mode,
    }
    if mode:
        arguments["atten_mask"] = compressed_mask()
    if window is not None:
        arguments |= {"pre_tokens": window - 1, "next_tokens": 0}
    if mask:
        arguments["atten_mask"] = inputs.flags((batch, 1, query_length, length))
    if cached is not None:
        arguments["actual_seq_lengths_kv"] = list(cached)
    if paged:
        arguments |= _pages(inputs, dtype, batch, heads[1], length, dim)
    return arguments


def compressed_mask() -> Tensor:
    """The mask of sparse modes 2 to 4: true above the diagonal, whatever the lengths."""
    return torch.ones(MASK, MASK, dtype=torch.bool).triu(1)


def _laid_out(inputs: Inputs, dtype: torch.dtype, layout: str, batch: int, heads: int, length: int, dim: int) -> Tensor:
    shapes = {"BNSD": (batch, heads, length, dim), "BSND": (batch, length, heads, dim), "BSH": (batch, length, heads * dim)}
    return inputs.normal(shapes[layout], dtype)


def _heads(heads: tuple[int, int], dim: int) -> dict[str, Any]:
    return {"num_heads": heads[0], "num_key_value_heads": heads[1], "scale": dim**-0.5}


def _pages(inputs: Inputs, dtype: torch.dtype, batch: int, heads: int, length: int, dim: int) -> dict[str, Any]:
    """Keys and values in pages that lie in random order, head by head in each page."""
    pages = batch * length // PAGE
    table = inputs.places(pages, pages + 2, torch.int32).reshape(batch, length // PAGE)
    key, value = (inputs.normal((pages + 2, heads, PAGE, dim), dtype) for _ in range(2))
    return {"key": key, "value": value, "block_table": table, "block_size": PAGE}


def _packed(
    inputs: Inputs, dtype: torch.dtype, heads: tuple[int, int], lengths: tuple[int, ...], dim: int = 128, sinks: bool = False
) -> Arguments:
    """Sequences one after another, whose ends the host knows; sinks are an argument of the second version, in this layout."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    query, key, value = (inputs.normal((ends[-1], count, dim), dtype) for count in (heads[0], heads[1], heads[1]))
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        **_heads(heads, dim),
        "input_layout": "TND",
        "sparse_mode": RIGHT_DOWN,
        "atten_mask": compressed_mask(),
        "actual_seq_lengths": ends,
        "actual_seq_lengths_kv": ends,
    }
    return {**arguments, "learnable_sink": inputs.normal(heads[:1], dtype)} if sinks else arguments


def _mla(inputs: Inputs, dtype: torch.dtype, heads: int, cached: tuple[int, ...], width: int = 512, rope: int = 64) -> Arguments:
    """One step of decoding against a latent cache: one head of keys, which are the values too, and their rotary part."""
    batch, length = len(cached), max(cached)
    latent = inputs.normal((batch, 1, length, width), dtype)
    return {
        "query": inputs.normal((batch, heads, 1, width), dtype),
        "key": latent,
        "value": latent,
        "query_rope": inputs.normal((batch, heads, 1, rope), dtype),
        "key_rope": inputs.normal((batch, 1, length, rope), dtype),
        **_heads((heads, 1), width),
        "scale": (128 + rope) ** -0.5,
        "input_layout": "BNSD",
        "actual_seq_lengths_kv": list(cached),
    }


def _training(
    inputs: Inputs, dtype: torch.dtype, layout: str, heads: tuple[int, int], length: int, mode: int, batch: int = 2, dim: int = 128
) -> Arguments:
    """The npu_fusion_attention family, which takes no number of key heads: it sees it in the shapes."""
    query = _laid_out(inputs, dtype, layout, batch, heads[0], length, dim)
    key, value = (_laid_out(inputs, dtype, layout, batch, heads[1], length, dim) for _ in range(2))
    return {
        "query": query,
        "key": key,
        "value": value,
        "head_num": heads[0],
        "input_layout": layout,
        "atten_mask": compressed_mask() if mode else inputs.flags((batch, 1, length, length)),
        "scale": dim**-0.5,
        "sparse_mode": mode,
    }
