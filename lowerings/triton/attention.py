"""Attention on CUDA: the op sdpa, by torch's own kernels, and the providers of `attention` and `mla_attention`.

Where a call is what torch's scaled_dot_product_attention computes without a mask tensor, and asks many queries, that is left to it. What it
has no fused kernel for goes to `decode_attention.py`: grouped heads with a mask, windows, softcap, sinks, lengths, pages, and few queries
over many keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.attention.bias
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...lower import Arguments, Builder
from ...ops._common import (
    check_choice,
    check_rank,
    check_same_dtype,
    check_sizes,
    check_value,
    empty_token_major,
    known_different,
    token_major,
)
from .checks import FLOATS, HALVES, check_dtypes, check_together
from .decode_attention import LARGEST_LATENT, LARGEST_WIDTH, attention, mask_bounds
from .define import triton_op
from .provide import provides

FEW_QUERIES = 64  # rows of a tile (queries times heads of a group) up to which reading the keys takes longer than computing with them


@triton_op("(Tensor query, Tensor key, Tensor value, *, float scale, str causal='none') -> Tensor")
def sdpa(query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: str = "none") -> Tensor:
    """`npu_fusion::attention` without a mask tensor by torch's fused kernels (flash, cuDNN, memory-efficient), whichever it takes.

    Args:
        query: [B, N, Sq, D], fp16, bf16 or fp32.
        key: [B, Nkv, Skv, D], Nkv dividing N.
        value: [B, Nkv, Skv, Dv].
        scale: multiplies the logits.
        causal: none; upper_left: key j is visible to query i if j <= i; lower_right: if j <= i + Skv - Sq, which needs Skv >= Sq.

    Returns:
        [B, N, Sq, Dv] stored as a contiguous [B, Sq, N, Dv].

    Rounding: as torch's: fp32 inside, the softmax weights of 16-bit inputs rounded to 16 bits.

    Raises:
        TypeError: a dtype is none of the three, or they differ.
        ValueError: a size or device does not fit.
    """
    _check_sdpa(query, key, value, causal)
    batch, heads, queries, _ = query.shape
    if key.shape[2] == 0 or batch * heads * queries * value.shape[3] == 0:
        return empty_token_major(query, batch, heads, queries, value.shape[3], query.dtype).zero_()
    if causal == "upper_left" and key.shape[2] > queries:  # nobody sees the rest, and torch's fastest kernel wants a square
        key, value = key[:, :, :queries], value[:, :, :queries]
    lower_right = causal == "lower_right" and key.shape[2] != queries
    bias = torch.nn.attention.bias.causal_lower_right(queries, key.shape[2]) if lower_right and queries > 1 else None
    square = causal != "none" and not lower_right
    grouped = heads != key.shape[1]
    attend = torch.nn.functional.scaled_dot_product_attention
    return token_major(attend(query, key, value, attn_mask=bias, is_causal=square, scale=scale, enable_gqa=grouped))


def _check_sdpa(query: Tensor, key: Tensor, value: Tensor, causal: str) -> None:
    op = "sdpa"
    check_dtypes(op, FLOATS, query=query, key=key, value=value)
    check_same_dtype(op, query=query, key=key, value=value)
    check_rank(op, 4, query=query, key=key, value=value)
    check_together(op, query=query, key=key, value=value)
    check_choice(op, "causal", causal, ("none", "upper_left", "lower_right"))
    batch, heads, queries, width = query.shape
    check_sizes(op, "key", key.shape, (batch, key.shape[1], key.shape[2], width))
    check_sizes(op, "value", value.shape, (*key.shape[:3], value.shape[3]))
    check_value(op, not known_different(heads % key.shape[1], 0), f"{key.shape[1]} key heads do not divide {heads} query heads")
    fits = causal != "lower_right" or not statically_known_true(key.shape[2] < queries)
    check_value(op, fits, f"lower_right needs no fewer keys than queries, {queries}, not {key.shape[2]}")


@sdpa.fake
def _(query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: str = "none") -> Tensor:
    _check_sdpa(query, key, value, causal)
    return empty_token_major(query, query.shape[0], query.shape[1], query.shape[2], value.shape[3], query.dtype)


# -------------------------------------------------------------------- providers


def _tensors(b: Builder, dtypes: tuple[torch.dtype, ...], **tensors: Node | None) -> None:
    """Refuse dtypes that the kernels do not take."""
    for name, node in tensors.items():
        b.require(node is None or b.val(node).dtype in dtypes, f"{name} is {None if node is None else b.val(node).dtype}")


def _static(b: Builder, most: int = LARGEST_WIDTH, /, **widths: Any) -> None:
    for name, width in widths.items():
        b.require(isinstance(width, int), f"{name} is symbolic: a kernel is compiled for it")
        b.require(not isinstance(width, int) or width <= most, f"{name} is {width}, and {most} at most fits")


def _is_few(b: Builder, query: Node, key: Node) -> bool:
    """Whether a call asks so few queries that it is bound by reading the keys; not where that is known at run time only."""
    sizes: list[Any] = [b.val(query).shape[1], b.val(key).shape[1], b.val(query).shape[2]]
    if not all(isinstance(size, int) for size in sizes):
        return False
    heads, kv_heads, queries = sizes
    few: bool = queries * (heads // kv_heads) <= FEW_QUERIES
    return few


def _takes_time(b: Builder, query: Node, key: Node) -> None:
    """Many queries in fp32 have no matrix unit here: torch's own kernels are no slower."""
    few = _is_few(b, query, key)
    b.require(few or b.val(query).dtype in HALVES, "for many queries it takes fp16 and bf16, whose products a matrix unit computes")


@provides("attention", "sdpa", rank=-1, matrix=True)
def _sdpa(b: Builder, a: Arguments, cores: int) -> Node:
    """Many queries, and no more than causality that is aligned to a corner: torch's kernels are made for these."""
    b.only_if(b.config.target == "cuda" and not _is_few(b, a.query, a.key))
    plain = a.mask is None and a.kv_lengths is None and a.block_table is None and a.sinks is None and a.softcap == 0
    b.only_if(plain and isinstance(a.window, int) and a.window == 0 and isinstance(a.scale, (int, float)))
    _tensors(b, FLOATS, query=a.query, key=a.key, value=a.value)
    causal = "none"
    if a.is_causal:
        shift = b.val(a.key).shape[2] - b.val(a.query).shape[2]
        upper_left = b.equal(a.causal_offset, 0)
        b.only_if(upper_left or (b.equal(a.causal_offset, shift) and b.at_least(a.causal_offset, 0)))
        causal = "upper_left" if upper_left else "lower_right"
    result = b.emit(sdpa.overload, a.query, a.key, a.value, scale=a.scale, causal=causal)
    return result if a.out_dtype is None else b.cast(result, a.out_dtype)


@provides("attention", "triton.attention", matrix=True, launches=2)
def _attention(b: Builder, a: Arguments, cores: int) -> Node:
    _tensors(b, FLOATS, query=a.query, key=a.key, value=a.value, sinks=a.sinks)
    _tensors(b, (torch.bool, *FLOATS), mask=a.mask)
    b.require(isinstance(a.scale, (int, float)), "its scale is a constant, the model's is known at run time only")
    _static(b, head_dim=b.val(a.query).shape[3], value_dim=b.val(a.value).shape[3])
    b.require(a.block_table is None or isinstance(b.val(a.key).shape[2], int), "page_size is symbolic: a kernel is compiled for it")
    _takes_time(b, a.query, a.key)
    keeps_weights = (a.sinks is not None or a.softcap > 0) and b.val(a.query).dtype in HALVES
    b.require(not keeps_weights or b.config.rounding != "exact", "it rounds the softmax to 16 bits: rounding is 'exact'")
    structure = {"is_causal": a.is_causal, "causal_offset": a.causal_offset, "window": a.window}
    keys = {"sinks": a.sinks, "kv_lengths": a.kv_lengths, "block_table": a.block_table}
    form = {"softcap": a.softcap, "out_dtype": a.out_dtype, "scale": a.scale, "cores": cores}
    return b.emit(attention.overload, a.query, a.key, a.value, **_masking(b, a.mask, cores), **structure, **keys, **form)


def _masking(b: Builder, mask: Node | None, cores: int) -> dict[str, Node | None]:
    """A mask and its bounds, which are found once for all layers that have it."""
    bounded = mask is not None and b.val(mask).dim() <= 4
    return {"mask": mask, "bounds": b.emit(mask_bounds.overload, mask, cores=cores) if bounded else None}


@provides("mla_attention", "triton.attention", matrix=True, launches=2)
def _mla_attention(b: Builder, a: Arguments, cores: int) -> Node:
    """The parts of queries and keys as they are, without joining them, and the keys' positions once for all heads.

    A latent that is keys and values at once is read once.
    """
    value = None if a.value is a.k_nope else a.value
    _tensors(b, FLOATS, q_nope=a.q_nope, q_rope=a.q_rope, k_nope=a.k_nope, k_rope=a.k_rope, value=a.value)
    _tensors(b, (torch.bool, *FLOATS), mask=a.mask)
    b.require(isinstance(a.scale, (int, float)), "its scale is a constant, the model's is known at run time only")
    widths = (b.val(part).shape[3] for part in (a.q_nope, a.q_rope, a.value))
    most = LARGEST_LATENT if value is None else LARGEST_WIDTH
    _static(b, most, **dict(zip(("nope_dim", "rope_dim", "value_dim"), widths)))
    _takes_time(b, a.q_nope, a.k_nope)
    ropes = {"query_rope": a.q_rope, "key_rope": a.k_rope}
    structure = {"is_causal": a.is_causal, "causal_offset": a.causal_offset}
    masking = _masking(b, a.mask, cores)
    return b.emit(attention.overload, a.q_nope, a.k_nope, value, scale=a.scale, **ropes, **masking, **structure, cores=cores)
