"""Weight-only linears on Ascend: what becomes npu_weight_quant_batchmatmul, what does not and why, and the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.weight_only import weight_only_linear
from tests.int4 import layer
from tests.lowerings.ascend.checks import Lowered, lower_call

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


# -------------------------------------------------------------------- four bits

LAYOUTS = ("awq", "columns", "gptq", "rows", "signed", "pairs", "swapped")
INT4 = f"{OP} (int4)"


def lower_int4(layout: str, dtype: torch.dtype, names: tuple[str, ...], groups: int = 4, offset: int = 0, **options: Any) -> Lowered:
    """Lower a layer and hold the result to the numeric contract."""
    of = layer(dtype, groups=groups)
    form = of.arguments(layout)
    inputs = [of.x, form.pop("weight"), of.scale, *(getattr(of, name) for name in names)]

    def fn(*tensors: Tensor) -> Any:
        return weight_only_linear(*tensors[:3], **dict(zip(names, tensors[3:])), offset=offset, **form)

    found = lower_call(fn, *inputs, **options)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    assert_within_contract(found.gm(*inputs), fn(*inputs), fn(*exact), dtype)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("names", "offset"), [((), 8), (("zero", "bias"), 0), (("bias",), 3)], ids=["middle", "zeros", "three"])
def test_int4_layouts(layout: str, names: tuple[str, ...], offset: int) -> None:
    """Words of eight outputs are taken; torch_npu 2.13 misreads the size of words of inputs."""
    found = lower_int4(layout, BF16, names, offset=offset)
    assert (found.provider == INT4) == (layout in ("awq", "columns"))
    assert found.provider == INT4 or "torch_npu takes words of eight outputs" in found.reason


@pytest.mark.parametrize(("layout", "groups"), [("awq", 1), ("columns", 8), ("awq", 2)])
def test_int4_groups(layout: str, groups: int) -> None:
    assert lower_int4(layout, FP16, ("zero", "bias"), groups=groups).provider == INT4


@pytest.mark.parametrize(("layout", "count"), [("columns", {"bitwise_xor": 1, "index_select": 0})])
def test_int4_words_in_order_are_not_repacked(layout: str, count: dict[str, int]) -> None:
    targets = lower_int4(layout, BF16, (), offset=8).targets()
    assert {name: targets.count(f"aten.{name}") for name in count} == count


@pytest.mark.parametrize(
    ("layout", "groups", "dtype", "reason"),
    [
        ("planes", 4, BF16, "of 32 words in a row each holds numbers that lie as far apart"),
        ("columns", 16, BF16, "antiquant_group_size"),
        ("columns", 4, torch.float32, "x is float32, not float16 or bfloat16"),
    ],
)
def test_int4_refused(layout: str, groups: int, dtype: torch.dtype, reason: str) -> None:
    found = lower_int4(layout, dtype, ("zero",), groups=groups)
    assert found.provider == REFERENCE
    assert reason in found.reason
