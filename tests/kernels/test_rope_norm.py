"""qk_norm_rotary, qkv_norm_rotary, qkv_norm_rotary_cache: numbers against float64, roundings, the cache, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.kernels import rope_norm as kernels
from npu_fusion.kernels.launch import Device
from npu_fusion.lowerings.triton import rope_norm as lowering
from npu_fusion.lowerings.triton.rope_norm import qk_norm_rotary, qkv_norm_rotary, qkv_norm_rotary_cache
from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops import rope as semantic
from tests.kernels.test_rope import tables
from tests.ops.checks import check_symbolic

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CORES = 4
EPS = 1e-5


def doubled(*values: Any) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def within(results: Any, eager: Any, truth: Any) -> None:
    for y, e, t in zip(results, eager, truth, strict=True):
        assert (y.shape, y.dtype) == (e.shape, e.dtype)
        assert_within_contract(y, e, t, e.dtype)


def check_qk(*call: Any, cores: int = CORES, **arguments: Any) -> None:
    """`qk_norm_rotary` is within the numeric contract, and its results lie in memory as their inputs do."""
    results = qk_norm_rotary(*call, **arguments, cores=cores)
    within(results, semantic.qk_norm_rotary(*call, **arguments), semantic.qk_norm_rotary(*doubled(*call), **arguments))
    assert [y.stride() for y in results] == [torch.empty_like(x).stride() for x in call[:2]]


def merged(call: tuple[Any, ...], **arguments: Any) -> tuple[Any, Any]:
    """What eager and float64 compute of a merged projection [B, S, *], as [B, S, N, D]; tables as the kernel takes them."""
    qkv, q_weight, k_weight, cos, sin, eps = call
    seen = [table.unsqueeze(0).transpose(1, 2) if table.dim() == 3 else table.transpose(1, 2) for table in (cos, sin)]
    given = (qkv, q_weight, k_weight, *seen, eps)
    return tuple([y.transpose(1, 2) for y in semantic.qkv_norm_rotary(*inputs, **arguments)] for inputs in (given, doubled(*given)))


def vector(size: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(size, device=device).to(dtype)


# -------------------------------------------------------------------- q and k


@pytest.mark.parametrize(
    ("layout", "rotary_dim", "norm_last", "weight", "offset", "dtype"),
    [
        ("half", -1, False, FP16, 0, FP16),
        ("half", 6, True, FP32, 1, BF16),
        ("half", -1, True, None, 0, FP32),
        ("interleaved", -1, True, BF16, 0, BF16),
        ("interleaved", 10, False, FP32, 1, FP32),
        ("mla", -1, True, FP32, 0, FP32),
        ("mla", 4, False, FP16, 0, FP16),
    ],
)
def test_numbers(
    layout: str, rotary_dim: int, norm_last: bool, weight: torch.dtype | None, offset: int, dtype: torch.dtype, device: str
) -> None:
    q, k = (3 * torch.randn(2, 1, heads, 12, device=device).to(dtype) for heads in (5, 2))
    weights = [None if weight is None else vector(12, weight, device) for _ in range(2)]
    cos, sin = tables((2, 1, 1), 12 if rotary_dim == -1 else rotary_dim, True, dtype, device)
    options = {"weight_offset": offset, "sign": -1 if norm_last else 1}
    check_qk(q, k, *weights, cos, sin, EPS, layout=layout, rotary_dim=rotary_dim, norm_last=norm_last, **options)


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("weight", [FP16, FP32], ids=str)
def test_exact_rounding_is_that_of_the_model(weight: torch.dtype, norm_last: bool, device: str) -> None:
    """Rounded at the same points, the results are the model's own but where fp32 sums in another order tip a rounding.

    In fp16: the interpreter's cast to bf16 truncates.
    """
    q, k = (torch.randn(1, 2, heads, 64, device=device).to(FP16) for heads in (8, 4))
    call = q, k, vector(64, weight, device), vector(64, weight, device), *tables((2, 1), 64, False, FP16, device), EPS
    options = {"round_dtype": FP16, "norm_last": norm_last, "weight_offset": 1}
    exact = qk_norm_rotary(*call, **options, round_between=True, cores=CORES)
    kept = qk_norm_rotary(*call, weight_offset=1, norm_last=norm_last, cores=CORES)
    for y, other, e in zip(exact, kept, semantic.qk_norm_rotary(*call, **options), strict=True):
        assert (y == e).float().mean() > 0.99
        assert (other == e).float().mean() < 0.95


@pytest.mark.parametrize("rank", [3, 4])
def test_rows_of_tables_by_position_and_views_of_a_projection(rank: int, device: str) -> None:
    row = torch.randn(1, 2, 6, 8, device=device)
    row = row if rank == 4 else row[0]
    q, k = row[..., :3, :], row[..., 3:5, :]
    cos, sin = tables((9,), 8, False, FP32, device)
    positions = torch.tensor([8, 2], device=device)
    weights = vector(8, FP32, device), vector(8, FP32, device)
    results = qk_norm_rotary(q, k, *weights, cos, sin, EPS, positions=positions, cores=CORES)
    expected = semantic.qk_norm_rotary(*doubled(q, k, *weights, cos[positions][:, None], sin[positions][:, None]), EPS)
    within(results, [x.float() for x in expected], expected)
    assert all(y.is_contiguous() for y in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head(value: float, device: str) -> None:
    q, k = (torch.randn(1, 1, 3, 8, device=device) for _ in range(2))
    cos, sin = tables((1, 1), 8, False, FP32, device)
    clean = qk_norm_rotary(q, k, None, None, cos, sin, EPS, cores=CORES)
    q[0, 0, 1, 2] = k[0, 0, 2, 0] = value
    for y, before, head in zip(qk_norm_rotary(q, k, None, None, cos, sin, EPS, cores=CORES), clean, (1, 2), strict=True):
        others = [i for i in range(3) if i != head]
        assert torch.equal(y[:, :, others], before[:, :, others])
        assert y[:, :, head].isnan().any()


def test_zeros_stay_zeros(device: str) -> None:
    q = torch.zeros(1, 2, 8, device=device)
    y, _ = qk_norm_rotary(q, q.clone(), None, None, *tables((1, 1), 8, False, FP32, device), EPS, cores=CORES)
    assert torch.equal(y, q)


# -------------------------------------------------------------------- from a merged projection


def projection(dtype: torch.dtype, device: str, *, tokens: int = 2, size: int = 12, width: int = 12, full: bool = True) -> tuple[Any, ...]:
    """A call for 3 query and 2 key heads of [1, tokens]."""
    weights = [vector(size, dtype, device) for _ in range(2)]
    return 2 * torch.randn(1, tokens, 7 * size, device=device).to(dtype), *weights, *tables((tokens, 1), width, full, dtype, device), EPS


HEADS = {"num_heads": 3, "num_kv_heads": 2, "head_dim": 12}


@pytest.mark.parametrize(
    ("layout", "rotary_dim", "norm", "dtype"),
    [
        ("half", -1, True, FP16),
        ("half", 10, False, BF16),
        ("half", 4, True, FP32),
        ("interleaved", -1, True, BF16),
        ("mla", 6, True, FP16),
    ],
)
def test_split_norm_rotation(layout: str, rotary_dim: int, norm: bool, dtype: torch.dtype, device: str) -> None:
    call = projection(dtype, device, width=12 if rotary_dim == -1 else rotary_dim)
    call = call if norm else (call[0], None, None, *call[3:])
    arguments = {**HEADS, "layout": layout, "rotary_dim": rotary_dim, "norm": norm}
    results = qkv_norm_rotary(*call, **arguments, cores=CORES)
    within(results, *merged(call, **arguments))
    assert all(y.is_contiguous() for y in results)
    assert torch.equal(results[2].flatten(2), call[0][..., -24:])
    flat = qkv_norm_rotary(call[0][0], *call[1:], **arguments, cores=CORES)
    assert all(torch.equal(a, b[0]) for a, b in zip(flat, results, strict=True))


def test_rows_of_a_projection_may_lie_apart(device: str) -> None:
    qkv, *rest = projection(FP32, device)
    expected = qkv_norm_rotary(qkv, *rest, **HEADS, cores=CORES)
    wide = torch.full((1, 2, 100), float("nan"), device=device)
    wide[..., 8:92] = qkv
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (wide[..., 8:92], turned):
        results = qkv_norm_rotary(x, *rest, **HEADS, cores=CORES)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("shape", [(1, 0, 84), (0, 84), (0, 3, 84)])
def test_no_tokens(shape: tuple[int, ...], device: str) -> None:
    qkv, table = torch.empty(shape, device=device), torch.empty(12, device=device)
    cache = torch.ones(2, 4, 2, 12, device=device)
    results = qkv_norm_rotary(qkv, None, None, table, table, EPS, **HEADS, cores=CORES)
    assert [tuple(y.shape) for y in results] == [(*shape[:-1], heads, 12) for heads in (3, 2, 2)]
    slots = torch.empty(shape[:-1], dtype=torch.int64, device=device)
    (q,) = qkv_norm_rotary_cache(qkv, None, None, table, table, EPS, cache, cache.clone(), slots, **HEADS, cores=CORES)
    assert q.shape == results[0].shape
    assert (cache == 1).all()


# -------------------------------------------------------------------- with a cache


@pytest.mark.parametrize(
    ("slots", "dtype", "keep", "heads_first"),
    [
        ([[5, -1, 11]], torch.int64, True, False),
        ([[4, 0, -7]], torch.int32, False, True),
    ],
)
def test_cache(slots: list[list[int]], dtype: torch.dtype, keep: bool, heads_first: bool, device: str) -> None:
    """Slots of a cache [3, 4, 2, 12], or of one with its heads before its tokens; what has no token is not touched."""
    call = projection(FP32, device, tokens=3)
    q, k, v = qkv_norm_rotary(*call, **HEADS, cores=CORES)
    caches = [torch.full((3, 2, 4, 12) if heads_first else (3, 4, 2, 12), 7.0, device=device) for _ in range(2)]
    caches = [cache.transpose(1, 2) if heads_first else cache for cache in caches]
    results = qkv_norm_rotary_cache(*call, *caches, torch.tensor(slots, dtype=dtype, device=device), **HEADS, keep_kv=keep, cores=CORES)
    assert len(results) == (3 if keep else 1)
    assert all(torch.equal(a, b) for a, b in zip(results, (q, k, v)))
    for cache, rows in zip(caches, (k, v), strict=True):
        expected = torch.full((12, 2, 12), 7.0, device=device)
        for token, slot in enumerate(slots[0]):
            if slot >= 0:
                expected[slot] = rows[0, token]
        assert torch.equal(cache.reshape(12, 2, 12), expected)


def test_a_cache_of_another_dtype_and_positions(device: str) -> None:
    qkv, q_weight, k_weight, cos, sin, eps = projection(FP32, device, tokens=1)
    positions = torch.tensor([[3]], device=device)
    rows = [torch.cat((torch.zeros(3, 12, device=device), table[0])) for table in (cos, sin)]
    caches = torch.zeros(2, 1, 1, 2, 12, dtype=FP16, device=device)
    (q,) = qkv_norm_rotary_cache(
        qkv, q_weight, k_weight, *rows, eps, *caches, torch.zeros_like(positions), positions=positions, **HEADS, cores=CORES
    )
    expected = qkv_norm_rotary(qkv, q_weight, k_weight, cos, sin, eps, **HEADS, cores=CORES)
    assert torch.equal(q, expected[0])
    assert torch.equal(caches.flatten(1), torch.stack([x.half().flatten() for x in expected[1:]]))


# -------------------------------------------------------------------- plans


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_heads_in_parts(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "device_for", lambda x, cores: Device(kind, cores, cores))
    plan = kernels.qkv_norm_rotary_launch(1, 40, 40, 128, 128, Device(kind, CORES, CORES))
    assert plan.constants["PARTS"] > 1
    assert plan.grid == (1 if kind == "npu" else plan.constants["PARTS"])
    qkv, weight = torch.randn(1, 1, 120 * 128, device=device), vector(128, FP32, device)
    call = qkv, weight, weight, *tables((1, 1), 128, False, FP32, device), EPS
    heads = {"num_heads": 40, "num_kv_heads": 40, "head_dim": 128}
    caches = torch.zeros(2, 1, 1, 40, 128, device=device)
    slots = torch.zeros(1, 1, dtype=torch.int32, device=device)
    q, k, v = qkv_norm_rotary_cache(*call, *caches, slots, **heads, keep_kv=True, cores=CORES)
    within((q, k, v), *merged(call, **heads))
    assert torch.equal(caches.flatten(1), torch.stack((k.flatten(), v.flatten())))


def test_a_small_grid_walks_all_tokens(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "device_for", lambda x, cores: Device("npu", cores, cores))
    call = projection(FP32, device, tokens=3)
    within(qkv_norm_rotary(*call, **HEADS, cores=2), *merged(call, **HEADS))


# -------------------------------------------------------------------- what is refused


def _qk(**change: Any) -> None:
    x, table = torch.zeros(2, 3, 8), torch.zeros(2, 1, 4)
    call = {"q": x, "k": x, "q_weight": None, "k_weight": None, "cos": table, "sin": table, "eps": EPS, "cores": CORES} | change
    qk_norm_rotary(**call)


def _qkv(**change: Any) -> None:
    cache, table = torch.zeros(1, 4, 2, 12), torch.zeros(2, 1, 6)
    call = {"qkv": torch.zeros(1, 2, 84), "q_weight": None, "k_weight": None, "cos": table, "sin": table, "eps": EPS, **HEADS}
    call |= {"key_cache": cache, "value_cache": cache.clone(), "slots": torch.zeros(1, 2, dtype=torch.int32), "cores": CORES}
    qkv_norm_rotary_cache(**(call | change))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "k must be one of float16, bfloat16, float32, not torch.float64", {"k": torch.zeros(2, 3, 8).double()}),
        (TypeError, "q_weight must be one of float16, bfloat16, float32", {"q_weight": torch.zeros(8, dtype=torch.int8)}),
        (ValueError, "q and k must have one dtype, not torch.float32 and torch.float16", {"k": torch.zeros(2, 3, 8).half()}),
        (ValueError, "k must have shape [2, 1, 8], not [2, 1, 6]", {"k": torch.zeros(2, 1, 6)}),
        (ValueError, "k must have 3 dimensions, not 4", {"k": torch.zeros(1, 2, 1, 8)}),
        (ValueError, "k_weight must have shape [8], not [4]", {"k_weight": torch.zeros(4)}),
        (ValueError, "weight_offset must be one of 0, 1, not 2", {"weight_offset": 2}),
        (ValueError, "weight_offset needs k_weight", {"weight_offset": 1, "q_weight": torch.zeros(8)}),
        (ValueError, "round_dtype must be one of float16, bfloat16, float32, not torch.float64", {"round_dtype": torch.float64}),
        (ValueError, "layout must be one of", {"layout": "neox"}),
        (ValueError, "cores must be positive: -1", {"cores": -1}),
    ],
)
def test_what_is_refused(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error) as raised:
        _qk(**change)
    assert str(raised.value).startswith(f"qk_norm_rotary: {message}")


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "qkv must be one of float16, bfloat16, float32", {"qkv": torch.zeros(1, 2, 84, dtype=torch.int8)}),
        (TypeError, "key_cache must be one of float16, bfloat16, float32", {"key_cache": torch.zeros(1, 4, 2, 12, dtype=torch.int8)}),
        (TypeError, "slots must be int32 or int64, not torch.float32", {"slots": torch.zeros(1, 2)}),
        (ValueError, "qkv must have 2 or 3 dimensions, not 1", {"qkv": torch.zeros(84)}),
        (ValueError, "qkv's last dimension must have shape [84], not [85]", {"qkv": torch.zeros(1, 2, 85)}),
        (ValueError, "num_heads, num_kv_heads and head_dim must be positive", {"num_heads": 0}),
        (ValueError, "q_weight needs norm=True", {"norm": False, "q_weight": torch.zeros(12)}),
        (ValueError, "slots must have shape [1, 2], not [2]", {"slots": torch.zeros(2, dtype=torch.int32)}),
        (ValueError, "key_cache must have 4 dimensions, not 3", {"key_cache": torch.zeros(4, 2, 12)}),
        (ValueError, "value_cache must have shape [1, 4, 2, 12], not [1, 8, 2, 12]", {"value_cache": torch.zeros(1, 8, 2, 12)}),
        (
            ValueError,
            "the last dimension of key_cache, which is written, must have stride 1, not 2",
            {"key_cache": torch.zeros(1, 4, 12, 2).transpose(2, 3)},
        ),
        (
            ValueError,
            "qkv, q_weight, k_weight, cos, sin, positions, key_cache, value_cache, slots must lie on one device",
            {
                "slots": torch.zeros(1, 2, dtype=torch.int32, device="meta"),
            },
        ),
    ],
)
def test_what_is_refused_of_a_projection(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error) as raised:
        _qkv(**change)
    assert str(raised.value).startswith(f"qkv_norm_rotary_cache: {message}")


# -------------------------------------------------------------------- fake kernels


def test_fake_kernels(device: str) -> None:
    call = projection(FP16, device, tokens=2)
    check_symbolic(qkv_norm_rotary, qkv_norm_rotary(*call, **HEADS, cores=CORES), *call, **HEADS, cores=CORES)
    q, k = (torch.randn(1, heads, 2, 12, device=device).transpose(1, 2) for heads in (3, 2))
    call = (q, k, None, None, *call[3:])
    check_symbolic(qk_norm_rotary, qk_norm_rotary(*call, cores=CORES), *call, cores=CORES)


def test_schemas_say_what_is_written(device: str) -> None:
    call = projection(FP32, device, tokens=2)
    caches = torch.zeros(2, 3, 4, 2, 12, device=device)
    slots = torch.tensor([[1, 5]], device=device)
    arguments = {**HEADS, "cores": CORES}
    op = qkv_norm_rotary_cache.overload
    torch.library.opcheck(op, (*call, *caches, slots), arguments | {"keep_kv": True}, test_utils=("test_schema", "test_faketensor"))
    real = qkv_norm_rotary_cache(*call, *caches, slots, **arguments)
    check_symbolic(qkv_norm_rotary_cache, real, *call, *caches, slots, **arguments)


# -------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("layout", ["half", "interleaved", "mla"])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(8, 1), (16, 2), (32, 8), (40, 8), (128, 8)], ids=str)
def test_matrix(heads: tuple[int, int], size: int, layout: str, dtype: torch.dtype, device: str) -> None:
    for tokens, full, rotary_dim in ((1, False, -1), (129, True, size // 4), (1031, True, -1)):
        weights = [vector(size, dtype, device) for _ in range(2)]
        cos, sin = tables((tokens, 1), size if rotary_dim == -1 else rotary_dim, full, dtype, device)
        options = {"layout": layout, "rotary_dim": rotary_dim, "weight_offset": 1}
        q, k = (torch.randn(1, tokens, n, size, device=device, dtype=dtype) for n in heads)
        for norm_last in (False, True):
            check_qk(q, k, *weights, cos, sin, EPS, **options, norm_last=norm_last, cores=132)
        qkv = torch.randn(1, tokens, (heads[0] + 2 * heads[1]) * size, device=device, dtype=dtype)
        call, counts = (qkv, *weights, cos, sin, EPS), {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": size}
        eager, truth = merged(call, **counts, **options)
        within(qkv_norm_rotary(*call, **counts, **options, cores=132), eager, truth)
        caches = torch.zeros(2, tokens // 16 + 1, 16, heads[1], size, device=device, dtype=dtype)
        slots = torch.randperm(tokens, device=device)[None]
        (q,) = qkv_norm_rotary_cache(*call, *caches, slots, **counts, **options, cores=132)
        within((q, *caches.flatten(1, 2)[:, slots[0]].unsqueeze(1)), eager, truth)


@pytest.mark.gpu
def test_many_tokens(device: str) -> None:
    qkv = torch.randn(1, 65537, 7 * 64, device=device, dtype=FP16)
    weight = vector(64, FP16, device)
    call, heads = (qkv, weight, weight, *tables((65537, 1), 64, False, FP16, device), EPS), {**HEADS, "head_dim": 64}
    within(qkv_norm_rotary(*call, **heads, cores=132), *merged(call, **heads))
