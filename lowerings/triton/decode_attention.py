"""Attention by Triton: the ops attention and mask_bounds. Their providers are in `attention.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels import decode_attention as kernels
from ...masks import LOWEST_BIAS
from ...ops._common import (
    Size,
    check_broadcastable,
    check_index,
    check_min_rank,
    check_rank,
    check_same_dtype,
    check_sizes,
    check_type,
    check_value,
    empty_token_major,
    known_different,
)
from .checks import FLOATS, LIMIT_32, check_cores, check_dtypes, check_together
from .define import device_for, launch, triton_op

LARGEST_WIDTH, LARGEST_LATENT = 256, 512


@dataclass(frozen=True)
class _Call:
    """The tensors of a call of `attention` as they were given; `value` None stands for the keys."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    query_rope: Tensor | None
    key_rope: Tensor | None
    mask: Tensor | None
    bounds: Tensor | None
    sinks: Tensor | None
    kv_lengths: Tensor | None
    block_table: Tensor | None

    @property
    def values(self) -> Tensor:
        return self.key if self.value is None else self.value

    @property
    def keys(self) -> Size:
        """The most keys that a sequence may have."""
        return self.key.shape[2] if self.block_table is None else self.block_table.shape[1] * self.key.shape[2]

    def check(self, *, from_end: bool, window: Size, softcap: float, out_dtype: torch.dtype | None, cores: int) -> None:
        op = "attention"
        cached = {"key": self.key, "value": self.value, "query_rope": self.query_rope, "key_rope": self.key_rope}
        given = {name: tensor for name, tensor in cached.items() if tensor is not None}
        check_dtypes(op, FLOATS, query=self.query, **given, sinks=self.sinks)
        check_same_dtype(op, query=self.query, **given)
        check_value(op, out_dtype is None or out_dtype in FLOATS, f"out_dtype must be one of float16, bfloat16, float32, not {out_dtype}")
        check_rank(op, 4, query=self.query, **given)
        check_rank(op, 1, sinks=self.sinks, kv_lengths=self.kv_lengths)
        check_rank(op, 2, block_table=self.block_table)
        check_index(op, kv_lengths=self.kv_lengths, block_table=self.block_table)
        others = {"mask": self.mask, "bounds": self.bounds, "sinks": self.sinks}
        check_together(op, query=self.query, **given, **others, kv_lengths=self.kv_lengths, block_table=self.block_table)
        check_value(op, (self.query_rope is None) == (self.key_rope is None), "query_rope and key_rope come together")
        check_value(op, self.block_table is None or self.kv_lengths is not None, "block_table needs kv_lengths")
        check_value(op, not from_end or self.kv_lengths is not None, "from_end needs kv_lengths")
        check_value(op, self.bounds is None or self.mask is not None, "bounds come with the mask that they are of")
        check_value(op, not statically_known_true(window < 0), f"window must not be negative: {window}")
        check_value(op, softcap >= 0, f"softcap must not be negative: {softcap}")
        check_cores(op, cores)
        self._check_sizes(op)
        self._check_mask(op)
        self._check_limits(op)

    def _check_sizes(self, op: str) -> None:
        batch, heads, queries, width = self.query.shape
        pages, kv_heads, room, _ = self.key.shape
        check_sizes(op, "key", self.key.shape, (batch if self.block_table is None else pages, kv_heads, room, width))
        check_value(op, not known_different(heads % kv_heads, 0), f"{kv_heads} key heads do not divide {heads} query heads")
        check_sizes(op, "value", self.values.shape, (pages, kv_heads, room, self.values.shape[3]))
        if self.query_rope is not None and self.key_rope is not None:
            check_sizes(op, "query_rope", self.query_rope.shape, (batch, heads, queries, self.query_rope.shape[3]))
            check_broadcastable(op, "key_rope", self.key_rope.shape, (pages, kv_heads, room, self.query_rope.shape[3]))
        if self.sinks is not None:
            check_sizes(op, "sinks", self.sinks.shape, (heads,))
        if self.kv_lengths is not None:
            check_sizes(op, "kv_lengths", self.kv_lengths.shape, (batch,))
        if self.block_table is not None:
            check_sizes(op, "block_table", self.block_table.shape, (batch, self.block_table.shape[1]))

    def _check_mask(self, op: str) -> None:
        if self.mask is None:
            return
        batch, heads, queries, _ = self.query.shape
        check_dtypes(op, (torch.bool, *FLOATS), mask=self.mask)
        check_min_rank(op, 2, mask=self.mask)
        check_broadcastable(op, "mask", self.mask.shape, (batch, heads, queries, self.keys))
        if self.bounds is not None:
            check_type(op, self.bounds.dtype == torch.int32, f"bounds must be int32, not {self.bounds.dtype}")
            check_rank(op, 3, bounds=self.bounds)
            check_broadcastable(op, "bounds", self.bounds.shape, (batch, queries, 2))

    def _check_limits(self, op: str) -> None:
        """Sizes that the kernel addresses by 32 bits, or holds in one piece."""
        most = LARGEST_LATENT if self.value is None else LARGEST_WIDTH
        for name, tensor in (("query", self.query), ("value", self.values), ("query_rope", self.query_rope)):
            if tensor is not None:
                width = tensor.shape[3]
                check_value(op, not statically_known_true(width > most), f"{name} has rows of {width} elements, of which {most} fit")
        check_value(op, not statically_known_true(self.keys >= LIMIT_32), f"{self.keys} keys a sequence, of which 2^31 - 1 fit")
        group = self.query.shape[1] // self.key.shape[1]
        for name, tensor, rows in (("query", self.query, group * self.query.stride(1)), ("key", self.key, 128 * self.key.stride(2))):
            check_value(op, not statically_known_true(rows >= LIMIT_32), f"the rows of {name} lie too far apart: {list(tensor.stride())}")


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Of the first three dimensions; 0 where there is nothing to step over."""
    if tensor is None:
        return 0, 0, 0
    batch, head, token = (0 if size == 1 else stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3]))
    return batch, head, token


def _operand(tensor: Tensor | None) -> Tensor | None:
    """What is multiplied, dense; in fp32 for Triton's interpreter, which is all that runs on a CPU: its products of bfloat16 are wrong."""
    wide = tensor is not None and tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16
    return _dense(tensor.float() if tensor is not None and wide else tensor)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor if its rows are in one piece each, else a copy."""
    return tensor if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _as_mask(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """A mask as [B, N, Sq, Skv] with strides of 0 where it is broadcast, dense along the keys; bool as int8."""
    if sizes[3] > 1 and (mask.shape[-1] == 1 or mask.stride(-1) != 1):
        mask = mask.expand(*mask.shape[:-1], sizes[3]).contiguous()
    return (mask.view(torch.int8) if mask.dtype == torch.bool else mask).expand(sizes)


@triton_op(
    "(Tensor query, Tensor key, Tensor? value, *, float scale, Tensor? query_rope=None, Tensor? key_rope=None, Tensor? mask=None, "
    "Tensor? bounds=None, bool is_causal=False, SymInt causal_offset=0, bool from_end=False, SymInt window=0, float softcap=0.0, "
    "Tensor? sinks=None, Tensor? kv_lengths=None, Tensor? block_table=None, ScalarType? out_dtype=None, int cores) -> Tensor"
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    scale: float,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    mask: Tensor | None = None,
    bounds: Tensor | None = None,
    is_causal: bool = False,
    causal_offset: int = 0,
    from_end: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    """`npu_fusion::attention`, and `mla_attention` with the keys as they are or latent: one launch, or two where the keys are split.

    Args:
        query: [B, N, Sq, D], fp16, bf16 or fp32.
        key: [B, Nkv, Skv, D]; with `block_table` [pages, Nkv, page_size, D]. A cache [pages, page_size, Nkv, D] is given as a view.
        value: [B, Nkv, Skv, Dv], or in pages like `key`; None: the values are the keys (the latent of absorbed MLA), which are read once.
            D and Dv are at most 256, without `value` 512.
        scale: multiplies the logits.
        query_rope: [B, N, Sq, Dr], and key_rope: [B, Nkv or 1, Skv, Dr] or in pages: their products are part of the logits.
        mask: as in `npu_fusion::attention`; bool, fp16, bf16 or fp32.
        bounds: [B or 1, Sq or 1, 2] int32, by `mask_bounds` of the mask: keys outside are not read.
        is_causal, causal_offset, window, softcap, sinks, kv_lengths, block_table: as there.
        from_end: each sequence's last query lies at its last key: the offset is `kv_lengths[b] - Sq` in place of `causal_offset`.
        out_dtype: dtype of the result; None is that of the query.
        cores: matrix cores of the device.

    Returns:
        [B, N, Sq, Dv] in `out_dtype`, stored as a contiguous [B, Sq, N, Dv]; zeros for a query that sees no key.

    Rounding: fp32 inside; the softmax weights are rounded to the dtype of the values, as torch's kernels do, and the result once.

    Rows of a tensor are read where they lie if each is in one piece; of another a copy is made first.

    Raises:
        TypeError: a dtype is wrong, or query, key and value differ in theirs.
        ValueError: a size does not fit, something that an argument needs is absent, or tensors lie on several devices.
    """
    call = _Call(query, key, value, query_rope, key_rope, mask, bounds, sinks, kv_lengths, block_table)
    call.check(from_end=from_end, window=window, softcap=softcap, out_dtype=out_dtype, cores=cores)
    batch, heads, queries, width = query.shape
    values = call.values
    out = empty_token_major(query, batch, heads, queries, values.shape[3], out_dtype or query.dtype)
    if out.numel() == 0:
        return out
    query, key, values, query_rope = (_operand(tensor) for tensor in (query, key, values, query_rope))  # type: ignore[assignment]
    key_rope = _operand(key_rope)
    masks = None if mask is None else _as_mask(mask, (batch, heads, queries, call.keys))
    mask_strides = _strides(masks)
    bound_strides = _strides(None if bounds is None else bounds.contiguous())
    sizes = kernels.Sizes(
        batch,
        key.shape[1],
        heads // key.shape[1],
        queries,
        call.keys,
        width,
        values.shape[3],
        rope_width=0 if query_rope is None else query_rope.shape[3],
        page=0 if block_table is None else key.shape[2],
        itemsize=query.element_size(),
    )
    walk, combine = kernels.attention_launch(
        sizes,
        device_for(query, cores),
        latent=value is None,
        causal=is_causal,
        from_end=from_end,
        window=window > 0,
        softcap=softcap > 0,
        keys_only=mask is not None and mask_strides[1:] == (0, 0),
        additive=mask is not None and mask.dtype != torch.bool,
    )
    splits = walk.constants["SPLITS"]
    parts = sums = tops = None
    if combine is not None:
        parts = query.new_empty((batch, queries, heads, splits, values.shape[3]), dtype=torch.float32)
        sums, tops = query.new_empty((2, batch, queries, heads, splits), dtype=torch.float32)
    shared = {
        "bounds_ptr": None if bounds is None else bounds.contiguous(),
        "sinks_ptr": None if sinks is None else sinks.contiguous(),
        "lengths_ptr": None if kv_lengths is None else kv_lengths.contiguous(),
        "sums_ptr": sums,
        "tops_ptr": tops,
        "queries": queries,
        "keys": call.keys,
        "causal_offset": causal_offset,
        "window": window,
        "bounds_b": bound_strides[0],
        "bounds_q": bound_strides[1],
    }
    table = None if block_table is None else _dense(block_table)
    launch(
        walk,
        query,
        q_ptr=query,
        q_rope_ptr=query_rope,
        k_ptr=key,
        k_rope_ptr=key_rope,
        v_ptr=values,
        mask_ptr=masks,
        table_ptr=table,
        out_ptr=out if parts is None else parts,
        batches=batch,
        kv_heads=key.shape[1],
        token_tiles=-(-queries // walk.constants["TOKENS"]),
        scale=scale,
        softcap=softcap,
        **_named("q", _strides(query)),
        **_named("qr", _strides(query_rope)),
        **_named("k", _strides(key)),
        **_named("kr", _strides(key_rope)),
        **_named("v", _strides(values)),
        **_named("mask", mask_strides),
        table_b=0 if table is None else table.stride(0),
        **shared,
    )
    if combine is not None:
        launch(combine, query, parts_ptr=parts, out_ptr=out, rows=batch * queries * heads, heads=heads, **shared)
    return out


def _named(name: str, strides: tuple[int, int, int]) -> dict[str, int]:
    return {f"{name}_{of}": stride for of, stride in zip("bht", strides)}


@attention.fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    scale: float,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    mask: Tensor | None = None,
    bounds: Tensor | None = None,
    is_causal: bool = False,
    causal_offset: Size = 0,
    from_end: bool = False,
    window: Size = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    call = _Call(query, key, value, query_rope, key_rope, mask, bounds, sinks, kv_lengths, block_table)
    call.check(from_end=from_end, window=window, softcap=softcap, out_dtype=out_dtype, cores=cores)
    batch, heads, queries, _ = query.shape
    return empty_token_major(query, batch, heads, queries, call.values.shape[3], out_dtype or query.dtype)


@triton_op("(Tensor mask, *, int cores) -> Tensor")
def mask_bounds(mask: Tensor, *, cores: int) -> Tensor:
    """From which key to before which a mask shows any, for each query: so that attention reads no more of a cache than it needs.

    Args:
        mask: [..., Sq, Skv] of rank 2 to 4, [B, N, Sq, Skv] with sizes of 1 where it is broadcast: bool (True shows), or fp16, bf16 or fp32
            that is added to logits, where numbers down from -1e9 (or the lowest of the dtype) hide. All N heads of a query count as one.
        cores: vector cores of the device.

    Returns:
        [B, Sq, 2] int32, contiguous; `(0, Skv)` where an added mask hides every key, for then all have the same weight,
        and an empty range, (2^31 - 1, 0), where a bool one does.

    Rounding: none.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong rank, a device without kernels, or 2^31 keys or more.
    """
    bounds = _empty_bounds(mask, cores)
    if bounds.numel() == 0:
        return bounds
    masks = mask[(None,) * (4 - mask.dim())]
    masks = masks if masks.shape[3] <= 1 or masks.stride(3) == 1 else masks.contiguous()
    additive = mask.dtype != torch.bool
    batch, heads, queries, keys = masks.shape
    launch(
        kernels.mask_bounds_launch(batch * queries, keys, device_for(mask, cores), additive=additive),
        mask,
        mask_ptr=masks if additive else masks.view(torch.int8),
        bounds_ptr=bounds,
        rows=batch * queries,
        queries=queries,
        heads=heads,
        keys=keys,
        **_named("mask", _strides(masks)),
        hidden=max(LOWEST_BIAS, torch.finfo(mask.dtype).min) if additive else 0.0,
    )
    return bounds


def _empty_bounds(mask: Tensor, cores: int) -> Tensor:
    op = "mask_bounds"
    check_dtypes(op, (torch.bool, *FLOATS), mask=mask)
    check_together(op, mask=mask)
    check_value(op, 2 <= mask.dim() <= 4, f"mask must have 2 to 4 dimensions, not {mask.dim()}")
    check_value(op, not statically_known_true(mask.shape[-1] >= LIMIT_32), f"{mask.shape[-1]} keys, of which 2^31 - 1 fit")
    check_cores(op, cores)
    return mask.new_empty((mask.shape[0] if mask.dim() == 4 else 1, mask.shape[-2], 2), dtype=torch.int32)


@mask_bounds.fake
def _(mask: Tensor, *, cores: int) -> Tensor:
    return _empty_bounds(mask, cores)
