"""The provider of gated units by Triton: what it takes, what it leaves to others and why, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.ops.glu import glu
from tests.lowerings.ascend.checks import DTYPES, Lowered, lower_and_check, lower_call

SIZE = 16
BF16, FP16, FP32 = DTYPES
CUDA: dict[str, Any] = {"target": "cuda", "emulate": True}


def lowered(dtype: torch.dtype = FP16, *, merged: bool = True, dynamic: bool = False, config: Any = None, **arguments: Any) -> Lowered:
    """A glu call with the given arguments, lowered for CUDA and held to the numeric contract."""
    width = 2 * SIZE if merged else SIZE
    inputs = [torch.randn(2, 3, width, dtype=dtype) for _ in range(1 if merged else 2)]

    def call(options: dict[str, Any]) -> Callable[..., Tensor]:
        return lambda *tensors: glu(*(t.view(-1, width) for t in tensors), *[None] * merged, **options)

    exact = {name: value for name, value in arguments.items() if name not in ("round_dtype", "out_dtype")}
    return lower_and_check(call(arguments), call(exact), *inputs, dynamic=dynamic, **CUDA, **(config or {}))


def test_it_comes_first_on_cuda() -> None:
    found = lowered()
    assert (found.provider, found.reason) == ("triton.glu", "")
    assert found.targets()[-1] == "npu_fusion_triton.glu"


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "two"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"layout": "interleaved", "alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.6, "up_offset": 1.0},
        {"layout": "swapped", "activation": "gelu_tanh"},
        {"activation": "relu2", "out_dtype": FP32},
    ],
    ids=str,
)
def test_every_argument_is_honoured(arguments: dict[str, Any], dtype: torch.dtype, merged: bool) -> None:
    assert lowered(dtype, merged=merged, **arguments).provider == "triton.glu"


@pytest.mark.parametrize("rounding", ["exact", "fp32_internal"])
def test_the_rounding_follows_the_configuration(rounding: str) -> None:
    """The activated gate is rounded in `exact` alone."""
    found = lowered(FP32, merged=False, activation="identity", round_dtype=FP16, config={"rounding": rounding})
    gate, up = torch.randn(2, 2, 3, SIZE)
    expected = (gate.half().float() if rounding == "exact" else gate) * up
    assert torch.equal(found.gm(gate, up), expected.view(-1, SIZE))


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "two"])
def test_symbolic_rows(merged: bool) -> None:
    found = lowered(merged=merged, dynamic=True)
    assert found.provider == "triton.glu"
    inputs = [torch.randn(5, 7, 2 * SIZE if merged else SIZE, dtype=FP16) for _ in range(1 if merged else 2)]
    expected = glu(*inputs, *[None] * merged)
    torch.testing.assert_close(found.gm(*inputs), expected.view(-1, SIZE))


def test_a_symbolic_width_is_refused() -> None:
    found = lower_call(lambda x: glu(x, x), torch.randn(3, SIZE), dynamic=True, **CUDA)
    assert found.provider == REFERENCE
    assert "the last dimension of gate is symbolic: a kernel is compiled for its size" in found.reason


def test_dtypes_without_a_kernel_are_refused() -> None:
    x = torch.randn(3, SIZE, dtype=torch.float64)
    assert "gate is torch.float64" in lower_call(lambda x: glu(x, None), x, **CUDA).reason
    assert "up is torch.float64" in lower_call(lambda x: glu(x.float(), x), x, **CUDA).reason
    found = lower_call(lambda x: glu(x.float(), None, out_dtype=torch.float64), x, **CUDA)
    assert (found.provider, "out_dtype is torch.float64" in found.reason) == (REFERENCE, True)
    found = lower_call(lambda x: glu(x.float(), None, round_dtype=torch.float64), x, rounding="exact", **CUDA)
    assert (found.provider, "round_dtype is torch.float64" in found.reason) == (REFERENCE, True)


def test_a_gate_without_dimensions_is_refused() -> None:
    found = lower_call(lambda x, y: glu(x, y), torch.randn(()), torch.randn(3), **CUDA)
    assert (found.provider, "gate has no dimension" in found.reason) == (REFERENCE, True)


def test_a_result_stored_like_its_gate_stays_so() -> None:
    """The kernel's result is contiguous; where the semantic op's is not, it is laid out again."""

    def call(x: Tensor) -> Tensor:
        return glu(x.transpose(0, 1), x.transpose(0, 1))

    assert lower_and_check(call, call, torch.randn(2, 3, SIZE), **CUDA).provider == "triton.glu"


def test_on_ascend_it_stands_behind_the_ops_of_the_npu() -> None:
    def call(gate: Tensor, up: Tensor) -> Tensor:
        return glu(gate, up, up_limit=0.5)

    x = torch.randn(2, 3, SIZE, dtype=FP16)
    assert lower_call(lambda x: glu(x, None), x, target="ascend910b").provider == "npu.npu_swiglu"
    found = lower_and_check(call, call, x, x.clone(), target="ascend910b")
    assert found.provider == "triton.glu"
    assert "it has one limit" in found.reason
