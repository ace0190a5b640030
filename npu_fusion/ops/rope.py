"""Rotary position embeddings: `rotary`, `qk_norm_rotary`, `qkv_norm_rotary`.

Layouts, for R rotated dimensions: `half` pairs dimensions (i, i + R/2); `interleaved` pairs (2i, 2i + 1); `mla` reads interleaved pairs and
writes them in half layout. A full table [..., R] has one entry for every dimension of the *result*, whose two halves (or even and odd
entries) need not be equal; a half table [..., R/2] has one entry for every pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..semantic import semantic_op
from ._common import (
    Size,
    check_broadcastable,
    check_choice,
    check_floating,
    check_floating_dtype,
    check_min_rank,
    check_rank,
    check_sizes,
    check_value,
    compute_dtype,
    empty_token_major,
    known_different,
    token_major,
)
from .norm import rms_norm

LAYOUTS = ("half", "interleaved", "mla")


def _check_tables(op: str, cos: Tensor, sin: Tensor, layout: str, sign: int) -> None:
    check_choice(op, "layout", layout, LAYOUTS)
    check_choice(op, "sign", sign, (1, -1))
    check_floating(op, cos=cos, sin=sin)
    check_min_rank(op, 1, cos=cos, sin=sin)
    check_sizes(op, "sin", sin.shape[-1:], cos.shape[-1:])


def _check_rotation(op: str, name: str, shape: Sequence[Size], cos: Tensor, sin: Tensor, rotary_dim: int) -> None:
    """Raise ValueError if the tables are known not to fit a tensor of `shape`."""
    width = _rotary_dim(shape[-1], rotary_dim)
    check_value(op, rotary_dim == -1 or rotary_dim > 0, f"rotary_dim must be positive or -1, not {rotary_dim}")
    check_value(op, not statically_known_true(width > shape[-1]), f"rotary_dim {width} exceeds the last dimension of {name}, {shape[-1]}")
    check_value(op, not known_different(width % 2, 0), f"an odd number of dimensions, {width}, cannot be rotated")
    table = cos.shape[-1]
    fits = not (known_different(table, width) and known_different(2 * table, width))
    check_value(op, fits, f"cos and sin must end in {width} or half of it, not {table}")
    for table_name, tensor in (("cos", cos), ("sin", sin)):
        check_broadcastable(op, table_name, tensor.shape[:-1], shape[:-1])


def _rotary_dim(last: Size, rotary_dim: int) -> Size:
    return last if rotary_dim == -1 else rotary_dim


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second members of the pairs along the last dimension, as views."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _table_pairs(table: Tensor, width: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The table's entries for the first and the second member of each pair."""
    table = table.to(dtype)
    return (table, table) if 2 * table.shape[-1] == width else _pairs(table, layout == "interleaved")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str, rotary_dim: int, sign: int, out_dtype: torch.dtype | None) -> Tensor:
    width = _rotary_dim(x.shape[-1], rotary_dim)
    out = torch.empty_like(x, dtype=out_dtype)
    dtype = compute_dtype(x, cos, sin)
    cos1, cos2 = _table_pairs(cos, width, layout, dtype)
    sin1, sin2 = _table_pairs(sin, width, layout, dtype)
    if sign < 0:
        sin1, sin2 = -sin1, -sin2
    x1, x2 = _pairs(x[..., :width].to(dtype), layout != "half")
    out1, out2 = _pairs(out[..., :width], layout == "interleaved")
    out1.copy_(x1 * cos1 - x2 * sin1)
    out2.copy_(x2 * cos2 + x1 * sin2)
    out[..., width:] = x[..., width:]
    return out


def _check_rotary(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, layout: str, rotary_dim: int, sign: int) -> None:
    _check_tables("rotary", cos, sin, layout, sign)
    for i, x in enumerate(xs):
        check_floating("rotary", **{f"xs[{i}]": x})
        check_min_rank("rotary", 1, **{f"xs[{i}]": x})
        _check_rotation("rotary", f"xs[{i}]", x.shape, cos, sin, rotary_dim)


@semantic_op(
    "rope",
    '(Tensor[] xs, Tensor cos, Tensor sin, *, str layout="half", int rotary_dim=-1, int sign=1, ScalarType? out_dtype=None) -> Tensor[]',
)
def rotary(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Rotary position embedding of one or more tensors that share their tables.

    Maths: for every pair (x1, x2) of the first `rotary_dim` dimensions, `(x1 * cos1 - sign * x2 * sin1, x2 * cos2 + sign * x1 * sin2)`;
    the subscripts of cos and sin differ only in a full table.

    Args:
        xs: tensors [..., D], floating point; their shapes may differ.
        cos, sin: tables that broadcast to `x[..., :rotary_dim]`, or to half as many last dimensions (one entry a pair).
        layout: `half`, `interleaved`, or `mla` (interleaved in, half layout out); see the module.
        rotary_dim: how many leading channels are rotated; -1 is all D. The rest passes through.
        sign: -1 rotates the other way (nanochat).
        out_dtype: dtype of the results; None is that of each x.

    Returns:
        One tensor for each of `xs`, of its shape, stored in its memory order.

    Rounding: fp32 inside (fp64 if an input is), one cast at the end; channels that pass through are only cast.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: an unknown layout or sign, an odd or too large `rotary_dim`, tables that do not fit.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    _check_rotary(xs, cos, sin, layout, rotary_dim, sign)
    check_floating_dtype("rotary", "out_dtype", out_dtype)
    return [_rotate(x, cos, sin, layout, rotary_dim, sign, out_dtype) for x in xs]


@rotary.fake
def _(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    _check_rotary(xs, cos, sin, layout, rotary_dim, sign)
    check_floating_dtype("rotary", "out_dtype", out_dtype)
    return [torch.empty_like(x, dtype=out_dtype) for x in xs]


def _check_weights(
    op: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    head_dim: Size,
    weight_offset: int,
    round_dtype: torch.dtype | None,
) -> None:
    """Check the arguments of the norm that q and k share."""
    check_floating(op, q_weight=q_weight, k_weight=k_weight)
    check_floating_dtype(op, "round_dtype", round_dtype)
    check_choice(op, "weight_offset", weight_offset, (0, 1))
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_value(op, weight is not None or weight_offset == 0, f"weight_offset needs {name}")
        if weight is not None:
            check_sizes(op, name, weight.shape, [head_dim])


def _check_qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weight_offset: int,
    layout: str,
    rotary_dim: int,
    sign: int,
    round_dtype: torch.dtype | None,
    heads_first: bool,
) -> None:
    op = "qk_norm_rotary"
    check_floating(op, q=q, k=k)
    check_min_rank(op, 1, q=q, k=k)
    if heads_first:
        check_rank(op, 4, q=q, k=k)
    _check_tables(op, cos, sin, layout, sign)
    for name, x in (("q", q), ("k", k)):
        shape = (x.shape[0], x.shape[2], x.shape[1], x.shape[3]) if heads_first else x.shape
        _check_rotation(op, name, shape, cos, sin, rotary_dim)
    check_sizes(op, "k's last dimension", k.shape[-1:], q.shape[-1:])
    _check_weights(op, q_weight, k_weight, q.shape[-1], weight_offset, round_dtype)


@semantic_op(
    "rope",
    "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, *, int weight_offset=0, "
    'str layout="half", int rotary_dim=-1, int sign=1, ScalarType? round_dtype=None, bool norm_last=False, bool heads_first=False) '
    "-> (Tensor, Tensor)",
)
def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    weight_offset: int = 0,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    round_dtype: torch.dtype | None = None,
    norm_last: bool = False,
    heads_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMS norm of each head of query and key, then their rotary position embedding.

    Maths: `rotary(rms_norm(x, weight, eps))`, or `rms_norm(rotary(x), weight, eps)` with `norm_last`, for x = q and x = k.

    Args:
        q: [B, Nq, S, D], or any shape that the tables broadcast to; with `heads_first` [B, S, Nq, D].
        k: [B, Nk, S, D] likewise.
        q_weight, k_weight: [D] or None (norm without a weight).
        cos, sin: tables as in `rotary`, broadcast against the result, i.e. after the transposition of `heads_first`.
        eps: added to the mean square.
        weight_offset: 1 scales by `1 + weight`, 0 by `weight`.
        layout, rotary_dim, sign: as in `rotary`.
        round_dtype: as in `rms_norm`.
        norm_last: rotate first, then normalise (hunyuan, nanochat).
        heads_first: transpose dimensions 1 and 2 of q and k, so that the results have their heads first.

    Returns:
        q and k, in the shape after the transposition, each in its dtype and in the memory order of its input.

    Rounding: as the composition of the two ops: the intermediate is rounded to the dtype of q, or k. A target's kernel may keep it
        in fp32 where the configuration allows that.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: a shape, layout, sign or offset does not fit.

    Source: q/k normalisation: https://arxiv.org/abs/2010.04245; Qwen3, Gemma3.
    """
    _check_qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, weight_offset, layout, rotary_dim, sign, round_dtype, heads_first)

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        if heads_first:
            x = x.transpose(1, 2)
        if norm_last:
            x = _rotate(x, cos, sin, layout, rotary_dim, sign, None)
        x = rms_norm.reference(x, weight, eps, weight_offset=weight_offset, round_dtype=round_dtype)
        return x if norm_last else _rotate(x, cos, sin, layout, rotary_dim, sign, None)

    return one(q, q_weight), one(k, k_weight)


@qk_norm_rotary.fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    weight_offset: int = 0,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    round_dtype: torch.dtype | None = None,
    norm_last: bool = False,
    heads_first: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, weight_offset, layout, rotary_dim, sign, round_dtype, heads_first)
    if heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    return torch.empty_like(q), torch.empty_like(k)


def _check_qkv_norm_rotary(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    norm: bool,
    weight_offset: int,
    layout: str,
    rotary_dim: int,
    sign: int,
    round_dtype: torch.dtype | None,
) -> None:
    op = "qkv_norm_rotary"
    check_floating(op, qkv=qkv)
    check_rank(op, 3, qkv=qkv)
    check_value(op, min(num_heads, num_kv_heads, head_dim) > 0, "num_heads, num_kv_heads and head_dim must be positive")
    check_sizes(op, "qkv's last dimension", qkv.shape[-1:], [(num_heads + 2 * num_kv_heads) * head_dim])
    _check_tables(op, cos, sin, layout, sign)
    for name, heads in (("q", num_heads), ("k", num_kv_heads)):
        _check_rotation(op, name, (qkv.shape[0], heads, qkv.shape[1], head_dim), cos, sin, rotary_dim)
    check_value(op, norm or (q_weight is None and k_weight is None), "weights need norm=True")
    _check_weights(op, q_weight, k_weight, head_dim, weight_offset, round_dtype)


@semantic_op(
    "rope",
    "(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, *, int num_heads, int num_kv_heads, "
    'int head_dim, bool norm=True, int weight_offset=0, str layout="half", int rotary_dim=-1, int sign=1, '
    "ScalarType? round_dtype=None) -> (Tensor, Tensor, Tensor)",
)
def qkv_norm_rotary(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    norm: bool = True,
    weight_offset: int = 0,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    round_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split of a merged QKV projection into heads, RMS norm of each query and key head, and their rotary position embedding.

    Maths: `q, k, v = split(qkv)`; q and k become `rotary(rms_norm(x, weight, eps))`, or `rotary(x)` with `norm=False`; v is copied.

    Args:
        qkv: [B, S, (Nq + 2 Nkv) D]: all query heads, then all key heads, then all value heads.
        q_weight, k_weight: [D] or None (norm without a weight); None with `norm=False`.
        cos, sin: tables as in `rotary`, broadcast against [B, N, S, rotary_dim].
        eps: added to the mean square; without meaning when `norm=False`.
        num_heads, num_kv_heads, head_dim: Nq, Nkv, D.
        norm: whether q and k are normalised.
        weight_offset, round_dtype: as in `rms_norm`.
        layout, rotary_dim, sign: as in `rotary`.

    Returns:
        q [B, Nq, S, D], k [B, Nkv, S, D], v [B, Nkv, S, D], in the dtype of qkv, each stored as a contiguous [B, S, N, D].

    Rounding: as `qk_norm_rotary`.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: a shape, layout, sign or offset does not fit, or weights come with `norm=False`.

    Source: the composition of the split with `qk_norm_rotary`; `split_qkv_rmsnorm_rope` of sgl-kernel-npu computes the same.
    """
    _check_qkv_norm_rotary(
        qkv, q_weight, k_weight, cos, sin, num_heads, num_kv_heads, head_dim, norm, weight_offset, layout, rotary_dim, sign, round_dtype
    )
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim)).transpose(1, 2)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        if norm:
            x = rms_norm.reference(x, weight, eps, weight_offset=weight_offset, round_dtype=round_dtype)
        return token_major(_rotate(x, cos, sin, layout, rotary_dim, sign, None))

    # The value must not alias qkv, also where its slice happens to be contiguous.
    value = v.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return one(q, q_weight), one(k, k_weight), value


@qkv_norm_rotary.fake
def _(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    norm: bool = True,
    weight_offset: int = 0,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    round_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_qkv_norm_rotary(
        qkv, q_weight, k_weight, cos, sin, num_heads, num_kv_heads, head_dim, norm, weight_offset, layout, rotary_dim, sign, round_dtype
    )
    batch, tokens = qkv.shape[0], qkv.shape[1]
    q, k, v = (empty_token_major(qkv, batch, heads, tokens, head_dim, qkv.dtype) for heads in (num_heads, num_kv_heads, num_kv_heads))
    return q, k, v
