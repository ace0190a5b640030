"""Routed experts with four-bit matrices by Triton: the op grouped_w4a16, and the providers of `moe_experts_weight_only`.

Few tokens are computed row by row, each with the words of its experts (`w4a16_linear` with `expert_ids`): four launches. More are sorted by
expert, so that an expert's words are read once for all its rows. Which it is, the number of tokens says, where the graph knows it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels import grouped_w4a16 as kernels
from ...kernels.w4a16 import plane_rows
from ...lower import Arguments, Builder
from ...ops._common import check_rank, check_sizes, check_value
from ...view.shapes import to_dim
from .checks import FLOATS, HALVES, LIMIT_32, check_cores, check_dtypes, check_together
from .define import device_for, launch, triton_op
from .glu import glu
from .permute import MOST_CHOSEN, MOST_EXPERTS, moe_permute, moe_unpermute
from .provide import cores_of, provides, require_width
from .w4a16 import w4a16_linear
from .weight_only import PackedMatrix, packed_matrix

aten = torch.ops.aten
MOST_FEW_TOKENS = 8


@triton_op(
    "(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor counts, *, int group_size, ScalarType? out_dtype=None, int cores) "
    "-> Tensor"
)
def grouped_w4a16(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    counts: Tensor,
    *,
    group_size: int,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    """y[r] = x[r] W[g] in one launch, g being the group of row r; contiguous result.

    Args:
        x: [rows, K], fp16 or bf16, rows sorted by group.
        words: int32 [G, K / 8, N], as `w4a16_linear` takes them.
        scales: [G, K / group_size, N], fp16, bf16 or fp32.
        zeros: like scales, need not be whole numbers; None stands for 8.
        counts: int32 [G], how many rows each group has, all of them at most those of x; rows behind the last have no group.
        group_size: inputs that share a scale, a multiple of 32 that divides K.
        out_dtype: of the result, fp16, bf16 or fp32; None for that of x.
        cores: matrix cores of the device.

    Returns:
        [rows, N]; rows of no group hold anything.

    Rounding: weights once, to the dtype of x; fp32 sums, one cast at the end.

    Raises:
        TypeError: a dtype is none of those.
        ValueError: a shape does not fit, tensors lie on several devices, there are more than 512 groups, or scales by 2^31.

    Source: op-plugin doc npu_grouped_matmul (antiquant_scale, antiquant_offset).
    """
    _check(x, words, scales, zeros, counts, group_size, out_dtype, cores)
    groups, _, outputs = words.shape
    y = x.new_empty((x.shape[0], outputs), dtype=out_dtype or x.dtype)
    if y.numel() == 0:
        return y
    plan = kernels.grouped_w4a16_launch(x.shape[0], groups, x.shape[1], outputs, group_size, device_for(x, cores))
    given = {"x_ptr": x, "words_ptr": words, "scales_ptr": scales, "zeros_ptr": zeros, "counts_ptr": counts}
    launch(plan, x, **{name: tensor if tensor is None else tensor.contiguous() for name, tensor in given.items()}, y_ptr=y)
    return y


def _check(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    counts: Tensor,
    group_size: int,
    out_dtype: torch.dtype | None,
    cores: int,
) -> None:
    op = "grouped_w4a16"
    check_dtypes(op, HALVES, x=x)
    check_dtypes(op, (torch.int32,), words=words, counts=counts)
    check_dtypes(op, FLOATS, scales=scales, zeros=zeros)
    check_value(op, out_dtype in (None, *FLOATS), f"out_dtype must be one of float16, bfloat16, float32, not {out_dtype}")
    check_together(op, x=x, words=words, scales=scales, zeros=zeros, counts=counts)
    check_cores(op, cores)
    check_rank(op, 2, x=x)
    check_rank(op, 3, words=words, scales=scales, zeros=zeros)
    (groups, _, outputs), inputs = words.shape, x.shape[1]
    fits = inputs % group_size == 0 and plane_rows(inputs, group_size) > 0
    check_value(op, fits, f"{inputs} inputs in groups of {group_size}: both must be multiples of 32, and the first of the second")
    check_sizes(op, "words", words.shape, (groups, inputs // 8, outputs))
    check_sizes(op, "scales", scales.shape, (groups, inputs // group_size, outputs))
    if zeros is not None:
        check_sizes(op, "zeros", zeros.shape, scales.shape)
    check_sizes(op, "counts", counts.shape, (groups,))
    check_value(op, not statically_known_true(groups > MOST_EXPERTS), f"{groups} groups, of which there may be {MOST_EXPERTS}")
    check_value(op, not statically_known_true(scales.numel() >= LIMIT_32), "there are 2^31 scales or more")


@grouped_w4a16.fake
def _(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    counts: Tensor,
    *,
    group_size: int,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    _check(x, words, scales, zeros, counts, group_size, out_dtype, cores)
    return x.new_empty((x.shape[0], words.shape[2]), dtype=out_dtype)


# -------------------------------------------------------------------- providers


def _require_layer(b: Builder, a: Arguments) -> None:
    x, experts, k = b.val(a.x), to_dim(b.val(a.gate_up).shape[0]), to_dim(b.val(a.indices).shape[1])
    b.require(b.config.rounding != "exact", "it may multiply weights that are not rounded, the model rounds them: rounding is 'exact'")
    b.require(x.dtype in HALVES, f"x is {x.dtype}, of float16 and bfloat16")
    b.require(bool(a.shifts), "the matrices are not packed")
    require_width(b, x=a.x, indices=a.indices)
    fits = isinstance(experts, int) and isinstance(k, int) and experts <= MOST_EXPERTS and k <= MOST_CHOSEN
    b.require(fits, f"{k} of {experts} experts: it chooses {MOST_CHOSEN} of {MOST_EXPERTS} at most")
    for name in ("gate_up", "up", "down"):
        if (scale := getattr(a, f"{name}_scale")) is not None:
            known = all(isinstance(to_dim(size), int) for size in b.val(scale).shape)
            b.require(known, f"the sizes of {name} are symbolic")
            b.require(b.val(scale).dtype in FLOATS, f"the scale of {name} is {b.val(scale).dtype}")
    dtypes = {"weights": b.val(a.weights).dtype, "product_dtype": a.product_dtype, "out_dtype": a.out_dtype}
    for name, dtype in dtypes.items():
        b.require(dtype is None or dtype in FLOATS, f"{name} is {dtype}")


def _matrix(b: Builder, a: Arguments, name: str, inputs: int) -> tuple[PackedMatrix, int]:
    """A stack of matrices as the kernels want it, and the inputs that share a scale."""
    shape = {key: getattr(a, key) for key in ("shifts", "packs_inputs", "plane", "signed", "offset")}
    given = {key: getattr(a, f"{name}{suffix}") for key, suffix in (("weight", ""), ("scale", "_scale"), ("zero", "_zero"))}
    return packed_matrix(b, SimpleNamespace(**given, **shape), inputs), inputs // b.val(given["scale"]).shape[2]


def _unit(b: Builder, a: Arguments, gate: Node, up: Node | None, cores: int) -> Node:
    form = {name: getattr(a, name) for name in ("activation", "layout", "alpha", "gate_limit", "up_limit", "up_offset")}
    a.round_dtype  # noqa: B018  the unit keeps fp32
    return b.emit(glu.overload, gate, up, **form, out_dtype=b.val(gate).dtype, cores=cores)


@provides("moe_experts_weight_only", "triton.w4a16_linear (expert_ids)", launches=4)
def few_tokens(b: Builder, a: Arguments, cores: int) -> Node:
    """Up to eight tokens: every row by the words of its expert."""
    tokens, k = (to_dim(size) for size in b.val(a.indices).shape)
    b.require(isinstance(tokens, int) and tokens <= MOST_FEW_TOKENS, f"{tokens} tokens, of which it takes {MOST_FEW_TOKENS} at most")
    _require_layer(b, a)
    vector_cores, matrix_cores = cores_of(b.config, b.dry_run)

    def product(x: Node, name: str) -> Node:
        matrix, group = _matrix(b, a, name, int(b.val(x).shape[-1]))
        form = {"group_size": group, "expert_ids": a.indices, "cores": vector_cores, "matrix_cores": matrix_cores}
        return b.emit(w4a16_linear.overload, matrix.moved(b, x), matrix.words, matrix.scales, matrix.zeros, **form)

    gate = product(a.x, "gate_up")
    hidden = _unit(b, a, gate, None if a.up is None else product(a.x, "up"), cores)
    results = product(hidden, "down")
    device = b.val(a.x).device
    places = b.constant(("rows", tokens, k, device), lambda: torch.arange(tokens * k, device=device).view(tokens, k))
    rows = b.reshape(results, [tokens * k, b.val(results).shape[-1]])
    return b.emit(moe_unpermute.overload, rows, places, a.weights, out_dtype=a.out_dtype or b.val(a.x).dtype, cores=cores)


@provides("moe_experts_weight_only", "triton.moe_permute + triton.grouped_w4a16 + triton.moe_unpermute", rank=1, launches=5)
def many_tokens(b: Builder, a: Arguments, cores: int) -> Node:
    """Rows sorted by expert."""
    _require_layer(b, a)
    _, matrix_cores = cores_of(b.config, b.dry_run)
    form: dict[str, Any] = {"zero_unused": False, "group_list": "counts", "group_dtype": torch.int32, "cores": cores}
    experts = to_dim(b.val(a.gate_up).shape[0])
    rows, _, places, _, counts = b.results(b.emit(moe_permute.overload, a.x, a.indices, experts, **form), 5)

    def product(x: Node, name: str) -> Node:
        matrix, group = _matrix(b, a, name, int(b.val(x).shape[-1]))
        given = (matrix.words, matrix.scales, matrix.zeros, counts)
        return b.emit(grouped_w4a16.overload, matrix.moved(b, x), *given, group_size=group, cores=matrix_cores)

    gate = product(rows, "gate_up")
    hidden = _unit(b, a, gate, None if a.up is None else product(rows, "up"), cores)
    return b.emit(
        moe_unpermute.overload, product(hidden, "down"), places, a.weights, out_dtype=a.out_dtype or b.val(a.x).dtype, cores=cores
    )
