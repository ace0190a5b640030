"""Numerics, rounding points, metadata and errors of the norm family."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.norm import add_rms_norm, l2_norm, layer_norm, rms_norm
from tests.ops.checks import DTYPES, check_op, check_traceable

EPS = 1e-5
SHAPES = [(2, 3, 64), (1, 7, 33), (5, 48), (40,), (3, 1)]
EMPTY = [(0, 16), (2, 0, 16)]


def plain_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    internal: torch.dtype,
    *,
    weight_offset: int = 0,
    gate: Tensor | None = None,
    gate_activation: str = "silu",
    gate_first: bool = False,
    group_size: int = 0,
) -> Tensor:
    """The formula as modelling code writes it. In float64 it is the oracle, in the model's dtype the eager result."""
    act = F.silu if gate_activation == "silu" else torch.sigmoid
    h = x.to(internal)
    if gate is not None and gate_first:
        h = h * act(gate.to(internal))
    groups = h.reshape(*h.shape[:-1], h.shape[-1] // group_size, group_size) if group_size else h
    h = (groups / torch.sqrt(groups.pow(2).mean(-1, keepdim=True) + eps)).reshape(h.shape).to(x.dtype)
    if weight is not None:
        h = h * (weight_offset + weight)
    if gate is not None and not gate_first:
        h = h * act(gate.to(internal)).to(x.dtype)
    return h


RMS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight": False},
    {"weight_offset": 1},
    {"gate": True},
    {"gate": True, "gate_activation": "sigmoid"},
    {"gate": True, "gate_first": True},
    {"gate": True, "gate_first": True, "group_size": 16},
    {"group_size": 16},
    {"gate": True, "weight": False},
]


def rms_inputs(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    kwargs = {k: v for k, v in options.items() if k not in ("weight", "gate")}
    x = (3 * torch.randn(shape)).to(dtype)
    weight = torch.randn(shape[-1:]).to(dtype) if options.get("weight", True) else None
    if options.get("gate"):
        kwargs["gate"] = torch.randn(shape).to(dtype)
    return x, weight, kwargs


def doubled(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in kwargs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", RMS_OPTIONS, ids=str)
def test_rms_norm_meets_the_numeric_contract(options: dict[str, Any], dtype: torch.dtype) -> None:
    for shape in [s for s in SHAPES if s[-1] % options.get("group_size", 1) == 0]:
        x, weight, kwargs = rms_inputs(shape, dtype, options)
        reference = plain_rms_norm(x.double(), None if weight is None else weight.double(), EPS, torch.float64, **doubled(kwargs))
        eager = plain_rms_norm(x, weight, EPS, torch.float32, **kwargs)
        for round_dtype in (None, dtype):
            actual = rms_norm(x, weight, EPS, round_dtype=round_dtype, **kwargs)
            assert actual.dtype == dtype
            assert_within_contract(actual, eager, reference, dtype, f"{shape}, {round_dtype}")


@pytest.mark.parametrize("options", RMS_OPTIONS, ids=str)
def test_rms_norm_metadata(options: dict[str, Any]) -> None:
    x, weight, kwargs = rms_inputs((2, 3, 64), torch.bfloat16, options)
    check_op(rms_norm, x, weight, EPS, out_dtype=torch.float32, round_dtype=torch.bfloat16, **kwargs)


def test_rms_norm_in_float64_is_float64() -> None:
    x, weight, _ = rms_inputs((4, 64), torch.float64, {})
    assert torch.allclose(rms_norm(x, weight, EPS), plain_rms_norm(x, weight, EPS, torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_rounds_where_models_do(dtype: torch.dtype) -> None:
    """Bit for bit the modelling code of Llama, Llama 4, Gemma, OLMo 2, helium and the gated delta net."""
    x, w, gate = torch.randn(3, 64).to(dtype), torch.randn(64).to(dtype), torch.randn(3, 64).to(dtype)
    h = x.float()
    xhat = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    assert torch.equal(rms_norm(x, w, EPS, round_dtype=dtype), w * xhat.to(dtype))
    assert torch.equal(rms_norm(x, w, EPS, weight_offset=1), (xhat * (1.0 + w.float())).to(dtype))
    assert torch.equal(rms_norm(x, w, EPS), (w * xhat).to(dtype))
    assert torch.equal(rms_norm(x, w, EPS, out_dtype=torch.float32), w.float() * xhat)
    assert torch.equal(rms_norm(x, w.float(), EPS, round_dtype=dtype, out_dtype=torch.float32), w.float() * xhat.to(dtype))
    assert torch.equal(rms_norm(x, None, EPS, out_dtype=torch.float32), xhat)
    gated = (w * xhat.to(dtype)) * F.silu(gate.float())
    assert torch.equal(rms_norm(x, w, EPS, gate=gate, round_dtype=dtype), gated.to(dtype))
    # The rounding points differ in what they give: the options above are not the same thing by another name.
    assert not torch.equal(rms_norm(x, w, EPS, round_dtype=dtype), rms_norm(x, w, EPS))


def test_eps_counts() -> None:
    x = torch.full((2, 16), 1e-4)
    assert not torch.allclose(rms_norm(x, None, 1e-6), rms_norm(x, None, 1e-12))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_unrounded", [False, True])
def test_add_rms_norm_meets_the_numeric_contract(norm_unrounded: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for with_bias, residual_dtype in ((False, dtype), (True, dtype), (False, torch.float32)):
            x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(residual_dtype)
            weight, bias = torch.randn(shape[-1:]).to(dtype), torch.randn(shape[-1:]).to(dtype) if with_bias else None
            total = x + residual if bias is None else x + bias + residual
            exact = x.double() + residual.double() + (0 if bias is None else bias.double())
            y, s = add_rms_norm(x, residual, weight, EPS, bias=bias, norm_unrounded=norm_unrounded)
            assert y.dtype == s.dtype == total.dtype
            assert_within_contract(s, total, exact, dtype, "sum")
            reference = plain_rms_norm(exact, weight.double(), EPS, torch.float64)
            assert_within_contract(y, plain_rms_norm(total, weight, EPS, torch.float32).to(y.dtype), reference, dtype, "norm")


def test_add_rms_norm_is_the_composition() -> None:
    x, residual, weight = (torch.randn(4, 32).bfloat16() for _ in range(3))
    weight = weight[0]
    y, s = add_rms_norm(x, residual, weight, EPS, weight_offset=1, round_dtype=torch.bfloat16)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight, EPS, weight_offset=1, round_dtype=torch.bfloat16))
    y, s = add_rms_norm(x, residual, weight, EPS, norm_unrounded=True)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, rms_norm(x.float() + residual.float(), weight, EPS, out_dtype=torch.bfloat16))
    y, s = add_rms_norm(x, residual, weight, EPS, sum_dtype=torch.float32, out_dtype=torch.bfloat16)
    assert torch.equal(s, x.float() + residual.float())
    assert torch.equal(y, rms_norm(s, weight, EPS, out_dtype=torch.bfloat16))


def test_add_rms_norm_metadata() -> None:
    x, residual, weight, bias = torch.randn(2, 5, 16).half(), torch.randn(2, 5, 16), torch.randn(16).half(), torch.randn(16)
    check_op(add_rms_norm, x, residual, weight, EPS)
    check_op(add_rms_norm, x, residual, None, EPS, bias=bias, sum_dtype=torch.float16, out_dtype=torch.float32, norm_unrounded=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_meets_the_numeric_contract(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, weight, bias = (2 + torch.randn(shape)).to(dtype), torch.randn(shape[-1:]).to(dtype), torch.randn(shape[-1:]).to(dtype)
        for w, b in ((weight, bias), (weight, None), (None, None)):
            reference = F.layer_norm(x.double(), shape[-1:], None if w is None else w.double(), None if b is None else b.double(), EPS)
            eager = F.layer_norm(x, shape[-1:], w, b, EPS)
            for round_dtype in (None, dtype):
                assert_within_contract(layer_norm(x, w, b, EPS, round_dtype=round_dtype), eager, reference, dtype, str(shape))


def test_layer_norm_rounds_as_asked() -> None:
    x, weight = torch.randn(4, 32).bfloat16(), torch.randn(32).bfloat16()
    h = x.float() - x.float().mean(-1, keepdim=True)
    xhat = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
    assert torch.equal(layer_norm(x, weight, None, EPS), (weight.float() * xhat).bfloat16())
    assert torch.equal(layer_norm(x, weight, weight, EPS, round_dtype=torch.bfloat16), weight * xhat.bfloat16() + weight)


def test_layer_norm_metadata() -> None:
    x, weight = torch.randn(2, 5, 16).bfloat16(), torch.randn(16)
    check_op(layer_norm, x, weight, weight, EPS, round_dtype=torch.bfloat16, out_dtype=torch.float32)
    check_op(layer_norm, x.transpose(0, 1), None, None, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_l2_norm_meets_the_numeric_contract(scale: float, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        d = x.double()
        added = d / torch.sqrt(d.pow(2).sum(-1, keepdim=True) + 1e-6) * scale
        eager = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) * scale
        assert_within_contract(l2_norm(x, 1e-6, scale=scale), eager, added, dtype, "add")
        limited = F.normalize(d, dim=-1, eps=1e-6) * scale
        eager = F.normalize(x, dim=-1, eps=1e-6) * scale
        assert_within_contract(l2_norm(x, 1e-6, eps_mode="max", scale=scale), eager, limited, dtype, "max")


def test_l2_norm_eps_modes_differ_near_zero() -> None:
    x = torch.full((1, 4), 1e-3)
    assert torch.allclose(l2_norm(x, 1.0, eps_mode="max"), x)
    assert torch.allclose(l2_norm(x, 1.0, eps_mode="add"), x / (1 + 4e-6) ** 0.5)
    assert torch.equal(l2_norm(torch.zeros(1, 4), 1e-6), torch.zeros(1, 4))
    check_op(l2_norm, x.bfloat16(), 1e-6, eps_mode="max", scale=2.0, out_dtype=torch.float32)


NORMS = [
    functools.partial(rms_norm, weight=None, eps=EPS),
    functools.partial(layer_norm, weight=None, bias=None, eps=EPS),
    functools.partial(l2_norm, eps=EPS),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.func.name)
def test_layouts_and_empty_inputs(norm: Any) -> None:
    """Results are right for any strides, stored in the order of x, and empty inputs give empty results."""
    op, arguments = norm.func, norm.keywords
    base = torch.randn(2, 6, 4, 8)
    strided = [base.transpose(1, 2), base[..., ::2], base[:, 1:3], base[:, :1].expand(2, 6, 4, 8), base[0, 0].t()]
    for x in strided:
        result = check_op(op, x, **arguments)
        assert torch.allclose(result, op(x.contiguous(), **arguments))
        assert result.stride() == torch.empty_like(x).stride()
    for shape in EMPTY:
        assert check_op(op, torch.randn(shape), **arguments).shape == shape


def test_inputs_are_not_aliased_or_changed() -> None:
    x = torch.ones(2, 4)
    results = [rms_norm(x, None, 0.0), *add_rms_norm(x, torch.zeros(2, 4), None, 0.0), l2_norm(x, 0.0, eps_mode="max")]
    for result in results:
        result.add_(1)
    assert torch.equal(x, torch.ones(2, 4))


def test_traced_with_symbols() -> None:
    weight = torch.randn(16)
    first = [torch.randn(2, 5, 16), torch.randn(2, 5, 16), weight]
    second = [torch.randn(4, 3, 16), torch.randn(4, 3, 16), weight]
    check_traceable(rms_norm, lambda x, gate, w: rms_norm(x, w, EPS, gate=gate), first, second)
    check_traceable(add_rms_norm, lambda x, r, w: add_rms_norm(x, r, w, EPS), first, second)
    check_traceable(layer_norm, lambda x, _, w: layer_norm(x, w, w, EPS), first, second)
    check_traceable(l2_norm, lambda x, _, w: l2_norm(x, EPS), first, second)


X = torch.randn(2, 8)
W = torch.randn(8)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: rms_norm(X.int(), W, EPS), TypeError, "x must be floating point"),
        (lambda: rms_norm(X, W.int(), EPS), TypeError, "weight must be floating point"),
        (lambda: rms_norm(X, W, EPS, round_dtype=torch.int8), TypeError, "round_dtype"),
        (lambda: rms_norm(X, W, EPS, out_dtype=torch.int8), TypeError, "out_dtype"),
        (lambda: rms_norm(X, W, EPS, gate=X.int()), TypeError, "gate must be floating point"),
        (lambda: rms_norm(X, W[:4], EPS), ValueError, "weight must have shape"),
        (lambda: rms_norm(X, X, EPS), ValueError, "weight must have shape"),
        (lambda: rms_norm(torch.tensor(1.0), None, EPS), ValueError, "at least 1 dimension"),
        (lambda: rms_norm(X, W, EPS, weight_offset=2), ValueError, "weight_offset must be one of 0, 1"),
        (lambda: rms_norm(X, None, EPS, weight_offset=1), ValueError, "needs a weight"),
        (lambda: rms_norm(X, W, EPS, gate=X, gate_activation="gelu"), ValueError, "'silu', 'sigmoid'"),
        (lambda: rms_norm(X, W, EPS, gate=X[:1]), ValueError, "gate must have shape"),
        (lambda: rms_norm(X, W, EPS, gate_first=True), ValueError, "needs a gate"),
        (lambda: rms_norm(X, W, EPS, group_size=3), ValueError, "does not divide"),
        (lambda: rms_norm(X, W, EPS, group_size=-1), ValueError, "negative"),
        (lambda: add_rms_norm(X, X[:1], W, EPS), ValueError, "residual must have shape"),
        (lambda: add_rms_norm(X, X.int(), W, EPS), TypeError, "residual must be floating point"),
        (lambda: add_rms_norm(X, X, W, EPS, bias=X), ValueError, "bias must have shape"),
        (lambda: add_rms_norm(X, X, W, EPS, sum_dtype=torch.int8), TypeError, "sum_dtype"),
        (lambda: layer_norm(X, W, W[:2], EPS), ValueError, "bias must have shape"),
        (lambda: layer_norm(X, W, W.int(), EPS), TypeError, "bias must be floating point"),
        (lambda: l2_norm(X, EPS, eps_mode="none"), ValueError, "'add', 'max'"),
        (lambda: l2_norm(X.int(), EPS), TypeError, "x must be floating point"),
    ],
)
def test_wrong_calls(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(error, match=match):
        call()
