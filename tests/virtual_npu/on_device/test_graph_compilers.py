"""npugraph_ex and torchair as executors, and npugraph_ex as a backend whose users get our fusion by a hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import npu_fusion
from npu_fusion.lowerings.ascend.graph_compilers import npugraph_ex_options
from tests.blocks import Block
from tests.virtual_npu.launches import Trace

Traced = Callable[[], Trace]
EXECUTORS: dict[str, dict[str, Any]] = {
    "npugraph_ex": {"executor": "npugraph_ex"},
    "torchair": {"executor": "torchair", "executor_options": {"mode": "reduce-overhead"}},
}


def compiled(fn: Any, executor: str, dynamic: bool = False) -> Any:
    return torch.compile(fn, backend="npu_fusion", dynamic=dynamic, fullgraph=True, options=EXECUTORS[executor])


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("executor", EXECUTORS)
def test_decoding_into_a_static_cache(executor: str, traced: Traced) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, max_position_embeddings=64)).half().eval().npu()
    run = compiled(llama, executor)
    cache = StaticCache(config=llama.config, max_cache_len=32)
    llama(torch.zeros(2, 8, dtype=torch.long).npu(), past_key_values=cache)
    traced()
    for _ in range(4):
        run(torch.zeros(2, 1, dtype=torch.long).npu(), past_key_values=cache)
    [captured] = traced().captured
    assert captured.replays == 4
    report = npu_fusion.report(run)
    assert report.effective_config.executor == executor
    report.expect(rms_norm=5, residual_add=4, attention=2, rope=4)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_cache_is_written_where_it_lies_through_a_view(executor: str, traced: Traced) -> None:
    """Its address belongs to the capture: another cache is another capture. A copy of the cache would be written by one."""

    def write(cache: Tensor, x: Tensor) -> Tensor:
        cache[1:2].copy_(x)
        return cache * 2

    run = compiled(write, executor)
    caches = [torch.zeros(3, 4).npu() for _ in range(2)]
    for cache in caches * 2:
        run(cache, torch.ones(1, 4).npu())
    assert [captured.replays for captured in traced().captured] == [2, 2]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_results_are_not_in_the_graphs_memory(executor: str) -> None:
    run = compiled(torch.relu, executor)
    x = torch.zeros(8).npu()
    run(x)
    first, second = run(x), run(x)
    assert first.data_ptr() != second.data_ptr()


def test_lengths_change_and_one_capture_is_updated(traced: Traced) -> None:
    query, cache = torch.zeros(2, 4, 1, 64, dtype=torch.float16).npu(), torch.zeros(2, 4, 16, 64, dtype=torch.float16).npu()

    def step(query: Tensor, key: Tensor, value: Tensor, first: int, second: int) -> tuple[Tensor, int]:
        for _ in range(2):
            query, _ = torch.ops.npu.npu_fused_infer_attention_score_v2(
                query * 2, key, value, actual_seq_kvlen=[first, second + 1], num_query_heads=4, input_layout="BNSD", softmax_scale=0.125
            )
        return query, second + 1

    run = compiled(step, "npugraph_ex", dynamic=True)
    for first, second in ((3, 5), (4, 6), (7, 9), (8, 10)):
        out, length = run(query, cache, cache, first, second)
        assert out.shape == query.shape
        assert length == second + 1
    [captured] = traced().captured
    assert captured.task_groups == 2
    assert captured.replays == 4
    assert captured.updates == 2 * 4


def test_users_keep_their_backend_and_their_pass(traced: Traced) -> None:
    seen: list[int] = []

    def mine(gm: Any, inputs: Any, config: Any) -> None:
        seen.append(len(gm.graph.nodes))

    options = npugraph_ex_options(base={"post_grad_custom_pre_pass": mine, "clone_output": True})
    assert options["clone_output"] is True
    run = torch.compile(Block(64).half().eval().npu(), backend="npugraph_ex", dynamic=False, options=options)
    for _ in range(3):
        run(torch.zeros(2, 8, 64, dtype=torch.float16).npu())
    [captured] = traced().captured
    assert captured.replays == 3
    assert captured.launches["aclnnRmsNorm"] == 1
    assert len(seen) == 1
    report = npu_fusion.report(run)
    assert report.effective_config.executor == "npugraph_ex"
    report.expect(rms_norm=1, glu=1)
    assert all(not str(node.target).startswith("npu_fusion.") for node in report.graph("lowered").graph.nodes), "references are expanded"


def test_unknown_options_are_errors() -> None:
    for executor, options in (("npugraph_ex", {"clone_outptu": True}), ("torchair", {"debug.nothing": True})):
        run = torch.compile(torch.relu, backend="npu_fusion", options={"executor": executor, "executor_options": options})
        with pytest.raises(Exception, match=f"ConfigError: {executor}: "):
            run(torch.zeros(4).npu())
        torch.compiler.reset()


def test_inductor_says_what_it_needs() -> None:
    run = torch.compile(torch.relu, backend="npu_fusion", options={"executor": "inductor"})
    with pytest.raises(Exception, match="ConfigError: executor 'inductor' on an NPU needs triton-ascend, which is not installed here"):
        run(torch.zeros(4).npu())
