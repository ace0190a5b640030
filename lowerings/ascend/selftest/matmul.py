"""Self-test cases of the matrix products."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import BF16, FP16, HALVES, Arguments, Case, Inputs, case


def cases() -> Iterator[Case]:
    """The absorbed projections of MLA: a token's heads against the weight of each head, results token by token."""
    for dtype in HALVES:
        yield case("npu::npu_transpose_batchmatmul", _product, dtype, tokens=32, heads=16, k=512, n=128, input="MBK")
    yield case("npu::npu_transpose_batchmatmul", _product, BF16, tokens=1, heads=8, k=128, n=512, input="MBK")
    yield case("npu::npu_transpose_batchmatmul", _product, FP16, tokens=32, heads=16, k=512, n=128, input="BMK")


def _product(inputs: Inputs, dtype: torch.dtype, tokens: int, heads: int, k: int, n: int, input: str) -> Arguments:
    transposed = input == "MBK"
    return {
        "input": inputs.normal((tokens, heads, k) if transposed else (heads, tokens, k), dtype),
        "weight": inputs.normal((heads, k, n), dtype, scale=k**-0.5),
        "perm_x1": [1, 0, 2] if transposed else [0, 1, 2],
        "perm_x2": [0, 1, 2],
        "perm_y": [1, 0, 2],
    }
