"""Every kernel through the offline Ascend compiler, and the gate itself on samples that must pass or fail.

All of it is compiled at once, in the ascend environment; a test each says what became of a case on a SoC. To save time the families of
kernels are compiled for one SoC in turn, and the samples for each: `make kernels` compiles everything for both, and has made the same of
every case so far, which docs/kernels.md shows.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from .limits import violations
from .result import Result, Subject
from .run import ROOT, SOCS, GateError, case_sources, compile_cases, subjects
from .table import document

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ascend_gate")]  # one process of the tests compiles, for all

SAMPLES = "tests.ascend_gate.samples"
BROKEN = f"{SAMPLES}:broken"

# What the gate says of each sample that breaks a limit: nothing more, so that each shows its own.
COMPLAINTS = {
    "unified buffer overflows": [
        r"hivm failed: bishengir-compile ended with status 1: (?s:.*)ub overflow",
        "ub overflows: 262144 of 196608 bytes",
        "256.0 KiB of unified buffer are over the limit of 144",
        "double buffering is lost without a note: the compiler gave it up",
    ],
    "unified buffer over the limit": ["192.0 KiB of unified buffer are over the limit of 144"],
    "double buffering off": ["double buffering is lost without a note: the option multibuffer is off"],
    "double buffering given up": ["double buffering is lost without a note: the compiler gave it up"],
    "double buffering shared": [
        "192.0 KiB of unified buffer are over the limit of 144",
        "double buffering is lost without a note: 2 double-buffered areas share memory",
    ],
    "grid too large": ["a grid of 65536 is not within 1 to 65535"],
    "unknown option": ["ttir failed: ValueError: triton-ascend has no option num_wraps"],
    "scalar loop": [r"scalar loop that is not declared: 256 elements \(load i64 ub, store i64 ub\)"],
    "scalar loop of another length": ["scalar loop that is not declared: 256", "a scalar loop of 128 trips is declared, and there is none"],
    "scalar loop without a note": ["scalar loops are declared without a note"],
    "scalar loop of unknown length": [
        r"scalar loop that is not declared: unknown elements \(load f32 gm\)",
        r"scalar loop that is not declared: unknown elements \(transfer f32 gm\)",
    ],
    "scalar loop beside vectors": [r"scalar loop that is not declared: 256 elements \(load i32 ub, store i32 ub\)"],
    "stale declaration": ["a scalar loop of 8 trips is declared, and there is none"],
    "not Triton": [r"ttir failed: CompilationError: (?s:.*)incompatible dimensions at index 0: 64 and 128"],
    "not for Ascend": ["hivm failed: bishengir-compile ended with status -6: LLVM ERROR: unsupported datatype"],
    "argument without type": ["ttir failed: TypeError: argument y_ptr needs a type or a value"],
    "constant with a type": ["ttir failed: TypeError: argument BLOCK is a constexpr"],
    "number with a value": ["ttir failed: TypeError: argument rows is no constexpr"],
    "unknown argument": ["ttir failed: TypeError: unequal_kernel has no argument z"],
    "process dies": ["ttir failed: the process died: SIGKILL"],
}

# What is compiled for each SoC.
SOURCES = {soc: [*case_sources()[turn :: len(SOCS)], SAMPLES] for turn, soc in enumerate(SOCS)}

Results = Mapping[tuple[str, str, str], Result]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases are known to the ascend environment only: Triton is not in this one. Where it fails, a test says so, not the collection."""
    if "subject" not in metafunc.fixturenames:
        return
    found: list[tuple[Subject | GateError, str]] = []
    for soc, sources in SOURCES.items():
        try:
            found += [(subject, soc) for subject in subjects(sources)]
        except GateError as error:
            found.append((error, soc))
    names = [f"{case.family}-{case.name}-{soc}" if isinstance(case, Subject) else f"no cases-{soc}" for case, soc in found]
    metafunc.parametrize(("subject", "soc"), found, ids=names)


@pytest.fixture(scope="module")
def results() -> Results:
    """Everything, compiled: by family, name and SoC."""
    made = [result for soc, sources in SOURCES.items() for result in compile_cases([*sources, BROKEN], [soc])]
    return {(result.subject.family, result.subject.name, result.soc): result for result in made}


def test_keeps_the_limits(subject: Subject | GateError, soc: str, results: Results) -> None:
    if isinstance(subject, GateError):
        raise subject
    assert violations(results[subject.family, subject.name, soc]) == []


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("name", COMPLAINTS)
def test_a_broken_limit_is_told(name: str, soc: str, results: Results) -> None:
    told = violations(results["samples.broken", name, soc])
    assert [bool(re.match(complaint, line)) for complaint, line in zip(COMPLAINTS[name], told)] == [True] * len(told), told
    assert len(told) == len(COMPLAINTS[name]), told


def test_every_broken_sample_is_expected(results: Results) -> None:
    assert {name for family, name, _ in results if family == "samples.broken"} == set(COMPLAINTS)


def kernels(folder: Path) -> set[str]:
    """The qualified names of the functions that are launched: `@triton.jit` functions named *_kernel."""
    return {
        ".".join(["npu_fusion.kernels", *path.relative_to(folder).with_suffix("").parts, node.name])
        for path in folder.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }


def test_every_kernel_has_a_case(results: Results) -> None:
    """But those of the files that are for GPUs alone, which tests/kernels/test_gpu_code.py compiles."""
    covered = {result.subject.kernel for result in results.values()}
    for_gpus = {path.stem for path in (ROOT / "tests" / "kernels" / "gpu_cases").glob("*.py")}
    missing = kernels(ROOT / "kernels") - covered
    assert {name for name in missing if name.split(".")[2] not in for_gpus} == set()


def test_kernels_are_found(tmp_path: Path) -> None:
    (tmp_path / "family.py").write_text("@triton.jit\ndef a_kernel(x): ...\n@triton.jit\ndef _helper(x): ...\ndef plan(): ...\n")
    assert kernels(tmp_path) == {"npu_fusion.kernels.family.a_kernel"}


def test_document_is_current(results: Results) -> None:
    """`tools/run -m tests.ascend_gate.table docs/kernels.md` writes what docs/kernels.md holds."""
    of_kernels = [result for (family, _, _), result in results.items() if family not in ("samples", "samples.broken")]
    on_each = [replace(result, soc=soc) for result in of_kernels for soc in SOCS]
    assert document(on_each) == (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_stages_memory_and_loops_are_reported(results: Results) -> None:
    for soc in SOCS:
        loop = results["samples", "scalar loop that is declared", soc]
        assert list(loop.stages) == ["ttir", "linalg", "hivm", "link"]
        assert all(stage.seconds > 0 for stage in loop.stages.values())
        assert [str(found) for found in loop.scalar_loops] == ["128 elements (load i64 ub, store i64 ub)"]
        assert [str(found) for found in results["samples", "rows by index", soc].scalar_loops] == ["8 rows (load i32 gm)"]
        assert results["samples", "vectors", soc].memory == {"ub": 4 * 4096 * 4}  # two areas, both doubled
        assert results["samples", "matrix product", soc].memory == {"cbuf": 2 * 2 * 64 * 64 * 2, "cc": 64 * 64 * 4}
        retried = results["samples.broken", "double buffering given up", soc]
        assert retried.memory == {"ub": 4 * 32768}
        assert retried.warnings[-1].endswith("compilation then succeeded.")
