"""The virtual NPU itself: what torch_npu is told of devices and memory, and what a trace holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.virtual_npu.launches import Trace


def test_torch_npu_finds_the_device() -> None:
    assert torch.npu.is_available()
    assert torch.npu.device_count() == 1
    assert torch.npu.get_device_name() == "Ascend910B3"
    assert torch.npu.get_device_properties(0).total_memory == 64 * 2**30


def test_copies_are_real_and_kernels_only_traced(traced: Callable[[], Trace]) -> None:
    x = torch.arange(6.0).npu()
    assert x.cpu().tolist() == [0, 1, 2, 3, 4, 5]
    y = torch.nn.functional.silu(x)
    assert y.device.type == "npu"
    assert y.shape == x.shape
    assert traced().total["aclnnSilu"] == 1
    assert traced().total.total() == 0


def test_a_captured_graph_holds_its_launches_and_replays_are_counted(traced: Callable[[], Trace]) -> None:
    x, graph = torch.zeros(4, 4).npu(), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        torch.sigmoid(x @ x)
    graph.replay()
    graph.replay()
    trace = traced()
    assert trace.last_graph == {"aclnnMatmul": 1, "aclnnSigmoid": 1}
    assert [captured.replays for captured in trace.captured] == [2]


def test_task_groups_are_updated_without_a_new_capture(traced: Callable[[], Trace]) -> None:
    query, key = torch.zeros(1, 2, 1, 16, dtype=torch.float16).npu(), torch.zeros(1, 2, 32, 16, dtype=torch.float16).npu()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        torch.ops.npu.npu_fused_infer_attention_score(query, key, key, num_heads=2, input_layout="BNSD", actual_seq_lengths_kv=[8])
    for length in (9, 10):
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [length]}])
        graph.replay()
    [captured] = traced().captured
    assert (captured.task_groups, captured.updates, captured.replays) == (1, 2, 2)


def test_a_result_that_depends_on_values_is_as_large_as_it_can_be() -> None:
    x = torch.arange(6.0).reshape(2, 3).npu()
    assert torch.nonzero(x).shape == (6, 2)
    assert x[x > 3].shape == (6,)


def test_what_is_not_simulated_says_so() -> None:
    import torch_npu

    rows, cache = torch.zeros(4, 2, 16, dtype=torch.float16).npu(), torch.zeros(2, 128, 2, 16, dtype=torch.float16).npu()
    with pytest.raises(RuntimeError, match=r"HCCL, ATB .* and the graph engine .* are not simulated"):
        torch_npu._npu_reshape_and_cache(rows, rows, cache, cache, torch.zeros(4, dtype=torch.int32).npu())
