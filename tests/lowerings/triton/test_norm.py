"""Normalisations by Triton: which calls the providers take, why not others, and the numbers of what they become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.ops.norm import add_rms_norm, l2_norm, layer_norm, rms_norm
from npu_fusion.semantic import SemanticOp
from tests.lowerings.ascend.checks import DTYPES, Lowered, lower_and_check, lower_call

SIZE, EPS = 32, 1e-3
BF16, FP16, FP32 = DTYPES
CUDA = {"target": "cuda"}
EXACT = {**CUDA, "rounding": "exact"}


def lowered(op: SemanticOp, *, tensors: dict[str, Tensor], config: Any = None, dynamic: bool = False, **arguments: Any) -> Lowered:
    """A call of `op` with tensors and other arguments by name, lowered for cuda and held to the numeric contract."""

    def call(options: dict[str, Any]) -> Callable[..., Any]:
        return lambda *values: op(**dict(zip(tensors, values)), **options)

    exact = {name: value for name, value in arguments.items() if not name.endswith("_dtype")}
    return lower_and_check(call(arguments), call(exact), *tensors.values(), dynamic=dynamic, **(config or CUDA))


def rms(dtype: torch.dtype = FP16, *, gate: bool = False, **arguments: Any) -> Lowered:
    """rms_norm of [2, 3, SIZE]."""
    tensors = {"x": torch.randn(2, 3, SIZE, dtype=dtype), "weight": 1 + 0.2 * torch.randn(SIZE, dtype=dtype)}
    if gate:
        tensors["gate"] = torch.randn(2, 3, SIZE, dtype=dtype)
    return lowered(rms_norm, tensors=tensors, eps=EPS, **arguments)


def add(dtype: torch.dtype = FP16, *, bias: bool = False, **arguments: Any) -> Lowered:
    """add_rms_norm of [2, 3, SIZE]."""
    tensors = {"x": torch.randn(2, 3, SIZE, dtype=dtype), "residual": torch.randn(2, 3, SIZE, dtype=dtype)}
    tensors["weight"] = 1 + 0.2 * torch.randn(SIZE, dtype=dtype)
    if bias:
        tensors["bias"] = torch.randn(SIZE, dtype=dtype)
    return lowered(add_rms_norm, tensors=tensors, eps=EPS, **arguments)


def rounds_to(found: Lowered) -> Any:
    """The `round_dtype` of the op that a call became."""
    [call] = [node for node in found.gm.graph.nodes if "npu_fusion_triton" in str(node.target)]
    return call.kwargs.get("round_dtype")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_is_one_launch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, SIZE, dtype=dtype), torch.randn(SIZE, dtype=dtype)
    found = [
        rms(dtype, weight_offset=1),
        rms(dtype, gate=True, gate_activation="sigmoid", gate_first=True, group_size=8),
        add(dtype, bias=True, weight_offset=1, norm_unrounded=True),
        lowered(layer_norm, tensors={"x": x, "weight": weight, "bias": weight}, eps=EPS),
        lowered(l2_norm, tensors={"x": x}, eps=EPS, eps_mode="max", scale=3.0, out_dtype=FP32),
    ]
    names = ["rms_norm", "rms_norm", "add_rms_norm", "layer_norm", "l2_norm"]
    assert [(each.provider, each.reason) for each in found] == [(f"triton.{name}", "") for name in names]
    assert [each.targets() for each in found] == [[f"npu_fusion_triton.{name}"] for name in names]


def test_dtypes_of_the_results() -> None:
    assert rms(out_dtype=FP32).provider == "triton.rms_norm"
    assert add(sum_dtype=FP32, out_dtype=FP16).provider == "triton.add_rms_norm"
    x = {"x": torch.randn(3, SIZE, dtype=FP16)}
    assert lowered(layer_norm, tensors=x, weight=None, bias=None, eps=EPS, out_dtype=FP32).provider == "triton.layer_norm"
    assert lowered(rms_norm, tensors=x, weight=None, eps=EPS).provider == "triton.rms_norm"


@pytest.mark.parametrize("call", [rms, add], ids=["rms_norm", "add_rms_norm"])
def test_rounding(call: Callable[..., Lowered]) -> None:
    """What the model rounds before the weight the kernels keep in fp32, unless rounding is exact."""
    assert rounds_to(call(round_dtype=FP16)) is None
    assert rounds_to(call(round_dtype=FP16, config=EXACT)) == FP16
    assert rounds_to(call(config=EXACT)) is None


def test_exact_rounding_is_that_of_the_model() -> None:
    x, weight, bias = torch.randn(8, SIZE, dtype=FP16), torch.randn(SIZE, dtype=FP16), torch.randn(SIZE, dtype=FP16)
    for call in (
        lambda x, weight, bias: rms_norm(x, weight, EPS, weight_offset=1, round_dtype=FP16, out_dtype=FP32),
        lambda x, weight, bias: add_rms_norm(x, x, weight, EPS, bias=bias, round_dtype=FP16)[0],
        lambda x, weight, bias: layer_norm(x, weight, bias, EPS, round_dtype=FP16, out_dtype=FP32),
    ):
        found = lower_call(call, x, weight, bias, **EXACT)
        assert found.provider.startswith("triton.")
        assert (found.gm(x, weight, bias) != call(x, weight, bias)).float().mean() < 0.05


def test_symbolic_rows_and_a_symbolic_width() -> None:
    x, weight = torch.randn(5, SIZE, dtype=FP16), torch.randn(SIZE, dtype=FP16)
    rows = lower_call(lambda x, w: rms_norm(x[1:], w, EPS), x, weight, **CUDA)
    assert rows.provider == "triton.rms_norm"
    for found in (rms(dynamic=True), add(dynamic=True)):
        assert found.provider == REFERENCE
        assert "the last dimension of x is symbolic: a kernel is compiled for its size" in found.reason


def test_float64_stays_the_reference() -> None:
    x, weight = torch.randn(3, SIZE, dtype=torch.float64), torch.randn(SIZE, dtype=torch.float64)
    for call, name in (
        (lambda x, w: rms_norm(x, w, EPS), "x"),
        (lambda x, w: rms_norm(x.half(), w, EPS), "weight"),
        (lambda x, w: add_rms_norm(x.half(), x, w.half(), EPS)[0], "residual"),
        (lambda x, w: layer_norm(x.half(), None, w, EPS), "bias"),
        (lambda x, w: l2_norm(x, EPS), "x"),
    ):
        found = lower_call(call, x, weight, **CUDA)
        assert found.provider == REFERENCE
        assert f"{name} is torch.float64" in found.reason


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "l2_norm"])
def test_a_float64_result_stays_the_reference(op: str) -> None:
    calls: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x: rms_norm(x, None, EPS, out_dtype=torch.float64),
        "layer_norm": lambda x: layer_norm(x, None, None, EPS, out_dtype=torch.float64),
        "l2_norm": lambda x: l2_norm(x, EPS, out_dtype=torch.float64),
    }
    found = lower_call(calls[op], torch.randn(3, SIZE), **CUDA)
    assert found.provider == REFERENCE
    assert f"triton.{op}: a result is torch.float64" in found.reason


def test_rounding_to_float64_stays_the_reference() -> None:
    found = lower_call(lambda x: rms_norm(x, None, EPS, round_dtype=torch.float64), torch.randn(3, SIZE), **EXACT)
    assert found.provider == REFERENCE
    assert "the model rounds to torch.float64 before the weight: rounding is 'exact'" in found.reason


def test_the_result_is_stored_as_x_is() -> None:
    x, weight = torch.randn(SIZE, 3).T, torch.randn(SIZE)
    found = lowered(rms_norm, tensors={"x": x, "weight": weight}, eps=EPS)
    assert found.provider == "triton.rms_norm"


def test_on_ascend_they_stand_behind_the_ops_of_torch_npu() -> None:
    ascend = {"target": "ascend910b", "emulate": True}
    assert rms(config=ascend).provider == "npu.npu_rms_norm"
    assert rms(config={**ascend, "rounding": "exact"}, round_dtype=FP16).provider == "triton.rms_norm"
