"""Routed experts in int8 by Triton: the op grouped_int8, and the provider of `moe_experts_int8`.

Tokens are quantised once, and sorted with their scales. Nothing waits for the device and no size depends on the routing; rows of no expert
lie behind the last group, hold anything, and add nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels import grouped_int8 as kernels
from ...kernels.int8_matmul import MOST_INPUTS
from ...lower import Arguments, Builder
from ...ops._common import check_rank, check_sizes, check_value
from ...view.shapes import to_dim
from ..quant_forms import is_exact
from .checks import FLOATS, LIMIT_32, check_cores, check_dtypes, check_together
from .define import device_for, launch, triton_op
from .glu_quant import glu_quant
from .permute import MOST_CHOSEN, MOST_EXPERTS, moe_permute, moe_unpermute
from .provide import cores_of, provides, require_width
from .quant import dynamic_quantize
from .quantised import symmetric

_MOST_TILE = 256  # rows or columns of a tile, whose places are counted in 32 bits


@triton_op("(Tensor x, Tensor weight, Tensor weight_scale, Tensor x_scale, Tensor counts, *, ScalarType out_dtype, int cores) -> Tensor")
def grouped_int8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor, counts: Tensor, *, out_dtype: torch.dtype, cores: int
) -> Tensor:
    """y[r] = (x[r] W[g]) * weight_scale[g] * x_scale[r] in one launch, g being the group of row r; contiguous result.

    Args:
        x: int8 [rows, K], rows sorted by group.
        weight: int8 [G, K, N], matrices stored in either order, one of their strides 1; copied where neither is.
        weight_scale: [G, N], fp16, bf16 or fp32.
        x_scale: [rows], fp32.
        counts: int32 [G], how many rows each group has, all of them at most those of x; rows behind the last have no group.
        out_dtype: fp16, bf16 or fp32.
        cores: matrix cores of the device.

    Returns:
        [rows, N]; rows of no group hold anything.

    Rounding: sums are exact in int32; then fp32, one cast at the end.

    Raises:
        TypeError: a dtype is none of those.
        ValueError: a shape does not fit, tensors lie on several devices, K products may exceed int32, or there are more than 512 groups.

    Source: op-plugin doc npu_grouped_matmul (scale, per_token_scale).
    """
    _check_grouped(x, weight, weight_scale, x_scale, counts, out_dtype, cores)
    groups, inputs, outputs = weight.shape
    y = x.new_empty((x.shape[0], outputs), dtype=out_dtype)
    if y.numel() == 0:
        return y
    if inputs == 0:
        return y.zero_()
    if 1 not in weight.stride()[1:] or max(weight.stride()[1:]) * _MOST_TILE >= LIMIT_32:
        weight = weight.contiguous()
    along_inputs = weight.stride(1) == 1 and inputs > 1
    plan = kernels.grouped_int8_launch(x.shape[0], groups, inputs, outputs, device_for(x, cores), along_inputs=along_inputs)
    tensors = {"x_ptr": x, "x_scale_ptr": x_scale, "weight_scale_ptr": weight_scale, "counts_ptr": counts}
    strides = {"weight_stride": weight.stride(2 if along_inputs else 1), "group_stride": weight.stride(0)}
    launch(plan, x, **{name: tensor.contiguous() for name, tensor in tensors.items()}, weight_ptr=weight, y_ptr=y, **strides)
    return y


def _check_grouped(
    x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor, counts: Tensor, out_dtype: torch.dtype, cores: int
) -> None:
    op = "grouped_int8"
    check_dtypes(op, (torch.int8,), x=x, weight=weight)
    check_dtypes(op, FLOATS, weight_scale=weight_scale)
    check_dtypes(op, (torch.float32,), x_scale=x_scale)
    check_dtypes(op, (torch.int32,), counts=counts)
    check_value(op, out_dtype in FLOATS, f"out_dtype must be one of float16, bfloat16, float32, not {out_dtype}")
    check_together(op, x=x, weight=weight, weight_scale=weight_scale, x_scale=x_scale, counts=counts)
    check_cores(op, cores)
    check_rank(op, 2, x=x)
    check_rank(op, 3, weight=weight)
    groups, inputs, outputs = weight.shape
    check_sizes(op, "x", x.shape, (x.shape[0], inputs))
    check_sizes(op, "weight_scale", weight_scale.shape, (groups, outputs))
    check_sizes(op, "x_scale", x_scale.shape, x.shape[:1])
    check_sizes(op, "counts", counts.shape, (groups,))
    check_value(op, not statically_known_true(inputs > MOST_INPUTS), f"{inputs} products, of which {MOST_INPUTS} fit into int32")
    check_value(op, not statically_known_true(groups > MOST_EXPERTS), f"{groups} groups, of which there may be {MOST_EXPERTS}")


@grouped_int8.fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor, counts: Tensor, *, out_dtype: torch.dtype, cores: int) -> Tensor:
    _check_grouped(x, weight, weight_scale, x_scale, counts, out_dtype, cores)
    return x.new_empty((x.shape[0], weight.shape[2]), dtype=out_dtype)


# -------------------------------------------------------------------- provider


def _require_layer(b: Builder, a: Arguments) -> None:
    experts, k = to_dim(b.val(a.gate_up).shape[0]), to_dim(b.val(a.indices).shape[1])
    require_width(b, x=a.x, indices=a.indices)
    fits = isinstance(experts, int) and isinstance(k, int) and experts <= MOST_EXPERTS and k <= MOST_CHOSEN
    b.require(fits, f"{k} of {experts} experts: it chooses {MOST_CHOSEN} of {MOST_EXPERTS} at most")
    b.require(not is_exact(b), "it multiplies by two scales in an order of its own: rounding is 'exact'")
    for name in ("gate_up", "up", "down"):
        matrix = getattr(a, name)
        known = matrix is None or all(isinstance(to_dim(size), int) for size in b.val(matrix).shape)
        b.require(known, f"the sizes of {name} are symbolic")
    dtypes: dict[str, torch.dtype | None] = {
        "x": b.val(a.x).dtype,
        "weights": b.val(a.weights).dtype,
        "gate_up_scale": b.val(a.gate_up_scale).dtype,
    }
    dtypes |= {"up_scale": None if a.up_scale is None else b.val(a.up_scale).dtype, "down_scale": b.val(a.down_scale).dtype}
    dtypes |= {name: getattr(a, name) for name in ("sum_dtype", "hidden_dtype", "result_dtype", "product_dtype", "out_dtype")}
    for name, dtype in dtypes.items():
        b.require(dtype is None or dtype in FLOATS, f"{name} is {dtype}")


@provides("moe_experts_int8", "triton.moe_permute + triton.grouped_int8 + triton.moe_unpermute", launches=6)
def moe_experts_int8(b: Builder, a: Arguments, cores: int) -> Node:
    _require_layer(b, a)
    b.require(a.smooth is None, "the model smooths what enters both products")
    how = symmetric(b, a, b.val(a.x).dtype)
    _, matrix_cores = cores_of(b.config, b.dry_run)
    q, scale = b.results(b.emit(dynamic_quantize.overload, a.x, min_scale=how.min_scale, divide=how.divide, cores=cores), 2)
    form = {"scales": scale, "zero_unused": False, "group_list": "counts", "group_dtype": torch.int32, "cores": cores}
    experts = to_dim(b.val(a.gate_up).shape[0])
    rows, scale, places, _, counts = b.results(b.emit(moe_permute.overload, q, a.indices, experts, **form), 5)

    def product(rows: Node, scale: Node, matrices: Node, of_columns: Node, dtype: torch.dtype | None) -> Node:
        given: dict[str, Any] = {"out_dtype": dtype or torch.float32, "cores": matrix_cores}
        return b.emit(grouped_int8.overload, rows, matrices, of_columns, scale, counts, **given)

    gate = product(rows, scale, a.gate_up, a.gate_up_scale, a.sum_dtype)
    up = None if a.up is None else product(rows, scale, a.up, a.up_scale, a.sum_dtype)
    unit = {name: getattr(a, name) for name in ("activation", "layout", "alpha", "gate_limit", "up_limit", "up_offset")}
    a.round_dtype  # noqa: B018  the unit keeps fp32
    hidden, scale = b.results(b.emit(glu_quant.overload, gate, up, **unit, product_dtype=a.hidden_dtype, cores=cores), 2)
    results = product(hidden, scale, a.down, a.down_scale, a.result_dtype)
    return b.emit(moe_unpermute.overload, results, places, a.weights, out_dtype=a.out_dtype or b.val(a.x).dtype, cores=cores)
