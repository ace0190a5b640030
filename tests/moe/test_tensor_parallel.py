"""Tensor-parallel models on two ranks, lowered for Ascend, equal the model of one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import npu_fusion
from npu_fusion.ops.tensor_parallel import all_gather_linear, linear_all_reduce, linear_reduce_scatter
from tests.tensor_parallel import WORLD, all_gathered, all_reduced, calls_of, fused_graph, reduce_scattered

from .ranks import Ranks

pytestmark = [pytest.mark.xdist_group("moe"), pytest.mark.filterwarnings("ignore:.*is deprecated")]

M, K, N = 6, 512, 32


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def the_ops_and_their_lowerings() -> None:
    """Both ranks know everything; each takes its part."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, weight, bias = torch.randn(M, K).bfloat16(), (torch.randn(K, N) / K**0.5).bfloat16(), torch.randn(N).bfloat16()
    columns, tokens = slice(rank * K // ranks, (rank + 1) * K // ranks), slice(rank * M // ranks, (rank + 1) * M // ranks)
    mine, part, shard = x[:, columns].contiguous(), weight[columns], x[tokens].contiguous()
    whole = x.double() @ weight.double()
    for y, expected in (
        (linear_all_reduce(mine, part, group=WORLD), whole),
        (linear_all_reduce(mine, part, bias / 2, group=WORLD), whole + bias.double()),
        (linear_reduce_scatter(mine, part, group=WORLD, ranks=ranks), whole[tokens]),
        (all_gather_linear(shard, weight, bias, group=WORLD, ranks=ranks)[0], whole + bias.double()),
    ):
        assert relative(y, expected) < 1e-2
    assert torch.equal(all_gather_linear(shard, weight, group=WORLD, ranks=ranks)[1], x)
    for fn, given, expected in (
        (lambda x, w, b: all_reduced(F.linear(x, w.t(), b / 2)), (mine, part, bias), whole + bias.double()),
        (lambda x, w: reduce_scattered(x @ w), (mine, part), whole[tokens]),
        (lambda x, w: all_gathered(x) @ w, (shard, weight), whole),
    ):
        gm, record = fused_graph(fn, *given)
        assert all(site.fused for site in record.sites)
        assert relative(gm(*given), expected) < 1e-2


def a_llama_by_its_own_plan() -> list[str]:
    import transformers as t
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    config = t.LlamaConfig(
        vocab_size=64, hidden_size=K, intermediate_size=2 * K, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=1,
        max_position_embeddings=64,
    )  # fmt: skip
    alone = t.LlamaForCausalLM(config).bfloat16().eval()
    parallel = copy.deepcopy(alone)
    plan: dict[str, str] = {}
    for pattern, style in config.base_model_tp_plan.items():
        name = f"model.{pattern.replace('*', '0')}"
        plan |= {name: style, f"{name}.weight": style}
    apply_tensor_parallelism(parallel, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)), plan)
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    options: Any = {"target": "ascend910b", "emulate": True}
    compiled = torch.compile(parallel, backend="npu_fusion", fullgraph=True, options=options)
    with torch.no_grad():
        assert relative(compiled(ids, use_cache=False).logits, alone(ids, use_cache=False).logits) < 3e-2
    report = npu_fusion.report(compiled)
    report.expect(linear_all_reduce=2, residual_add=2, rms_norm=3)
    return calls_of(report.graph("lowered"))


def test_two_ranks(two: Ranks) -> None:
    two.run(the_ops_and_their_lowerings)
    for calls in two.run(a_llama_by_its_own_plan):
        assert calls.count("npu_mm_all_reduce_base") == 2
        assert "all_reduce" not in calls
        assert calls.count("npu_add_rms_norm") == 2
