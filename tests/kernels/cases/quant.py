"""What the Ascend gate compiles of kernels/quant.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npu_fusion.kernels import quant
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place
SIZES = {"rows": "i32", "x_stride": "i32"}


def _named(op: str, dtype: str, rows: int, hidden: int, options: dict[str, Any]) -> str:
    return " ".join([f"{op} {dtype} [{rows}, {hidden}]", *(f"{name}={value}" for name, value in options.items() if value is not None)])


def _dynamic(rows: int, hidden: int, dtype: str, *, smooth: str | None = None, **plan: Any) -> Case:
    types = {"x_ptr": f"*{dtype}", "smooth_ptr": smooth and f"*{smooth}", "q_ptr": "*i8", "scale_ptr": "*fp32", "least": "fp32", **SIZES}
    name = _named("dynamic_quantize", dtype, rows, hidden, {"smooth": smooth, **plan})
    return Case(name, quant.dynamic_quantize_launch(rows, hidden, DEVICE, smooth=smooth is not None, **plan), types)


def _asymmetric(rows: int, hidden: int, dtype: str, *, smooth: str | None = None, **plan: Any) -> Case:
    pointers = {"x_ptr": f"*{dtype}", "smooth_ptr": smooth and f"*{smooth}", "q_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*fp32"}
    name = _named("asymmetric_quantize", dtype, rows, hidden, {"smooth": smooth, **plan})
    return Case(
        name,
        quant.asymmetric_quantize_launch(rows, hidden, DEVICE, **plan),
        {**pointers, "least": "fp32", **SIZES},
    )


def _static(rows: int, hidden: int, dtype: str, *, scale: str = "fp32", zero: str | None = None, **plan: Any) -> Case:
    types = {"x_ptr": f"*{dtype}", "scale_ptr": f"*{scale}", "zero_ptr": zero and f"*{zero}", "q_ptr": "*i8", **SIZES}
    name = _named("static_quantize", dtype, rows, hidden, {"scale": scale, "zero": zero, **plan})
    return Case(name, quant.static_quantize_launch(rows, hidden, DEVICE, **plan), types)


def _dequantize(
    rows: int, hidden: int, source: str, dtype: str, *, zero: bool = False, row_zero: bool = False, bias: str | None = None, **plan: Any
) -> Case:
    pointers = {"x_ptr": f"*{source}", "row_scale_ptr": "*fp32", "scale_ptr": "*fp32", "row_zero_ptr": "*fp32" if row_zero else None}
    types = {**pointers, "zero_ptr": "*fp32" if zero else None, "bias_ptr": bias and f"*{bias}", "y_ptr": f"*{dtype}", **SIZES}
    name = _named(f"dequantize {source} to", dtype, rows, hidden, {"bias": bias, **plan})
    return Case(name, quant.dequantize_launch(rows, hidden, DEVICE, whole_bias=bias == "i32", **plan), types)


def cases() -> Iterator[Case]:
    for hidden in (128, 1024, 4096, 7168, 18432):
        yield _dynamic(4096, hidden, "bf16")
    yield _dynamic(77, 5120, "fp16", smooth="fp16")
    yield _dynamic(77, 2048, "fp32", smooth="fp32")
    yield _dynamic(4096, 7168, "bf16", smooth="fp32", divide=True)
    for hidden in (128, 3584, 4096, 7168):
        yield _asymmetric(4096, hidden, "bf16")
    yield _asymmetric(77, 2304, "fp16", smooth="fp16", with_zero=True, whole_zero=True, divide=True)
    yield _static(4096, 7168, "bf16", one_scale=True)
    yield _static(4096, 4096, "fp16", scale="fp16", zero="fp16", one_scale=True, one_zero=True, divide=False)
    yield _static(77, 18432, "bf16", zero="i32", one_scale=False)
    yield _static(4096, 128, "bf16", zero="i8", one_scale=False)
    for hidden in (128, 7168, 18432):
        yield _dequantize(4096, hidden, "i32", "bf16")
    yield _dequantize(77, 5120, "i32", "fp16", bias="i32")
    yield _dequantize(77, 4096, "i8", "bf16", bias="bf16", row_zero=True)
    yield _dequantize(4096, 2304, "i8", "fp16", zero=True, one_scale=True, one_zero=True)
