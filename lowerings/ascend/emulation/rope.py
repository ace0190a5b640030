"""CPU kernels of rotary embeddings: npu_rotary_mul, npu_apply_rotary_pos_emb, npu_interleave_rope, npu_mrope, split_qkv_rmsnorm_rope.

Source: op-plugin docs and adapters of each op; rounding points from ops-transformer `posembedding/*/op_kernel`:
- rotary_position_embedding (npu_rotary_mul), interleave_rope and rope_with_sin_cos_cache (npu_mrope) compute in fp32 and round once;
- apply_rotary_pos_emb does so for bf16, halves away from zero. In fp16 it rounds each product. It writes its results over query and key;
- split_qkv_rmsnorm_rope of sgl-kernel-npu (norm/split_qkv_rmsnorm_rope.py) keeps fp32 from the norm to the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .registry import FLOATS, EmulationError, check, check_dtype, check_same_dtype, emulates

# -------------------------------------------------------------------- the rotation


def _turned(x: Tensor, mode: str) -> Tensor:
    """(-x2, x1) in the places of the pairs (x1, x2): `half` pairs halves, `interleave` neighbours, `quarter` the halves of each half."""
    if mode == "interleave":
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    parts = x.chunk(2 if mode == "half" else 4, dim=-1)
    return torch.cat([part for x1, x2 in zip(parts[::2], parts[1::2], strict=True) for part in (-x2, x1)], dim=-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """x * cos + turned(x) * sin in fp32."""
    x = x.float()
    return x * cos.float() + _turned(x, mode) * sin.float()


def _check_even(op: str, mode: str, width: int) -> None:
    multiple = 4 if mode == "quarter" else 2
    check(op, width % multiple == 0, f"the last dimension must be a multiple of {multiple} with rotary_mode={mode!r}, not {width}")


def _check_tables(op: str, name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check(op, cos.shape == sin.shape, f"cos and sin must have one shape, not {list(cos.shape)} and {list(sin.shape)}")
    check(op, cos.dim() == x.dim(), f"cos must have as many dimensions as {name}, {x.dim()}, not {cos.dim()}")


# -------------------------------------------------------------------- npu_rotary_mul

_ROTARY_MUL_WIDTH = 896
_TABLE_LAYOUTS = {  # which of the three leading dimensions of a 4-D table are those of x; the others are 1
    "half": ("001", "101", "111", "010", "110", "100"),
    "interleave": ("001", "010", "100"),
}


def _has_layout(x: Tensor, table: Tensor, kept: str) -> bool:
    return all(size == (own if keep == "1" else 1) for own, size, keep in zip(x.shape, table.shape, kept, strict=False))


def _check_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> None:
    op = "npu_rotary_mul"
    check(op, mode in _TABLE_LAYOUTS, f"The rotary_mode of {op} should be half or interleave, but got {mode}")
    for name, tensor in (("input", x), ("r1", r1), ("r2", r2)):
        check_dtype(op, name, tensor, *FLOATS)
    check(op, x.dim() in (3, 4), f"input must have 3 or 4 dimensions, not {x.dim()}")
    _check_tables(op, "input", x, r1, r2)
    width = x.shape[-1]
    check(op, r1.shape[-1] == width, f"r1 and r2 must end in {width} as input does, not {r1.shape[-1]}")
    check(op, width <= _ROTARY_MUL_WIDTH, f"the last dimension of input must be at most {_ROTARY_MUL_WIDTH}, not {width}")
    _check_even(op, mode, width)
    shapes = f"r1 of shape {list(r1.shape)} does not broadcast to input of shape {list(x.shape)} with rotary_mode={mode!r}"
    if x.dim() == 4:
        check(op, any(_has_layout(x, r1, kept) for kept in _TABLE_LAYOUTS[mode]), shapes)
    else:
        check(op, all(size in (1, own) for own, size in zip(x.shape, r1.shape, strict=True)), shapes)


@emulates("npu::npu_rotary_mul")
def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    """`input * r1 + rotate(input) * r2` with r1 = cos and r2 = sin, in fp32, rounded once; tables are first cast to the dtype of input.

    `rotate`, a matrix [D, D], replaces the rotation that `rotary_mode` names: `rotate(input) = input @ rotate`.
    """
    op = "npu_rotary_mul"
    _check_rotary_mul(input, r1, r2, rotary_mode)
    cos, sin = r1.to(input.dtype), r2.to(input.dtype)
    if rotate is None:
        return _rotated(input, cos, sin, rotary_mode).to(input.dtype).contiguous()
    width = input.shape[-1]
    check_dtype(op, "rotate", rotate, *FLOATS)
    check(op, rotate.shape == (width, width), f"rotate must have shape [{width}, {width}], not {list(rotate.shape)}")
    x = input.float()
    return (x * cos.float() + (x @ rotate.float()) * sin.float()).to(input.dtype).contiguous()


@npu_rotary_mul.fake
def _(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    return torch.empty_like(input)


# -------------------------------------------------------------------- npu_apply_rotary_pos_emb

_LAYOUTS = {"BSND": "BSND", "BSH": "BSND", "SBND": "SBND", "BNSD": "BNSD", "TND": "TND"}  # the adapter reads BSH as BSND
_APPLY_WIDTH = 1024


def _check_apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str, mode: str) -> None:
    op = "npu_apply_rotary_pos_emb"
    check(op, mode in ("half", "quarter", "interleave"), f"The layout should be half/quarter/interleave, but got {mode} for rotary_mode")
    check(op, layout in _LAYOUTS, f"layout must be BSND, SBND, BNSD or TND, not {layout!r}")
    dims = _LAYOUTS[layout]
    check_dtype(op, "query", query, *FLOATS)
    check_same_dtype(op, query=query, key=key, cos=cos, sin=sin)
    for name, tensor in (("query", query), ("key", key), ("cos", cos)):
        check(op, tensor.dim() == len(dims), f"{name} must have {len(dims)} dimensions with layout={layout!r}, not {tensor.dim()}")
    _check_tables(op, "query", query, cos, sin)
    for dim, q, k, table in zip(dims, query.shape, key.shape, cos.shape, strict=True):
        if dim == "N":
            check(op, table == 1, f"the N of cos and sin must be 1, not {table}")
            continue
        check(op, q == k, f"query and key must have one {dim}, not {q} and {k}")
        fits = table <= q if dim == "D" else table == q or (dim == "B" and table == 1)
        check(op, fits, f"the {dim} of cos and sin, {table}, does not fit that of query, {q}")
    check(op, query.shape[-1] <= _APPLY_WIDTH, f"the last dimension must be at most {_APPLY_WIDTH}, not {query.shape[-1]}")
    _check_even(op, mode, cos.shape[-1])


def _away_from_zero(x: Tensor) -> Tensor:
    """fp32 to bf16, to the nearest, halves away from zero."""
    bits = x.view(torch.int32)
    nearest = ((bits + 0x8000) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), nearest, x).to(torch.bfloat16)


def _applied(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    if x.dtype == torch.float16 and mode == "half":
        return x * cos + _turned(x, mode) * sin
    y = _rotated(x, cos, sin, mode)
    return _away_from_zero(y) if x.dtype == torch.bfloat16 else y.to(x.dtype)


@emulates("npu::npu_apply_rotary_pos_emb")
def npu_apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """Rotates the leading channels of query and key, as many as cos has; the results are also written over query and key.

    The operator returns query and key themselves. PyTorch warns of kernels in Python that do so, so that here the results are copies.
    """
    _check_apply(query, key, cos, sin, layout, rotary_mode)
    width = cos.shape[-1]
    for x, rotated in [(x, _applied(x[..., :width], cos, sin, rotary_mode)) for x in (query, key)]:
        x[..., :width].copy_(rotated)
    return query.clone(), key.clone()


@npu_apply_rotary_pos_emb.fake
def _(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half") -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


# -------------------------------------------------------------------- npu_interleave_rope

_INTERLEAVE_WIDTH = 64


@emulates("npu::npu_interleave_rope")
def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Puts the even channels of x [B, N, S, 64] before the odd ones, then rotates halves; cos and sin are [B, 1, S or 1, 64]."""
    op = "npu_interleave_rope"
    check_dtype(op, "x", x, torch.float16, torch.bfloat16)
    check_same_dtype(op, x=x, cos=cos, sin=sin)
    check(op, x.dim() == 4, f"x must have 4 dimensions, not {x.dim()}")
    _check_tables(op, "x", x, cos, sin)
    batch, _, tokens, width = x.shape
    check(op, width == _INTERLEAVE_WIDTH, f"the last dimension of x must be {_INTERLEAVE_WIDTH}, not {width}")
    fits = cos.shape[0] == batch and cos.shape[1] == 1 and cos.shape[2] in (1, tokens) and cos.shape[3] == width
    check(op, fits, f"cos and sin must have shape [{batch}, 1, {tokens} or 1, {width}], not {list(cos.shape)}")
    halves = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
    return _rotated(halves, cos, sin, "half").to(x.dtype)


@npu_interleave_rope.fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


# -------------------------------------------------------------------- npu_mrope


def _section_table(table: Tensor, section: Sequence[int], cache_mode: str) -> Tensor:
    """The table [T, R/2] that takes each channel from the row of positions which its section names; `table` is [M, T, R/2]."""
    if cache_mode == "default":
        return torch.cat([part[i] for i, part in enumerate(table.split(list(section), dim=-1))], dim=-1)
    merged = table[0].clone()
    for row in (1, 2):
        channels = slice(row, section[1] * 3, 3)
        merged[:, channels] = table[row, :, channels]
    return merged


def _check_section(op: str, positions: Tensor, section: Sequence[int], cache_mode: str, width: int) -> bool:
    """Whether the positions are multimodal: one row for each section."""
    multimodal = any(section)
    check(op, len(section) in (3, 4), f"mrope_section must have 3 or 4 entries, not {list(section)}")
    if not multimodal:
        check(op, positions.dim() == 1, f"positions must have 1 dimension without mrope_section, not {positions.dim()}")
        return False
    rows = list(positions.shape[:-1])
    check(op, rows == [len(section)], f"positions must have shape [{len(section)}, T] with this mrope_section, not {list(positions.shape)}")
    check(op, sum(section) == width // 2, f"mrope_section must sum to half the width of cos_sin_cache, {width // 2}, not {sum(section)}")
    check(op, len(section) == 3 or cache_mode == "default", "cache_mode 'interleave' takes no mrope_section of 4 entries")
    return True


def _check_mrope(positions: Tensor, query: Tensor, key: Tensor, cache: Tensor, head_size: int) -> None:
    op = "npu_mrope"
    check(op, positions.dtype in (torch.int32, torch.int64), f"positions must be int32 or int64, not {positions.dtype}")
    check_dtype(op, "query", query, *FLOATS)
    check_same_dtype(op, query=query, key=key, cos_sin_cache=cache)
    for name, tensor in (("query", query), ("key", key), ("cos_sin_cache", cache)):
        check(op, tensor.dim() == 2, f"{name} must have 2 dimensions, not {tensor.dim()}")
    multiple = 16 if query.dtype == torch.float32 else 32
    for name, size in (("head_size", head_size), ("the width of cos_sin_cache", cache.shape[1])):
        check(op, size > 0 and size % multiple == 0, f"{name} must be a multiple of {multiple} with {query.dtype}, not {size}")
    check(op, cache.shape[1] <= head_size, f"cos_sin_cache is wider, {cache.shape[1]}, than a head, {head_size}")
    for name, tensor in (("query", query), ("key", key)):
        rows, width = tensor.shape
        check(op, rows == positions.shape[-1], f"{name} must have {positions.shape[-1]} rows, one a position, not {rows}")
        check(op, width % head_size == 0, f"a row of {name} must be heads of {head_size} channels, not {width} channels")
    inside = positions.numel() == 0 or bool(((positions >= 0) & (positions < cache.shape[0])).all())
    check(op, inside, f"positions must be rows of cos_sin_cache, from 0 to {cache.shape[0] - 1}")


def _with_rotated_heads(x: Tensor, cos: Tensor, sin: Tensor, head_size: int, mode: str) -> Tensor:
    """x [T, N * D] with the leading channels of every head rotated; the tables [T, R] have one entry a channel."""
    heads = x.unflatten(-1, (-1, head_size))
    width = cos.shape[-1]
    rotated = _rotated(heads[..., :width], cos.unsqueeze(1), sin.unsqueeze(1), mode).to(x.dtype)
    return torch.cat((rotated, heads[..., width:]), dim=-1).flatten(1)


def _per_channel(table: Tensor, mode: str) -> Tensor:
    """One entry for every channel from one for every pair."""
    return table.repeat_interleave(2, dim=-1) if mode == "interleave" else torch.cat((table, table), dim=-1)


@emulates("npu::npu_mrope")
def npu_mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: Sequence[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[Tensor, Tensor]:
    """Rotates the heads of query [T, Nq * D] and key [T, Nk * D] by rows of cos_sin_cache [P, R], cos before sin; channels behind R pass.

    positions [T] are rows of the cache. With a `mrope_section` [s0, s1, s2(, s3)] they are [3 or 4, T], and the channels of section i take
    row i: one section after the other, or interleaved with `cache_mode="interleave"`. In fp32, rounded once.
    """
    op = "npu_mrope"
    mode, cache_mode = rotary_mode or "half", cache_mode or "default"
    check(op, mode in ("half", "interleave"), f"rotary_mode only support half or interleave, not {mode!r}")
    check(op, cache_mode in ("default", "interleave"), f"cache_mode only support default or interleave, not {cache_mode!r}")
    _check_mrope(positions, query, key, cos_sin_cache, head_size)
    section = [0, 0, 0] if mrope_section is None else list(mrope_section)
    cos, sin = cos_sin_cache[positions.long()].chunk(2, dim=-1)
    if _check_section(op, positions, section, cache_mode, cos_sin_cache.shape[1]):
        cos, sin = (_section_table(table, section, cache_mode) for table in (cos, sin))
    cos, sin = _per_channel(cos, mode), _per_channel(sin, mode)
    return _with_rotated_heads(query, cos, sin, head_size, mode), _with_rotated_heads(key, cos, sin, head_size, mode)


@npu_mrope.fake
def _(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: Sequence[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


# -------------------------------------------------------------------- sgl-kernel-npu


def _check_split(x: Tensor, sin: Tensor, cos: Tensor, q_hidden_size: int, kv_hidden_size: int, head_dim: int) -> None:
    op = "split_qkv_rmsnorm_rope"
    check_dtype(op, "input", x, *FLOATS)
    check_dtype(op, "sin", sin, *FLOATS)
    check_dtype(op, "cos", cos, *FLOATS)
    check(op, head_dim > 0 and head_dim & (head_dim - 1) == 0, f"head_dim must be a power of 2, not {head_dim}")
    fits = kv_hidden_size > 0 and q_hidden_size % kv_hidden_size == 0 and kv_hidden_size % head_dim == 0
    check(op, fits, f"q_hidden_size {q_hidden_size} must be a multiple of kv_hidden_size {kv_hidden_size}, and that of head_dim {head_dim}")
    total = q_hidden_size + 2 * kv_hidden_size
    check(op, x.dim() == 2 and x.shape[1] == total, f"input must have shape [T, {total}], not {list(x.shape)}")
    for name, table in (("sin", sin), ("cos", cos)):
        fits = table.shape == (x.shape[0], sin.shape[-1]) and sin.shape[-1] <= head_dim and sin.shape[-1] % 2 == 0
        check(op, fits, f"{name} must have shape [{x.shape[0]}, R] with an even R of at most {head_dim}, not {list(table.shape)}")


def _head_norm(op: str, x: Tensor, name: str, head_dim: int, eps: float | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The heads of x [T, N * D] in fp32, normalised unless eps is None."""
    heads = x.float().view(x.shape[0], -1, head_dim)
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check(op, tensor.shape == (head_dim,), f"{name}_{argument} must have shape [{head_dim}], not {list(tensor.shape)}")
    if eps is None:
        check(op, weight is None and bias is None, f"{name}_weight and {name}_bias need eps: without it there is no norm")
        return heads
    if weight is None:
        raise EmulationError(f"{op}: {name}_weight is needed where eps is given")
    rstd = torch.sqrt(heads.square().mean(-1, keepdim=True) + eps).reciprocal()
    normed = heads * rstd * weight.float()
    return normed if bias is None else normed + bias.float()


@emulates("npu_fusion_sgl::split_qkv_rmsnorm_rope")
def split_qkv_rmsnorm_rope(
    input: Tensor,
    sin: Tensor,
    cos: Tensor,
    q_hidden_size: int,
    kv_hidden_size: int,
    head_dim: int,
    eps: float | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    is_neox_style: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits [T, q + 2 kv]; RMS norm of each head of q and k (unless eps is None), then rotation of their first R channels.

    sin and cos are [T, R]; without `is_neox_style` neighbours are pairs, and only the first half of the tables is read.
    """
    op = "split_qkv_rmsnorm_rope"
    _check_split(input, sin, cos, q_hidden_size, kv_hidden_size, head_dim)
    check(op, (q_bias is None) == (k_bias is None), "q_bias and k_bias are both given or both left out")
    mode, width = "half" if is_neox_style else "interleave", cos.shape[-1]
    if not is_neox_style:
        cos, sin = (_per_channel(table[:, : width // 2], mode) for table in (cos, sin))
    q, k, v = input.split([q_hidden_size, kv_hidden_size, kv_hidden_size], dim=-1)

    def one(x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        heads = _head_norm(op, x, name, head_dim, eps, weight, bias)
        rotated = _rotated(heads[..., :width], cos.unsqueeze(1), sin.unsqueeze(1), mode)
        return torch.cat((rotated, heads[..., width:]), dim=-1).flatten(1).to(x.dtype)

    return one(q, "q", q_weight, q_bias), one(k, "k", k_weight, k_bias), v.clone(memory_format=torch.contiguous_format)


@split_qkv_rmsnorm_rope.fake
def _(
    input: Tensor,
    sin: Tensor,
    cos: Tensor,
    q_hidden_size: int,
    kv_hidden_size: int,
    head_dim: int,
    eps: float | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    is_neox_style: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = input.shape[0]
    return input.new_empty(tokens, q_hidden_size), input.new_empty(tokens, kv_hidden_size), input.new_empty(tokens, kv_hidden_size)
