"""Models that torchao quantised: what fuses in the graphs of its own linears."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.quantization.granularity import PerRow, PerTensor
from torchao.quantization.quant_api import Int8StaticActivationInt8WeightConfig
from torchao.quantization.quant_primitives import MappingType

import npu_fusion
from npu_fusion.numerics import relative_error

H, INNER = 64, 96


class Block(nn.Module):
    """A norm and a gated MLP of linears that torchao quantises."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(H, eps=1e-6)
        self.gate, self.up = nn.Linear(H, INNER, bias=False), nn.Linear(H, INNER, bias=True)
        self.down = nn.Linear(INNER, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@pytest.mark.parametrize(
    ("dtype", "dynamic"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)], ids=["float32", "bfloat16", "dynamic"]
)
def test_int8_activations_and_weights(dtype: torch.dtype, dynamic: bool) -> None:
    """Norm and quantisation are one op, and so are unit and quantisation; each linear is one more."""
    model = Block().to(dtype).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    x = torch.randn(4, 8, H, dtype=dtype)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="npu_fusion", dynamic=dynamic)
    with torch.no_grad():
        expected, actual = model(x), compiled(x)
    report = npu_fusion.report(compiled)
    report.expect(rms_norm=1, glu=1, quantize=2, dequantize=3)
    assert report.ops["quant_linear"] == 3
    assert report.ops["rms_norm_quant"] == report.ops["glu_quant"] == 1
    assert relative_error(actual, expected) < (2e-5 if dtype is torch.float32 else 2e-2)


ZERO_POINT = torch.full((1, 1, 1), 5, dtype=torch.int8)
ASYMMETRIC = MappingType.ASYMMETRIC


def _static(**zero_point: Any) -> Int8StaticActivationInt8WeightConfig:
    return Int8StaticActivationInt8WeightConfig(
        act_quant_scale=torch.full((1, 1, 1), 0.03), granularity=[PerTensor(), PerRow()], **zero_point
    )


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC), torch.bfloat16),
        (_static(), torch.float32),
        (_static(act_quant_zero_point=ZERO_POINT, act_mapping_type=ASYMMETRIC), torch.float32),
    ],
    ids=["dynamic, zero points", "static", "static, zero point"],
)
def test_zero_points_and_static_scales(config: Any, dtype: torch.dtype) -> None:
    """Zero points of activations are inside the linears, and static scales in the ops before them."""
    model = Block().to(dtype).eval()
    quantize_(model, config)
    x = torch.randn(4, 8, H, dtype=dtype)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="npu_fusion")
    with torch.no_grad():
        expected, actual = model(x), compiled(x)
    report = npu_fusion.report(compiled)
    report.expect(rms_norm=1, glu=1, quantize=2, dequantize=3)
    assert report.ops["quant_linear"] == 3
    assert not report.ops["dequantize"]
    assert relative_error(actual, expected) < (2e-5 if dtype is torch.float32 else 2e-2)
