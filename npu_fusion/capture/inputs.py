"""Inputs of a captured graph: which lie where they are, which are copied in, and which make another capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .. import torch_private
from .check import written_inputs
from .host_lists import HostLists

Part = Callable[[Sequence[Any]], Any]


class Inputs:
    """What a graph takes, sorted by what a capture does with it.

    - Parameters, buffers and inputs that the graph writes (KV caches) are used where they lie; another address is another capture.
    - All other tensors are copied into buffers of the capture before a replay; only their sizes matter.
    - Numbers, also those in 0-d tensors on the host, are part of the launches; another value is another capture. The exception are numbers
      that end up in host lists only.

    The key of a capture holds no more than that: it is computed for each call. What Dynamo guards (the sizes of a graph compiled for fixed
    sizes) is left out.
    """

    def __init__(self, gm: GraphModule, lists: HostLists) -> None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        written = written_inputs(gm)
        static = set(torch_private.static_input_indices())
        self.in_place: list[int] = []
        self.copied: list[int] = []
        self._parts: list[Part] = []
        for i, node in enumerate(placeholders):
            val = node.meta.get("val")
            if not isinstance(val, Tensor):
                if node not in lists.free:
                    self._parts.append(_value_of(i))
            elif val.device.type == "cpu":
                if node.users:
                    self._parts.append(_number_in(i))
            else:
                here = node in written or i in static or torch_private.STATIC_INPUT in node.meta
                (self.in_place if here else self.copied).append(i)
                if _varies(val):
                    self._parts.append(_layout_of(i))

    def key(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """What a capture depends on."""
        addresses = tuple([arguments[i].data_ptr() for i in self.in_place])
        return (addresses, *[part(arguments) for part in self._parts])


def _varies(val: Tensor) -> bool:
    return any(isinstance(size, torch.SymInt) for size in (*val.shape, *val.stride()))


def _value_of(i: int) -> Part:
    return lambda arguments: (type(arguments[i]), arguments[i])


def _number_in(i: int) -> Part:
    return lambda arguments: arguments[i].item()


def _layout_of(i: int) -> Part:
    return lambda arguments: (arguments[i].shape, arguments[i].stride())


def buffer_like(tensor: Tensor) -> Tensor:
    """Memory for a tensor of the same sizes and strides, its contents those of `tensor`."""
    buffer = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    fill(buffer, tensor)
    return buffer


def fill(buffer: Tensor, source: Tensor) -> None:
    """Copy into a buffer that `buffer_like` made; expanded dimensions hold one element, which is copied once."""
    if 0 in buffer.stride():
        buffer, source = _unexpanded(buffer), _unexpanded(source)
    buffer.copy_(source)


def _unexpanded(tensor: Tensor) -> Tensor:
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
