"""How a CPU kernel of an Ascend op is declared, and what kernels share: argument checks and rounding.

    @emulates("npu::npu_swiglu")
    def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor: ...

    @npu_swiglu.fake
    def _(input: Tensor, dim: int = -1) -> Tensor: ...

The fake kernel computes metadata only, and must accept symbolic sizes without adding a guard. It is registered where torch_npu has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....errors import NpuFusionError
from ..library import define_ops, overload_of
from ..table import AscendOp, ascend_ops

_KERNELS: dict[str, Emulated] = {}
_LIBRARIES: dict[tuple[str, str], torch.library.Library] = {}


class EmulationError(NpuFusionError, RuntimeError):
    """An op was called as the Ascend operator does not allow, or in a way that its CPU kernel does not support; names the argument."""


@dataclass(frozen=True, eq=False)
class Emulated:
    """The CPU kernel of one op."""

    op: AscendOp
    kernel: Callable[..., Any]
    _fakes: list[Callable[..., Any]] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kernel(*args, **kwargs)

    def fake(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Register the fake kernel (decorator), unless torch_npu brings one."""
        self._fakes.append(kernel)
        if self.op.name in define_ops() or (not self.op.meta and overload_of(self.op) is not None):
            torch.library.register_fake(self.op.name, kernel, lib=_library(self.op.namespace, "FRAGMENT"))
        return kernel


def emulates(name: str) -> Callable[[Callable[..., Any]], Emulated]:
    """Declare the decorated function as the CPU kernel of an op of the table."""

    def declare(kernel: Callable[..., Any]) -> Emulated:
        op = ascend_ops()[name]
        define_ops()
        if overload_of(op) is not None:
            _library(op.namespace, "IMPL").impl(name.split("::")[1], kernel, "CPU")
        emulated = _KERNELS[name] = Emulated(op, kernel)
        return emulated

    return declare


def emulated_ops() -> dict[str, Emulated]:
    """Qualified name to CPU kernel."""
    return dict(_KERNELS)


def _library(namespace: str, kind: str) -> torch.library.Library:
    key = (namespace, kind)
    if key not in _LIBRARIES:
        _LIBRARIES[key] = torch.library.Library(namespace, kind)
    return _LIBRARIES[key]


# -------------------------------------------------------------------- what kernels share


def check(op: str, condition: bool, message: str) -> None:
    """Raise EmulationError, with the op's name before `message`, unless `condition`."""
    if not condition:
        raise EmulationError(f"{op}: {message}")


def refuse(op: str, **given: Any) -> None:
    """Raise EmulationError if one of the arguments, that the kernel does not support, is given (is not None)."""
    for name, value in given.items():
        check(op, value is None, f"the CPU kernel does not support {name}; leave it out")


def check_dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise EmulationError unless the tensor has one of the dtypes."""
    shown = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    check(op, tensor.dtype in allowed, f"{name} must be {shown}, not {str(tensor.dtype).removeprefix('torch.')}")


def check_same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise EmulationError unless all given tensors have one dtype."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    check(op, len(set(dtypes.values())) <= 1, f"dtypes must be equal: {', '.join(f'{n} is {d}' for n, d in dtypes.items())}")


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
