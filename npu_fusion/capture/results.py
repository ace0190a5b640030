"""Results of a captured graph: copied out of memory that the next replay overwrites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .inputs import buffer_like

Make = Callable[[Sequence[Any]], Any]


class Results:
    """Makes the results of each replay.

    A result that is an input of the graph, or a view of one that lies in place, is returned as such; the others are copied. Results that
    are views of one memory are views of one copy.

    Args:
        results: what the captured run returned, in the graph's memory.
        captured: the inputs that it ran with.
        in_place: places of the inputs that lie where the caller has them.
    """

    def __init__(self, results: Sequence[Any], captured: Sequence[Any], in_place: Sequence[int]) -> None:
        self._results = list(results)
        self._makers: dict[int, Make] = {}
        self._together: dict[int, list[int]] = {}
        inputs = {id(value): place for place, value in enumerate(captured) if isinstance(value, Tensor)}
        lying = {_storage(captured[place]): place for place in reversed(in_place)}
        for i, result in enumerate(results):
            if not isinstance(result, Tensor):
                continue
            if id(result) in inputs:
                self._makers[i] = _input(inputs[id(result)])
                self._results[i] = None
            elif result.numel() == 0:
                self._together[-i] = [i]
            elif _storage(result) in lying:
                place = lying[_storage(result)]
                self._makers[i] = _view_of_input(place, captured[place], result)
                self._results[i] = None
            else:
                self._together.setdefault(_storage(result), []).append(i)

    def make(self, arguments: Sequence[Any]) -> list[Any]:
        """The results of the replay that has just been started with these inputs."""
        made = list(self._results)
        for i, maker in self._makers.items():
            made[i] = maker(arguments)
        for places in self._together.values():
            copies = _copies([self._results[i] for i in places])
            for i, copy in zip(places, copies, strict=True):
                made[i] = copy
        return made


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _input(place: int) -> Make:
    return lambda arguments: arguments[place]


def _view_of_input(place: int, source: Tensor, result: Tensor) -> Make:
    """A view of an input that lies in place: it has the address that it had under capture."""
    shape, stride, dtype = result.shape, result.stride(), result.dtype
    offset = (result.data_ptr() - source.data_ptr()) // result.element_size()

    def view(arguments: Sequence[Any]) -> Tensor:
        base = arguments[place]
        base = base if base.dtype == dtype else base.view(dtype)
        viewed: Tensor = base.as_strided(shape, stride, base.storage_offset() + offset)
        return viewed

    return view


def _copies(results: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors that lie in one memory, as they do."""
    if len(results) == 1:
        return [buffer_like(results[0])]
    first = results[0]
    elements = first.untyped_storage().nbytes() // first.element_size()
    copy = first.as_strided((elements,), (1,), 0).clone()
    return [_typed(copy, result.dtype).as_strided(result.shape, result.stride(), result.storage_offset()) for result in results]


def _typed(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole numbers of elements of another dtype in a flat tensor."""
    if flat.dtype == dtype:
        return flat
    taken = flat.numel() * flat.element_size() // dtype.itemsize * dtype.itemsize
    return flat.view(torch.uint8)[:taken].view(dtype)
