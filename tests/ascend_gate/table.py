"""Writes docs/kernels.md: what the gate found out about every case of every kernel.

tools/run -m tests.ascend_gate.table docs/kernels.md
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from .limits import GRID_LIMIT, KIB, UB_LIMIT
from .result import Result, ScalarLoop, Subject
from .run import SOCS, case_sources, compile_cases

INTRODUCTION = f"""\
# Triton kernels on Ascend

Written by `tools/run -m tests.ascend_gate.table docs/kernels.md`; do not edit.

Every kernel of kernels/ is compiled for Ascend as far as that goes without CANN (tests/ascend_gate): Triton's front end,
triton-adapter-opt and bishengir-compile, with the arguments that triton-ascend passes, down to the module that the closed code generator
`hivmc` would get; and the device library has every function that this module calls. A kernel must keep these limits, in each of its cases
and on each SoC:

- It goes through all stages, with the types, constants and options of a launch that its plan function makes.
- It uses at most {UB_LIMIT // KIB} of the unified buffer's 192 KiB, and its grid is at most {GRID_LIMIT}.
- It has no scalar loop, that is a loop over single elements for want of a vector instruction, but those that its case declares with a
  reason. A loop over rows that reads an index or a factor for each is no such loop, and is listed.
- Transfers overlap with computation: double buffering is not given up to save memory, unless the case says why.

The gate says nothing of numbers or time, and what `hivmc` does is not seen. It is part of `make unit`; alone it runs as

    tools/run -m pytest tests/ascend_gate
    tools/run -m tests.ascend_gate.run -k TEXT      # what became of the cases with TEXT in their name, family or kernel

The compiler has an environment of its own, which is built at the first use, without torch (tools/requirements-ascend.txt);
`NPU_FUSION_ASCEND_PYTHON` names an existing interpreter instead. Cases are in tests/kernels/cases/, one file a family.
"""
NONE = "No kernel has landed yet."


def document(results: Sequence[Result]) -> str:
    """The whole of docs/kernels.md. Nothing in it depends on the machine."""
    families = [_family(name, list(group)) for name, group in itertools.groupby(results_by_case(results), key=lambda pair: pair[0].family)]
    return "\n\n".join([INTRODUCTION.rstrip(), *(families or [NONE])]) + "\n"


def results_by_case(results: Iterable[Result]) -> list[tuple[Subject, dict[str, Result]]]:
    """The results of each case by SoC, in the order of families and of cases in them."""
    found: dict[Subject, dict[str, Result]] = {}
    for result in results:
        found.setdefault(result.subject, {})[result.soc] = result
    return sorted(found.items(), key=lambda pair: pair[0].family)


def _family(name: str, cases: Sequence[tuple[Subject, dict[str, Result]]]) -> str:
    columns = ["kernel", "case", *(f"KiB on {soc}" for soc in SOCS), "loops", "notes"]
    head = [f"## {name}", "", _row(columns), _row(["---"] * len(columns))]
    return "\n".join([*head, *(_row(_cells(subject, by_soc)) for subject, by_soc in cases)])


def _cells(subject: Subject, by_soc: dict[str, Result]) -> list[str]:
    loops = _unique(_loop(loop) for result in by_soc.values() for loop in result.scalar_loops)
    notes = _unique(text for result in by_soc.values() for text in (subject.note, result.lost_double_buffering, *result.warnings) if text)
    memory = [_memory(by_soc[soc]) if soc in by_soc else "" for soc in SOCS]
    return [f"`{subject.kernel.rpartition('.')[2]}`", subject.name, *memory, ", ".join(loops), "; ".join(notes)]


def _memory(result: Result) -> str:
    """Kibibytes of the unified buffer, and of a cube core's memories where it is used."""
    if not result.ok:
        return "fails"
    names = {"ub": "UB", "cbuf": "L1", "cc": "L0C"}
    others = [f"{names.get(name, name)} {size / KIB:.1f}" for name, size in sorted(result.memory.items()) if name != "ub"]
    return ", ".join([f"{result.ub / KIB:.1f}", *others])


def _loop(loop: ScalarLoop) -> str:
    return f"{loop.trips or 'unknown'} {'rows' if loop.rows else 'elements'}"


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ascend_gate.table", description="Write the table of kernels as Markdown.")
    parser.add_argument("file", type=Path, help="the Markdown file to write, e.g. docs/kernels.md")
    file: Path = parser.parse_args(arguments).file
    file.write_text(document(compile_cases(case_sources())), encoding="utf-8")


if __name__ == "__main__":
    main()
