"""Numerics, layouts, metadata and errors of the rope family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.norm import rms_norm
from npu_fusion.ops.rope import qk_norm_rotary, qkv_norm_rotary, rotary
from tests.ops.checks import DTYPES, check_op, check_traceable

EPS = 1e-6
LAYOUTS = ("half", "interleaved", "mla")


def angles(tokens: int, pairs: int) -> Tensor:
    return torch.arange(tokens)[:, None].double() * 10000.0 ** (-torch.arange(pairs) / max(pairs, 1))


def tables(tokens: int, width: int, layout: str, full: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [S, width] or [S, width / 2]."""
    theta = angles(tokens, width // 2)
    if full:
        theta = theta.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat((theta, theta), -1)
    return theta.cos().to(dtype), theta.sin().to(dtype)


def oracle(x: Tensor, cos: Tensor, sin: Tensor, layout: str, width: int, sign: int) -> Tensor:
    """Each pair as a complex number times exp(i * theta), in float64; cos and sin are half tables [S, width / 2]."""
    x = x.double()
    part = x[..., :width]
    pairs = part.unflatten(-1, (2, -1)).transpose(-1, -2) if layout == "half" else part.unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.double(), sign * sin.double())
    parts = torch.view_as_real(turned)
    flat = parts.flatten(-2) if layout == "interleaved" else parts.transpose(-1, -2).flatten(-2)
    return torch.cat((flat, x[..., width:]), -1)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def eager(x: Tensor, cos: Tensor, sin: Tensor, layout: str, width: int, sign: int) -> Tensor:
    """transformers' spelling in the dtype of x; cos and sin are half tables."""
    part = x[..., :width]
    if layout != "half":
        part = torch.cat((part[..., 0::2], part[..., 1::2]), -1)
    out = part * torch.cat((cos, cos), -1) + sign * rotate_half(part) * torch.cat((sin, sin), -1)
    if layout == "interleaved":
        out = out.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat((out, x[..., width:]), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("full", [True, False], ids=("full", "half"))
@pytest.mark.parametrize(("dim", "rotary_dim", "sign"), [(16, -1, 1), (16, 10, 1), (6, -1, -1), (2, 2, 1)])
def test_rotary_meets_the_numeric_contract(dim: int, rotary_dim: int, sign: int, full: bool, layout: str, dtype: torch.dtype) -> None:
    width = dim if rotary_dim == -1 else rotary_dim
    xs = [torch.randn(2, heads, 7, dim).to(dtype) for heads in (4, 1)]
    cos, sin = tables(7, width, layout, full, dtype)
    half_cos, half_sin = tables(7, width, layout, False, dtype)
    results = check_op(rotary, xs, cos, sin, layout=layout, rotary_dim=rotary_dim, sign=sign)
    for x, actual in zip(xs, results):
        arguments = (half_cos, half_sin, layout, width, sign)
        assert actual.dtype == dtype
        assert_within_contract(actual, eager(x, *arguments), oracle(x, *arguments), dtype)
        assert torch.equal(actual[..., width:], x[..., width:])


def test_layouts_are_permutations_of_one_another() -> None:
    x = torch.randn(3, 5, 8)
    cos, sin = tables(5, 8, "half", False, torch.float32)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    (half,) = rotary([x[..., order]], cos, sin, layout="half")
    (interleaved,) = rotary([x], cos, sin, layout="interleaved")
    (mla,) = rotary([x], cos, sin, layout="mla")
    assert torch.equal(half, mla)
    assert torch.equal(interleaved[..., order], mla)
    assert not torch.allclose(interleaved, mla)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_of_a_full_table_may_differ(layout: str) -> None:
    """A full table is indexed by the position in the result."""
    x, cos, sin = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    first, second = ([0, 1], [2, 3]) if layout == "half" else ([0, 2], [1, 3])
    out_first, out_second = ([0, 2], [1, 3]) if layout == "interleaved" else ([0, 1], [2, 3])
    expected = torch.empty(3, 4)
    for a, b, p, q in zip(first, second, out_first, out_second):
        expected[:, p] = x[:, a] * cos[:, p] - x[:, b] * sin[:, p]
        expected[:, q] = x[:, b] * cos[:, q] + x[:, a] * sin[:, q]
    (actual,) = rotary([x], cos, sin, layout=layout)
    assert torch.allclose(actual, expected)


@pytest.mark.parametrize("shape", [(7, 8), (1, 7, 8), (2, 1, 7, 8), (2, 3, 7, 8), (8,)])
def test_tables_broadcast(shape: tuple[int, ...]) -> None:
    x, cos, sin = torch.randn(2, 3, 7, 8), torch.randn(shape), torch.randn(shape)
    (actual,) = check_op(rotary, [x], cos, sin)
    (expected,) = rotary([x], cos.expand(2, 3, 7, 8), sin.expand(2, 3, 7, 8))
    assert torch.equal(actual, expected)


def test_float32_tables_keep_their_precision() -> None:
    x = torch.randn(2, 7, 8).bfloat16()
    cos, sin = tables(7, 8, "half", True, torch.float32)
    (actual,) = check_op(rotary, [x], cos, sin)
    assert torch.equal(actual, (x.float() * cos + rotate_half(x.float()) * sin).bfloat16())
    (wide,) = check_op(rotary, [x], cos, sin, out_dtype=torch.float32)
    assert torch.equal(wide.bfloat16(), actual)


def test_memory_order_and_empty_inputs() -> None:
    tokens_first = torch.randn(2, 7, 4, 8)
    cos, sin = tables(7, 8, "half", True, torch.float32)
    (actual,) = check_op(rotary, [tokens_first.transpose(1, 2)], cos, sin)
    assert actual.stride() == tokens_first.transpose(1, 2).stride()
    assert torch.equal(actual, rotary([tokens_first.transpose(1, 2).contiguous()], cos, sin)[0])
    (sliced,) = check_op(rotary, [torch.randn(2, 7, 12, 8)[:, :, 4:8].transpose(1, 2)], cos, sin)
    assert sliced.transpose(1, 2).is_contiguous()
    (empty,) = check_op(rotary, [torch.randn(2, 4, 0, 8)], cos[:0], sin[:0])
    assert empty.shape == (2, 4, 0, 8)
    assert rotary([], cos, sin) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_offset": 1},
        {"norm_last": True},
        {"layout": "interleaved", "rotary_dim": 4},
        {"layout": "mla", "sign": -1, "norm_last": True},
        {"heads_first": True},
        {"heads_first": True, "norm_last": True},
    ],
    ids=str,
)
def test_qk_norm_rotary_meets_the_numeric_contract(options: dict[str, Any], dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 4, 7, 8).to(dtype), torch.randn(2, 2, 7, 8).to(dtype)
    qw, kw = torch.randn(8).to(dtype), torch.randn(8).to(dtype)
    layout, width, sign = options.get("layout", "half"), options.get("rotary_dim", 8), options.get("sign", 1)
    cos, sin = tables(7, width, layout, False, dtype)
    inputs = (q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()) if options.get("heads_first") else (q, k)
    results = check_op(qk_norm_rotary, *inputs, qw, kw, cos, sin, EPS, round_dtype=dtype, **options)
    for x, w, actual in zip((q, k), (qw, kw), results):

        def norm(t: Tensor, weight: Tensor = w) -> Tensor:
            wide = t.double() if t.dtype == torch.float64 else t.float()
            scaled = (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(t.dtype)
            return scaled * (options.get("weight_offset", 0) + weight.to(t.dtype))

        def compose(t: Tensor, rotate: Any) -> Tensor:
            arguments = (cos, sin, layout, width, sign)
            return norm(rotate(t, *arguments)) if options.get("norm_last") else rotate(norm(t), *arguments)

        assert_within_contract(actual, compose(x, eager), compose(x.double(), oracle), dtype)


def test_qk_norm_rotary_is_the_composition() -> None:
    q, k, w = torch.randn(2, 4, 7, 8).bfloat16(), torch.randn(2, 1, 7, 8).bfloat16(), torch.randn(8).bfloat16()
    cos, sin = tables(7, 8, "half", True, torch.bfloat16)
    expected = rotary([rms_norm(q, w, EPS), rms_norm(k, None, EPS)], cos, sin)
    actual = check_op(qk_norm_rotary, q, k, w, None, cos, sin, EPS)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"norm": False}, {"weights": False}, {"layout": "interleaved", "rotary_dim": 6}], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (1, 1), (3, 3)])
def test_qkv_norm_rotary_is_the_composition(heads: int, kv_heads: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    options = dict(options)
    weighted = options.pop("weights", True) and options.get("norm", True)
    for batch, tokens in ((2, 7), (1, 1), (0, 3)):
        qkv = torch.randn(batch, tokens, (heads + 2 * kv_heads) * 8).to(dtype)
        qw, kw = (torch.randn(8).to(dtype), torch.randn(8).to(dtype)) if weighted else (None, None)
        cos, sin = tables(tokens, options.get("rotary_dim", 8), options.get("layout", "half"), True, dtype)
        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 8}
        q, k, v = check_op(qkv_norm_rotary, qkv, qw, kw, cos, sin, EPS, **sizes, **options)
        parts = qkv.split((heads * 8, kv_heads * 8, kv_heads * 8), dim=-1)
        split = [part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in parts]
        rotation = {name: value for name, value in options.items() if name != "norm"}
        if options.get("norm", True):
            expected = qk_norm_rotary(split[0], split[1], qw, kw, cos, sin, EPS, **rotation)
        else:
            expected = rotary(split[:2], cos, sin, **rotation)
        for actual, reference in zip((q, k, v), (*expected, split[2])):
            assert torch.equal(actual, reference)
            assert actual.transpose(1, 2).is_contiguous()


def test_value_is_a_copy() -> None:
    qkv = torch.randn(1, 1, 3 * 8)
    kept = qkv.clone()
    cos, sin = tables(1, 8, "half", True, torch.float32)
    _, _, v = qkv_norm_rotary(qkv, None, None, cos, sin, EPS, num_heads=1, num_kv_heads=1, head_dim=8)
    v.zero_()
    assert torch.equal(qkv, kept)


def test_traced_with_symbols() -> None:
    def inputs(batch: int, tokens: int) -> list[Tensor]:
        q, k = torch.randn(batch, 4, tokens, 8), torch.randn(batch, 2, tokens, 8)
        return [q, k, *tables(tokens, 8, "half", True, torch.float32), torch.randn(batch, tokens, 64)]

    first, second = inputs(2, 7), inputs(3, 5)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    check_traceable(rotary, lambda q, k, c, s, _: rotary([q, k], c, s), first, second)
    check_traceable(qk_norm_rotary, lambda q, k, c, s, _: qk_norm_rotary(q, k, None, None, c, s, EPS), first, second)
    check_traceable(qkv_norm_rotary, lambda q, k, c, s, m: qkv_norm_rotary(m, None, None, c, s, EPS, **sizes), first, second)


X = torch.randn(2, 4, 7, 8)
C = torch.randn(7, 8)
QKV = torch.randn(2, 7, 64)
W = torch.randn(8)
SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: rotary([X.int()], C, C), TypeError, r"xs\[0\] must be floating point"),
        (lambda: rotary([X], C.int(), C), TypeError, "cos must be floating point"),
        (lambda: rotary([X], C, C, out_dtype=torch.int32), TypeError, "out_dtype"),
        (lambda: rotary([X], C, C, layout="neox"), ValueError, "'half', 'interleaved', 'mla'"),
        (lambda: rotary([X], C, C, sign=0), ValueError, "sign must be one of 1, -1"),
        (lambda: rotary([X], C, C, rotary_dim=0), ValueError, "positive or -1"),
        (lambda: rotary([X], C, C, rotary_dim=10), ValueError, "exceeds the last dimension"),
        (lambda: rotary([X], C, C, rotary_dim=5), ValueError, "odd number"),
        (lambda: rotary([X], C[:, :6], C[:, :6]), ValueError, "must end in 8 or half of it, not 6"),
        (lambda: rotary([X], C, C[:, :4]), ValueError, "sin must have shape"),
        (lambda: rotary([X], C[:5], C[:5]), ValueError, "does not broadcast"),
        (lambda: rotary([X[0, 0]], C[None].expand(2, 7, 8), C), ValueError, "does not broadcast"),
        (lambda: qk_norm_rotary(X, X, X[0, 0, 0, :4], None, C, C, EPS), ValueError, "q_weight must have shape"),
        (lambda: qk_norm_rotary(X, X, None, None, C, C, EPS, weight_offset=1), ValueError, "needs q_weight"),
        (lambda: qk_norm_rotary(X, X[..., :6], None, None, C, C, EPS, rotary_dim=4), ValueError, "must end in 4"),
        (lambda: qk_norm_rotary(X[0], X[0], None, None, C, C, EPS, heads_first=True), ValueError, "must have 4 dimensions"),
        (lambda: qk_norm_rotary(X, X, W.int(), None, C, C, EPS), TypeError, "q_weight must be floating point"),
        (lambda: qkv_norm_rotary(X, None, None, C, C, EPS, **SIZES), ValueError, "must have 3 dimensions"),
        (lambda: qkv_norm_rotary(QKV[..., :56], None, None, C, C, EPS, **SIZES), ValueError, "last dimension must have shape"),
        (lambda: qkv_norm_rotary(QKV, W, W, C, C, EPS, **SIZES, norm=False), ValueError, "need norm=True"),
        (lambda: qkv_norm_rotary(QKV, W, W, C, C, EPS, **{**SIZES, "head_dim": 0}), ValueError, "must be positive"),
    ],
)
def test_wrong_calls(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(error, match=match):
        call()
