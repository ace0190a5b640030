"""The Triton kernels on a GPU beside Inductor's, and beside what memory allows: one command, one table.

    tools/run benchmarks/kernels.py                              # everything: minutes
    tools/run benchmarks/kernels.py --only rms_norm --rows 4096 --json out.json

Every line is measured in one run: our op, Inductor's code for the plain PyTorch, and libraries where they are installed, each as a CUDA
graph over several sets of inputs that together are larger than the L2 cache (at most 256 sets, which of a few rows are smaller), replayed
in turn; medians of a call. `limit` is the bytes that must be read and written over the bandwidth that a copy reached in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.kernel_subjects import BF16, SUBJECTS, Subject, tensors_in
from npu_fusion.errors import VerificationError
from npu_fusion.numerics import assert_within_contract

L2_CACHES = 3  # the inputs of all sets together are so many times as large as the L2 cache
MOST_SETS = 256  # more nodes than that in a graph would not be how a model runs
REPLAYS, ROUNDS = 20, 15
ROWS = (1, 16, 64, 4096)


@dataclass
class Way:
    """One implementation, as a CUDA graph that runs it once on each set of inputs."""

    name: str
    graph: torch.cuda.CUDAGraph
    calls: int


def graph_of(name: str, call: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Way:
    """Capture a call on every set of inputs, after warm-up calls outside the graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            for inputs in sets:
                call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            call(*inputs)
    return Way(name, graph, len(sets))


def microseconds(ways: Sequence[Way]) -> dict[str, float]:
    """The median time of a call of each way, all of them measured in turns."""
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for way in ways:
        for _ in range(3):
            way.graph.replay()
    for _ in range(ROUNDS):
        for way in ways:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPLAYS):
                way.graph.replay()
            end.record()
            end.synchronize()
            times[way.name].append(start.elapsed_time(end) * 1e3 / (REPLAYS * way.calls))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth() -> float:
    """Bytes a microsecond that the faster of two copies of a gigabyte reads and writes.

    `copy_` in a graph is a copy node, which a kernel of plain loads and stores overtakes (2.4 and 3.0 TB/s on an H100).
    """
    source = torch.zeros(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    ways = [
        graph_of("copy", lambda a, b: b.copy_(a), [(source, target)]),
        graph_of("neg", lambda a, b: torch.neg(a, out=b), [(source, target)]),
    ]
    return 2 * bytes_of(source) / min(microseconds(ways).values())


def bytes_of(values: Any) -> int:
    """Bytes of all tensors in arguments or results."""
    return sum(value.numel() * value.element_size() for value in tensors_in(values))


def input_sets(subject: Subject, rows: int) -> list[tuple[Any, ...]]:
    """So many sets of inputs that a call finds none of its own in the L2 cache, as far as MOST_SETS allow."""
    first = subject.inputs(rows, "cuda")
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(MOST_SETS, max(2, -(-L2_CACHES * cache // max(1, bytes_of(first)))))
    return [first, *(subject.inputs(rows, "cuda") for _ in range(count - 1))]


def ways_of(subject: Subject, sets: Sequence[tuple[Any, ...]], cores: int) -> list[Way]:
    torch.compiler.reset()
    plain = torch.compile(subject.plain, dynamic=False)
    ways = [graph_of("ours", lambda *inputs: subject.ours(*inputs, cores=cores), sets), graph_of("inductor", plain, sets)]
    for name, call in subject.libraries().items():
        ways.append(graph_of(name, call, sets))
    return ways


def agrees(subject: Subject, inputs: tuple[Any, ...], cores: int) -> bool:
    """Whether ours is within the numeric contract, against the plain PyTorch in float64: one that is fast and wrong is shown as such."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    ours, plain, exact = (tensors_in(x) for x in (subject.ours(*inputs, cores=cores), subject.plain(*inputs), subject.plain(*wide)))
    return all(_within_contract(*results) for results in zip(ours, plain, exact, strict=True))


def _within_contract(ours: Tensor, plain: Tensor, exact: Tensor) -> bool:
    if ours.dtype == torch.int8:  # a last bit more or less before it is quantised, and some fall to the other side
        return bool(((ours.int() - exact.int()).abs() <= 1).all()) and float((ours != exact).float().mean()) < 0.1
    try:
        assert_within_contract(ours, plain, exact, BF16)  # all subjects pass through it
    except VerificationError:
        return False
    return True


@torch.no_grad()
def measure(names: Sequence[str], rows: Sequence[int]) -> list[dict[str, Any]]:
    """A record for each subject and number of rows."""
    cores = torch.cuda.get_device_properties(0).multi_processor_count
    bandwidth = copy_bandwidth()
    records = []
    for subject in SUBJECTS:
        if names and not any(name in subject.name for name in names):
            continue
        for count in subject.rows or rows:
            sets = input_sets(subject, count)
            needed = subject.bytes_needed(sets[0]) if subject.bytes_needed else bytes_of((sets[0], subject.ours(*sets[0], cores=cores)))
            record = {"subject": subject.name, "rows": count, "limit": needed / bandwidth, "agrees": agrees(subject, sets[0], cores)}
            record["times"] = microseconds(ways_of(subject, sets, cores))
            records.append(record)
            Console(stderr=True).print(json.dumps(record))
    return records


def table(records: Sequence[dict[str, Any]]) -> Table:
    shown = Table("kernel", "rows", "limit us", "ours us", "/ limit", "inductor us", "ours / inductor", "libraries", "equal")
    shown.title = torch.cuda.get_device_name()
    for record in records:
        times = dict(record["times"])
        ours, inductor = times.pop("ours"), times.pop("inductor")
        others = ", ".join(f"{name} {time:.1f} ({ours / time:.2f})" for name, time in times.items())
        shown.add_row(
            record["subject"],
            str(record["rows"]),
            f"{record['limit']:.2f}",
            f"{ours:.2f}",
            f"{ours / record['limit']:.2f}",
            f"{inductor:.2f}",
            f"{ours / inductor:.2f}",
            others,
            "yes" if record["agrees"] else "NO",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="kernels whose names contain this")
    parser.add_argument("--rows", action="append", type=int, help=f"numbers of rows, by default {ROWS}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    records = measure(arguments.only, arguments.rows or ROWS)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))
    Console(width=160).print(table(records))


if __name__ == "__main__":
    main()
