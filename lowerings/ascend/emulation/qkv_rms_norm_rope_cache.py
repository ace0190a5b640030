"""CPU kernels of npu_qkv_rms_norm_rope_cache (and _functional): split, norm and rotation of q and k, keys and values into a paged cache.

Everything is computed in fp32 and rounded once, to the dtype of the cache or of the output; where a scale is given the fp32 value is
divided by it and quantised to int8, half to even. A negative index is skipped.

Source: the function that op-plugin's test_npu_qkv_rms_norm_rope_cache compares with, and
op_plugin/ops/opapi/QkvRmsNormRopeCacheNpuOpApi.cpp; ops-transformer `posembedding/qkv_rms_norm_rope_cache` README (offsets).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import write_slots
from .kv_rmsnorm_rope_cache import rms_norm, rotate, to_int8
from .registry import check, check_dtype, check_same_dtype, emulates

_HALVES = (torch.float16, torch.bfloat16)

_QKV = "npu_qkv_rms_norm_rope_cache"


def _check_qkv(
    qkv: Tensor,
    gammas: Sequence[Tensor],
    tables: Sequence[Tensor],
    caches: Sequence[Tensor],
    qkv_size: Sequence[int],
    head_nums: Sequence[int],
) -> None:
    check(_QKV, len(qkv_size) == 4, "the size of qkv_size must be 4: [B, S, N, D]")
    check(_QKV, len(head_nums) == 3, "the size of head_nums must be 3: those of q, k and v")
    check(_QKV, qkv.dim() == 2, "2D tensor expected for input qkv")
    batch, tokens, heads, size = qkv_size
    check_dtype(_QKV, "qkv", qkv, *_HALVES)
    check_same_dtype(_QKV, qkv=qkv, q_gamma=gammas[0], k_gamma=gammas[1], cos=tables[0], sin=tables[1])
    check(
        _QKV,
        sum(head_nums) == heads and head_nums[1] == head_nums[2],
        f"head_nums {list(head_nums)} must be [Nq, Nk, Nk] and sum to {heads}",
    )
    expected = (batch * tokens, heads * size)
    check(_QKV, tuple(qkv.shape) == expected, f"qkv must have shape {list(expected)}, not {list(qkv.shape)}")
    for name, gamma in zip(("q_gamma", "k_gamma"), gammas, strict=True):
        check(_QKV, tuple(gamma.shape) == (size,), f"{name} must have shape [{size}], not {list(gamma.shape)}")
    for name, table in zip(("cos", "sin"), tables, strict=True):
        fits = table.dim() == 2 and table.shape[0] in (batch, batch * tokens) and table.shape[1] == size
        check(_QKV, fits, f"{name} must have shape [{batch * tokens}, {size}], not {list(table.shape)}")
    for name, cache, count in zip(("k_cache", "v_cache"), caches, head_nums[1:], strict=True):
        fits = cache.dim() == 4 and count * size == cache.shape[1] * cache.shape[3] and size % cache.shape[3] == 0
        check(_QKV, fits, f"{name} must have shape [blocks, {count} * {size} / c0, page, c0], not {list(cache.shape)}")


def _qkv_stored(x: Tensor, cache: Tensor, name: str, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """Keys or values [T, N, D] as their cache holds them."""
    if scale is None:
        check(_QKV, offset is None, f"the offset of {name} needs a scale")
        check_dtype(_QKV, name, cache, *_HALVES)
        return x.to(cache.dtype)
    check_dtype(_QKV, name, cache, torch.int8)
    scaled = x / scale.float()
    return to_int8(scaled if offset is None else scaled + offset.float())


def _qkv_rms_norm_rope_cache(
    qkv: Tensor,
    gammas: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    index: Tensor,
    q_out: Tensor,
    caches: tuple[Tensor, Tensor],
    qkv_size: Sequence[int],
    head_nums: Sequence[int],
    scales: tuple[Tensor | None, Tensor | None],
    offsets: tuple[Tensor | None, Tensor | None],
    epsilon: float,
    cache_mode: str,
    is_output_qkv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check(_QKV, cache_mode == "PA_NZ", f"cache_mode must be 'PA_NZ', not {cache_mode!r}")
    _check_qkv(qkv, gammas, tables, caches, qkv_size, head_nums)
    check_dtype(_QKV, "index", index, torch.int64)
    batch, tokens, heads, size = qkv_size
    check(_QKV, tuple(index.shape) == (batch * tokens,), f"index must have shape [{batch * tokens}], not {list(index.shape)}")
    check(_QKV, tuple(q_out.shape) == (batch * tokens, head_nums[0] * size), f"q_out has shape {list(q_out.shape)}")
    check_same_dtype(_QKV, qkv=qkv, q_out=q_out)
    q, k, v = qkv.float().view(-1, heads, size).split(list(head_nums), dim=1)
    cos, sin = (table.view(batch, -1, 1, size).expand(batch, tokens, 1, size).reshape(-1, 1, size) for table in tables)
    q, k = (rotate(rms_norm(x, gamma, epsilon), cos, sin) for x, gamma in ((q, gammas[0]), (k, gammas[1])))
    q_out.copy_(q.flatten(1))
    for x, cache, name, scale, offset in zip((k, v), caches, ("k_cache", "v_cache"), scales, offsets, strict=True):
        write_slots(_QKV, cache, _qkv_stored(x, cache, name, scale, offset), index, nz=True)
    if not is_output_qkv:
        return qkv.new_zeros(()), qkv.new_zeros(()), qkv.new_zeros(())
    return q.flatten(1).to(qkv.dtype), k.flatten(1).to(qkv.dtype), v.flatten(1).to(qkv.dtype)


def _qkv_parts_like(qkv: Tensor, qkv_size: Sequence[int], head_nums: Sequence[int], is_output_qkv: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not is_output_qkv:
        return qkv.new_empty(()), qkv.new_empty(()), qkv.new_empty(())
    q, k, v = (qkv.new_empty((qkv.shape[0], count * qkv_size[3])) for count in head_nums)
    return q, k, v


@emulates("npu::npu_qkv_rms_norm_rope_cache")
def npu_qkv_rms_norm_rope_cache(
    qkv: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv_size: Sequence[int],
    head_nums: Sequence[int],
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    epsilon: float = 1e-6,
    cache_mode: str = "PA_NZ",
    is_output_qkv: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv [T, N * D]; norm and rotate q into q_out and k into k_cache, copy v into v_cache; returns them before quantisation, or 0-d
    tensors unless asked for."""
    return _qkv_rms_norm_rope_cache(
        qkv,
        (q_gamma, k_gamma),
        (cos, sin),
        index,
        q_out,
        (k_cache, v_cache),
        qkv_size,
        head_nums,
        (k_scale, v_scale),
        (k_offset, v_offset),
        epsilon,
        cache_mode,
        is_output_qkv,
    )


@npu_qkv_rms_norm_rope_cache.fake
def _(
    qkv: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv_size: Sequence[int],
    head_nums: Sequence[int],
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    epsilon: float = 1e-6,
    cache_mode: str = "PA_NZ",
    is_output_qkv: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return _qkv_parts_like(qkv, qkv_size, head_nums, is_output_qkv)


@emulates("npu::npu_qkv_rms_norm_rope_cache_functional")
def npu_qkv_rms_norm_rope_cache_functional(
    qkv: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv_size: Sequence[int],
    head_nums: Sequence[int],
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    epsilon: float = 1e-6,
    cache_mode: str = "PA_NZ",
    is_output_qkv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """npu_qkv_rms_norm_rope_cache on copies; returns its results, q_out and both caches."""
    written = (q_out.clone(), k_cache.clone(), v_cache.clone())
    parts = npu_qkv_rms_norm_rope_cache(
        qkv,
        q_gamma,
        k_gamma,
        cos,
        sin,
        index,
        *written,
        qkv_size,
        head_nums,
        k_scale=k_scale,
        v_scale=v_scale,
        k_offset=k_offset,
        v_offset=v_offset,
        epsilon=epsilon,
        cache_mode=cache_mode,
        is_output_qkv=is_output_qkv,
    )
    return *parts, *written


@npu_qkv_rms_norm_rope_cache_functional.fake
def _(
    qkv: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv_size: Sequence[int],
    head_nums: Sequence[int],
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    epsilon: float = 1e-6,
    cache_mode: str = "PA_NZ",
    is_output_qkv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = _qkv_parts_like(qkv, qkv_size, head_nums, is_output_qkv)
    return *parts, torch.empty_like(q_out), torch.empty_like(k_cache), torch.empty_like(v_cache)
