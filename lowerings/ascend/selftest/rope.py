"""Self-test cases of the rotary position embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import BF16, FLOATS, FP16, FP32, HALVES, Arguments, Case, Inputs, Shape, case


def cases() -> Iterator[Case]:
    """Every layout of the tables, both modes, heads of 64 and 128, grouped keys."""
    for dtype in FLOATS:
        yield case("npu::npu_rotary_mul", _rotary_mul, dtype, (2, 8, 16, 128), tables=(1, 1, 16, 128))
    yield case("npu::npu_rotary_mul", _rotary_mul, BF16, (2, 16, 8, 128), tables=(1, 16, 1, 128))
    yield case("npu::npu_rotary_mul", _rotary_mul, BF16, (2, 8, 16, 64), tables=(2, 1, 16, 64))
    yield case("npu::npu_rotary_mul", _rotary_mul, FP16, (16, 2, 8, 128), tables=(16, 1, 1, 128))
    yield case("npu::npu_rotary_mul", _rotary_mul, BF16, (2, 8, 16, 128), tables=(1, 1, 16, 128), mode="interleave")
    for dtype in FLOATS:
        yield case("npu::npu_apply_rotary_pos_emb", _apply, dtype, (2, 16), heads=(8, 2), dim=128)
    yield case("npu::npu_apply_rotary_pos_emb", _apply, BF16, (1, 33), heads=(4, 4), dim=64)
    yield case("npu::npu_apply_rotary_pos_emb", _apply, BF16, (24,), heads=(8, 2), dim=128)
    for dtype in HALVES:
        yield case("npu::npu_interleave_rope", _interleave, dtype, (2, 8, 16, 64), length=16)
        yield case("npu::npu_interleave_rope", _interleave, dtype, (4, 8, 1, 64), length=1)
    for dtype in (BF16, FP32):
        yield case("npu::npu_mrope", _mrope, dtype, heads=(8, 2), sections=None)
        yield case("npu::npu_mrope", _mrope, dtype, heads=(8, 2), sections=(16, 24, 24))
    for dtype in HALVES:
        yield case("npu_fusion_sgl::split_qkv_rmsnorm_rope", _split, dtype, heads=(8, 2), dim=128)
    yield case("npu_fusion_sgl::split_qkv_rmsnorm_rope", _split, BF16, heads=(4, 4), dim=64, norm=False)


def _rotary_mul(inputs: Inputs, dtype: torch.dtype, shape: Shape, tables: Shape, mode: str = "half") -> Arguments:
    cos, sin = inputs.angles(tables, dtype, interleaved=mode == "interleave")
    return {"input": inputs.normal(shape, dtype), "r1": cos, "r2": sin, "rotary_mode": mode}


def _apply(inputs: Inputs, dtype: torch.dtype, tokens: Shape, heads: Shape, dim: int) -> Arguments:
    query, key = (inputs.normal((*tokens, count, dim), dtype) for count in heads)
    cos, sin = inputs.angles((*tokens, 1, dim), dtype)
    return {"query": query, "key": key, "cos": cos, "sin": sin, "layout": "BSND" if len(tokens) == 2 else "TND"}


def _interleave(inputs: Inputs, dtype: torch.dtype, shape: Shape, length: int) -> Arguments:
    cos, sin = inputs.angles((shape[0], 1, length, shape[-1]), dtype)
    return {"x": inputs.normal(shape, dtype), "cos": cos, "sin": sin}


def _mrope(inputs: Inputs, dtype: torch.dtype, heads: Shape, sections: Shape | None, tokens: int = 24, dim: int = 128) -> Arguments:
    query, key = (inputs.normal((tokens, count * dim), dtype) for count in heads)
    cos, sin = inputs.angles((64, dim), dtype)
    arguments = {
        "positions": inputs.integers((tokens,) if sections is None else (len(sections), tokens), limit=64),
        "query": query,
        "key": key,
        "cos_sin_cache": torch.cat([cos[:, : dim // 2], sin[:, : dim // 2]], dim=-1),
        "head_size": dim,
    }
    return arguments if sections is None else {**arguments, "mrope_section": list(sections)}


def _split(inputs: Inputs, dtype: torch.dtype, heads: Shape, dim: int, norm: bool = True, tokens: int = 24) -> Arguments:
    cos, sin = inputs.angles((tokens, dim), dtype)
    arguments = {
        "input": inputs.normal((tokens, (heads[0] + 2 * heads[1]) * dim), dtype),
        "sin": sin,
        "cos": cos,
        "q_hidden_size": heads[0] * dim,
        "kv_hidden_size": heads[1] * dim,
        "head_dim": dim,
    }
    if norm:
        arguments |= {"eps": 1e-6, "q_weight": inputs.near_one((dim,), dtype), "k_weight": inputs.near_one((dim,), dtype)}
    return arguments
