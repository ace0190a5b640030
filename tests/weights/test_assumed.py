"""GPTQ's linear as its authors write it: shifts and the group of each input are buffers, whose numbers the graph relies on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npu_fusion

K, N, GROUP = 128, 32, 32


class QuantLinear(nn.Module):
    """AutoGPTQ's linear without its kernels; `first` says what zero points are counted from."""

    def __init__(self, first: int = 1, by_buffer: bool = True) -> None:
        super().__init__()
        self.first = first
        for name, rows, columns in (("qweight", K // 8, N), ("qzeros", K // GROUP, N // 8)):
            self.register_buffer(name, torch.randint(-(2**31), 2**31, (rows, columns)).to(torch.int32))
        self.register_buffer("scales", (torch.rand(K // GROUP, N) / 64 + 0.01).half())
        self.register_buffer("g_idx", (torch.arange(K) // GROUP).to(torch.int32))
        wf = torch.tensor(list(range(0, 32, 4)), dtype=torch.int32).unsqueeze(0)
        if by_buffer:
            self.register_buffer("wf", wf, persistent=False)
        else:
            self.wf = wf

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.bitwise_right_shift(self.qzeros.unsqueeze(2).expand(-1, -1, 8), self.wf.unsqueeze(0)).to(torch.int8)  # type: ignore[operator]
        zeros = (torch.bitwise_and(zeros, 15) + self.first).reshape(self.scales.shape)  # type: ignore[arg-type]
        weight = torch.bitwise_right_shift(self.qweight.unsqueeze(1).expand(-1, 8, -1), self.wf.unsqueeze(-1)).to(torch.int8)  # type: ignore[operator]
        weight = torch.bitwise_and(weight, 15)
        weight = weight.reshape(weight.shape[0] * weight.shape[1], weight.shape[2])
        weight = self.scales[self.g_idx.long()] * (weight - zeros[self.g_idx.long()])  # type: ignore[index,operator]
        return torch.matmul(x, weight)


def run(model: nn.Module, **options: Any) -> tuple[Any, Tensor]:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="npu_fusion", fullgraph=True, dynamic=False, options=options)
    return compiled, torch.randn(3, K).half()


def agrees(compiled: Any, model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(compiled(x), model(x))


def fused(compiled: Any) -> bool:
    nodes = npu_fusion.report(compiled).graph("fused").graph.nodes
    return any(node.kwargs.get("shifts") for node in nodes if "weight_only_linear" in str(node.target))


@pytest.mark.parametrize(("first", "by_buffer"), [(1, True), (0, True), (1, False)])
def test_fused(first: int, by_buffer: bool) -> None:
    model = QuantLinear(first, by_buffer)
    compiled, x = run(model)
    assert agrees(compiled, model, x)
    assert fused(compiled)
    assert any("small integer buffers" in note for note in npu_fusion.report(compiled).notes)


def test_inputs_in_another_order_are_not_fused() -> None:
    model = QuantLinear()
    model.g_idx.copy_(model.g_idx[torch.randperm(K)])  # type: ignore[operator,index]
    compiled, x = run(model)
    assert agrees(compiled, model, x)
    assert not fused(compiled)


@pytest.mark.parametrize("how", ["copy", "rebind", "load_state_dict", "data"])
def test_other_numbers_run_unfused(how: str) -> None:
    model, other = QuantLinear(), QuantLinear()
    compiled, x = run(model)
    assert agrees(compiled, model, x)
    other.g_idx.copy_(other.g_idx.flip(0))  # type: ignore[operator]
    if how == "copy":
        model.g_idx.copy_(other.g_idx)  # type: ignore[operator]
    elif how == "rebind":
        model.g_idx = other.g_idx
    elif how == "load_state_dict":
        model.load_state_dict(other.state_dict())
    else:
        model.g_idx.data.copy_(other.g_idx)  # type: ignore[union-attr]
        npu_fusion.reload_weights(compiled)
    assert agrees(compiled, model, x)
    model.g_idx.copy_((torch.arange(K) // GROUP).to(torch.int32))  # type: ignore[operator]
    assert agrees(compiled, model, x)


def test_nothing_is_read_where_it_must_not_be() -> None:
    model = QuantLinear()
    compiled, x = run(model, read_index_buffers=False)
    assert agrees(compiled, model, x)
    assert not fused(compiled)
