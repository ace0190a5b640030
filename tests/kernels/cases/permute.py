"""What the Ascend gate compiles of kernels/permute.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npu_fusion.kernels import permute
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place
SIZES = {"*bf16": 2, "*fp16": 2, "*fp32": 4, "*i8": 1}


def _shown(plan: dict[str, Any]) -> str:
    return "".join(f" {name}={value}" for name, value in plan.items() if name != "size")


def _few(rows: int, k: int, experts: int, width: int, x: str, *, scales: str | None = None, groups: str = "*i64", **plan: Any) -> Case:
    types = {
        "x_ptr": x,
        "y_ptr": x,
        "scales_ptr": scales,
        "y_scales_ptr": scales,
        "groups_ptr": groups,
        **dict.fromkeys(("ids_ptr", "places_ptr", "source_ptr"), "*i32"),
        **dict.fromkeys(("count", "first", "x_stride", "out_rows", "capacity"), "i32"),
    }
    launch = permute.permute_few_launch(rows * k, k, experts, width, DEVICE, size=SIZES[x], **plan)
    return Case(f"permute_few {x[1:]} [{rows}, {width}] {k} of {experts}{_shown(plan)}", launch, types)


def _counts(ids: int, experts: int, pointer: str = "*i32") -> Case:
    types = {"ids_ptr": pointer, "counts_ptr": "*i32", "count": "i32", "first": "i32"}
    return Case(f"expert_counts {pointer[1:]} {ids} of {experts}", permute.expert_counts_launch(ids, experts, DEVICE), types)


def _places(ids: int, experts: int, groups: str = "*i64", **plan: Any) -> Case:
    types = {
        **dict.fromkeys(("ids_ptr", "counts_ptr", "places_ptr", "ends_ptr"), "*i32"),
        "groups_ptr": groups,
        **dict.fromkeys(("count", "first", "out_rows", "capacity"), "i32"),
    }
    return Case(f"expert_places {ids} of {experts}{_shown(plan)}", permute.expert_places_launch(ids, experts, DEVICE, **plan), types)


def _rows(rows: int, k: int, experts: int, width: int, x: str, *, scales: str | None = None, **plan: Any) -> Case:
    types = {
        "x_ptr": x,
        "y_ptr": x,
        "scales_ptr": scales,
        "y_scales_ptr": scales,
        **dict.fromkeys(("places_ptr", "ends_ptr", "source_ptr"), "*i32"),
        **dict.fromkeys(("rows", "x_stride", "out_rows", "capacity"), "i32"),
    }
    launch = permute.permute_rows_launch(rows, k, experts, width, DEVICE, size=SIZES[x], **plan)
    name = f"permute_rows {x[1:]} [{rows}, {width}] {k} of {experts}{_shown(plan)}"
    return Case(name, launch, types, (k,), "where each of a row's ids went, beside copies of the row")


def _unpermute(
    rows: int, k: int, width: int, x: str, *, bias: bool = False, residuals: int = 0, weights: str = "*fp32", **plan: Any
) -> Case:
    types = {
        "x_ptr": x,
        "y_ptr": x,
        "weights_ptr": weights,
        "places_ptr": "*i32",
        "bias_ptr": x if bias else None,
        "ids_ptr": "*i32" if bias else None,
        "residual_ptr": x if residuals > 0 else None,
        "residual2_ptr": x if residuals > 1 else None,
        **dict.fromkeys(("rows", "x_stride", "places_stride", "places_step", "weights_stride", "ids_stride"), "i32"),
        **dict.fromkeys(("residual_stride", "residual2_stride"), "i32"),
        "scale": "fp32",
    }
    more = f"{' bias' if bias else ''}{f' residuals={residuals}' if residuals else ''}"
    return Case(
        f"unpermute {x[1:]} [{rows}, {width}] {k}{more}{_shown(plan)}", permute.unpermute_launch(rows, k, width, DEVICE, **plan), types
    )


def cases() -> Iterator[Case]:
    yield _few(1, 8, 128, 2048, "*bf16")
    yield _few(16, 8, 256, 7168, "*i8", scales="*fp32", sums=True)
    yield _few(77, 6, 64, 5120, "*bf16", by_capacity=True)
    yield _few(512, 2, 8, 4096, "*fp16", zero=False, groups="*i32")
    yield _counts(32768, 128)
    yield _counts(4096 * 8 + 1, 512)
    yield _counts(4096 * 10, 256, "*i64")
    yield _counts(1048577, 8)
    yield _places(32768, 128)
    yield _places(32768, 256, sums=True)
    yield _places(4097, 512, groups="*i32")
    yield _places(4097, 8, by_capacity=True)
    yield _rows(4096, 8, 128, 2048, "*bf16")
    yield _rows(4096, 8, 256, 7168, "*i8", scales="*fp32")
    yield _rows(4097, 2, 8, 18432, "*fp16", by_capacity=True)
    yield _unpermute(4096, 8, 2048, "*bf16")
    yield _unpermute(4097, 8, 7168, "*bf16", residuals=1, round_to="bf16", weights="*bf16")
    yield _unpermute(77, 2, 5120, "*fp16", bias=True, residuals=2)
    yield _unpermute(1, 10, 1024, "*fp32")
