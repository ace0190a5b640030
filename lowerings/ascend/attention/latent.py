"""Absorbed latent attention on Ascend: `npu_fused_infer_attention_score` against the latent [B, 1, S, 512] that all heads share, with the
positions of queries and keys beside it.

With `query_rope` of 64 and a head dimension of 512 the op is MLA's: 1 to 128 heads (powers of two), one key head, keys that are the values,
no mask but causality that ends in the lower right corner, which one query needs none for.
"""

from __future__ import annotations

from torch.fx import Node

from ....lower import Arguments, Builder
from ..provide import Npu, provides
from .mask import RIGHT_DOWN_CAUSAL, Structure, structural

FIA = "npu::npu_fused_infer_attention_score"
LATENT, ROPE = 512, 64
_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_QUERIES = 16


@provides("mla_attention", FIA, rank=-2)
def latent_attention(b: Builder, a: Arguments, npu: Npu) -> Node:
    """Queries [B, N, S, 512 + 64] in two parts against a latent and one head of positions: nothing is joined or repeated."""
    b.only_if(a.value is a.k_nope and b.equal(b.val(a.k_nope).shape[1], 1))
    heads, queries = b.val(a.q_nope).shape[1:3]
    widths = [b.val(part).shape[3] for part in (a.q_nope, a.q_rope)]
    b.require(widths == [LATENT, ROPE], f"it takes a latent of {LATENT} and positions of {ROPE}, the model has {widths}")
    b.require(heads in _HEADS, f"it takes a power of two of heads up to {_HEADS[-1]}, the model has {heads}")
    b.require(b.at_least(_MOST_QUERIES, queries), f"it takes at most {_MOST_QUERIES} queries, the model has {queries}")
    b.require(isinstance(a.scale, (int, float)), "its scale is a constant, the model's is known at run time only")
    b.require(a.mask is None, "against a latent it takes no mask but causality")
    structure = Structure(b.size(a.q_nope, 2), b.size(a.k_nope, 2), a.is_causal, a.causal_offset)
    masking = structural(b, structure, b.val(a.q_nope).device)
    b.require(masking is not None and not masking.hides_rows, "against a latent every query must see a key, by a structure that is known")
    assert masking is not None
    causal = masking.sparse_mode == RIGHT_DOWN_CAUSAL and b.at_least(queries, 2)
    b.require(not structure.binds or causal, "against a latent it has causality only, to the lower right, of several queries")
    latent = b.contiguous(a.k_nope)
    hidden: dict[str, Node] = {} if masking.hidden is None else {"atten_mask": masking.hidden}
    attended: Node = npu(
        FIA,
        b.contiguous(a.q_nope),
        latent,
        latent,
        query_rope=b.contiguous(a.q_rope),
        key_rope=b.contiguous(a.k_rope),
        num_heads=heads,
        num_key_value_heads=1,
        scale=float(a.scale),
        input_layout="BNSD",
        **hidden,
        **masking.sparse(),
    )[0]
    return attended
