"""Functions of sgl-kernel-npu as ops of the graph.

sgl-kernel-npu has its Triton kernels behind Python functions, which a graph cannot hold. Each that the project uses is an op of the
namespace `npu_fusion_sgl`, with the schema of the table; the kernel for NPU tensors calls the function. The package is imported at the
first call: without it such an op can be compiled for a target that is absent, and emulated, but not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...config import FusionConfig
from ...errors import NpuFusionError
from ...lower import Builder
from .library import define_ops

NAMESPACE = "npu_fusion_sgl"
_PACKAGE = "sgl_kernel_npu"


class SglKernelError(NpuFusionError, RuntimeError):
    """A function of sgl-kernel-npu cannot be had, or is too old."""


@cache
def installed() -> bool:
    """Whether sgl-kernel-npu is installed; it is not imported."""
    return importlib.util.find_spec(_PACKAGE) is not None


def available(config: FusionConfig, dry_run: bool) -> bool:
    """Whether the ops can run: the package is installed, or the graph is emulated, or only shown."""
    return config.emulate or dry_run or installed()


def require(b: Builder) -> None:
    """Refuse a call where its op could not run."""
    b.require(available(b.config, b.dry_run), "sgl-kernel-npu is not installed")
    register()


@cache
def register() -> torch.library.Library:
    """Give the ops their kernels for NPU tensors. Done once a process."""
    define_ops()
    library = torch.library.Library(NAMESPACE, "IMPL")
    library.impl("split_qkv_rmsnorm_rope", split_qkv_rmsnorm_rope, "PrivateUse1")
    return library


def _function(module: str, name: str) -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)
    except (ImportError, AttributeError, OSError) as error:
        raise SglKernelError(f"{NAMESPACE}::{name} needs {name} of sgl-kernel-npu ({error}): install sgl-kernel-npu") from error
    return function


def split_qkv_rmsnorm_rope(
    input: Tensor,
    sin: Tensor,
    cos: Tensor,
    q_hidden_size: int,
    kv_hidden_size: int,
    head_dim: int,
    eps: float | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    is_neox_style: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel for NPU tensors. Releases before `is_neox_style` round the normalised heads to bf16, and are refused.

    Raises:
        SglKernelError: sgl-kernel-npu is not installed, or is older than that.
    """
    function = _function("norm.split_qkv_rmsnorm_rope", "split_qkv_rmsnorm_rope")
    if "is_neox_style" not in inspect.signature(function).parameters:
        raise SglKernelError("the installed sgl-kernel-npu rounds in split_qkv_rmsnorm_rope what this project keeps in fp32: upgrade it")
    q, k, v = function(
        input=input,
        sin=sin,
        cos=cos,
        q_hidden_size=q_hidden_size,
        kv_hidden_size=kv_hidden_size,
        head_dim=head_dim,
        eps=eps,
        q_weight=q_weight,
        k_weight=k_weight,
        q_bias=q_bias,
        k_bias=k_bias,
        is_neox_style=is_neox_style,
    )
    return q, k, v
