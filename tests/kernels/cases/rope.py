"""What the Ascend gate compiles of kernels/rope.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npu_fusion.kernels import rope
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place
STRIDES = [f"{tensor}_{dim}" for tensor in ("q", "k", "q_out", "k_out") for dim in ("batch", "token", "head")]
TABLE_STRIDES = [f"{tensor}_{dim}" for tensor in ("cos", "sin", "positions") for dim in ("batch", "token")]


def _rotary(
    dtype: str, heads: tuple[int, int], head_dim: int, *, rotary_dim: int = 0, table: str = "", gathered: bool = False, **plan: Any
) -> Case:
    launch = rope.rotary_launch(4096, *heads, head_dim, rotary_dim or head_dim, DEVICE, **plan)
    tensors: dict[str, str | None] = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{dtype}")
    if not heads[1]:
        tensors |= {"k_ptr": None, "k_out_ptr": None}
    tables = {"cos_ptr": f"*{table or dtype}", "sin_ptr": f"*{table or dtype}", "positions_ptr": "*i64" if gathered else None}
    numbers = dict.fromkeys(("rows", "tokens", *STRIDES, *TABLE_STRIDES), "i32")
    options = " ".join(f"{name}={value}" for name, value in plan.items()) + (" gathered" if gathered else "")
    name = f"rotary {dtype} {heads[0]}+{heads[1]} x {rotary_dim or head_dim}/{head_dim} {options}".strip()
    return Case(name, launch, {**tensors, **tables, **numbers})


def cases() -> Iterator[Case]:
    for layout in ("half", "interleaved", "mla"):
        yield _rotary("bf16", (32, 8), 128, layout=layout)
        yield _rotary("bf16", (128, 1), 64, layout=layout, full=True, table="fp32")
    yield _rotary("fp16", (40, 8), 128, rotary_dim=64, gathered=True)
    yield _rotary("bf16", (8, 0), 256, rotary_dim=64, full=True)
    yield _rotary("bf16", (28, 4), 96)
    yield _rotary("fp32", (64, 8), 128, full=True)
    yield _rotary("bf16", (128, 128), 128, sign=-1)
