"""Rotary embeddings by Triton: what the providers take, what they refuse and why, and the numbers of what a call becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lower import REFERENCE
from npu_fusion.ops.rope import qk_norm_rotary, qkv_norm_rotary, rotary
from tests.lowerings.ascend.checks import Lowered, lower_and_check, lower_call

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
B, S, D = 2, 2, 8
EPS = 1e-5
CUDA = {"target": "cuda", "emulate": True}
VIEWS = ("aten.view", "aten.reshape", "aten.transpose", "aten.slice", "aten.unsqueeze", "aten.expand", "aten.sym_size")


def computed(found: Lowered) -> list[str]:
    """The ops that compute: without views."""
    return [op for op in found.targets() if op not in VIEWS]


def angles(*shape: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    theta = 6.3 * torch.rand(shape)
    return theta.cos().to(dtype), theta.sin().to(dtype)


def projections(*heads: int, dtype: torch.dtype = FP32) -> list[Tensor]:
    """[B, N, S, D] as models have them: views of [B, S, N, D]."""
    return [torch.randn(B, S, n, D).to(dtype).transpose(1, 2) for n in heads]


def check(fn: Callable[..., Any], *inputs: Tensor, provider: str, ops: int = 1, **options: Any) -> Lowered:
    found = lower_and_check(fn, fn, *inputs, **{**CUDA, **options})
    assert (found.provider, found.reason) == (provider, "")
    assert computed(found) == [f"npu_fusion_{provider}"] * ops
    return found


# -------------------------------------------------------------------- rotary


@pytest.mark.parametrize(
    ("shape", "dynamic"),
    [((S, D), False), ((1, S, D // 2), True), ((1, 1, S, D), False), ((B, 1, S, D // 2), True)],
    ids=str,
)
def test_q_and_k_are_one_launch_and_tables_are_views(shape: tuple[int, ...], dynamic: bool) -> None:
    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        q, k = (x.unflatten(-1, (heads, D)).transpose(1, 2) for x, heads in ((q, 3), (k, 1)))
        return rotary([q, k], cos, sin)

    check(fn, torch.randn(B, S, 3 * D), torch.randn(B, S, D), *angles(*shape), provider="triton.rotary", dynamic=dynamic)


@pytest.mark.parametrize("layout", ["half", "interleaved", "mla"])
def test_layouts_and_leading_channels(layout: str) -> None:
    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        return rotary([q, k], cos, sin, layout=layout, rotary_dim=6, sign=-1)

    check(fn, *projections(3, 1, dtype=FP16), *angles(1, S, 6, dtype=FP16), provider="triton.rotary")


@pytest.mark.parametrize("x", [(S, D), (B, S, D), (B, S, 3, D)], ids=str)
def test_heads_behind_tokens_or_none(x: tuple[int, ...]) -> None:
    table = (S, 1, D) if len(x) == 4 else (S, D)
    check(lambda x, cos, sin: rotary([x], cos, sin), torch.randn(x), *angles(*table), provider="triton.rotary")


def test_parts_of_a_merged_projection_are_read_where_they_are() -> None:
    def fn(qkv: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        q, k, _ = qkv.unflatten(-1, (5, D)).transpose(1, 2).split((2, 2, 1), dim=1)
        return rotary([q, k], cos, sin)

    found = lower_and_check(fn, fn, torch.randn(B, S, 5 * D), *angles(S, D), **CUDA)
    assert [op for op in computed(found) if "split" not in op] == ["npu_fusion_triton.rotary"]


def test_of_a_table_with_equal_entries_half_is_read() -> None:
    def fn(x: Tensor, theta: Tensor) -> list[Tensor]:
        full = torch.cat((theta, theta), -1)
        return rotary([x], full.cos(), full.sin())

    found = lower_and_check(fn, fn, *projections(2), torch.rand(S, D // 2), **CUDA)
    [call] = [node for node in found.gm.graph.nodes if "npu_fusion_triton" in str(node.target)]
    assert [call.args[i].meta["val"].shape[-1] for i in (1, 2)] == [D // 2] * 2


def test_another_dtype_of_the_result() -> None:
    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        return rotary([x], cos, sin, out_dtype=FP32 if x.dtype == BF16 else None)

    found = check(fn, *projections(2, dtype=BF16), *angles(S, D), provider="triton.rotary")
    assert found.gm(*projections(2, dtype=BF16), *angles(S, D))[0].dtype == FP32


@pytest.mark.parametrize(
    ("x", "table", "options", "reason"),
    [
        (FP64, (FP32, (S, D)), {}, "the kernels take no torch.float64"),
        (FP32, (FP64, (S, D)), {}, "the kernels take no torch.float64"),
        (FP32, (FP32, (S, D)), {"out_dtype": FP64}, "the kernels give no torch.float64"),
        (FP32, (FP32, (B, 3, S, D)), {}, "the tables differ from head to head"),
    ],
)
def test_what_rotary_refuses(x: torch.dtype, table: tuple[torch.dtype, tuple[int, ...]], options: dict[str, Any], reason: str) -> None:
    inputs = *projections(3, dtype=x), *angles(*table[1], dtype=table[0])
    found = lower_call(lambda x, cos, sin: rotary([x], cos, sin, **options), *inputs, **CUDA)
    assert (found.provider, found.reason) == (REFERENCE, f"triton.rotary: {reason}")


def test_sizes_known_at_run_time_only_are_refused() -> None:
    def fn(x: Tensor, like: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        return rotary([x.view(B, S, like.shape[0], D).transpose(1, 2)], cos, sin)

    found = lower_call(fn, torch.randn(B, S, 3 * D), torch.randn(3), *angles(S, D), dynamic=True, **CUDA)
    assert found.provider == REFERENCE
    assert "known at run time only" in found.reason


@pytest.mark.parametrize("target", ["ascend910b", "ascend910_93", "ascend950"])
def test_on_ascend_it_stands_behind_the_ops_of_torch_npu(target: str) -> None:
    q = torch.randn(1, 4, 2, 128, dtype=BF16).transpose(1, 2)
    cos, sin = angles(1, 1, 4, 128, dtype=BF16)
    found = lower_call(lambda q, cos, sin: rotary([q], cos, sin), q, cos, sin, target=target)
    assert found.provider.startswith("npu.")


# -------------------------------------------------------------------- with norms


@pytest.mark.parametrize("rounding", ["fp32_internal", "exact"])
@pytest.mark.parametrize(("norm_last", "layout", "width"), [(False, "half", 6), (True, "interleaved", D)])
def test_norms_of_q_and_k(norm_last: bool, layout: str, width: int, rounding: str) -> None:
    def fn(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        options = {"layout": layout, "rotary_dim": width, "norm_last": norm_last, "weight_offset": 1}
        round_dtype = None if q.dtype == FP64 else FP16
        return qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, EPS, round_dtype=round_dtype, **options)

    inputs = *projections(3, 1, dtype=FP16), torch.randn(D).half(), torch.randn(D), *angles(S, width, dtype=FP16)
    found = check(fn, *inputs, provider="triton.qk_norm_rotary", rounding=rounding)
    [call] = [node for node in found.gm.graph.nodes if "npu_fusion_triton" in str(node.target)]
    exact = rounding == "exact"
    assert (call.kwargs["round_between"], call.kwargs["round_dtype"]) == (exact, FP16 if exact else None)
    if exact:
        agree = [(a == b).float().mean() for a, b in zip(found.gm(*inputs), fn(*inputs), strict=True)]
        assert min(agree) > 0.97


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_norms_of_heads_that_are_moved_first(dynamic: bool) -> None:
    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q.unflatten(-1, (3, D)), k.unflatten(-1, (1, D))
        return qk_norm_rotary(q, k, None, None, cos, sin, EPS, heads_first=True)

    inputs = torch.randn(B, S, 3 * D), torch.randn(B, S, D), *angles(1, 1, S, D)
    check(fn, *inputs, provider="triton.qk_norm_rotary", dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_merged_projection(norm: bool, dynamic: bool) -> None:
    def fn(qkv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = {"num_heads": 3, "num_kv_heads": 1, "head_dim": D, "norm": norm}
        weights = (weight, weight) if norm else (None, None)
        return qkv_norm_rotary(qkv, *weights, cos, sin, EPS, **heads, sign=-1, rotary_dim=6)

    inputs = torch.randn(B, S, 5 * D).half(), torch.randn(D).half(), *angles(B, 1, S, 3, dtype=FP16)
    check(fn, *inputs, provider="triton.qkv_norm_rotary", dynamic=dynamic)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": torch.zeros(B, 1, S, D, dtype=FP16)}, "q and k differ in dtype"),
        ({"q": torch.zeros(B, 3, S, D, dtype=FP64)}, "the kernels take no torch.float64"),
        ({"weight": torch.zeros(D, dtype=FP64)}, "a weight is none of float16, bfloat16, float32"),
        ({"round_dtype": FP64, "rounding": "exact"}, "the kernels do not round to torch.float64"),
    ],
)
def test_what_the_norms_refuse(change: dict[str, Any], reason: str) -> None:
    q, k = projections(3, 1)
    given = {"q": q, "k": k, "weight": torch.ones(D), "round_dtype": None, "rounding": "fp32_internal"} | change
    fn: Callable[..., Any] = lambda q, k, weight, cos, sin: qk_norm_rotary(  # noqa: E731
        q, k, weight, weight, cos, sin, EPS, round_dtype=given["round_dtype"]
    )
    found = lower_call(fn, given["q"], given["k"], given["weight"], *angles(S, D), **CUDA, rounding=given["rounding"])
    assert (found.provider, found.reason) == (REFERENCE, f"triton.qk_norm_rotary: {reason}")


def test_tables_that_differ_from_head_to_head_are_refused() -> None:
    def fn(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return qkv_norm_rotary(qkv, None, None, cos, sin, EPS, num_heads=3, num_kv_heads=3, head_dim=D)

    found = lower_call(fn, torch.randn(B, S, 9 * D), *angles(B, 3, S, D), **CUDA)
    assert (found.provider, found.reason) == (REFERENCE, "triton.qkv_norm_rotary: the tables differ from head to head")


def test_on_ascend_it_takes_what_keeps_the_model_s_rounding() -> None:
    """The norms of torch_npu do not round where the model does, which `exact` asks for."""

    def fn(q: Tensor, k: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rotary(q, k, weight, weight, cos, sin, EPS, round_dtype=None if q.dtype == FP64 else FP16)

    inputs = *projections(3, 1, dtype=FP16), torch.randn(D).half(), *angles(S, D, dtype=FP16)
    found = lower_and_check(fn, fn, *inputs, rounding="exact")
    assert found.provider == "triton.qk_norm_rotary"
    assert "npu.npu_rotary_mul" in found.reason
