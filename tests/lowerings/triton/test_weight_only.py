"""Weight-only linears by Triton: every layout of four-bit words, one to many tokens, and what is refused. bf16 is for the GPU's tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion
from npu_fusion.lower import REFERENCE
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.weight_only import weight_only_linear
from tests.int4 import layer
from tests.lowerings.ascend.checks import Lowered, lower_call

CUDA = {"target": "cuda"}
OP = "triton.w4a16_linear"


def lowered(layout: str, names: tuple[str, ...], *, offset: int = 0, dtype: torch.dtype = torch.float16, **options: Any) -> Lowered:
    """Lower a layer and hold the result to the numeric contract."""
    sizes = {name: options.pop(name) for name in ("groups", "rows") if name in options}
    of = layer(dtype, **sizes)
    form = of.arguments(layout)
    inputs = [of.x, form.pop("weight"), of.scale, *(getattr(of, name) for name in names)]

    def fn(*tensors: Tensor) -> Any:
        return weight_only_linear(*tensors[:3], **dict(zip(names, tensors[3:])), offset=offset, **form)

    found = lower_call(fn, *inputs, **CUDA, **options)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    assert_within_contract(found.gm(*inputs), fn(*inputs), fn(*exact), dtype)
    return found


@pytest.mark.parametrize("layout", ["awq", "columns", "gptq", "rows", "signed", "pairs", "swapped"])
def test_layouts(layout: str) -> None:
    assert lowered(layout, ("zero", "bias"), rows=(2,)).provider == OP


@pytest.mark.parametrize(("layout", "offset"), [("awq", 8), ("signed", 0), ("gptq", 3)])
def test_offsets(layout: str, offset: int) -> None:
    assert lowered(layout, ("bias",), rows=(2,), offset=offset).provider == OP


@pytest.mark.parametrize("rows", [(), (1,), (1, 40)], ids=str)
def test_tokens(rows: tuple[int, ...]) -> None:
    assert lowered("gptq", ("zero",), rows=rows).provider == OP


@pytest.mark.parametrize("groups", [1, 8])
def test_groups(groups: int) -> None:
    assert lowered("awq", ("zero",), groups=groups, rows=(2,)).provider == OP


def test_words_of_inputs_are_not_copied() -> None:
    """GPTQ's words are read where they lie: the activations change places."""
    found = lowered("gptq", (), offset=8)
    [call] = [node for node in found.gm.graph.nodes if "w4a16_linear" in str(node.target)]
    assert call.args[1].target is torch.ops.aten.transpose.int
    assert call.args[1].args[0].op == "placeholder"
    assert "npu_fusion_triton.w4a16_repack_awq" not in found.targets()


def test_tokens_of_one_graph_choose_when_it_runs() -> None:
    """One graph takes decode steps and prefills: the op looks at the number of rows that it gets."""
    of = layer(torch.float16, rows=(2,))
    form = of.arguments("gptq")
    weight = form.pop("weight")

    def fn(x: Tensor) -> Any:
        return weight_only_linear(x, weight, of.scale, of.zero, **form)

    torch.compiler.reset()
    compiled = torch.compile(fn, backend="npu_fusion", options={**CUDA, "emulate": True, "executor": "eager"})
    for rows in (2, 9, 40):
        x = torch.randn(rows, of.x.shape[-1]).half()
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert_within_contract(compiled(x), fn(x), fn(x.double()), torch.float16)
    report = npu_fusion.report(compiled)
    assert len(report.records) == 1
    assert any("w4a16_linear" in str(node.target) for node in report.graph("lowered").graph.nodes)


@pytest.mark.parametrize(
    ("layout", "options", "reason"),
    [
        ("planes", {}, "of 32 words in a row each holds numbers that lie as far apart"),
        ("rows", {"groups": 16}, "it takes groups of a multiple of 32 inputs, the model's are of 16"),
        ("rows", {"rounding": "exact"}, "rounding is 'exact'"),
        ("rows", {"dtype": torch.float32}, "x is torch.float32"),
    ],
)
def test_refused(layout: str, options: dict[str, Any], reason: str) -> None:
    found = lowered(layout, ("zero",), **options)
    assert found.provider == REFERENCE
    assert reason in found.reason
