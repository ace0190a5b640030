"""MLA before the attention, quantised, on the virtual NPU: one captured launch of the real torch_npu's op, with weights in its format."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import npu_fusion
from tests.models import deepseek_w8a8
from tests.virtual_npu.launches import Trace

BATCH = 2
PROLOG, WRITES = "aclnnMlaPrologV3WeightNz", ("aclnnIndexCopy", "aclnnScatterNdUpdate", "aclnnScatterPaKvCache")


def test_a_decode_step_captures_one_launch_a_layer(traced: Callable[[], Trace]) -> None:
    model = deepseek_w8a8.build(layers=1, width=256).to("npu")
    model.store_inputs_first()
    inputs = deepseek_w8a8.inputs(model, BATCH)
    compiled = torch.compile(model, backend="npu_fusion", options={"executor": "graph"}, fullgraph=True, dynamic=False)
    traced()
    with torch.no_grad():
        for _ in range(2):
            assert compiled(**inputs).shape == inputs["x"].shape
    report = npu_fusion.report(compiled)
    assert report.effective_config.executor == "graph", report.notes
    launches = traced().last_graph
    assert launches[PROLOG] == 1
    assert not [name for name in WRITES if launches[name]]


def test_weights_in_another_format_are_left_to_the_parts() -> None:
    model = deepseek_w8a8.build(layers=1, width=256).to("npu")  # the layout survives the move to the device, the format is not there yet
    report = npu_fusion.explain(model, **deepseek_w8a8.inputs(model, BATCH))
    assert not report.ops["mla_preprocess"]
    [missed] = [site for site in report.missed if site.idiom == "mla"]
    assert "store_inputs_first" in str(missed.reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_parameter_is_stored_in_the_format(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 128, dtype=dtype, device="npu"), requires_grad=False)
    npu_fusion.store_inputs_first([weight])
    assert weight.shape == (64, 128)
    assert weight.stride() == (1, 64)
    assert int(torch.ops.npu.get_npu_format(weight)) == 29
