"""Capture: record the kernel launches of a lowered graph once, replay them with a single launch.

Works with the graph API that `torch.cuda` and `torch.npu` share. One captured graph is kept for each combination of symbolic sizes and of
addresses that the graph may not copy:

- parameters, buffers and inputs that the graph writes (KV caches) are used where they lie; another address is another capture;
- all other inputs are copied into buffers of the capture before a replay;
- results are copied out of it, for the next replay overwrites them. A result that is one of the inputs is returned as such.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from . import torch_private
from .record import GraphRecord

logger = logging.getLogger(__name__)

Boxed = Callable[[list[Any]], Any]
CAPTURES_KEPT = 16
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.copy.default}


def unsuitable(gm: GraphModule) -> str | None:
    """Why a graph cannot be captured, or None."""
    # Host scalars among the inputs become part of the key of a capture.
    devices = {val.device for val in _values(gm) if val.device.type != "cpu" or val.dim() > 0}
    kinds = {device.type for device in devices}
    if kinds - {"cuda", "npu"}:
        return f"the graph runs on {', '.join(sorted(kinds))}, and only cuda and npu graphs can be captured"
    if len(devices) != 1:
        return "the graph runs on more than one device" if devices else "the graph has no tensors"
    for node in gm.graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        if torch.Tag.data_dependent_output in node.target.tags:
            return f"{node.name} ({node.target}) reads a value back to the host"
        if torch.Tag.dynamic_output_shape in node.target.tags:
            return f"{node.name} ({node.target}) has a result whose shape depends on data"
        if node.target in _COPIES and len({val.device.type for arg in (node, *node.all_input_nodes) for val in _value(arg)}) > 1:
            return f"{node.name} ({node.target}) copies between host and device"
    return None


def _values(gm: GraphModule) -> Sequence[Tensor]:
    return [val for node in gm.graph.nodes for val in _value(node)]


def _value(node: Node) -> Sequence[Tensor]:
    """The tensor a node computes, as a sequence of one or none."""
    val = node.meta.get("val")
    return [val] if isinstance(val, Tensor) else []


def _written_inputs(gm: GraphModule) -> set[int]:
    """Positions of the inputs whose memory the graph writes, directly or through a view."""
    places = {node: {i} for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    written: set[int] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not isinstance(value, Node):
                continue
            places.setdefault(node, set()).update(places.get(value, ()))
            if argument.alias_info.is_write:
                written |= places.get(value, set())
    return written


@dataclass
class _Capture:
    """One captured graph; holds no input that lies in place, so that a cache is freed when its owner drops it."""

    graph: Any
    buffers: dict[int, Tensor]
    outputs: list[Any]
    returned_inputs: dict[int, int]

    def replay(self, inputs: Sequence[Any]) -> list[Any]:
        for i, buffer in self.buffers.items():
            buffer.copy_(inputs[i])
        self.graph.replay()
        results = [out.clone() if isinstance(out, Tensor) else out for out in self.outputs]
        for out, place in self.returned_inputs.items():
            results[out] = inputs[place]
        return results


def capture(run: Boxed, gm: GraphModule, record: GraphRecord) -> Boxed:
    """A boxed function that captures `run` when it meets new sizes or addresses, and replays it otherwise.

    A graph that turns out not to be capturable, e.g. because it copies from the host, runs eagerly from then on; the record says so.

    Args:
        run: the boxed function that runs `gm` eagerly.
        gm: the lowered graph; `unsuitable(gm)` is None.
        record: the graph's record.
    """
    replayer = _Replayer(run, gm, record)

    def call(inputs: list[Any]) -> Any:
        return replayer(inputs)

    return torch_private.boxed(call)


class _Replayer:
    def __init__(self, run: Boxed, gm: GraphModule, record: GraphRecord) -> None:
        self.run = run
        self.record = record
        self.device_module = torch.get_device_module(next(val.device for val in _values(gm) if val.device.type != "cpu"))
        own = {i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if torch_private.STATIC_INPUT in node.meta}
        self.in_place = _written_inputs(gm) | set(torch_private.static_input_indices()) | own
        self.captures: OrderedDict[tuple[Any, ...], _Capture] = OrderedDict()
        self.capturable = True

    def __call__(self, inputs: list[Any]) -> Any:
        if not self.capturable:
            return self.run(inputs)
        key = tuple(_key(x, i in self.in_place) for i, x in enumerate(inputs))
        arguments = list(inputs)
        inputs.clear()
        if key in self.captures:
            self.captures.move_to_end(key)
            return self.captures[key].replay(arguments)
        # This run is the caller's; it warms kernels up as well. The capture after it computes nothing.
        results = self.run(list(arguments))
        self._capture(key, arguments)
        return results

    def _capture(self, key: tuple[Any, ...], arguments: list[Any]) -> None:
        copied = [i for i, x in enumerate(arguments) if _is_copied(x) and i not in self.in_place]
        try:
            taken = _record(self.run, arguments, copied, self.device_module)
        except RuntimeError as error:
            logger.warning("a graph cannot be captured and runs eagerly", exc_info=error)
            self.record.config = dataclasses.replace(self.record.config, executor="eager")
            self.record.notes.append(f"executor eager in place of graph: capture failed: {str(error).splitlines()[0]}")
            self.capturable = False
            self.captures.clear()
            return
        if len(self.captures) >= CAPTURES_KEPT:
            self.captures.popitem(last=False)
        self.captures[key] = taken


def _is_copied(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _key(value: Any, in_place: bool) -> Any:
    """What a capture depends on: an input's size and layout, its address where it lies in place, its value where it is a host scalar."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu":
        return value.dtype, value.item()
    layout = (tuple(value.shape), value.stride(), value.dtype)
    return (*layout, value.data_ptr()) if in_place else layout


def _record(run: Boxed, arguments: list[Any], copied: Sequence[int], device_module: Any) -> _Capture:
    """Capture one run: its launches are recorded, nothing is computed."""
    buffers = {i: arguments[i].clone() for i in copied}
    captured = [buffers.get(i, x) for i, x in enumerate(arguments)]
    device_module.synchronize()
    graph = _new_graph(device_module)
    with device_module.graph(graph):
        outputs = list(run(list(captured)))
    places = {id(x): i for i, x in enumerate(captured) if isinstance(x, Tensor)}
    returned = {i: places[id(out)] for i, out in enumerate(outputs) if id(out) in places}
    for i in returned:
        outputs[i] = None
    logger.info("captured a graph of %d inputs, %d of them copied before each replay", len(arguments), len(copied))
    return _Capture(graph, buffers, outputs, returned)


def _new_graph(device_module: Any) -> Any:
    return device_module.NPUGraph() if hasattr(device_module, "NPUGraph") else device_module.CUDAGraph()
