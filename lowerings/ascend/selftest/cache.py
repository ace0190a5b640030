"""Self-test cases of the cache writes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import BF16, FLOATS, FP16, HALVES, Arguments, Case, Inputs, Shape, case

MLA_WIDTH, MLA_ROPE = 512, 64
PAGE = 128


def cases() -> Iterator[Case]:
    """Rows at random places, in one index and in several; dense and paged caches, index types, MLA's pair of caches."""
    for op in ("npu::npu_scatter_nd_update", "npu::npu_scatter_nd_update_"):
        for dtype in FLOATS:
            yield case(op, _scatter, dtype, (48, 8, 128), rows=12)
        yield case(op, _scatter, BF16, (48, 512), rows=1, index=torch.int32)
        yield case(op, _scatter_pairs, BF16, (4, 24, 128), rows=4)
    for op in ("npu::npu_scatter_pa_kv_cache", "npu::npu_scatter_pa_kv_cache_functional"):
        for dtype in HALVES:
            yield case(op, _paged, dtype, tokens=12, heads=2, dim=128, index=torch.int32)
        yield case(op, _paged, BF16, tokens=1, heads=8, dim=64, index=torch.int64)
    for op in ("npu::scatter_update", "npu::scatter_update_"):
        for dtype in HALVES:
            yield case(op, _update, dtype, (4, 2, 24, 128))
    for op in ("npu::npu_kv_rmsnorm_rope_cache", "npu::npu_kv_rmsnorm_rope_cache_v2", "npu::npu_kv_rmsnorm_rope_cache_v2_functional"):
        for dtype in HALVES:
            yield case(op, _mla, dtype, batch=2, length=4, mode="Norm")
            yield case(op, _mla, dtype, batch=4, length=1, mode="PA")
        yield case(op, _mla, BF16, batch=2, length=4, mode="PA", is_output_kv=True)
    for op in ("npu::npu_qkv_rms_norm_rope_cache", "npu::npu_qkv_rms_norm_rope_cache_functional"):
        yield case(op, _qkv, FP16, batch=3, heads=(8, 2, 2), dim=128)
        yield case(op, _qkv, BF16, batch=3, heads=(8, 2, 2), dim=128)


def _scatter(inputs: Inputs, dtype: torch.dtype, shape: Shape, rows: int, index: torch.dtype = torch.int64) -> Arguments:
    return {
        "input": inputs.normal(shape, dtype),
        "indices": inputs.places(rows, shape[0], index).unsqueeze(-1),
        "updates": inputs.normal((rows, *shape[1:]), dtype),
    }


def _scatter_pairs(inputs: Inputs, dtype: torch.dtype, shape: Shape, rows: int) -> Arguments:
    """One row a sequence, at a place of its own: the decode step of a dense cache."""
    places = torch.stack([torch.arange(rows), inputs.places(rows, shape[1])], dim=-1)
    return {"input": inputs.normal(shape, dtype), "indices": places, "updates": inputs.normal((rows, *shape[2:]), dtype)}


def _update(inputs: Inputs, dtype: torch.dtype, shape: Shape) -> Arguments:
    """One new row a sequence along the second last dimension."""
    batch, heads, length, dim = shape
    return {
        "input": inputs.normal(shape, dtype),
        "indices": inputs.integers((batch,), length),
        "updates": inputs.normal((batch, heads, 1, dim), dtype),
        "axis": -2,
    }


def _paged(inputs: Inputs, dtype: torch.dtype, tokens: int, heads: int, dim: int, index: torch.dtype) -> Arguments:
    cache = (3, PAGE, heads, dim)
    return {
        "key": inputs.normal((tokens, heads, dim), dtype),
        "value": inputs.normal((tokens, heads, dim), dtype),
        "key_cache": inputs.normal(cache, dtype),
        "value_cache": inputs.normal(cache, dtype),
        "slot_mapping": inputs.places(tokens, 3 * PAGE, index),
        "cache_mode": "Norm",
    }


def _mla(inputs: Inputs, dtype: torch.dtype, batch: int, length: int, mode: str, is_output_kv: bool = False) -> Arguments:
    paged = mode != "Norm"
    rows = (3, PAGE, 1) if paged else (batch, 1, 24)
    index = inputs.places(batch * length, 3 * PAGE) if paged else torch.stack([inputs.places(length, 24) for _ in range(batch)])
    cos, sin = inputs.angles((batch, 1, length, MLA_ROPE), dtype)
    return {
        "kv": inputs.normal((batch, 1, length, MLA_WIDTH + MLA_ROPE), dtype),
        "gamma": inputs.near_one((MLA_WIDTH,), dtype),
        "cos": cos,
        "sin": sin,
        "index": index,
        "k_cache": inputs.normal((*rows, MLA_ROPE), dtype),
        "ckv_cache": inputs.normal((*rows, MLA_WIDTH), dtype),
        "cache_mode": mode,
        "is_output_kv": is_output_kv,
    }


def _qkv(inputs: Inputs, dtype: torch.dtype, batch: int, heads: Shape, dim: int, length: int = 4) -> Arguments:
    """Caches of 32-byte columns, as the op's only layout has them."""
    tokens, column = batch * length, 16
    query, keys, values = heads
    cos, sin = inputs.angles((tokens, dim), dtype)
    return {
        "qkv": inputs.normal((tokens, sum(heads) * dim), dtype),
        "q_gamma": inputs.near_one((dim,), dtype),
        "k_gamma": inputs.near_one((dim,), dtype),
        "cos": cos,
        "sin": sin,
        "index": inputs.places(tokens, 2 * PAGE),
        "q_out": torch.zeros(tokens, query * dim, dtype=dtype),
        "k_cache": inputs.normal((2, keys * dim // column, PAGE, column), dtype),
        "v_cache": inputs.normal((2, values * dim // column, PAGE, column), dtype),
        "qkv_size": [batch, length, sum(heads), dim],
        "head_nums": list(heads),
        "epsilon": 1e-6,
        "cache_mode": "PA_NZ",
    }
