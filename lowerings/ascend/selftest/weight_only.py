"""Self-test cases of matrix products with integer weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import HALVES, Arguments, Case, Inputs, case


def cases() -> Iterator[Case]:
    """A decode step and a prefill against weights that are stored as linears store them, [N, K]."""
    for dtype in HALVES:
        yield case("npu::npu_weight_quant_batchmatmul", _product, dtype, tokens=1, k=512, n=256, with_offset=False)
        yield case("npu::npu_weight_quant_batchmatmul", _product, dtype, tokens=48, k=512, n=256, with_offset=True)


def _product(inputs: Inputs, dtype: torch.dtype, tokens: int, k: int, n: int, with_offset: bool) -> Arguments:
    codes = (inputs.normal((n, k), torch.float32) * 40).round().clamp(-128, 127).to(torch.int8)
    arguments: dict[str, torch.Tensor] = {
        "x": inputs.normal((tokens, k), dtype),
        "weight": codes.t(),
        "antiquant_scale": inputs.near_one((n,), dtype) / 40 * k**-0.5,
    }
    if with_offset:
        arguments["antiquant_offset"] = inputs.normal((n,), dtype, scale=4.0).round()
    return arguments
