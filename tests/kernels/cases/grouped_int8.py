"""What the Ascend gate compiles of kernels/grouped_int8.py."""

from __future__ import annotations

from collections.abc import Iterator

from npu_fusion.kernels.grouped_int8 import grouped_int8_launch
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place


def _case(rows: int, groups: int, inputs: int, outputs: int, out: str, *, along_inputs: bool = True) -> Case:
    types = {
        "x_ptr": "*i8",
        "weight_ptr": "*i8",
        "x_scale_ptr": "*fp32",
        "weight_scale_ptr": "*fp32",
        "counts_ptr": "*i32",
        "y_ptr": f"*{out}",
    }
    types |= {"weight_stride": "i32", "group_stride": "i32"}
    launch = grouped_int8_launch(rows, groups, inputs, outputs, DEVICE, along_inputs=along_inputs)
    name = f"grouped_int8 {out} [{rows}, {inputs}] x [{groups}, {inputs}, {outputs}]"
    lanes = launch.constants["LANES"]
    note = "sums up to each group, once a program"
    return Case(f"{name} along inputs" if along_inputs else name, launch, types, (lanes - 1,), note)


def cases() -> Iterator[Case]:
    for along_inputs in (False, True):
        yield _case(64, 128, 2048, 1536, "bf16", along_inputs=along_inputs)
        yield _case(32768, 256, 7168, 4096, "bf16", along_inputs=along_inputs)
    yield _case(77, 8, 1000, 1000, "fp32")
