"""What the quantised families share: `Quantization`, how a tensor is quantised, and `Dequantization`, how it becomes floating again.

Both are plain data: every op that quantises has the arguments of `QUANTIZE_SCHEMA` besides its own. The maths is a model's own, step by
step and rounding by rounding, so that a reference gives the model's bits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ._common import (
    check_broadcastable,
    check_choice,
    check_floating,
    check_floating_dtype,
    check_min_rank,
    check_sizes,
    check_type,
    check_value,
    stored_like,
)

APPLY = ("divide", "reciprocal", "narrow_reciprocal", "multiply")
FLOORS = ("none", "amax", "scale", "add_amax", "add_scale", "one_amax", "one")
WHOLE_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32)
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
CARRIERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Floating dtypes that may hold the whole numbers of a quantised tensor, in a model that quantises without storing."""

QUANTIZE_SCHEMA = (
    'Tensor? smooth=None, bool smooth_divide=False, str apply="divide", bool symmetric=True, bool with_zero=False, bool per_tensor=False, '
    'float steps=127.0, bool steps_reciprocal=False, str floor_mode="none", float floor=0.0, bool round_last=False, '
    "float low=-128.0, float high=127.0, ScalarType? dtype=None, "
    "ScalarType? compute_dtype=None, ScalarType? scale_dtype=None, ScalarType? value_dtype=None"
)

Quantized = tuple[Tensor, Tensor, Tensor]
"""q, the scale that was found and the zero point that was found; [0] where they were given or there is none."""


@dataclass(frozen=True)
class Quantization:
    """The arguments by which a tensor v [..., H] is quantised.

    Without a `scale` it is found: of each row, or of all with `per_tensor`. Names in backticks are the arguments.

    Maths, symmetric: `a = max(|v|)`; `s = a / steps`; q = round(v / s) within [`low`, `high`].
    Asymmetric: lo = min(v), hi = max(v) (with `with_zero` at most and at least 0); `s = (hi - lo) / steps`;
        `zero = round(low - lo / s)` within [`low`, `high`]; q = round(v / s) + zero within [`low`, `high`].
    Given: q = round(v / `scale`) + `zero_point` within [`low`, `high`].

    Args:
        scale: broadcasts to v, floating point; None: found.
        zero_point: broadcasts to v, whole or floating; with a `scale` only.
        smooth: [H], multiplies v first (divides with `smooth_divide`), in the dtype that both promote to.
        apply: `divide`: v / s; `reciprocal`: v * (1 / s), `narrow_reciprocal` with 1 / s rounded to the dtype of s; `multiply`: v * scale,
            or of a found scale v * (steps / a).
        steps: how many scales the range of a row is long, 127 for int8, 448 for float8_e4m3fn.
        steps_reciprocal: multiply by `1 / steps` in place of dividing.
        floor_mode: `none`; `amax`: a is at least `floor`; `scale`: s is; `add_amax`, `add_scale`: `floor` is added;
            `one_amax`, `one`: an a, or s, of 0 is 1.
        round_last: the zero point is added before rounding; a found zero point: rounded as `round(low - lo / s)` in place of
            `low - round(lo / s)`.
        low, high: the range of q.
        dtype: of q; None: int8; uint8, int16, int32; float8 (rounded by the cast); or a floating dtype that holds the whole numbers.
        compute_dtype: in which s is computed; None: that of v.
        scale_dtype: to which s is rounded; None: `compute_dtype`.
        value_dtype: in which v is divided; None: what v and s promote to.
    """

    scale: Tensor | None = None
    zero_point: Tensor | None = None
    smooth: Tensor | None = None
    smooth_divide: bool = False
    apply: str = "divide"
    symmetric: bool = True
    with_zero: bool = False
    per_tensor: bool = False
    steps: float = 127.0
    steps_reciprocal: bool = False
    floor_mode: str = "none"
    floor: float = 0.0
    round_last: bool = False
    low: float = -128.0
    high: float = 127.0
    dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    scale_dtype: torch.dtype | None = None
    value_dtype: torch.dtype | None = None

    @property
    def stored(self) -> torch.dtype:
        """The dtype of q."""
        return torch.int8 if self.dtype is None else self.dtype

    # ---------------------------------------------------------------- checks

    def check(self, op: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
        """Raise TypeError or ValueError unless x can be quantised so; `dtype` is that of v where it is not x's."""
        check_min_rank(op, 1, x=x)
        check_floating_dtype(op, "what is quantised", dtype or x.dtype)
        check_floating(op, scale=self.scale, smooth=self.smooth)
        check_choice(op, "apply", self.apply, APPLY)
        check_choice(op, "floor_mode", self.floor_mode, FLOORS)
        check_choice(op, "dtype", self.stored, (*WHOLE_DTYPES, *FLOAT8_DTYPES, *CARRIERS))
        for name in ("compute_dtype", "scale_dtype", "value_dtype"):
            check_floating_dtype(op, name, getattr(self, name))
        check_value(op, self.low < self.high, f"low must be less than high: {self.low}, {self.high}")
        check_value(op, self.steps > 0, f"steps must be positive: {self.steps}")
        if self.smooth is not None:
            check_sizes(op, "smooth", self.smooth.shape, x.shape[-1:])
        self._check_given(op, x)

    def _check_given(self, op: str, x: Tensor) -> None:
        if self.scale is None:
            check_value(op, self.zero_point is None, "a zero point needs a scale")
            return
        check_value(op, self.symmetric and not self.per_tensor, "a given scale is not found: no symmetric=False, per_tensor")
        check_broadcastable(op, "scale", self.scale.shape, x.shape)
        if self.zero_point is not None:
            check_type(op, self.zero_point.dtype != torch.bool and not self.zero_point.is_complex(), "zero_point must be a real number")
            check_broadcastable(op, "zero_point", self.zero_point.shape, x.shape)

    # ---------------------------------------------------------------- computing

    def quantize(self, x: Tensor) -> Quantized:
        """q, scale and zero point; see the class."""
        v = x
        if self.smooth is not None:
            v = v / self.smooth if self.smooth_divide else v * self.smooth
        if self.scale is not None:
            q = self._rounded(self._scaled(v, self.scale, self.apply), self.zero_point)
            return stored_like(q, x), *self._nothing(x)
        scale, zero = self._found(v)
        apply = self.apply
        factor = scale
        if apply == "multiply":
            factor = self.steps / self._floored_amax(v)
        if self.per_tensor:
            factor = factor.reshape(())  # one number: `value_dtype` is what v had, if the model did not cast it
        q = self._rounded(self._scaled(v, factor, apply), zero)
        return stored_like(q, x), scale, x.new_empty((0,), dtype=scale.dtype) if zero is None else zero

    def _extreme(self, v: Tensor, name: str) -> Tensor:
        dims = list(range(v.dim())) if self.per_tensor else [-1]
        found: Tensor = getattr(v, name)(dim=dims, keepdim=True)
        return found.to(self.compute_dtype or v.dtype)

    def _floored_amax(self, v: Tensor) -> Tensor:
        amax = self._extreme(v.abs(), "amax")
        if self.floor_mode == "amax":
            return amax.clamp(min=self.floor)
        if self.floor_mode == "one_amax":
            return torch.where(amax == 0, 1.0, amax)
        return amax + self.floor if self.floor_mode == "add_amax" else amax

    def _found(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.symmetric:
            return self._finished(self._floored_amax(v)), None
        low, high = self._extreme(v, "amin"), self._extreme(v, "amax")
        if self.with_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = self._finished(high - low)
        ratio = low / scale
        zero = torch.round(self.low - ratio) if self.round_last else self.low - torch.round(ratio)
        return scale, zero.clamp(self.low, self.high)

    def _finished(self, span: Tensor) -> Tensor:
        """The scale of rows of which the range is given."""
        scale = span * (1.0 / self.steps) if self.steps_reciprocal else span / self.steps
        if self.floor_mode == "scale":
            scale = scale.clamp(min=self.floor)
        elif self.floor_mode == "add_scale":
            scale = scale + self.floor
        elif self.floor_mode == "one":
            scale = torch.where(scale == 0, 1.0, scale)
        return scale.to(self.scale_dtype or scale.dtype)

    def _scaled(self, v: Tensor, scale: Tensor, apply: str) -> Tensor:
        dtype = self.value_dtype or torch.promote_types(v.dtype, scale.dtype)
        if apply == "reciprocal":
            scale = 1.0 / scale.to(torch.promote_types(dtype, scale.dtype))
        elif apply == "narrow_reciprocal":
            scale = 1.0 / scale
        v = v.to(dtype)
        scale = scale.to(dtype) if scale.dim() else scale  # one number is not rounded to the type of what it divides
        return v / scale if apply == "divide" else v * scale

    def _rounded(self, value: Tensor, zero: Tensor | None) -> Tensor:
        if self.stored in FLOAT8_DTYPES:
            return value.clamp(self.low, self.high).to(self.stored)
        if zero is None:
            return torch.round(value).clamp(self.low, self.high).to(self.stored)
        value = torch.round(value + zero) if self.round_last else torch.round(value) + zero
        return value.clamp(self.low, self.high).to(self.stored)

    # ---------------------------------------------------------------- metadata

    def _nothing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        empty = x.new_empty((0,), dtype=torch.float32)
        return empty, torch.empty_like(empty)

    def empty(self, x: Tensor, dtype: torch.dtype | None = None) -> Quantized:
        """The metadata of the results for x, or for an x of that dtype."""
        q = torch.empty_like(x, dtype=self.stored)
        if self.scale is not None:
            return q, *self._nothing(x)
        v = dtype or x.dtype
        v = v if self.smooth is None else torch.promote_types(v, self.smooth.dtype)
        computed = self.compute_dtype or v
        sizes = [1] * x.dim() if self.per_tensor else [*x.shape[:-1], 1]
        scale = x.new_empty(sizes, dtype=self.scale_dtype or computed)
        zero_dtype = torch.promote_types(computed, scale.dtype)
        return q, scale, x.new_empty((0,) if self.symmetric else sizes, dtype=scale.dtype if self.symmetric else zero_dtype)


QUANTIZATION_NAMES = tuple(field.name for field in fields(Quantization))


@dataclass(frozen=True)
class Dequantization:
    """The arguments by which whole numbers n [..., N] become floating.

    Maths: `(n - zero_point) * scale * scale2 + bias`, or with `combined` `(n - zero_point) * (scale * scale2) + bias`; with `bias_first`
    the bias, then of int32, is added to n.

    Args:
        scale, scale2: broadcast to n, floating point; of the weight and of the activation in either order; None: 1.
        zero_point: broadcasts to n; or None.
        bias: broadcasts to n; or None.
        compute_dtype: in which the scales multiply; None: float32.
        round_dtype: to which the product is rounded before the bias; None: it is not.
        out_dtype: of the result; None: what the last step gives.
    """

    scale: Tensor | None = None
    scale2: Tensor | None = None
    zero_point: Tensor | None = None
    bias: Tensor | None = None
    combined: bool = False
    bias_first: bool = False
    compute_dtype: torch.dtype | None = None
    round_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the numbers stay whole."""
        return self.scale is None and self.out_dtype in (None, torch.int32)

    @property
    def result_dtype(self) -> torch.dtype:
        if self.out_dtype is not None:
            return self.out_dtype
        if self.is_identity:
            return torch.int32
        dtype = self.round_dtype or self.compute_dtype or torch.float32
        return dtype if self.bias is None or self.bias_first else torch.promote_types(dtype, self.bias.dtype)

    def check(self, op: str, shape: torch.Size) -> None:
        """Raise TypeError or ValueError unless numbers of the shape can be dequantised so."""
        check_floating(op, scale=self.scale, scale2=self.scale2)
        for name in ("compute_dtype", "round_dtype"):
            check_floating_dtype(op, name, getattr(self, name))
        check_value(op, self.scale is not None or self.scale2 is None, "scale2 needs a scale")
        check_value(op, self.bias is not None or not self.bias_first, "bias_first needs a bias")
        if self.bias is not None:
            whole = self.bias.dtype == torch.int32
            check_type(
                op, whole if self.bias_first or self.is_identity else self.bias.is_floating_point(), "bias has another kind of dtype"
            )
        check_value(op, not self.is_identity or self.bias is None or self.bias_first, "whole results have a whole bias, added first")
        for name in ("scale", "scale2", "zero_point", "bias"):
            if (tensor := getattr(self, name)) is not None:
                check_broadcastable(op, name, tensor.shape, shape)

    def dequantize(self, n: Tensor) -> Tensor:
        """The floating numbers; see the class."""
        if self.bias is not None and self.bias_first:
            n = n + self.bias
        if self.is_identity:
            return n
        dtype = self.compute_dtype or torch.float32
        y = n.to(dtype)
        if self.zero_point is not None:
            y = y - self.zero_point.to(dtype)
        if self.scale is not None and self.scale2 is not None:
            first, second = self.scale.to(dtype), self.scale2.to(dtype)
            y = y * (first * second) if self.combined else y * first * second
        elif self.scale is not None:
            y = y * self.scale.to(dtype)
        if self.round_dtype is not None:
            y = y.to(self.round_dtype)
        if self.bias is not None and not self.bias_first:
            y = y + self.bias
        return y.to(self.result_dtype)


DEQUANTIZATION_NAMES = tuple(field.name for field in fields(Dequantization))
