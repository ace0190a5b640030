"""The gate's side in the ascend environment: a request on standard input, the answer on standard output, both JSON.

    {"sources": ["tests.kernels.cases.norm"], "socs": ["Ascend910B3"], "processes": 2, "only": ""}
    {"subjects": [...], "results": [...]}

A source is a module with a function `cases()`, or `module:function`; `only` is part of a case's name, family or kernel. Without SoCs the
cases are listed and nothing is compiled.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.ascend_gate.case import Case
from tests.ascend_gate.processes import run_isolated
from tests.ascend_gate.result import Result, Subject

ROOT = Path(__file__).resolve().parents[2]


def add_package(folder: Path) -> None:
    """Make a package's submodules importable without running its `__init__`: npu_fusion's imports torch, which this environment has not."""
    spec = importlib.machinery.ModuleSpec(folder.name, loader=None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[folder.name] = importlib.util.module_from_spec(spec)


def read(source: str) -> Iterator[tuple[Subject, Case]]:
    """The cases of a source."""
    module, _, function = source.partition(":")
    family = ".".join(filter(None, (module.rpartition(".")[2], function)))
    case: Case
    for case in getattr(importlib.import_module(module), function or "cases")():
        kernel = case.launch.kernel
        yield Subject(family, case.name, f"{kernel.__module__}.{kernel.__name__}", case.launch.grid, tuple(case.loops), case.note), case


def compile_all(cases: Sequence[tuple[Subject, Case]], socs: Sequence[str], processes: int) -> list[Result]:
    """The results of all cases, for one SoC after the other."""
    from tests.ascend_gate.gate import compile_case  # before the processes fork, so that none of them imports it

    def compile_job(job: tuple[Subject, Case, str]) -> Result:
        return compile_case(*job)

    jobs = [(subject, case, soc) for soc in socs for subject, case in cases]
    return run_isolated(compile_job, jobs, processes, died=lambda job, how: Result.of_death(job[0], job[2], how))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    cases = [pair for source in request["sources"] for pair in read(source)]
    repeated = [str(name) for name, count in Counter((subject.family, subject.name) for subject, _ in cases).items() if count > 1]
    if repeated:
        raise ValueError(f"cases with the same name: {', '.join(repeated)}")
    cases = [(subject, case) for subject, case in cases if request["only"] in f"{subject} {subject.kernel}"]
    results = compile_all(cases, request["socs"], request["processes"]) if request["socs"] else []
    return {"subjects": [asdict(subject) for subject, _ in cases], "results": [asdict(result) for result in results]}


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what a compiler prints is no part of the answer
    add_package(ROOT / "npu_fusion")
    json.dump(answer(json.load(sys.stdin)), out)


if __name__ == "__main__":
    main()
