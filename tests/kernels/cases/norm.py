"""What the Ascend gate compiles of kernels/norm.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npu_fusion.kernels import norm
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place
NUMBERS = {"rows": "i32", "x_stride": "i32", "eps": "fp32"}


def _rms_norm(rows: int, hidden: int, dtype: str, *, weight: str | None = None, **plan: Any) -> Case:
    pointer, gate = f"*{dtype}", plan.get("gate")
    types = {"x_ptr": pointer, "weight_ptr": f"*{weight or dtype}", "gate_ptr": pointer if gate else None, "y_ptr": pointer, **NUMBERS}
    launch = norm.rms_norm_launch(rows, hidden, DEVICE, **plan)
    options = " ".join(f"{name}={value}" for name, value in plan.items())
    return Case(f"rms_norm {dtype} [{rows}, {hidden}] {options}".strip(), launch, types | {"gate_stride": "i32", "groups": "i32"})


def _add_rms_norm(rows: int, hidden: int, dtype: str, *, bias: bool = False, **plan: Any) -> Case:
    pointer = f"*{dtype}"
    tensors = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "sum_ptr"), pointer)
    types = tensors | {"bias_ptr": pointer if bias else None, "residual_stride": "i32"} | NUMBERS
    options = " ".join(f"{name}={value}" for name, value in plan.items()) + (" bias" if bias else "")
    return Case(
        f"add_rms_norm {dtype} [{rows}, {hidden}] {options}".strip(),
        norm.add_rms_norm_launch(rows, hidden, DEVICE, bias=bias, **plan),
        types,
    )


def _layer_norm(rows: int, hidden: int, dtype: str) -> Case:
    types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), f"*{dtype}") | NUMBERS
    return Case(f"layer_norm {dtype} [{rows}, {hidden}]", norm.layer_norm_launch(rows, hidden, DEVICE), types)


def _l2_norm(rows: int, hidden: int, dtype: str) -> Case:
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "scale": "fp32"} | NUMBERS
    return Case(f"l2_norm {dtype} [{rows}, {hidden}]", norm.l2_norm_launch(rows, hidden, DEVICE), types)


def cases() -> Iterator[Case]:
    for hidden in (64, 128, 256, 1024, 2304, 4096, 5120, 7168, 18432):
        yield _rms_norm(4096, hidden, "bf16")
    yield _rms_norm(1, 4096, "fp16", weight_offset=1)
    yield _rms_norm(33, 4096, "fp32", weight_offset=1)
    yield _rms_norm(4097, 3584, "bf16", weight_offset=1, round_to="bf16", product="bf16")
    yield _rms_norm(77, 8192, "bf16", gate="silu", weight="fp32")
    yield _rms_norm(77, 512, "fp16", gate="silu", gate_first=True, groups=8)
    for hidden in (1024, 2304, 4096, 7168, 18432):
        yield _add_rms_norm(4096, hidden, "bf16")
    yield _add_rms_norm(77, 4096, "fp16", bias=True, unrounded=True)
    yield _add_rms_norm(77, 5120, "bf16", bias=True, weight_offset=1)
    yield _layer_norm(4096, 1024, "bf16")
    yield _layer_norm(4096, 5120, "fp16")
    yield _l2_norm(4096, 128, "bf16")
    yield _l2_norm(77, 8192, "fp32")
