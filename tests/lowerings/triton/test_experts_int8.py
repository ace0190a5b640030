"""The provider of `moe_experts_int8` by Triton: what it takes, what it leaves to others and why, and its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from npu_fusion.lower import REFERENCE
from tests.lowerings.ascend.checks import lower_and_check, lower_call
from tests.lowerings.routed import BF16, IDS
from tests.lowerings.routed_int8 import call, tensors

PROVIDER = "triton.moe_permute + triton.grouped_int8 + triton.moe_unpermute"
CUDA: dict[str, Any] = {"target": "cuda", "emulate": True}


@pytest.mark.parametrize(
    "options",
    [
        {"floor_mode": "scale", "floor": 1e-7},
        {"dtype": torch.float16, "up": True, "activation": "gelu_tanh", "sum_dtype": torch.float32},
        {"layout": "interleaved", "alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.6, "up_offset": 1.0, "ids": IDS.clamp(max=2) - 1},
    ],
    ids=["merged", "two", "clipped, no expert"],
)
def test_every_argument_is_honoured(options: dict[str, Any]) -> None:
    dtype, up, ids = options.pop("dtype", BF16), options.pop("up", False), options.pop("ids", IDS)
    found = lower_and_check(call(**options), call(**options), ids.to(BF16), *tensors(dtype, up=up), **CUDA)
    assert (found.provider, found.reason) == (PROVIDER, "")
    own = ["dynamic_quantize", "moe_permute", *["grouped_int8"] * (1 + up), "glu_quant", "grouped_int8", "moe_unpermute"]
    assert [target.removeprefix("npu_fusion_triton.") for target in found.targets() if "triton" in target] == own


def test_what_does_not_fit_is_the_reference() -> None:
    found = lower_call(call(steps=127.5), IDS.to(BF16), *tensors(), **CUDA)
    assert found.provider == REFERENCE
    assert "the kernel has 127 steps, the model 127.5" in found.reason
