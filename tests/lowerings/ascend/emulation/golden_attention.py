"""Attention in float64, query by query, for the tests of the CPU kernels; operands in every layout; calls of FIA."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.ascend.emulation import EmulationError
from tests.lowerings.ascend.checks import check_kernel

npu = torch.ops.npu
V1, V2 = "npu::npu_fused_infer_attention_score", "npu::npu_fused_infer_attention_score_v2"
SCALE = 0.2

Sees = Callable[[int, int, int], bool]
"""Whether query i of sequence b sees key j."""


@dataclass
class Golden:
    """float64: output [B, N, Sq, Dv], and of each row's softmax the maximum, sum and log-sum-exp [B, N, Sq]."""

    output: Tensor
    maximum: Tensor
    total: Tensor
    lse: Tensor


def see_all(b: int, i: int, j: int) -> bool:
    return True


def golden(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sees: Sees = see_all,
    *,
    bias: Callable[[int, int, int, int], float] | None = None,
    bias_before_scale: bool = False,
    sink: Tensor | None = None,
    weight: Callable[[int, int, int, int], float] | None = None,
) -> Golden:
    """Operands are [B, N or Nkv, S, D]. A row that sees nothing is 0, with -inf as maximum and +inf as log-sum-exp."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    output = torch.zeros(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    maximum = torch.full((batch, heads, queries), -torch.inf, dtype=torch.float64)
    total, lse = torch.zeros_like(maximum), torch.full_like(maximum, torch.inf)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = [j for j in range(k.shape[2]) if sees(b, i, j)]
                if not seen:
                    continue
                scores = k[b, h // group, seen] @ q[b, h, i]
                added = torch.tensor([bias(b, h, i, j) for j in seen], dtype=torch.float64) if bias else torch.zeros_like(scores)
                scores = (scores + added) * scale if bias_before_scale else scores * scale + added
                top = float(scores.max())
                weights = (scores - top).exp()
                norm = float(weights.sum()) + (math.exp(float(sink[h]) - top) if sink is not None else 0)
                if weight:
                    weights = weights * torch.tensor([weight(b, h, i, j) for j in seen], dtype=torch.float64)
                output[b, h, i] = weights @ v[b, h // group, seen] / norm
                maximum[b, h, i], total[b, h, i], lse[b, h, i] = top, norm, top + math.log(norm)
    return Golden(output, maximum, total, lse)


_LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "BNSD": lambda x: x,
    "BSND": lambda x: x.transpose(1, 2),
    "BSH": lambda x: x.transpose(1, 2).flatten(2),
    "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2),
    "NBSD": lambda x: x.transpose(0, 1),
    "NSD": lambda x: x.squeeze(0),
    "TND": lambda x: x.squeeze(0).transpose(0, 1),
    "NTD": lambda x: x.squeeze(0),
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """[B, N, S, D] in a layout; packed ones and NSD take batch 1."""
    return _LAID_OUT[layout](x).contiguous()


def operands(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    width: int = 32,
    dtype: torch.dtype = torch.float16,
    value_width: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value, [B, N, S, D]."""
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * queries + 1000 * keys)
    q = torch.randn(batch, heads, queries, width, generator=generator)
    k = torch.randn(batch, kv_heads, keys, width, generator=generator)
    v = torch.randn(batch, kv_heads, keys, value_width or width, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@cache
def causal_mask(dtype: torch.dtype = torch.bool) -> Tensor:
    """The compressed mask of the causal and band modes."""
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1).to(dtype)


def assert_close(actual: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    """`actual` is `exact` within a few roundings of its dtype, or of `dtype`, in which the weights of the softmax were rounded."""
    eps = torch.finfo(dtype or actual.dtype).eps
    tolerance = 3 * eps if eps > 1e-6 else 2e-5
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


def assert_raises(match: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The call raises an EmulationError whose message matches."""
    with pytest.raises(EmulationError, match=match):
        call(*args, **kwargs)


def sparse(mode: int, pre: int, following: int, queries: int, keys: int) -> Sees:
    """What a query sees with a sparse mode of all attention ops."""
    shift = keys - queries

    def sees(b: int, i: int, j: int) -> bool:
        if mode == 0:
            return i - pre <= j <= i + following
        if mode == 4:
            return i + shift - pre <= j <= i + shift + following
        return {1: True, 2: j <= i, 3: j <= i + shift}[mode]

    return sees


# -------------------------------------------------------------------- npu_fused_infer_attention_score

RENAMED = {
    "num_heads": "num_query_heads",
    "scale": "softmax_scale",
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
    "softmax_lse_flag": "return_softmax_lse",
}


def both(q: Tensor, k: Tensor, v: Tensor, *, fakes: bool = False, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Both versions of FIA, which must agree; and their fake kernels."""
    arguments = {"scale": SCALE, "softmax_lse_flag": True, **arguments}
    renamed = {RENAMED.get(name, name): argument for name, argument in arguments.items()}
    if fakes:
        out, lse = check_kernel(V1, q, k, v, **arguments)
        others = check_kernel(V2, q, k, v, **renamed)
    else:
        out, lse = npu.npu_fused_infer_attention_score(q, k, v, **arguments)
        others = npu.npu_fused_infer_attention_score_v2(q, k, v, **renamed)
    assert torch.equal(out, others[0])
    assert torch.equal(lse, others[1])
    return out, lse


def fia(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """The output of the first version."""
    return npu.npu_fused_infer_attention_score(q, k, v, **{"scale": SCALE, **arguments})[0]
