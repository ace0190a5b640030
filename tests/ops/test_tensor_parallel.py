"""Metadata and errors of the tensor-parallel layers; their numbers are in tests/moe, where there are ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.ops.tensor_parallel import all_gather_linear, linear_all_reduce, linear_reduce_scatter
from npu_fusion.semantic import SemanticOp
from tests.ops.checks import check_symbolic
from tests.tensor_parallel import WORLD, fake_ranks

M, K, N = 4, 8, 6
OPS: list[tuple[SemanticOp, dict[str, Any]]] = [
    (linear_all_reduce, {"group": WORLD}),
    (all_gather_linear, {"group": WORLD, "ranks": 2}),
    (linear_reduce_scatter, {"group": WORLD, "ranks": 2}),
]


@pytest.fixture(autouse=True)
def _ranks() -> Iterator[None]:
    with fake_ranks():
        yield


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("op", "form"), OPS, ids=lambda value: getattr(value, "name", ""))
def test_fake_kernels(op: SemanticOp, form: dict[str, Any], biased: bool) -> None:
    x, weight, bias = torch.randn(M, K), torch.randn(N, K).t(), torch.randn(N)
    given = (x, weight, bias) if biased else (x, weight)
    torch.library.opcheck(op.overload, given, form, test_utils=("test_schema", "test_faketensor"))
    real = op(*given, **form)
    check_symbolic(op, real, *given, **form)
    y = real[0] if isinstance(real, tuple) else real
    rows = (x @ weight + bias if biased else x @ weight).repeat(2, 1)[: y.shape[0]]
    torch.testing.assert_close(y, rows)


def test_no_pass_drops_a_call() -> None:
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    for op, form in OPS:
        graph.call_function(op.overload, (x, weight), form)
    graph.output(x)
    graph.eliminate_dead_code()
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [op.overload for op, _ in OPS]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(M, K).half()}, TypeError, "one dtype"),
        ({"x": torch.ones(M, K, dtype=torch.int64)}, TypeError, "floating point"),
        ({"x": torch.ones(1, M, K)}, ValueError, "x must have 2 dimensions"),
        ({"x": torch.ones(M, K + 1)}, ValueError, "must end in the inputs"),
        ({"bias": torch.ones(N + 1)}, ValueError, "bias must have shape"),
        ({"bias": torch.ones(M, N)}, ValueError, "bias must have 1 dimensions"),
    ],
)
def test_errors(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    for op, form in OPS:
        with pytest.raises(error, match=message):
            op(**{"x": torch.ones(M, K), "weight": torch.ones(K, N), **change, **form})
