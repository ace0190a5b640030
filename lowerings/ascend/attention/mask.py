"""Which keys a query sees, in the words of Ascend's attention ops.

The ops take a bool mask whose True *hides*, or a structure (`sparse_mode`) beside one compressed triangle of 2048 x 2048 that serves every
length. Where a model's structure is provably one of theirs, all layers share that constant; otherwise the mask is a tensor, made once for
all layers that have the same.

A query that sees no key gets zeros from the semantic op. The ops give zeros only where they are told to look for such rows, and with one
query not even then: `Masking.hides_rows` says where a row may be hidden as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from ....lower import Builder
from ....view.shapes import known_equal, known_ge
from ....view.value import Dim
from .layout import dim_of
from .rows import sees_a_key

aten = torch.ops.aten

DEFAULT_MASK, LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL, BAND = 0, 2, 3, 4  # values of `sparse_mode`
ALL_TOKENS = 2147483647
COMPRESSED = 2048


@dataclass(frozen=True)
class Structure:
    """Key j is visible to query i if `j <= i + offset` (where `is_causal`) and `j > i + offset - window` (where window > 0).

    Attributes:
        queries, keys: how many there are.
        is_causal, offset, window: see above. All numbers are ints or nodes that hold them.
    """

    queries: Any
    keys: Any
    is_causal: bool = False
    offset: Any = 0
    window: Any = 0

    @property
    def binds(self) -> bool:
        """Whether a key may be hidden at all."""
        return self.causal_binds or self.window_binds

    @property
    def causal_binds(self) -> bool:
        """Whether causality may hide a key: the first query sees the fewest."""
        return self.is_causal and not known_ge(dim_of(self.offset), dim_of(self.keys) - 1)

    @property
    def window_binds(self) -> bool:
        """Whether the window may hide a key: the last query has lost the most."""
        window = dim_of(self.window)
        return not known_equal(window, 0) and not known_ge(window, dim_of(self.queries) + dim_of(self.offset))

    @property
    def shift(self) -> Dim:
        """How far the diagonal lies right of the one that ends in the lower right corner."""
        return dim_of(self.offset) - (dim_of(self.keys) - dim_of(self.queries))

    def mode(self) -> tuple[int, int, int] | None:
        """`sparse_mode`, `pre_tokens` and `next_tokens` that say the same, with the compressed mask; None if none do."""
        if not self.window_binds:
            if known_equal(self.shift, 0):
                return RIGHT_DOWN_CAUSAL, ALL_TOKENS, ALL_TOKENS
            if known_equal(dim_of(self.offset), 0):
                return LEFT_UP_CAUSAL, ALL_TOKENS, ALL_TOKENS
        shift = _known_int(self.shift)
        window = dim_of(self.window)
        if shift is None or not isinstance(window, int):
            return None
        before = window - 1 - shift if self.window_binds else ALL_TOKENS
        after = shift if self.causal_binds else ALL_TOKENS
        return (BAND, before, after) if before >= 0 and after >= 0 else None

    @property
    def hides_rows(self) -> bool:
        """Whether a query may see no key: the first one for causality, the last one for the window."""
        offset, window = dim_of(self.offset), dim_of(self.window)
        first_sees = not self.causal_binds or known_ge(offset, 0)
        last_sees = not self.window_binds or known_ge(dim_of(self.keys) + window, dim_of(self.queries) + offset + 1)
        return not (first_sees and last_sees)


def _known_int(size: Dim) -> int | None:
    """An expression that is a number for certain."""
    number = sympy.expand(size)
    return int(number) if number.is_Integer else None


@dataclass(frozen=True)
class Masking:
    """The arguments of an op that say which keys are hidden.

    Attributes:
        hidden: bool, True hides: [B or 1, N or 1, Sq or 1, Skv], or the compressed triangle where `sparse_mode` is not 0; None hides none.
        sparse_mode, pre_tokens, next_tokens: as the ops have them.
        hides_rows: a query may see no key at all.
    """

    hidden: Node | None = None
    sparse_mode: int = DEFAULT_MASK
    pre_tokens: int = ALL_TOKENS
    next_tokens: int = ALL_TOKENS
    hides_rows: bool = False

    def sparse(self) -> dict[str, int]:
        """The arguments beside the mask, where they are not the defaults."""
        given = {"sparse_mode": self.sparse_mode, "pre_tokens": self.pre_tokens, "next_tokens": self.next_tokens}
        return {name: value for name, value in given.items() if value != getattr(Masking, name)}


def structural(b: Builder, structure: Structure, device: torch.device) -> Masking | None:
    """The masking of a structure without a tensor of its own; None if the ops have none for it."""
    if not structure.binds:
        return Masking()
    mode = structure.mode()
    if mode is None:
        return None
    return Masking(_compressed(b, device), *mode, structure.hides_rows)


def _compressed(b: Builder, device: torch.device) -> Node:
    """The mask that all structured modes take: what lies above the diagonal of a square is hidden."""
    return b.constant(
        ("compressed attention mask", device),
        lambda: torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu(1),
    )


def explicit(b: Builder, structure: Structure, visible: Node | None, lengths: Node | None, device: torch.device) -> Masking:
    """The masking as a tensor: it hides what a mask does not show, what the structure hides, and keys at or past the lengths [B]."""
    parts = []
    if visible is not None:
        parts.append(_inverse(b, visible))
    if structure.binds:
        parts.append(_hidden_by_structure(b, structure, device))
    if lengths is not None:
        parts.append(past_lengths(b, structure.keys, lengths))
    if not parts:
        return Masking()
    sees = visible is None or sees_a_key(b, visible)
    alone = len(parts) == 1 and lengths is None
    return Masking(_any_of(b, parts), hides_rows=not (sees and alone and not structure.hides_rows))


def _any_of(b: Builder, parts: Sequence[Node]) -> Node:
    hidden = rank4(b, parts[0])
    for part in parts[1:]:
        hidden = b.emit(aten.logical_or.default, hidden, rank4(b, part))
    return hidden


def rank4(b: Builder, mask: Node) -> Node:
    shape = [b.size(mask, dim) for dim in range(b.val(mask).dim())]
    return b.reshape(mask, [1] * (4 - len(shape)) + shape)


def _inverse(b: Builder, visible: Node) -> Node:
    """What `visible` does not show, without the dimensions along which it is repeated."""
    source = once(b, visible)
    if source.target in (aten.logical_not.default, aten.bitwise_not.default):
        return once(b, source.args[0])  # type: ignore[arg-type]
    return b.emit(aten.logical_not.default, source)


def once(b: Builder, mask: Node) -> Node:
    """A mask before it is expanded to more dimensions of the same rank."""
    while mask.target is aten.expand.default:
        source = mask.args[0]
        if not isinstance(source, Node) or b.val(source).dim() != b.val(mask).dim():
            break
        mask = source
    return mask


def _hidden_by_structure(b: Builder, structure: Structure, device: torch.device) -> Node:
    """[Sq, Skv]"""
    keys = _range(b, structure.keys, device)
    last = b.emit(aten.unsqueeze.default, _range(b, structure.queries, device), 1)
    if structure.offset != 0:
        last = b.emit(aten.add.Tensor, last, structure.offset)
    if not structure.window_binds:
        return b.emit(aten.gt.Tensor, keys, last)
    before = b.emit(aten.le.Tensor, keys, b.emit(aten.sub.Tensor, last, structure.window))
    return b.emit(aten.logical_or.default, b.emit(aten.gt.Tensor, keys, last), before) if structure.causal_binds else before


def past_lengths(b: Builder, keys: Any, lengths: Node) -> Node:
    """[B, 1, 1, Skv]: whether a key lies at or past its row's length."""
    column = b.reshape(lengths, [b.size(lengths, 0), 1, 1, 1])
    return b.emit(aten.ge.Tensor, _range(b, keys, b.val(lengths).device), column)


def _range(b: Builder, size: Any, device: torch.device) -> Node:
    return b.emit(aten.arange.default, size, device=device)


def repeated(b: Builder, mask: Node, shape: Sequence[Any]) -> Node:
    """A mask or bias of rank 4 in full: contiguous, of the given sizes (ints or nodes)."""
    if all(b.equal(have, want) for have, want in zip(b.val(mask).shape, shape, strict=True)):
        return b.contiguous(mask)
    if mask.target is aten.logical_not.default:  # of what is repeated already: the inverse is in full, and needs no copy
        return b.contiguous(b.emit(aten.logical_not.default, b.emit(aten.expand.default, mask.args[0], list(shape))))
    return b.contiguous(b.emit(aten.expand.default, mask, list(shape)))


def zero_hidden_rows(b: Builder, result: Node, hidden: Node) -> Node:
    """The result [B, N, Sq, Dv] with zeros for queries from which the mask hides every key."""
    return b.emit(aten.masked_fill.Scalar, result, b.emit(aten.all.dim, hidden, -1, True), 0.0)
