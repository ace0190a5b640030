"""Whole models through the compiler: a fixed core that must fuse completely, and a sample of the zoo that changes every day.

Also the driver of benchmarks/coverage.py: what it makes of workers that die or hang, and what it writes.
"""

from __future__ import annotations

import datetime
import io
import itertools
import json
import os
import random
import sys
from pathlib import Path

import pytest

from benchmarks import coverage
from benchmarks.coverage import Cell, Result, State, measure, run_cells
from benchmarks.coverage_table import UNRECOGNISED, columns_of, counts, document
from tests.models import zoo

# Every value of every axis is there, on models that differ in their norms, layers and caches.
CORE = [
    Cell("llama", "fp32", "static", "prefill", "sdpa"),
    Cell("qwen3", "bf16", "static", "decode", "sdpa"),
    Cell("gemma3_text", "bf16", "dynamic", "decode", "eager"),
    Cell("mixtral", "bf16", "dynamic", "prefill", "sdpa"),
]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CORE, ids=str)
def test_core_models_fuse_completely(cell: Cell) -> None:
    result = measure(cell)
    assert result.status == "ok", result.detail
    columns = columns_of([result])
    assert len(columns) >= 5
    for column in columns:
        covered, executed = counts([result], column)
        assert covered == executed, f"{column}: {result.reasons}"


def _sample(size: int) -> list[Cell]:
    """Some cells of the zoo, others every day; NPU_FUSION_SAMPLE_SEED repeats those of another day (its ordinal is in the test's name)."""
    seed = int(os.environ.get("NPU_FUSION_SAMPLE_SEED") or datetime.date.today().toordinal())
    generator = random.Random(seed)
    axes = list(itertools.product(coverage.DTYPES, coverage.SHAPES, coverage.PHASES, coverage.ATTENTION))
    return [Cell(name, *generator.choice(axes)) for name in generator.sample(zoo.architectures(), size)]


@pytest.mark.slow
@pytest.mark.parametrize("cell", _sample(2), ids=str)
def test_sampled_models_compute_the_same(cell: Cell) -> None:
    result = measure(cell)
    assert result.status in ("ok", "absent", "eager"), result.detail


LLAMA = [Cell("llama", "bf16", "static", phase, "sdpa") for phase in coverage.PHASES]


def _worker(tmp_path: Path, body: str) -> list[str]:
    """The command of a worker that answers each cell with `ok`, after running `body` with the cell's index in `index`."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for index, line in enumerate(sys.stdin.read().splitlines()):\n"
        f"    {body}\n"
        "    print(json.dumps({**json.loads(line), 'status': 'ok'}), flush=True)\n"
    )
    return [sys.executable, str(script)]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("index or os.kill(os.getpid(), 9)", "the process died: SIGKILL"),
        ("index or sys.exit(3)", "the process died: exit status 3"),
        ("index or time.sleep(60)", "took more than 1 s"),
    ],
)
def test_a_worker_that_fails_costs_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, detail: str) -> None:
    """The first cell of every worker fails, so each of the two cells needs a worker and neither holds up the other."""
    monkeypatch.setattr(coverage, "WORKER", _worker(tmp_path, body))
    results = list(run_cells(LLAMA, "code", timeout=1.0))
    assert [(result.cell, result.status, result.detail) for result in results] == [(cell, "failed", detail) for cell in LLAMA]


def test_results_come_in_order_from_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "WORKER", _worker(tmp_path, "open('started', 'a').write('x') if not index else None"))
    monkeypatch.chdir(tmp_path)
    assert [(result.cell, result.status) for result in run_cells(LLAMA, "code", timeout=30.0)] == [(cell, "ok") for cell in LLAMA]
    assert (tmp_path / "started").read_text() == "x"


def test_state_resumes_and_forgets_results_of_other_code(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.jsonl"
    first = State(path, "a")
    first.add(Result(LLAMA[0], "a", "failed", "the process died"))
    first.add(Result(LLAMA[0], "a", "ok", executed={"rope": 4}))
    assert State(path, "a").results == {LLAMA[0]: Result(LLAMA[0], "a", "ok", executed={"rope": 4})}
    assert State(path, "b").results == {}
    assert len(path.read_text().splitlines()) == 2


def test_what_a_model_cannot_do_is_a_status() -> None:
    assert measure(Cell("mamba", "fp32", "static", "prefill", "sdpa")).status == "absent"
    failed = measure(Cell("xlnet", "bf16", "static", "prefill", "eager"))
    assert failed.status == "eager"
    assert "BFloat16" in failed.detail


def test_document_counts_sites_once_and_gives_every_miss_a_reason() -> None:
    good = Result(LLAMA[0], "", "ok", executed={"rms_norm": 4, "gated_rms_norm": 1}, covered={"rms_norm": 9}, error=0.01, allowed=0.02)
    bad = Result(LLAMA[1], "", "wrong", "error 3", executed={"rms_norm": 5, "rope": 4}, covered={"rms_norm": 2}, error=0.04, allowed=0.02)
    bad.reasons = {"rms_norm": {"eps is a | tensor": 2}}
    assert counts([good, bad], "RMSNorm") == (7, 10)
    text = document([good, bad])
    assert "| RMSNorm | 7 | 10 | 70.0% | 98% |" in text
    assert "| RMSNorm | eps is a \\| tensor | 2 | llama |" in text
    assert f"| RMSNorm | {UNRECOGNISED} | 1 | llama |" in text
    assert f"| RoPE | {UNRECOGNISED} | 4 | llama |" in text
    assert "| RMSNorm | llama | 4 |" in text  # nine claimed where five were executed
    assert "| llama | wrong | bf16/static/decode/sdpa | error 3 |" in text
    assert "| llama | 2 | 7/10 | 0/4 | 2.00 |" in text


def test_a_producer_is_measured_against_eager() -> None:
    result = measure(Cell("AWQ by hand", "fp32", "static", "decode", "none"))
    assert (result.status, result.error) == ("ok", pytest.approx(0, abs=1e-6))
    for column in columns_of([result]):
        covered, executed = counts([result], column)
        assert covered == executed, column
    assert "| AWQ by hand | 1 | 1/1 | 1/1 | 1/1 | 3/3 | 3/3 |" in document([result], "quantised")


def test_worker_keeps_what_models_print_out_of_its_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:

    def noisy(cell: Cell, code: str) -> Result:
        sys.stdout.write("a model talks\n")
        return Result(cell, code, "ok")

    monkeypatch.setattr(coverage, "measure", noisy)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"cell": vars(LLAMA[0]), "code": "c"}) + "\n"))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # work() moves it
    coverage.work()
    captured = capsys.readouterr()
    assert Result.from_json(captured.out).status == "ok"
    assert captured.err == "a model talks\n"
