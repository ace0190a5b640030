"""Linears of four-bit weights on a CUDA device: AWQ's and GPTQ's buffers, decode and prefill, every executor. `make gpu-test`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import npu_fusion
from npu_fusion.numerics import assert_within_contract

pytestmark = pytest.mark.gpu

K, N, GROUP = 1024, 512, 128


class Quantised(nn.Module):
    """A layer that packs outputs (AWQ) or inputs (GPTQ)."""

    def __init__(self, packs_inputs: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.packs_inputs = packs_inputs
        sizes = {"qweight": (K // 8, N) if packs_inputs else (K, N // 8), "qzeros": (K // GROUP, N // 8)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.randint(-(2**31), 2**31, size).to(torch.int32))
        self.register_buffer("scales", (torch.rand(K // GROUP, N) / 64 + 0.01).to(dtype))
        order = range(0, 32, 4) if packs_inputs else (0, 16, 4, 20, 8, 24, 12, 28)
        self.register_buffer("shifts", torch.tensor(list(order), dtype=torch.int32))

    def weight(self) -> Tensor:
        zeros = ((self.qzeros.unsqueeze(-1) >> self.shifts) & 15).flatten(1)  # type: ignore[operator]
        if self.packs_inputs:
            codes = ((self.qweight.unsqueeze(1) >> self.shifts[:, None]) & 15).flatten(0, 1)  # type: ignore[operator,index]
        else:
            codes = ((self.qweight.unsqueeze(-1) >> self.shifts) & 15).flatten(1)  # type: ignore[operator]
        return (codes - zeros.repeat_interleave(GROUP, 0)) * self.scales.repeat_interleave(GROUP, 0)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight()


@pytest.mark.parametrize("packs_inputs", [False, True], ids=["awq", "gptq"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("executor", ["eager", "graph", "inductor"])
@pytest.mark.parametrize("keep", [False, True], ids=["anew", "kept"])
def test_layers(packs_inputs: bool, dtype: torch.dtype, executor: str, keep: bool) -> None:
    torch.compiler.reset()
    model = Quantised(packs_inputs, dtype).cuda()
    options = {"executor": executor, "keep_prepared_weights": keep}
    compiled = torch.compile(model, backend="npu_fusion", fullgraph=True, dynamic=False, options=options)
    with torch.no_grad():
        for words in (model.qweight.clone(), model.qweight.flip(0)):  # type: ignore[operator]
            model.qweight.copy_(words)  # type: ignore[operator]
            for rows in (1, 8, 64):
                x = torch.randn(rows, K, device="cuda", dtype=dtype)
                for _ in range(3):
                    fused = compiled(x)
                assert_within_contract(fused, model(x), x.double() @ model.weight().double(), dtype)
    assert {site.lowered_to for site in npu_fusion.report(compiled).sites} == {"triton.w4a16_linear"}
