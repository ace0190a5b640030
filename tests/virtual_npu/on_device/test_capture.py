"""NPU graphs of our own: captured once, replayed, updated; caches in place, memory shared and flat."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import npu_fusion
from tests.virtual_npu.launches import Trace

Traced = Callable[[], Trace]


def compiled(fn: Any, dynamic: bool = False, **options: Any) -> Callable[..., Any]:
    run = torch.compile(fn, backend="npu_fusion", dynamic=dynamic, fullgraph=True, options={"executor": "graph", **options})

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return run(*args, **kwargs)

    call.run = run  # type: ignore[attr-defined]
    return call


@pytest.fixture
def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, max_position_embeddings=64)).half().eval().npu()


def test_a_prompt_is_captured_and_replayed(llama: LlamaForCausalLM, traced: Traced) -> None:
    run = compiled(llama)
    tokens = torch.zeros(2, 8, dtype=torch.long).npu()
    for _ in range(4):
        run(tokens, use_cache=False)
    [captured] = traced().captured
    assert captured.replays == 3
    assert captured.launches["aclnnMatmul"] >= 9, "o, down and lm_head, and the inputs of each layer"
    report = npu_fusion.report(run.run)  # type: ignore[attr-defined]
    assert report.effective_config.executor == "graph"
    assert not any("eager" in note for note in report.notes)


def test_decoding_into_a_static_cache_is_one_capture(llama: LlamaForCausalLM, traced: Traced) -> None:
    run = compiled(llama)
    cache = StaticCache(config=llama.config, max_cache_len=32)
    with torch.no_grad():
        llama(torch.zeros(2, 8, dtype=torch.long).npu(), past_key_values=cache)
    traced()
    for _ in range(6):
        run(torch.zeros(2, 1, dtype=torch.long).npu(), past_key_values=cache)
    [captured] = traced().captured
    assert captured.replays == 5
    npu_fusion.report(run.run).expect(kv_update=4)  # type: ignore[attr-defined]


def test_a_cache_is_written_where_it_lies(traced: Traced) -> None:
    """Its address belongs to the capture, and only the other input is copied before a replay."""

    def write(cache: Tensor, x: Tensor) -> Tensor:
        cache[1:2].copy_(x)
        return cache * 2

    run = compiled(write)
    caches = [torch.zeros(3, 4).npu() for _ in range(2)]
    for cache in caches * 2:
        run(cache, torch.ones(1, 4).npu())
    trace = traced()
    assert [captured.replays for captured in trace.captured] == [1, 1]
    run(caches[0], torch.ones(1, 4).npu())
    again = traced()
    assert again.captured == []
    assert again.total["aclnnInplaceCopy"] == 2, "the input and the result"


def test_lengths_change_and_one_capture_is_updated(traced: Traced) -> None:
    """The lists that FIA reads on the host, one of them computed, over two layers."""
    query, cache = torch.zeros(2, 4, 1, 64, dtype=torch.float16).npu(), torch.zeros(2, 4, 16, 64, dtype=torch.float16).npu()

    def step(query: Tensor, key: Tensor, value: Tensor, first: int, second: int) -> tuple[Tensor, int]:
        for _ in range(2):
            query, _ = torch.ops.npu.npu_fused_infer_attention_score_v2(
                query * 2, key, value, actual_seq_kvlen=[first, second + 1], num_query_heads=4, input_layout="BNSD", softmax_scale=0.125
            )
        return query, second + 1

    run = compiled(step, dynamic=True)
    for first, second in ((3, 5), (4, 6), (4, 6), (7, 9), (8, 10), (9, 11)):
        out, length = run(query, cache, cache, first, second)
        assert out.shape == query.shape
        assert length == second + 1
    [captured] = traced().captured
    assert captured.task_groups == 2
    assert captured.replays == 5
    assert captured.updates == 2 * 3, "two layers, three changes after the capture"


def test_intermediate_results_of_all_captures_lie_in_the_same_memory() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.relu(x.repeat(1024) * 2).view(1024, -1).sum(0)

    run = compiled(fn, dynamic=True)
    sizes = [4096 - 64 * i for i in range(6)]
    reserved = []
    for size in sizes:
        for _ in range(2):
            run(torch.zeros(size).npu())
        torch.npu.empty_cache()
        reserved.append(torch.npu.memory_reserved())
    assert max(reserved[1:]) - reserved[0] < 2 * 4 * sizes[0] * 1024, reserved


def test_memory_is_flat_over_replays() -> None:
    run = compiled(lambda x: torch.relu(x) + 1)
    x = torch.zeros(1024).npu()
    for _ in range(3):
        run(x)
    before = torch.npu.memory_allocated()
    for _ in range(200):
        run(x)
    assert torch.npu.memory_allocated() == before


def test_a_cache_is_freed_by_its_owner() -> None:
    def write(cache: Tensor, x: Tensor) -> Tensor:
        cache.add_(x)
        return cache[0] * 2

    run = compiled(write)
    cache = torch.zeros(256, 1024).npu()
    for _ in range(3):
        run(cache, torch.zeros(1024).npu())
    gc.collect()
    before = torch.npu.memory_allocated()
    del cache
    gc.collect()
    assert before - torch.npu.memory_allocated() >= 256 * 1024 * 4


def test_under_an_outer_capture_launches_belong_to_that(traced: Traced) -> None:
    run = compiled(torch.sigmoid)
    x = torch.zeros(8).npu()
    for _ in range(2):
        run(x)
    traced()
    outer = torch.npu.NPUGraph()
    with torch.npu.graph(outer):
        run(x)
    trace = traced()
    assert trace.last_graph["aclnnSigmoid"] == 1
    assert len(trace.captured) == 1


def test_what_cannot_be_captured_runs_eagerly_and_is_named(traced: Traced) -> None:
    def fn(x: Tensor) -> Tensor:
        return x * torch.argmax(x).item()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        run = compiled(fn)
        for _ in range(3):
            run(torch.zeros(4).npu())
    assert traced().captured == []
    report = npu_fusion.report(run.run)  # type: ignore[attr-defined]
    assert report.effective_config.executor == "eager"
    (note,) = [note for note in report.notes if note.startswith("executor eager in place of graph")]
    assert "aten._local_scalar_dense.default) reads a value back to the host, at" in note
    assert "test_capture.py:" in note
