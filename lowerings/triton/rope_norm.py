"""RMSNorm of q and k with their rotary embedding by Triton: qk_norm_rotary, qkv_norm_rotary, qkv_norm_rotary_cache, and providers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...kernels import rope_norm as kernels
from ...lower import Arguments, Builder
from ...ops._common import check_choice, check_index, check_rank, check_sizes, check_value
from ..rope_tables import Rotation
from .checks import FLOATS, check_cores, check_dtypes, check_row_length, check_together, name_of
from .define import device_for, launch, triton_op
from .provide import provides
from .rope import Angles, batched, check_heads, check_in_one_piece, readable, rotated, settle, strided, writable

aten = torch.ops.aten

# -------------------------------------------------------------------- what the ops share


@dataclass(frozen=True)
class Norms:
    """How q and k are normalised, over D elements.

    Attributes:
        q_weight, k_weight: [D], or None for a norm without a weight.
        eps: added to the mean square.
        weight_offset: 1 scales by `1 + weight`.
        round_dtype: dtype to which the normalised heads are rounded before the weight; None keeps fp32.
        round_between: whether what the norm gives the rotation, or the rotation the norm, is rounded to the dtype of q and k.
        last: whether the norm comes after the rotation.
        given: False where q and k are not normalised at all.
    """

    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float
    weight_offset: int
    round_dtype: torch.dtype | None
    round_between: bool
    last: bool = False
    given: bool = True

    def check(self, op: str, head_dim: Any) -> None:
        check_dtypes(op, FLOATS, q_weight=self.q_weight, k_weight=self.k_weight)
        check_choice(op, "weight_offset", self.weight_offset, (0, 1))
        known = (None, *FLOATS)
        check_value(op, self.round_dtype in known, f"round_dtype must be one of float16, bfloat16, float32, not {self.round_dtype}")
        for name, weight in (("q_weight", self.q_weight), ("k_weight", self.k_weight)):
            check_value(op, weight is None or self.given, f"{name} needs norm=True")
            check_value(op, weight is not None or self.weight_offset == 0, f"weight_offset needs {name}")
            if weight is not None:
                check_sizes(op, name, weight.shape, [head_dim])

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a plan has to know of it, for q and k of a dtype."""
        products = {f"{name}_product": name_of(self._product(weight)) for name, weight in (("q", self.q_weight), ("k", self.k_weight))}
        rounding = {"round_to": name_of(self.round_dtype), "between": name_of(dtype) if self.round_between else None}
        return {"norm": self.given, "norm_last": self.last, "weight_offset": self.weight_offset, **rounding, **products}

    def _product(self, weight: Tensor | None) -> torch.dtype | None:
        """The dtype in which normalised heads that were rounded are multiplied by the weight."""
        return None if self.round_dtype is None or weight is None else torch.promote_types(self.round_dtype, weight.dtype)

    def arguments(self) -> dict[str, Any]:
        weights = [None if weight is None else weight.contiguous() for weight in (self.q_weight, self.k_weight)]
        return {"q_weight_ptr": weights[0], "k_weight_ptr": weights[1], "eps": self.eps}


@dataclass(frozen=True)
class Cache:
    """A paged cache, and where the tokens are written in it.

    Attributes:
        key, value: [blocks, page, N, D], in any memory order but that of the last dimension.
        slots: [B, S] or [T], int32 or int64: a token is written to row `slot % page` of block `slot // page`; not at all if it is negative.
    """

    key: Tensor
    value: Tensor
    slots: Tensor

    def check(self, op: str, leading: Sequence[Any], heads: int, head_dim: int) -> None:
        check_dtypes(op, FLOATS, key_cache=self.key, value_cache=self.value)
        check_index(op, slots=self.slots)
        check_sizes(op, "slots", self.slots.shape, leading)
        check_rank(op, 4, key_cache=self.key, value_cache=self.value)
        for name, cache in (("key_cache", self.key), ("value_cache", self.value)):
            check_sizes(op, name, cache.shape, [*self.key.shape[:2], heads, head_dim])
            check_in_one_piece(op, name, cache)
            reach = (cache.shape[2] - 1) * cache.stride(2) + cache.shape[3]
            check_row_length(op, name, reach)


def _described(
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    positions: Tensor | None,
    layout: str,
    rotary_dim: int,
    sign: int,
    weight_offset: int,
    round_dtype: torch.dtype | None,
    round_between: bool,
    norm: bool = True,
    norm_last: bool = False,
) -> tuple[Angles, Norms]:
    """The arguments that all ops of the family have, as what they describe."""
    norms = Norms(q_weight, k_weight, eps, weight_offset, round_dtype, round_between, last=norm_last, given=norm)
    return Angles(cos, sin, positions, layout, rotary_dim, sign), norms


def _cached(cache: Cache | None) -> dict[str, Any]:
    """The kernel's arguments for a cache, or for none."""
    arguments: dict[str, Any] = {"slots_ptr": None, "page": 1}
    if cache is not None:
        arguments = {"slots_ptr": cache.slots.reshape(-1).contiguous(), "page": cache.key.shape[1]}
    for name, tensor in (
        (("key_cache", None), ("value_cache", None)) if cache is None else (("key_cache", cache.key), ("value_cache", cache.value))
    ):
        strides = (0, 0, 0) if tensor is None else tensor.stride()[:3]
        arguments |= {f"{name}_ptr": tensor, **{f"{name}_{dim}": step for dim, step in zip(("block", "token", "head"), strides)}}
    return arguments


def _run(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor | None], angles: Angles, norms: Norms, cores: int, cache: Cache | None = None
) -> None:
    """Launch the kernel on q, k and maybe v, [B, S, N, D] each, for as many results."""
    q, k = inputs[:2]
    batch, tokens, q_heads, head_dim = q.shape
    plan = kernels.qkv_norm_rotary_launch(
        batch * tokens,
        q_heads,
        k.shape[2],
        head_dim,
        angles.width(head_dim),
        device_for(q, cores),
        **angles.constants(head_dim),
        **norms.constants(q.dtype),
    )
    tensors: dict[str, Any] = {}
    for i, name in enumerate(("q", "k", "v")):
        tensors |= strided(name, inputs[i] if i < len(inputs) else None) | strided(f"{name}_out", outputs[i] if i < len(outputs) else None)
    arguments = {**tensors, **angles.arguments(batch, tokens), **norms.arguments(), **_cached(cache)}
    launch(plan, q, rows=batch * tokens, tokens=tokens, **arguments)


# -------------------------------------------------------------------- q and k


@triton_op(
    "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, *, Tensor? positions=None, "
    "int weight_offset=0, str layout='half', int rotary_dim=-1, int sign=1, ScalarType? round_dtype=None, bool round_between=False, "
    "bool norm_last=False, int cores) -> (Tensor, Tensor)"
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
    positions: Tensor | None = None,
    weight_offset: int = 0,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    round_dtype: torch.dtype | None = None,
    round_between: bool = False,
    norm_last: bool = False,
    cores: int,
) -> tuple[Tensor, Tensor]:
    """`npu_fusion::qk_norm_rotary` in one launch.

    Args:
        q, k: [B, S, Nq, D] and [B, S, Nk, D], or [T, Nq, D] and [T, Nk, D], of one dtype and in any memory order, as in `rotary`.
        q_weight, k_weight: [D], fp16, bf16 or fp32, or None.
        cos, sin, positions, layout, rotary_dim, sign: as in `rotary`.
        eps, weight_offset, round_dtype, norm_last: as there.
        round_between: whether what the first of norm and rotation gives the second is rounded to the dtype of q.
        cores: vector cores of the device.

    Returns:
        q and k, each in the memory order of its input.

    Rounding: fp32 inside, but where `round_dtype` and `round_between` say; one cast at the end.

    Raises:
        as `rotary`.
    """
    angles = Angles(cos, sin, positions, layout, rotary_dim, sign)
    norms = Norms(q_weight, k_weight, eps, weight_offset, round_dtype, round_between, last=norm_last)
    _check_qk("qk_norm_rotary", q, k, angles, norms, cores)
    results = torch.empty_like(q), torch.empty_like(k)
    if q.numel() + k.numel() > 0:
        written = [writable(y) for y in results]
        _run([batched(readable(x)) for x in (q, k)], [batched(y) for y in written], angles, norms, cores)
        for y, there in zip(results, written):
            settle(y, there)
    return results


def _check_qk(op: str, q: Tensor, k: Tensor, angles: Angles, norms: Norms, cores: int) -> None:
    check_heads(op, q=q, k=k)
    check_value(op, q.dtype == k.dtype, f"q and k must have one dtype, not {q.dtype} and {k.dtype}")
    check_sizes(op, "k", k.shape, [*q.shape[:-2], k.shape[-2], q.shape[-1]])
    check_together(
        op, q=q, k=k, q_weight=norms.q_weight, k_weight=norms.k_weight, cos=angles.cos, sin=angles.sin, positions=angles.positions
    )
    check_cores(op, cores)
    angles.check(op, q.shape[:-2], q.shape[-1])
    norms.check(op, q.shape[-1])


@qk_norm_rotary.fake
def _(q: Tensor, k: Tensor, *tensors: Any, cores: int, **form: Any) -> tuple[Tensor, Tensor]:
    _check_qk("qk_norm_rotary", q, k, *_described(*tensors, **form), cores)
    return torch.empty_like(q), torch.empty_like(k)


# -------------------------------------------------------------------- from a merged projection


@dataclass(frozen=True)
class Projection:
    """How a row of a merged projection is made up: `queries` heads of q, then `keys` of k, then as many of v, of `size` elements each."""

    queries: int
    keys: int
    size: int

    def check(self, op: str, qkv: Tensor) -> None:
        check_dtypes(op, FLOATS, qkv=qkv)
        check_value(op, qkv.dim() in (2, 3), f"qkv must have 2 or 3 dimensions, not {qkv.dim()}")
        check_value(op, min(self.queries, self.keys, self.size) > 0, "num_heads, num_kv_heads and head_dim must be positive")
        check_sizes(op, "qkv's last dimension", qkv.shape[-1:], [(self.queries + 2 * self.keys) * self.size])
        check_row_length(op, "qkv", qkv.shape[-1])

    def split(self, qkv: Tensor) -> list[Tensor]:
        """q, k and v, [B, S, N, D], as views."""
        counts = (self.queries, self.keys, self.keys)
        heads = (qkv if qkv.dim() == 3 else qkv.unsqueeze(0)).unflatten(-1, (sum(counts), self.size))
        return list(heads.split(counts, dim=2))

    def empty(self, qkv: Tensor) -> list[Tensor]:
        """Memory for the results q, k and v, [..., N, D]."""
        return [qkv.new_empty((*qkv.shape[:-1], count, self.size)) for count in (self.queries, self.keys, self.keys)]


def _check_qkv(op: str, qkv: Tensor, heads: Projection, angles: Angles, norms: Norms, cores: int, cache: Cache | None = None) -> None:
    heads.check(op, qkv)
    caches = {} if cache is None else {"key_cache": cache.key, "value_cache": cache.value, "slots": cache.slots}
    tables = {"cos": angles.cos, "sin": angles.sin, "positions": angles.positions}
    check_together(op, qkv=qkv, q_weight=norms.q_weight, k_weight=norms.k_weight, **tables, **caches)
    check_cores(op, cores)
    angles.check(op, qkv.shape[:-1], heads.size)
    norms.check(op, heads.size)
    if cache is not None:
        cache.check(op, qkv.shape[:-1], heads.keys, heads.size)


@triton_op(
    "(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, *, int num_heads, int num_kv_heads, int head_dim, "
    "Tensor? positions=None, bool norm=True, int weight_offset=0, str layout='half', int rotary_dim=-1, int sign=1, "
    "ScalarType? round_dtype=None, bool round_between=False, int cores) -> (Tensor, Tensor, Tensor)"
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
    positions: Tensor | None = None,
    norm: bool = True,
    weight_offset: int = 0,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    round_dtype: torch.dtype | None = None,
    round_between: bool = False,
    cores: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`npu_fusion::qkv_norm_rotary` in one launch.

    Args:
        qkv: [B, S, (Nq + 2 Nkv) D] or [T, (Nq + 2 Nkv) D], fp16, bf16 or fp32; rows may lie apart.
        num_heads, num_kv_heads, head_dim: Nq, Nkv, D.
        norm: whether q and k are normalised; without it there are no weights, and eps has no meaning.
        q_weight, k_weight, cos, sin, eps, positions, weight_offset, layout, rotary_dim, sign, round_dtype, round_between, cores: as in
            `qk_norm_rotary`.

    Returns:
        q [..., Nq, D], k and v [..., Nkv, D], contiguous. (Those of `npu_fusion::qkv_norm_rotary` are the same memory seen heads first.)

    Rounding: as `qk_norm_rotary`; v is copied.

    Raises:
        as `rotary`.
    """
    angles, heads = Angles(cos, sin, positions, layout, rotary_dim, sign), Projection(num_heads, num_kv_heads, head_dim)
    norms = Norms(q_weight, k_weight, eps, weight_offset, round_dtype, round_between, given=norm)
    _check_qkv("qkv_norm_rotary", qkv, heads, angles, norms, cores)
    q, k, v = heads.empty(qkv)
    if qkv.numel() > 0:
        _run(heads.split(readable(qkv)), [batched(y) for y in (q, k, v)], angles, norms, cores)
    return q, k, v


@qkv_norm_rotary.fake
def _(
    qkv: Tensor, *tensors: Any, num_heads: int, num_kv_heads: int, head_dim: int, cores: int, **form: Any
) -> tuple[Tensor, Tensor, Tensor]:
    heads = Projection(num_heads, num_kv_heads, head_dim)
    _check_qkv("qkv_norm_rotary", qkv, heads, *_described(*tensors, **form), cores)
    q, k, v = heads.empty(qkv)
    return q, k, v


@triton_op(
    "(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slots, *, int num_heads, int num_kv_heads, int head_dim, Tensor? positions=None, bool norm=True, int weight_offset=0, "
    "str layout='half', int rotary_dim=-1, int sign=1, ScalarType? round_dtype=None, bool round_between=False, bool keep_kv=False, "
    "int cores) -> Tensor[]"
)
def qkv_norm_rotary_cache(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    positions: Tensor | None = None,
    norm: bool = True,
    weight_offset: int = 0,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    round_dtype: torch.dtype | None = None,
    round_between: bool = False,
    keep_kv: bool = False,
    cores: int,
) -> list[Tensor]:
    """`qkv_norm_rotary`, with the key and value of each token written to a paged cache in the same launch.

    Args:
        key_cache, value_cache: [blocks, page, Nkv, D], fp16, bf16 or fp32, written in place; in any memory order but that of the last
            dimension. They must not share memory with qkv.
        slots: [B, S] or [T] as qkv, int32 or int64: a token is written to row `slot % page` of block `slot // page`; not at all if its slot
            is negative. No two tokens may have one slot, and none one beyond the cache, which is not checked.
        keep_kv: whether k and v are results too.
        the rest: as `qkv_norm_rotary`.

    Returns:
        [q], or [q, k, v] with `keep_kv`, as those of `qkv_norm_rotary`.

    Rounding: as `qkv_norm_rotary`; one cast to the dtype of the caches.

    Raises:
        as `rotary`; ValueError where a cache's last dimension does not lie in one piece.
    """
    angles, heads = Angles(cos, sin, positions, layout, rotary_dim, sign), Projection(num_heads, num_kv_heads, head_dim)
    norms = Norms(q_weight, k_weight, eps, weight_offset, round_dtype, round_between, given=norm)
    cache = Cache(key_cache, value_cache, slots)
    _check_qkv("qkv_norm_rotary_cache", qkv, heads, angles, norms, cores, cache)
    results = heads.empty(qkv)[: 3 if keep_kv else 1]
    if qkv.numel() > 0:
        _run(heads.split(readable(qkv)), [batched(y) for y in results], angles, norms, cores, cache)
    return results


@qkv_norm_rotary_cache.fake
def _(qkv: Tensor, *tensors: Any, num_heads: int, num_kv_heads: int, head_dim: int, keep_kv: bool, cores: int, **form: Any) -> list[Tensor]:
    heads, cache = Projection(num_heads, num_kv_heads, head_dim), Cache(*tensors[-3:])
    _check_qkv("qkv_norm_rotary_cache", qkv, heads, *_described(*tensors[:-3], **form), cores, cache)
    return heads.empty(qkv)[: 3 if keep_kv else 1]


# -------------------------------------------------------------------- providers


def _options(b: Builder, a: Arguments, cores: int) -> dict[str, Any]:
    """What both providers hand on; rounding in between only where the configuration asks for the model's own."""
    exact, round_dtype = b.config.rounding == "exact", a.round_dtype
    b.require(not exact or round_dtype in (None, *FLOATS), f"the kernels do not round to {round_dtype}")
    rounding = {"round_dtype": round_dtype if exact else None, "round_between": exact, "weight_offset": a.weight_offset}
    for weight in (a.q_weight, a.k_weight):
        b.require(weight is None or b.val(weight).dtype in FLOATS, "a weight is none of float16, bfloat16, float32")
    return {"layout": a.layout, "rotary_dim": a.rotary_dim, "sign": a.sign, **rounding, "cores": cores}


@provides("qk_norm_rotary", "triton.qk_norm_rotary")
def _qk_norm_rotary(b: Builder, a: Arguments, cores: int) -> list[Node]:
    r = Rotation.of(a)
    q, k = (rotated(b, b.transpose(x, 1, 2) if a.heads_first else x, r) for x in (a.q, a.k))
    b.require((q.cos, q.sin) == (k.cos, k.sin), "the tables lie in different dimensions of q and of k")
    b.require(b.val(a.q).dtype == b.val(a.k).dtype, "q and k differ in dtype")
    tables = q.cos, q.sin
    options = {**_options(b, a, cores), "norm_last": a.norm_last}
    call = b.emit(qk_norm_rotary.overload, q.heads.node, k.heads.node, a.q_weight, a.k_weight, *tables, a.eps, **options)
    return [x.heads.restored(b, y) for x, y in zip((q, k), b.results(call, 2))]


@provides("qkv_norm_rotary", "triton.qkv_norm_rotary")
def _qkv_norm_rotary(b: Builder, a: Arguments, cores: int) -> list[Node]:
    q = rotated(b, _query(b, a), Rotation.of(a))
    b.require(q.heads.dim == 1, "the tables differ from head to head")
    heads = {"num_heads": a.num_heads, "num_kv_heads": a.num_kv_heads, "head_dim": a.head_dim, "norm": a.norm}
    call = b.emit(qkv_norm_rotary.overload, a.qkv, a.q_weight, a.k_weight, q.cos, q.sin, a.eps, **heads, **_options(b, a, cores))
    return [b.transpose(y, 1, 2) for y in b.results(call, 3)]


def _query(b: Builder, a: Arguments) -> Node:
    """q [B, N, S, D] as a view of the projection: what the tables broadcast to."""
    part = b.emit(aten.slice.Tensor, a.qkv, 2, 0, a.num_heads * a.head_dim)
    sizes = [b.size(a.qkv, 0), b.size(a.qkv, 1), a.num_heads, a.head_dim]
    return b.transpose(b.reshape(part, sizes), 1, 2)
