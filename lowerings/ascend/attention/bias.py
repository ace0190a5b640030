"""Masks that are added to the logits, as Ascend's attention ops take them (`pse_shift`): finite, in the dtype of the query, in full.

What a row of -inf alone would do in the ops no document says, and the semantic op gives zeros there. A mask that may hold -inf is cut off
at the lowest finite number, which hides a key no less beside a visible one, and the rows that are all -inf are set to zero afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from ....lower import Builder
from ....masks import hides
from ....simplify import NUMBER
from ....view.shapes import same_shape, to_shape
from .layout import Operands
from .mask import once, rank4, repeated
from .rows import sees_a_key

aten = torch.ops.aten

_KEEPS_VALUES = frozenset(
    {
        aten.expand.default,
        aten.unsqueeze.default,
        aten.view.default,
        aten.reshape.default,
        aten.clone.default,
        aten.slice.Tensor,
        aten.transpose.int,
        aten.permute.default,
    }
)


@dataclass(frozen=True)
class Bias:
    """An additive mask.

    Attributes:
        values: [B or 1, N, Sq, Skv], contiguous and finite.
        hidden: bool, broadcastable to that: where it was -inf; None if it never is.
    """

    values: Node
    hidden: Node | None


def additive(b: Builder, mask: Node, operands: Operands) -> Bias:
    """An additive mask for operands of its dtype."""
    dtype = b.val(operands.query).dtype
    b.require(b.val(mask).dtype == dtype, f"it adds a mask of {dtype} to the logits, the model's is {b.val(mask).dtype}")
    values, hidden = rank4(b, once(b, mask)), None
    if not _is_finite(values):
        hidden = b.emit(aten.eq.Scalar, values, -math.inf)
        values = b.emit(aten.clamp_min.default, values, torch.finfo(dtype).min)
    batch = 1 if b.equal(b.val(values).shape[0], 1) else b.size(operands.query, 0)
    full = [batch, b.size(operands.query, 1), b.size(operands.query, 2), b.size(operands.key, 2)]
    return Bias(repeated(b, values, full), hidden)


def shown_by(b: Builder, mask: Node) -> Node | None:
    """The bool mask that says what an additive one does; None if there is none for certain.

    That is so for 0 where a key is visible and a number that leaves it no weight elsewhere, if every query sees a key: one that sees none
    would weigh all of them alike.
    """
    source = _behind_views(mask)
    if source.target is not aten.where.self:
        return None
    visible, kept, hidden = source.args
    number = _number(hidden)
    if _number(kept) != 0 or number is None or not hides(number, b.val(mask).dtype):
        return None
    assert isinstance(visible, Node)
    if not same_shape(to_shape(b.val(visible).shape), to_shape(b.val(source).shape)) or not sees_a_key(b, visible):
        return None
    return visible if source is once(b, mask) else None


def _behind_views(node: Node) -> Node:
    while node.target in _KEEPS_VALUES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_finite(node: Node) -> bool:
    """Whether a tensor holds finite numbers for certain: a choice between numbers."""
    node = _behind_views(node)
    if node.target is aten.where.self:
        return all(_is_finite_number(side) for side in node.args[1:])
    if node.target is aten.masked_fill.Scalar:
        return _is_finite_number(node.args[0]) and _is_finite_number(node.args[2])
    return _is_finite_number(node)


def _is_finite_number(value: object) -> bool:
    number = _number(value)
    return number is not None and math.isfinite(number)


def _number(value: object) -> float | None:
    """The number that a tensor holds at every index, rounded to its dtype; None if that is not known."""
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        return value.meta.get(NUMBER)
    if value.target in (aten.zeros.default, aten.zeros_like.default):
        return 0.0
    if value.target not in (aten.full.default, aten.full_like.default, aten.scalar_tensor.default):
        return None
    number, dtype = value.args[0 if value.target is aten.scalar_tensor.default else 1], value.meta["val"].dtype
    if not isinstance(number, (int, float)):
        return None
    fits = not dtype.is_floating_point or abs(number) <= torch.finfo(dtype).max
    return float(number) if fits else math.copysign(math.inf, number)
