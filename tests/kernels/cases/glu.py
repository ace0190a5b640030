"""What the Ascend gate compiles of kernels/glu.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npu_fusion.kernels import glu
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place
LIMITS = ("alpha", "gate_limit", "up_limit", "up_offset")


def _glu(rows: int, width: int, dtype: str, *, clamped: bool = False, **plan: Any) -> Case:
    types: dict[str, Any] = dict.fromkeys(("gate_ptr", "up_ptr", "y_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("rows", "gate_stride", "up_stride"), "i32") | dict.fromkeys(LIMITS, "fp32" if clamped else None)
    options = " ".join(f"{name}={value}" for name, value in plan.items()) + (" clamped" if clamped else "")
    return Case(f"glu {dtype} [{rows}, {width}] {options}".strip(), glu.glu_launch(rows, width, DEVICE, limited=clamped, **plan), types)


def cases() -> Iterator[Case]:
    for width in (768, 1024, 2816, 6144, 11008, 18432):
        yield _glu(4096, width, "bf16", layout="halves")
    yield _glu(1, 18432, "bf16", layout="halves", round_to="bf16")
    yield _glu(33, 4096, "fp32", layout="swapped")
    yield _glu(4097, 1000, "fp16")
    yield _glu(4096, 2880, "bf16", layout="interleaved", clamped=True)
    yield _glu(1, 2880, "bf16", layout="interleaved", clamped=True)
    for activation in ("gelu", "gelu_tanh", "sigmoid", "tanh", "relu", "relu2", "identity"):
        yield _glu(4096, 14336, "fp16", activation=activation)
    yield _glu(4096, 14336, "fp32", activation="gelu_tanh", layout="interleaved", clamped=True, round_to="fp16")
