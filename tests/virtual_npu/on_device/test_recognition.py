"""What is recognised in a graph traced on an NPU is what is recognised in one traced on the CPU, site by site, though the graphs differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import npu_fusion
from npu_fusion.report import FusionReport
from tests.models import zoo

pytestmark = pytest.mark.npu_process("models")

BATCH, SEQUENCE = 2, 8
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CELLS = """
llama-sdpa-fp16-static-prefill    qwen3-sdpa-bf16-static-decode     gemma3_text-eager-bf16-static-decode  gpt_neox-eager-fp16-static-prefill
gpt_oss-eager-bf16-static-prefill qwen3_next-sdpa-bf16-static-prefill deepseek_v3-sdpa-fp16-static-decode
""".split()


class Place(NamedTuple):
    """What a site is, apart from the names of nodes."""

    idiom: str
    fused: bool
    op: str | None
    lowered_to: str | None
    reason: str | None
    source: str | None
    module: str | None


def places(report: FusionReport) -> Counter[Place]:
    return Counter(Place(*(getattr(site, name) for name in Place._fields)) for site in report.sites)


def explained(cell: str, device: str) -> FusionReport:
    name, attention, dtype, shapes, phase = cell.split("-")
    model = zoo.build(name, DTYPES[dtype], attention).to(device)
    inputs: dict[str, Any] = {"input_ids": torch.full((BATCH, SEQUENCE), zoo.FIRST_TOKEN, device=device), "use_cache": False}
    if phase == "decode":
        inputs = zoo.decode_inputs(model, BATCH, SEQUENCE)
    report = npu_fusion.explain(model, dynamic=shapes == "dynamic", config={"target": "ascend910b"}, **inputs)
    torch.compiler.reset()
    return report


@pytest.mark.parametrize("cell", CELLS)
def test_models_fuse_as_they_do_on_the_cpu(cell: str) -> None:
    cpu, npu = (explained(cell, device) for device in ("cpu", "npu"))
    assert npu.idioms
    assert places(npu) == places(cpu)
    assert npu.notes == cpu.notes  # merged weights among them
    assert npu.ops == cpu.ops


def traced_on(device: str, fn: Callable[..., Tensor], *inputs: Tensor) -> FusionReport:
    report = npu_fusion.explain(fn, *(x.to(device) for x in inputs), config={"target": "ascend910b"})
    torch.compiler.reset()
    return report


@pytest.mark.parametrize("dim", [1, -1, None])
def test_repeat_interleave_is_an_expansion(dim: int | None) -> None:
    """It stays whole on an NPU: the heads of grouped attention are seen through it, and a dimension that is not theirs is not."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = (query.shape[0], query.shape[1], *key.shape[2:])
        key, value = (x.repeat_interleave(2, dim=dim).reshape(shape) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    query, key = torch.zeros(2, 4, 8, 16, dtype=torch.float16), torch.zeros(2, 2, 8, 16, dtype=torch.float16)
    cpu, npu = (traced_on(device, attend, query, key, key) for device in ("cpu", "npu"))
    assert places(npu) == places(cpu)
    calls = npu.graph("fused").graph.find_nodes(op="call_function", target=torch.ops.npu_fusion.attention.default)
    assert [call.args[1].meta["val"].shape[1] for call in calls] == [2 if dim == 1 else 4]


def masked(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    return torch.ops.npu.npu_fusion_attention_v3(query, key, key, 4, "BNSD", atten_mask=mask, scale=0.25)[0]


def causal(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    future = torch.ones(2048, 2048, dtype=torch.bool, device=query.device).triu(1)
    return torch.ops.npu.npu_fusion_attention_v3(query, key, key, 4, "BNSD", atten_mask=future, scale=0.25, sparse_mode=2)[0]


def sequence_first(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Another layout is left to torch_npu."""
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    return torch.ops.npu.npu_fusion_attention_v3(query, key, key, 4, "BSND", scale=0.25)[0]


def unknown_mask(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """A mask that the graph is given is not known to be that of the future."""
    return torch.ops.npu.npu_fusion_attention_v3(query, key, key, 4, "BNSD", atten_mask=mask, scale=0.25, sparse_mode=2)[0]


def banded(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    return torch.ops.npu.npu_fusion_attention_v3(query, key, key, 4, "BNSD", atten_mask=mask, scale=0.25, pre_tockens=4)[0]


def with_statistics(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    attended, largest, *_ = torch.ops.npu.npu_fusion_attention_v3(query, key, key, 4, "BNSD", scale=0.25)
    return attended + largest[..., :1]


@pytest.mark.parametrize(
    ("call", "fused"),
    [(masked, 1), (causal, 1), (sequence_first, 0), (unknown_mask, 0), (banded, 0), (with_statistics, 0)],
)
def test_attention_of_torch_npu_is_attention(call: Callable[..., Tensor], fused: int) -> None:
    """Where the call says no more than scaled_dot_product_attention does."""
    query, key = torch.zeros(2, 4, 8, 16, dtype=torch.float16), torch.zeros(2, 2, 8, 16, dtype=torch.float16)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    assert traced_on("npu", call, query, key, mask).ops["attention"] == fused
