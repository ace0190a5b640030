"""A device for tests that captures and replays on the CPU, with real numbers.

It has the interface that `torch.cuda` and `torch.npu` share. Under capture nothing is computed: results hold NaN, and nothing is written. A
replay runs what was recorded on the memory that it was recorded with, as a device does, and updates of task groups change it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from npu_fusion import torch_private
from npu_fusion.aot import trace
from npu_fusion.capture.device import GraphDevice
from npu_fusion.capture.replay import Replayer
from npu_fusion.config import FusionConfig
from npu_fusion.execute import eager
from npu_fusion.record import GraphRecord


@dataclass
class Launch:
    """One recorded call: what it runs on, and where its results lie."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any

    def run(self) -> None:
        results = self.op(*self.args, **self.kwargs)
        if not self.op._schema.is_mutable:
            for into, value in zip(pytree.tree_leaves(self.results), pytree.tree_leaves(results), strict=True):
                if isinstance(into, Tensor):
                    into.copy_(value)


class RecordedGraph:
    """A captured graph."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.module: RecordingModule | None = None
        self.waits_for = 0

    def replay(self) -> None:
        assert self.module is not None
        self.module.log.append("replay")
        with torch.no_grad():
            if any(group.graph is self for group in self.module.groups):
                self.module.started = self  # it runs when its events are recorded
            else:
                self.run()

    def run(self) -> None:
        for launch in self.launches:
            launch.run()


@dataclass
class Group:
    """A task group: the launches of a graph between two places."""

    graph: RecordedGraph
    start: int
    end: int = 0


def unowned(tensor: Tensor) -> Tensor:
    """A tensor over the memory of another, which does not keep it alive."""
    storage = tensor.untyped_storage()
    if tensor.dim() == 0 and tensor.dtype == torch.float64:
        return tensor.clone()  # a scalar of the host goes to a launch by value
    if not storage.nbytes():
        return tensor
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8)[: storage.nbytes() // tensor.element_size() * tensor.element_size()]
    return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Recording(TorchDispatchMode):
    def __init__(self, module: RecordingModule, graph: RecordedGraph) -> None:
        super().__init__()
        self.module = module
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.is_meta:
                return func(*args, **kwargs)
        if self.module.refuses is not None and self.module.refuses(func):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}\nsecond line")
        if func._schema.is_mutable:
            results = pytree.tree_leaves(kwargs["out"] if "out" in kwargs else args[0])
            results = results[0] if len(results) == 1 else tuple(results)
        else:
            results = func(*args, **kwargs)
            if not any(argument.alias_info is not None for argument in func._schema.arguments):
                for result in pytree.tree_leaves(results):
                    if isinstance(result, Tensor) and result.is_floating_point():
                        result.fill_(float("nan"))
            else:
                return results
        args, kwargs = pytree.tree_map_only(Tensor, unowned, (args, kwargs))
        kept = pytree.tree_map_only(Tensor, unowned, results) if func._schema.is_mutable else results
        self.graph.launches.append(Launch(func, args, kwargs, kept))
        return results


class _Updating(TorchDispatchMode):
    """Replaces the arguments of a group's launch by those of the call made under it."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        (launch,) = self.group.graph.launches[self.group.start : self.group.end]
        assert launch.op is func
        launch.args, launch.kwargs = args, kwargs or {}
        return launch.results


class Stream:
    def __init__(self, module: RecordingModule, name: str = "side") -> None:
        self.module = module
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self.module.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.module.log.append("wait for event")


class Event:
    """Of an external event: a graph that waits for it runs once all its events are recorded."""

    def __init__(self, module: RecordingModule) -> None:
        self.module = module
        self.graph: RecordedGraph | None = None

    def wait(self, stream: Stream) -> None:
        assert self.module.recording is not None, "an external event is waited for under capture"
        self.graph = self.module.recording
        self.graph.waits_for += 1

    def reset(self, stream: Stream) -> None:
        assert self.graph is not None

    def record(self, stream: Stream) -> None:
        if self.graph is not None:
            self.module.recorded(self.graph)


@dataclass
class RecordingModule:
    """`torch.npu`, or with `task_groups=False` `torch.cuda`.

    Attributes:
        refuses: which ops cannot be captured.
        log: what happened.
        foreign: whether somebody else captures.
        opened: how many pools were made.
    """

    task_groups: bool = False
    refuses: Callable[[Any], bool] | None = None
    log: list[str] = field(default_factory=list)
    foreign: bool = False
    opened: int = 0
    pools: list[Any] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    recording: RecordedGraph | None = None
    started: RecordedGraph | None = None

    def __post_init__(self) -> None:
        self.stream_now = Stream(self, "main")
        self._recorded = 0
        if self.task_groups:
            for name in ("graph_task_group_begin", "graph_task_group_end", "graph_task_update_begin", "graph_task_update_end"):
                setattr(self, name, getattr(self, f"_{name}"))

    CUDAGraph = RecordedGraph

    def Stream(self, device: Any = None) -> Stream:
        return Stream(self)

    def Event(self) -> Event:
        return Event(self)

    ExternalEvent = Event

    def current_stream(self) -> Stream:
        return self.stream_now

    def set_stream(self, stream: Stream) -> None:
        self.stream_now = stream

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream
        yield
        self.stream_now = before

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def is_current_stream_capturing(self) -> bool:
        return self.foreign

    def graph_pool_handle(self) -> int:
        self.opened += 1
        return self.opened

    @contextlib.contextmanager
    def graph(
        self, graph: RecordedGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """As the real ones: where the capture fails, the stream stays what it was under capture."""
        self.log.append("capture")
        self.pools.append(pool)
        graph.module = self
        self.recording = graph
        before, self.stream_now = self.stream_now, stream
        try:
            with _Recording(self, graph), torch.no_grad():
                yield
            self.stream_now = before
        except RuntimeError:
            raise RuntimeError("the capture was invalidated") from None
        finally:
            self.recording = None

    def recorded(self, graph: RecordedGraph) -> None:
        """An event of a graph that was started is recorded: it runs once all are."""
        assert self.started is graph
        self._recorded += 1
        if self._recorded == graph.waits_for:
            self._recorded, self.started = 0, None
            graph.run()

    def _graph_task_group_begin(self, stream: Stream) -> None:
        assert self.recording is not None
        self.groups.append(Group(self.recording, len(self.recording.launches)))

    def _graph_task_group_end(self, stream: Stream) -> Group:
        assert self.recording is not None
        self.groups[-1].end = len(self.recording.launches)
        return self.groups[-1]

    def _graph_task_update_begin(self, stream: Stream, group: Group) -> None:
        self.log.append("update")
        self._mode = _Updating(group)
        self._mode.__enter__()

    def _graph_task_update_end(self, stream: Stream) -> None:
        self._mode.__exit__(None, None, None)


class RecordingDevice(GraphDevice):
    def unowned(self, tensor: Tensor) -> Tensor:
        return unowned(tensor)


def recording_device(**options: Any) -> GraphDevice:
    """A device that captures on the CPU."""
    return RecordingDevice(torch.device("cpu"), RecordingModule(**options))


def record_for(**options: Any) -> GraphRecord:
    return GraphRecord(FusionConfig(target="cuda", executor="graph", **options))


@dataclass
class Captured:
    """A function compiled to be captured on a recording device.

    Attributes:
        run: the compiled function.
        device: the device.
        records: of its graphs.
        replayers: of its graphs.
    """

    run: Callable[..., Any]
    device: GraphDevice
    records: list[GraphRecord] = field(default_factory=list)
    replayers: list[Replayer] = field(default_factory=list)

    @property
    def log(self) -> list[str]:
        log: list[str] = self.device.module.log
        return log

    @property
    def record(self) -> GraphRecord:
        (record,) = self.records
        return record

    @property
    def replayer(self) -> Replayer:
        (replayer,) = self.replayers
        return replayer


def captured(fn: Any, device: GraphDevice, monkeypatch: Any, *, dynamic: bool = False, **options: Any) -> Captured:
    """Compile a function; its graphs say that they are of a device that can capture, and run on the CPU."""
    monkeypatch.setattr("npu_fusion.capture.replay.graph_device", lambda _: device)
    found = Captured(fn, device)

    def compile_graph(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.records.append(record_for(**options))
        found.replayers.append(Replayer(eager(gm), labelled(gm), found.records[-1]))
        return boxed(found.replayers[-1].__call__)

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return trace(gm, inputs, compile_graph, compile_graph, compile_graph)

    compiled = torch.compile(fn, backend=backend, dynamic=dynamic)

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return compiled(*args)

    found.run = run
    return found


def boxed(call: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    def run(inputs: list[Any]) -> Any:
        return call(inputs)

    return torch_private.boxed(run)


def labelled(gm: GraphModule, device: str = "cuda:0") -> GraphModule:
    """Let a graph's metadata say that its tensors are on another device, but for 0-d ones of float64."""
    mode = torch_private.fake_mode_of(gm)

    def moved(val: Any) -> Any:
        if not isinstance(val, Tensor) or (val.dim() == 0 and val.dtype == torch.float64):
            return val
        with mode:
            return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=device)

    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(moved, node.meta["val"])
    return gm
