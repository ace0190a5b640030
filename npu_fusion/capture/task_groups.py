"""Task groups: launches of a captured graph whose arguments change between replays.

While a graph is captured, the launch of an op with host lists is bracketed as a group, and made to wait for an event. A replay starts
the graph first; on a stream of its own each group is then launched again with the new lists, and its event recorded, which lets the graph
go on. The event is reset within the graph, so that every replay waits for it anew: it is recorded also where nothing has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from .device import GraphDevice
from .host_lists import OutVariant


@dataclass
class TaskGroup:
    """One launch that can be updated.

    Attributes:
        op: the `out` variant that was launched.
        arguments: what it was launched with, by name; the tensors do not keep their memory.
        lists: the host lists that the captured launch has now.
        handle: the group, for the device.
        event: what the launch waits for.
    """

    op: OpOverload
    arguments: dict[str, Any]
    lists: dict[str, list[int]]
    handle: Any
    event: Any


def record_group(
    device: GraphDevice, variant: OutVariant, arguments: dict[str, Any], names: Sequence[str]
) -> tuple[TaskGroup, list[Tensor]]:
    """Launch an op as a group, under capture. Returns the group and the op's results.

    Args:
        device: the device that captures.
        variant: how the op is launched.
        arguments: of the op, by name.
        names: those that are host lists.
    """
    module = device.module
    prepared = variant.with_results(arguments)
    stream = module.current_stream()
    event = module.ExternalEvent()
    event.wait(stream)
    event.reset(stream)
    module.graph_task_group_begin(stream)
    variant.out(**prepared)
    handle = module.graph_task_group_end(stream)
    lists = {name: list(arguments[name]) for name in names}
    kept = pytree.tree_map_only(Tensor, device.unowned, prepared)
    return TaskGroup(variant.out, kept, lists, handle, event), prepared["out"]


def update_groups(device: GraphDevice, groups: Sequence[TaskGroup], lists: Sequence[dict[str, list[int]]], after: Any) -> int:
    """Let a replay that was started go on with the given lists. Returns how many launches were changed.

    Args:
        device: the device that replays.
        groups: of the graph that was started.
        lists: for each group its host lists.
        after: an event behind the graph's previous run, which still used the launches as they were; None where there was none.
    """
    module, stream = device.module, device.update_stream
    changed = 0
    waiting = list(zip(groups, lists, strict=True))
    with module.stream(stream):
        if after is not None:
            stream.wait_event(after)
        try:
            while waiting:
                changed += _update(module, stream, *waiting[0])
                waiting.pop(0)[0].event.record(stream)
        finally:
            for group, _ in waiting:  # the graph must not wait for ever where a launch was refused
                group.event.record(stream)
    return changed


def _update(module: Any, stream: Any, group: TaskGroup, values: dict[str, list[int]]) -> bool:
    """Launch a group again with other lists. Returns whether they are others."""
    if values == group.lists:
        return False
    module.graph_task_update_begin(stream, group.handle)
    try:
        group.op(**{**group.arguments, **values})
    finally:
        module.graph_task_update_end(stream)
    group.lists = values
    return True
