"""A small transformer block, and the words in which the tests of backend and executors speak of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from npu_fusion.backend import npu_fusion_backend, records_of
from npu_fusion.record import GraphRecord


class Block(nn.Module):
    """Norm, attention and a gated MLP, as plain as they come."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.gate, self.up, self.down = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def compiled(fn: Any, **kwargs: Any) -> Any:
    kwargs.setdefault("backend", npu_fusion_backend)
    return torch.compile(fn, **kwargs)


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert (a.double() - b.double()).abs().max() <= tolerance * max(1.0, b.double().abs().max().item())
        else:
            assert a == b


def single(fn: Any) -> GraphRecord:
    (record,) = records_of(fn)
    return record
