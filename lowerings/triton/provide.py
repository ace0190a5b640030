"""How a Triton provider is written: a function from a semantic call to a call of a Triton op.

    @provides("rms_norm", "triton.rms_norm")
    def rms_norm(b: Builder, a: Arguments, cores: int) -> Node:
        return b.emit(ops.rms_norm.overload, a.x, a.weight, a.eps, cores=cores)

On `cuda` these come first; on Ascend they stand behind the ops of torch_npu and of sgl-kernel-npu.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.fx import Node

from ...config import TARGETS, FusionConfig
from ...lower import Arguments, Builder, Provider, device_of, register_provider
from ...view.shapes import to_dim

Lowering = Callable[[Builder, Arguments, int], "Node | Sequence[Node | None]"]

_AFTER_NPU_OPS = 10  # rank on Ascend, where the table's ops have ranks from 0
# Cores of an accelerator that is not here: of an H100, and of the smaller of the chips that go by one name (ascendnpu-ir's device spec).
_ABSENT = {"cuda": (132, 132), "ascend910b": (40, 20), "ascend910_93": (40, 20), "ascend950": (40, 20)}


def provides(op: str, name: str, *, rank: int = 0, matrix: bool = False, launches: int = 1) -> Callable[[Lowering], Lowering]:
    """Register a function as a provider of a semantic op by Triton kernels, on CUDA and on Ascend.

    The function gets, with builder and arguments, the number of cores that the kernels are planned for.

    Args:
        op: the semantic op.
        name: what the report shows.
        rank: of the Triton providers of an op those of lower rank are tried first.
        matrix: whether the kernels multiply matrices, and are planned for a chip's matrix cores.
        launches: as in `Provider`.
    """

    def declare(function: Lowering) -> Lowering:
        @functools.wraps(function)
        def lower(b: Builder, a: Arguments) -> Node | Sequence[Node | None]:
            device = device_of(b.config)
            b.only_if(b.dry_run or device != "cpu" or interprets())
            b.require(available(b.config, b.dry_run), f"the installed Triton has no compiler for {device}")
            return function(b, a, cores_of(b.config, b.dry_run)[matrix])

        ascend = tuple(target for target in TARGETS if target.startswith("ascend"))
        register_provider(Provider(name, op, ("cuda",), lower, rank, launches, available))
        register_provider(Provider(name, op, ascend, lower, rank + _AFTER_NPU_OPS, launches, available))
        return function

    return declare


def require_width(b: Builder, **tensors: Node | None) -> None:
    """Refuse tensors whose last dimension is known at run time only."""
    for name, node in tensors.items():
        b.require(node is None or b.val(node).dim() > 0, f"{name} has no dimension")
        known = node is None or isinstance(to_dim(b.val(node).shape[-1]), int)
        b.require(known, f"the last dimension of {name} is symbolic: a kernel is compiled for its size")


def available(config: FusionConfig, dry_run: bool) -> bool:
    """Whether the installed Triton compiles for the target's device, or interprets on a CPU; or need not."""
    return dry_run or (interprets() if device_of(config) == "cpu" else has_backend(device_of(config)))


def interprets() -> bool:
    """Whether Triton's interpreter, which runs kernels on a CPU, is asked for: TRITON_INTERPRET=1 before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def has_backend(device: str) -> bool:
    """Whether the installed Triton has a compiler for a type of device: triton-ascend and triton do not live side by side."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.backends import backends

    return {"cuda": "nvidia", "npu": "ascend"}[device] in backends


def cores_of(config: FusionConfig, dry_run: bool) -> tuple[int, int]:
    """Vector and matrix cores of the target's device; those of a usual one where it is not here."""
    kind = device_of(config)
    if dry_run or kind == "cpu":
        return _ABSENT[config.target]
    return _cores_of_cuda(torch.cuda.current_device()) if kind == "cuda" else _cores_of_npu()


@cache
def _cores_of_cuda(index: int) -> tuple[int, int]:
    cores = torch.cuda.get_device_properties(index).multi_processor_count
    return cores, cores


@cache
def _cores_of_npu() -> tuple[int, int]:
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
    return properties["num_vectorcore"], properties["num_aicore"]
