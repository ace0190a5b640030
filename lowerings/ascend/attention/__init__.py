"""Attention on Ascend: attention, mla_attention.

`npu_fused_infer_attention_score` (FIA) does most of it, in the layout in which the operands lie. Its second version has sinks, for packed
tokens. `npu_fusion_attention_v3` takes what FIA does not: fp32, values narrower than keys, sinks beside any mask, a mask for each head.

All of them compute logits and softmax in fp32, and round the weights of 16-bit inputs to 16 bits before the product with the values, as
torch's scaled_dot_product_attention does.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ....layout import row_major
from ....lower import Arguments, Builder
from ....view.shapes import known_equal
from ..provide import Npu, provides
from . import latent as _latent  # noqa: F401  (registers its provider)
from .bias import additive, shown_by
from .keys import filled, gathered, host_lengths
from .layout import Operands, arrange, arrange_heads_first, arrange_packed, packed, unsliced
from .mask import Masking, Structure, explicit, repeated, structural, zero_hidden_rows

aten = torch.ops.aten

FIA, FIA_V2, FUSION = "npu::npu_fused_infer_attention_score", "npu::npu_fused_infer_attention_score_v2", "npu::npu_fusion_attention_v3"
WITH_HIDDEN_ROWS = 2  # `inner_precise`: high precision, as the default 0, and zeros for rows that a mask hides as a whole


@dataclass(frozen=True)
class Call:
    """A call of `attention` or `mla_attention`, in parts that the ops understand.

    Attributes:
        operands: query, keys and values.
        scale: multiplies the logits.
        structure: causality and window.
        visible: bool mask, True shows.
        bias: mask that is added.
        lengths: [B], of the filled part of the keys, where only the device knows it.
        sinks: [N]
    """

    operands: Operands
    scale: float
    structure: Structure
    visible: Node | None = None
    bias: Node | None = None
    lengths: Node | None = None
    sinks: Node | None = None

    @property
    def is_structural(self) -> bool:
        """Whether nothing but structure hides keys, and the corner to which that is aligned is one."""
        return self.visible is None and self.lengths is None and len(self.operands.lengths) <= 1

    def masking(self, b: Builder) -> Masking:
        """Which keys are hidden, without a tensor where the ops can be told so."""
        found = structural(b, self.structure, b.val(self.operands.query).device) if self.is_structural else None
        return found or self.explicit_masking(b)

    def explicit_masking(self, b: Builder) -> Masking:
        """Which keys are hidden, as a tensor; None where none are."""
        whole = replace(self.structure, keys=b.size(self.operands.key, 2))
        return explicit(b, whole, self.visible, self.lengths, b.val(self.operands.query).device)


def _call(b: Builder, a: Arguments, operands: Operands, **others: Any) -> Call:
    """The parts of a call that its kinds have in common."""
    b.require(isinstance(a.scale, (int, float)), "its scale is a constant, the model's is known at run time only")
    visible, bias = a.mask, None
    if visible is not None and b.val(visible).dtype != torch.bool:
        visible = shown_by(b, a.mask)
        bias = a.mask if visible is None else None
    lengths = operands.lengths
    keys = lengths[0] if len(lengths) == 1 else b.size(operands.key, 2)
    structure = Structure(b.size(operands.query, 2), keys, a.is_causal, a.causal_offset)
    return Call(operands, float(a.scale), structure, visible=visible, bias=bias, **others)


def _attention_call(b: Builder, a: Arguments) -> Call:
    """A call of `attention`; keys in pages are gathered."""
    b.require(a.softcap == 0, "it has no softcap")
    operands = Operands(a.query, a.key, a.value)
    if a.block_table is not None:
        operands = Operands(a.query, gathered(b, a.key, a.block_table), gathered(b, a.value, a.block_table))
    lengths = None
    if a.kv_lengths is not None:
        operands, lengths = filled(b, operands, a.kv_lengths)
    call = _call(b, a, operands, lengths=lengths, sinks=a.sinks)
    return replace(call, structure=replace(call.structure, window=a.window))


def _mla_call(b: Builder, a: Arguments, *, heads_first: bool = False) -> Call:
    """A call of `mla_attention` as one of `attention`: the parts without and with position, one after another, [B, N, S, Dn + Dr].

    Joining them is one launch, whatever their memory layout; the result lies as [B, S, N, Dn + Dr] unless `heads_first`.
    """
    shared = [b.size(a.k_nope, dim) for dim in range(3)] + [b.val(a.k_rope).shape[3]]
    k_rope = b.emit(aten.expand.default, a.k_rope, shared)
    pairs = (a.q_nope, a.q_rope), (a.k_nope, k_rope)
    if heads_first:
        query, key = (b.emit(aten.cat.default, list(pair), -1) for pair in pairs)
    else:
        query, key = (b.transpose(b.emit(aten.cat.default, [b.transpose(x, 1, 2) for x in pair], -1), 1, 2) for pair in pairs)
    return _call(b, a, Operands(query, key, a.value))


def _with_dtype(b: Builder, a: Arguments, result: Node) -> Node:
    dtype: torch.dtype | None = a.out_dtype
    return result if dtype is None else b.cast(result, dtype)


def _keeps_weights(b: Builder, a: Arguments) -> None:
    """With sinks, a model that is followed exactly has its softmax in fp32: torch's own kernel, which rounds, knows none."""
    halves = b.val(a.query).dtype in (torch.float16, torch.bfloat16)
    b.require(a.sinks is None or not halves or b.config.rounding != "exact", "it rounds the softmax to 16 bits: rounding is 'exact'")


# -------------------------------------------------------------------- fused_infer_attention_score


@provides("attention", FIA)
def fused_infer_attention(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Grouped heads, masks, causality, window, lengths, in the layout of the operands."""
    b.require(a.sinks is None, "it has no sinks")
    return _with_dtype(b, a, _fused_infer(b, _attention_call(b, a), npu))


@provides("mla_attention", FIA)
def fused_infer_mla_attention(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Both parts of queries and keys concatenated."""
    return _fused_infer(b, _mla_call(b, a), npu)


def _fused_infer(b: Builder, call: Call, npu: Npu) -> Node:
    operands = call.operands
    one_query = known_equal(operands.sizes(b)[0], 1)
    masking = _one_query_masking(b, call) if one_query else call.masking(b)
    bias = None if call.bias is None else additive(b, call.bias, operands)
    if bias is None and (masking.hidden is None or masking.sparse_mode):
        operands = unsliced(b, operands)
    arranged = arrange(b, operands)
    heads, kv_heads = operands.heads(b)
    out, _ = npu(
        FIA,
        arranged.query,
        arranged.key,
        arranged.value,
        num_heads=heads,
        num_key_value_heads=kv_heads,
        scale=call.scale,
        input_layout=arranged.input_layout,
        **_given(
            pse_shift=None if bias is None else bias.values,
            atten_mask=_infer_mask(b, operands, masking, one_query),
            actual_seq_lengths_kv=list(operands.lengths) or None,
            inner_precise=WITH_HIDDEN_ROWS if masking.hides_rows and not one_query else None,
            **masking.sparse(),
        ),
    )
    result = arranged.restore(out)
    if one_query and masking.hides_rows and masking.hidden is not None:
        result = zero_hidden_rows(b, result, masking.hidden)
    return result if bias is None or bias.hidden is None else zero_hidden_rows(b, result, bias.hidden)


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None: the others are left at their defaults."""
    return {name: value for name, value in arguments.items() if value is not None}


def _one_query_masking(b: Builder, call: Call) -> Masking:
    """FIA reads no structure for one query: what binds is a tensor."""
    if call.is_structural and not call.structure.binds:
        return Masking()
    return call.explicit_masking(b)


def _infer_mask(b: Builder, operands: Operands, masking: Masking, one_query: bool) -> Node | None:
    """The mask as FIA takes it: the compressed one, or [B or 1, 1, Sq, Skv] in full."""
    if masking.hidden is None:
        return None
    # With one query the op reads the mask otherwise, and always one a row.
    b.require(one_query or b.at_least(b.val(operands.query).shape[2], 2), "there may be one query only, for which its masks are others")
    if masking.sparse_mode:
        return masking.hidden
    rows, heads = b.val(masking.hidden).shape[:2]
    b.require(b.equal(heads, 1), "it takes one mask for all heads, the model's differs from head to head")
    batch = 1 if b.equal(rows, 1) and not one_query else b.size(operands.query, 0)
    return repeated(b, masking.hidden, [batch, 1, b.size(operands.query, 2), b.size(operands.key, 2)])


@provides("attention", FIA, rank=-1)
def paged_attention(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Keys in pages, with lengths that the host has."""
    b.only_if(a.block_table is not None)
    b.require(a.sinks is None and a.softcap == 0, "it has no sinks and no softcap")
    lengths = host_lengths(a.kv_lengths)
    b.require(lengths is not None, "it takes lengths that the host knows, the model's are in a tensor on the device")
    b.require(a.mask is None, "with pages it takes no mask but a structure")
    operands = Operands(a.query, a.key, a.value, lengths or ())
    call = _call(b, a, operands)
    one_query = known_equal(operands.sizes(b)[0], 1)
    structure = replace(call.structure, window=a.window)
    masking = structural(b, structure, b.val(a.query).device) if call.is_structural else None
    binds = structure.binds if len(operands.lengths) == 1 else a.is_causal or a.window != 0
    b.require(not binds or (masking is not None and not one_query), "with pages it has no causality or window of this alignment")
    heads, kv_heads = operands.heads(b)
    masking = masking or Masking()
    out, _ = npu(
        FIA,
        b.contiguous(a.query),
        b.contiguous(a.key),
        b.contiguous(a.value),
        actual_seq_lengths_kv=list(operands.lengths),
        block_table=b.contiguous(b.cast(a.block_table, torch.int32)),
        block_size=b.val(a.key).shape[2],
        num_heads=heads,
        num_key_value_heads=kv_heads,
        scale=call.scale,
        input_layout="BNSD",
        **_given(
            atten_mask=_infer_mask(b, operands, masking, one_query),
            inner_precise=WITH_HIDDEN_ROWS if masking.hides_rows and not one_query else None,
            **masking.sparse(),
        ),
    )
    return _with_dtype(b, a, out)


# -------------------------------------------------------------------- packed tokens


@provides("attention", FIA_V2, rank=2)
def packed_attention(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Sinks, and values narrower than keys: what FIA has for packed tokens only."""
    b.only_if(a.sinks is not None or not b.equal(b.val(a.key).shape[3], b.val(a.value).shape[3]))
    _keeps_weights(b, a)
    return _with_dtype(b, a, _packed(b, _attention_call(b, a), npu))


@provides("mla_attention", FIA_V2, rank=2)
def packed_mla_attention(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Both parts of queries and keys concatenated to 192, with values of 128."""
    return _packed(b, _mla_call(b, a), npu)


@provides("mla_attention", FIA_V2, rank=-1)
def packed_mla_parts(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Queries and keys in their parts of 128 and 64, where copying those to packed tokens is no more than joining them."""
    parts = (a.q_nope, a.q_rope, a.k_nope, a.k_rope)
    b.only_if([b.val(part).shape[3] for part in parts] == [128, 64, 128, 64])
    shared = not b.equal(b.val(a.k_rope).shape[1], b.val(a.k_nope).shape[1])
    b.only_if(shared + sum(not row_major(b.val(part).transpose(1, 2)) for part in parts) <= 2)
    k_rope = b.emit(aten.expand.default, a.k_rope, [b.size(a.k_nope, dim) for dim in range(3)] + [64]) if shared else a.k_rope
    call = _call(b, a, Operands(a.q_nope, a.k_nope, a.value))
    return _packed(b, call, npu, query_rope=packed(b, a.q_rope), key_rope=packed(b, k_rope))


def _packed(b: Builder, call: Call, npu: Npu, **ropes: Node) -> Node:
    operands = call.operands
    batch = b.val(operands.query).shape[0]
    b.require(isinstance(batch, int), "it takes the end of each row in a list, the batch size is symbolic")
    b.require(call.bias is None and call.is_structural and not operands.lengths, "for packed tokens it takes no mask but a structure")
    masking = _packed_masking(b, call)
    arranged = arrange_packed(b, operands)
    heads, kv_heads = operands.heads(b)
    out, _ = npu(
        FIA_V2,
        arranged.query,
        arranged.key,
        arranged.value,
        actual_seq_qlen=_ends(b, operands.query, batch),
        actual_seq_kvlen=_ends(b, operands.key, batch),
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        softmax_scale=call.scale,
        input_layout=arranged.input_layout,
        **_given(atten_mask=masking.hidden, learnable_sink=call.sinks, **ropes, **masking.sparse()),
    )
    return arranged.restore(out)


def _packed_masking(b: Builder, call: Call) -> Masking:
    """Packed tokens know the causality that ends in the lower right corner, and bands."""
    structure = call.structure
    if not structure.binds:
        return Masking()
    masking = structural(b, structure, b.val(call.operands.query).device)
    b.require(masking is not None, "for packed tokens it takes no mask but a structure with bounds that are known")
    assert masking is not None
    b.require(not masking.hides_rows, "for packed tokens every query must see a key")
    return masking


def _ends(b: Builder, node: Node, batch: int) -> list[Any]:
    """Where each row of packed tokens ends."""
    length = b.size(node, 2)
    return [length * row if isinstance(length, int) else b.emit(operator.mul, length, row) for row in range(1, batch + 1)]


# -------------------------------------------------------------------- fusion_attention


@provides("attention", FUSION, rank=3)
def fusion_attention(b: Builder, a: Arguments, npu: Npu) -> Node:
    """fp32, values narrower than keys, sinks with any mask, masks that differ from head to head."""
    _keeps_weights(b, a)
    return _with_dtype(b, a, _fusion(b, _attention_call(b, a), npu))


@provides("mla_attention", FUSION, rank=3)
def fusion_mla_attention(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Both parts of queries and keys concatenated."""
    return _fusion(b, _mla_call(b, a, heads_first=True), npu)


def _fusion(b: Builder, call: Call, npu: Npu) -> Node:
    operands = call.operands
    b.require(not operands.lengths, "it takes no lengths")
    b.require(b.at_least(b.val(operands.key).shape[3], b.val(operands.value).shape[3]), "its values are no wider than its keys")
    masking = call.masking(b)
    bias, scale = None, call.scale
    if call.bias is not None:
        # The op adds before it multiplies. Times a power of two the query is exact, and the op has nothing left to multiply with.
        b.require(math.frexp(scale)[0] == 0.5, f"it adds a mask before it multiplies with the scale {scale}, the model after")
        operands = replace(operands, query=b.emit(aten.mul.Tensor, operands.query, scale))
        bias, scale = additive(b, call.bias, operands), 1.0
    arranged = arrange_heads_first(b, operands)
    heads, _ = operands.heads(b)
    out, *_ = npu(
        FUSION,
        arranged.query,
        arranged.key,
        arranged.value,
        heads,
        arranged.input_layout,
        scale=scale,
        **_given(
            pse=None if bias is None else bias.values,
            atten_mask=_fusion_mask(b, operands, masking),
            inner_precise=WITH_HIDDEN_ROWS if masking.hides_rows else None,
            sink=None if call.sinks is None else b.cast(call.sinks, torch.float32),
            **{name.replace("tokens", "tockens"): value for name, value in masking.sparse().items()},
        ),
    )
    result = arranged.restore(out)
    return result if bias is None or bias.hidden is None else zero_hidden_rows(b, result, bias.hidden)


def _fusion_mask(b: Builder, operands: Operands, masking: Masking) -> Node | None:
    """The mask as the op takes it: the compressed one, or [B, N or 1, Sq, Skv] or [1, 1, Sq, Skv] in full."""
    if masking.hidden is None or masking.sparse_mode:
        return masking.hidden
    rows, heads = b.val(masking.hidden).shape[:2]
    once, shared = b.equal(rows, 1), b.equal(heads, 1)
    batch = 1 if once and shared else b.size(operands.query, 0)
    columns = 1 if shared else b.size(operands.query, 1)
    return repeated(b, masking.hidden, [batch, columns, b.size(operands.query, 2), b.size(operands.key, 2)])
