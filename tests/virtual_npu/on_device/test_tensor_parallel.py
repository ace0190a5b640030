"""Tensor-parallel layers on Ascend: torch_npu's ops with our arguments, and its meta kernels.

HCCL is not simulated: the group is torch's fake one, and the communicator's name is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

import npu_fusion
from npu_fusion.lowerings.ascend import tensor_parallel
from tests.tensor_parallel import WORLD, fake_ranks
from tests.virtual_npu.launches import Trace

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Please use:FutureWarning")

M, K = 8, 512


@pytest.fixture(autouse=True)
def _group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tensor_parallel, "communicator", lambda group, rank: "hccl")
    with fake_ranks():
        yield


def layer(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.silu(F.linear(funcol.all_gather_tensor(x, 0, WORLD), up))
    tokens = funcol.reduce_scatter_tensor(F.linear(hidden, down), "sum", 0, WORLD)
    return x + funcol.all_reduce(F.linear(tokens, up.t()), "sum", WORLD)


def test_a_layer_launches_the_ops(traced: Callable[[], Trace]) -> None:
    given = [torch.zeros(size, dtype=torch.bfloat16).npu() for size in ((M, K), (K, K), (K, K))]
    compiled = torch.compile(layer, backend="npu_fusion", fullgraph=True, options={"target": "ascend910b"})
    with torch.no_grad():
        assert compiled(*given).shape == (M, K)
    report = npu_fusion.report(compiled)
    assert not report.rule_errors
    report.expect(all_gather_linear=1, linear_reduce_scatter=1, linear_all_reduce=1)
    launches = traced().total
    assert {name: count for name, count in launches.items() if "Matmul" in name} == {
        "aclnnAllGatherMatmulV2": 1,
        "aclnnMatmulReduceScatterV2": 1,
        "aclnnMatmulAllReduce": 1,
    }
