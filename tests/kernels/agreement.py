"""What the tests of kernels share: sizes, inputs that lie apart, and how a quantised result agrees with float64."""

from __future__ import annotations

import torch
from torch import Tensor

CORES = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 1
"""What kernels are planned for; on a CPU one, so that few programs are interpreted, with several rows each."""
HIDDEN = (1024, 2048, 2304, 3584, 4096, 5120, 7168, 8192, 18432)
"""Widths of real models."""


def strided(order: str, device: str) -> Tensor:
    """[4, 3, 40] numbers whose rows lie evenly apart, unevenly, or are not in one piece."""
    if order == "even":
        return torch.randn(4, 3, 56, device=device)[..., 8:48]
    if order == "uneven":
        return torch.randn(4, 5, 40, device=device)[:, :3]
    return torch.randn(40, 3, 4, device=device).permute(2, 1, 0)


def assert_nearest(q: Tensor, values: Tensor, scale: Tensor, zero: Tensor | float = 0.0, lowest: int = -127) -> None:
    """q is the nearest whole number within [lowest, 127] to values / scale + zero, of float64, but for what fp32 may err."""
    units = torch.where(scale == 0, 0.0, values / torch.where(scale == 0, 1.0, scale)) + zero
    exact = units.clamp(lowest, 127)
    assert q.dtype == torch.int8
    off = (q.double() - exact).abs().max().item()
    assert off <= 0.5 + 1e-4, f"{off} from the exact value"
