"""Small integer buffers of a model whose numbers a rule has to know: tables of shifts, the group of each input (`g_idx`).

A rule that needs such numbers reads them when its graph is compiled. What was read is an assumption of the graph: at every call the buffers
must be the ones that were read, unchanged as far as PyTorch counts writes; where they are not, their numbers are compared. A call whose
numbers are other ones runs the graph as the model wrote it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from . import torch_private

Boxed = Callable[[list[Any]], Any]

OFFER = "npu_fusion_offer"
MOST_ELEMENTS = 1 << 16
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(eq=False)
class Offer:
    """A buffer that may be read: its position among the graph's inputs, the tensor, and once read what it held, on the CPU."""

    position: int
    buffer: Tensor | None
    held: Tensor | None = None

    def read(self) -> Tensor | None:
        """What the buffer holds; None where it was not read before the offer ended."""
        if self.held is None and self.buffer is not None:
            with torch_private.without_fake(), torch.no_grad():
                self.held = self.buffer.detach().cpu().clone()
        return self.held

    def close(self) -> None:
        """End the offer, which so keeps no buffer alive."""
        self.buffer = None


def offer(gm: GraphModule, real_inputs: Sequence[Any]) -> list[Offer]:
    """Let rules read the small integer buffers of a graph, by `Offer` in the `meta` of their placeholders."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    static = set(torch_private.static_input_indices())
    offers = []
    for position, (node, real) in enumerate(zip(placeholders, real_inputs, strict=False)):
        if position in static and _is_readable(real) and not _is_written(node):
            offers.append(Offer(position, real))
            node.meta[OFFER] = offers[-1]
    return offers


def _is_readable(real: Any) -> bool:
    if not isinstance(real, Tensor) or real.dtype not in _INTEGERS or torch_private.has_no_memory(real):
        return False
    return type(real) in (Tensor, torch.nn.Parameter) and 0 < real.numel() <= MOST_ELEMENTS


def _is_written(node: Node) -> bool:
    return any(isinstance(user.target, OpOverload) and user.target._schema.is_mutable for user in node.users)


class Assumptions:
    """What a graph assumes of its buffers.

    Args:
        offers: the buffers that were read.
    """

    def __init__(self, offers: Sequence[Offer]) -> None:
        self._held = [(offer.position, offer.held) for offer in offers if offer.held is not None]
        self._seen: list[Any] = [None] * len(self._held)

    def hold(self, inputs: Sequence[Any]) -> bool:
        """Whether the buffers among these inputs hold what was read."""
        for i, (position, held) in enumerate(self._held):
            buffer = inputs[position]
            seen = self._seen[i]
            if seen is not None and seen[0]() is buffer and seen[1] == _state(buffer):
                continue
            if buffer.shape != held.shape or not torch.equal(buffer.detach().cpu(), held):
                return False
            self._seen[i] = None if buffer.is_inference() else (weakref.ref(buffer), _state(buffer))
        return True

    def forget(self) -> None:
        """Compare the numbers anew at the next call."""
        self._seen = [None] * len(self._held)

    def guard(self, run: Boxed, otherwise: Callable[[], Boxed]) -> Boxed:
        """`run` where the assumptions hold, else what `otherwise` makes."""
        made: list[Boxed] = []

        def call(inputs: list[Any]) -> Any:
            if self.hold(inputs):
                return run(inputs)
            if not made:
                made.append(otherwise())
            return made[0](inputs)

        return torch_private.boxed(call)


def _state(buffer: Tensor) -> tuple[int, int] | None:
    return None if buffer.is_inference() else (buffer.data_ptr(), buffer._version)
