"""What the tests of the attention rules share: inputs, the parts that models write attention of, and what is asked of a report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from npu_fusion import FusionReport

BATCH, HEADS, KV_HEADS, TOKENS, SIZE = 2, 4, 2, 6, 8
SCALE = SIZE**-0.5
DTYPES = [torch.float32, torch.bfloat16]

Inputs = tuple[Tensor, ...]


def heads(dtype: torch.dtype, tokens: int = TOKENS, kv: int = TOKENS, kv_heads: int = KV_HEADS, size: int = SIZE) -> Inputs:
    """Query [B, N, S, D], key [B, G, T, D], value [B, G, T, size]."""
    shapes = (BATCH, HEADS, tokens, SIZE), (BATCH, kv_heads, kv, SIZE), (BATCH, kv_heads, kv, size)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def repeat_kv(x: Tensor) -> Tensor:
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, HEADS // g, t, d).reshape(b, HEADS, t, d)


def causal(q: Tensor, k: Tensor) -> Tensor:
    """The boolean mask [S, T] of queries that are the last of the keys."""
    return torch.arange(k.shape[-2])[None, :] <= torch.arange(q.shape[-2])[:, None] + (k.shape[-2] - q.shape[-2])


def lowest(q: Tensor) -> float:
    return torch.finfo(q.dtype).min


def calls_of(report: FusionReport) -> list[Node]:
    """The attention ops of the fused graph, in order."""
    return [node for node in report.graph("fused").graph.nodes if str(node.target) == "npu_fusion.attention.default"]


def assert_fused(report: FusionReport, count: int = 1, **arguments: Any) -> list[Node]:
    """`count` calls, nothing missed, each with these arguments; None stands for an argument left at its default."""
    assert report.idioms["attention"] == count, str(report)
    assert not [site for site in report.missed if site.idiom == "attention"], str(report)
    calls = calls_of(report)
    assert len(calls) == count
    for call in calls:
        for name, wanted in arguments.items():
            given = call.kwargs.get(name) or None
            assert (given == pytest.approx(wanted)) if isinstance(wanted, float) else given == wanted, (name, given)
    return calls


def assert_missed(report: FusionReport, reason: str) -> None:
    assert not calls_of(report)
    assert [reason in (site.reason or "") for site in report.missed if site.idiom == "attention"] == [True], str(report.missed)


def kv_heads_of(call: Node) -> list[int]:
    return [call.args[i].meta["val"].shape[1] for i in (1, 2)]


def after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' eager_attention_forward."""
    w = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * SCALE
    w = w + torch.where(causal(q, k), torch.zeros((), dtype=q.dtype), lowest(q))
    w = F.softmax(w, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(w, 0.1, training=False), repeat_kv(v)).transpose(1, 2).contiguous()


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    w = q @ repeat_kv(k).mT * SCALE
    return (w if bias is None else w + bias).softmax(-1) @ repeat_kv(v)
