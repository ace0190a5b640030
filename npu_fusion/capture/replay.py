"""The replayer: captures a graph when it meets new sizes or addresses, and replays it otherwise."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from .. import torch_private
from ..provenance import source_of
from ..record import GraphRecord
from .check import captured_device
from .device import GraphDevice, graph_device
from .host_lists import HostLists
from .inputs import Inputs, buffer_like, fill
from .results import Results
from .task_groups import TaskGroup, record_group, update_groups

logger = logging.getLogger(__name__)

Boxed = Callable[[list[Any]], Any]
_KEYS_REMEMBERED = 1024  # of keys that were met once


def capture(run: Boxed, gm: GraphModule, record: GraphRecord) -> Boxed:
    """A boxed function that captures `gm` when it meets new sizes or addresses, and replays it otherwise.

    - The first call with new sizes runs eagerly, which warms kernels up; the second one is captured. Sizes that come once, as those of
      prompts do, are not worth a capture.
    - Results are copied out of a capture, for the next replay overwrites them. A result that is an input, or a view of one that lies in
      place, is returned as such.
    - No capture keeps a cache alive. Captures of freed memory are dropped.
    - Beyond `capture_limit` captures, other sizes run eagerly.
    - Under somebody else's capture the graph runs eagerly, into that capture.
    - A graph that turns out not to be capturable runs eagerly from then on.

    The record's notes say when one of the last four keeps a graph from being replayed.

    Args:
        run: the boxed function that runs `gm` eagerly.
        gm: the lowered graph; `find_obstacles(gm)` is empty.
        record: the graph's record.
    """
    replayer = Replayer(run, gm, record)

    def call(inputs: list[Any]) -> Any:
        return replayer(inputs)

    return torch_private.boxed(call)


class Replayer:
    """What `capture` returns, and what it knows: the captures so far.

    Attributes:
        captures: by key; see `Inputs.key`.
        capturable: False once a capture has failed.
        updates: how many captured launches were given other host lists.
    """

    def __init__(self, run: Boxed, gm: GraphModule, record: GraphRecord) -> None:
        device = captured_device(gm)
        assert isinstance(device, torch.device), device
        self.run = run
        self.gm = gm
        self.record = record
        self.device = graph_device(device)
        self.lists = HostLists(gm, updatable=self.device.has_task_groups)
        self.inputs = Inputs(gm, self.lists)
        self.captures: dict[tuple[Any, ...], Capture] = {}
        self.capturable = True
        self.updates = 0
        self._met: set[tuple[Any, ...]] = set()
        self._limit_told = False
        for entry in self.lists.frozen:
            place = f"{entry.node.name} ({entry.node.target})"
            self._note(f"{place} is captured anew whenever its {entry.argument} changes: {entry.reason}", source_of(entry.node))

    def __call__(self, inputs: list[Any]) -> Any:
        if not self.capturable or self.device.capturing():
            return self.run(inputs)
        arguments = list(inputs)
        inputs.clear()
        with self.device.turn() as stream:
            key = self.inputs.key(arguments)
            known = self.captures.get(key)
            if known is None and self._is_due(key):
                known = self._capture(key, arguments)
            if known is None:
                return self.run(arguments)
            return self._replay(known, arguments, stream)

    def _is_due(self, key: tuple[Any, ...]) -> bool:
        """Whether a key that has no capture is met again, and there is room for its capture."""
        if key not in self._met:
            if len(self._met) >= _KEYS_REMEMBERED:
                self._met.clear()
            self._met.add(key)
            return False
        return self._has_room()

    def _replay(self, known: Capture, arguments: Sequence[Any], stream: Any) -> list[Any]:
        lists, numbers = self.lists.evaluate(arguments) if known.groups or self.lists.returned else ([], [])
        for place, buffer in known.buffers.items():
            fill(buffer, arguments[place])
        known.graph.replay()
        if known.groups:
            self.updates += update_groups(self.device, known.groups, lists, known.done)
            known.done = self.device.module.Event()
            known.done.record(stream)
        results = known.results.make(arguments)
        for (place, _), number in zip(self.lists.returned, numbers, strict=True):
            results[place] = number
        return results

    def _has_room(self) -> bool:
        """Whether one more capture may be kept, once those are gone whose memory is."""
        freed = [key for key, known in self.captures.items() if any(memory.freed() for memory in known.memory)]
        if freed:
            self.device.wait()
        for key in freed:
            del self.captures[key]
        limit = self.record.config.capture_limit
        if len(self.captures) < limit:
            return True
        if not self._limit_told:
            self._limit_told = True
            hint = "pad inputs to fewer sizes, reuse caches, or raise the option capture_limit"
            self._note(f"capture limit of {limit} reached: other sizes and addresses run eagerly ({hint})")
        return False

    def _capture(self, key: tuple[Any, ...], arguments: Sequence[Any]) -> Capture | None:
        """Capture the graph for these inputs; None where that fails. Nothing is computed."""
        recorder = _Recorder(self.gm, self.device, self.lists)
        buffers = {place: buffer_like(arguments[place]) for place in self.inputs.copied}
        captured = [buffers.get(i, value) for i, value in enumerate(arguments)]
        try:
            graph, results = self.device.capture(lambda: recorder.boxed_run(list(captured)))
        except RuntimeError as error:
            self._give_up(recorder.error or error, recorder.node)
            return None
        memory = [torch_private.MemoryReference(arguments[i]) for i in self.inputs.in_place]
        made = Capture(graph, buffers, Results(results, captured, self.inputs.in_place), memory, recorder.groups)
        self._met.discard(key)
        self.captures[key] = made
        logger.info("captured %d inputs, %d of them copied in; %d launches can be updated", len(captured), len(buffers), len(made.groups))
        return made

    def _give_up(self, error: RuntimeError, node: Node | None) -> None:
        logger.warning("a graph cannot be captured and runs eagerly", exc_info=error)
        self.record.config = dataclasses.replace(self.record.config, executor="eager")
        what = f"{node.name} ({node.target}): " if node is not None else ""
        self._note(f"executor eager in place of graph: capture failed: {what}{str(error).splitlines()[0]}", source_of(node))
        self.capturable = False
        self.captures.clear()

    def _note(self, text: str, source: str | None = None) -> None:
        self.record.notes.append(f"{text}, at {source}" if source else text)


@dataclass
class Capture:
    """One captured graph.

    Attributes:
        graph: the device's graph.
        buffers: place of an input to the memory that it is copied into.
        results: makes the results out of the graph's memory and the inputs of a replay.
        memory: of the inputs that lie in place; a capture is of no use once one of them is freed.
        groups: the launches that a replay may have to update.
        done: an event behind the last replay, where there are groups.
    """

    graph: Any
    buffers: dict[int, Tensor]
    results: Results
    memory: list[torch_private.MemoryReference]
    groups: list[TaskGroup] = field(default_factory=list)
    done: Any = None


class _Recorder(Interpreter):
    """Runs a graph under capture, and brackets the launches that can be updated.

    Attributes:
        node: the node that runs, or ran last.
        error: what it raised; to end a capture that has failed is an error too, and would hide this one.
        groups: the launches bracketed so far.
    """

    def __init__(self, gm: GraphModule, device: GraphDevice, lists: HostLists) -> None:
        super().__init__(gm)
        self.device = device
        self.lists = lists
        self.node: Node | None = None
        self.error: RuntimeError | None = None
        self.groups: list[TaskGroup] = []

    def run_node(self, n: Node) -> Any:
        self.node = n
        try:
            return self._launch(n)
        except RuntimeError as error:
            self.error = error
            raise

    def _launch(self, n: Node) -> Any:
        variant = self.lists.variants.get(n)
        if variant is None:
            return super().run_node(n)
        arguments = variant.arguments(*self.fetch_args_kwargs_from_env(n))
        group, results = record_group(self.device, variant, arguments, list(self.lists.lists_of(n)))
        self.groups.append(group)
        return results if len(results) > 1 else results[0]
