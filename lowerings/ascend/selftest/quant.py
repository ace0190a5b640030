"""Self-test cases of quantisation and of products of int8."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import HALVES, Arguments, Case, Inputs, case


def cases() -> Iterator[Case]:
    """Rows of a decode step and of prefill; weights as linears store them, [N, K]."""
    for dtype in HALVES:
        yield case("npu::npu_dynamic_quant", _rows, dtype, tokens=1, hidden=512, smooth=False)
        yield case("npu::npu_dynamic_quant", _rows, dtype, tokens=48, hidden=1024, smooth=True)
        yield case("npu::npu_quant_matmul", _product, dtype, tokens=1, k=512, n=256, with_bias=False)
        yield case("npu::npu_quant_matmul", _product, dtype, tokens=48, k=512, n=256, with_bias=True)


def _rows(inputs: Inputs, dtype: torch.dtype, tokens: int, hidden: int, smooth: bool) -> Arguments:
    arguments: Arguments = {"input": inputs.normal((tokens, hidden), dtype)}
    return {**arguments, "smooth_scales": inputs.near_one((hidden,), dtype)} if smooth else arguments


def _product(inputs: Inputs, dtype: torch.dtype, tokens: int, k: int, n: int, with_bias: bool) -> Arguments:
    def codes(*shape: int) -> torch.Tensor:
        return (inputs.normal(shape, torch.float32) * 40).round().clamp(-128, 127).to(torch.int8)

    arguments: Arguments = {
        "x1": codes(tokens, k),
        "x2": codes(n, k).t(),
        "scale": inputs.near_one((n,), torch.float32) / 40 * k**-0.5,
        "pertoken_scale": inputs.near_one((tokens,), torch.float32) / 40,
        "output_dtype": 5 if dtype == torch.float16 else 15,
    }
    return {**arguments, "bias": inputs.normal((n,), torch.float32)} if with_bias else arguments
