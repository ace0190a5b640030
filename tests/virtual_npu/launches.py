"""Count the kernel launches in a trace of the virtual NPU.

    tools/run -m tests.virtual_npu.launches trace.txt

In a program: `read("trace.txt").last_graph` holds the kernels of the graph that was captured last, by name.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Graph:
    """One captured graph: its kernels, asynchronous copies and task groups, and how often it has been used since."""

    launches: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    task_groups: int = 0
    updates: int = 0
    replays: int = 0


@dataclass
class Trace:
    """What a process did.

    Attributes:
        graphs: the captured graphs by number, in order of capture.
        total: every launch, captured or not.
        updating: the launches that updated a task group.
    """

    graphs: dict[str, Graph] = field(default_factory=dict)
    total: Counter[str] = field(default_factory=Counter)
    updating: Counter[str] = field(default_factory=Counter)

    @property
    def captured(self) -> list[Graph]:
        """The graphs that hold kernels. (Compilers also capture an empty one to open a memory pool.)"""
        return [graph for graph in self.graphs.values() if graph.launches]

    @property
    def last_graph(self) -> Counter[str]:
        return self.captured[-1].launches if self.captured else Counter()


def events(lines: Iterable[str]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(event, first word after it, its key=value fields)"""
    for line in lines:
        event, _, rest = line.strip().partition(" ")
        yield event, rest, dict(word.split("=", 1) for word in rest.split() if "=" in word)


def parse(lines: Iterable[str]) -> Trace:
    parser = _Parser()
    for event, word, fields in events(lines):
        parser.take(event, word, fields)
    return parser.trace


class _Parser:
    def __init__(self) -> None:
        self.trace = Trace()
        self.capturing: Graph | None = None
        self.updating = False
        self.owner: dict[str, Graph] = {}  # task group -> its graph

    def take(self, event: str, word: str, fields: dict[str, str]) -> None:
        graph = self.trace.graphs.setdefault(fields["graph"], Graph()) if "graph" in fields else None
        match event:
            case "launch":
                self._launch(word)
            case "copy" if self.capturing:
                self.capturing.copies += 1
            case "capture_begin":
                self.capturing = graph
            case "capture_end":
                self.capturing = None
            case "task_group_end" if graph:
                graph.task_groups += 1
                self.owner[fields["group"]] = graph
            case "update_begin":
                self.updating = True
                if fields["group"] in self.owner:
                    self.owner[fields["group"]].updates += 1
            case "update_end":
                self.updating = False
            case "replay" if graph:
                graph.replays += 1

    def _launch(self, kernel: str) -> None:
        self.trace.total[kernel] += 1
        if self.updating:
            self.trace.updating[kernel] += 1
        elif self.capturing:
            self.capturing.launches[kernel] += 1


def read(path: str | Path) -> Trace:
    with open(path, encoding="utf-8") as lines:
        return parse(lines)


def table(trace: Trace) -> str:
    kernels = sorted(trace.last_graph.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(
        [
            "launches in the last captured graph:",
            *(f"{count:6}  {kernel}" for kernel, count in kernels),
            f"{trace.last_graph.total():6}  in this graph",
            f"{trace.total.total():6}  in total, those outside any graph included",
            *(f"graph {number}: {summary(graph)}" for number, graph in enumerate(trace.captured, start=1)),
        ]
    )


def summary(graph: Graph) -> str:
    return (
        f"{graph.launches.total()} launches, {graph.copies} copies, {graph.task_groups} task groups, "
        f"{graph.updates} updates, {graph.replays} replays"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the kernel launches in a trace.")
    parser.add_argument("trace", type=Path)
    print(table(read(parser.parse_args().trace)))


if __name__ == "__main__":
    main()
