"""What providers of quantising ops ask of a semantic call, on any target: roles of scales, forms of biases, where rounding matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..lower import Arguments, Builder

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def is_exact(b: Builder) -> bool:
    return b.config.rounding == "exact"


def require_fp32(b: Builder, what: str, *dtypes: torch.dtype | None) -> None:
    """With exact rounding: the model computes in fp32, as the kernels do."""
    other = next((dtype for dtype in dtypes if dtype not in (None, torch.float32)), None)
    b.require(not is_exact(b) or other is None, f"the model computes {what} in {other}, the kernel in fp32: rounding is 'exact'")


def ones_but_last(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) and size == 1 for size in sizes[:-1])


def channels(b: Builder, name: str, node: Node | None, width: Any) -> Node | None:
    """A scale, zero point or bias of the channels, or of all, as the kernels read it: [H], [1] or []."""
    if node is None:
        return None
    sizes = b.val(node).shape
    b.require(ones_but_last(sizes), f"{name} differs from row to row")
    b.require(len(sizes) == 0 or sizes[-1] == 1 or b.equal(sizes[-1], width), f"{name} is not one a channel")
    return b.reshape(node, [sizes[-1]]) if len(sizes) > 1 else node


def is_of_rows(val: Tensor, rows: Sequence[Any]) -> bool:
    """Whether a tensor has one number for each row: [..., 1]."""
    return val.dim() == len(rows) + 1 and val.shape[-1] == 1 and all(bool(a == b) for a, b in zip(map(str, val.shape), map(str, rows)))


@dataclass(frozen=True)
class Roles:
    """Scales by what they go along: rows [...], and channels [N] or one."""

    rows: Node | None
    channels: Node | None


def roles_of(b: Builder, scales: Sequence[Node | None], rows: Sequence[Any], width: Any) -> Roles:
    """What the scales of a product go along. Of a single row both may be one number: the first such is the row's."""
    given = [scale for scale in scales if scale is not None]
    for scale in given:
        b.require(b.val(scale).dtype in FLOATS, f"scale is {b.val(scale).dtype}")
    along_rows = [scale for scale in given if rows and is_of_rows(b.val(scale), rows)]
    many = [scale for scale in along_rows if not ones_but_last(b.val(scale).shape)]
    one = many[0] if many else along_rows[0] if along_rows and len(given) > 1 else None
    rest = list(given)
    if one is not None:
        rest.remove(one)  # once: a model may multiply by one scale twice
    b.require(len(rest) < 2, "both scales are of the channels")
    of_channels = channels(b, "scale", rest[0], width) if rest else None
    return Roles(None if one is None else b.reshape(one, [b.size(one, dim) for dim in range(b.val(one).dim() - 1)]), of_channels)


def scaling(b: Builder, a: Arguments, prefix: str = "") -> None:
    """What the kernels demand of scales: one product after another in fp32."""
    compute, first = getattr(a, f"{prefix}compute_dtype"), getattr(a, f"{prefix}round_dtype")
    combined = getattr(a, f"{prefix}combined")
    b.require(compute != torch.float64, "the model multiplies in float64")
    require_fp32(b, "the products", compute, first)
    two = getattr(a, "scale2" if not prefix else "sum_scale2") is not None
    b.require(not is_exact(b) or not (two or combined), "the kernel multiplies by two scales in an order of its own: rounding is 'exact'")


def bias_of_channels(b: Builder, node: Node | None, width: Any) -> Node | None:
    bias = channels(b, "bias", node, width)
    b.require(bias is None or (b.val(bias).dim() == 1 and b.equal(b.val(bias).shape[0], width)), "the bias is not one a channel")
    return bias


def rows_of(b: Builder, x: Node) -> list[Any]:
    return [b.size(x, dim) for dim in range(b.val(x).dim() - 1)]


def scales_of(b: Builder, a: Arguments, x: Node, scale: Node) -> Node:
    """The scales [..., 1] as the model has them."""
    sizes = [b.size(x, dim) for dim in range(b.val(x).dim() - 1)]
    dtype = a.scale_dtype or a.compute_dtype or b.val(x).dtype
    return b.cast(b.reshape(scale, [*sizes, 1]), dtype)
