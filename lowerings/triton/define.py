"""How a Triton kernel becomes a torch op: `torch.ops.npu_fusion_triton.<name>`.

    @triton_op("(Tensor x, Tensor? weight, float eps, *, int cores) -> Tensor")
    def rms_norm(x, weight, eps, *, cores): ...

    @rms_norm.fake
    def _(x, weight, eps, *, cores): return x.new_empty(x.shape)

What an op has to know of its device is an argument, filled in when the graph is lowered, so that a call asks no device, waits for none and
can be captured. The ops are opaque to Inductor, which calls them as they are; as with semantic ops, `Library.impl` costs a third of what
`custom_op` does. No kernel is tuned at run time: the plans in kernels/ choose by size, so that a capture never finds a kernel untuned.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ...kernels.launch import Device, Launch

NAMESPACE = "npu_fusion_triton"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_OPS: dict[str, TritonOp] = {}
KINDS = {"cuda": "CUDA", "npu": "PrivateUse1", "cpu": "CPU"}
"""Kinds of device to dispatch keys; on `cpu` Triton's interpreter runs the kernels, for tests."""


class TritonOp:
    """A torch op that launches Triton kernels."""

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.name = name
        self._run = run
        functools.update_wrapper(self, run)

    @property
    def overload(self) -> OpOverload:
        overload: OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        return overload

    @property
    def doc(self) -> str:
        return inspect.getdoc(self._run) or ""

    def fake(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Register the fake kernel (decorator). It is called with all arguments, so that it can name some and take the rest as `**form`."""
        signature = inspect.signature(self._run)

        def complete(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return kernel(*bound.args, **bound.kwargs)

        torch.library.register_fake(f"{NAMESPACE}::{self.name}", complete, lib=_LIBRARY)
        return kernel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)


def triton_op(schema: str) -> Callable[[Callable[..., Any]], TritonOp]:
    """Declare the op named like the decorated function, with the given schema tail `(args) -> returns`.

    The function checks its arguments, makes the results and launches the kernels by `launch`.
    """

    def declare(run: Callable[..., Any]) -> TritonOp:
        name = run.__name__
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        for key in KINDS.values():
            _LIBRARY.impl(name, run, key)
        op = _OPS[name] = TritonOp(name, run)
        return op

    return declare


def triton_ops() -> dict[str, TritonOp]:
    """All ops by name."""
    return dict(_OPS)


def device_for(tensor: Tensor, cores: int) -> Device:
    """What a plan has to know of a tensor's device; `cores` is the op's argument: of matrices for an op with products, else of vectors."""
    return Device(tensor.device.type, cores, cores)


def launch(plan: Launch, on: Tensor, **arguments: Any) -> None:
    """Launch a kernel on the device of a tensor, with the tensors (None where absent) and numbers that its plan does not hold."""
    device = on.device
    with contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
        plan.kernel[(plan.grid,)](**arguments, **plan.constants, **plan.options)
