"""CPU kernels of npu_fusion_attention, versions 1, 2 and 3; what happens inside is in train_attention.py.

Source: op-plugin docs and adapters (`FlashAttention*KernelNpuOpApi.cpp`). `gen_mask_parallel` and `sync` say when the operator makes its
dropout mask, and change no result. `seed` and `offset` are returned as they were given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import check, check_dtype, emulates, refuse
from .core import ALL_TOKENS, is_packed, shape_in, sizes_in
from .train import LAYOUTS, STATISTICS, FusionAttention, kv_heads_of

Results = tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]


def _check_layout(op: str, head_num: int, input_layout: str) -> None:
    check(op, head_num > 0, f"head_num must > 0, but got {head_num}")
    allowed = "/".join(LAYOUTS)
    check(op, input_layout in LAYOUTS, f"The input_layout should be {allowed}(case-insensitive), but got {input_layout}")


def _fake(op: str, query: Tensor, key: Tensor, value: Tensor, head_num: int, layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = layout.upper()
    _check_layout(op, head_num, layout)
    sizes = sizes_in(layout, query, head_num)
    width = value.shape[-1] // kv_heads_of(layout, key, sizes) if layout.endswith("H") else value.shape[-1]
    rows = [sizes.tokens, sizes.heads] if is_packed(layout) else [sizes.batch, head_num, sizes.tokens]
    maximum, total = (query.new_empty((*rows, STATISTICS), dtype=torch.float32) for _ in range(2))
    return query.new_empty(shape_in(layout, sizes._replace(width=width))), maximum, total, query.new_empty(0)


# -------------------------------------------------------------------- npu_fusion_attention


@emulates("npu::npu_fusion_attention")
def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = ALL_TOKENS,
    next_tockens: int = ALL_TOKENS,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> Results:
    """`dropout(softmax(scale * (query @ key^T + pse), masked)) @ value`.

    Returns the output, maximum and sum of the softmax (fp32, [B, N, S, 8], [T, N, 8] where tokens are packed), an empty tensor, seed and
    offset, and the number of scores.
    """
    op = "npu_fusion_attention"
    refuse(op, padding_mask=padding_mask)
    _check_layout(op, head_num, input_layout.upper())
    attention = FusionAttention(
        op,
        query,
        key,
        value,
        head_num,
        input_layout.upper(),
        pse,
        atten_mask,
        scale,
        keep_prob,
        pre_tockens,
        next_tockens,
        inner_precise,
        prefix,
        actual_seq_qlen,
        actual_seq_kvlen,
        sparse_mode,
        softmax_layout,
        sink,
        dropout_mask=dropout_mask,
    )
    return *attention.run(), seed, offset, attention.scores


@npu_fusion_attention.fake
def _(query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *_args: object, **_kwargs: object) -> Results:
    return *_fake("npu_fusion_attention", query, key, value, head_num, input_layout), 0, 0, 0


# -------------------------------------------------------------------- npu_fusion_attention_v2


def _start(op: str, name: str, index: Sequence[int] | None) -> int:
    check(op, index is None or len(index) == 1, f"{name} must have 1 entry")
    return int(index[0]) if index else 0


@emulates("npu::npu_fusion_attention_v2")
def npu_fusion_attention_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = ALL_TOKENS,
    next_tokens: int = ALL_TOKENS,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Sequence[int] | None = None,
    kv_start_idx: Sequence[int] | None = None,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> Results:
    """As npu_fusion_attention, with position biases of four types, and rope parts beside query and key.

    `pse_type` 0 adds pse after the scale, 1 before it. With 2 and 3 pse holds slopes, fp32 [N] or [B, N], and -slope times the distance, or
    its square root, is added after the scale; `q_start_idx` and `kv_start_idx` are the positions of the first query and key.
    """
    op = "npu_fusion_attention_v2"
    refuse(op, padding_mask=padding_mask)
    _check_layout(op, head_num, input_layout.upper())
    attention = FusionAttention(
        op,
        query,
        key,
        value,
        head_num,
        input_layout.upper(),
        pse,
        atten_mask,
        scale,
        keep_prob,
        pre_tokens,
        next_tokens,
        inner_precise,
        prefix,
        actual_seq_qlen,
        actual_seq_kvlen,
        sparse_mode,
        softmax_layout,
        sink,
        dropout_mask=dropout_mask,
        pse_type=pse_type,
        starts=(_start(op, "q_start_idx", q_start_idx), _start(op, "kv_start_idx", kv_start_idx)),
        query_rope=query_rope,
        key_rope=key_rope,
    )
    return *attention.run(), seed, offset, attention.scores


@npu_fusion_attention_v2.fake
def _(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *, seed: int = 0, offset: int = 0, **_rest: object
) -> Results:
    return *_fake("npu_fusion_attention_v2", query, key, value, head_num, input_layout), seed, offset, 0


# -------------------------------------------------------------------- npu_fusion_attention_v3


def _length_list(op: str, name: str, lengths: Tensor | None) -> list[int] | None:
    if lengths is None:
        return None
    check_dtype(op, name, lengths, torch.int64, torch.int32)
    check(op, lengths.dim() == 1, f"{name} must have 1 dimension, not {lengths.dim()}")
    return [int(length) for length in lengths.tolist()]


@emulates("npu::npu_fusion_attention_v3")
def npu_fusion_attention_v3(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = ALL_TOKENS,
    next_tockens: int = ALL_TOKENS,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Tensor | None = None,
    actual_seq_kvlen: Tensor | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As npu_fusion_attention, with lengths in tensors; returns the four tensors, and seed and offset as int64 tensors [1]."""
    op = "npu_fusion_attention_v3"
    refuse(op, padding_mask=padding_mask)
    _check_layout(op, head_num, input_layout.upper())
    attention = FusionAttention(
        op,
        query,
        key,
        value,
        head_num,
        input_layout.upper(),
        pse,
        atten_mask,
        scale,
        keep_prob,
        pre_tockens,
        next_tockens,
        inner_precise,
        prefix,
        _length_list(op, "actual_seq_qlen", actual_seq_qlen),
        _length_list(op, "actual_seq_kvlen", actual_seq_kvlen),
        sparse_mode,
        softmax_layout,
        sink,
    )
    return *attention.run(), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)


@npu_fusion_attention_v3.fake
def _(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *_args: object, **_kwargs: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    seed, offset = (query.new_empty(1, dtype=torch.int64) for _ in range(2))
    return *_fake("npu_fusion_attention_v3", query, key, value, head_num, input_layout), seed, offset
