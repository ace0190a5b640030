"""How much of transformers' causal language models fuses, and whether the fused models still compute the same; writes docs/coverage*.md.

For every architecture that builds from a tiny configuration (tests/models/zoo.py), in bfloat16 and float32, with static and dynamic shapes,
prefill and decode, SDPA and eager attention: counts the idioms that an eager pass executes, compiles with `backend="npu_fusion"`, runs,
takes what fused from `npu_fusion.report`, and compares the logits (and those of an eager step after the pass, which sees the cache as the
pass left it) with eager's, both against float64.

    python benchmarks/coverage.py                              # everything that is not measured yet: hours on two cores
    python benchmarks/coverage.py --arch llama --arch mamba    # these only
    python benchmarks/coverage.py --sample 10 --seed 3 --budget 600
    python benchmarks/coverage.py --write-only                 # the document from what is measured
    python benchmarks/coverage.py --target ascend910b          # lowered for Ascend, run through the CPU kernels of its ops
    python benchmarks/coverage.py --suite routed               # models with experts or latent attention: docs/coverage-routed.md
    python benchmarks/coverage.py --suite quantised            # what quantises, and absorbed attention: docs/coverage-quantised.md

The last suite is not of transformers but of producers (tests/models/producers.py): their sites are known; they must equal eager.

Results are kept, one JSON line each, outside the checkout, so that the run can be stopped at any time and resumed. A result counts as
measured as long as the package's code is what it was. Every architecture runs in a process of its own: a crash or a hang costs one cell.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DTYPES, SHAPES, PHASES, ATTENTION = ("bf16", "fp32"), ("static", "dynamic"), ("prefill", "decode"), ("sdpa", "eager")
SUITES = ("models", "routed", "quantised")
HERE, TARGETS = "cpu", ("ascend910b", "ascend910_93", "ascend950")
BATCH, SEQUENCE = 2, 16
WORKER = [sys.executable, __file__, "--worker"]


@dataclass(frozen=True)
class Cell:
    """One model, compiled once: `arch` is a model_type of transformers or the name of a producer, which has no kinds of attention."""

    arch: str
    dtype: str
    shapes: str
    phase: str
    attention: str
    target: str = HERE

    def __str__(self) -> str:
        return "-".join((self.arch, self.dtype, self.shapes, self.phase, self.attention, *([] if self.target == HERE else [self.target])))


@dataclass
class Result:
    """What became of a cell.

    Attributes:
        code: the versions that it was measured with (`code_version`).
        status: `ok`; `absent` (the model has no such attention); `eager` (it does not run eagerly here); `failed` (compiling or running
            it raised, or took too long); `wrong` (beyond the numeric contract).
        detail: the error, where there is one.
        executed, covered: idiom to sites, in an eager pass and in the report of the compiled one.
        reasons: idiom to the report's reasons for its misses, with how often each is given.
        lowered: semantic op to what runs for it, with how many calls.
        passed_over: op, provider and reason of the better providers that could not take a call, with how many sites.
        error, eager_error, allowed: relative rms errors against float64, of the output that comes nearest to its bound.
        notes: what the report says of whole graphs, graph breaks among it.
        seconds: what the cell took.
    """

    cell: Cell
    code: str
    status: str
    detail: str = ""
    executed: dict[str, int] = field(default_factory=dict)
    covered: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, dict[str, int]] = field(default_factory=dict)
    lowered: dict[str, dict[str, int]] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    eager_error: float = 0.0
    allowed: float = 0.0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def from_json(cls, line: str) -> Result:
        values = json.loads(line)
        return cls(**{**values, "cell": Cell(**values["cell"])})


# -- measuring, in the worker


def measure(cell: Cell, code: str = "") -> Result:
    """Build, count, compile, run and compare one cell. What the model itself cannot do is a status, not an error."""
    import torch

    from tests.models import zoo

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[cell.dtype]
    result = Result(cell, code, "ok")
    if cell.arch not in zoo.architectures():
        return _measure_producer(cell, dtype, result)
    try:
        model = zoo.build(cell.arch, dtype, cell.attention)
    except ValueError as error:  # transformers' way of saying that the model has no such attention
        return _failed(result, "absent", error)
    try:
        inputs = zoo.prefill_inputs(model, BATCH, SEQUENCE) if cell.phase == "prefill" else zoo.decode_inputs(model, BATCH, SEQUENCE)
        result.executed = dict(zoo.executed_sites(model, inputs))
        eager, exact = zoo.run(model, inputs), zoo.run_float64(model, inputs)
    except Exception as error:  # a model that fails eagerly says nothing about us, but the document names it
        return _failed(result, "eager", error)
    try:
        fused = _compiled_run(cell, model, inputs, result)
    except Exception as error:  # this one does
        return _failed(result, "failed", error)
    _compare(result, fused, eager, exact, dtype)
    return result


def _measure_producer(cell: Cell, dtype: Any, result: Result) -> Result:
    """A producer's cell: eager stands for float64, for numbers that round to others on the way say nothing about errors."""
    import copy

    import torch
    from torch.utils import _pytree as pytree

    from tests.models import producers

    model, inputs = producers.build(cell.arch, dtype, cell.phase, BATCH, SEQUENCE)
    result.executed = dict(producers.PRODUCERS[cell.arch].sites)
    try:
        with torch.no_grad():
            eager = pytree.tree_leaves(model(*copy.deepcopy(inputs)))
    except Exception as error:
        return _failed(result, "eager", error)
    try:
        compiled = _compile(cell, model)
        with torch.no_grad():
            fused = pytree.tree_leaves(compiled(*copy.deepcopy(inputs)))
        _read_report(compiled, result)
    except Exception as error:
        return _failed(result, "failed", error)
    _compare(result, fused, eager, eager, dtype)
    return result


def _failed(result: Result, status: str, error: BaseException) -> Result:
    result.status, result.detail = status, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return result


def _compiled_run(cell: Cell, model: Any, inputs: dict[str, Any], result: Result) -> Any:
    from tests.models import zoo

    compiled: list[Any] = []

    def wrap(module: Any) -> Any:
        compiled.append(_compile(cell, module))
        return compiled[0]

    logits = zoo.run(model, inputs, wrap)
    _read_report(compiled[0], result)
    return logits


def _compile(cell: Cell, module: Any) -> Any:
    import torch

    import npu_fusion  # noqa: F401  registers the backend

    options: dict[str, Any] = {} if cell.target == HERE else {"target": cell.target, "emulate": True}
    torch.compiler.reset()
    return torch.compile(module, backend="npu_fusion", dynamic=cell.shapes == "dynamic", options=options)


def _read_report(compiled: Any, result: Result) -> None:
    """Take over from the report what the document is made of."""
    import npu_fusion

    report = npu_fusion.report(compiled)
    result.covered = dict(report.idioms)
    result.covered["mla_attention"] = report.ops["mla_attention"]
    in_products = [site for site in report.sites if site.fused and site.idiom == "dequantize" and site.op != "dequantize"]
    result.covered["quantized_linear"] = len(in_products)
    for site in report.missed:
        reasons = result.reasons.setdefault(site.idiom, {})
        reason = site.reason or "no reason given"
        reasons[reason] = reasons.get(reason, 0) + 1
    calls = {(site.op or "?", site.call): site for site in report.sites if site.fused}
    for (op, _), site in calls.items():
        providers = result.lowered.setdefault(op, {})
        providers[site.lowered_to or "?"] = providers.get(site.lowered_to or "?", 0) + 1
        if site.reason:
            line = f"{op} → {site.lowered_to}: {site.reason}"
            result.passed_over[line] = result.passed_over.get(line, 0) + 1
    result.notes = [*report.notes, *(f"graph break: {line}" for line in report.graph_breaks)]
    result.notes += [f"rule {name} failed: {error}" for name, error in report.rule_errors.items()]


def _compare(result: Result, fused: list[Any], eager: list[Any], exact: list[Any], dtype: Any) -> None:
    from npu_fusion.numerics import EAGER_FACTOR, error_bound, relative_error

    for ours, theirs, reference in zip(fused, eager, exact, strict=True):
        error, eager_error = relative_error(ours, reference), relative_error(theirs, reference)
        allowed = max(EAGER_FACTOR * eager_error, error_bound(dtype))
        if not result.allowed or error / allowed > result.error / result.allowed:
            result.error, result.eager_error, result.allowed = error, eager_error, allowed
    if not result.error <= result.allowed:
        result.status = "wrong"
        result.detail = f"error {result.error:.2e} against float64, allowed {result.allowed:.2e}, eager {result.eager_error:.2e}"


def work() -> None:
    """The worker: reads cells as JSON lines, and writes their results as such."""
    lines = sys.stdin.read().splitlines()
    results, sys.stdout = sys.stdout, sys.stderr  # what models print goes elsewhere
    for line in lines:
        request = json.loads(line)
        start = time.perf_counter()
        result = measure(Cell(**request["cell"]), request["code"])
        result.seconds = round(time.perf_counter() - start, 2)
        print(json.dumps(asdict(result)), file=results, flush=True)


# -- driving


def code_version() -> str:
    """What a result depends on: torch, transformers, and a digest of the package's sources and the zoo's."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    folders = [ROOT / name for name in ("npu_fusion", "patterns", "lowerings", "kernels", "tests/models")]
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".toml")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return f"torch {version('torch')}, transformers {version('transformers')}, sources {digest.hexdigest()[:12]}"


def run_cells(cells: list[Cell], code: str, timeout: float) -> Iterator[Result]:
    """Results of an architecture's cells, from worker processes: one, and another after each cell that kills or hangs its worker."""
    while cells:
        done = 0
        for result in _worker_results(cells, code, timeout):
            done += 1
            yield result
        cells = cells[done:]


def _worker_results(cells: list[Cell], code: str, timeout: float) -> Iterator[Result]:
    """Results in the order of `cells`, up to the first that could not be had; that one's says why."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    pipe = subprocess.PIPE
    # Unbuffered: a line that waits in a buffer of ours would not wake the selector.
    worker = subprocess.Popen(WORKER, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, bufsize=0)
    assert worker.stdin is not None
    assert worker.stdout is not None
    with worker, selectors.DefaultSelector() as selector:
        try:
            worker.stdin.write(b"".join(json.dumps({"cell": asdict(cell), "code": code}).encode() + b"\n" for cell in cells))
            worker.stdin.close()
            selector.register(worker.stdout, selectors.EVENT_READ)
            for cell in cells:
                line = worker.stdout.readline() if selector.select(timeout) else None
                if not line:
                    yield Result(cell, code, "failed", f"took more than {timeout:.0f} s" if line is None else _death(worker.wait()))
                    return
                yield Result.from_json(line.decode())
        finally:
            worker.kill()


def _death(code: int) -> str:
    return f"the process died: {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"


class State:
    """Results on disk, one JSON line each; the last one for a cell counts."""

    def __init__(self, path: Path, code: str | None) -> None:
        self.path, self.code = path, code
        self.lock = threading.Lock()
        self.results: dict[Cell, Result] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                result = Result.from_json(line)
                if code is None or result.code == code:
                    self.results[result.cell] = result

    def add(self, result: Result) -> None:
        self.results[result.cell] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock, self.path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")


def default_state() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npu-fusion" / "coverage.jsonl"


def subjects(suite: str) -> list[str]:
    """The architectures, or producers, of a suite."""
    from tests.models import producers, zoo

    return {"models": zoo.architectures, "routed": zoo.routed_or_latent, "quantised": lambda: list(producers.PRODUCERS)}[suite]()


def select_cells(options: argparse.Namespace) -> dict[str, list[Cell]]:
    """The cells asked for, by architecture."""
    known = subjects(options.suite)
    unknown = sorted(set(options.arch) - set(known))
    if unknown:
        raise SystemExit(f"unknown in the suite {options.suite}: {', '.join(unknown)}. Known: {', '.join(known)}")
    names = sorted(options.arch) or known
    if options.sample:
        names = sorted(random.Random(options.seed).sample(names, min(options.sample, len(names))))
    attention = ["none"] if options.suite == "quantised" else options.attn or ATTENTION
    axes = (options.dtype or DTYPES, options.shapes or SHAPES, options.phase or PHASES, attention)
    return {name: [Cell(name, *axis, options.target) for axis in itertools.product(*axes)] for name in names}


def run_all(cells: dict[str, list[Cell]], state: State, timeout: float, budget: float, jobs: int) -> None:
    """Measure what the state lacks, `jobs` architectures at a time."""
    start = time.monotonic()
    done = itertools.count(1)

    def run(name: str) -> None:
        if time.monotonic() - start > budget:
            return
        assert state.code is not None
        for result in run_cells([cell for cell in cells[name] if cell not in state.results], state.code, timeout):
            state.add(result)
        statuses = [state.results[cell].status for cell in cells[name]]
        print(f"[{next(done)}/{len(cells)}] {name}: {_tally(statuses)}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, cells))
    if any(cell not in state.results for wanted in cells.values() for cell in wanted):
        print("the time is up; run again to go on", flush=True)


def _tally(values: Iterable[str]) -> str:
    values = list(values)
    return ", ".join(f"{values.count(value)} {value}" for value in dict.fromkeys(values))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what npu_fusion fuses in transformers' causal language models.")
    parser.add_argument("--suite", choices=SUITES, default=SUITES[0], help="what is measured (%(default)s)")
    parser.add_argument("--arch", action="append", default=[], help="a model_type; may be given several times; all by default")
    parser.add_argument("--sample", type=int, help="this many architectures, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--target", choices=(HERE, *TARGETS), default=HERE, help="lower for this one, and emulate its ops on the CPU")
    parser.add_argument("--dtype", action="append", choices=(*DTYPES, "fp16"))
    parser.add_argument("--shapes", action="append", choices=SHAPES)
    parser.add_argument("--phase", action="append", choices=PHASES)
    parser.add_argument("--attn", action="append", choices=ATTENTION)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a cell may take")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no architecture is begun")
    parser.add_argument("--jobs", type=int, default=1, help="architectures measured at a time")
    parser.add_argument("--state", type=Path, default=default_state(), help="where results are kept (%(default)s)")
    parser.add_argument("--output", type=Path, help="docs/coverage[-SUITE][-TARGET].md")
    parser.add_argument("--write-only", action="store_true", help="measure nothing, write the document from all results in the state")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    from benchmarks.coverage_table import document

    state = State(options.state, None if options.write_only else code_version())
    if not options.write_only:
        run_all(select_cells(options), state, options.timeout, options.budget, options.jobs)
    members = set(subjects(options.suite))
    results = [result for result in state.results.values() if result.cell.target == options.target and result.cell.arch in members]
    name = "-".join(
        ["coverage", *([options.suite] if options.suite != SUITES[0] else []), *([options.target] if options.target != HERE else [])]
    )
    output = options.output or ROOT / "docs" / f"{name}.md"
    output.write_text(document(results, options.suite))
    print(f"wrote {output} from {len(results)} results")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for `tests.models` and `benchmarks`, whatever the caller's PYTHONPATH
    main()
