"""A decode step like DeepSeek-V3's, quantised: absorbed attention over static caches of latents, linears of int8, dense blocks.

Sizes are those of DeepSeek-V3, one of eight shards of its heads and of the width of its dense blocks; the weights are random.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_fusion import store_inputs_first
from tests.patterns.mla_models import Attending, Int8Linear, RMSNorm, Sizes, angles, index_copied, rotate_pairs_to_halves

SIZES = Sizes(hidden=7168, q_lora=1536, heads=16, nope=128, rope=64, latent=512, value=128)
WIDTH, LENGTH = 2304, 256
DTYPE = torch.bfloat16


class Layer(nn.Module):
    def __init__(self, sizes: Sizes, width: int) -> None:
        super().__init__()
        self.input_norm, self.post_norm = RMSNorm(sizes.hidden, DTYPE), RMSNorm(sizes.hidden, DTYPE)
        self.attention = Attending(sizes, rotate_pairs_to_halves, DTYPE, int8=True, write=index_copied)
        self.wo = Int8Linear(sizes.heads * sizes.value, sizes.hidden, DTYPE)
        self.gate, self.up = (Int8Linear(sizes.hidden, width, DTYPE) for _ in range(2))
        self.down = Int8Linear(width, sizes.hidden, DTYPE)

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        attended = self.attention(self.input_norm(x), *inputs)[0]
        x = x + self.wo(attended.flatten(2))
        h = self.post_norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


class Decoder(nn.Module):
    """Layers one after the other: hidden states, tables of positions, a position, and two caches for each layer."""

    def __init__(self, layers: int = 2, sizes: Sizes = SIZES, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes, width) for _ in range(layers))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        for layer, pair in zip(self.layers, caches, strict=True):
            x = layer(x, cos, sin, position, *pair)
        return x

    def store_inputs_first(self) -> None:
        """The projections of the attention as npu_mla_prolog_v3 reads them."""
        for layer in self.layers:
            store_inputs_first([layer.attention.wq_a, layer.attention.wq_b, layer.attention.wkv_a])


def build(layers: int = 2, width: int = WIDTH) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(layers, width=width).eval().requires_grad_(False)
    model.store_inputs_first()
    return model


def inputs(model: Decoder, batch: int) -> dict[str, Any]:
    """One token a sequence, behind some that are cached."""
    sizes, device = SIZES, next(model.parameters()).device
    cos, sin = (table.to(device) for table in angles(batch, 1, sizes.rope, DTYPE))
    caches = [
        tuple(torch.randn(batch, LENGTH, size).to(DTYPE).to(device) for size in (sizes.latent, sizes.rope))
        for _ in range(len(model.layers))
    ]
    position = torch.tensor([LENGTH // 2], device=device)
    return {"x": torch.randn(batch, 1, sizes.hidden).to(DTYPE).to(device), "cos": cos, "sin": sin, "position": position, "caches": caches}
