"""Mixture of experts with quantised matrices and floating activations: `moe_experts_weight_only`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..semantic import semantic_op
from ._common import check_floating, check_rank, check_sizes, check_type, check_value
from .experts import moe_experts
from .weight_only import dequantised

_OP = "moe_experts_weight_only"
_WORDS = {torch.int32: 32, torch.uint8: 8, torch.int8: 8}
_CODES = (torch.int8, torch.uint8)


def _shape(name: str, weight: Tensor, shifts: Sequence[int], packs_inputs: bool, plane: int) -> tuple[Any, Any, Any]:
    """Raise unless the matrices are whole numbers, or words packed as said; how many there are, their outputs and inputs."""
    check_rank(_OP, 3, **{name: weight})
    experts, outputs, inputs = weight.shape
    if not shifts:
        check_type(_OP, weight.dtype in _CODES, f"{name} must be int8 or uint8, not {weight.dtype}")
        return experts, outputs, inputs
    check_type(_OP, weight.dtype in _WORDS, f"packed {name} must be int32, int8 or uint8, not {weight.dtype}")
    fits = sorted(shifts) == list(range(0, _WORDS[weight.dtype], 4))
    check_value(_OP, fits, f"shifts must name every nibble of {weight.dtype} once, not {list(shifts)}")
    packed = inputs if packs_inputs else outputs
    whole = plane > 0 and (not isinstance(packed, int) or packed % plane == 0)
    check_value(_OP, whole, f"planes of {plane} words do not make up {packed} of them")
    return (experts, outputs, inputs * len(shifts)) if packs_inputs else (experts, outputs * len(shifts), inputs)


def _matrix(
    name: str, weight: Tensor, scale: Tensor | None, zero: Tensor | None, dtype: torch.dtype, layout: dict[str, Any], *, fake: bool
) -> Tensor:
    """The matrices [E, inputs, outputs] that quantised ones stand for; in a fake kernel of metadata alone."""
    shape = {key: layout[key] for key in ("shifts", "packs_inputs", "plane")}
    experts, outputs, inputs = _shape(name, weight, **shape)
    if scale is None:
        raise ValueError(f"{_OP}: {name} needs a scale")
    check_floating(_OP, **{f"{name}_scale": scale})
    check_rank(_OP, 3, **{f"{name}_scale": scale})
    groups = scale.shape[2]
    check_sizes(_OP, f"{name}_scale", scale.shape, (experts, outputs, groups))
    whole = not isinstance(inputs, int) or not isinstance(groups, int) or (groups > 0 and inputs % groups == 0)
    check_value(_OP, whole, f"{groups} groups do not divide {inputs} inputs")
    if zero is not None:
        check_sizes(_OP, f"{name}_zero", zero.shape, scale.shape)
    if fake:
        return weight.new_empty((experts, outputs, inputs), dtype=dtype).transpose(1, 2)
    flat = [tensor if tensor is None else tensor.flatten(0, 1) for tensor in (weight, scale, zero)]
    assert flat[0] is not None
    assert flat[1] is not None
    stack: Tensor = dequantised(flat[0], flat[1], flat[2], dtype, **layout).unflatten(0, (experts, outputs)).transpose(1, 2)
    return stack


def _experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    matrices: dict[str, tuple[Tensor | None, Tensor | None, Tensor | None]],
    options: dict[str, Any],
    *,
    fake: bool,
) -> Tensor:
    defaults = {"shifts": (), "packs_inputs": True, "plane": 1, "signed": False, "offset": 0}
    layout = {name: options.get(name, default) for name, default in defaults.items()}
    unit = {name: value for name, value in options.items() if name not in layout}
    found = {
        name: None if weight is None else _matrix(name, weight, scale, zero, x.dtype, layout, fake=fake)
        for name, (weight, scale, zero) in matrices.items()
    }
    y: Tensor = moe_experts(x, indices, weights, found["gate_up"], found["up"], found["down"], **unit)
    return y


@semantic_op(
    "moe",
    "(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor gate_up_scale, Tensor? gate_up_zero, Tensor? up, Tensor? up_scale, "
    "Tensor? up_zero, Tensor down, Tensor down_scale, Tensor? down_zero, *, int[] shifts=[], bool packs_inputs=True, int plane=1, "
    'bool signed=False, int offset=0, str activation="silu", str layout="halves", float alpha=1.0, float? gate_limit=None, '
    "float? up_limit=None, float up_offset=0.0, ScalarType? round_dtype=None, ScalarType? product_dtype=None, "
    "ScalarType? out_dtype=None) -> Tensor",
)
def moe_experts_weight_only(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    gate_up_zero: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    up_zero: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    **options: Any,
) -> Tensor:
    """Routed experts whose matrices are integers that are dequantised by a scale for each output, or each group of its inputs.

    Maths: `moe_experts` of the matrices `((code - offset - zero) * scale)^T`, where `code` is the number or, with `shifts`, a nibble of a
    word, as in `weight_only_linear`. All three matrices are packed in one way.

    Args:
        x, indices, weights: as in `moe_experts`.
        gate_up: [E, 2I, H], int8 or uint8; packed int32 (P = 8), int8 or uint8 (P = 2): [E, 2I, H / P], or [E, 2I / P, H].
        gate_up_scale: [E, 2I, G], floating point; G divides H. gate_up_zero: shaped like the scale, or None.
        up, up_scale, up_zero: of [E, I, H], where gate and up are two products; or None.
        down, down_scale, down_zero: of [E, N, I].
        options: `shifts`, `packs_inputs`, `plane`, `signed`, `offset` as in `weight_only_linear`; `activation`, `layout`, `alpha`,
            `gate_limit`, `up_limit`, `up_offset`, `round_dtype`, `product_dtype`, `out_dtype` as in `moe_experts`.

    Returns:
        [T, N], contiguous.

    Rounding: the matrices are dequantised in fp32 (fp64 for fp64) and rounded once to the dtype of x; then as in `moe_experts`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a rank, size, shift or choice does not fit.

    Source: AWQ, https://arxiv.org/abs/2306.00978; GPTQ, https://arxiv.org/abs/2210.17323; torch_npu's npu_grouped_matmul
        (antiquant_scale, antiquant_offset).
    """
    matrices = {"gate_up": (gate_up, gate_up_scale, gate_up_zero), "up": (up, up_scale, up_zero)}
    return _experts(x, indices, weights, matrices | {"down": (down, down_scale, down_zero)}, options, fake=False)


@moe_experts_weight_only.fake
def _(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    gate_up_zero: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    up_zero: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    **options: Any,
) -> Tensor:
    matrices = {"gate_up": (gate_up, gate_up_scale, gate_up_zero), "up": (up, up_scale, up_zero)}
    return _experts(x, indices, weights, matrices | {"down": (down, down_scale, down_zero)}, options, fake=True)
