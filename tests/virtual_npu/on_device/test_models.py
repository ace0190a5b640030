"""Whole models on the virtual NPU: they compile for it, run through torch_npu's own ops, and are captured and replayed.

Numbers mean nothing there: kernels compute nothing. What is checked is that torch_npu takes every call, with its shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import npu_fusion
from benchmarks.launches import Case, capture
from tests.models import zoo
from tests.models.configs import VOCABULARY
from tests.virtual_npu.launches import Trace

pytestmark = pytest.mark.npu_process("models")

BATCH, SEQUENCE = 2, 8
MODELS = {"llama": torch.float16, "phi3": torch.float16, "deepseek_v2": torch.bfloat16, "qwen3_moe": torch.bfloat16}


def on_npu(name: str, attention: str = "sdpa") -> nn.Module:
    return zoo.build(name, MODELS[name], attention).npu()


def run_twice(model: nn.Module, inputs: dict[str, Any], **options: Any) -> npu_fusion.FusionReport:
    """Runs the compiled model and checks what it returns."""
    compiled = torch.compile(model, backend="npu_fusion", options=options, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            logits = compiled(**inputs).logits
            assert logits.shape == (*inputs["input_ids"].shape, VOCABULARY)
            assert (logits.dtype, logits.device.type) == (next(model.parameters()).dtype, "npu")
    torch.npu.synchronize()
    return npu_fusion.report(compiled)


def tokens(batch: int = BATCH, length: int = SEQUENCE) -> torch.Tensor:
    return torch.full((batch, length), zoo.FIRST_TOKEN, device="npu")


@pytest.mark.parametrize("name", ["llama", "deepseek_v2", "qwen3_moe"])
def test_prefill_runs(name: str) -> None:
    report = run_twice(on_npu(name), {"input_ids": tokens(), "use_cache": False})
    assert report.effective_config.target == "ascend910b"
    assert {"rms_norm", "residual_add", "rope", "glu", "attention"} <= set(report.idioms)
    assert not [note for note in report.notes if "failed" in note]


@pytest.mark.parametrize("name", MODELS)
def test_decode_step_is_captured_and_replayed(name: str, traced: Callable[[], Trace]) -> None:
    model = on_npu(name)
    inputs = zoo.decode_inputs(model, BATCH, SEQUENCE)
    traced()
    report = run_twice(model, inputs, executor="graph")
    assert report.effective_config.executor == "graph", report.notes
    # The position of a sliding cache is a number on the host: another step is another graph, and none runs twice.
    sliding = name == "phi3"
    assert report.idioms["kv_update"] == (8 if sliding else 4)
    graphs = traced().captured
    assert [graph.replays for graph in graphs] == ([] if sliding else [1])
    assert all(any("RmsNorm" in kernel for kernel in graph.launches) for graph in graphs)


def test_sizes_may_vary() -> None:
    """With attention written out: torch_npu's kernel for SDPA reads sizes as plain numbers, and fixes them while Dynamo traces."""
    model = on_npu("llama", "eager")
    compiled = torch.compile(model, backend="npu_fusion", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 8), (3, 17)):
            logits = compiled(input_ids=tokens(batch, length), use_cache=False).logits
            assert logits.shape == (batch, length, VOCABULARY)
    assert len(npu_fusion.report(compiled).records) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_layers_of_llama_are_at_most_45_launches(attention: str, traced: Callable[[], Trace]) -> None:
    """npugraph_ex captures 124 of them with SDPA, and 137 with attention written out."""
    capture(Case("demo", "prefill", attention, "npu_fusion graph"))
    launches = traced().last_graph
    assert launches.total() <= 45, launches


def test_a_decode_step_is_at_most_a_third_of_the_launches(traced: Callable[[], Trace]) -> None:
    capture(Case("demo", "decode", "sdpa", "plain"))
    plain = traced().last_graph.total()
    capture(Case("demo", "decode", "sdpa", "npu_fusion graph"))
    fused = traced().last_graph
    assert 3 * fused.total() <= plain, fused
