"""Numerics, layouts, metadata and errors of `glu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_fusion.numerics import assert_within_contract
from npu_fusion.ops.glu import glu
from tests.ops.checks import DTYPES, check_op, check_traceable

SHAPES = [(2, 3, 32), (5, 7), (1,), (0, 4), (2, 0)]


def plain_glu(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    alpha: float = 1.0,
    gate_limit: float | None = None,
    up_limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    """The formula as modelling code writes it, in the dtype of the inputs."""
    if gate_limit is not None:
        gate = gate.clamp(max=gate_limit)
    if up_limit is not None:
        up = up.clamp(min=-up_limit, max=up_limit)
    activated = {
        "silu": lambda g: g * torch.sigmoid(alpha * g),
        "gelu": lambda g: 0.5 * g * (1 + torch.erf(g / 2**0.5)),
        "gelu_tanh": lambda g: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))),
        "sigmoid": lambda g: 1 / (1 + torch.exp(-g)),
        "tanh": torch.tanh,
        "relu": lambda g: g.clamp(min=0),
        "relu2": lambda g: F.relu(g) ** 2,
        "identity": lambda g: g,
    }[activation](gate)
    return activated * (up + up_offset)


OPTIONS: list[dict[str, Any]] = [
    *({"activation": name} for name in ("silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "relu", "relu2", "identity")),
    {"alpha": 1.702, "gate_limit": 2.0, "up_limit": 2.0, "up_offset": 1.0},
    {"gate_limit": 1.5},
    {"up_limit": 0.5, "activation": "gelu"},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_glu_meets_the_numeric_contract(options: dict[str, Any], dtype: torch.dtype) -> None:
    for shape in SHAPES:
        gate, up = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
        actual = check_op(glu, gate, up, **options)
        assert actual.dtype == dtype
        assert_within_contract(actual, plain_glu(gate, up, **options), plain_glu(gate.double(), up.double(), **options), dtype, str(shape))


@pytest.mark.parametrize("layout", ["halves", "swapped", "interleaved"])
def test_merged_layouts(layout: str) -> None:
    gate, up = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    parts = (gate, up) if layout != "swapped" else (up, gate)
    merged = torch.stack(parts, -1).flatten(-2) if layout == "interleaved" else torch.cat(parts, -1)
    for tensor in (merged, merged.transpose(0, 1).contiguous().transpose(0, 1)):
        actual = check_op(glu, tensor, None, layout=layout, alpha=1.5)
        assert torch.equal(actual, glu(gate, up, alpha=1.5))
        assert actual.is_contiguous()
    assert not torch.equal(glu(merged, None, layout=layout), glu(merged.flip(-1), None, layout=layout))


def test_rounds_once() -> None:
    gate, up = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    assert torch.equal(glu(gate, up), (F.silu(gate.float()) * up.float()).bfloat16())
    assert torch.equal(glu(gate, up, out_dtype=torch.float32), F.silu(gate.float()) * up.float())


@pytest.mark.parametrize("round_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_the_activated_gate(round_dtype: torch.dtype) -> None:
    """As PyTorch's two ops do, for a gate of that dtype."""
    gate, up = torch.randn(64).to(round_dtype), torch.randn(64).to(round_dtype)
    actual = check_op(glu, gate, up, round_dtype=round_dtype)
    assert torch.equal(actual, F.silu(gate) * up)
    assert not torch.equal(actual, glu(gate, up))
    wide = glu(gate.float(), up.float(), round_dtype=round_dtype)
    assert torch.equal(wide, F.silu(gate.float()).to(round_dtype).float() * up.float())


def test_broadcasts_like_a_product() -> None:
    """A sigmoid output gate has one value a head; dtypes promote as in torch.mul."""
    gate, up = torch.randn(2, 3, 1).bfloat16(), torch.randn(2, 3, 8)
    actual = check_op(glu, gate, up, activation="sigmoid")
    assert actual.dtype == torch.float32
    assert torch.allclose(actual, torch.sigmoid(gate.float()) * up)
    assert check_op(glu, torch.randn(8), torch.randn(4, 8)).shape == (4, 8)
    assert check_op(glu, torch.randn(4, 1), torch.randn(1, 8)).shape == (4, 8)


def test_keeps_the_order_of_the_gate() -> None:
    gate, up = torch.randn(4, 8).t(), torch.randn(8, 4)
    assert check_op(glu, gate, up).stride() == (1, 8)
    assert check_op(glu, torch.randn(2, 8, 6)[:, ::2], torch.randn(2, 4, 6)).is_contiguous()


def test_identity_does_not_alias() -> None:
    gate, up = torch.randn(4), torch.ones(4)
    kept = gate.clone()
    glu(gate, up, activation="identity").zero_()
    assert torch.equal(gate, kept)


def test_traced_with_symbols() -> None:
    check_traceable(glu, lambda g, u: glu(g, u), [torch.randn(2, 6), torch.randn(2, 6)], [torch.randn(5, 4), torch.randn(5, 4)])
    check_traceable(glu, lambda m: glu(m, None, layout="interleaved"), [torch.randn(2, 6)], [torch.randn(5, 8)])


X = torch.randn(2, 7)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: glu(X, X.int()), TypeError, "up must be floating point"),
        (lambda: glu(X, X, out_dtype=torch.int32), TypeError, "out_dtype"),
        (lambda: glu(X, X, round_dtype=torch.int32), TypeError, "round_dtype"),
        (lambda: glu(X, X, activation="mish"), ValueError, "activation must be one of 'silu'"),
        (lambda: glu(X, None, layout="quarters"), ValueError, "'halves'"),
        (lambda: glu(X, None), ValueError, "even last dimension"),
        (lambda: glu(torch.tensor(1.0), None), ValueError, "at least 1 dimension"),
        (lambda: glu(X, X, activation="gelu", alpha=2.0), ValueError, "alpha belongs to silu"),
        (lambda: glu(X, torch.randn(2, 5)), ValueError, "do not broadcast"),
    ],
)
def test_wrong_calls(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(error, match=match):
        call()
