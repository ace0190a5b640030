"""CPU kernels of quantisation: npu_dynamic_quant, npu_quantize, and the norms and gated units whose result is quantised.

Source: op-plugin docs of each op; rounding points from ops-nn `quant/*/op_kernel`, `norm/*/op_kernel` (A2, A3). All compute in fp32, round
halves to even. Dynamic scales are 1 / (127 / max), by which a row of zeros has the scale 0; npu_swiglu_quant returns 127 / max itself, and
npu_dequant_swiglu_quant divides by max / 127.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import npu_add_rms_norm
from .registry import FLOATS, check, check_dtype, check_same_dtype, emulates, refuse

_HALVES = (torch.float16, torch.bfloat16)
_MOST = 127.0
_BYTES = {1: torch.int8, 12: torch.int8, 13: torch.uint8}
_WIDEST = 8192  # the last dimension of npu_swiglu_quant


def _stored(value: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Rounded to the nearest number of the dtype; what is no number becomes 0."""
    limits = torch.iinfo(dtype)
    return value.round().nan_to_num(nan=0.0).clamp(limits.min, limits.max).to(dtype)


def dynamic(value: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of fp32 rows, and 127 / max of each."""
    factor = _MOST / value.abs().amax(-1)
    return _stored(value * factor.unsqueeze(-1)), factor


def _check_vector(op: str, name: str, vector: Tensor | None, x: Tensor) -> None:
    if vector is not None:
        check(
            op, vector.shape == x.shape[-1:], f"{name} of shape {list(vector.shape)} does not match the last dimension of {list(x.shape)}"
        )


# -------------------------------------------------------------------- quantisation by itself


@emulates("npu::npu_dynamic_quant")
def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`scale = max |input * smooth| / 127` of each row, `y = round(input * smooth / scale)`."""
    op = "npu_dynamic_quant"
    check_dtype(op, "input", input, *_HALVES)
    check(op, input.dim() > 1, "input must have more than one dimension")
    check_same_dtype(op, input=input, smooth_scales=smooth_scales)
    refuse(op, group_index=group_index)
    check(op, dst_type in (None, 1), "the CPU kernel supports int8 only")
    check(op, quant_mode == "pertoken" and dst_type_max == 0.0, "the CPU kernel supports quant_mode='pertoken' without dst_type_max")
    _check_vector(op, "smooth_scales", smooth_scales, input)
    value = input.float() if smooth_scales is None else input.float() * smooth_scales.float()
    q, factor = dynamic(value)
    return q, 1 / factor


@npu_dynamic_quant.fake
def _(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape, dtype=torch.int8), input.new_empty(input.shape[:-1], dtype=torch.float32)


@emulates("npu::npu_quantize")
def npu_quantize(input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True) -> Tensor:
    """`round(input / scales + zero_points)`, or `round(input * scales + zero_points)` without `div_mode`, saturated."""
    op = "npu_quantize"
    check_dtype(op, "input", input, *FLOATS)
    check(op, dtype in ((1, 12, 13) if div_mode else (1, 12)), f"the CPU kernel supports qint8, and quint8 with div_mode, not {dtype}")
    check(op, axis in (-1, input.dim() - 1), "the CPU kernel quantises along the last axis")
    if div_mode:
        check_dtype(op, "scales", scales, torch.float32, torch.bfloat16)
        if zero_points is not None:
            check_dtype(op, "zero_points", zero_points, torch.int8, torch.uint8, torch.int32, torch.bfloat16)
    else:
        check_same_dtype(op, input=input, scales=scales, zero_points=zero_points)
    for name, vector in (("scales", scales), ("zero_points", zero_points)):
        check(op, vector is None or vector.dim() == 1, f"{name} must have one dimension")
        if vector is not None and vector.shape[0] != 1:
            _check_vector(op, name, vector, input)
    value = input.float() / scales.float() if div_mode else input.float() * scales.float()
    if zero_points is not None:
        value = value + zero_points.float()
    return _stored(value, _BYTES[dtype])


@npu_quantize.fake
def _(input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True) -> Tensor:
    return input.new_empty(input.shape, dtype=_BYTES[dtype])


# -------------------------------------------------------------------- norms


@emulates("npu::npu_add_rms_norm_dynamic_quant")
def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] | None = None,
    y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`x = x1 + x2`; the RMSNorm of the fp32 sum times `gamma` plus `beta`, quantised as by npu_dynamic_quant, once or twice."""
    op = "npu_add_rms_norm_dynamic_quant"
    check_dtype(op, "x1", x1, *_HALVES)
    check_same_dtype(op, x1=x1, x2=x2, gamma=gamma, smooth_scale1=smooth_scale1, smooth_scale2=smooth_scale2, beta=beta)
    check(op, x1.shape == x2.shape, f"x1 and x2 must have one shape, not {list(x1.shape)} and {list(x2.shape)}")
    check(op, y_dtype in (None, 1), "the CPU kernel supports int8 only")
    for name, vector in (("gamma", gamma), ("smooth_scale1", smooth_scale1), ("smooth_scale2", smooth_scale2), ("beta", beta)):
        _check_vector(op, name, vector, x1)
    total = x1.float() + x2.float()
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + epsilon) * gamma.float()
    y = y if beta is None else y + beta.float()
    results = []
    for smooth, wanted in zip((smooth_scale1, smooth_scale2), _outputs(smooth_scale1, smooth_scale2, output_mask)):
        q, factor = dynamic(y if smooth is None else y * smooth.float())
        results.append((q, 1 / factor) if wanted else (q.new_empty((0,)), factor.new_empty((0,))))
    (y1, scale1), (y2, scale2) = results
    return y1, y2, total.to(x1.dtype), scale1, scale2


def _outputs(smooth1: Tensor | None, smooth2: Tensor | None, mask: Sequence[bool] | None) -> tuple[bool, bool]:
    """Which results there are: those of the mask, or the first, and the second where both are smoothed."""
    return (mask[0], mask[1]) if mask else (True, smooth1 is not None and smooth2 is not None)


@npu_add_rms_norm_dynamic_quant.fake
def _(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] | None = None,
    y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = _outputs(smooth_scale1, smooth_scale2, output_mask)
    y1, y2 = (x1.new_empty(x1.shape if there else (0,), dtype=torch.int8) for there in wanted)
    scale1, scale2 = (x1.new_empty(x1.shape[:-1] if there else (0,), dtype=torch.float32) for there in wanted)
    return y1, y2, x1.new_empty(x1.shape), scale1, scale2


@emulates("npu::npu_add_rms_norm_quant")
def npu_add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`x = x1 + x2`, its RMSNorm y, and `round(y / scales1 + zero_points1)`; fp16 rounds as npu_add_rms_norm does, bf16 nowhere."""
    op = "npu_add_rms_norm_quant"
    check_dtype(op, "x1", x1, *_HALVES)
    check_same_dtype(op, x1=x1, x2=x2, gamma=gamma)
    check(op, x1.shape == x2.shape, f"x1 and x2 must have one shape, not {list(x1.shape)} and {list(x2.shape)}")
    refuse(op, beta=beta, scales2=scales2, zero_points2=zero_points2)
    check(op, dst_type in (None, 1), "the CPU kernel supports int8 only")
    check_dtype(op, "scales1", scales1, torch.float32, torch.bfloat16)
    if zero_points1 is not None:
        check_dtype(op, "zero_points1", zero_points1, torch.int32, torch.bfloat16)
    for name, vector in (("gamma", gamma), ("scales1", scales1), ("zero_points1", zero_points1)):
        _check_vector(op, name, vector, x1)
    if x1.dtype == torch.float16:
        rounded, _, total = npu_add_rms_norm(x1, x2, gamma, epsilon)
        y = rounded.float()
    else:
        exact = x1.float() + x2.float()
        total = exact.to(x1.dtype)
        y = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon) * gamma.float()
    value = y / scales1.float() if div_mode else y * scales1.float()
    q = _stored(value if zero_points1 is None else value + zero_points1.float())
    return q, torch.empty_like(q), total


@npu_add_rms_norm_quant.fake
def _(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    y1, y2 = (x1.new_empty(x1.shape, dtype=torch.int8) for _ in range(2))
    return y1, y2, x1.new_empty(x1.shape)


# -------------------------------------------------------------------- gated units


def _swiglu(value: Tensor, activate_left: bool) -> Tensor:
    left, right = value.chunk(2, -1)
    return F.silu(left) * right if activate_left else F.silu(right) * left


def _row(op: str, name: str, row: Tensor | None, width: int) -> None:
    if row is not None:
        check(op, tuple(row.shape) == (1, width), f"{name} must be [1, {width}], not {list(row.shape)}")


@emulates("npu::npu_swiglu_quant")
def npu_swiglu_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """silu of one half times the other, times `smooth_scales`; `out = round(y * scale)` where `scale = 127 / max |y|` of each row."""
    op = "npu_swiglu_quant"
    check_dtype(op, "x", x, *FLOATS)
    width = x.shape[-1]
    check(op, x.dim() > 1 and width % 2 == 0 and width <= _WIDEST, f"x must have rows of an even size of at most {_WIDEST}, not {width}")
    refuse(op, offsets=offsets, group_index=group_index)
    check(op, quant_mode == 1, "the CPU kernel supports dynamic quantisation, quant_mode=1")
    check(op, dst_type in (None, torch.int8), "the CPU kernel supports int8 only")
    _row(op, "smooth_scales", smooth_scales, width // 2)
    y = _swiglu(x.float(), activate_left)
    return dynamic(y if smooth_scales is None else y * smooth_scales)


@npu_swiglu_quant.fake
def _(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    return x.new_empty((*lead, x.shape[-1] // 2), dtype=torch.int8), x.new_empty(lead, dtype=torch.float32)


@emulates("npu::npu_dequant_swiglu_quant")
def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """silu of one half of `(x + bias) * weight_scale * activation_scale` times the other; `scale = max |y| / 127`, `round(y / scale)`.

    With `group_index` the rows fall into groups of so many, each of which has its own row of weight_scale.
    """
    op = "npu_dequant_swiglu_quant"
    check_dtype(op, "x", x, torch.int32)
    check(op, x.dim() == 2 and x.shape[1] % 64 == 0, f"x must be [rows, 2H] with 2H a multiple of 64, not {list(x.shape)}")
    refuse(op, quant_offset=quant_offset, dst_type=dst_type, round_mode=round_mode, activate_dim=activate_dim)
    check(op, quant_mode == 1 and swiglu_mode == 0, "the CPU kernel supports quant_mode=1 and swiglu_mode=0")
    if weight_scale is None or activation_scale is None:
        check(op, False, "an int32 x needs weight_scale and activation_scale")
        raise AssertionError
    check(op, activation_scale.shape == x.shape[:1], f"activation_scale must be [{x.shape[0]}], not {list(activation_scale.shape)}")
    if group_index is not None:
        check_dtype(op, "group_index", group_index, torch.int64)
        check(op, bias is None and quant_scale is None, "the CPU kernel supports neither bias nor quant_scale with group_index")
        wanted = (group_index.shape[0], x.shape[1])
        check(op, weight_scale.shape == wanted, f"weight_scale must be {list(wanted)}, not {list(weight_scale.shape)}")
        weight_scale = weight_scale.repeat_interleave(group_index, 0)
    else:
        _row(op, "weight_scale", weight_scale, x.shape[1])
    _row(op, "quant_scale", quant_scale, x.shape[1] // 2)
    sums = x if bias is None else x + bias
    y = _swiglu(sums.float() * weight_scale * activation_scale.unsqueeze(-1), activate_left)
    y = y if quant_scale is None else y * quant_scale.float()
    scale = y.abs().amax(-1) * (1 / _MOST)
    return _stored(y / scale.unsqueeze(-1)), scale


@npu_dequant_swiglu_quant.fake
def _(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.int8), x.new_empty((x.shape[0],), dtype=torch.float32)
