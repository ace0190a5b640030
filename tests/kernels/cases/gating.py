"""What the Ascend gate compiles of kernels/gating.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npu_fusion.kernels import gating
from npu_fusion.kernels.launch import Device
from tests.ascend_gate.case import Case

DEVICE = Device("npu", cores=40, cube_cores=20)  # what the plans are made for; tests/kernels/gpu_code.py has a GPU in its place


def _gating(rows: int, experts: int, k: int, dtype: str = "fp32", *, bias: str | None = None, scores: bool = False, **plan: Any) -> Case:
    types = {
        "logits_ptr": f"*{dtype}",
        "bias_ptr": f"*{bias}" if bias else None,
        "weights_ptr": "*fp32",
        "indices_ptr": "*i32",
        "scores_ptr": "*fp32" if scores else None,
        "rows": "i32",
        "logits_stride": "i32",
        **dict.fromkeys(("eps", "scale", "excluded"), "fp32"),
    }
    options = " ".join(f"{name}={value}" for name, value in plan.items()) + (" bias" if bias else "")
    return Case(
        f"moe_gating {dtype} [{rows}, {experts}] {k} {options}".strip(), gating.moe_gating_launch(rows, experts, k, DEVICE, **plan), types
    )


def cases() -> Iterator[Case]:
    yield _gating(4096, 256, 8, bias="fp32", score="sigmoid", groups=8, top_groups=4, by_two=True, renormalize=True)
    yield _gating(4096, 8, 2, "bf16", renormalize=True)
    yield _gating(4097, 64, 6, "bf16")
    yield _gating(4096, 128, 8, renormalize=True)
    yield _gating(77, 512, 10, "bf16", scores=True)
    yield _gating(33, 160, 8, bias="fp32", score="sigmoid", renormalize=True)
    yield _gating(4096, 160, 6, groups=8, top_groups=3)
    yield _gating(1, 256, 8, "fp16", bias="fp32", score="sigmoid", groups=8, top_groups=4, by_two=True, renormalize=True, scores=True)
    yield _gating(4096, 384, 8, bias="fp32", score="sqrt_softplus", renormalize=True, round_to="bf16")
    yield _gating(4096, 128, 4, "bf16", score_first=False)
    yield _gating(4096, 16, 1, "bf16", score="sigmoid", score_first=False)
