"""Compile kernels for Ascend, from the project's own environment; nothing is cached.

    tools/run -m tests.ascend_gate.run                          every case, for both SoCs
    tools/run -m tests.ascend_gate.run -k "rms_norm" --soc Ascend910B3
    tools/run -m tests.ascend_gate.run tests.ascend_gate.samples:broken        other cases: MODULE or MODULE:FUNCTION

The compiler has an environment of its own (tools/environment.py ascend; NPU_FUSION_ASCEND_PYTHON names another Python), which is built at
the first use, and works in a subprocess. Ends with status 1 where a case breaks a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tools.environment

from .limits import KIB, violations
from .result import Result, Subject

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "kernels" / "cases"
SOCS = ("Ascend910B3", "Ascend910_9382")  # an Atlas A2 and an A3
PROCESSES = 2
_ERROR_LINES = 40  # of a worker that failed


class GateError(RuntimeError):
    """The gate cannot run; the message says why. (A kernel that does not compile is a result.)"""


def case_sources(folder: Path = CASES) -> list[str]:
    """The modules of cases: every file of the folder, none where there is no folder."""
    return [f"tests.kernels.cases.{path.stem}" for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]


def subjects(sources: Sequence[str]) -> list[Subject]:
    """The cases of `sources`, not compiled.

    Raises:
        GateError: the environment cannot be built, or a module of cases fails.
    """
    return [Subject.from_json(subject) for subject in _ask(sources, (), 1)["subjects"]]


def compile_cases(sources: Sequence[str], socs: Sequence[str] = SOCS, processes: int = PROCESSES, only: str = "") -> list[Result]:
    """Compile the cases of `sources` for each SoC.

    Args:
        processes: how many compile at a time.
        only: part of a case's name, family or kernel; others are left out.

    Raises:
        GateError: the environment cannot be built, or a module of cases fails.
    """
    return [Result.from_json(result) for result in _ask(sources, socs, processes, only)["results"]]


def _ask(sources: Sequence[str], socs: Sequence[str], processes: int, only: str = "") -> Any:
    try:
        python = tools.environment.python_of("ascend")
    except subprocess.CalledProcessError as error:
        raise GateError(f"the ascend environment cannot be built: {error}") from error
    # This process's own packages are not for the other Python, and the interpreter's functions are none that can be compiled.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [python, "-m", "tests.ascend_gate.worker"],
        input=json.dumps({"sources": list(sources), "socs": list(socs), "processes": processes, "only": only}),
        env={**inherited, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-_ERROR_LINES:])
        raise GateError(f"the gate's worker ended with status {done.returncode}:\n{last}")
    return json.loads(done.stdout)


def line(result: Result) -> str:
    """A line on a result, and one for each limit that it breaks and each warning."""
    seconds = sum(stage.seconds for stage in result.stages.values())
    memory = ", ".join(f"{name} {size / KIB:.1f}" for name, size in sorted(result.memory.items()))
    broken = violations(result)
    head = f"{'FAIL' if broken else 'ok  '} {result.soc:<15} {result.subject}  [KiB: {memory}]  {seconds:.2f} s"
    details = [
        *broken,
        *(f"loop: {loop}" for loop in result.scalar_loops),
        *filter(None, (result.lost_double_buffering,)),
        *result.warnings,
    ]
    return "\n".join([head, *(f"       {detail}" for detail in details)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ascend_gate.run", description="Compile kernels for Ascend, offline.")
    parser.add_argument(
        "sources", nargs="*", default=case_sources(), metavar="MODULE[:FUNCTION]", help="cases (all of tests/kernels/cases)"
    )
    parser.add_argument("-k", dest="only", default="", metavar="TEXT", help="only cases with TEXT in name, family or kernel")
    parser.add_argument("--soc", action="append", help=f"SoC to compile for, again for more (default {', '.join(SOCS)})")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    given = parser.parse_args(arguments)
    try:
        results = compile_cases(given.sources, given.soc or SOCS, given.processes, given.only)
    except GateError as error:
        sys.exit(str(error))
    for result in results:
        print(line(result))
    failed = sum(bool(violations(result)) for result in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
