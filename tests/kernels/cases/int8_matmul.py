"""What the Ascend gate compiles of kernels/int8_matmul.py."""

from __future__ import annotations

from collections.abc import Iterator

from npu_fusion.kernels.int8_matmul import int8_matmul_launch
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place


def _case(
    rows: int,
    inputs: int,
    outputs: int,
    out: str,
    *,
    along_inputs: bool = False,
    per_token: bool = True,
    zeros: bool = False,
    bias: str | None = None,
    scale: str | None = "fp32",
) -> Case:
    types = {
        "x_ptr": "*i8",
        "weight_ptr": "*i8",
        "x_scale_ptr": "*fp32" if scale else None,
        "weight_scale_ptr": f"*{scale}" if scale else None,
    }
    types |= {
        "x_zero_ptr": "*i32" if zeros else None,
        "weight_sum_ptr": "*i32" if zeros else None,
        "bias_ptr": f"*{bias}" if bias else None,
    }
    types |= {"y_ptr": f"*{out}", "rows": "i32", "x_stride": "i32", "weight_stride": "i32"}
    launch = int8_matmul_launch(
        rows,
        inputs,
        outputs,
        DEVICE,
        along_inputs=along_inputs,
        row_scales=per_token,
        row_zeros=zeros and per_token,
        bias_first=bias == "i32",
    )
    words = [f"int8_matmul {out} [{rows}, {inputs}] x [{inputs}, {outputs}]", "along inputs" if along_inputs else ""]
    words += ["per token" if per_token else "", "zero point" if zeros else "", f"bias {bias}" if bias else ""]
    return Case(" ".join(filter(None, words)), launch, types)


def cases() -> Iterator[Case]:
    for along_inputs in (False, True):
        yield _case(1, 4096, 4096, "bf16", along_inputs=along_inputs)
        yield _case(4096, 4096, 4096, "bf16", along_inputs=along_inputs)
        yield _case(16, 7168, 18432, "fp16", along_inputs=along_inputs, zeros=True, bias="bf16")
        yield _case(4097, 7168, 2112, "bf16", along_inputs=along_inputs, per_token=False, zeros=True, bias="i32")
        yield _case(77, 1536, 1000, "fp16", along_inputs=along_inputs, bias="fp32", scale="bf16")
        yield _case(64, 2048, 1536, "i32", along_inputs=along_inputs, per_token=False, scale=None, bias="i32")
    yield _case(33, 1000, 4096, "fp32")
