"""Attention and its cache: `attention`, `mla_attention`, `kv_update`.

Results of attention are stored token-major (a contiguous [B, Sq, N, Dv] seen as [B, N, Sq, Dv]), so that the merge of the heads that
follows in every model is a view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..semantic import semantic_op
from ._common import (
    Size,
    check_broadcastable,
    check_floating,
    check_floating_dtype,
    check_index,
    check_min_rank,
    check_rank,
    check_same_dtype,
    check_sizes,
    check_type,
    check_value,
    compute_dtype,
    empty_token_major,
    known_different,
    stored_like,
    token_major,
)

# The general path computes this many logits at a time, so that its memory does not grow with the square of the length.
LOGITS_BLOCK = 1 << 24


@dataclass(frozen=True)
class _Visibility:
    """Which keys a query may see, by structure and by length; what an explicit mask says is kept apart.

    `lengths` is [B] or None; the other fields are the arguments of `attention`.
    """

    query_len: int
    kv_len: int
    is_causal: bool
    causal_offset: int
    window: int
    lengths: Tensor | None

    @property
    def causal_binds(self) -> bool:
        """Whether causality hides any key: the first query sees the fewest."""
        return self.is_causal and self.causal_offset < self.kv_len - 1

    @property
    def window_binds(self) -> bool:
        """Whether the window hides any key: the last query has lost the most."""
        return self.window > 0 and self.query_len - 1 + self.causal_offset - self.window >= 0

    def mask(self, device: torch.device, start: int = 0, stop: int | None = None) -> Tensor | None:
        """The bool mask [Sq, Skv], or [B, 1, Sq, Skv] with lengths, of queries `start` to `stop`; None if every key is visible."""
        keys = torch.arange(self.kv_len, device=device)
        last = torch.arange(start, self.query_len if stop is None else stop, device=device)[:, None] + self.causal_offset
        visible: Tensor | None = None
        if self.causal_binds:
            visible = keys <= last
        if self.window_binds:
            inside = keys > last - self.window
            visible = inside if visible is None else visible & inside
        if self.lengths is not None:
            filled = (keys < self.lengths[:, None])[:, None, None, :]
            visible = filled.expand(-1, 1, last.shape[0], -1) if visible is None else visible & filled
        return visible


def _join(mask: Tensor | None, visible: Tensor | None) -> Tensor | None:
    """One mask that says what both say: bool if the given mask is bool or None, else additive."""
    if mask is None or visible is None:
        return visible if mask is None else mask
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)


def _gather_pages(cache: Tensor, block_table: Tensor) -> Tensor:
    """A paged cache [pages, Nkv, page_size, D] as [B, Nkv, max_pages * page_size, D]."""
    # Entries beyond a row's length are commonly -1 or left over; what they gather is hidden by the length.
    pages = cache[block_table.long().clamp(0, cache.shape[0] - 1)]
    return pages.transpose(1, 2).flatten(2, 3)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], query.shape[2], key.shape[2])
        mask = mask[None] if mask.dim() == 3 else mask
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def _is_sdpa_mask(mask: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether SDPA in `dtype` takes the mask as it is: rounding a wider one could turn its most negative finite value into -inf."""
    return mask is None or mask.dtype == torch.bool or torch.promote_types(mask.dtype, dtype) == dtype


def _softmax_block(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension of [B, N, q, Skv], with the sinks [N] in the denominator; a row of -inf gives zeros."""
    top = logits.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.to(logits.dtype)[:, None, None]
        top = torch.maximum(top, sinks)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    return weights / total.masked_fill(total == 0.0, 1.0)


def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    visibility: _Visibility,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with softcap and sinks, a block of queries at a time; the key and value heads are not repeated."""
    batch, heads, query_len, _ = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    dtype = compute_dtype(query)
    out = query.new_empty((batch, query_len, heads, value.shape[-1])).transpose(1, 2)
    if out.numel() == 0 or kv_len == 0:
        return out.zero_()
    key_t, value = key.to(dtype).transpose(-1, -2), value.to(dtype)
    step = max(1, LOGITS_BLOCK // (batch * heads * kv_len))
    for start in range(0, query_len, step):
        stop = min(start + step, query_len)
        # The heads of a group lie one after another, so group and query fold into the rows of one matmul with the group's key.
        rows = query[:, :, start:stop].to(dtype).reshape(batch, kv_heads, -1, query.shape[-1])
        logits = torch.matmul(rows, key_t).mul_(scale).view(batch, heads, stop - start, kv_len)
        if softcap > 0:
            logits = torch.tanh(logits / softcap) * softcap
        part = mask if mask is None or mask.shape[-2] == 1 else mask[..., start:stop, :]
        joined = _join(part, visibility.mask(query.device, start, stop))
        if joined is not None:
            logits = logits.masked_fill(~joined, -torch.inf) if joined.dtype == torch.bool else logits + joined.to(dtype)
        weights = _softmax_block(logits, sinks).view(batch, kv_heads, -1, kv_len)
        out[:, :, start:stop] = torch.matmul(weights, value).view(batch, heads, stop - start, -1)
    return out


def _check_mask(op: str, mask: Tensor | None, sizes: tuple[Size, Size, Size, Size]) -> None:
    if mask is not None:
        is_mask = mask.dtype == torch.bool or mask.dtype.is_floating_point
        check_type(op, is_mask, f"mask must be bool or floating point, not {mask.dtype}")
        check_min_rank(op, 2, mask=mask)
        check_broadcastable(op, "mask", mask.shape, sizes)


def _check_heads(op: str, query: Tensor, key: Tensor) -> None:
    heads, kv_heads = query.shape[1], key.shape[1]
    check_value(op, not known_different(heads % kv_heads, 0), f"{kv_heads} key heads do not divide {heads} query heads")


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: Size,
    softcap: float,
    sinks: Tensor | None,
    kv_lengths: Tensor | None,
    block_table: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    op = "attention"
    check_floating(op, query=query, key=key, value=value, sinks=sinks)
    check_floating_dtype(op, "out_dtype", out_dtype)
    check_same_dtype(op, query=query, key=key, value=value)
    check_rank(op, 4, query=query, key=key, value=value)
    check_rank(op, 1, sinks=sinks, kv_lengths=kv_lengths)
    check_rank(op, 2, block_table=block_table)
    check_value(op, not statically_known_true(window < 0), f"window must not be negative: {window}")
    check_value(op, softcap >= 0, f"softcap must not be negative: {softcap}")
    check_value(op, block_table is None or kv_lengths is not None, "block_table needs kv_lengths")
    check_index(op, kv_lengths=kv_lengths, block_table=block_table)
    batch = query.shape[0]
    kv_len = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    check_sizes(op, "key", key.shape, (batch if block_table is None else key.shape[0], key.shape[1], key.shape[2], query.shape[3]))
    check_sizes(op, "value", value.shape, (*key.shape[:3], value.shape[3]))
    _check_heads(op, query, key)
    if sinks is not None:
        check_sizes(op, "sinks", sinks.shape, query.shape[1:2])
    if kv_lengths is not None:
        check_sizes(op, "kv_lengths", kv_lengths.shape, [batch])
    if block_table is not None:
        check_sizes(op, "block_table", block_table.shape, [batch, block_table.shape[1]])
    _check_mask(op, mask, (batch, query.shape[1], query.shape[2], kv_len))


@semantic_op(
    "attention",
    "(Tensor query, Tensor key, Tensor value, *, float scale, Tensor? mask=None, bool is_causal=False, SymInt causal_offset=0, "
    "SymInt window=0, float softcap=0.0, Tensor? sinks=None, Tensor? kv_lengths=None, Tensor? block_table=None, "
    "ScalarType? out_dtype=None) -> Tensor",
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    causal_offset: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Scaled dot-product attention with grouped heads, masks, causality, window, softcap, sinks, lengths and paged caches.

    Maths: `logits = scale * query @ key^T`; `softcap * tanh(logits / softcap)` if softcap > 0; the mask and the structure hide keys;
    `softmax(logits) @ value`. The softmax of head n has `exp(sinks[n])` in its denominator, unscaled and uncapped. Query head n uses key
    head n // (N / Nkv).

    Args:
        query: [B, N, Sq, D], floating point.
        key: [B, Nkv, Skv, D], Nkv dividing N; with `block_table` [pages, Nkv, page_size, D].
        value: [B, Nkv, Skv, Dv]; with `block_table` [pages, Nkv, page_size, Dv].
        scale: multiplies the logits.
        mask: broadcastable to [B, N, Sq, Skv], of rank 2 or more: bool (False hides) or floating point (added to the logits).
        is_causal: key j is visible to query i only if j <= i + causal_offset. 0 is the top-left alignment of torch.
        causal_offset: position of the first query among the keys.
        window: > 0 also hides keys j <= i + causal_offset - window, with or without `is_causal`.
        softcap: 0 is none.
        sinks: [N] or None.
        kv_lengths: [B] int32 or int64, or None: keys at or past it are hidden, and their contents, even NaN, have no effect.
        block_table: [B, max_pages] int32 or int64, or None: page p of row b holds positions from p * page_size on, so that
            Skv = max_pages * page_size. Needs `kv_lengths`; entries past a row's length may hold anything.
        out_dtype: dtype of the result; None is that of the query.

    Returns:
        [B, N, Sq, Dv] in `out_dtype`, stored as a contiguous [B, Sq, N, Dv]. A query that sees no key gets zeros, as in
        `torch.nn.functional.scaled_dot_product_attention`.

    Rounding: logits, softmax and the weighted sum in fp32 (fp64 for fp64 inputs), one cast to the query's dtype, then to `out_dtype`.
        Without softcap, sinks and a mask wider than the query the reference *is* torch's scaled_dot_product_attention in the dtype
        of the query, whose kernels round the softmax weights of 16-bit inputs to 16 bits before the second product.

    Raises:
        TypeError: query, key and value differ in dtype or are not floating point; a mask or index has a wrong dtype.
        ValueError: a rank or size does not fit, or `block_table` comes without `kv_lengths`.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; softcap: Gemma 2, https://arxiv.org/abs/2408.00118; sinks: gpt-oss,
        https://github.com/openai/gpt-oss; pages: https://arxiv.org/abs/2309.06180.
    """
    _check_attention(query, key, value, mask, window, softcap, sinks, kv_lengths, block_table, out_dtype)
    if block_table is not None:
        key, value = _gather_pages(key, block_table), _gather_pages(value, block_table)
    if kv_lengths is not None:
        # 0 * NaN is NaN: what lies past the length must not reach a product.
        unused = (torch.arange(key.shape[2], device=key.device) >= kv_lengths[:, None])[:, None, :, None]
        key, value = key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0)
    visibility = _Visibility(query.shape[2], key.shape[2], is_causal, causal_offset, window, kv_lengths)
    if softcap > 0 or sinks is not None or not _is_sdpa_mask(mask, query.dtype):
        result = _blockwise(query, key, value, scale, mask, visibility, softcap, sinks)
    elif mask is None and kv_lengths is None and visibility.causal_binds and causal_offset == 0 and not visibility.window_binds:
        result = token_major(_sdpa(query, key, value, scale, None, True))
    else:
        joined = _join(mask, visibility.mask(query.device))
        result = token_major(_sdpa(query, key, value, scale, joined, False))
    return result if out_dtype is None else result.to(out_dtype)


@attention.fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    causal_offset: Size = 0,
    window: Size = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_attention(query, key, value, mask, window, softcap, sinks, kv_lengths, block_table, out_dtype)
    batch, heads, tokens, _ = query.shape
    return empty_token_major(query, batch, heads, tokens, value.shape[3], out_dtype or query.dtype)


def _check_mla_attention(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor, mask: Tensor | None) -> None:
    op = "mla_attention"
    tensors = {"q_nope": q_nope, "q_rope": q_rope, "k_nope": k_nope, "k_rope": k_rope, "value": value}
    check_floating(op, **tensors)
    check_same_dtype(op, **tensors)
    check_rank(op, 4, **tensors)
    batch, heads, query_len, _ = q_nope.shape
    kv_heads, kv_len = k_nope.shape[1:3]
    check_sizes(op, "q_rope", q_rope.shape, (batch, heads, query_len, q_rope.shape[3]))
    check_sizes(op, "k_nope", k_nope.shape, (batch, kv_heads, kv_len, q_nope.shape[3]))
    _check_heads(op, q_nope, k_nope)
    check_broadcastable(op, "k_rope", k_rope.shape, (batch, kv_heads, kv_len, q_rope.shape[3]))
    check_sizes(op, "value", value.shape, (batch, kv_heads, kv_len, value.shape[3]))
    _check_mask(op, mask, (batch, heads, query_len, kv_len))


@semantic_op(
    "attention",
    "(Tensor q_nope, Tensor q_rope, Tensor k_nope, Tensor k_rope, Tensor value, *, float scale, Tensor? mask=None, "
    "bool is_causal=False, SymInt causal_offset=0) -> Tensor",
)
def mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    causal_offset: int = 0,
) -> Tensor:
    """Multi-head latent attention over queries and keys that come in two parts, one without and one with rotary position.

    Maths: `softmax(scale * (q_nope @ k_nope^T + q_rope @ k_rope^T) + mask) @ value`: `attention` on the concatenated parts.

    Args:
        q_nope: [B, N, Sq, Dn], floating point.
        q_rope: [B, N, Sq, Dr].
        k_nope: [B, Nkv, Skv, Dn], Nkv dividing N: a head each (N) as the latent was projected up, or one for all (1), the latent itself,
            against which queries stand that W_UK was absorbed into.
        k_rope: [B, 1, Skv, Dr], shared by all heads, or [B, Nkv, Skv, Dr].
        value: [B, Nkv, Skv, Dv]; of absorbed attention the latent, the very tensor that `k_nope` is.
        scale: multiplies the logits.
        mask, is_causal, causal_offset: as in `attention`.

    Returns:
        [B, N, Sq, Dv] in the dtype of the query, stored as a contiguous [B, Sq, N, Dv]; zeros where no key is visible.

    Rounding: as `attention`.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: a rank or size does not fit.

    Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434.
    """
    _check_mla_attention(q_nope, q_rope, k_nope, k_rope, value, mask)
    query = torch.cat((q_nope, q_rope), dim=-1)
    key = torch.cat((k_nope, k_rope.expand(*k_nope.shape[:3], -1)), dim=-1)
    result: Tensor = attention.reference(query, key, value, scale=scale, mask=mask, is_causal=is_causal, causal_offset=causal_offset)
    return result


@mla_attention.fake
def _(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    causal_offset: Size = 0,
) -> Tensor:
    _check_mla_attention(q_nope, q_rope, k_nope, k_rope, value, mask)
    batch, heads, tokens, _ = q_nope.shape
    return empty_token_major(q_nope, batch, heads, tokens, value.shape[3], q_nope.dtype)


def _check_kv_update(cache: Tensor, new: Tensor, positions: Tensor, dim: int) -> None:
    op = "kv_update"
    check_same_dtype(op, cache=cache, new=new)
    check_rank(op, 1, positions=positions)
    check_index(op, positions=positions)
    check_min_rank(op, 1, cache=cache)
    check_value(op, -cache.dim() <= dim < cache.dim(), f"dim {dim} is out of range for {cache.dim()} dimensions")
    expected = list(cache.shape)
    expected[dim] = positions.shape[0]
    check_sizes(op, "new", new.shape, expected)


@semantic_op("attention", "(Tensor cache, Tensor new, Tensor positions, int dim) -> Tensor")
def kv_update(cache: Tensor, new: Tensor, positions: Tensor, dim: int) -> Tensor:
    """A copy of a key or value cache with new entries at the given positions.

    Maths: `result[..., positions[i], ...] = new[..., i, ...]` along `dim`; elsewhere `result = cache`.

    Args:
        cache: any shape and dtype, e.g. [B, N, max_len, D].
        new: like `cache`, but as long as `positions` along `dim`.
        positions: [S] int32 or int64, each in [0, cache.shape[dim]); for a position that occurs twice either entry may win.
        dim: the dimension of the positions; negative counts from the end.

    Returns:
        A new tensor like `cache`. Functional: where the cache is not read again, re-inplacing turns the copy into a write in place.

    Rounding: none.

    Raises:
        TypeError: `cache` and `new` differ in dtype, or `positions` is not an integer tensor.
        ValueError: a rank, size or `dim` does not fit.
        IndexError, RuntimeError: a position is out of range (raised by torch.index_copy).

    Source: `torch.Tensor.index_copy`; the static caches of transformers.
    """
    _check_kv_update(cache, new, positions, dim)
    return stored_like(cache.index_copy(dim, positions.long(), new), cache)


@kv_update.fake
def _(cache: Tensor, new: Tensor, positions: Tensor, dim: int) -> Tensor:
    _check_kv_update(cache, new, positions, dim)
    return torch.empty_like(cache)
