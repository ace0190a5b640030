"""Linear layers with integer weights: the spellings of dequantisation, what is no such layer, and the numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from npu_fusion import FusionConfig, FusionReport
from tests.patterns.support import fused, fused_within_contract

OUTPUTS, INPUTS, GROUP = 48, 64, 16
GROUPS = INPUTS // GROUP
DTYPES = (torch.bfloat16, torch.float32)
Layer = Callable[..., Tensor]


def calls_of(report: FusionReport) -> list[Node]:
    return [node for node in report.graph("fused").graph.nodes if str(node.target) == "npu_fusion.weight_only_linear.default"]


def operands(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x [2, 3, K], weight [N, K] int8, bias [N], scale and zero [N, G]."""
    x, bias = torch.randn(2, 3, INPUTS).to(dtype), torch.randn(OUTPUTS).to(dtype)
    weight = torch.randint(-128, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
    scale = (torch.rand(OUTPUTS, GROUPS) / 64 + 0.01).to(dtype)
    return x, weight, bias, scale, torch.randint(-8, 8, (OUTPUTS, GROUPS), dtype=torch.int8)


def channel(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype) * scale[:, :1], bias)


def channel_with_zero(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x, (weight.to(x.dtype) - zero[:, :1].to(x.dtype)) * scale[:, :1])


def scaled_after(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype)) * scale[:, 0]


def scaled_after_with_bias(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.mm(x.view(-1, INPUTS), weight.t().to(x.dtype)) * scale[:, 0] + bias


def inputs_first(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return x @ (weight.view(INPUTS, OUTPUTS).to(x.dtype) * scale[:, 0]) + bias


def groups(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    whole = (weight.view(OUTPUTS, GROUPS, GROUP).to(x.dtype) - zero[..., None].to(x.dtype)) * scale[..., None]
    return F.linear(x, whole.view(OUTPUTS, INPUTS), bias)


def groups_inputs_first(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    whole = weight.view(GROUPS, GROUP, OUTPUTS).to(x.dtype) * scale.view(GROUPS, 1, OUTPUTS)
    return x @ whole.reshape(INPUTS, OUTPUTS)


def one_scale(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype) * scale[:1, :1])


SPELLINGS = [
    (channel, 1),
    (channel_with_zero, 1),
    (scaled_after, 1),
    (scaled_after_with_bias, 1),
    (inputs_first, 1),
    (groups, GROUPS),
    (groups_inputs_first, GROUPS),
    (one_scale, 1),
]


@pytest.mark.parametrize(("layer", "count"), SPELLINGS, ids=[layer.__name__ for layer, _ in SPELLINGS])
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, None)], ids=["bf16", "fp32"])
def test_spellings(layer: Layer, count: int, dtype: torch.dtype, dynamic: bool | None) -> None:
    x, *others = operands(dtype)
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 1)
    report = fused_within_contract(layer, x, *others, dynamic=dynamic)
    [call] = calls_of(report)
    assert report.idioms["dequantize"] == 1
    assert [tuple(arg.meta["val"].shape) for arg in call.args[1:3]] == [(OUTPUTS, INPUTS), (OUTPUTS, count)]  # type: ignore[union-attr]


def scale_of_inputs(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype) * scale.view(-1)[:INPUTS])


def full_scale(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype) * scale.repeat(1, GROUP))


def scale_of_tokens(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype)) * scale[:3, :1]


def no_scale(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias)


def float_weight(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype).sin() * scale[:, :1])


def integer_activations(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return F.linear(x.to(torch.int8).to(x.dtype), weight.to(x.dtype)) * scale[:, 0]


@pytest.mark.parametrize("look_alike", [integer_activations, scale_of_inputs, full_scale, scale_of_tokens, no_scale, float_weight])
def test_look_alikes(look_alike: Layer) -> None:
    assert not calls_of(fused_within_contract(look_alike, *operands(torch.bfloat16)))


def test_exact_rounding_keeps_what_is_scaled_after() -> None:
    config = FusionConfig(rounding="exact")
    assert not calls_of(fused(scaled_after, *operands(torch.bfloat16), config=config)[1])
    inputs = operands(torch.bfloat16)
    result, report = fused(channel, *inputs, config=config)
    assert calls_of(report)
    assert torch.equal(result, channel(*inputs))


def test_new_weights_are_used() -> None:
    """Nothing of a weight is kept from one call to the next."""
    inputs = operands(torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(groups, backend="npu_fusion", fullgraph=True)
    with torch.no_grad():
        compiled(*inputs)
        inputs[1].copy_(inputs[1].flip(0))
        assert torch.equal(compiled(*inputs), groups(*inputs))
