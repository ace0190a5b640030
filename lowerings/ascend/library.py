"""Makes the ops of the table exist as `torch.ops.npu.*`.

Where torch_npu is installed its own schemas are used. Elsewhere the ops are defined from the table's schema lines, with our fake kernels,
so that a graph can be compiled for an Ascend target that is not here. The two do not mix: torch_npu, imported after somebody else defined
its schemas, ends the process. So it is imported first, wherever it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache

import torch
from torch._ops import OpOverload

from ...errors import NpuFusionError
from .table import AscendOp, ascend_ops

log = logging.getLogger(__name__)

PACKAGES = {"npu": "torch_npu", "atb": "torch_npu", "npu_fusion_sgl": "sgl-kernel-npu"}
"""Namespace of ops to the package that brings them."""
_TORCH_NPU = tuple(namespace for namespace, package in PACKAGES.items() if package == "torch_npu")
_DEFINITIONS: list[torch.library.Library] = []


class AscendLibraryError(NpuFusionError):
    """The ops of torch_npu cannot be had here."""


@cache
def has_torch_npu() -> bool:
    """Whether torch_npu is installed; it is then imported.

    Raises:
        AscendLibraryError: it is installed but cannot be imported, as where CANN is not set up.
    """
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:
        raise AscendLibraryError(
            f"torch_npu is installed but cannot be imported ({error}): set up CANN (source its set_env.sh), or uninstall torch_npu"
        ) from error
    return True


@cache
def define_ops() -> frozenset[str]:
    """Define the ops of the table that no library here has; their qualified names. Done once a process."""
    installed = has_torch_npu()
    libraries: dict[str, torch.library.Library] = {}
    defined: set[str] = set()
    for name, op in ascend_ops().items():
        if _exists(op) or (installed and op.namespace in _TORCH_NPU):
            continue  # an op that the installed torch_npu lacks is absent, whatever the table knows of it
        library = libraries.setdefault(op.namespace, torch.library.Library(op.namespace, "FRAGMENT"))
        library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        defined.add(name)
    _DEFINITIONS.extend(libraries.values())
    return frozenset(defined)


def prepare(*, emulate: bool = False) -> None:
    """Make the ops of the table callable in a graph: defined, with fake kernels, and with CPU kernels where `emulate`."""
    if define_ops() or emulate:
        importlib.import_module(f"{__package__}.emulation")


def package_of(op: AscendOp) -> str:
    """The package that brings an op."""
    return PACKAGES[op.namespace]


def overload_of(op: AscendOp) -> OpOverload | None:
    """The torch operator of a row of the table, or None where it does not exist here."""
    if not _exists(op):
        return None
    overload: OpOverload = getattr(getattr(getattr(torch.ops, op.namespace), op.opname), op.overload)
    return overload


def _exists(op: AscendOp) -> bool:
    packet = getattr(getattr(torch.ops, op.namespace), op.opname, None)
    return packet is not None and op.overload in packet.overloads()
