"""Whole models lowered for CUDA, on a CPU: every semantic op by a Triton kernel, in Triton's interpreter."""

from __future__ import annotations

import pytest

from benchmarks.coverage import Cell, measure

CELLS = [
    Cell("qwen3", "fp32", "static", "decode", "sdpa", "cuda"),
    Cell("gemma3_text", "fp32", "dynamic", "decode", "eager", "cuda"),
]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_models_run_by_triton(cell: Cell) -> None:
    result = measure(cell)
    assert result.status == "ok", result.detail
    taken = {op: set(providers) for op, providers in result.lowered.items() if op not in ("kv_update", "bmm_transpose")}
    assert taken
    assert {name.partition(".")[0] for names in taken.values() for name in names} == {"triton"}, (taken, result.passed_over)
