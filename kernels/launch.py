"""What the plan of a kernel decides, from sizes and a device alone: what is launched, on how many programs, with which constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton

UNIFIED_BUFFER = 192 * 1024
"""Bytes of a vector core's memory on Ascend (A2, A3); kernels are planned to need at most three quarters of it."""
MOST_PROGRAMS = {"npu": 65535, "cuda": 2**31 - 1, "cpu": 2**31 - 1}
"""The largest grid of each kind of device."""


@dataclass(frozen=True)
class Device:
    """What a plan has to know of a device.

    Args:
        kind: `npu`, `cuda`, or `cpu` for Triton's interpreter.
        cores: vector cores of an NPU, multiprocessors of a GPU.
        cube_cores: matrix cores of an NPU; elsewhere the same as `cores`.
    """

    kind: str
    cores: int
    cube_cores: int


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, but for its tensors and numbers.

    Args:
        kernel: the `@triton.jit` function.
        grid: how many programs; any number from 1 gives the right result.
        constants: the kernel's `tl.constexpr` arguments by name.
        options: of the compiler, e.g. `num_warps`.
    """

    kernel: Any
    grid: int
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


def vector_grid(tiles: int, device: Device) -> int:
    """Programs for tiles of vector work: an NPU's cores take turns, elsewhere each tile is a program of its own."""
    return max(1, min(tiles, device.cores if device.kind == "npu" else MOST_PROGRAMS[device.kind]))


def takes_turns(device: Device) -> bool:
    """Whether programs may have several tiles (`turns_end` of tile.py), or one each."""
    return device.kind == "npu"


def cube_grid(tiles: int, device: Device) -> int:
    """Programs for tiles that are matrix products."""
    return max(1, min(tiles, device.cube_cores if device.kind == "npu" else MOST_PROGRAMS[device.kind]))


def power_of_2(size: int) -> int:
    """The least power of 2 that is not less than a size."""
    return int(triton.next_power_of_2(size))


def dividing_block(size: int, least: int, most: int) -> int:
    """The block in which a long axis is walked: the largest power of 2 from `least` to `most` that divides it, so that no mask is needed;
    the largest of all where none does."""
    block = most
    while block > least and size % block:
        block //= 2
    return block if size % block == 0 else most


def product_columns(tiles_down: int, outputs: int, device: Device) -> int:
    """Columns of a tile of a matrix product on a GPU, 128 to 32: so few that every multiprocessor gets a tile, if so many there are."""
    return next((size for size in (128, 64) if tiles_down * -(-outputs // size) >= 0.9 * device.cores), 32)
