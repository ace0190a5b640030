"""What the checks of arguments share. They run in an op and in its fake kernel, add no guard, and say what is wrong and what would do.

A row of a matrix is addressed by a 64-bit offset, what lies within one by 32 bits: a single row, or a vector, has fewer than 2^31 elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...ops._common import check_type, check_value
from .define import KINDS

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)
LIMIT_32 = 2**31
_FARTHEST = LIMIT_32 // 4096  # elements between rows, of which a tile has at most 4096
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}
"""dtypes to their names in a kernel's signature."""


def name_of(dtype: torch.dtype | None) -> str | None:
    """A dtype's name in a kernel's signature; None for None and for fp32, to which nothing needs to be rounded in between."""
    return None if dtype in (None, torch.float32) else NAMES[dtype]


def check_dtypes(op: str, known: Sequence[torch.dtype], **tensors: Tensor | None) -> None:
    """Raise TypeError unless every given tensor has one of the dtypes."""
    for name, tensor in tensors.items():
        if tensor is not None:
            shown = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
            check_type(op, tensor.dtype in known, f"{name} must be one of {shown}, not {tensor.dtype}")


def check_together(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors lie on one device of a kind that runs Triton kernels."""
    devices = {tensor.device for tensor in tensors.values() if tensor is not None}
    check_value(op, len(devices) == 1, f"{', '.join(tensors)} must lie on one device, not {', '.join(sorted(map(str, devices)))}")
    kind = devices.pop().type
    check_value(op, kind in KINDS or kind == "meta", f"there are no kernels for {kind} tensors, only for {', '.join(KINDS)}")


def check_row_length(op: str, name: str, elements: Any) -> None:
    """Raise ValueError if a row, or a vector, is known to be too long to be addressed by 32 bits."""
    check_value(op, not statically_known_true(elements >= LIMIT_32), f"a row of {name} has {elements} elements, of which 2^31 - 1 fit")


def check_row_count(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError if a tensor [..., H] is known to have too many rows to be counted by 32 bits."""
    rows = math.prod(x.shape[:-1])
    check_value(op, not statically_known_true(rows >= LIMIT_32), f"{name} has {rows} rows, of which 2^31 - 1 fit")


def check_cores(op: str, cores: int) -> None:
    check_value(op, cores > 0, f"cores must be positive: {cores}")


def as_rows(x: Tensor, width: int | None = None) -> Tensor:
    """A tensor [..., H] as [rows, `width`] (H) whose rows lie evenly apart, each in one piece: a view where it lies so, else a copy.

    Rows that lie so far apart that a tile of them is not addressed by 32 bits are copied too.
    """
    rows = x.reshape(-1, x.shape[-1] if width is None else width)
    whole = rows.shape[-1] <= 1 or rows.stride(-1) == 1
    return rows if whole and (rows.stride(0) <= _FARTHEST or rows.shape[0] == 1) else rows.contiguous()


def as_vector(x: Tensor | None) -> Tensor | None:
    """A vector whose elements lie in one piece: itself where they do, else a copy; None for None."""
    return None if x is None else x.contiguous()
