"""Multi-head latent attention as authors write it: DeepSeek's own code for inference, absorbed, with caches of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
Write = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Sizes:
    """H, L, N, D, R, C and V of the papers."""

    hidden: int = 48
    q_lora: int = 32
    heads: int = 4
    nope: int = 16
    rope: int = 8
    latent: int = 24
    value: int = 12


DEEPSEEK = Sizes(hidden=7168, q_lora=1536, heads=2, nope=128, rope=64, latent=512, value=128)

# -------------------------------------------------------------------- rotations, of [B, S, N, R] by tables [B, S, R]


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)


def rotate_pairs_to_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours in, halves out: transformers' DeepSeek with rope_interleave."""
    return rotate_half(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos, sin)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Complex numbers, as in DeepSeek's own code: neighbours in and out."""
    half = cos.shape[-1] // 2
    turns = torch.complex(cos[..., :half].float(), sin[..., :half].float()).unsqueeze(2)
    turned = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2)) * turns
    return torch.view_as_real(turned).flatten(3).to(x.dtype)


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours in and out, by tables of one entry a pair in the type of x."""
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(2), sin[..., :half].unsqueeze(2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def angles(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.rand(batch, tokens, width // 2) * 6
    both = torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


# -------------------------------------------------------------------- linears


class RMSNorm(nn.Module):
    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size).to(dtype) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Int8Linear(nn.Module):
    """Weights quantised for each output channel; activations for each row, when they come."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(outputs) * 0.02 / inputs**0.5 + 1e-4, requires_grad=False)

    def row_scale(self, rows: Tensor) -> Tensor:
        return rows.abs().amax(-1, keepdim=True).float() / 127.0

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = self.row_scale(rows)
        q = torch.round(rows.float() / scale).clamp(-128, 127).to(torch.int8)
        sums = torch._int_mm(q, self.weight.t())
        return (sums.float() * scale * self.scale).to(x.dtype).view(*x.shape[:-1], -1)


def linear(inputs: int, outputs: int, dtype: torch.dtype, int8: bool) -> nn.Module:
    if int8:
        return Int8Linear(inputs, outputs, dtype)
    layer = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


# -------------------------------------------------------------------- attention


class Absorbed(nn.Module):
    """DeepSeek-V3's inference/model.py with `attn_impl = "absorb"`, up to the attention: absorbed queries, rotated queries, and what is
    cached; or, with `write`, the caches after the step."""

    def __init__(
        self, sizes: Sizes, rotate: Rotate, dtype: torch.dtype, *, int8: bool = False, write: Write | None = None, heads_first: bool = False
    ) -> None:
        super().__init__()
        self.sizes, self.rotate, self.write, self.heads_first = sizes, rotate, write, heads_first
        s = sizes
        self.wq_a = linear(s.hidden, s.q_lora, dtype, int8)
        self.q_norm = RMSNorm(s.q_lora, dtype)
        self.wq_b = linear(s.q_lora, s.heads * (s.nope + s.rope), dtype, int8)
        self.wkv_a = linear(s.hidden, s.latent + s.rope, dtype, int8)
        self.kv_norm = RMSNorm(s.latent, dtype)
        self.wkv_b = linear(s.latent, s.heads * (s.nope + s.value), dtype, False)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What queries and latent are projected from."""
        return x, x

    def query(self, x: Tensor) -> Tensor:
        q: Tensor = self.wq_b(self.q_norm(self.wq_a(x)))
        return q

    def split(self, q: Tensor) -> tuple[Tensor, Tensor]:
        nope, rope = torch.split(q, [self.sizes.nope, self.sizes.rope], dim=-1)
        return nope, rope

    def latent(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        latent, rope = torch.split(kv, [self.sizes.latent, self.sizes.rope], dim=-1)
        return latent, rope

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the keys."""
        return cos, sin

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        s, (batch, tokens, _) = self.sizes, x.shape
        of_queries, of_latent = self.hidden(x)
        q = self.query(of_queries).view(batch, tokens, s.heads, s.nope + s.rope)
        q_nope, q_pe = self.split(q)
        q_pe = self.rotate(q_pe, cos, sin)
        kv, k_pe = self.latent(self.wkv_a(of_latent))
        k_pe = self.rotate(k_pe.unsqueeze(2), *self.tables(cos, sin)).squeeze(2)
        w_uk = self.wkv_b.weight.view(s.heads, -1, s.latent)[:, : s.nope]
        q_nope = q_nope.transpose(1, 2) @ w_uk if self.heads_first else torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
        kv = self.kv_norm(kv)
        if self.write is None:
            return q_nope, q_pe, kv, k_pe
        positions, kv_cache, pe_cache = caches
        self.write(kv_cache, positions, kv)
        self.write(pe_cache, positions, k_pe)
        return q_nope, q_pe, kv_cache, pe_cache


class Attending(Absorbed):
    """The same with the attention behind it, against caches [B, T, C] of which positions after the token's own are hidden."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        s, positions = self.sizes, caches[0]
        q_nope, q_pe, kv, pe = super().forward(x, cos, sin, *caches)
        scores = torch.einsum("bshc,btc->bsht", q_nope, kv) + torch.einsum("bshr,btr->bsht", q_pe, pe)
        scores = scores * (s.nope + s.rope) ** -0.5
        hidden = torch.arange(kv.shape[1], device=kv.device) > positions[:, None]
        scores = scores.masked_fill(hidden[None, :, None], -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        latent = torch.einsum("bsht,btc->bshc", weights, kv)
        w_uv = self.wkv_b.weight.view(s.heads, -1, s.latent)[:, s.nope :]
        return torch.einsum("bshc,hdc->bshd", latent, w_uv), kv, pe


# -------------------------------------------------------------------- caches


def index_copied(cache: Tensor, positions: Tensor, rows: Tensor) -> None:
    """A static cache [B, T, C]: every sequence at the same positions."""
    cache.index_copy_(1, positions, rows)


def paged(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """A cache [blocks, page, C] by slot numbers."""
    cache.view(-1, rows.shape[-1])[slots] = rows.reshape(-1, rows.shape[-1])
