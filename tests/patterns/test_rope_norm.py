"""Rules of patterns/rope_norm.py: q/k norms before and after the rotation, and the split of a merged QKV projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion import FusionReport
from tests.parameters import dtypes_and_shapes
from tests.patterns.support import fused_within_contract

BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 6, 4, 2, 16
Fn = Callable[..., tuple[Tensor, Tensor]]

DTYPES = (torch.bfloat16, torch.float32)
dynamics = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def static_last(tensor: Tensor) -> Tensor:
    torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    return tensor


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q [B, S, N, D], k [B, S, Nk, D], their norm weights [D], cos and sin [B, 1, S, D]."""
    q, k = torch.randn(BATCH, SEQ, HEADS, DIM, dtype=dtype), torch.randn(BATCH, SEQ, KV_HEADS, DIM, dtype=dtype)
    weights, tables = torch.randn(2, DIM, dtype=dtype), (torch.rand(2, BATCH, 1, SEQ, DIM) * 2 - 1).to(dtype)
    return tuple(static_last(t) for t in (q, k, *weights, *tables))


def call_of(report: FusionReport, op: str) -> dict[str, Any]:
    """The arguments of the one call of a semantic op, by name."""
    calls = [n for n in report.graph("fused").graph.nodes if n.op == "call_function" and str(n.target) == f"npu_fusion.{op}.default"]
    assert len(calls) == 1, report.ops
    names = [spec.name for spec in calls[0].target._schema.arguments]
    return {**dict(zip(names, calls[0].args)), **calls[0].kwargs}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x2, x1), -1) * sin


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else weight * normed


def gemma_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight.float())).to(x.dtype)


# -------------------------------------------------------------------- norms and rotation


def qwen3(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = rms_norm(q, q_weight).transpose(1, 2), rms_norm(k, k_weight).transpose(1, 2)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def gemma3(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = gemma_norm(q.transpose(1, 2), q_weight), gemma_norm(k.transpose(1, 2), k_weight)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def gemma4(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The heads are moved last."""
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    return rotate(gemma_norm(q, q_weight), cos, sin).transpose(1, 2), rotate(gemma_norm(k, k_weight), cos, sin).transpose(1, 2)


def gemma_moved_between(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = gemma_norm(q, q_weight).transpose(1, 2), gemma_norm(k, k_weight).transpose(1, 2)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def llama4(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = rms_norm(q, None).transpose(1, 2), rms_norm(k, None).transpose(1, 2)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def hunyuan(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return rms_norm(rotate(q, cos, sin), q_weight), rms_norm(rotate(k, cos, sin), k_weight)


def nanochat(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return rms_norm(rotate(q, cos, -sin), None), rms_norm(rotate(k, cos, -sin), None)


def partly_rotated(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen3-Next."""

    def one(x: Tensor, weight: Tensor) -> Tensor:
        x = gemma_norm(x, weight).transpose(1, 2)
        return torch.cat((rotate(x[..., :8], cos[..., :8], sin[..., :8]), x[..., 8:]), -1)

    return one(q, q_weight), one(k, k_weight)


ORDERS: list[tuple[Fn, dict[str, Any]]] = [
    (qwen3, {"heads_first": True}),
    (gemma3, {"weight_offset": 1}),
    (gemma4, {"weight_offset": 1}),
    (gemma_moved_between, {"weight_offset": 1, "heads_first": True}),
    (llama4, {"heads_first": True, "q_weight": None, "k_weight": None}),
    (hunyuan, {"norm_last": True}),
    (nanochat, {"norm_last": True, "sign": -1, "q_weight": None, "k_weight": None}),
    (partly_rotated, {"heads_first": True, "weight_offset": 1, "rotary_dim": 8}),
]


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize(("fn", "expected"), ORDERS, ids=lambda item: getattr(item, "__name__", ""))
def test_norms_and_rotation_are_one_op(fn: Fn, expected: dict[str, Any], dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(fn, *inputs(dtype), dynamic=dynamic)
    assert report.idioms == {"rms_norm": 2, "rope": 2}
    assert not report.missed
    assert report.ops == {"qk_norm_rotary": 1}
    found = call_of(report, "qk_norm_rotary")
    defaults = {"heads_first": False, "norm_last": False, "sign": 1, "rotary_dim": -1, "layout": "half"}
    assert found.items() >= {**defaults, **expected}.items()
    assert found.get("weight_offset", 0) == expected.get("weight_offset", 0)


def test_q_and_k_keep_their_places() -> None:
    """The first output is that of the tensor rotated first, whatever the order of the norms."""

    def fn(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        k, q = rotate(k.transpose(1, 2), cos, sin), rotate(q.transpose(1, 2), cos, sin)
        return rms_norm(q, q_weight), rms_norm(k, k_weight)

    report = fused_within_contract(fn, *inputs())
    assert report.ops == {"qk_norm_rotary": 1}


@dynamics
def test_eps_of_the_module(dynamic: bool) -> None:
    """One number for both norms; with dynamic=True it is known at run time only."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps = 0.3

        def forward(self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            q, k = rms_norm(q, q_weight, self.eps).transpose(1, 2), rms_norm(k, k_weight, self.eps).transpose(1, 2)
            return rotate(q, cos, sin), rotate(k, cos, sin)

    report = fused_within_contract(Attention(), *inputs(), dynamic=dynamic)
    assert report.ops["qk_norm_rotary"] == 1


def _with_norms(q_norm: Callable[..., Tensor], k_norm: Callable[..., Tensor]) -> Fn:
    def fn(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q_norm(q, q_weight).transpose(1, 2), k_norm(k, k_weight).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return fn


def _with_norms_after(q_norm: Callable[..., Tensor], k_norm: Callable[..., Tensor]) -> Fn:
    def fn(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
        return q_norm(q, q_weight), k_norm(k, k_weight)

    return fn


@pytest.mark.parametrize("order", [_with_norms, _with_norms_after], ids=["norm first", "norm last"])
@pytest.mark.parametrize(
    ("q_norm", "k_norm"),
    [
        (rms_norm, lambda x, w: rms_norm(x, w, 1e-1)),
        (rms_norm, gemma_norm),
        (rms_norm, lambda x, w: rms_norm(x, None)),
    ],
    ids=["eps", "weight offset", "one weight"],
)
def test_norms_that_differ_stay_apart(order: Callable[..., Fn], q_norm: Callable[..., Tensor], k_norm: Callable[..., Tensor]) -> None:
    """What they have in common, the norm without a weight, may be one op with the rotation that comes before it."""
    report = fused_within_contract(order(q_norm, k_norm), *inputs())
    assert report.idioms == {"rms_norm": 2, "rope": 2}
    if "qk_norm_rotary" in report.ops:
        assert order is _with_norms_after
        assert call_of(report, "qk_norm_rotary").items() >= {"q_weight": None, "k_weight": None, "norm_last": True}.items()
    else:
        assert report.ops == {"rms_norm": 2, "rotary": 1}


def test_norm_over_all_heads_stays_apart() -> None:
    """OLMo2 normalises the whole projection, not each head."""

    def fn(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = rms_norm(q.flatten(2), q_weight).view(q.shape), rms_norm(k.flatten(2), k_weight).view(k.shape)
        return rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)

    q, k, _, _, cos, sin = inputs()
    report = fused_within_contract(fn, q, k, torch.randn(HEADS * DIM), torch.randn(KV_HEADS * DIM), cos, sin)
    assert report.ops == {"rms_norm": 2, "rotary": 1}


def test_norm_that_widens_stays_apart() -> None:
    """The fused op rounds the norm's result to the dtype of its input: where the model does not, it must not."""

    def fn(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = rms_norm(q.float(), q_weight.float()), rms_norm(k.float(), k_weight.float())
        return rotate(q.transpose(1, 2), cos, sin).to(cos.dtype), rotate(k.transpose(1, 2), cos, sin).to(cos.dtype)

    report = fused_within_contract(fn, *inputs(torch.bfloat16))
    assert report.idioms == {"rms_norm": 2, "rope": 2}
    assert "qk_norm_rotary" not in report.ops


def test_one_of_two_moved_stays_apart() -> None:
    def fn(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = rms_norm(q, q_weight).transpose(1, 2), rms_norm(k.transpose(1, 2), k_weight)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    report = fused_within_contract(fn, *inputs())
    assert report.ops == {"rms_norm": 2, "rotary": 1}


def test_norm_with_another_user_stays() -> None:
    """The normalised q is returned as well: it is computed besides the fused op, or the norms stay apart."""

    def fn(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        normed = rms_norm(q, q_weight)
        return rotate(normed.transpose(1, 2), cos, sin), rotate(rms_norm(k, k_weight).transpose(1, 2), cos, sin), normed

    report = fused_within_contract(fn, *inputs())
    assert report.idioms == {"rms_norm": 2, "rope": 2}


# -------------------------------------------------------------------- merged QKV


class MergedAttention(nn.Module):
    """One projection for q, k and v, optional norms, rotation, and products that take all three."""

    def __init__(self, dtype: torch.dtype, norm: bool, spelling: str, order: str = "qkv") -> None:
        super().__init__()
        self.projection = nn.Linear(24, (HEADS + 2 * KV_HEADS) * DIM, dtype=dtype)
        self.q_weight, self.k_weight = (nn.Parameter(torch.randn(DIM, dtype=dtype)) for _ in range(2))
        self.norm, self.spelling, self.order, self.eps = norm, spelling, order, 1e-5

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.projection(hidden))
        if self.norm:
            q, k = rms_norm(q, self.q_weight, self.eps), rms_norm(k, self.k_weight, self.eps)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2).contiguous()
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q.unflatten(1, (KV_HEADS, -1)) @ k.unsqueeze(2).transpose(-1, -2), torch.relu(v)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
        counts = [heads[name] for name in self.order]
        if self.spelling == "heads":
            parts = qkv.unflatten(-1, (-1, DIM)).split(counts, dim=2)
        elif self.spelling == "slices":
            ends = [sum(counts[: i + 1]) * DIM for i in range(3)]
            parts = tuple(qkv[..., end - n * DIM : end].view(*qkv.shape[:2], n, DIM) for n, end in zip(counts, ends))
        else:
            parts = tuple(part.unflatten(-1, (-1, DIM)) for part in qkv.split([n * DIM for n in counts], dim=-1))
        by_name = dict(zip(self.order, parts))
        return by_name["q"], by_name["k"], by_name["v"]


def merged_inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, SEQ, 24, dtype=dtype), *inputs(dtype)[4:])


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["without norms", "with norms"])
@pytest.mark.parametrize("spelling", ["split", "slices", "heads"])
def test_merged_projection_is_one_op(spelling: str, norm: bool, dtype: torch.dtype, dynamic: bool) -> None:
    report = fused_within_contract(MergedAttention(dtype, norm, spelling), *merged_inputs(dtype), dynamic=dynamic)
    assert report.idioms["rope"] == 2
    assert report.idioms["rms_norm"] == 2 * norm
    assert {name: count for name, count in report.ops.items() if "rotary" in name} == {"qkv_norm_rotary": 1}
    found = call_of(report, "qkv_norm_rotary")
    assert found.items() >= {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "norm": norm}.items()


def test_other_order_of_the_parts_is_not_the_merged_op() -> None:
    report = fused_within_contract(MergedAttention(torch.float32, True, "split", order="vqk"), *merged_inputs(torch.float32))
    assert report.idioms["rope"] == 2
    assert report.ops["qk_norm_rotary"] == 1
    assert "qkv_norm_rotary" not in report.ops


def test_key_and_value_swapped_is_not_the_merged_op() -> None:
    report = fused_within_contract(MergedAttention(torch.float32, False, "split", order="qvk"), *merged_inputs(torch.float32))
    assert report.idioms["rope"] == 2
    assert "qkv_norm_rotary" not in report.ops
