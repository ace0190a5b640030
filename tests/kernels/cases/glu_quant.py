"""What the Ascend gate compiles of kernels/glu_quant.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npu_fusion.kernels import glu_quant
from npu_fusion.kernels.launch import Device, Launch
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place
COUNTED = "the ends of the groups are summed up from their sizes once a launch"


def _case(name: str, launch: Launch, dtype: str, *, vectors: dict[str, str | None], clamped: bool, groups: int, dequant: bool) -> Case:
    types: dict[str, Any] = dict.fromkeys(("gate_ptr", "up_ptr"), "*i32" if dequant else f"*{dtype}")
    types |= dict.fromkeys(("weight_scale_ptr", "token_scale_ptr"), "*fp32" if dequant else None)
    types |= {"group_ptr": "*i64" if groups else None, "q_ptr": "*i8", **vectors}
    strides = ("gate_stride", "up_stride", "weight_stride", "bias_stride", "smooth_stride", "scale_stride")
    types |= {stride: "i32" for stride in strides if stride in launch.kernel.arg_names} | {"rows": "i32"}
    types |= dict.fromkeys(("alpha", "gate_limit", "up_limit", "up_offset"), "fp32" if clamped else None)
    counts = bool(launch.constants["COUNTS"])
    return Case(name, launch, types, loops=(groups - 1,) if counts else (), note=COUNTED if counts else "")


def _name(op: str, dtype: str, rows: int, width: int, plan: dict[str, Any], *more: object) -> str:
    options = " ".join(f"{name}={value}" for name, value in plan.items()) + "".join(f" {word}" for word in more if word)
    return f"{op} {dtype} [{rows}, {width}] {options}".strip()


def _dynamic(
    rows: int, width: int, dtype: str, *, smooth: str | None = None, bias: str | None = None, clamped: bool = False, **plan: Any
) -> Case:
    launch = glu_quant.glu_quant_launch(rows, width, DEVICE, limited=clamped, **plan)
    vectors = {"bias_ptr": bias, "smooth_ptr": smooth, "scale_ptr": "*fp32"}
    name = _name("glu_quant", dtype, rows, width, plan, smooth and "smooth", bias and f"bias {bias}", clamped and "clamped")
    dequant, groups = bool(plan.get("dequant")), int(plan.get("groups", 0))
    return _case(name, launch, dtype, vectors=vectors, clamped=clamped, groups=groups, dequant=dequant)


def _static(
    rows: int, width: int, dtype: str, *, offset: bool = False, bias: str | None = None, clamped: bool = False, **plan: Any
) -> Case:
    launch = glu_quant.glu_static_quant_launch(rows, width, DEVICE, limited=clamped, **plan)
    vectors = {"bias_ptr": bias, "scale_ptr": "*fp32", "offset_ptr": "*fp32" if offset else None}
    name = _name("glu_static_quant", dtype, rows, width, plan, offset and "offset", bias and f"bias {bias}", clamped and "clamped")
    dequant, groups = bool(plan.get("dequant")), int(plan.get("groups", 0))
    return _case(name, launch, dtype, vectors=vectors, clamped=clamped, groups=groups, dequant=dequant)


def cases() -> Iterator[Case]:
    for width in (768, 1024, 2048, 4096, 6144, 11008, 18432):
        yield _dynamic(4096, width, "bf16", layout="halves")
    yield _dynamic(1, 2880, "fp16", layout="interleaved", clamped=True, smooth="*fp32")
    yield _dynamic(77, 3072, "fp32", activation="gelu_tanh", round_to="fp16", product="fp16")
    yield _dynamic(513, 1408, "bf16", layout="swapped", groups=64, smooth="*fp32")
    yield _dynamic(513, 1408, "bf16", layout="halves", groups=128, counts=True, smooth="*bf16")
    yield _dynamic(4096, 2048, "bf16", layout="halves", dequant=True, smooth="*fp32", bias="*i32")
    yield _dynamic(4097, 768, "bf16", layout="swapped", dequant=True, groups=128, counts=True, smooth="*fp32")
    yield _dynamic(33, 2880, "bf16", layout="interleaved", dequant=True, groups=32, clamped=True, bias="*bf16", dequant_to="bf16")
    yield _dynamic(4096, 18432, "bf16", layout="halves", dequant=True, smooth="*fp32")
    for width in (1024, 11008, 18432):
        yield _static(4096, width, "bf16", layout="halves", channels=True, offset=True)
    yield _static(1, 14336, "fp16", activation="gelu", layout="interleaved", clamped=True)
    yield _static(33, 768, "fp16", groups=64, channels=True, divide=True)
    yield _static(4097, 2048, "bf16", layout="halves", dequant=True, channels=True, bias="*fp32", offset=True)
