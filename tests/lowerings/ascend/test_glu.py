"""Gated units on Ascend: which provider takes a call, why another does not, and the numbers of what it becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_fusion import FusionConfig
from npu_fusion.lower import REFERENCE
from npu_fusion.ops.glu import glu
from tests.lowerings.ascend.checks import DTYPES, Lowered, lower_and_check, lower_call
from tests.parameters import dtypes_and_shapes
from tests.patterns.support import fused_within_contract

SIZE = 16
BF16, FP16, FP32 = DTYPES
PAIR_BF16: dict[str, Any] = {"merged": False, "round_dtype": BF16}


def lowered(
    dtype: torch.dtype = BF16, *, merged: bool = True, size: int = SIZE, dynamic: bool = False, config: Any = None, **arguments: Any
) -> Lowered:
    """A glu call with the given arguments, lowered and held to the numeric contract. With `dynamic` all sizes but the last are symbols."""
    widths = [2 * size] if merged else [size, size]
    inputs = [2 * torch.randn(2, 3, width, dtype=dtype) for width in widths]

    def call(options: dict[str, Any]) -> Callable[..., Tensor]:
        return lambda *tensors: glu(*(t.view(-1, width) for t, width in zip(tensors, widths)), *[None] * merged, **options)

    exact = {name: value for name, value in arguments.items() if name not in ("round_dtype", "out_dtype")}
    return lower_and_check(call(arguments), call(exact), *inputs, dynamic=dynamic, **(config or {}))


def ops(found: Lowered) -> list[str]:
    """The ops that compute, without views."""
    return [op for op in found.targets() if op not in ("aten.view", "aten.slice", "aten.sym_size")]


# -------------------------------------------------------------------- one merged tensor


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize(
    ("arguments", "provider"),
    [
        ({}, "npu.npu_swiglu"),
        ({"layout": "interleaved"}, "npu.npu_clipped_swiglu"),
        ({"alpha": 1.702}, "npu.npu_clipped_swiglu"),
        ({"gate_limit": 0.7, "up_limit": 0.7}, "npu.npu_clipped_swiglu"),
        ({"gate_limit": 0.7, "up_limit": 0.7, "up_offset": 1.0, "alpha": 1.702, "layout": "interleaved"}, "npu.npu_clipped_swiglu"),
        ({"up_offset": 1.0}, "npu.npu_clipped_swiglu"),
    ],
    ids=["plain", "interleaved", "alpha", "limits", "gpt_oss", "offset"],
)
def test_silu_of_a_merged_tensor_is_one_launch(arguments: dict[str, Any], provider: str, dtype: torch.dtype, dynamic: bool) -> None:
    found = lowered(dtype, dynamic=dynamic, **arguments)
    assert (found.provider, found.reason) == (provider, "")
    assert ops(found) == [provider]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["halves", "swapped"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_of_a_merged_tensor_is_one_launch(activation: str, layout: str, dtype: torch.dtype) -> None:
    found = lowered(dtype, activation=activation, layout=layout, round_dtype=dtype if dtype != FP32 else None)
    assert found.provider == "npu.npu_geglu"
    assert ops(found) == ["npu.npu_geglu"]


def test_a_wider_or_narrower_result_is_computed_in_float32() -> None:
    assert ops(lowered(BF16, out_dtype=FP32)) == ["aten._to_copy", "npu.npu_swiglu"]
    assert ops(lowered(FP32, out_dtype=BF16)) == ["npu.npu_swiglu", "aten._to_copy"]
    assert ops(lowered(BF16, out_dtype=FP16)) == ["aten._to_copy", "npu.npu_swiglu", "aten._to_copy"]


def test_a_merged_tensor_that_is_not_contiguous_is_copied() -> None:
    def call(x: Tensor) -> Tensor:
        return glu(x.transpose(0, 1), None, alpha=1.702)

    found = lower_and_check(call, call, torch.randn(4, 3, 8))
    assert ops(found)[-2:] == ["aten.clone", "npu.npu_clipped_swiglu"]


# -------------------------------------------------------------------- fp16 of geglu


def test_geglu_rounds_the_gelu_in_float16_on_a2() -> None:
    kept = lowered(FP16, activation="gelu")
    assert kept.provider == "npu.npu_gelu_mul"
    assert "npu.npu_geglu: it rounds the activated gate to torch.float16, the model keeps it in fp32" in kept.reason
    assert lowered(FP16, activation="gelu", round_dtype=FP16).provider == "npu.npu_geglu"
    assert lowered(FP16, activation="gelu", config={"target": "ascend950"}).provider == "npu.npu_geglu"
    assert lowered(BF16, activation="gelu").provider == "npu.npu_geglu"


def test_gelu_mul_takes_small_tensors_of_known_size() -> None:
    wide = lowered(FP16, activation="gelu", size=1024)
    assert wide.provider == REFERENCE
    assert "npu.npu_gelu_mul: input[-1] is 2048, not known to be at most 1024" in wide.reason
    narrow = lowered(FP16, activation="gelu", size=24)
    assert "npu.npu_gelu_mul: input[-1] is 48, not known to be a multiple of 32" in narrow.reason
    assert "input[:-1] is" in lowered(FP16, activation="gelu", dynamic=True).reason


# -------------------------------------------------------------------- two tensors


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize(
    ("arguments", "provider"),
    [
        ({"activation": "silu"}, "aten.silu + aten.mul"),
        ({"activation": "sigmoid"}, "aten.sigmoid + aten.mul"),
        ({"activation": "tanh"}, "aten.tanh + aten.mul"),
        ({"activation": "relu"}, "aten.relu + aten.mul"),
        ({"activation": "relu2"}, "aten.relu + aten.square + aten.mul"),
        ({"activation": "gelu"}, "npu.npu_gelu + aten.mul"),
        ({"activation": "gelu_tanh"}, "npu.npu_gelu + aten.mul"),
        ({"alpha": 1.702}, "npu.npu_fast_gelu + aten.mul"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_two_tensors_are_an_activation_and_a_product(arguments: dict[str, Any], provider: str, dtype: torch.dtype, dynamic: bool) -> None:
    found = lowered(dtype, merged=False, dynamic=dynamic, round_dtype=None if dtype == FP32 else dtype, **arguments)
    assert (found.provider, found.reason) == (provider, "")
    assert ops(found) == provider.split(" + ")


@pytest.mark.parametrize(
    ("arguments", "provider"),
    [
        ({}, "aten.cat + npu.npu_swiglu"),
        ({"activation": "gelu"}, "aten.cat + npu.npu_geglu"),
        ({"gate_limit": 0.7, "up_limit": 0.7, "round_dtype": BF16}, "aten.cat + npu.npu_clipped_swiglu"),
        ({"alpha": 1.5, "round_dtype": BF16}, "aten.cat + npu.npu_clipped_swiglu"),
    ],
    ids=["silu kept in float32", "gelu kept in float32", "limits", "alpha"],
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_two_tensors_are_concatenated_where_that_keeps_more(arguments: dict[str, Any], provider: str, dynamic: bool) -> None:
    found = lowered(merged=False, dynamic=dynamic, **arguments)
    assert found.provider == provider
    assert ops(found) == provider.split(" + ")
    assert found.reason


def test_the_reason_for_concatenating() -> None:
    assert (
        lowered(merged=False).reason == "aten.silu + aten.mul: it rounds the activated gate to torch.bfloat16, the model keeps it in fp32"
    )
    limited = lowered(**PAIR_BF16, gate_limit=0.7, up_limit=0.7)
    assert limited.reason == "aten.silu + aten.mul: it does not take gate_limit=0.7, up_limit=0.7"


def test_two_tensors_of_two_dtypes() -> None:
    inputs = torch.randn(4, 8, dtype=BF16), torch.randn(4, 8)
    found = lower_and_check(glu_of(round_dtype=BF16), glu_of(), *inputs)
    assert ops(found) == ["aten.silu", "aten.mul"]
    found = lower_and_check(glu_of(out_dtype=BF16), glu_of(), *inputs)
    assert ops(found) == ["aten._to_copy", "aten.cat", "npu.npu_swiglu", "aten._to_copy"]


def glu_of(**arguments: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: glu(gate, up, **arguments)


def test_tensors_that_broadcast_are_not_concatenated() -> None:
    inputs = torch.randn(4, 8, dtype=BF16), torch.randn(1, 8, dtype=BF16)
    assert ops(lower_and_check(glu_of(round_dtype=BF16), glu_of(), *inputs)) == ["aten.silu", "aten.mul"]
    found = lower_and_check(glu_of(), glu_of(), *inputs)
    assert found.provider == REFERENCE
    assert "shapes that are not known to be equal" in found.reason


def test_the_result_is_stored_like_the_gate() -> None:
    """The caller sees the strides that the model's own elementwise ops would give."""
    for arguments in ({"round_dtype": BF16}, {}):
        gate, up = torch.randn(8, 4, dtype=BF16).T, torch.randn(4, 8, dtype=BF16)
        lower_and_check(glu_of(**arguments), glu_of(), gate, up)


# -------------------------------------------------------------------- other layouts of a merged tensor


@pytest.mark.parametrize("layout", ["halves", "swapped", "interleaved"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_other_activations_read_the_halves_as_views(activation: str, layout: str) -> None:
    found = lowered(activation=activation, layout=layout, round_dtype=BF16)
    assert found.provider == f"aten.{activation} + aten.mul"
    assert ops(found) == [f"aten.{activation}", "aten.mul"]


def test_swapped_halves_of_silu() -> None:
    assert lowered(layout="swapped", round_dtype=BF16).provider == "aten.silu + aten.mul"
    assert lowered(layout="swapped").provider == "aten.cat + npu.npu_swiglu"
    assert lowered(layout="swapped", gate_limit=1.0, up_limit=1.0).provider == "aten.cat + npu.npu_clipped_swiglu"


def test_interleaved_gelu() -> None:
    assert lowered(activation="gelu", layout="interleaved", round_dtype=BF16).provider == "npu.npu_gelu + aten.mul"
    assert lowered(activation="gelu", layout="interleaved").provider == REFERENCE


# -------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"gate_limit": 1.0}, "it has one limit, the model has 1.0 for the gate and None for up"),
        ({"up_limit": 1.0}, "it has one limit, the model has None for the gate and 1.0 for up"),
        ({"gate_limit": 1.0, "up_limit": 2.0}, "it has one limit, the model has 1.0 for the gate and 2.0 for up"),
        ({"gate_limit": 0.0, "up_limit": 0.0}, "its limit is positive, the model's is 0.0"),
    ],
    ids=["gate only", "up only", "two", "zero"],
)
def test_limits_that_the_op_has_not(arguments: dict[str, Any], reason: str) -> None:
    found = lowered(**arguments)
    assert found.provider == REFERENCE
    assert f"npu.npu_clipped_swiglu: {reason}" in found.reason


def test_float64_stays_the_reference() -> None:
    found = lower_call(lambda x: glu(x, None), torch.randn(3, 8, dtype=torch.float64))
    assert found.provider == REFERENCE
    assert "npu.npu_swiglu: input is float64, not float16 or bfloat16 or float32" in found.reason
    assert "aten.silu + aten.mul: the gate is float64" in found.reason


def test_exact_rounding_takes_what_rounds_where_the_model_does() -> None:
    exact = {"config": {"rounding": "exact"}}
    assert lowered(**exact).provider == "npu.npu_swiglu"
    rounded = lowered(round_dtype=BF16, **exact)
    assert rounded.provider == "aten.silu + aten.mul"
    assert "npu.npu_swiglu: it keeps the activated gate in fp32" in rounded.reason
    assert lowered(**PAIR_BF16, **exact).provider == "aten.silu + aten.mul"
    assert lowered(FP16, activation="gelu", round_dtype=FP16, **exact).provider == "npu.npu_geglu"
    assert lowered(BF16, activation="gelu", round_dtype=BF16, **exact).provider == "npu.npu_gelu + aten.mul"


# -------------------------------------------------------------------- whole units, as models write them


class MLP(nn.Module):
    def __init__(self, unit: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.unit = nn.Linear(24, SIZE), nn.Linear(24, SIZE), unit

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.gate(x), self.up(x))


UNITS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "llama": (lambda gate, up: F.silu(gate) * up, "npu.npu_swiglu"),
    "phi3": (lambda gate, up: up * F.silu(gate), "npu.npu_swiglu"),
    "gemma": (lambda gate, up: F.gelu(gate, approximate="tanh") * up, "npu.npu_geglu"),
    "t5": (lambda gate, up: F.gelu(gate) * up, "npu.npu_geglu"),
    "quick gelu": (lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up, "npu.npu_clipped_swiglu"),
    "deepseek_v4": (lambda gate, up: F.silu(gate.clamp(max=0.7)) * up.clamp(-0.7, 0.7), "npu.npu_clipped_swiglu"),
    "activation in float32": (lambda gate, up: (F.silu(gate.float()) * up.float()).to(gate.dtype), "npu.npu_swiglu"),
    "reglu": (lambda gate, up: F.relu(gate) * up, "aten.relu + aten.mul"),
}


@dtypes_and_shapes([BF16, FP16])
@pytest.mark.parametrize("name", UNITS)
def test_units_of_models(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    """The weights of gate and up are merged, so that one op reads the merged tensor."""
    unit, provider = UNITS[name]
    config = FusionConfig(target="ascend910b", emulate=True)
    report = fused_within_contract(MLP(unit).to(dtype), torch.randn(2, 5, 24, dtype=dtype), dynamic=dynamic, config=config)
    [site] = report.sites
    assert (site.fused, site.lowered_to) == (True, provider)


def test_two_factors_that_no_linear_merges() -> None:
    inputs = torch.randn(4, SIZE, dtype=BF16), torch.randn(4, SIZE, dtype=BF16)
    for unit, provider in (
        (lambda x, y: F.silu(x) * y, "aten.silu + aten.mul"),
        (lambda x, y: x * torch.sigmoid(1.702 * x) * y, "npu.npu_fast_gelu + aten.mul"),
        (lambda x, y: (F.silu(x.float()) * y.float()).to(x.dtype), "aten.cat + npu.npu_swiglu"),
    ):
        report = fused_within_contract(unit, *inputs, config=FusionConfig(target="ascend910b", emulate=True))
        assert [site.lowered_to for site in report.sites] == [provider]
