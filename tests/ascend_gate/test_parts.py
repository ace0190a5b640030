"""The parts of the gate that need no compiler."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from . import bishengir, run
from .limits import violations
from .result import STAGES, UNKNOWN, Overflow, Result, ScalarLoop, Stage, Subject
from .scalar_loops import scalar_loops
from .table import document

SUBJECT = Subject("norm", "rms_norm 4096", "npu_fusion.kernels.norm.rms_norm_kernel", 40)
PASSED = Result(SUBJECT, "Ascend910B3", dict.fromkeys(STAGES, Stage(0.1)), memory={"ub": 64 * 1024})

# The parser


def module(*lines: str) -> str:
    """A module with one function, after another whose constants have the same names."""
    other = ["func.func @other() {", "%n = arith.constant 7 : index", "return", "}", "func.func private @load(memref<?xf32>)"]
    constants = ["%c0 = arith.constant 0 : index", "%c1 = arith.constant 1 : index", "%c2 = arith.constant 2 : i32"]
    body = [
        "func.func @kernel(%arg0: memref<?xf32, #hivm.address_space<gm>>, %rows: i32) attributes {a = 1} {",
        *constants,
        *lines,
        "return",
        "}",
    ]
    return "\n".join(["module attributes {b = 2} {", *other, *body, "}"])


UB, GM = "#hivm.address_space<ub>", "strided<[1], offset: ?>, #hivm.address_space<gm>"
LOAD = f"%x = memref.load %buffer[%i] {{DiscreteMemAccess}} : memref<256xi64, {UB}>"
STORE = f"memref.store %x, %buffer[%i] : memref<256xi64, {UB}>"
BEGIN, END = "scf.for %i = %c0 to %n step %c1 {", "} {pipeline.veconly}"
LENGTH = "%n = arith.constant 256 : index"


def call(elements: int, dtype: str = "f32") -> list[str]:
    """A transfer from global memory, as the compiler prints it."""
    views = [
        f"%from = memref.reinterpret_cast %arg0 to offset: [0] : memref<?x{dtype}, {GM}> to memref<{elements}x{dtype}, {GM}>",
        f"%cast = memref.cast %from : memref<{elements}x{dtype}, {GM}> to memref<?x{dtype}, {GM}>",
        f"%cast_0 = memref.cast %to : memref<{elements}x{dtype}, {UB}> to memref<?x{dtype}, {UB}>",
    ]
    return [*views, f"func.call @load(%cast, %cast_0, %c0) : (memref<?x{dtype}, {GM}>, memref<?x{dtype}, {UB}>, index) -> ()"]


def test_a_loop_over_elements_is_found() -> None:
    assert scalar_loops(module(LENGTH, BEGIN, LOAD, STORE, END)) == (ScalarLoop(256, ("load i64 ub", "store i64 ub")),)


def test_trips_multiply_and_branches_do_not_count() -> None:
    inner = ["scf.for %j = %c0 to %n step %c2 {", "scf.if %true {", LOAD, "} else {", "scf.yield", "} {hivm.unlikely_condition}", "}"]
    rows = "scf.for %r = %first to %rows step %programs : i32 {"
    assert scalar_loops(module(LENGTH, rows, BEGIN, *inner, END, "}")) == (ScalarLoop(256 * 128, ("load i64 ub",)),)


def test_nothing_is_found_outside_loops_or_at_fixed_places() -> None:
    fixed = f"%x = memref.load %buffer[%c0] : memref<1xf32, {UB}>"
    assert scalar_loops(module(LOAD, LENGTH, BEGIN, fixed, END, STORE)) == ()


def test_a_loop_of_one_trip_is_none() -> None:
    assert scalar_loops(module("%n = arith.constant 1 : index", BEGIN, LOAD, END)) == ()
    assert scalar_loops(module("%n = arith.constant 2 : index", BEGIN, LOAD, END)) != ()


def test_constants_are_their_functions_own() -> None:
    """`%n` is 7 in the function before."""
    assert scalar_loops(module(BEGIN, LOAD, END)) == (ScalarLoop(UNKNOWN, ("load i64 ub",)),)


def test_global_memory_counts_at_any_place() -> None:
    element = f"%x = memref.load %one[%c0] : memref<1xi32, {GM}>"
    assert scalar_loops(module(LENGTH, BEGIN, element, END)) == (ScalarLoop(256, ("load i32 gm",)),)
    assert scalar_loops(module(LENGTH, BEGIN, *call(1), END)) == (ScalarLoop(256, ("transfer f32 gm",)),)


def test_a_while_loop_has_an_unknown_length() -> None:
    before = ["%2:2 = scf.while (%i = %c0) : (index) -> (index) {", "scf.condition(%true) %i : index", "} do {", "^bb0(%i: index):"]
    assert scalar_loops(module(*before, LOAD, "scf.yield %i : index", "} attributes {pipeline.veconly}")) == (
        ScalarLoop(UNKNOWN, ("load i64 ub",)),
    )


@pytest.mark.parametrize(("elements", "rows"), [(256, True), (64, True), (63, False), (1, False)])
def test_a_loop_over_rows_works_on_a_vector_each_pass(elements: int, rows: bool) -> None:
    [loop] = scalar_loops(module(LENGTH, BEGIN, LOAD, *call(elements), END))
    assert loop.rows == rows


def test_vectors_of_an_inner_loop_count_for_the_outer() -> None:
    inner = ["scf.for %j = %c0 to %c2 step %c1 {", *call(256), "}"]
    assert scalar_loops(module(LENGTH, BEGIN, LOAD, *inner, END)) == (ScalarLoop(256, ("load i64 ub",), rows=True),)


def test_vectors_of_an_outer_loop_do_not_count_for_the_inner() -> None:
    inner = ["scf.for %i = %c0 to %c2 step %c1 {", LOAD, "}"]
    assert scalar_loops(module(LENGTH, BEGIN, *call(256), *inner, END)) == (ScalarLoop(512, ("load i64 ub",)),)


def test_storing_elements_is_no_loop_over_rows() -> None:
    assert [loop.rows for loop in scalar_loops(module(LENGTH, BEGIN, STORE, *call(256), END))] == [False]


def test_rows_of_unknown_number_are_every_kernels() -> None:
    assert scalar_loops(module("scf.for %i = %first to %rows step %programs : i32 {", LOAD, *call(256), "}")) == ()


def test_a_view_of_unknown_size_is_as_large_as_what_it_shows() -> None:
    views = [
        f"%part = memref.subview %all[0] [%m] [1] : memref<4096xf32, {UB}> to memref<?xf32, strided<[1]>, {UB}>",
        f"%cast = memref.cast %part : memref<?xf32, strided<[1]>, {UB}> to memref<?xf32, strided<[?], offset: ?>, {UB}>",
        f"func.call @vexp(%cast) : (memref<?xf32, {UB}>) -> ()",
    ]
    assert [loop.rows for loop in scalar_loops(module(LENGTH, BEGIN, LOAD, *views, END))] == [True]


# What bishengir-compile writes


def buffer(extent: int, *offsets: int) -> dict[str, object]:
    return {"extent": 8 * extent, "offset": list(offsets)}


def test_peaks_are_the_last_ends_in_blocks_of_32_bytes() -> None:
    records: list[dict[str, Any]] = [
        {"scope": "ub", "memory_info_array": [buffer(100, 0, 128), buffer(4, 512)]},
        {"scope": "ub", "memory_info_array": [buffer(64, 0)]},
        {"scope": "cc", "memory_info_array": []},
    ]
    assert bishengir.peaks(records) == {"ub": 544, "cc": 0}


def test_double_buffering_is_lost_by_option_by_note_and_by_sharing() -> None:
    def lost(*buffers: dict[str, object], log: str = "", multibuffer: bool = True) -> str:
        return bishengir.lost_double_buffering(log, [{"scope": "ub", "memory_info_array": buffers}], {"multibuffer": multibuffer})

    apart = (buffer(64, 0, 64), buffer(64, 128, 192), buffer(32, 256), buffer(32, 256))
    assert lost(*apart) == ""
    assert lost(*apart, buffer(64, 0, 64)) == ""  # in place
    assert lost(*apart, buffer(32, 96)) == "1 double-buffered areas share memory with other buffers"
    assert lost(*apart, buffer(64, 64, 128)) == "3 double-buffered areas share memory with other buffers"
    assert lost(*apart, multibuffer=False) == "the option multibuffer is off"
    note = "[NOTE] Ub overflow detected; automatically set enable-auto-multi-buffer to false and retrying compilation."
    assert lost(*apart, log=note) == "the compiler gave it up to fit the memory"


def test_a_log_is_summed_up_without_paths() -> None:
    log = (
        "[NOTE] Ub overflow detected; retrying\nremark\n"
        'loc("folder/of/a/run/kernel.mlir":2:3): error: ub overflow, requires 1589760 bits while 1572864 bits available!\n'
    )
    assert bishengir.summary(log) == "error: ub overflow, requires 1589760 bits while 1572864 bits available!"
    assert bishengir.summary("Killed\n") == "Killed"
    assert bishengir.overflow(log) == Overflow("ub", 198720, 196608)
    assert bishengir.overflow("") is None


def test_functions_that_no_library_has_are_missing() -> None:
    declared = ("vadd_1d_float", "_mlir_ciface_vsub", "vfoo")
    text = "\n".join([*(f"func.func private @{name}(i32)" for name in declared), "func.func @main(i32)"])
    assert bishengir.missing_functions(text, [b"..._mlir_ciface_vadd_1d_float.", b"_mlir_ciface_vsub"]) == ["vfoo"]
    assert bishengir.missing_functions(text, []) == ["_mlir_ciface_vsub", "vadd_1d_float", "vfoo"]


def test_the_stub_answers_and_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    stub = tmp_path / "hivmc"
    stub.write_text(bishengir.STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    assert "hivmc 1.2.0" in subprocess.run([stub, "--version"], capture_output=True, text=True, check=True).stdout
    subprocess.run([stub, "in.mlir", "-o", tmp_path / "out", "--x"], check=True)
    assert (tmp_path / "out").exists()
    assert (tmp_path / "out.o").exists()


def test_options_that_are_not_set_are_no_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bishengir, "package", lambda: tmp_path)
    command = bishengir.command(tmp_path / "a.mlir", "Ascend910B3", {"multibuffer": False, "unit_flag": None, "num_warps": 4})
    assert "--enable-auto-multi-buffer=False" in command
    assert "--target=Ascend910B3" in command
    assert not [argument for argument in command if "unit-flag" in argument or "warps" in argument]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="ascendnpu-ir is not installed"):
        bishengir.package()


# Results and limits


def test_a_result_travels_as_json() -> None:
    result = replace(
        PASSED,
        subject=replace(SUBJECT, loops=(8,), note="why"),
        overflow=Overflow("ub", 2, 1),
        scalar_loops=(ScalarLoop(8, ("load i32 ub",), rows=True),),
        warnings=("w",),
        lost_double_buffering="lost",
    )
    assert Result.from_json(json.loads(json.dumps(asdict(result)))) == result
    assert Result.from_json(json.loads(json.dumps(asdict(PASSED)))) == PASSED


def test_a_result_without_all_stages_is_not_ok() -> None:
    assert violations(PASSED) == []
    cut_short = replace(PASSED, stages={"ttir": Stage(0.1)})
    assert not cut_short.ok
    assert violations(cut_short) == ["no result of linalg, hivm, link"]
    assert violations(replace(PASSED, stages={"ttir": Stage(0.1, "no")})) == ["ttir failed: no"]
    assert violations(replace(PASSED, stages={**PASSED.stages, "link": Stage(0.1, "not in the device library: vfoo")})) == [
        "link failed: not in the device library: vfoo"
    ]


def test_the_limits_are_inclusive() -> None:
    assert violations(replace(PASSED, memory={"ub": 144 * 1024, "cbuf": 512 * 1024})) == []
    assert violations(replace(PASSED, memory={"ub": 144 * 1024 + 32})) == ["144.0 KiB of unified buffer are over the limit of 144"]
    for grid, broken in ((1, 0), (65535, 0), (0, 1), (65536, 1)):
        assert len(violations(replace(PASSED, subject=replace(SUBJECT, grid=grid)))) == broken


def test_declared_loops_must_occur_and_rows_need_no_declaration() -> None:
    declares = replace(SUBJECT, loops=(8,), note="why")
    elements, rows = ScalarLoop(8, ("load i32 ub",)), ScalarLoop(8, ("load i32 ub",), rows=True)
    assert violations(replace(PASSED, scalar_loops=(rows,))) == []
    assert violations(replace(PASSED, scalar_loops=(elements,))) == ["scalar loop that is not declared: 8 elements (load i32 ub)"]
    for loop in (elements, rows):
        assert violations(replace(PASSED, subject=declares, scalar_loops=(loop,))) == []
    assert violations(replace(PASSED, subject=declares)) == ["a scalar loop of 8 trips is declared, and there is none"]
    unknown = replace(SUBJECT, loops=(UNKNOWN,), note="why")
    assert violations(replace(PASSED, subject=unknown)) == ["a scalar loop of unknown length is declared, and there is none"]


# Running, and the document


def test_sources_are_the_files_of_the_folder(tmp_path: Path) -> None:
    for name in ("rope.py", "norm.py", "_common.py", "notes.md"):
        (tmp_path / name).touch()
    assert run.case_sources(tmp_path) == ["tests.kernels.cases.norm", "tests.kernels.cases.rope"]
    assert run.case_sources(tmp_path / "absent") == []


def test_no_cases_are_no_results() -> None:
    assert run.subjects([]) == []
    assert run.compile_cases([]) == []


def test_a_module_that_fails_is_an_error_with_its_traceback() -> None:
    with pytest.raises(run.GateError, match=r"No module named 'tests\.ascend_gate\.absent'"):
        run.subjects(["tests.ascend_gate.absent"])
    with pytest.raises(run.GateError, match=r"cases with the same name: \('samples', 'vectors'\)"):
        run.subjects(["tests.ascend_gate.samples", "tests.ascend_gate.samples"])


def test_an_environment_that_cannot_be_built_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> Path:
        raise subprocess.CalledProcessError(1, ["pip", name])

    monkeypatch.setattr("tools.environment.python_of", fails)
    with pytest.raises(run.GateError, match="the ascend environment cannot be built"):
        run.subjects([])


def test_triton_compiles_even_where_this_process_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    [result] = run.compile_cases(["tests.ascend_gate.samples"], ["Ascend910B3"], only="samples: vectors")
    assert violations(result) == []
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_the_command_line_tells_what_fails(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tests.ascend_gate.samples", "tests.ascend_gate.samples:broken", "--soc", "Ascend910B3", "-k", "option"]
    with pytest.raises(SystemExit, match="1"):
        run.main(arguments)
    out = capsys.readouterr().out
    assert "FAIL Ascend910B3     samples.broken: unknown option" in out
    assert "triton-ascend has no option num_wraps" in out
    assert out.endswith("0 passed, 1 failed\n")


def test_the_document_has_a_row_for_each_case() -> None:
    rows = ScalarLoop(8, ("load i32 gm",), rows=True)
    noted = replace(PASSED, subject=replace(SUBJECT, name="a|b", note="why"), scalar_loops=(rows, ScalarLoop(UNKNOWN, ("load i32 gm",))))
    other = replace(PASSED, subject=replace(SUBJECT, family="glu", name="swiglu"), memory={"cbuf": 1024}, warnings=("w",))
    failed = replace(PASSED, subject=replace(SUBJECT, name="bad"), stages={})
    text = document([PASSED, noted, other, failed, *(replace(result, soc="Ascend910_9382") for result in (PASSED, noted))])
    assert text.index("## glu") < text.index("## norm")
    assert "| `rms_norm_kernel` | rms_norm 4096 | 64.0 | 64.0 |  |  |" in text
    assert "| `rms_norm_kernel` | a\\|b | 64.0 | 64.0 | 8 rows, unknown elements | why |" in text
    assert "| `rms_norm_kernel` | swiglu | 0.0, L1 1.0 |  |  | w |" in text
    assert "| `rms_norm_kernel` | bad | fails |" in text
    assert document([]).endswith("No kernel has landed yet.\n")


PROGRAM = """
import os, signal, sys
from tests.ascend_gate.processes import run_isolated

def work(job):
    if job == "dies": os.kill(os.getpid(), signal.SIGSEGV)
    if job == "leaves": os._exit(3)
    if job == "raises": raise OSError("no")
    return job.upper()

def died(job, how):
    lines = how.splitlines()
    return f"{job}: {lines[0]} {lines[-1] if len(lines) > 1 else ''}".strip()

print(run_isolated(work, sys.argv[2:], int(sys.argv[1]), died))
"""


@pytest.mark.parametrize("processes", [1, 3])
def test_a_process_that_dies_costs_one_job(processes: int) -> None:
    """In a program of its own: torch has threads, beside which one does not fork."""
    command = [sys.executable, "-c", PROGRAM, str(processes), "a", "dies", "b", "leaves", "raises"]
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, check=True)
    expected = ["A", "dies: the process died: SIGSEGV", "B", "leaves: the process died: exit status 3"]
    expected.append("raises: the process raised: OSError: no")
    assert done.stdout == f"{expected}\n"
