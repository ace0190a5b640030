"""What scales go along with: the rows of what they multiply, or its channels. Shared by the providers of quantising ops of all targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..lower import Builder

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Roles:
    """Scales by what they go along: rows [...], and channels [N] or one."""

    rows: Node | None
    channels: Node | None


def ones_but_last(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) and size == 1 for size in sizes[:-1])


def is_of_rows(val: Tensor, rows: Sequence[Any]) -> bool:
    """Whether a tensor has one number for each row: [..., 1]."""
    return val.dim() == len(rows) + 1 and val.shape[-1] == 1 and all(bool(a == b) for a, b in zip(map(str, val.shape), map(str, rows)))


def channels(b: Builder, name: str, node: Node | None, width: Any) -> Node | None:
    """A scale, zero point or bias of the channels, or of all, as the kernels read it: [H], [1] or []. Refuses any other."""
    if node is None:
        return None
    sizes = b.val(node).shape
    b.require(ones_but_last(sizes), f"{name} differs from row to row")
    b.require(len(sizes) == 0 or sizes[-1] == 1 or b.equal(sizes[-1], width), f"{name} is not one a channel")
    return b.reshape(node, [sizes[-1]]) if len(sizes) > 1 else node


def roles(b: Builder, scales: Sequence[Node | None], rows: Sequence[Any], width: Any) -> Roles:
    """Which of the scales of a product [rows..., width] is that of its rows, and which that of its channels. Refuses two of these."""
    of_rows: Node | None = None
    of_channels: Node | None = None
    for scale in scales:
        if scale is None:
            continue
        b.require(b.val(scale).dtype in _FLOATS, f"scale is {b.val(scale).dtype}")
        if of_rows is None and rows and is_of_rows(b.val(scale), rows) and not ones_but_last(b.val(scale).shape):
            of_rows = b.reshape(scale, [b.size(scale, dim) for dim in range(b.val(scale).dim() - 1)])
        else:
            b.require(of_channels is None, "both scales are of the channels")
            of_channels = channels(b, "scale", scale, width)
    return Roles(of_rows, of_channels)
