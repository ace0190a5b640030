"""What a plan function returns: which kernel to launch, on how many programs, with which constants. Nothing here needs Triton or torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Device:
    """What a plan depends on.

    Attributes:
        kind: "npu" is Ascend, "cuda" NVIDIA, "cpu" Triton's interpreter.
        cores: vector cores on Ascend, streaming multiprocessors on NVIDIA.
        cube_cores: cores with a matrix unit: on Ascend the grid of a kernel with `tl.dot`, on NVIDIA the same as `cores`.
    """

    kind: Literal["npu", "cuda", "cpu"]
    cores: int
    cube_cores: int


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, its tensors and run-time numbers left out.

    Attributes:
        kernel: a `@triton.jit` function.
        grid: number of programs, along one axis.
        constants: its `tl.constexpr` arguments by name.
        options: how the compiler is to build it (`num_warps`, `multibuffer`, ...), by the names that the device's Triton knows.
    """

    kernel: Any
    grid: int
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
