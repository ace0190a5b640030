"""Four-bit weights for tests: matrices of numbers 0 to 15, and the words that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AWQ = (0, 16, 4, 20, 8, 24, 12, 28)
GPTQ = tuple(range(0, 32, 4))


def pack(codes: Tensor, shifts: Sequence[int], plane: int = 1) -> Tensor:
    """Words of codes [R, C] along their rows, by the definition in `weight_only_linear`: int32 of eight, uint8 of two."""
    width = len(shifts)
    planes = codes.to(torch.int64).unflatten(1, (-1, width, plane))
    words = sum(((planes[:, :, i] & 15) << shift for i, shift in enumerate(shifts)), torch.zeros((), dtype=torch.int64))
    return words.flatten(1).to(torch.int32 if width == 8 else torch.uint8)


@dataclass
class Layer:
    """A quantised layer of random numbers; `q` is [N, K], 0 to 15, scale and zero are [N, G]."""

    x: Tensor
    q: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor

    def arguments(self, layout: str) -> dict[str, Any]:
        """Weight and layout as `weight_only_linear` takes them."""
        return {
            "awq": lambda: {"weight": pack(self.q.t(), AWQ).t(), "shifts": AWQ, "packs_inputs": False},
            "columns": lambda: {"weight": pack(self.q.t(), GPTQ).t(), "shifts": GPTQ, "packs_inputs": False},
            "gptq": lambda: {"weight": pack(self.q, GPTQ).t().contiguous().t(), "shifts": GPTQ},
            "rows": lambda: {"weight": pack(self.q, GPTQ), "shifts": GPTQ},
            "signed": lambda: {"weight": pack(self.q, GPTQ), "shifts": GPTQ, "signed": True},
            "pairs": lambda: {"weight": pack(self.q, (0, 4)), "shifts": (0, 4)},
            "swapped": lambda: {"weight": pack(self.q, (4, 0)), "shifts": (4, 0)},
            "planes": lambda: {"weight": pack(self.q.t(), (4, 0), len(self.q) // 2).t(), "shifts": (4, 0), "packs_inputs": False},
        }[layout]() | ({"plane": len(self.q) // 2} if layout == "planes" else {})


def layer(dtype: torch.dtype, inputs: int = 256, outputs: int = 64, groups: int = 4, rows: Sequence[int] = (2, 3)) -> Layer:
    x, bias = torch.randn(*rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
    q = torch.randint(0, 16, (outputs, inputs))
    scale = (torch.rand(outputs, groups) / 64 + 0.01).to(dtype)
    return Layer(x, q, scale, torch.randint(0, 17, (outputs, groups), dtype=torch.int8), bias)
