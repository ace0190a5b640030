"""CPU kernels of npu_fused_infer_attention_score (FIA), both versions.

Source: op-plugin docs and adapters (`FusedInferAttentionScore*KernelNpuOpApi.cpp`); what happens inside is in infer_attention.py.

Keys and values may be int8, or int4 in int32, with scales of their own. Queries must be fp16 or bf16: attention of int8 queries, and the
arguments that only it has, are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import check, check_dtype, emulates, refuse
from .core import ALL_TOKENS, Sizes, from_bnsd, is_packed, shape_in, sizes_in
from .infer import SPARSE_MODES, TREE, Inference, Names, Paddings, Prefix
from .key_value import Paging, Scales, quantise

_LAYOUTS = ("BSH", "BSND", "BNSD", "TND", "NTD", "NSD")
_CHANGES = ("BNSD_BSND", "BSH_BNSD", "BSND_BNSD", "NTD_TND", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD", "TND_NTD")


class Layouts(NamedTuple):
    """How query, key and value are laid out, and how the output is."""

    query: str
    output: str


def layouts_of(op: str, input_layout: str, allowed: Sequence[str] = (*_LAYOUTS, *_CHANGES)) -> Layouts:
    """The layouts that `input_layout` names: one for all, or that of the operands and that of the output around an underscore."""
    check(op, input_layout in allowed, f"input_layout must be one of {', '.join(allowed)}, not {input_layout!r}")
    query, _, output = input_layout.partition("_")
    return Layouts(query, output or query)


def _scales(op: str, name: str, scale: Tensor | None, offset: Tensor | None, mode: int) -> Scales | None:
    check(op, scale is not None or offset is None, f"{name} is required beside its offset")
    return None if scale is None else Scales(scale, offset, mode, name)


def _check_scales(op: str, key: Scales | None, value: Scales | None, queries: int) -> None:
    check(op, (key is None) == (value is None), "the scales of key and value must be given together")
    if key is None or value is None:
        return
    same = key.mode == value.mode or (key.mode == 0 and value.mode == 1)
    check(op, same, f"key and value must be quantised alike, not with modes {key.mode} and {value.mode}")
    modes = range(6) if queries == 1 else range(2)
    check(op, key.mode in modes, f"the mode of {key.name} must be within 0 and {modes[-1]} for {queries} queries, not {key.mode}")
    check(op, (key.offset is None) == (value.offset is None), "the offsets of key and value must be given together")


def combined_scales(op: str, scale: Tensor, offset: Tensor | None, mode: int) -> tuple[Scales, Scales]:
    """antiquant_scale holds the scales of the keys, then those of the values."""
    check(op, mode in (0, 1), f"antiquant_mode must be 0 or 1, not {mode}")
    check(op, scale.dim() > 0 and scale.shape[0] == 2, f"the first dimension of antiquant_scale must be 2, not {list(scale.shape)}")
    check(op, offset is None or offset.shape == scale.shape, "antiquant_offset must have the shape of antiquant_scale")
    key, value = (Scales(scale[i], None if offset is None else offset[i], mode, "antiquant_scale") for i in range(2))
    return key, value


def paging_of(op: str, table: Tensor | None, block_size: int) -> Paging | None:
    """The paging of keys and values, if they have a block table."""
    check(op, table is not None or block_size == 0, f"block_size={block_size} needs block_table")
    return None if table is None else Paging(table, block_size)


def padding_of(op: str, name: str, size: Tensor | None) -> int | None:
    """The tokens of padding that a tensor [1] holds."""
    if size is None:
        return None
    check_dtype(op, name, size, torch.int64)
    check(op, size.shape == (1,), f"{name} must have shape [1], not {list(size.shape)}")
    return int(size)


def _outputs(
    inference: Inference, *, lse: bool, scale: Tensor | None = None, offset: Tensor | None = None, scale_name: str = ""
) -> tuple[Tensor, Tensor]:
    """Run, quantise the output if it has a scale, and lay the results out."""
    op, query = inference.op, inference.query
    check(op, scale is not None or offset is None, f"{scale_name} is required beside its offset")
    if scale is not None:
        check(op, not inference.packed and inference.query_rope is None, f"{scale_name} is not supported with packed tokens or query_rope")
    latent = inference.query_rope is not None and inference.sizes.width == 512
    check(op, not (lse and latent), "the log-sum-exp is not returned with query_rope and head dimension 512")
    output, sums = inference.run()
    out = output.to(query.dtype) if scale is None else quantise(op, output, scale, offset, scale_name, query.dtype)
    if not lse:
        return from_bnsd(out, inference.output_layout), query.new_empty(0, dtype=torch.float32)
    laid_out = from_bnsd(sums.unsqueeze(-1), "TND" if inference.packed else "BNSD")
    return from_bnsd(out, inference.output_layout), laid_out


def _fake_outputs(
    op: str, query: Tensor, value: Tensor, input_layout: str, heads: int, kv_heads: int, *, paged: bool, int8: bool, lse: bool
) -> tuple[Tensor, Tensor]:
    check(op, heads > 0, f"the number of heads must be positive, not {heads}")
    layouts = layouts_of(op, input_layout)
    sizes = sizes_in(layouts.query, query, heads)
    width = sizes._replace(width=_value_width(layouts.query, value, kv_heads or heads, paged))
    out = query.new_empty(shape_in(layouts.output, width), dtype=torch.int8 if int8 else query.dtype)
    one = Sizes(sizes.batch, sizes.heads, sizes.tokens, 1)
    shape = shape_in("TND" if is_packed(layouts.query) else "BNSD", one) if lse else [0]
    return out, query.new_empty(shape, dtype=torch.float32)


def _value_width(layout: str, value: Tensor, kv_heads: int, paged: bool) -> int:
    width = value.shape[-1]
    if paged and value.dim() == 5:
        width = value.shape[2] * width
    elif value.dim() == 3 and (paged or layout == "BSH"):
        width = width // kv_heads
    return width * 8 if value.dtype == torch.int32 else width


# -------------------------------------------------------------------- npu_fused_infer_attention_score


@emulates("npu::npu_fused_infer_attention_score")
def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    key_shared_prefix: Tensor | None = None,
    value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: Sequence[int] | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = ALL_TOKENS,
    next_tokens: int = ALL_TOKENS,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:
    """`softmax(scale * query @ key^T + pse_shift, masked) @ value`; returns it and, if asked, the log-sum-exp of each row in fp32.

    The log-sum-exp is [B, N, S, 1], [T, N, 1] where tokens are packed, and of shape [0] unless `softmax_lse_flag`. `quant_scale2` makes
    the output int8. The mask hides a key where it is not 0.
    """
    op = "npu_fused_infer_attention_score"
    refuse(op, dequant_scale1=dequant_scale1, quant_scale1=quant_scale1, dequant_scale2=dequant_scale2)
    refuse(op, key_rope_antiquant_scale=key_rope_antiquant_scale)
    layouts = layouts_of(op, input_layout)
    paddings = Paddings(padding_of(op, "query_padding_size", query_padding_size), padding_of(op, "kv_padding_size", kv_padding_size))
    inference = Inference(
        op,
        Names("num_heads", "num_key_value_heads", "actual_seq_lengths", "actual_seq_lengths_kv"),
        query,
        key,
        value,
        *layouts,
        num_heads,
        num_key_value_heads or num_heads,
        scale,
        query_lengths=actual_seq_lengths,
        key_lengths=actual_seq_lengths_kv,
        pse=pse_shift,
        mask=atten_mask,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        inner_precise=inner_precise,
        paging=paging_of(op, block_table, block_size),
        query_rope=query_rope,
        key_rope=key_rope,
        prefix=_prefix(op, key_shared_prefix, value_shared_prefix, actual_shared_prefix_len),
        paddings=paddings,
    )
    key_scales = _scales(op, "key_antiquant_scale", key_antiquant_scale, key_antiquant_offset, key_antiquant_mode)
    value_scales = _scales(op, "value_antiquant_scale", value_antiquant_scale, value_antiquant_offset, value_antiquant_mode)
    if antiquant_scale is not None:
        check(op, key_scales is None and value_scales is None, "antiquant_scale is not allowed beside key_antiquant_scale")
        key_scales, value_scales = combined_scales(op, antiquant_scale, antiquant_offset, antiquant_mode)
    else:
        check(op, antiquant_offset is None, "antiquant_offset needs antiquant_scale")
        check(op, antiquant_mode == 0, "antiquant_mode needs antiquant_scale")
    if key_scales is None:
        check(op, key_antiquant_mode == value_antiquant_mode == 0, "key_antiquant_mode and value_antiquant_mode need scales")
    _check_scales(op, key_scales, value_scales, inference.sizes.tokens)
    inference = replace(inference, key_scales=key_scales, value_scales=value_scales)
    return _outputs(inference, lse=softmax_lse_flag, scale=quant_scale2, offset=quant_offset2, scale_name="quant_scale2")


def _prefix(op: str, key: Tensor | None, value: Tensor | None, lengths: Sequence[int] | None) -> Prefix | None:
    check(op, (key is None) == (value is None), "key_shared_prefix and value_shared_prefix must be given together")
    if key is None or value is None:
        check(op, lengths is None, "actual_shared_prefix_len needs key_shared_prefix")
        return None
    check(op, lengths is None or len(lengths) == 1, "actual_shared_prefix_len must have 1 entry")
    return Prefix(key, value, None if lengths is None else int(lengths[0]))


@npu_fused_infer_attention_score.fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    quant_scale2: Tensor | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    softmax_lse_flag: bool = False,
    **_rest: object,
) -> tuple[Tensor, Tensor]:
    return _fake_outputs(
        "npu_fused_infer_attention_score",
        query,
        value,
        input_layout,
        num_heads,
        num_key_value_heads,
        paged=block_table is not None,
        int8=quant_scale2 is not None,
        lse=softmax_lse_flag,
    )


# -------------------------------------------------------------------- npu_fused_infer_attention_score_v2


@emulates("npu::npu_fused_infer_attention_score_v2")
def npu_fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    dequant_scale_query: Tensor | None = None,
    dequant_scale_key: Tensor | None = None,
    dequant_offset_key: Tensor | None = None,
    dequant_scale_value: Tensor | None = None,
    dequant_offset_value: Tensor | None = None,
    dequant_scale_key_rope: Tensor | None = None,
    quant_scale_out: Tensor | None = None,
    quant_offset_out: Tensor | None = None,
    quant_scale_p: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = ALL_TOKENS,
    next_tokens: int = ALL_TOKENS,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    query_quant_mode: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    query_dtype: int | None = None,
    key_dtype: int | None = None,
    value_dtype: int | None = None,
    query_rope_dtype: int | None = None,
    key_rope_dtype: int | None = None,
    key_shared_prefix_dtype: int | None = None,
    value_shared_prefix_dtype: int | None = None,
    dequant_scale_query_dtype: int | None = None,
    dequant_scale_key_dtype: int | None = None,
    dequant_scale_value_dtype: int | None = None,
    dequant_scale_key_rope_dtype: int | None = None,
    out_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As npu_fused_infer_attention_score, with other names, without prefix and padding on the left, with sinks.

    `learnable_sink`, bf16 [N], adds exp(sink) to the sum of each row's softmax. With `sparse_mode` 9 the mask is a tree, [B, S, S], or for
    packed tokens the tree of each sequence flattened; it hides keys among the last S ones.
    """
    op = "npu_fused_infer_attention_score_v2"
    refuse(op, dequant_scale_query=dequant_scale_query, dequant_scale_key_rope=dequant_scale_key_rope, quant_scale_p=quant_scale_p)
    refuse(op, query_dtype=query_dtype, key_dtype=key_dtype, value_dtype=value_dtype, out_dtype=out_dtype)
    refuse(op, query_rope_dtype=query_rope_dtype, key_rope_dtype=key_rope_dtype, dequant_scale_key_rope_dtype=dequant_scale_key_rope_dtype)
    refuse(op, key_shared_prefix_dtype=key_shared_prefix_dtype, value_shared_prefix_dtype=value_shared_prefix_dtype)
    refuse(op, dequant_scale_query_dtype=dequant_scale_query_dtype, dequant_scale_key_dtype=dequant_scale_key_dtype)
    refuse(op, dequant_scale_value_dtype=dequant_scale_value_dtype)
    check(op, query_quant_mode == 0, f"the CPU kernel does not support query_quant_mode={query_quant_mode}; leave it out")
    layouts = layouts_of(op, input_layout)
    key_scales = _scales(op, "dequant_scale_key", dequant_scale_key, dequant_offset_key, key_quant_mode)
    value_scales = _scales(op, "dequant_scale_value", dequant_scale_value, dequant_offset_value, value_quant_mode)
    if key_scales is None:
        check(op, key_quant_mode == value_quant_mode == 0, "key_quant_mode and value_quant_mode need scales")
    inference = Inference(
        op,
        Names("num_query_heads", "num_key_value_heads", "actual_seq_qlen", "actual_seq_kvlen"),
        query,
        key,
        value,
        *layouts,
        num_query_heads,
        num_key_value_heads or num_query_heads,
        softmax_scale,
        query_lengths=actual_seq_qlen,
        key_lengths=actual_seq_kvlen,
        pse=pse_shift,
        mask=atten_mask,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        inner_precise=inner_precise,
        paging=paging_of(op, block_table, block_size),
        key_scales=key_scales,
        value_scales=value_scales,
        query_rope=query_rope,
        key_rope=key_rope,
        sink=learnable_sink,
        sparse_modes=(*SPARSE_MODES, TREE),
    )
    _check_scales(op, key_scales, value_scales, inference.sizes.tokens)
    if learnable_sink is not None:
        check_dtype(op, "learnable_sink", learnable_sink, torch.bfloat16)
        check(op, learnable_sink.shape == (num_query_heads,), f"learnable_sink must have shape [{num_query_heads}]")
        check(op, input_layout in ("TND", "NTD_TND"), f"learnable_sink needs input_layout TND or NTD_TND, not {input_layout}")
    return _outputs(inference, lse=return_softmax_lse, scale=quant_scale_out, offset=quant_offset_out, scale_name="quant_scale_out")


@npu_fused_infer_attention_score_v2.fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_table: Tensor | None = None,
    quant_scale_out: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    input_layout: str = "BSH",
    return_softmax_lse: bool = False,
    **_rest: object,
) -> tuple[Tensor, Tensor]:
    return _fake_outputs(
        "npu_fused_infer_attention_score_v2",
        query,
        value,
        input_layout,
        num_query_heads,
        num_key_value_heads,
        paged=block_table is not None,
        int8=quant_scale_out is not None,
        lse=return_softmax_lse,
    )
