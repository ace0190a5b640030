"""CPU kernels of npu_kv_rmsnorm_rope_cache (and _v2, _v2_functional): the norm and the rotation of MLA's latent, written into two caches.

Everything is computed in fp32 and rounded once, to the dtype of the cache or of the output; where a scale is given the fp32 value is
multiplied by it and quantised to int8, half to even. A negative index is skipped.

Source: op-plugin doc npu_kv_rmsnorm_rope_cache, the function that test_npu_kv_rms_norm_rope_cache compares with, and
op_plugin/ops/opapi/KvRmsNormRopeCacheNpuOpApi.cpp; ops-transformer `posembedding/kv_rms_norm_rope_cache` (limits, negative indices).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cache import write_slots
from .registry import check, check_dtype, check_same_dtype, emulates, refuse

_HALVES = (torch.float16, torch.bfloat16)
_PAGED = ("PA", "PA_BNSD", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ")


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon) * gamma.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.float() + torch.cat((-second, first), dim=-1) * sin.float()


def to_int8(x: Tensor) -> Tensor:
    return x.round().clamp(-128, 127).to(torch.int8)


_KV = "npu_kv_rmsnorm_rope_cache"
_SIZES = {False: (512, 64), True: (128, 192)}
"""Whether v is given to the sizes of the two parts that are cached: the latent and the rotated key, or v and the key."""


def _check_kv(kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, v: Tensor | None, caches: tuple[Tensor, Tensor]) -> None:
    for name, tensor in {"kv": kv, "cos": cos, "sin": sin, "v": v, "k_cache": caches[0], "ckv_cache": caches[1]}.items():
        check(_KV, tensor is None or tensor.dim() == 4, f"4D tensor expected for input {name}")
    check(_KV, gamma.dim() == 1, "1D tensor expected for input gamma")
    check_dtype(_KV, "kv", kv, *_HALVES)
    check_same_dtype(_KV, kv=kv, gamma=gamma, cos=cos, sin=sin, v=v)
    check(_KV, kv.shape[1] == 1, f"kv must have one head, not {kv.shape[1]}")
    latent, rope = _SIZES[v is not None]
    width = 192 if v is not None else latent + rope
    check(_KV, kv.shape[3] == width, f"the last dimension of kv must be {width}, not {kv.shape[3]}")
    wanted = 192 if v is not None else latent
    check(_KV, gamma.shape[0] == wanted, f"gamma must have {wanted} elements, not {gamma.shape[0]}")
    check(_KV, cos.shape[3] == sin.shape[3] == 64, "the last dimension of cos and sin must be 64")
    if v is not None:
        check(_KV, v.shape == (*kv.shape[:3], 128), f"v must have shape {[*kv.shape[:3], 128]}, not {list(v.shape)}")
    for name, cache, size in (("k_cache", caches[0], rope), ("ckv_cache", caches[1], latent)):
        check(_KV, cache.shape[3] == size, f"the last dimension of {name} must be {size}, not {cache.shape[3]}")


def _kv_parts(kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, v: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """What goes into k_cache and into ckv_cache, in fp32. The part that is rotated is given in interleaved order, and stored in halves."""

    def halves(x: Tensor) -> Tensor:
        return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)

    x = kv.float()
    if v is None:
        latent, rope = x.split([512, 64], dim=-1)
        return rotate(halves(rope), cos, sin), rms_norm(latent, gamma, epsilon)
    key = rms_norm(x, gamma, epsilon)
    return torch.cat((rotate(halves(key[..., :64]), cos, sin), key[..., 64:]), dim=-1), v.float()


def _kv_stored(part: Tensor, cache: Tensor, name: str, scale: Tensor | None) -> Tensor:
    """One part as its cache holds it."""
    if scale is None:
        check_dtype(_KV, name, cache, *_HALVES)
        return part.to(cache.dtype)
    check_dtype(_KV, name, cache, torch.int8)
    check(
        _KV, scale.dtype == torch.float32 and scale.numel() == part.shape[-1], f"the scale of {name} must be {part.shape[-1]} fp32 values"
    )
    return to_int8(part * scale.reshape(-1))


def _write_norm(cache: Tensor, rows: Tensor, index: Tensor) -> None:
    """Write [B, 1, S, D] into [B, 1, length, D], each batch at its own positions."""
    check(_KV, tuple(index.shape) == (rows.shape[0], rows.shape[2]), f"index must have shape {[rows.shape[0], rows.shape[2]]}")
    check(_KV, tuple(cache.shape[:2]) == (rows.shape[0], 1), f"a cache of mode 'Norm' must have shape [{rows.shape[0]}, 1, length, size]")
    check(_KV, bool((index < cache.shape[2]).all()), "an index is beyond the cache")
    batch, token = (index >= 0).nonzero(as_tuple=True)
    cache[batch, 0, index[batch, token]] = rows[batch, 0, token]


def _slots(index: Tensor, batch: int, tokens: int, page: int, by_block: bool) -> Tensor:
    """The slot of each token, -1 where it is skipped; in the block modes index has the start of each page of tokens."""
    if not by_block:
        check(_KV, tuple(index.shape) == (batch * tokens,), f"index must have shape [{batch * tokens}], not {list(index.shape)}")
        return index
    pages = math.ceil(tokens / page)
    check(_KV, tuple(index.shape) == (batch * pages,), f"index must have shape [{batch * pages}], not {list(index.shape)}")
    place = torch.arange(tokens, device=index.device)
    start = index.view(batch, pages)[:, place // page]
    return torch.where(start < 0, -1, start // page * page + place % page).reshape(-1)


def _write_paged(cache: Tensor, rows: Tensor, index: Tensor, mode: str) -> None:
    blocks, page, heads, size = cache.shape
    batch, _, tokens, _ = rows.shape
    check(_KV, heads == 1, f"a paged cache must have shape [blocks, page, 1, size], not {list(cache.shape)}")
    check(_KV, page * cache.element_size() % 32 == 0, f"the page size {page} must be a multiple of 32 bytes")
    slots = _slots(index, batch, tokens, page, "BLK" in mode)
    if mode.endswith("NZ"):
        c0 = 32 // cache.element_size()
        write_slots(_KV, cache.view(blocks, size // c0, page, c0), rows.reshape(-1, size), slots, nz=True)
    else:
        write_slots(_KV, cache, rows.reshape(-1, 1, size), slots)


def _kv_rmsnorm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    v: Tensor | None,
    epsilon: float,
    cache_mode: str,
    is_output_kv: bool,
) -> tuple[Tensor, Tensor]:
    """Write both caches; returns the two parts, which are undefined (NaN here) unless asked for."""
    check(_KV, cache_mode in ("Norm", *_PAGED), f"cache_mode must be Norm, {', '.join(_PAGED)}, not {cache_mode!r}")
    check(_KV, not is_output_kv or cache_mode != "Norm", "is_output_kv needs a paged cache_mode")
    check(_KV, (scales[0] is None) == (scales[1] is None), "k_rope_scale and c_kv_scale must be given together")
    check_dtype(_KV, "index", index, torch.int64)
    _check_kv(kv, gamma, cos, sin, v, caches)
    parts = _kv_parts(kv, gamma, cos, sin, v, epsilon)
    for part, cache, name, scale in zip(parts, caches, ("k_cache", "ckv_cache"), scales, strict=True):
        stored = _kv_stored(part, cache, name, scale)
        if cache_mode == "Norm":
            _write_norm(cache, stored, index)
        else:
            _write_paged(cache, stored, index, cache_mode)
    if is_output_kv:
        return parts[0].to(kv.dtype), parts[1].to(kv.dtype)
    return torch.full_like(parts[0], torch.nan, dtype=kv.dtype), torch.full_like(parts[1], torch.nan, dtype=kv.dtype)


def _kv_parts_like(kv: Tensor, gamma: Tensor, cos: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    sizes = (cos.shape[3], gamma.shape[0]) if v is None else (kv.shape[3], v.shape[3])
    return kv.new_empty((*kv.shape[:3], sizes[0])), kv.new_empty((*kv.shape[:3], sizes[1]))


@emulates("npu::npu_kv_rmsnorm_rope_cache")
def npu_kv_rmsnorm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MLA's latent: RMSNorm of 512 values, rotation of 64, both written into their caches. Returns the caches, which it changes as the
    operator does whatever its schema says, and both parts."""
    refuse(_KV, k_rope_offset=k_rope_offset, c_kv_offset=c_kv_offset)
    caches, scales = (k_cache, ckv_cache), (k_rope_scale, c_kv_scale)
    return *caches, *_kv_rmsnorm_rope_cache(kv, gamma, cos, sin, index, caches, scales, v, epsilon, cache_mode, is_output_kv)


@npu_kv_rmsnorm_rope_cache.fake
def _(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(k_cache), torch.empty_like(ckv_cache), *_kv_parts_like(kv, gamma, cos, v)


def _check_cache_dtypes(k_cache_dtype: int | None, ckv_cache_dtype: int | None) -> None:
    refuse("npu_kv_rmsnorm_rope_cache_v2", k_cache_dtype=k_cache_dtype, ckv_cache_dtype=ckv_cache_dtype)


@emulates("npu::npu_kv_rmsnorm_rope_cache_v2")
def npu_kv_rmsnorm_rope_cache_v2(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    k_cache_dtype: int | None = None,
    ckv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """npu_kv_rmsnorm_rope_cache whose schema says that it changes the caches; returns both parts."""
    refuse(_KV, k_rope_offset=k_rope_offset, c_kv_offset=c_kv_offset)
    _check_cache_dtypes(k_cache_dtype, ckv_cache_dtype)
    caches, scales = (k_cache, ckv_cache), (k_rope_scale, c_kv_scale)
    return _kv_rmsnorm_rope_cache(kv, gamma, cos, sin, index, caches, scales, v, epsilon, cache_mode, is_output_kv)


@npu_kv_rmsnorm_rope_cache_v2.fake
def _(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    k_cache_dtype: int | None = None,
    ckv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    return _kv_parts_like(kv, gamma, cos, v)


@emulates("npu::npu_kv_rmsnorm_rope_cache_v2_functional")
def npu_kv_rmsnorm_rope_cache_v2_functional(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    k_cache_dtype: int | None = None,
    ckv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """npu_kv_rmsnorm_rope_cache_v2 on copies of the caches; returns both parts and the caches."""
    refuse(_KV, k_rope_offset=k_rope_offset, c_kv_offset=c_kv_offset)
    _check_cache_dtypes(k_cache_dtype, ckv_cache_dtype)
    caches, scales = (k_cache.clone(), ckv_cache.clone()), (k_rope_scale, c_kv_scale)
    return *_kv_rmsnorm_rope_cache(kv, gamma, cos, sin, index, caches, scales, v, epsilon, cache_mode, is_output_kv), *caches


@npu_kv_rmsnorm_rope_cache_v2_functional.fake
def _(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    k_cache_dtype: int | None = None,
    ckv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_kv_parts_like(kv, gamma, cos, v), torch.empty_like(k_cache), torch.empty_like(ckv_cache)
