"""What the tests of the rope rules share: inputs, the rotation as llama writes it, and the call that a report holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_fusion import FusionReport

BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 6, 4, 2, 16
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(dtype: torch.dtype = torch.float32, width: int = DIM, table_dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """q [B, N, S, D], k [B, Nk, S, D], cos and sin [B, 1, S, width]; the last sizes stay static, as those of a model are."""
    q, k = torch.randn(BATCH, HEADS, SEQ, DIM, dtype=dtype), torch.randn(BATCH, KV_HEADS, SEQ, DIM, dtype=dtype)
    angles = torch.rand(2, BATCH, 1, SEQ, width) * 2 - 1
    return tuple(static_last(t) for t in (q, k, *angles.to(table_dtype or dtype)))


def static_last(tensor: Tensor) -> Tensor:
    torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    return tensor


def both(rotate: Rotate) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


def arguments(report: FusionReport, op: str = "rotary") -> dict[str, Any]:
    """The keyword arguments of the one call of a semantic op."""
    calls = [n for n in report.graph("fused").graph.nodes if n.op == "call_function" and str(n.target) == f"npu_fusion.{op}.default"]
    assert len(calls) == 1, report.ops
    return dict(calls[0].kwargs)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin
