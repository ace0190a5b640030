"""`moe_experts_int8` on Ascend: what it becomes, why not, and the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from npu_fusion.lower import REFERENCE
from tests.lowerings.ascend.checks import Lowered, lower_and_check, lower_call
from tests.lowerings.routed import IDS
from tests.lowerings.routed_int8 import call, tensors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FUSED = "npu.npu_grouped_matmul (init_routing_v2, dequant_swiglu_quant, finalize_routing)"
APART = "npu.npu_grouped_matmul (init_routing_v2, the unit, dynamic_quant, finalize_routing)"


def lowered(dtype: torch.dtype = BF16, up: bool = False, ids: torch.Tensor = IDS, **options: Any) -> Lowered:
    return lower_and_check(call(**options), call(**options), ids.to(BF16), *tensors(dtype, up=up))


def test_five_launches() -> None:
    found = lowered()
    assert (found.provider, found.reason) == (FUSED, "")
    own = ["npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_dequant_swiglu_quant", "npu_grouped_matmul", "npu_moe_finalize_routing"]
    assert [target.removeprefix("npu.") for target in found.targets() if target.startswith("npu.")] == own


@pytest.mark.parametrize(
    ("options", "provider"),
    [
        ({"dtype": FP16, "layout": "swapped", "floor_mode": "amax", "floor": 1e-5}, FUSED),
        ({"up": True, "round_dtype": BF16}, APART),
        ({"activation": "gelu_tanh"}, APART),
        ({"layout": "interleaved", "alpha": 1.702, "gate_limit": 0.7, "up_limit": 0.7, "up_offset": 1.0}, APART),
        ({"ids": IDS.masked_fill(IDS == 2, -1)}, FUSED),
    ],
    ids=["swapped", "two", "gelu", "clipped", "no expert"],
)
def test_every_argument_is_honoured(options: dict[str, Any], provider: str) -> None:
    found = lowered(**options)
    assert found.provider == provider, found.reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": FP32}, "x is torch.float32"),
        ({"result_dtype": FP32}, "rounds the results to 16 bits, the model keeps torch.float32"),
        ({"steps": 127.5}, "the model 127.5"),
        ({"floor_mode": "amax", "floor": 1e-2}, "is no small one"),
    ],
    ids=["fp32", "wide results", "steps", "floor"],
)
def test_what_does_not_fit_is_the_reference(options: dict[str, Any], reason: str) -> None:
    dtype = options.get("dtype", BF16)
    found = lower_call(call(**{name: value for name, value in options.items() if name != "dtype"}), IDS.to(BF16), *tensors(dtype))
    assert found.provider == REFERENCE
    assert reason in found.reason
