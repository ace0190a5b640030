"""What the Ascend gate compiles of kernels/norm_quant.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from npu_fusion.kernels import norm_quant
from npu_fusion.kernels.launch import Device, Launch
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place
NUMBERS = {"rows": "i32", "x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}


def _case(op: str, launch: Launch, rows: int, hidden: int, dtype: str, plan: Mapping[str, Any], **types: str | None) -> Case:
    def pointer(present: str) -> str | None:
        return f"*{dtype}" if plan.get(present) else None

    tensors = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "residual_ptr": pointer("residual"), "sum_ptr": pointer("residual")}
    options = {"bias_ptr": pointer("bias"), "beta_ptr": pointer("beta"), "norm_ptr": pointer("returns_norm"), "q_ptr": "*i8"}
    shown = " ".join(f"{name}={value}" for name, value in plan.items())
    return Case(f"{op} {dtype} [{rows}, {hidden}] {shown}".strip(), launch, {**tensors, **options, **NUMBERS, **types})


def _dynamic(rows: int, hidden: int, dtype: str, **plan: Any) -> Case:
    launch = norm_quant.norm_dynamic_quantize_launch(rows, hidden, DEVICE, **plan)
    smooth = f"*{dtype}" if plan.get("smooth") else None
    return _case("norm_dynamic_quantize", launch, rows, hidden, dtype, plan, smooth_ptr=smooth, scale_ptr="*fp32", least="fp32")


def _static(rows: int, hidden: int, dtype: str, *, scale: str = "fp32", zero_type: str = "i32", **plan: Any) -> Case:
    launch = norm_quant.norm_static_quantize_launch(rows, hidden, DEVICE, **plan)
    zero = f"*{zero_type}" if plan.get("zero") else None
    return _case("norm_static_quantize", launch, rows, hidden, dtype, plan, scale_ptr=f"*{scale}", zero_ptr=zero)


def cases() -> Iterator[Case]:
    for hidden in (1024, 2304, 4096, 7168, 18432):
        yield _dynamic(4096, hidden, "bf16", residual=True)
    yield _dynamic(77, 128, "bf16")
    yield _dynamic(4096, 2048, "bf16")
    yield _dynamic(4096, 7168, "fp16", smooth=True, weight_offset=1)
    yield _dynamic(4096, 7168, "bf16", residual=True, smooth=True, returns_norm=True, round_to="bf16", product="bf16", norm="bf16")
    yield _dynamic(77, 5120, "fp16", residual=True, bias=True, beta=True, smooth=True, returns_norm=True, divide=True)
    yield _dynamic(77, 4096, "fp32", residual=True, smooth=True, unrounded=True)
    for hidden in (1024, 4096, 7168):
        yield _static(4096, hidden, "bf16", residual=True, one_scale=True)
    yield _static(4096, 7168, "bf16", residual=True, one_scale=False, zero=True, one_zero=False, norm="bf16")
    yield _static(77, 18432, "fp16", one_scale=True, zero=True, one_zero=True, zero_type="i8", beta=True, divide=False)
    yield _static(77, 5120, "bf16", residual=True, bias=True, beta=True, returns_norm=True, one_scale=False, weight_offset=1)
