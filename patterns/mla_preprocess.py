"""All of multi-head latent attention that comes before the attention, in its absorbed form.

    q = wq_b(q_norm(wq_a(x))).view(B, S, N, D + R)              # linears in floating point, or of int8, quantised by row
    q_nope, q_pe = q.split([D, R], dim=-1)
    kv, k_pe = wkv_a(x).split([C, R], dim=-1)
    q_pe, k_pe = rotary(q_pe), rotary(k_pe.unsqueeze(2))
    q_nope = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
    kv = kv_norm(kv)

Four results leave it, which no single value is made of. So the pattern is the product with W_UK alone, and what stands beside it is found
from there: `trace_preprocess` goes up to the hidden states, and down again through the parts that earlier rules know (norms, rotations,
quantised linears). Whether a tensor is the part of the heads, or of a projection, that it should be is decided by building that part: the
view holds equal computations once.

Sources: DeepSeek-V2, https://arxiv.org/abs/2405.04434; DeepSeek-V3's inference/model.py (absorb).
"""

from __future__ import annotations

from typing import Any

from npu_fusion.match import Match
from npu_fusion.ops.mla import mla_preprocess
from npu_fusion.ops.quant_core import QUANTIZATION_NAMES
from npu_fusion.pattern import anything, op, opt_view, sem, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.view import Form
from npu_fusion.view.shapes import known_equal, product
from npu_fusion.whole import why_not_whole

from .mla_trace import Preprocess, trace_preprocess

_NORM_DEFAULTS = ("weight_offset", "gate", "group_size")


def _rounds_alike(found: Preprocess) -> Reject | None:
    """The norms are plain ones, and round at the same point."""
    for form in (found.q_norm, found.kv_norm):
        if any(form.args.get(name) for name in _NORM_DEFAULTS):
            return Reject("a norm has a gate, an offset of its weight, or groups of channels", form.match.root)
    if found.q_norm.args.get("round_dtype") != found.kv_norm.args.get("round_dtype"):
        return Reject("the norms of queries and latent round at different points", found.kv_norm.match.root)
    if found.latent.dtype != found.site.dtype or found.q_rope.dtype != found.site.dtype or found.k_rope.dtype != found.site.dtype:
        return Reject("latent, rotations and absorbed queries have different dtypes", found.site)
    return None


def _arguments(m: Match, found: Preprocess) -> dict[str, Any]:
    canon, rotary, x, rows = m.view.canon, found.rotary.args, found.q_a.x, found.q_a.rows
    per_row = rows is not None and rows.ndim > 0 and not known_equal(product(rows.shape), 1)
    arguments: dict[str, Any] = {
        "x": canon.reshape(x, (*found.lead, x.shape[-1])),
        "q_a_weight": found.q_a.weight,
        "kv_a_weight": found.kv_a.weight,
        "q_b_weight": found.q_b.weight,
        "k_b_weight": found.k_b_weight,
        "q_norm_weight": found.q_norm.args.get("weight"),
        "kv_norm_weight": found.kv_norm.args.get("weight"),
        "cos": rotary["cos"],
        "sin": rotary["sin"],
        "q_eps": found.q_norm.args["eps"],
        "kv_eps": found.kv_norm.args["eps"],
        "x_scale": canon.reshape(rows, (*found.lead, 1)) if rows is not None and per_row else rows,
        "q_a_scale": found.q_a.columns,
        "kv_a_scale": found.kv_a.columns,
        "q_b_scale": found.q_b.columns,
        "layout": rotary.get("layout", "half"),
        "sign": rotary.get("sign", 1),
        "heads_first": found.heads_first,
        "rope_heads_first": found.rope_heads_first,
        "round_dtype": found.q_norm.args.get("round_dtype"),
        "norm_dtype": found.normed.dtype,
    }
    if found.quantize is not None:
        quantised = found.quantize.args
        arguments |= {name: quantised[name] for name in QUANTIZATION_NAMES if name in quantised}
        if quantised.get("compute_dtype") is None and quantised.get("scale") is None:
            arguments["compute_dtype"] = quantised["x"].dtype
    return arguments | found.sums


def check_preprocess(m: Match) -> Reject | None:
    """The parts are there, are those of one attention, and something on the target takes them as a whole."""
    found = trace_preprocess(m)
    if isinstance(found, Reject):
        return found
    wrong = _rounds_alike(found)
    if wrong is not None:
        return wrong
    reason = why_not_whole(mla_preprocess.name, _arguments(m, found), m.config)
    return None if reason is None else Reject(f"its parts are left to ops of their own: {reason}", m.root, progress=9)


def beside_preprocess(m: Match) -> list[Form]:
    found = trace_preprocess(m)
    assert isinstance(found, Preprocess)
    return found.forms


def rewrite_preprocess(m: Match) -> Call:
    found = trace_preprocess(m)
    assert isinstance(found, Preprocess)
    return Call(mla_preprocess, _arguments(m, found), [found.q_nope, found.q_rope, found.latent, found.k_rope])


MLA_PREPROCESS = Rule(
    "mla_preprocess",
    pattern=op("matmul", var("operand"), var("weight")).as_("site"),
    check=check_preprocess,
    rewrite=rewrite_preprocess,
    produces="mla_preprocess",
    idioms={"mla": "site"},
    gist=sem("mla_attention", q_nope=opt_view(op("matmul", anything(), var("site")))),
    beside=beside_preprocess,
    starts_from=frozenset({"rms_norm", "rotary", "bmm_transpose", "quantize", "quant_linear", "weight_only_linear"}),
)

register_builtin(MLA_PREPROCESS)
