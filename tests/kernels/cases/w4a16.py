"""What the Ascend gate compiles of kernels/w4a16.py."""

from __future__ import annotations

from collections.abc import Iterator

from npu_fusion.kernels import w4a16
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place


def _types(dtype: str, zeros: bool, bias: bool) -> dict[str, str | None]:
    pointer = f"*{dtype}"
    tensors = {"x_ptr": pointer, "words_ptr": "*i32", "scales_ptr": pointer, "y_ptr": pointer}
    return {**tensors, "zeros_ptr": pointer if zeros else None, "bias_ptr": pointer if bias else None, "rows": "i32", "x_stride": "i32"}


def _name(kind: str, dtype: str, rows: int, inputs: int, outputs: int, group: int, zeros: bool) -> str:
    return f"w4a16_{kind} {dtype} [{rows}, {inputs}] x [{inputs}, {outputs}] group {group}{' zeros' if zeros else ''}"


def _gemv(rows: int, inputs: int, outputs: int, group: int, dtype: str, *, zeros: bool, bias: bool = False, experts: bool = False) -> Case:
    types = _types(dtype, zeros, bias) | {"ids_ptr": "*i32" if experts else None, "slots": "i32", "experts": "i32"}
    launch = w4a16.w4a16_gemv_launch(rows, inputs, outputs, group, DEVICE, experts=experts)
    return Case(_name("gemv", dtype, rows, inputs, outputs, group, zeros) + (" experts" if experts else ""), launch, types)


def _gemm(rows: int, inputs: int, outputs: int, group: int, dtype: str, *, zeros: bool, bias: bool = False) -> Case:
    launch = w4a16.w4a16_gemm_launch(rows, inputs, outputs, group, DEVICE)
    return Case(_name("gemm", dtype, rows, inputs, outputs, group, zeros), launch, _types(dtype, zeros, bias))


def _repack(inputs: int, outputs: int, group: int) -> Case:
    launch = w4a16.awq_repack_launch(inputs, outputs // 8, w4a16.plane_rows(inputs, group), DEVICE)
    return Case(f"awq_repack [{inputs}, {outputs}] group {group}", launch, {"awq_ptr": "*i32", "words_ptr": "*i32", "rows": "i32"})


def cases() -> Iterator[Case]:
    for rows in (1, 2, 4, 8):
        yield _gemv(rows, 4096, 4096, 128, "fp16", zeros=True)
    yield _gemv(1, 2048, 1536, 128, "bf16", zeros=False)
    yield _gemv(8, 7168, 18432, 128, "bf16", zeros=True, bias=True)
    yield _gemv(1, 4096, 1024, 32, "fp16", zeros=True)
    yield _gemv(3, 4096, 1000, 64, "fp16", zeros=False)
    yield _gemv(8, 5120, 5120, 5120, "bf16", zeros=False)
    yield _gemv(64, 2048, 1536, 128, "fp16", zeros=True, experts=True)
    yield _gemv(8, 768, 2048, 128, "bf16", zeros=True, bias=True, experts=True)
    yield _gemm(16, 4096, 4096, 128, "fp16", zeros=True)
    yield _gemm(64, 2048, 1536, 128, "bf16", zeros=False)
    yield _gemm(4096, 4096, 4096, 128, "bf16", zeros=True, bias=True)
    yield _gemm(77, 7168, 18432, 64, "bf16", zeros=True)
    yield _gemm(4096, 4096, 1000, 32, "fp16", zeros=False)
    yield _repack(4096, 4096, 128)
    yield _repack(768, 1536, 32)
