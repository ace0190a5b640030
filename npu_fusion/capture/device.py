"""The device that captures: what `torch.cuda` and `torch.npu` offer, and what all captures on one device share."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import torch_private

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Whether other threads may use the device meanwhile, e.g. a data loader's that pins memory. torch_npu launches from a thread of its own,
# which must be seen.
_ERROR_MODES = {"cuda": "thread_local", "npu": "global"}


@cache
def graph_device(device: torch.device) -> GraphDevice:
    """The one `GraphDevice` of a device."""
    return GraphDevice(device, torch.get_device_module(device))


class GraphDevice:
    """One device, and the memory that all captures on it share.

    Intermediate results of a capture are of no use after its replay, so that captures may lie in the same memory, if only one runs at a
    time and its results are copied out before the next one starts. `turn` sees to that.

    Args:
        device: the device.
        module: `torch.cuda` or `torch.npu`.
    """

    def __init__(self, device: torch.device, module: Any) -> None:
        self.device = device
        self.module = module
        self._lock = threading.RLock()
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._pool: Any = None
        self._last_stream: Any = None

    @cached_property
    def capture_stream(self) -> Any:
        """The stream of all captures: memory freed on one stream is not given out on another."""
        return self.module.Stream(device=self.device)

    @cached_property
    def update_stream(self) -> Any:
        """The stream on which captured launches are given new arguments while a graph runs."""
        return self.module.Stream(device=self.device)

    @property
    def has_task_groups(self) -> bool:
        """Whether the arguments of captured launches can be changed."""
        return hasattr(self.module, "graph_task_group_begin")

    def capturing(self) -> bool:
        """Whether somebody else captures on the current stream: launches then belong to him."""
        return bool(self.module.is_current_stream_capturing())

    @contextmanager
    def turn(self) -> Iterator[Any]:
        """The shared memory to oneself: other threads wait, and the current stream waits for the stream that had it last."""
        with self._lock, self.module.device(self.device):
            stream = self.module.current_stream()
            if self._last_stream is not None and self._last_stream != stream:
                stream.wait_stream(self._last_stream)
            self._last_stream = stream
            yield stream

    def capture(self, run: Callable[[], T]) -> tuple[Any, T]:
        """Run a function under capture: its launches are recorded, nothing is computed. Returns the graph and the function's result.

        Raises:
            RuntimeError: the device refuses what the function does.
        """
        graph, pool = self._new_graph(), self._shared_pool()
        stream = self.module.current_stream()
        mode = _ERROR_MODES.get(self.device.type, "global")
        try:
            with self.module.graph(graph, pool=pool, stream=self.capture_stream, capture_error_mode=mode):
                result = run()
        except BaseException:
            # A capture that fails leaves its stream current, and the allocator waiting for its end.
            self.module.set_stream(stream)
            torch_private.stop_filling_pool(self.device, pool)
            self._pool = None
            self._release_generators()
            raise
        self._graphs.add(graph)
        return graph, result

    def _release_generators(self) -> None:
        """End a failed capture for the random generators, which torch tells of the end of a capture only where it ended well."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a graph that is empty
            try:
                with self.module.graph(self._new_graph(), stream=self.capture_stream):
                    pass
            except RuntimeError as error:
                logger.warning("the device cannot capture any more", exc_info=error)

    def wait(self) -> None:
        """Wait until the device is idle: before memory of captures is given back."""
        with self.module.device(self.device):
            self.module.synchronize()

    def unowned(self, tensor: Tensor) -> Tensor:
        """A tensor over the same memory that does not keep it alive."""
        return torch_private.unowned_npu_tensor(tensor) if tensor.device.type == "npu" else tensor

    def _shared_pool(self) -> Any:
        """The pool of all graphs that live. Once all are gone the device forgets a pool, though something may still lie in it."""
        if self._pool is None or not self._graphs:
            self._pool = self.module.graph_pool_handle()
        return self._pool

    def _new_graph(self) -> Any:
        return self.module.NPUGraph() if hasattr(self.module, "NPUGraph") else self.module.CUDAGraph()
