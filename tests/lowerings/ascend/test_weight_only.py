"""Weight-only linears on Ascend: what becomes npu_weight_quant_batchmatmul, what does not and why, and the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.weight_only import weight_only_linear
from tests.lowerings.ascend.checks import lower_call

OP = "npu.npu_weight_quant_batchmatmul"
BF16, FP16 = torch.bfloat16, torch.float16
TOKENS, INPUTS, OUTPUTS = 5, 64, 48


def operands(dtype: torch.dtype, *, groups: int = 1, inputs_first: bool = False) -> dict[str, Tensor]:
    weight = torch.randint(-128, 128, (INPUTS, OUTPUTS) if inputs_first else (OUTPUTS, INPUTS), dtype=torch.int8)
    return {
        "x": torch.randn(2, TOKENS, INPUTS).to(dtype),
        "weight": weight.t() if inputs_first else weight,
        "scale": (torch.rand(OUTPUTS, groups) / 64 + 0.01).to(dtype),
        "zero": torch.randint(-8, 8, (OUTPUTS, groups), dtype=torch.int8),
        "bias": torch.randn(OUTPUTS).to(dtype),
    }


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("names", [(), ("zero",), ("zero", "bias")], ids=" ".join)
@pytest.mark.parametrize("inputs_first", [False, True])
def test_channels(names: tuple[str, ...], inputs_first: bool, dtype: torch.dtype) -> None:
    given = operands(dtype, inputs_first=inputs_first)
    inputs = [given[name] for name in ("x", "weight", "scale", *names)]

    def fn(*tensors: Tensor) -> Any:
        return weight_only_linear(*tensors[:3], **dict(zip(names, tensors[3:])))

    found = lower_call(fn, *inputs)
    assert found.provider == OP
    assert "aten.clone" not in found.targets()
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    assert_within_contract(found.gm(*inputs), fn(*inputs), fn(*exact), dtype)


@pytest.mark.parametrize(
    ("groups", "dtype", "scale", "reason"),
    [
        (4, BF16, BF16, "the model's has groups"),
        (1, BF16, torch.float32, "its scale has the dtype of the activations, the model's is torch.float32"),
        (1, torch.float32, torch.float32, "x is float32, not float16 or bfloat16"),
    ],
)
def test_refused(groups: int, dtype: torch.dtype, scale: torch.dtype, reason: str) -> None:
    given = operands(dtype, groups=groups)
    found = lower_call(weight_only_linear, given["x"], given["weight"], given["scale"].to(scale))
    assert found.provider == REFERENCE
    assert reason in found.reason
