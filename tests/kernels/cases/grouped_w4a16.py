"""What the Ascend gate compiles of kernels/grouped_w4a16.py."""

from __future__ import annotations

from collections.abc import Iterator

from npu_fusion.kernels.grouped_w4a16 import grouped_w4a16_launch
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place


def _case(rows: int, groups: int, inputs: int, outputs: int, group: int, dtype: str, *, zeros: bool) -> Case:
    pointer = f"*{dtype}"
    types = {"x_ptr": pointer, "words_ptr": "*i32", "scales_ptr": pointer, "zeros_ptr": pointer if zeros else None}
    types |= {"counts_ptr": "*i32", "y_ptr": pointer}
    launch = grouped_w4a16_launch(rows, groups, inputs, outputs, group, DEVICE)
    name = f"grouped_w4a16 {dtype} [{rows}, {inputs}] x [{groups}, {inputs}, {outputs}] group {group}{' zeros' if zeros else ''}"
    return Case(name, launch, types, (launch.constants["LANES"] - 1,), "sums up to each group, once a program")


def cases() -> Iterator[Case]:
    yield _case(512, 128, 2048, 1536, 128, "bf16", zeros=True)
    yield _case(32768, 128, 768, 2048, 128, "fp16", zeros=True)
    yield _case(4096, 8, 4096, 1000, 64, "bf16", zeros=False)
