"""CPU kernels of npu_prompt_flash_attention and npu_incre_flash_attention, which the two branches of FIA came from.

Source: op-plugin docs and adapter (`FlashAttentionKernelNpuOpApi.cpp`); what happens inside is in infer_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import check, emulates, refuse
from .core import ALL_TOKENS, from_bnsd, is_packed, shape_in, sizes_in
from .fused_infer import combined_scales, layouts_of, padding_of, paging_of
from .infer import Inference, Names, Paddings
from .key_value import quantise

_PROMPT_LAYOUTS = ("BSH", "BSND", "BNSD", "NSD", "TND", "BNSD_BSND")
_INCRE_LAYOUTS = ("BSH", "BSND", "BNSD")
_HIGH_PRECISION = 10  # sparse modes from here on are those from 0 on, in high precision


def _output(inference: Inference, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    op, query = inference.op, inference.query
    check(op, scale is not None or offset is None, "quant_offset2 needs quant_scale2")
    check(op, scale is None or not inference.packed, "quant_scale2 is not supported with packed tokens")
    output, _ = inference.run()
    check(op, inference.packed or output.shape[-1] == inference.sizes.width, "key and value must have one head dimension")
    out = output.to(query.dtype) if scale is None else quantise(op, output, scale, offset, "quant_scale2", query.dtype)
    return from_bnsd(out, inference.output_layout)


@emulates("npu::npu_prompt_flash_attention")
def npu_prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    pse_shift: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    deq_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    deq_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = ALL_TOKENS,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    sparse_mode: int = 0,
) -> Tensor:
    """`softmax(scale_value * query @ key^T + pse_shift, masked) @ value` of whole prompts.

    Without a mask nothing is hidden, whatever `next_tokens` says. `quant_scale2` makes the output int8.
    """
    op = "npu_prompt_flash_attention"
    refuse(op, padding_mask=padding_mask, deq_scale1=deq_scale1, quant_scale1=quant_scale1, deq_scale2=deq_scale2)
    layouts = layouts_of(op, input_layout, _PROMPT_LAYOUTS)
    inference = Inference(
        op,
        Names("num_heads", "num_key_value_heads", "actual_seq_lengths", "actual_seq_lengths_kv"),
        query,
        key,
        value,
        *layouts,
        num_heads,
        num_key_value_heads or num_heads,
        scale_value,
        query_lengths=actual_seq_lengths,
        key_lengths=actual_seq_lengths_kv,
        pse=pse_shift,
        mask=atten_mask,
        sparse_mode=sparse_mode - _HIGH_PRECISION if sparse_mode >= _HIGH_PRECISION else sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        prompt=True,
    )
    return _output(inference, quant_scale2, quant_offset2)


@npu_prompt_flash_attention.fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    quant_scale2: Tensor | None = None,
    num_heads: int = 1,
    input_layout: str = "BSH",
    **_rest: object,
) -> Tensor:
    layouts = layouts_of("npu_prompt_flash_attention", input_layout, _PROMPT_LAYOUTS)
    if layouts.query == layouts.output and not is_packed(layouts.query):
        shape = list(query.shape)
    else:
        sizes = sizes_in(layouts.query, query, num_heads)
        shape = shape_in(layouts.output, sizes._replace(width=value.shape[-1]) if is_packed(layouts.query) else sizes)
    return query.new_empty(shape, dtype=query.dtype if quant_scale2 is None else torch.int8)


@emulates("npu::npu_incre_flash_attention")
def npu_incre_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    pse_shift: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    inner_precise: int = 1,
) -> Tensor:
    """As npu_prompt_flash_attention for one query of each sequence; `actual_seq_lengths` are the lengths of keys and values.

    `antiquant_scale` [2, ...] scales integer keys, then values, by channel.
    """
    op = "npu_incre_flash_attention"
    refuse(op, padding_mask=padding_mask, dequant_scale1=dequant_scale1, quant_scale1=quant_scale1, dequant_scale2=dequant_scale2)
    check(op, antiquant_scale is not None or antiquant_offset is None, "antiquant_offset needs antiquant_scale")
    scales = (None, None) if antiquant_scale is None else combined_scales(op, antiquant_scale, antiquant_offset, 0)
    layouts = layouts_of(op, input_layout, _INCRE_LAYOUTS)
    inference = Inference(
        op,
        Names("num_heads", "num_key_value_heads", "actual_seq_lengths", "actual_seq_lengths"),
        query,
        key,
        value,
        *layouts,
        num_heads,
        num_key_value_heads or num_heads,
        scale_value,
        key_lengths=actual_seq_lengths,
        pse=pse_shift,
        mask=atten_mask,
        inner_precise=inner_precise,
        paging=paging_of(op, block_table, block_size),
        key_scales=scales[0],
        value_scales=scales[1],
        paddings=Paddings(key=padding_of(op, "kv_padding_size", kv_padding_size)),
    )
    check(op, inference.sizes.tokens == 1, f"query must have one token of each sequence, not {inference.sizes.tokens}")
    return _output(inference, quant_scale2, quant_offset2)


@npu_incre_flash_attention.fake
def _(query: Tensor, key: Tensor, value: Tensor, *, quant_scale2: Tensor | None = None, **_rest: object) -> Tensor:
    return query.new_empty(query.shape, dtype=query.dtype if quant_scale2 is None else torch.int8)
