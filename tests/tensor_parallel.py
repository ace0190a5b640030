"""What the tests of tensor-parallel layers share: a group of ranks of which only this one is there, and graphs with its collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import npu_fusion
from npu_fusion import FusionConfig, GraphRecord
from npu_fusion.numerics import assert_within_contract
from tests.graphs import aten_graph
from tests.models.float64 import Float64Mode
from tests.ops.checks import tensors_of

WORLD = "0"
_c10d: Any = torch.ops._c10d_functional


@contextmanager
def fake_ranks(ranks: int = 2) -> Iterator[None]:
    """In the block this process is rank 0 of a group whose others say what it says; its sums are its own numbers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduced(x: Tensor, reduction: str = "sum", group: str = WORLD) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x, reduction, group))  # type: ignore[no-any-return]


def all_gathered(x: Tensor, ranks: int = 2, group: str = WORLD) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_gather_into_tensor(x, ranks, group))  # type: ignore[no-any-return]


def reduce_scattered(x: Tensor, reduction: str = "sum", ranks: int = 2, group: str = WORLD) -> Tensor:
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x, reduction, ranks, group))  # type: ignore[no-any-return]


def fused_graph(
    fn: Callable[..., Any], *inputs: Tensor, dynamic: bool = False, target: str = "ascend910b", **options: Any
) -> tuple[GraphModule, GraphRecord]:
    """The graph of a function, fused and lowered for CPU tensors; what it gives is within the numeric contract.

    Args:
        dynamic: the first input's rows are of any number; weights have the sizes that they have.
    """

    def of_known_weights(x: Tensor, *weights: Tensor) -> Any:
        for weight, given in zip(weights, inputs[1:], strict=True):
            for size, number in zip(weight.shape, given.shape, strict=True):
                torch._check(size == number)
        return fn(x, *weights)

    gm = aten_graph(of_known_weights, *inputs, dynamic=dynamic)
    npu_fusion.fuse(gm, list(inputs), FusionConfig(target=target, emulate=target != "cpu", **options))
    record: GraphRecord = gm.meta["npu_fusion_record"]
    assert not record.rule_errors, record.rule_errors
    gm.graph.lint()
    actual, eager = tensors_of(gm(*inputs)), tensors_of(fn(*inputs))
    with Float64Mode():
        exact = tensors_of(fn(*(tensor.double() for tensor in inputs)))
    for a, e, x in zip(actual, eager, exact, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert_within_contract(a, e, x, inputs[0].dtype)
    return gm, record


def calls_of(gm: GraphModule) -> list[str]:
    """Names of the matrix products and collectives that a graph calls, in order."""
    names = [node.target._opname for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [name for name in names if name.startswith(("npu_", "all_", "reduce_", "wait")) or name in ("mm", "addmm", "bmm")]
