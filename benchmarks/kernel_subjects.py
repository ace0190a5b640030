"""What benchmarks/kernels.py measures: each kernel with its inputs, the plain PyTorch for Inductor, and libraries that compute the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import npu_fusion  # noqa: F401  registers the ops

ops = torch.ops.npu_fusion_triton
BF16 = torch.bfloat16
Inputs = Callable[[int, str], tuple[Any, ...]]


@dataclass(frozen=True)
class Subject:
    """One kernel at one width.

    Attributes:
        name: the kernel and its width.
        inputs: makes one set of arguments for a number of rows, on a device.
        ours: the Triton op, with `cores`.
        plain: the same in plain PyTorch, for Inductor.
        libraries: what else computes the same here, by name.
        rows: the numbers of rows at which it is measured, where these are not the usual ones.
        bytes_needed: the bytes that a call has to read and write, where that is not every argument and result once.
    """

    name: str
    inputs: Inputs
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    libraries: Callable[[], dict[str, Callable[..., Any]]] = dict
    rows: tuple[int, ...] | None = None
    bytes_needed: Callable[[tuple[Any, ...]], int] | None = None


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists, in order."""
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in tensors_in(value)] if isinstance(values, (tuple, list)) else []


def random(*sizes: int, device: str, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(sizes, device=device).to(dtype)


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def plain_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return plain_rms_norm(total, weight), total


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def _liger_rms_norm() -> dict[str, Callable[..., Any]]:
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return {"liger": lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)}


def matrices(count: int, hidden: int, vectors: int = 0) -> Inputs:
    """Makes `count` matrices [rows, hidden] and `vectors` vectors [hidden]."""

    def make(rows: int, device: str) -> tuple[Any, ...]:
        sizes = [(rows, hidden)] * count + [(hidden,)] * vectors
        return tuple(random(*size, device=device) for size in sizes)

    return make


def rms_norm(x: Tensor, weight: Tensor, cores: int) -> Any:
    return ops.rms_norm(x, weight, 1e-6, cores=cores)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, cores: int) -> Any:
    return ops.add_rms_norm(x, residual, weight, 1e-6, cores=cores)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, cores: int) -> Any:
    return ops.layer_norm(x, weight, bias, 1e-6, cores=cores)


def _norms() -> Iterator[Subject]:
    for hidden in (2048, 4096, 7168):
        yield Subject(f"rms_norm {hidden}", matrices(1, hidden, 1), rms_norm, plain_rms_norm, _liger_rms_norm)
        yield Subject(f"add_rms_norm {hidden}", matrices(2, hidden, 1), add_rms_norm, plain_add_rms_norm)
        yield Subject(f"layer_norm {hidden}", matrices(1, hidden, 2), layer_norm, plain_layer_norm)


SUBJECTS: list[Subject] = [*_norms()]
