"""What is compiled of kernels/w4a16_products.py, for GPUs alone."""

from __future__ import annotations

from collections.abc import Iterator

from npu_fusion.kernels.launch import Device
from npu_fusion.kernels.w4a16_products import w4a16_products_launch
from tests.ascend_gate.case import Case

DEVICE = Device("cuda", cores=132, cube_cores=132)


def _case(rows: int, inputs: int, outputs: int, group: int, dtype: str, *, zeros: bool, bias: bool = False) -> Case:
    pointer = f"*{dtype}"
    types = {"x_ptr": pointer, "words_ptr": "*i32", "scales_ptr": pointer, "y_ptr": pointer, "rows": "i32", "x_stride": "i32"}
    types |= {"zeros_ptr": pointer if zeros else None, "bias_ptr": pointer if bias else None}
    name = f"w4a16_products {dtype} [{rows}, {inputs}] x [{inputs}, {outputs}] group {group}{' zeros' if zeros else ''}"
    return Case(name, w4a16_products_launch(rows, inputs, outputs, group, DEVICE), types)


def cases() -> Iterator[Case]:
    yield _case(8, 4096, 4096, 128, "bf16", zeros=True)
    yield _case(2, 2048, 1536, 128, "fp16", zeros=False, bias=True)
    yield _case(32, 768, 1000, 768, "bf16", zeros=True, bias=True)
