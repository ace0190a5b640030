"""What the Ascend gate compiles of kernels/conv1d.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npu_fusion.kernels import conv1d
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place


def _conv1d(
    tokens: int,
    sequences: int,
    channels: int,
    dtype: str,
    *,
    taps: int = 4,
    bias: bool = False,
    slots: bool = False,
    kept: bool = False,
    **plan: Any,
) -> Case:
    pointer = f"*{dtype}"
    types = {
        **dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), pointer),
        "bias_ptr": pointer if bias else None,
        "starts_ptr": "*i32" if plan.get("varlen") else None,
        "state_ptr": pointer if plan.get("length") else None,
        "slots_ptr": "*i32" if slots else None,
        "kept_ptr": "*i8" if kept else None,
        **dict.fromkeys(("tokens", "sequences", "tiles", "all_tiles", "x_batch", "x_token", "x_channel"), "i32"),
        **dict.fromkeys(("state_slot", "state_token", "state_channel"), "i32"),
    }
    launch = conv1d.conv1d_launch(tokens, sequences, channels, taps, DEVICE, weight_strides=(channels, 1), **plan)
    shown = "".join(f" {name}={value}" for name, value in plan.items())
    return Case(f"conv1d {dtype} {sequences} x [{tokens}, {channels}] {taps} taps{shown}{' slots' if slots else ''}", launch, types)


def cases() -> Iterator[Case]:
    for tokens, channels in ((1, 8192), (1, 10240), (2, 8192), (4, 6144)):
        yield _conv1d(tokens, 16, channels, "bf16", length=3, slots=True, activation="silu")
    yield _conv1d(1, 77, 5376, "fp16", length=4, bias=True)
    yield _conv1d(4096, 1, 8192, "bf16", activation="silu")
    yield _conv1d(1001, 4, 10240, "bf16", length=3, keep=False, bias=True, activation="silu")
    yield _conv1d(4097, 16, 8192, "bf16", length=3, varlen=True, slots=True, kept=True, activation="silu")
    yield _conv1d(65537, 256, 6144, "fp16", length=3, varlen=True, slots=True, kept=True, bias=True)
    yield _conv1d(4096, 3, 1000, "fp16", taps=2, length=1, varlen=True)
    yield _conv1d(4096, 1, 1024, "fp32", taps=8, length=8)
