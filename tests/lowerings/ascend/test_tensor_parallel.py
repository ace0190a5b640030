"""Tensor-parallel layers on Ascend: what a group may be, what becomes of a call that is refused late, and the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.lowerings.ascend import tensor_parallel
from npu_fusion.lowerings.ascend.emulation import EmulationError
from npu_fusion.ops.tensor_parallel import all_gather_linear, linear_all_reduce, linear_reduce_scatter
from tests.lowerings.ascend.checks import check_kernel, lower_call
from tests.tensor_parallel import WORLD, all_gathered, all_reduced, calls_of, fake_ranks, fused_graph

M, K, N = 4, 256, 16
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "npu_mm_all_reduce_base", "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"
npu: Any = torch.ops.npu


def factors(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype).t()]


@pytest.fixture
def _two() -> Iterator[None]:
    with fake_ranks():
        yield


@pytest.mark.usefixtures("_two")
def test_operands_lie_as_the_ops_read_them() -> None:
    """A transposed matrix is given as it is; rows are copied into their order."""
    x, weight = torch.randn(K, M).bfloat16(), torch.randn(N, K).bfloat16()
    found = lower_call(lambda x, w: linear_all_reduce(x.t(), w.t(), group=WORLD), x, weight)
    assert found.provider == f"npu.{ALL_REDUCE}"
    assert found.targets() == ["aten.t", "aten.t", "aten.clone", f"npu.{ALL_REDUCE}"]


@pytest.mark.usefixtures("_two")
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_call_that_is_refused_late_is_taken_apart(ranks: int) -> None:
    x, weight = factors()
    group = WORLD if ranks == 2 else "nobody"
    found = lower_call(lambda x, w: all_gather_linear(x, w, x[0, :N], group=group, ranks=ranks)[0], x, weight, target="ascend910_93")
    assert found.provider == REFERENCE
    assert ("bias" if ranks == 2 else "no process group") in found.reason
    assert calls_of(found.gm) == ["all_gather_into_tensor", "wait_tensor", "addmm"]
    assert not any("npu_fusion" in target for target in found.targets())


@pytest.mark.parametrize(("ranks", "fused"), [(1, True), (2, True), (3, False), (4, True), (8, True), (16, False)])
def test_ranks_of_an_all_reduce(ranks: int, fused: bool) -> None:
    with fake_ranks(ranks):
        gm, record = fused_graph(lambda x, w: all_reduced(x @ w), *factors())
    assert calls_of(gm) == ([ALL_REDUCE] if fused else ["mm", "all_reduce", "wait_tensor"])
    assert fused or f"the group has {ranks} ranks" in (record.sites[0].reason or "")


@pytest.mark.parametrize(("target", "ranks", "fused"), [("ascend910b", 16, False), ("ascend910_93", 16, True), ("ascend910_93", 3, False)])
def test_ranks_of_an_all_gather(target: str, ranks: int, fused: bool) -> None:
    with fake_ranks(ranks):
        gm, record = fused_graph(lambda x, w: all_gathered(x, ranks) @ w, *factors(), target=target)
    assert calls_of(gm) == ([ALL_GATHER] if fused else ["all_gather_into_tensor", "wait_tensor", "mm"])
    assert fused or f"world_size={ranks}" in (record.sites[0].reason or "")


@pytest.mark.parametrize(
    ("target", "apart"), [("ascend910b", ["all_gather_into_tensor", "wait_tensor", "mm"]), ("ascend910_93", [ALL_GATHER])]
)
def test_all_products_are_of_one_group_where_they_must_be(target: str, apart: list[str]) -> None:
    with fake_ranks(4):
        pair = dist.new_group([0, 1]).group_name
        gm, record = fused_graph(lambda x, w: [all_gathered(x, 4) @ w, all_gathered(x, 2, str(pair)) @ w], *factors(), target=target)
    assert calls_of(gm) == [ALL_GATHER, *apart]
    reasons = " ".join(site.reason or "" for site in record.sites)
    assert ("of one group" in reasons) == (target == "ascend910b")


def test_on_a_device_the_group_has_its_name_with_hccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "communicator", lambda group, rank: f"hccl {rank}")
    with fake_ranks():
        found = lower_call(lambda x, w: linear_reduce_scatter(x, w, group=WORLD, ranks=2), *factors(), emulate=False)
        shown = lower_call(lambda x, w: linear_reduce_scatter(x, w, group=WORLD, ranks=2), *factors(), emulate=False, dry_run=True)
    [call] = [node for node in found.gm.graph.nodes if str(node.target).startswith("npu.")]
    assert call.args[2:] == ("hccl 0", 2)
    [call] = [node for node in shown.gm.graph.nodes if str(node.target).startswith("npu.")]
    assert call.args[2:] == (WORLD, 2)


# -------------------------------------------------------------------- CPU kernels


@pytest.mark.usefixtures("_two")
def test_kernels_and_their_fake_kernels() -> None:
    x, weight = factors()
    product, addend, bias = x.float() @ weight.float(), torch.randn(M, N).bfloat16(), torch.randn(N).bfloat16()
    reduced = check_kernel(f"npu::{ALL_REDUCE}", x, weight, WORLD, bias=bias, x3=addend)
    torch.testing.assert_close(reduced.float(), product + bias + addend, rtol=2e-2, atol=2e-1)
    batch = check_kernel(f"npu::{ALL_REDUCE}", x.view(2, 2, K), weight, WORLD)
    assert batch.shape == (2, 2, N)
    y, gathered = check_kernel(f"npu::{ALL_GATHER}", x, weight, WORLD, 2)
    torch.testing.assert_close(y.float(), torch.cat([product, product]), rtol=2e-2, atol=2e-1)
    assert torch.equal(gathered, torch.cat([x, x]))
    assert check_kernel(f"npu::{ALL_GATHER}", x, weight, WORLD, 2, gather_output=False)[1].numel() == 0
    assert check_kernel(f"npu::{REDUCE_SCATTER}", x, weight, WORLD, 2, comm_mode="aiv").shape == (M // 2, N)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (ALL_REDUCE, {"reduce_op": "max"}, "reduce_op"),
    (ALL_REDUCE, {"comm_turn": 1}, "comm_turn"),
    (ALL_REDUCE, {"comm_mode": "aiv"}, "comm_mode"),
    (ALL_REDUCE, {"hcom": "nobody"}, "hcom"),
    (ALL_REDUCE, {"bias": torch.ones(N + 1).bfloat16()}, "bias must have shape"),
    (ALL_REDUCE, {"x3": torch.ones(N).bfloat16()}, "x3 with shape"),
    (ALL_REDUCE, {"dequant_scale": torch.ones(N)}, "dequant_scale"),
    (ALL_REDUCE, {"x1": torch.ones(K, M).bfloat16().t()}, "x1 must not be transposed"),
    (ALL_REDUCE, {"x1": torch.ones(M, K)}, "x1 must be float16, bfloat16"),
    (ALL_REDUCE, {"x1": torch.ones(0, K).bfloat16()}, "empty"),
    (ALL_GATHER, {"gather_index": 1}, "gather_index"),
    (ALL_GATHER, {"gather_output": False, "comm_mode": "aiv"}, "gather_output"),
    (ALL_GATHER, {"bias": torch.ones(N).bfloat16()}, "bias"),
    (ALL_GATHER, {"world_size": 3}, "world_size"),
    (ALL_GATHER, {"world_size": 4}, "2 ranks, not 4"),
    (ALL_GATHER, {"input": torch.ones(M, 8).bfloat16(), "x2": torch.ones(8, N).bfloat16()}, "K must be in"),
    (REDUCE_SCATTER, {"input": torch.ones(3, K).bfloat16()}, "divisible"),
    (REDUCE_SCATTER, {"x2": torch.ones(K - 1, N).bfloat16()}, "should be same"),
    (REDUCE_SCATTER, {"reduce_op": "avg"}, "reduce_op"),
]


@pytest.mark.usefixtures("_two")
@pytest.mark.parametrize(("op", "change", "message"), REFUSED)
def test_kernels_refuse(op: str, change: dict[str, Any], message: str) -> None:
    x, weight = factors()
    first = {"x1": x} if op == ALL_REDUCE else {"input": x, "world_size": 2}
    with pytest.raises(EmulationError, match=message):
        getattr(npu, op)(**{**first, "x2": weight, "hcom": WORLD, **change})
