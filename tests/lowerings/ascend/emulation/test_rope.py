"""CPU kernels of rotary embeddings against rotations of complex numbers in float64, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.lowerings.ascend import sgl
from npu_fusion.lowerings.ascend.emulation import EmulationError
from tests.lowerings.ascend.checks import DTYPES, check_kernel

npu = torch.ops.npu
BF16, FP16, FP32 = DTYPES


def pairs_of(x: Tensor, mode: str) -> Tensor:
    """The pairs (x1, x2) of the last dimension as complex numbers."""
    if mode == "quarter":
        return torch.cat([pairs_of(half, "half") for half in x.chunk(2, -1)], -1)
    pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2) if mode == "half" else x.unflatten(-1, (-1, 2))
    return torch.view_as_complex(pairs.double().contiguous())


def channels_of(pairs: Tensor, mode: str) -> Tensor:
    """The reverse of `pairs_of`."""
    if mode == "quarter":
        return torch.cat([channels_of(half, "half") for half in pairs.chunk(2, -1)], -1)
    parts = torch.view_as_real(pairs)
    return parts.flatten(-2) if mode == "interleave" else parts.transpose(-1, -2).flatten(-2)


def angles(*shape: int) -> Tensor:
    return 3 * torch.rand(*shape, dtype=torch.float64)


def tables(theta: Tensor, mode: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin with one entry for each channel of the pairs that `theta` turns."""
    full = channels_of(torch.complex(theta, theta), mode)
    return full.cos().to(dtype), full.sin().to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """x turned by full tables, in float64."""
    factor = torch.complex(pairs_of(cos, mode).real, pairs_of(sin, mode).real)
    return channels_of(pairs_of(x, mode) * factor, mode)


def assert_rounded_once(actual: Tensor, exact: Tensor, ulps: float = 0.51) -> None:
    tolerance = ulps * torch.finfo(actual.dtype).eps if actual.dtype != FP32 else 1e-5
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=1e-6)


# -------------------------------------------------------------------- npu_rotary_mul


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("mode", "shape", "table"),
    [
        ("half", (2, 3, 5, 8), (1, 1, 5)),
        ("half", (2, 3, 5, 8), (2, 1, 5)),
        ("half", (2, 3, 5, 8), (2, 3, 5)),
        ("half", (2, 5, 3, 8), (1, 5, 1)),
        ("half", (2, 5, 3, 8), (2, 5, 1)),
        ("half", (5, 2, 3, 8), (5, 1, 1)),
        ("half", (5, 3, 8), (5, 1)),
        ("half", (5, 3, 894), (1, 1)),
        ("interleave", (2, 3, 5, 8), (1, 1, 5)),
        ("interleave", (2, 5, 3, 8), (1, 5, 1)),
        ("interleave", (5, 2, 3, 8), (5, 1, 1)),
        ("interleave", (5, 3, 8), (5, 3)),
    ],
)
def test_rotary_mul(mode: str, shape: Sequence[int], table: Sequence[int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    cos, sin = tables(angles(*table, shape[-1] // 2), mode, dtype)
    y = check_kernel("npu::npu_rotary_mul", x, cos, sin, mode)
    assert y.dtype == dtype
    assert_rounded_once(y, turned(x, cos, sin, mode))


def test_rotary_mul_takes_tables_whose_halves_differ() -> None:
    x, cos, sin = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8)
    other = torch.cat((-x[..., 4:], x[..., :4]), -1)
    torch.testing.assert_close(npu.npu_rotary_mul(x, cos, sin), x * cos + other * sin)


def test_rotary_mul_rounds_tables_to_the_dtype_of_the_input() -> None:
    x = torch.randn(1, 5, 3, 8, dtype=BF16)
    cos, sin = tables(angles(1, 5, 1, 4), "half", FP32)
    assert torch.equal(npu.npu_rotary_mul(x, cos, sin), npu.npu_rotary_mul(x, cos.to(BF16), sin.to(BF16)))


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_a_rotation_matrix_takes_the_place_of_the_mode(mode: str) -> None:
    x = torch.randn(2, 3, 5, 8)
    cos, sin = tables(angles(1, 1, 5, 4), mode, FP32)
    one = torch.complex(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    matrix = channels_of(pairs_of(torch.eye(8), mode) * one, mode).float()
    torch.testing.assert_close(check_kernel("npu::npu_rotary_mul", x, cos, sin, "half", matrix), npu.npu_rotary_mul(x, cos, sin, mode))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_mode": "quarter"}, "The rotary_mode of npu_rotary_mul should be half or interleave, but got quarter"),
        ({"input": torch.randn(1, 2, 1, 3, 8)}, "input must have 3 or 4 dimensions"),
        ({"input": torch.randn(1, 5, 3, 8, dtype=torch.float64)}, "input must be float16, bfloat16, float32"),
        ({"r2": torch.randn(1, 1, 1, 8)}, "cos and sin must have one shape"),
        ({"r1": torch.randn(1, 5, 1, 4), "r2": torch.randn(1, 5, 1, 4)}, "must end in 8"),
        ({"r1": torch.randn(1, 4, 1, 8), "r2": torch.randn(1, 4, 1, 8)}, "does not broadcast"),
        ({"input": torch.randn(2, 5, 3, 8), "r1": torch.randn(1, 5, 3, 8), "r2": torch.randn(1, 5, 3, 8)}, "does not broadcast"),
        ({"input": torch.randn(1, 5, 3, 898), "r1": torch.randn(1, 5, 1, 898), "r2": torch.randn(1, 5, 1, 898)}, "at most 896"),
        ({"input": torch.randn(1, 5, 3, 7), "r1": torch.randn(1, 5, 1, 7), "r2": torch.randn(1, 5, 1, 7)}, "multiple of 2"),
        ({"rotate": torch.randn(4, 4)}, r"rotate must have shape \[8, 8\]"),
    ],
)
def test_rotary_mul_refuses(change: dict[str, Any], message: str) -> None:
    arguments = {"input": torch.randn(1, 5, 3, 8), "r1": torch.randn(1, 5, 1, 8), "r2": torch.randn(1, 5, 1, 8), **change}
    with pytest.raises(EmulationError, match=message):
        npu.npu_rotary_mul(**arguments)


def test_interleaved_tables_have_no_batch_of_their_own() -> None:
    x, table = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
    npu.npu_rotary_mul(x, table, table, "half")
    with pytest.raises(EmulationError, match="does not broadcast"):
        npu.npu_rotary_mul(x, table, table, "interleave")


# -------------------------------------------------------------------- npu_apply_rotary_pos_emb


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["half", "interleave", "quarter"])
@pytest.mark.parametrize(
    ("layout", "q", "k", "table"),
    [
        ("BSND", (2, 5, 4, 64), (2, 5, 1, 64), (2, 5, 1)),
        ("BSND", (2, 5, 4, 128), (2, 5, 2, 128), (1, 5, 1)),
        ("SBND", (5, 2, 4, 64), (5, 2, 2, 64), (5, 2, 1)),
        ("BNSD", (2, 4, 5, 64), (2, 2, 5, 64), (2, 1, 5)),
        ("TND", (7, 4, 64), (7, 1, 64), (7, 1)),
    ],
)
def test_apply_rotary_pos_emb_in_place(
    layout: str, q: Sequence[int], k: Sequence[int], table: Sequence[int], mode: str, dtype: torch.dtype
) -> None:
    query, key = torch.randn(q, dtype=dtype), torch.randn(k, dtype=dtype)
    cos, sin = tables(angles(*table, q[-1] // 2), mode, dtype)
    expected = [turned(x, cos, sin, mode) for x in (query, key)]
    results = check_kernel("npu::npu_apply_rotary_pos_emb", query, key, cos, sin, layout, mode)
    for x, y, exact in zip((query, key), results, expected, strict=True):
        assert torch.equal(x, y)
        if dtype == FP16 and mode == "half":
            continue  # rounds each product: see below
        assert_rounded_once(y, exact)


def test_apply_rotary_pos_emb_rounds_each_product_of_fp16() -> None:
    query, key = torch.randn(1, 5, 4, 64, dtype=FP16), torch.randn(1, 5, 1, 64, dtype=FP16)
    cos, sin = tables(angles(1, 5, 1, 32), "half", FP16)
    expected = [x * cos + torch.cat((-x[..., 32:], x[..., :32]), -1) * sin for x in (query, key)]
    for y, e in zip(npu.npu_apply_rotary_pos_emb(query, key, cos, sin), expected, strict=True):
        assert torch.equal(y, e)


def test_apply_rotary_pos_emb_rounds_halves_of_bf16_away_from_zero() -> None:
    """1 + 2^-8 lies between the bf16 numbers 1 and 1 + 2^-7; to the even one would be down."""
    x = torch.zeros(1, 1, 1, 64, dtype=BF16)
    x[..., 0], x[..., 1], x[..., 32] = 1.0, -1.0, 2.0**-8
    x[..., 33] = -(2.0**-8)
    cos, sin = torch.ones(1, 1, 1, 64, dtype=BF16), -torch.ones(1, 1, 1, 64, dtype=BF16)
    y, _ = npu.npu_apply_rotary_pos_emb(x, x.clone(), cos, sin)
    assert y[0, 0, 0, :2].tolist() == [1 + 2.0**-7, -(1 + 2.0**-7)]


def test_narrower_tables_leave_the_channels_behind_them() -> None:
    query, key = torch.randn(1, 5, 4, 64), torch.randn(1, 5, 1, 64)
    before = query.clone()
    cos, sin = tables(angles(1, 5, 1, 16), "half", FP32)
    y, _ = npu.npu_apply_rotary_pos_emb(query, key, cos, sin)
    assert torch.equal(y[..., 32:], before[..., 32:])
    assert_rounded_once(y[..., :32], turned(before[..., :32], cos, sin, "half"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_mode": "full"}, "should be half/quarter/interleave, but got full"),
        ({"layout": "NBSD"}, "layout must be BSND, SBND, BNSD or TND"),
        ({"layout": "TND"}, "query must have 3 dimensions"),
        ({"key": torch.randn(2, 5, 1, 64, dtype=BF16)}, "dtypes must be equal"),
        ({"key": torch.randn(2, 4, 1, 64)}, "query and key must have one S"),
        ({"cos": torch.randn(2, 5, 4, 64), "sin": torch.randn(2, 5, 4, 64)}, "the N of cos and sin must be 1"),
        ({"cos": torch.randn(3, 5, 1, 64), "sin": torch.randn(3, 5, 1, 64)}, "the B of cos and sin, 3"),
        ({"sin": torch.randn(2, 5, 1, 32)}, "cos and sin must have one shape"),
        ({"cos": torch.randn(2, 5, 1, 31), "sin": torch.randn(2, 5, 1, 31)}, "multiple of 2"),
    ],
)
def test_apply_rotary_pos_emb_refuses(change: dict[str, Any], message: str) -> None:
    arguments = {"query": torch.randn(2, 5, 4, 64), "key": torch.randn(2, 5, 1, 64), **change}
    for name in ("cos", "sin"):
        arguments.setdefault(name, torch.randn(2, 5, 1, 64))
    with pytest.raises(EmulationError, match=message):
        npu.npu_apply_rotary_pos_emb(**arguments)


# -------------------------------------------------------------------- npu_interleave_rope


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_interleave_rope(tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 64, dtype=dtype)
    cos, sin = tables(angles(2, 1, tokens, 32), "half", dtype)
    y = check_kernel("npu::npu_interleave_rope", x, cos, sin)
    assert_rounded_once(y, turned(torch.cat((x[..., ::2], x[..., 1::2]), -1), cos, sin, "half"))


@pytest.mark.parametrize(
    ("x", "table", "message"),
    [
        (torch.randn(2, 3, 5, 64), torch.randn(2, 1, 5, 64), "x must be float16, bfloat16"),
        (torch.randn(2, 3, 5, 32, dtype=BF16), torch.randn(2, 1, 5, 32, dtype=BF16), "must be 64"),
        (torch.randn(2, 3, 5, 64, dtype=BF16), torch.randn(1, 1, 5, 64, dtype=BF16), "cos and sin must have shape"),
        (torch.randn(2, 3, 5, 64, dtype=BF16), torch.randn(2, 3, 5, 64, dtype=BF16), "cos and sin must have shape"),
        (torch.randn(3, 5, 64, dtype=BF16), torch.randn(1, 5, 64, dtype=BF16), "x must have 4 dimensions"),
        (torch.randn(2, 3, 5, 64, dtype=BF16), torch.randn(2, 1, 5, 64), "dtypes must be equal"),
    ],
)
def test_interleave_rope_refuses(x: Tensor, table: Tensor, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        npu.npu_interleave_rope(x, table, table)


# -------------------------------------------------------------------- npu_mrope

TOKENS, ROWS = 6, 9


def mrope_inputs(dtype: torch.dtype, head_size: int = 64, width: int = 64, rows: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """positions, query, key, cos_sin_cache."""
    theta = angles(ROWS, width // 2)
    positions = torch.randint(0, ROWS, (rows, TOKENS) if rows > 1 else (TOKENS,))
    query, key = (torch.randn(TOKENS, heads * head_size, dtype=dtype) for heads in (3, 2))
    return positions, query, key, torch.cat((theta.cos(), theta.sin()), -1).to(dtype)


def check_mrope(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], row_of: Sequence[int] | None, head_size: int, mode: str, **options: Any
) -> None:
    """npu_mrope equals the rotation of each head whose channel c takes row `row_of[c]` of the positions."""
    positions, query, key, cache = inputs
    half = cache.shape[1] // 2
    per_row = cache.double()[positions.reshape(-1, TOKENS)]
    rows = per_row[list(row_of or [0] * half) * 2, :, range(2 * half)].t()
    factor = torch.complex(rows[:, :half], rows[:, half:])[:, None]
    results = check_kernel("npu::npu_mrope", positions, query, key, cache, head_size, rotary_mode=mode, **options)
    for x, y in zip((query, key), results, strict=True):
        heads = x.double().unflatten(-1, (-1, head_size))
        exact = torch.cat((channels_of(pairs_of(heads[..., : 2 * half], mode) * factor, mode), heads[..., 2 * half :]), -1)
        assert_rounded_once(y, exact.flatten(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("section", [None, [0, 0, 0]])
@pytest.mark.parametrize("cache_mode", ["default", "interleave"])
def test_mrope_with_one_position_a_token(dtype: torch.dtype, mode: str, width: int, section: list[int] | None, cache_mode: str) -> None:
    check_mrope(mrope_inputs(dtype, width=width), None, 64, mode, mrope_section=section, cache_mode=cache_mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize(
    ("section", "cache_mode", "row_of"),
    [
        ([16, 24, 24], "default", [0] * 16 + [1] * 24 + [2] * 24),
        ([16, 16, 16, 16], "default", [0] * 16 + [1] * 16 + [2] * 16 + [3] * 16),
        ([24, 20, 20], "interleave", [c % 3 if c < 60 else 0 for c in range(64)]),
    ],
)
def test_mrope_sections(section: list[int], cache_mode: str, row_of: list[int], mode: str, dtype: torch.dtype) -> None:
    inputs = mrope_inputs(dtype, 128, 128, rows=len(section))
    check_mrope(inputs, row_of, 128, mode, mrope_section=section, cache_mode=cache_mode)


def test_mrope_takes_rows_of_a_merged_projection() -> None:
    positions, query, key, cache = mrope_inputs(BF16)
    merged = torch.cat((query, key), -1)
    results = npu.npu_mrope(positions, merged[:, :192], merged[:, 192:], cache, 64)
    assert all(torch.equal(*pair) for pair in zip(results, npu.npu_mrope(positions, query, key, cache, 64), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_mode": "interleaved"}, "rotary_mode only support half or interleave"),
        ({"cache_mode": "invalid_mode"}, "cache_mode only support default or interleave"),
        ({"mrope_section": [16, 8, 8]}, r"positions must have shape \[3, T\]"),
        ({"mrope_section": [16, 16]}, "mrope_section must have 3 or 4 entries"),
        ({"positions": torch.zeros(3, TOKENS, dtype=torch.int64)}, "positions must have 1 dimension without mrope_section"),
        ({"positions": torch.zeros(3, TOKENS, dtype=torch.int64), "mrope_section": [16, 8, 4]}, "mrope_section must sum to"),
        ({"positions": torch.full((TOKENS,), ROWS)}, "positions must be rows of cos_sin_cache"),
        ({"positions": torch.zeros(TOKENS)}, "positions must be int32 or int64"),
        ({"head_size": 48}, "head_size must be a multiple of 32"),
        ({"head_size": 32}, "cos_sin_cache is wider"),
        ({"key": torch.randn(TOKENS, 64)}, "dtypes must be equal"),
        ({"key": torch.randn(TOKENS, 96, dtype=BF16)}, "a row of key must be heads of 64"),
        ({"key": torch.randn(TOKENS - 1, 64, dtype=BF16)}, "key must have 6 rows"),
    ],
)
def test_mrope_refuses(change: dict[str, Any], message: str) -> None:
    names = ("positions", "query", "key", "cos_sin_cache")
    arguments = {**dict(zip(names, mrope_inputs(BF16), strict=True)), "head_size": 64, **change}
    with pytest.raises(EmulationError, match=message):
        npu.npu_mrope(**arguments)


# -------------------------------------------------------------------- split_qkv_rmsnorm_rope


def split_inputs(dtype: torch.dtype, width: int = 16, table_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """4 query heads and 2 key heads of 16 channels, 5 tokens."""
    cos, sin = tables(angles(5, width // 2), "half", table_dtype or dtype)
    return {"input": torch.randn(5, 128, dtype=dtype), "sin": sin, "cos": cos, "q_hidden_size": 64, "kv_hidden_size": 32, "head_dim": 16}


def exact_split(arguments: dict[str, Any]) -> list[Tensor]:
    x, width, mode = (
        arguments["input"].double(),
        arguments["cos"].shape[-1],
        "half" if arguments.get("is_neox_style", True) else "interleave",
    )
    theta = torch.complex(*(arguments[name].double()[:, None, : width // 2] for name in ("cos", "sin")))
    q, k, v = x.split([64, 32, 32], -1)
    results = []
    for name, part in (("q", q), ("k", k)):
        heads = part.unflatten(-1, (-1, 16))
        if arguments.get("eps") is not None:
            heads = heads / (heads.square().mean(-1, keepdim=True) + arguments["eps"]).sqrt() * arguments[f"{name}_weight"].double()
            heads = heads + arguments[f"{name}_bias"].double() if f"{name}_bias" in arguments else heads
        turned_part = channels_of(pairs_of(heads[..., :width], mode) * theta, mode)
        results.append(torch.cat((turned_part, heads[..., width:]), -1).flatten(1))
    return [*results, v]


NORM = {"eps": 1e-6, "q_weight": 1 + torch.rand(16), "k_weight": 1 + torch.rand(16)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize(
    "options",
    [{}, NORM, {**NORM, "q_bias": torch.rand(16), "k_bias": torch.rand(16)}, {**NORM, "is_neox_style": False}],
    ids=["rope", "norm", "bias", "interleaved"],
)
def test_split_qkv_rmsnorm_rope(options: dict[str, Any], width: int, dtype: torch.dtype) -> None:
    arguments = {**split_inputs(dtype, width, table_dtype=FP32), **options}
    for y, exact in zip(check_kernel("npu_fusion_sgl::split_qkv_rmsnorm_rope", **arguments), exact_split(arguments), strict=True):
        assert_rounded_once(y, exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 12}, "head_dim must be a power of 2"),
        ({"q_hidden_size": 48}, "q_hidden_size 48 must be a multiple"),
        ({"input": torch.randn(5, 120)}, r"input must have shape \[T, 128\]"),
        ({"cos": torch.randn(4, 16)}, r"cos must have shape \[5, R\]"),
        ({"eps": 1e-6}, "q_weight is needed"),
        ({"q_weight": torch.ones(16)}, "need eps"),
        ({**NORM, "q_bias": torch.ones(16)}, "q_bias and k_bias are both given"),
        ({**NORM, "k_weight": torch.ones(8)}, r"k_weight must have shape \[16\]"),
    ],
)
def test_split_qkv_rmsnorm_rope_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        torch.ops.npu_fusion_sgl.split_qkv_rmsnorm_rope(**{**split_inputs(FP32), **change})


def test_without_sgl_kernel_npu_its_kernel_says_what_is_missing() -> None:
    assert not sgl.installed()
    with pytest.raises(sgl.SglKernelError, match="install sgl-kernel-npu"):
        sgl.split_qkv_rmsnorm_rope(**split_inputs(FP32))


def _with_package(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setattr(sgl, "_function", lambda module, name: function)


def test_the_kernel_passes_every_argument_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(*, is_neox_style: bool = True, **given: Any) -> tuple[Tensor, ...]:
        return torch.ops.npu_fusion_sgl.split_qkv_rmsnorm_rope(**given, is_neox_style=is_neox_style)

    _with_package(monkeypatch, function)
    arguments = {**split_inputs(FP32), **NORM}
    for y, exact in zip(sgl.split_qkv_rmsnorm_rope(**arguments), exact_split(arguments), strict=True):
        assert_rounded_once(y, exact)


def test_an_old_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_package(monkeypatch, lambda input, sin, cos, **rest: None)
    with pytest.raises(sgl.SglKernelError, match="upgrade it"):
        sgl.split_qkv_rmsnorm_rope(**split_inputs(FP32))
