"""Multi-head latent attention before the attention itself: `mla_preprocess`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..semantic import semantic_op
from ._common import (
    Size,
    check_broadcastable,
    check_choice,
    check_min_rank,
    check_rank,
    check_same_dtype,
    check_sizes,
    check_type,
    check_value,
)
from .matmul import bmm_transpose
from .norm import rms_norm
from .quant import quant_linear, quantize
from .quant_core import QUANTIZATION_NAMES, QUANTIZE_SCHEMA
from .rope import LAYOUTS, rotary

SUM_NAMES = ("combined", "compute_dtype", "round_dtype")
"""Arguments of `quant_linear` that the three projections share; `mla_preprocess` has them with `sum_` before the name."""

_SUMS = "bool sum_rows_first=False, bool sum_combined=False, ScalarType? sum_compute_dtype=None, ScalarType? sum_round_dtype=None"


@dataclass(frozen=True)
class MlaShapes:
    """Sizes of a call, by the names of the DeepSeek papers.

    Attributes:
        lead: the leading dimensions of the tokens.
        heads: N.
        nope, rope: channels of a query head without and with position.
        latent: channels of the latent.
    """

    lead: tuple[Size, ...]
    heads: Size
    nope: Size
    rope: Size
    latent: Size

    @staticmethod
    def of(x: Any, k_b_weight: Any, q_b_weight: Any) -> MlaShapes:
        """From anything that has shapes: tensors, or values of the view."""
        heads, nope, latent = k_b_weight.shape
        return MlaShapes(tuple(x.shape[:-1]), heads, nope, q_b_weight.shape[1] // heads - nope, latent)


@dataclass(frozen=True)
class _Call:
    """The arguments of `mla_preprocess`; see there."""

    x: Tensor
    q_a_weight: Tensor
    kv_a_weight: Tensor
    q_b_weight: Tensor
    k_b_weight: Tensor
    q_norm_weight: Tensor | None
    kv_norm_weight: Tensor | None
    cos: Tensor
    sin: Tensor
    q_eps: float
    kv_eps: float
    x_scale: Tensor | None
    q_a_scale: Tensor | None
    kv_a_scale: Tensor | None
    q_b_scale: Tensor | None
    options: dict[str, Any]

    @property
    def shapes(self) -> MlaShapes:
        return MlaShapes.of(self.x, self.k_b_weight, self.q_b_weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.k_b_weight.dtype

    def check(self) -> None:
        op = "mla_preprocess"
        check_min_rank(op, 2, x=self.x)
        check_rank(op, 2, q_a_weight=self.q_a_weight, kv_a_weight=self.kv_a_weight, q_b_weight=self.q_b_weight)
        check_rank(op, 3, k_b_weight=self.k_b_weight)
        sizes, inputs = self.shapes, self.x.shape[-1]
        check_sizes(op, "q_a_weight", self.q_a_weight.shape, (inputs, self.q_b_weight.shape[0]))
        check_sizes(op, "kv_a_weight", self.kv_a_weight.shape, (inputs, sizes.latent + sizes.rope))
        check_sizes(op, "q_b_weight", self.q_b_weight.shape, (self.q_b_weight.shape[0], sizes.heads * (sizes.nope + sizes.rope)))
        for name, weight, scale in self._projections():
            whole = weight.dtype == torch.int8
            check_value(op, whole == (scale is not None), f"an int8 {name} has a scale, another one has none")
            if not whole:
                check_same_dtype(op, **{name: weight, "k_b_weight": self.k_b_weight})
        wanted = torch.int8 if self.x_scale is not None else self.dtype
        check_type(op, self.x.dtype == wanted, f"x must be {wanted}, not {self.x.dtype}")
        check_choice(op, "layout", self.options.get("layout", "half"), LAYOUTS)
        check_choice(op, "sign", self.options.get("sign", 1), (1, -1))
        rotated: tuple[Size, ...] = (*sizes.lead, sizes.heads, self.cos.shape[-1])
        heads_first = self.options.get("heads_first", False) or self.options.get("rope_heads_first", False)
        check_value(op, not heads_first or len(sizes.lead) == 2, "heads come first in front of [batch, tokens] only")
        if self.options.get("rope_heads_first", False):
            rotated = (rotated[0], rotated[2], rotated[1], rotated[3])
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            check_broadcastable(op, name, table.shape, rotated)

    def _projections(self) -> tuple[tuple[str, Tensor, Tensor | None], ...]:
        return (
            ("q_a_weight", self.q_a_weight, self.q_a_scale),
            ("kv_a_weight", self.kv_a_weight, self.kv_a_scale),
            ("q_b_weight", self.q_b_weight, self.q_b_scale),
        )

    # ---------------------------------------------------------------- computing

    def linear(self, x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor | None) -> Tensor:
        """One projection; int8 sums are scaled for rows and columns in the model's order."""
        if scale is None:
            return torch.matmul(x, weight)
        first, second = (x_scale, scale) if self.options.get("sum_rows_first", False) else (scale, x_scale)
        how = {name: self.options[f"sum_{name}"] for name in SUM_NAMES if f"sum_{name}" in self.options}
        result: Tensor = quant_linear(x, weight, first, second, out_dtype=self.dtype, **how)
        return result

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
        result: Tensor = rms_norm(x, weight, eps, round_dtype=self.options.get("round_dtype"), out_dtype=out_dtype)
        return result

    def query(self) -> Tensor:
        """The query heads before their rotation: [..., N, D + R]."""
        latent = self.linear(self.x, self.x_scale, self.q_a_weight, self.q_a_scale)
        normed, scale = self.norm(latent, self.q_norm_weight, self.q_eps, self.options.get("norm_dtype")), None
        if self.q_b_scale is not None:
            how = {name: self.options[name] for name in QUANTIZATION_NAMES if name in self.options}
            normed, scale, _ = quantize(normed, **how)
        query = self.linear(normed, scale, self.q_b_weight, self.q_b_scale)
        heads: Tensor = query.unflatten(-1, (self.shapes.heads, -1))
        return heads

    def rotate(self, q: Tensor, k: Tensor) -> list[Tensor]:
        """Both rotated, the heads where they are wanted."""
        if self.options.get("rope_heads_first", False):
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        rotated = rotary([q, k], self.cos, self.sin, layout=self.options.get("layout", "half"), sign=self.options.get("sign", 1))
        return [self.heads_last_in_memory(x, "rope_heads_first") for x in rotated]

    def heads_last_in_memory(self, x: Tensor, flag: str) -> Tensor:
        """The tensor, whose heads are its second dimension with the flag, stored with the heads inside."""
        if not self.options.get(flag, False):
            return x.contiguous()
        return x.transpose(1, 2).contiguous().transpose(1, 2)


_SCHEMA = (
    "(Tensor x, Tensor q_a_weight, Tensor kv_a_weight, Tensor q_b_weight, Tensor k_b_weight, Tensor? q_norm_weight, "
    "Tensor? kv_norm_weight, Tensor cos, Tensor sin, float q_eps, float kv_eps, Tensor? x_scale=None, Tensor? q_a_scale=None, "
    'Tensor? kv_a_scale=None, Tensor? q_b_scale=None, *, str layout="half", int sign=1, bool heads_first=False, '
    f"bool rope_heads_first=False, ScalarType? round_dtype=None, ScalarType? norm_dtype=None, {_SUMS}, {QUANTIZE_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@semantic_op("attention", _SCHEMA, parts=("rms_norm", "rotary", "bmm_transpose", "quantize", "quant_linear"))
def mla_preprocess(
    x: Tensor,
    q_a_weight: Tensor,
    kv_a_weight: Tensor,
    q_b_weight: Tensor,
    k_b_weight: Tensor,
    q_norm_weight: Tensor | None,
    kv_norm_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_eps: float,
    kv_eps: float,
    x_scale: Tensor | None = None,
    q_a_scale: Tensor | None = None,
    kv_a_scale: Tensor | None = None,
    q_b_scale: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Multi-head latent attention up to the attention: the absorbed queries and what is cached, of normalised hidden states.

    Maths: `q = rms_norm(x W_qa) W_qb` [..., N, D + R]; `kv = x W_kva` [..., C + R];
        `q_nope = q[..., :D] W_UK` for each head; `latent = rms_norm(kv[..., :C])`; `q_rope, k_rope = rotary(q[..., D:], kv[..., C:])`.

    Args:
        x: [..., H], floating point; or int8 with `x_scale`.
        q_a_weight: [H, L]; kv_a_weight: [H, C + R]; q_b_weight: [L, N * (D + R)]: in the dtype of `k_b_weight`, or int8 with a scale.
        k_b_weight: [N, D, C], W_UK, floating point: its dtype is that of everything that is not quantised.
        q_norm_weight, kv_norm_weight: [L] and [C], or None.
        cos, sin: as in `rotary`; they broadcast to [..., N, R], or [B, N, S, R] with `rope_heads_first`.
        q_eps, kv_eps: of the two norms.
        x_scale: of int8 x: broadcasts to [..., 1].
        q_a_scale, kv_a_scale, q_b_scale: of int8 weights, one for each column, as `scale` of `quant_linear`.
        options: `layout`, `sign` as in `rotary`; `heads_first`: q_nope is [B, N, S, C]; `rope_heads_first`: q_rope and k_rope have their
            heads before the tokens; `round_dtype` as in `rms_norm`, of both norms; `norm_dtype`: to which the norm of the queries is
            rounded, None: that of `k_b_weight`; `sum_combined`, `sum_compute_dtype`, `sum_round_dtype`: as those of `quant_linear`,
            `sum_rows_first`: the scales of rows multiply before those of columns; where `q_b_weight` is int8 the norm of the queries is
            quantised, by the arguments of `quantize`: `smooth`, `smooth_divide`, `apply`, `symmetric`, `with_zero`, `per_tensor`,
            `steps`, `steps_reciprocal`, `floor_mode`, `floor`, `round_last`, `low`, `high`, `dtype`, `compute_dtype`, `scale_dtype`,
            `value_dtype`.

    Returns:
        q_nope [..., N, C]; q_rope [..., N, R]; latent [..., C]; k_rope [..., 1, R]: each stored with the heads inside.

    Rounding: that of its parts one after the other: each projection, norm, rotation and product is rounded once to the dtype.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or choice does not fit, or a scale is missing or too many.

    Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, and DeepSeek-V3's inference/model.py; `npu_mla_prolog_v3` of torch_npu.
    """
    scales = (x_scale, q_a_scale, kv_a_scale, q_b_scale)
    weights = (q_a_weight, kv_a_weight, q_b_weight, k_b_weight, q_norm_weight, kv_norm_weight)
    call = _Call(x, *weights, cos, sin, q_eps, kv_eps, *scales, options)
    call.check()
    sizes = call.shapes
    nope, rope = call.query().split([sizes.nope, sizes.rope], dim=-1)
    kv = call.linear(x, x_scale, kv_a_weight, kv_a_scale)
    latent = call.norm(kv[..., : sizes.latent], kv_norm_weight, kv_eps).contiguous()
    q_rope, k_rope = call.rotate(rope, kv[..., None, sizes.latent :])
    absorbed = bmm_transpose(nope, k_b_weight)
    return absorbed.transpose(1, 2) if options.get("heads_first", False) else absorbed, q_rope, latent, k_rope


@mla_preprocess.fake
def _(
    x: Tensor,
    q_a_weight: Tensor,
    kv_a_weight: Tensor,
    q_b_weight: Tensor,
    k_b_weight: Tensor,
    q_norm_weight: Tensor | None,
    kv_norm_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_eps: float,
    kv_eps: float,
    x_scale: Tensor | None = None,
    q_a_scale: Tensor | None = None,
    kv_a_scale: Tensor | None = None,
    q_b_scale: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scales = (x_scale, q_a_scale, kv_a_scale, q_b_scale)
    weights = (q_a_weight, kv_a_weight, q_b_weight, k_b_weight, q_norm_weight, kv_norm_weight)
    call = _Call(x, *weights, cos, sin, q_eps, kv_eps, *scales, options)
    call.check()
    sizes = call.shapes

    def empty(*last: Size, flag: str = "") -> Tensor:
        result = k_b_weight.new_empty((*sizes.lead, *last))
        return result.transpose(1, 2) if options.get(flag, False) else result

    q_nope = empty(sizes.heads, sizes.latent, flag="heads_first")
    q_rope, k_rope = (empty(heads, sizes.rope, flag="rope_heads_first") for heads in (sizes.heads, 1))
    return q_nope, q_rope, empty(sizes.latent), k_rope
