"""Rows for the wire: as they are, or of 8 bits an element with one scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""Names of 8-bit formats to the dtype and the largest value; `none` sends rows as they are."""


def quantize_rows(x: Tensor, quant: str) -> tuple[Tensor, Tensor | None]:
    """Rows [T, H] in a format, and their scales [T, 1] in fp32 (None for ones): x is about `row * scale`.

    The scale is absmax / largest (1 for a row of zeros), computed in fp32; int8 rounds half to even, fp8 as the cast does.
    """
    if quant == "none":
        return x, None
    dtype, largest = FORMATS[quant]
    wide = x.float()
    most = wide.abs().amax(dim=1, keepdim=True)
    scale = torch.where(most > 0, most / largest, 1.0)
    scaled = (wide / scale).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale
