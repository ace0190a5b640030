"""Self-test cases of matrix products with integer weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import HALVES, Arguments, Case, Inputs, case

_OP = "npu::npu_weight_quant_batchmatmul"


def cases() -> Iterator[Case]:
    """A decode step and a prefill: int8 weights as linears store them, [N, K]; int4 in words of outputs."""
    for dtype in HALVES:
        yield case(_OP, _product, dtype, tokens=1, k=512, n=256, with_offset=False)
        yield case(_OP, _product, dtype, tokens=48, k=512, n=256, with_offset=True)
        yield case(_OP, _int4_product, dtype, tokens=1, k=512, n=256, group=128)
        yield case(_OP, _int4_product, dtype, tokens=48, k=512, n=256, group=0)


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


def _int4_product(inputs: Inputs, dtype: torch.dtype, tokens: int, k: int, n: int, group: int) -> Arguments:
    """Eight codes of outputs a word."""
    codes = (inputs.normal((k, n), torch.float32) * 3).round().clamp(-8, 7).to(torch.int64)
    weight = sum((codes[:, i::8] & 15) << 4 * i for i in range(8)).to(torch.int32)  # type: ignore[union-attr]
    sizes = (k // group if group else 1, n)
    scale, offset = inputs.near_one(sizes, dtype) / 3 * k**-0.5, inputs.normal(sizes, dtype, scale=2.0).round()
    laid_out = {"weight": weight, "antiquant_scale": scale, "antiquant_offset": offset}
    return {"x": inputs.normal((tokens, k), dtype), **laid_out, "antiquant_group_size": group}
