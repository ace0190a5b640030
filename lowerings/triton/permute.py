"""Rows sorted by expert and back by Triton: the ops moe_permute and moe_unpermute."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels import permute as kernels
from ...ops._common import Size, check_choice, check_index, check_rank, check_sizes, check_value
from .checks import FLOATS, LIMIT_32, as_rows, check_cores, check_dtypes, check_row_length, check_together, name_of
from .define import device_for, launch, triton_op

ROW_DTYPES = (*FLOATS, torch.int8)
MOST_EXPERTS = 512
MOST_CHOSEN = 32

# -------------------------------------------------------------------- permute


@triton_op(
    "(Tensor x, Tensor expert_ids, int num_experts, *, Tensor? scales=None, int first_expert=0, SymInt? out_rows=None, int? capacity=None, "
    "bool zero_unused=True, str group_list='counts', ScalarType group_dtype=int64, int cores) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def moe_permute(
    x: Tensor,
    expert_ids: Tensor,
    num_experts: int,
    *,
    scales: Tensor | None = None,
    first_expert: int = 0,
    out_rows: int | None = None,
    capacity: int | None = None,
    zero_unused: bool = True,
    group_list: str = "counts",
    group_dtype: torch.dtype = torch.int64,
    cores: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows in the order of their experts, each row once for every expert that it goes to; contiguous results.

    Flat id i = row * k + j has a place if its expert is one of `first_expert` to `first_expert + num_experts - 1`; others, -1 say, are
    dropped. Places follow the experts, and within one the flat ids. Places from `out_rows` on are dropped too. With `capacity` expert e has
    the places from `(e - first_expert) * capacity`, and ids beyond that number are dropped.

    One launch for up to 1024 ids, else three; no wait for the device, no atomics, the same order in every call.

    Args:
        x: [rows, H], fp16, bf16, fp32 or int8; rows may lie apart evenly, what lies otherwise is copied first.
        expert_ids: [rows, k] int32 or int64, k up to 32.
        num_experts: up to 512.
        scales: [rows] float32, scales of quantised rows, which go with them.
        first_expert: as above.
        out_rows: rows of the result, by default rows * k; with `capacity` they are num_experts * capacity.
        capacity: as above.
        zero_unused: rows without a source are zeros (their scale too); else they hold anything.
        group_list: `counts`, the number of rows of each expert that have a place, or `sums`, of those up to it (not with `capacity`).
        group_dtype: int32 or int64.
        cores: vector cores of the device.

    Returns:
        y [out_rows, H]; scales [out_rows] ([0] without `scales`); places [rows, k] int32, where each id went, -1 where it was dropped;
        source [out_rows] int32, the flat id of each row, -1 where there is none; groups [num_experts].

    Rounding: none.

    Source: torch_npu's npu_moe_init_routing_v2 (`row_idx_type` 0: places, 1: source; `active_expert_range`, `drop_pad_mode` 1 = capacity,
    `expert_tokens_num_type` 0 = sums, 1 = counts) and npu_moe_token_permute (its `sorted_indices` are places).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or a choice does not fit, tensors lie on several devices, or there are 2^31 ids or more.
    """
    _check_permute(x, expert_ids, num_experts, scales, out_rows, capacity, group_list, group_dtype, cores)
    results = _permuted(x, expert_ids, num_experts, scales, out_rows, capacity, group_dtype)
    y, y_scales, places, source, groups = results
    ids = places.numel()
    if ids == 0:
        groups.zero_()
        source.fill_(-1)
        if zero_unused:
            y.zero_()
            y_scales.zero_()
        return results
    width, device, xs, flat = x.shape[1], device_for(x, cores), as_rows(x), expert_ids.reshape(-1).contiguous()
    sizes = {"first": first_expert, "out_rows": y.shape[0], "capacity": capacity or 0}
    by = {"by_capacity": capacity is not None}
    rows = {
        "x_ptr": xs,
        "scales_ptr": None if scales is None else scales.contiguous(),
        "y_ptr": y,
        "y_scales_ptr": None if scales is None else y_scales,
        "places_ptr": places,
        "source_ptr": source,
        "x_stride": xs.stride(0),
    }
    k, size, sums = expert_ids.shape[1], x.element_size(), group_list == "sums"
    if ids <= kernels.FEW_IDS:
        few = kernels.permute_few_launch(ids, k, num_experts, width, device, size=size, sums=sums, zero=zero_unused, **by)
        launch(few, x, ids_ptr=flat, groups_ptr=groups, count=ids, **rows, **sizes)
        return results
    counting = kernels.expert_counts_launch(ids, num_experts, device)
    lanes = kernels.count_lanes(num_experts)
    counts = places.new_empty((kernels.chunks_of(ids, device)[0], 2, lanes))
    ends = places.new_empty(lanes)
    launch(counting, x, ids_ptr=flat, counts_ptr=counts, count=ids, first=first_expert)
    placing = kernels.expert_places_launch(ids, num_experts, device, sums=sums, **by)
    launch(placing, x, ids_ptr=flat, counts_ptr=counts, places_ptr=places, ends_ptr=ends, groups_ptr=groups, count=ids, **sizes)
    copying = kernels.permute_rows_launch(x.shape[0], k, num_experts, width, device, size=size, zero=zero_unused, **by)
    del sizes["first"]
    launch(copying, x, ends_ptr=ends, rows=x.shape[0], **rows, **sizes)
    return results


def _check_permute(
    x: Tensor,
    expert_ids: Tensor,
    num_experts: int,
    scales: Tensor | None,
    out_rows: Size | None,
    capacity: int | None,
    group_list: str,
    group_dtype: torch.dtype,
    cores: int,
) -> None:
    op = "moe_permute"
    check_rank(op, 2, x=x, expert_ids=expert_ids)
    check_dtypes(op, ROW_DTYPES, x=x)
    check_dtypes(op, (torch.float32,), scales=scales)
    check_index(op, expert_ids=expert_ids)
    check_together(op, x=x, expert_ids=expert_ids, scales=scales)
    check_cores(op, cores)
    check_row_length(op, "x", x.shape[1])
    check_value(op, not statically_known_true(x.shape[1] == 0), "rows of x have no elements")
    check_sizes(op, "expert_ids", expert_ids.shape, (x.shape[0], expert_ids.shape[1]))
    check_value(op, not statically_known_true(expert_ids.shape[1] > MOST_CHOSEN), f"at most {MOST_CHOSEN} ids a row")
    check_value(op, not statically_known_true(expert_ids.numel() >= LIMIT_32), "there are 2^31 ids or more")
    check_value(op, 0 < num_experts <= MOST_EXPERTS, f"num_experts must be from 1 to {MOST_EXPERTS}: {num_experts}")
    check_choice(op, "group_list", group_list, ("counts", "sums"))
    check_choice(op, "group_dtype", group_dtype, (torch.int32, torch.int64))
    if scales is not None:
        check_sizes(op, "scales", scales.shape, x.shape[:1])
    if out_rows is not None:
        check_value(op, not statically_known_true(out_rows < 0), f"out_rows must not be negative: {out_rows}")
        check_value(op, not statically_known_true(out_rows >= LIMIT_32), f"out_rows is 2^31 or more: {out_rows}")
    if capacity is not None:
        check_value(op, capacity > 0, f"capacity must be positive: {capacity}")
        check_value(op, num_experts * capacity < LIMIT_32, f"{num_experts} experts of capacity {capacity} have 2^31 rows or more")
        check_value(op, out_rows is None, "with capacity the result has num_experts * capacity rows: out_rows must be None")
        check_value(op, group_list == "counts", "with capacity group_list must be 'counts'")


def _permuted(
    x: Tensor,
    expert_ids: Tensor,
    num_experts: int,
    scales: Tensor | None,
    out_rows: Size | None,
    capacity: int | None,
    group_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, k = expert_ids.shape
    length = num_experts * capacity if capacity is not None else rows * k if out_rows is None else out_rows
    return (
        x.new_empty((length, x.shape[1])),
        x.new_empty((0 if scales is None else length,), dtype=torch.float32),
        x.new_empty((rows, k), dtype=torch.int32),
        x.new_empty((length,), dtype=torch.int32),
        x.new_empty((num_experts,), dtype=group_dtype),
    )


@moe_permute.fake
def _(
    x: Tensor,
    expert_ids: Tensor,
    num_experts: int,
    *,
    scales: Tensor | None = None,
    first_expert: int = 0,
    out_rows: Size | None = None,
    capacity: int | None = None,
    zero_unused: bool = True,
    group_list: str = "counts",
    group_dtype: torch.dtype = torch.int64,
    cores: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_permute(x, expert_ids, num_experts, scales, out_rows, capacity, group_list, group_dtype, cores)
    return _permuted(x, expert_ids, num_experts, scales, out_rows, capacity, group_dtype)


# -------------------------------------------------------------------- unpermute


@triton_op(
    "(Tensor x, Tensor places, Tensor? weights=None, *, Tensor? bias=None, Tensor? expert_ids=None, Tensor? residual=None, "
    "Tensor? residual2=None, float scale=1.0, ScalarType? round_dtype=None, ScalarType? out_dtype=None, int cores) -> Tensor"
)
def moe_unpermute(
    x: Tensor,
    places: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    expert_ids: Tensor | None = None,
    residual: Tensor | None = None,
    residual2: Tensor | None = None,
    scale: float = 1.0,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    """Weighted sums of the rows of the experts, in one launch; contiguous result.

        y[r] = scale * sum over j of weights[r, j] * (x[places[r, j]] + bias[expert_ids[r, j]]) + residual[r] + residual2[r]

    A place below 0 adds nothing, whatever its weight is.

    Args:
        x: [n, H], fp16, bf16 or fp32, by expert; rows may lie apart evenly, what lies otherwise is copied first.
        places: [rows, k] int32 or int64 of any strides, k up to 32: rows of x, all below n. (The k-major index of
            npu_moe_finalize_routing is the transposed view of a [k, rows].)
        weights: [rows, k], fp16, bf16 or fp32; None stands for ones.
        bias: [E, H], a float dtype; with `expert_ids` [rows, k] int32 or int64, from 0 to E - 1 where a place is not below 0.
        residual, residual2: [rows, H], a float dtype: a skip connection, the result of shared experts.
        scale: as above.
        round_dtype: each product with its weight is rounded to it.
        out_dtype: of the result, by default that of x.
        cores: vector cores of the device.

    Rounding: fp32 inside, in the order of the formula, products rounded where `round_dtype` says, one cast at the end.

    Source: torch_npu's npu_moe_finalize_routing (skip1, skip2, bias, scales, expanded_src_to_dst_row) and npu_moe_token_unpermute.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit, `bias` comes without `expert_ids`, or tensors lie on several devices.
    """
    dtype = out_dtype or x.dtype
    _check_unpermute(x, places, weights, bias, expert_ids, residual, residual2, dtype, cores)
    y = x.new_empty((places.shape[0], x.shape[1]), dtype=dtype)
    if y.numel() == 0:
        return y
    if places.shape[1] == 0 or x.shape[0] == 0:
        places = places.new_full((places.shape[0], 1), -1)
        weights = bias = expert_ids = None
    rows, k = places.shape
    xs = as_rows(x)
    weights, expert_ids = (None if tensor is None else as_rows(tensor) for tensor in (weights, expert_ids if bias is not None else None))
    residual, residual2 = (None if tensor is None else as_rows(tensor) for tensor in (residual, residual2))
    strides = {"weights": weights, "ids": expert_ids, "residual": residual, "residual2": residual2}
    launch(
        kernels.unpermute_launch(rows, k, x.shape[1], device_for(x, cores), round_to=name_of(round_dtype)),
        x,
        x_ptr=xs,
        places_ptr=places,
        weights_ptr=weights,
        bias_ptr=None if bias is None else bias.contiguous(),
        ids_ptr=expert_ids,
        residual_ptr=residual,
        residual2_ptr=residual2,
        y_ptr=y,
        rows=rows,
        x_stride=xs.stride(0),
        places_stride=places.stride(0),
        places_step=places.stride(1),
        scale=scale,
        **{f"{name}_stride": 0 if tensor is None else tensor.stride(0) for name, tensor in strides.items()},
    )
    return y


def _check_unpermute(
    x: Tensor,
    places: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    expert_ids: Tensor | None,
    residual: Tensor | None,
    residual2: Tensor | None,
    out_dtype: torch.dtype,
    cores: int,
) -> None:
    op = "moe_unpermute"
    check_rank(op, 2, x=x, places=places, bias=bias)
    check_dtypes(op, FLOATS, x=x, weights=weights, bias=bias, residual=residual, residual2=residual2)
    check_index(op, places=places, expert_ids=expert_ids)
    check_value(op, out_dtype in FLOATS, f"out_dtype must be one of float16, bfloat16, float32, not {out_dtype}")
    check_together(op, x=x, places=places, weights=weights, bias=bias, expert_ids=expert_ids, residual=residual, residual2=residual2)
    check_cores(op, cores)
    check_row_length(op, "x", x.shape[1])
    check_value(op, not statically_known_true(places.shape[1] > MOST_CHOSEN), f"at most {MOST_CHOSEN} places a row")
    check_value(op, bias is None or expert_ids is not None, "bias needs expert_ids")
    for name, tensor in {"weights": weights, "expert_ids": expert_ids}.items():
        if tensor is not None:
            check_sizes(op, name, tensor.shape, places.shape)
    if bias is not None:
        check_sizes(op, "bias", bias.shape[1:], x.shape[1:])
    for name, tensor in {"residual": residual, "residual2": residual2}.items():
        if tensor is not None:
            check_sizes(op, name, tensor.shape, (places.shape[0], x.shape[1]))


@moe_unpermute.fake
def _(
    x: Tensor,
    places: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    expert_ids: Tensor | None = None,
    residual: Tensor | None = None,
    residual2: Tensor | None = None,
    scale: float = 1.0,
    round_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> Tensor:
    dtype = out_dtype or x.dtype
    _check_unpermute(x, places, weights, bias, expert_ids, residual, residual2, dtype, cores)
    return x.new_empty((places.shape[0], x.shape[1]), dtype=dtype)
