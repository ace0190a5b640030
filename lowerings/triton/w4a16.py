"""Linear layers with 4-bit weights by Triton: the ops w4a16_linear, w4a16_repack_awq, w4a16_awq_zeros.

`weight_only.py` lowers `weight_only_linear` to the first two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels import w4a16 as kernels
from ...kernels.launch import Device
from ...ops._common import check_index, check_min_rank, check_rank, check_sizes, check_value
from .checks import FLOATS, HALVES, LIMIT_32, as_rows, check_cores, check_dtypes, check_row_length, check_together
from .define import device_for, launch, triton_op

_MOST_TILE_ROWS = 128


def _group(group_size: int, inputs: int) -> int:
    """The inputs that share a scale; -1 stands for all of them."""
    return inputs if group_size == -1 else group_size


def _check_layout(op: str, inputs: int, group_size: int) -> None:
    """Raise ValueError unless the layout of words takes so many inputs; symbolic ones are checked when the op runs."""
    check_value(op, group_size == -1 or group_size >= 32, f"group_size must be -1 or at least 32, not {group_size}")
    if isinstance(inputs, int):
        group = _group(group_size, inputs)
        fits = inputs > 0 and inputs % group == 0 and kernels.plane_rows(inputs, group) > 0
        check_value(op, fits, f"{inputs} inputs in groups of {group}: both must be multiples of 32, and the first of the second")


@triton_op(
    "(Tensor x, Tensor words, Tensor scales, Tensor? zeros=None, Tensor? bias=None, *, int group_size, Tensor? expert_ids=None, "
    "ScalarType? out_dtype=None, int cores, int matrix_cores) -> Tensor"
)
def w4a16_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    expert_ids: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
    matrix_cores: int,
) -> Tensor:
    """y = x W + bias with W[k, n] = (q[k, n] - zeros[k // group_size, n]) * scales[k // group_size, n], in one launch; contiguous result.

    Up to 8 rows (2 on a GPU), and wherever rows have experts, vectors compute it (`w4a16_gemv_kernel`), else products
    (`w4a16_gemm_kernel`); on a GPU from 2 to 32 rows those of kernels/w4a16_products.py, if a group has 128 inputs. The shape decides.

    Args:
        x: [..., K], fp16 or bf16; rows may lie apart evenly, what lies otherwise is copied first. With `expert_ids` [T, K] or [T, S, K].
        words: int32 [K / 8, N], q of 0 to 15 in the layout of kernels/w4a16.py (`w4a16_repack_awq`); with `expert_ids` [E, K / 8, N].
        scales: [K / group_size, N], fp16, bf16 or fp32; with `expert_ids` [E, ...], as zeros and bias.
        zeros: like scales, need not be whole numbers; None stands for 8.
        bias: [N], fp16, bf16 or fp32.
        group_size: inputs that share a scale, a multiple of 32 that divides K; -1 for all.
        expert_ids: int32 or int64 [T, S]: row (t, s) of the result is that of x[t] (or x[t, s]) by the weights of expert_ids[t, s], and 0
            where there is no such expert, as for -1.
        out_dtype: of the result, fp16, bf16 or fp32; None for that of x.
        cores, matrix_cores: vector and matrix cores of the device.

    Returns:
        [..., N]; with `expert_ids` [T, S, N].

    Rounding: fp32 sums, one cast at the end. Only `w4a16_gemm_kernel` rounds the weights, once, to the dtype of x, as where a model
    dequantises before it multiplies.

    Raises:
        TypeError: a dtype is none of those.
        ValueError: a shape does not fit, tensors lie on several devices, or a matrix or row has 2^31 elements or more.

    Source: AWQ, https://arxiv.org/abs/2306.00978; op-plugin doc npu_weight_quant_batchmatmul.
    """
    _check_linear(x, words, scales, zeros, bias, group_size, expert_ids, out_dtype, cores, matrix_cores)
    inputs, outputs = x.shape[-1], words.shape[-1]
    y = x.new_empty((*(x.shape[:-1] if expert_ids is None else expert_ids.shape), outputs), dtype=out_dtype or x.dtype)
    if y.numel() == 0:
        return y
    xs = as_rows(x)
    if xs.stride(0) * _MOST_TILE_ROWS >= LIMIT_32:
        xs = xs.contiguous()
    rows, group = y.numel() // outputs, _group(group_size, inputs)
    check_value("w4a16_linear", rows < LIMIT_32, f"{rows} rows, of which 2^31 - 1 fit")
    device = Device(x.device.type, cores, matrix_cores)
    weights = {"words_ptr": words, "scales_ptr": scales, "zeros_ptr": zeros, "bias_ptr": bias}
    tensors = {name: tensor if tensor is None else tensor.contiguous() for name, tensor in weights.items()}
    if expert_ids is None and kernels.takes_products(rows, inputs, group, device):
        from ...kernels.w4a16_products import w4a16_products_launch  # Gluon, which there is beside a GPU alone

        plan = w4a16_products_launch(rows, inputs, outputs, group, device)
        launch(plan, x, x_ptr=xs, **tensors, y_ptr=y, rows=rows, x_stride=xs.stride(0))
        return y
    if expert_ids is None and rows > kernels.most_gemv_rows(device):
        plan = kernels.w4a16_gemm_launch(rows, inputs, outputs, group, device)
        launch(plan, x, x_ptr=xs, **tensors, y_ptr=y, rows=rows, x_stride=xs.stride(0))
        return y
    plan = kernels.w4a16_gemv_launch(rows, inputs, outputs, group, device, experts=expert_ids is not None)
    ids = None if expert_ids is None else expert_ids.contiguous()
    choice = {"ids_ptr": ids, "slots": rows // xs.shape[0], "experts": 1 if ids is None else words.shape[0]}
    launch(plan, x, x_ptr=xs, **tensors, **choice, y_ptr=y, rows=rows, x_stride=xs.stride(0))
    return y


def _check_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    expert_ids: Tensor | None,
    out_dtype: torch.dtype | None,
    cores: int,
    matrix_cores: int,
) -> None:
    op = "w4a16_linear"
    check_dtypes(op, HALVES, x=x)
    check_dtypes(op, (torch.int32,), words=words)
    check_dtypes(op, FLOATS, scales=scales, zeros=zeros, bias=bias)
    check_value(op, out_dtype in (None, *FLOATS), f"out_dtype must be one of float16, bfloat16, float32, not {out_dtype}")
    check_index(op, expert_ids=expert_ids)
    check_together(op, x=x, words=words, scales=scales, zeros=zeros, bias=bias, expert_ids=expert_ids)
    check_cores(op, cores)
    check_cores(op, matrix_cores)
    if expert_ids is None:
        check_min_rank(op, 1, x=x)
        check_rank(op, 2, words=words)
    else:
        check_rank(op, 2, expert_ids=expert_ids)
        check_rank(op, 3, words=words)
        check_value(op, x.dim() in (2, 3), f"x must have 2 or 3 dimensions with expert_ids, not {x.dim()}")
        check_sizes(op, "x", x.shape[:-1], expert_ids.shape[: x.dim() - 1])
    inputs, outputs, lead = x.shape[-1], words.shape[-1], words.shape[:-2]
    _check_layout(op, inputs, group_size)
    check_row_length(op, "x", inputs)
    check_value(op, not statically_known_true(words.shape[-2] * outputs >= LIMIT_32), "a matrix of words has 2^31 elements or more")
    check_sizes(op, "words", words.shape, (*lead, inputs // 8, outputs))
    groups = inputs // _group(group_size, inputs) if group_size > 0 else 1
    check_sizes(op, "scales", scales.shape, (*lead, groups, outputs))
    if zeros is not None:
        check_sizes(op, "zeros", zeros.shape, (*lead, groups, outputs))
    if bias is not None:
        check_sizes(op, "bias", bias.shape, (*lead, outputs))


@w4a16_linear.fake
def _(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    expert_ids: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
    matrix_cores: int,
) -> Tensor:
    _check_linear(x, words, scales, zeros, bias, group_size, expert_ids, out_dtype, cores, matrix_cores)
    lead = x.shape[:-1] if expert_ids is None else expert_ids.shape
    return x.new_empty((*lead, words.shape[-1]), dtype=out_dtype or x.dtype)


# -------------------------------------------------------------------- preparation of weights


@triton_op("(Tensor qweight, *, int group_size, int cores) -> Tensor")
def w4a16_repack_awq(qweight: Tensor, *, group_size: int, cores: int) -> Tensor:
    """AWQ's weights in the layout of `w4a16_linear`; contiguous result. To be run once, when weights are prepared.

    Args:
        qweight: int32 [K, N / 8] or [E, K, N / 8]; nibble i of a word is column (0, 2, 4, 6, 1, 3, 5, 7)[i] of eight.
        group_size: of `w4a16_linear`, on which the layout depends.
        cores: vector cores of the device.

    Returns:
        int32 [K / 8, N] or [E, K / 8, N].

    Raises:
        TypeError: qweight is not int32.
        ValueError: its rank, or K in groups of group_size, does not fit, or a matrix has 2^31 elements or more.
    """
    _check_repack(qweight, group_size, cores)
    *lead, inputs, columns = qweight.shape
    words = qweight.new_empty((*lead, inputs // 8, columns * 8))
    if words.numel() == 0:
        return words
    plane = kernels.plane_rows(inputs, _group(group_size, inputs))
    rows = qweight.numel() // columns
    plan = kernels.awq_repack_launch(rows, columns, plane, device_for(qweight, cores))
    launch(plan, qweight, awq_ptr=qweight.contiguous(), words_ptr=words, rows=rows)
    return words


def _check_repack(qweight: Tensor, group_size: int, cores: int) -> None:
    op = "w4a16_repack_awq"
    check_dtypes(op, (torch.int32,), qweight=qweight)
    check_value(op, qweight.dim() in (2, 3), f"qweight must have 2 or 3 dimensions, not {qweight.dim()}")
    check_together(op, qweight=qweight)
    check_cores(op, cores)
    _check_layout(op, qweight.shape[-2], group_size)
    check_value(op, not statically_known_true(qweight.shape[-2] * qweight.shape[-1] >= LIMIT_32), "a matrix has 2^31 elements or more")


@w4a16_repack_awq.fake
def _(qweight: Tensor, *, group_size: int, cores: int) -> Tensor:
    _check_repack(qweight, group_size, cores)
    *lead, inputs, columns = qweight.shape
    return qweight.new_empty((*lead, inputs // 8, columns * 8))


@triton_op("(Tensor qzeros, *, ScalarType dtype) -> Tensor")
def w4a16_awq_zeros(qzeros: Tensor, *, dtype: torch.dtype) -> Tensor:
    """AWQ's zero points as `zeros` of `w4a16_linear`, by torch's own ops: they are few, and prepared once.

    Args:
        qzeros: int32 [..., N / 8], nibbles in the order of `w4a16_repack_awq`.
        dtype: of the result, fp16, bf16 or fp32: that of the scales.

    Returns:
        [..., N], 0 to 15, contiguous.

    Raises:
        TypeError: qzeros is not int32.
        ValueError: qzeros has no dimension, or dtype is none of the three.
    """
    _check_zeros(qzeros, dtype)
    places = [kernels.AWQ_ORDER.index(column) for column in range(8)]
    return torch.stack([(qzeros >> 4 * place) & 15 for place in places], dim=-1).flatten(-2).to(dtype)


def _check_zeros(qzeros: Tensor, dtype: torch.dtype) -> None:
    check_dtypes("w4a16_awq_zeros", (torch.int32,), qzeros=qzeros)
    check_min_rank("w4a16_awq_zeros", 1, qzeros=qzeros)
    check_value("w4a16_awq_zeros", dtype in FLOATS, f"dtype must be one of float16, bfloat16, float32, not {dtype}")


@w4a16_awq_zeros.fake
def _(qzeros: Tensor, *, dtype: torch.dtype) -> Tensor:
    _check_zeros(qzeros, dtype)
    return qzeros.new_empty((*qzeros.shape[:-1], qzeros.shape[-1] * 8), dtype=dtype)
