"""Norm, rotation and cache write in one launch: which models are taken, which are not and why, and that caches and results are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion import FusionConfig, FusionReport
from tests.patterns.support import fused_within_contract

LATENT = "npu.npu_kv_rmsnorm_rope_cache_v2"
HEADS = "npu.npu_qkv_rms_norm_rope_cache"
PAIR = "npu.npu_scatter_pa_kv_cache"
HALVES = (torch.bfloat16, torch.float16)
BLOCKS, PAGE = 3, 32
Write = Callable[[Tensor, Tensor, Tensor], None]


def run(fn: Callable[..., Any], *inputs: Tensor, dynamic: bool = False, **options: Any) -> FusionReport:
    config = FusionConfig(target="ascend910b", emulate=True, **options)
    return fused_within_contract(fn, *inputs, dynamic=dynamic, config=config)


def runs_as(report: FusionReport, idiom: str) -> set[str | None]:
    return {site.lowered_to for site in report.sites if site.idiom == idiom}


def reasons(report: FusionReport) -> str:
    return "; ".join(site.reason or "" for site in report.sites if site.idiom == "kv_update")


def calls(report: FusionReport, name: str) -> list[torch.fx.Node]:
    return [node for node in report.graph("lowered").graph.nodes if name in str(node.target)]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours in, halves out, as DeepSeek does."""
    return rotate_half(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos, sin)


def angles(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.rand(*shape[:-1], shape[-1] // 2) * 6
    both = torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


# -------------------------------------------------------------------- MLA's latent


def paged(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // PAGE, slots % PAGE] = rows.reshape(-1, 1, rows.shape[-1])


def paged_flat(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.view(-1, rows.shape[-1]).index_copy_(0, slots, rows.reshape(-1, rows.shape[-1]))


def fractal(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // PAGE, :, slots % PAGE] = rows.reshape(slots.shape[0], -1, 16)


def dense(cache: Tensor, positions: Tensor, rows: Tensor) -> None:
    cache.index_copy_(2, positions, rows.flatten(1, -2).unsqueeze(1))


def latent_inputs(dtype: torch.dtype, batch: int, tokens: int, write: Write = paged, width: int = 576) -> tuple[Tensor, ...]:
    """Projection, weight, tables, positions, and the caches of latents and of rotated keys."""
    if write is dense:
        positions, caches = torch.randperm(16)[:tokens], [torch.randn(batch, 1, 16, size) for size in (512, 64)]
    else:
        positions = torch.randperm(BLOCKS * PAGE)[: batch * tokens]
        shape = {fractal: lambda size: (BLOCKS, size // 16, PAGE, 16)}.get(write, lambda size: (BLOCKS, PAGE, 1, size))
        caches = [torch.randn(shape(size)) for size in (512, 64)]
    tables = angles(batch, tokens, 64, dtype=dtype)
    return (
        torch.randn(batch, tokens, width).to(dtype),
        torch.rand(512).to(dtype) + 0.5,
        *tables,
        positions,
        *(c.to(dtype) for c in caches),
    )


def latent(write: Write, start: int = 0, also: Callable[[Tensor, Tensor], Any] = lambda c, k: None) -> Callable[..., Any]:
    """A step that normalises, rotates and writes 576 channels of the projection from `start` on; `also` reads both parts after that."""

    def step(kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, ckv: Tensor, kpe: Tensor) -> Any:
        c, k = kv[..., start : start + 512], kv[..., start + 512 : start + 576]
        c, k = rms_norm(c, w), rotate_pairs(k.unsqueeze(2), cos.unsqueeze(2), sin.unsqueeze(2))
        write(ckv, positions, c)
        write(kpe, positions, k)
        return ckv.clone(), kpe.clone(), also(c, k)

    return step


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("batch", "tokens"), [(2, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize(("write", "mode"), [(paged, "PA_BNSD"), (paged_flat, "Norm"), (fractal, "PA_NZ"), (dense, "Norm")])
def test_latent_is_normed_rotated_and_written_by_one_op(write: Write, mode: str, batch: int, tokens: int, dtype: torch.dtype) -> None:
    report = run(latent(write), *latent_inputs(dtype, batch, tokens, write))
    assert [runs_as(report, idiom) for idiom in ("rms_norm", "rope", "kv_update")] == [{LATENT}] * 3
    [call] = calls(report, "npu_kv_rmsnorm_rope_cache_v2")
    assert call.kwargs["cache_mode"] == mode
    assert not call.kwargs["is_output_kv"]
    assert not calls(report, "npu_rms_norm")
    assert not calls(report, "npu_interleave_rope")


@pytest.mark.parametrize("write", [paged, fractal])
def test_what_is_read_besides_comes_from_the_op(write: Write) -> None:
    report = run(latent(write, also=lambda c, k: (c * 2, k.transpose(1, 2) + 1)), *latent_inputs(torch.bfloat16, 2, 3, write))
    [call] = calls(report, "npu_kv_rmsnorm_rope_cache_v2")
    assert call.kwargs["is_output_kv"]
    assert not calls(report, "npu_rms_norm")


def test_a_part_of_a_wider_projection() -> None:
    report = run(latent(paged, start=24), *latent_inputs(torch.bfloat16, 2, 3, width=24 + 576 + 8))
    assert runs_as(report, "kv_update") == {LATENT}


def test_tokens_known_at_run_time_only() -> None:
    """They may be more than the cache has places, which the op does not take; the model's own op does, for places that are not distinct."""
    inputs = latent_inputs(torch.bfloat16, 4, 1)
    for cache in inputs[-2:]:
        torch._dynamo.mark_static(cache)
    for tensor in inputs[:4]:
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    report = run(latent(paged), *inputs, dynamic=True)
    assert runs_as(report, "kv_update") == {"npu.npu_scatter_nd_update_"}
    assert f"{LATENT}: there may be more tokens to write than the cache has" in reasons(report)


def test_a_query_rotated_with_the_key_keeps_its_own_op() -> None:
    step = latent(paged)

    def with_query(q: Tensor, kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> Any:
        return rotate_pairs(q, cos.unsqueeze(2), sin.unsqueeze(2)), step(kv, w, cos, sin, *rest)

    report = run(with_query, torch.randn(2, 3, 4, 64).bfloat16(), *latent_inputs(torch.bfloat16, 2, 3))
    assert runs_as(report, "kv_update") == {LATENT}
    assert len(calls(report, "npu_interleave_rope")) == 1
    assert runs_as(report, "rope") <= {LATENT, "npu.npu_interleave_rope", f"npu.npu_interleave_rope + {LATENT}"}


def other_places(kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, ckv: Tensor, kpe: Tensor) -> Any:
    paged(ckv, slots, rms_norm(kv[..., :512], w))
    paged(kpe, slots + 1, rotate_pairs(kv[..., 512:], cos, sin))
    return ckv.clone(), kpe.clone()


def halves_in(kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, ckv: Tensor, kpe: Tensor) -> Any:
    paged(ckv, slots, rms_norm(kv[..., :512], w))
    paged(kpe, slots, rotate_half(kv[..., 512:], cos, sin))
    return ckv.clone(), kpe.clone()


def rotated_first(kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, ckv: Tensor, kpe: Tensor) -> Any:
    paged(ckv, slots, rms_norm(kv[..., 64:], w))
    paged(kpe, slots, rotate_pairs(kv[..., :64], cos, sin))
    return ckv.clone(), kpe.clone()


def of_two_tensors(kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, ckv: Tensor, kpe: Tensor) -> Any:
    paged(ckv, slots, rms_norm(kv[..., :512] + 1, w))
    paged(kpe, slots, rotate_pairs(kv[..., 512:], cos, sin))
    return ckv.clone(), kpe.clone()


def read_before(kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, ckv: Tensor, kpe: Tensor) -> Any:
    c = rms_norm(kv[..., :512], w)
    total = c.sum(-1)
    k = rotate_pairs(kv[..., 512:], cos, sin)
    paged(ckv, slots, c)
    paged(kpe, slots, k)
    return ckv.clone(), kpe.clone(), total


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (other_places, ""),
        (halves_in, ""),
        (rotated_first, "not side by side"),
        (of_two_tensors, "not side by side"),
        (read_before, "read before"),
    ],
)
def test_latents_that_are_written_otherwise(step: Callable[..., Any], reason: str) -> None:
    report = run(step, *latent_inputs(torch.bfloat16, 2, 3))
    assert not calls(report, "npu_kv_rmsnorm_rope_cache")
    assert LATENT not in {site.lowered_to for site in report.sites}
    assert reason in reasons(report)


def test_a_dense_cache_gives_nothing_back() -> None:
    report = run(latent(dense, also=lambda c, k: c * 2), *latent_inputs(torch.bfloat16, 2, 3, dense))
    assert not calls(report, "npu_kv_rmsnorm_rope_cache")
    assert "gives that back for paged caches alone" in reasons(report)


def test_other_sizes_of_the_latent() -> None:
    def step(kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, ckv: Tensor, kpe: Tensor) -> Any:
        paged(ckv, slots, rms_norm(kv[..., :256], w))
        paged(kpe, slots, rotate_pairs(kv[..., 256:], cos, sin))
        return ckv.clone(), kpe.clone()

    kv, w, *tables, ckv, kpe = latent_inputs(torch.bfloat16, 2, 3)
    report = run(step, kv[..., :320].contiguous(), w[:256].clone(), *tables, ckv[..., :256].contiguous(), kpe)
    assert not calls(report, "npu_kv_rmsnorm_rope_cache")
    assert "the model has 256 and 64" in reasons(report)


def test_a_projection_that_is_written_over_in_between() -> None:
    """The projection is itself a row of a cache, which the next token's takes the place of before the keys are written."""

    def step(kv: Tensor, w: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, ckv: Tensor, kpe: Tensor) -> Any:
        c, k = rms_norm(kv[..., :512], w), rotate_pairs(kv[..., 512:], cos, sin)
        paged(ckv, slots, c)
        kv.index_copy_(0, slots[:1] % 2, kv[:1] * 2)
        paged(kpe, slots, k)
        return ckv.clone(), kpe.clone(), kv.clone()

    report = run(step, *latent_inputs(torch.bfloat16, 2, 3))
    assert f"{LATENT}: what it would read is written over before that" in reasons(report)


# -------------------------------------------------------------------- heads


def heads_inputs(dtype: torch.dtype, tokens: int, heads: tuple[int, int] = (4, 2), page: int = PAGE) -> tuple[Tensor, ...]:
    """Merged projection, weights of q and k, tables, slots, and the caches of keys and values."""
    q, kv = heads
    weights = (torch.rand(128).to(dtype) + 0.5 for _ in range(2))
    caches = (torch.randn(BLOCKS, kv * 8, page, 16).to(dtype) for _ in range(2))
    projected, slots = torch.randn(tokens, (q + 2 * kv) * 128).to(dtype), torch.randperm(BLOCKS * page)[:tokens]
    return projected, *weights, *angles(tokens, 128, dtype=dtype), slots, *caches


def heads(write: Write = fractal, k_eps: float = 1e-6, also: Callable[[Tensor, Tensor], Any] = lambda k, v: None) -> Callable[..., Any]:
    def step(qkv: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> Any:
        q, k, v = (part.unflatten(-1, (-1, 128)) for part in qkv.split([qkv.shape[-1] - 512, 256, 256], -1))
        q, k = rms_norm(q, qw), rms_norm(k, kw, k_eps)
        q, k = (rotate_half(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k))
        write(k_cache, slots, k)
        write(v_cache, slots, v)
        return q * 1.5, k_cache.clone(), v_cache.clone(), also(k, v)

    return step


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_heads_are_split_normed_rotated_and_written_by_one_op(tokens: int, dtype: torch.dtype) -> None:
    report = run(heads(), *heads_inputs(dtype, tokens))
    assert [runs_as(report, idiom) for idiom in ("rms_norm", "rope", "kv_update")] == [{HEADS}] * 3
    [call] = calls(report, "npu_qkv_rms_norm_rope_cache")
    assert list(call.args[-2:]) == [[1, tokens, 8, 128], [4, 2, 2]]
    assert not calls(report, "npu_rms_norm")


def test_a_projection_that_is_split_by_heads() -> None:
    def step(qkv: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> Any:
        x = qkv.unflatten(-1, (-1, 128))
        q, k = rms_norm(x[:, :4], qw), rms_norm(x[:, 4:6], kw)
        q, k = (rotate_half(y, cos.unsqueeze(1), sin.unsqueeze(1)) for y in (q, k))
        fractal(k_cache, slots, k)
        fractal(v_cache, slots, x[:, 6:])
        return q * 1.5, k_cache.clone(), v_cache.clone()

    assert runs_as(run(step, *heads_inputs(torch.bfloat16, 5)), "kv_update") == {HEADS}


def test_heads_in_another_order() -> None:
    """Keys before queries: the op would take one for the other."""

    def step(qkv: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> Any:
        k, q, v = (part.unflatten(-1, (-1, 128)) for part in qkv.split([256, 512, 256], -1))
        q, k = (rotate_half(y, cos.unsqueeze(1), sin.unsqueeze(1)) for y in (rms_norm(q, qw), rms_norm(k, kw)))
        fractal(k_cache, slots, k)
        fractal(v_cache, slots, v)
        return q * 1.5, k_cache.clone(), v_cache.clone()

    assert HEADS not in runs_as(run(step, *heads_inputs(torch.bfloat16, 5)), "kv_update")


def test_two_layers_have_queries_of_their_own() -> None:
    step = heads()

    def layers(*inputs: Tensor) -> Any:
        first, second = inputs[:8], (inputs[0] * 2, *inputs[1:6], *inputs[8:])
        (q1, *caches1), (q2, *caches2) = step(*first), step(*second)
        return q1 + q2, q1 - q2, caches1, caches2

    inputs = heads_inputs(torch.bfloat16, 5)
    report = run(layers, *inputs, *(cache.clone() for cache in inputs[6:]))
    buffers = [call.args[6] for call in calls(report, "npu_qkv_rms_norm_rope_cache")]
    assert len(buffers) == len(set(buffers)) == 2


def pages(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.view(BLOCKS, PAGE, 2, 128)[slots // PAGE, slots % PAGE] = rows.reshape(-1, 2, 128)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (heads(pages), "it takes fractal caches"),
        (heads(k_eps=1e-5), "different eps"),
        (heads(also=lambda k, v: k + 1), "does not give back keys and values"),
    ],
)
def test_heads_that_are_written_otherwise(step: Callable[..., Any], reason: str) -> None:
    report = run(step, *heads_inputs(torch.bfloat16, 5))
    assert runs_as(report, "kv_update") == {PAIR}
    assert reason in reasons(report)


def test_pages_that_are_not_aligned() -> None:
    def unaligned(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        cache[slots // 24, :, slots % 24] = rows.reshape(slots.shape[0], -1, 16)

    report = run(heads(unaligned), *heads_inputs(torch.bfloat16, 5, page=24))
    assert runs_as(report, "kv_update") == {PAIR}
    assert "no multiple of 32 bytes" in reasons(report)


def test_heads_of_another_target_are_not_its_business() -> None:
    report = run(heads(), *heads_inputs(torch.bfloat16, 5))
    assert HEADS in runs_as(report, "kv_update")
    config = FusionConfig(target="ascend950", emulate=True)
    assert HEADS not in runs_as(fused_within_contract(heads(), *heads_inputs(torch.bfloat16, 5), config=config), "kv_update")
