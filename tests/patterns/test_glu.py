"""Gated activations: every spelling, dtype and shape that fuses; near misses that do not; numerics against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_fusion import FusionConfig, FusionReport
from tests.parameters import dtypes_and_shapes
from tests.patterns.support import fused, fused_within_contract

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HIDDEN, INNER = 16, 24


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def new_gelu_of_pi(x: Tensor) -> Tensor:
    """As transformers writes it: with dynamic=True Dynamo takes `math.pi` for a number that may change."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def fast_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "silu": (F.silu, "silu"),
    "silu by hand": (lambda x: x * torch.sigmoid(x), "silu"),
    "silu by exp": (lambda x: x / (1 + torch.exp(-x)), "silu"),
    "silu, sigmoid in float32": (lambda x: x * torch.sigmoid(x.float()).to(x.dtype), "silu"),
    "silu in float32": (lambda x: F.silu(x.float()).to(x.dtype), "silu"),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu by erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
    "gelu by erf, halved last": (lambda x: (x * (1.0 + torch.erf(x * 0.7071067811865476))) * 0.5, "gelu"),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    "new gelu": (new_gelu, "gelu_tanh"),
    "new gelu of pi": (new_gelu_of_pi, "gelu_tanh"),
    "fast gelu": (fast_gelu, "gelu_tanh"),
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "tanh": (torch.tanh, "tanh"),
    "relu": (F.relu, "relu"),
    "relu by clamp": (lambda x: x.clamp(min=0), "relu"),
    "relu squared": (lambda x: F.relu(x) ** 2, "relu2"),
    "relu times relu": (lambda x: F.relu(x) * F.relu(x), "relu2"),
}


class Unit(nn.Module):
    """A gated unit on two projections of its input, or on one merged one."""

    def __init__(self, unit: Callable[..., Any], merged: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.unit = unit
        sizes = [2 * INNER] if merged else [INNER, INNER]
        self.projections = nn.ModuleList(nn.Linear(HIDDEN, size, bias=bias) for size in sizes)

    def forward(self, x: Tensor) -> Any:
        return self.unit(*(projection(x) for projection in self.projections))


class Limited(nn.Module):
    """The unit of gpt-oss, its constants attributes of a module: dynamic=True keeps them symbolic."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, Tensor]], limit: float = 0.7, alpha: float = 1.702) -> None:
        super().__init__()
        self.split, self.limit, self.alpha = split, limit, alpha
        self.projection = nn.Linear(HIDDEN, 2 * INNER)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.split(self.projection(x))
        gate = gate.clamp(min=None, max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


class LimitedSilu(nn.Module):
    """The unit of DeepSeek-V4."""

    def __init__(self, limit: float = 0.7) -> None:
        super().__init__()
        self.limit = limit
        self.gate, self.up = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x).clamp(max=self.limit)) * self.up(x).clamp(min=-self.limit, max=self.limit)


def make(module: nn.Module, dtype: torch.dtype, shape: tuple[int, ...] = (2, 5, HIDDEN)) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.to(dtype), torch.randn(shape, dtype=dtype)


def call_of(report: FusionReport) -> Any:
    """The one glu call of the only graph."""
    calls = [node for node in report.graph("fused").graph.nodes if node.target is torch.ops.npu_fusion.glu.default]
    assert len(calls) == 1
    return calls[0]


def is_merged(report: FusionReport) -> bool:
    return call_of(report).args[1] is None


# -------------------------------------------------------------------- positives


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    activation, known_as = ACTIVATIONS[name]
    report = fused_within_contract(*make(Unit(lambda gate, up: activation(gate) * up), dtype), dynamic=dynamic)
    assert report.idioms["glu"] == 1
    assert not report.missed
    call = call_of(report)
    assert call.kwargs["activation"] == known_as
    assert call.kwargs.get("alpha", 1.0) == (1.702 if name == "quick gelu" else 1.0)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "unit",
    [
        lambda gate, up: up * F.silu(gate),
        lambda gate, up: (F.silu(gate.float()) * up.float()).to(gate.dtype),
        lambda gate, up: F.silu(gate.float()).to(up.dtype) * up,
        lambda gate, up: up * gate * torch.sigmoid(gate),
        lambda gate, up: up * torch.sigmoid(gate) * gate,
        lambda gate, up: up * gate / (1 + torch.exp(-gate)),
        lambda gate, up: torch.mul(F.silu(gate.clone()), F.dropout(up, 0.1, training=False)),
    ],
    ids=["up first", "all in float32", "activation in float32", "silu spread", "silu spread otherwise", "silu by exp spread", "copies"],
)
def test_every_product(unit: Callable[..., Tensor], dynamic: bool) -> None:
    report = fused_within_contract(*make(Unit(unit, bias=True), torch.bfloat16), dynamic=dynamic)
    assert report.idioms["glu"] == 1
    assert not report.missed
    assert call_of(report).kwargs["activation"] == "silu"


@pytest.mark.parametrize("shape", [(5, HIDDEN), (1, 1, HIDDEN), (2, 5, HIDDEN), (2, 3, 5, HIDDEN)], ids=str)
def test_every_rank(shape: tuple[int, ...]) -> None:
    report = fused_within_contract(*make(Unit(lambda gate, up: F.silu(gate) * up), torch.bfloat16, shape))
    assert report.idioms["glu"] == 1


def split_halves(x: Tensor) -> Any:
    return x.split([INNER, INNER], dim=-1)


MERGED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "chunk": (lambda x: x.chunk(2, dim=-1), "halves"),
    "split": (split_halves, "halves"),
    "slices": (lambda x: (x[..., :INNER], x[..., INNER:]), "halves"),
    "narrow": (lambda x: (x.narrow(-1, 0, INNER), x.narrow(-1, INNER, INNER)), "halves"),
    "unbind": (lambda x: x.unflatten(-1, (2, INNER)).unbind(-2), "halves"),
    "chunk, up first": (lambda x: x.chunk(2, dim=-1)[::-1], "swapped"),
    "slices, up first": (lambda x: (x[..., INNER:], x[..., :INNER]), "swapped"),
    "strided": (lambda x: (x[..., ::2], x[..., 1::2]), "interleaved"),
    "unbind pairs": (lambda x: x.unflatten(-1, (INNER, 2)).unbind(-1), "interleaved"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MERGED)
def test_one_merged_projection(name: str, dynamic: bool) -> None:
    split, layout = MERGED[name]

    def unit(merged: Tensor) -> Any:
        gate, up = split(merged)
        return F.silu(gate) * up

    report = fused_within_contract(*make(Unit(unit, merged=True), torch.bfloat16), dynamic=dynamic)
    assert report.idioms["glu"] == 1
    assert is_merged(report)
    assert call_of(report).kwargs["layout"] == layout


@dtypes_and_shapes(DTYPES)
@pytest.mark.parametrize("name", ["strided", "chunk", "chunk, up first"])
def test_unit_of_gpt_oss(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    split, layout = MERGED[name]
    report = fused_within_contract(*make(Limited(split), dtype), dynamic=dynamic)
    assert report.idioms["glu"] == 1
    assert is_merged(report)
    call = call_of(report)
    assert call.kwargs["layout"] == layout
    assert {"gate_limit", "up_limit", "up_offset", "alpha"} <= call.kwargs.keys()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_unit_of_deepseek_v4(dynamic: bool) -> None:
    report = fused_within_contract(*make(LimitedSilu(), torch.bfloat16), dynamic=dynamic)
    assert report.idioms["glu"] == 1
    assert {"gate_limit", "up_limit"} <= call_of(report).kwargs.keys()


def test_two_limits_share_a_dynamic_graph() -> None:
    """dynamic=True compiles modules that differ in a float into one graph: the number must come from the module that runs."""
    modules = [make(LimitedSilu(limit), torch.float32) for limit in (0.3, 0.9)]
    compiled = [torch.compile(module, backend="npu_fusion", dynamic=True) for module, _ in modules]
    with torch.no_grad():
        for (module, x), run in zip(modules, compiled, strict=True):
            torch.testing.assert_close(run(x), module(x))


def test_output_gate_of_attention() -> None:
    """qwen3_next: the heads' outputs times the sigmoid of a part of the query projection."""

    def gated(x: Tensor, attended: Tensor) -> Tensor:
        gate = x.view(2, 5, 4, 12).chunk(2, dim=-1)[1].reshape(2, 5, 24)
        return attended.transpose(1, 2).reshape(2, 5, 24) * torch.sigmoid(gate)

    report = fused_within_contract(gated, torch.randn(2, 5, 48), torch.randn(2, 4, 5, 6))
    assert report.idioms["glu"] == 1


def test_activation_that_others_use_stays_computed() -> None:
    def unit(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        activated = F.silu(gate)
        return activated * up, activated.sum(-1)

    fused_within_contract(*make(Unit(unit), torch.float32))


def test_non_contiguous_gate_and_up() -> None:
    gate, up = torch.randn(3, 8, 5).transpose(1, 2), torch.randn(5, 3, 8).permute(1, 0, 2)
    report = fused_within_contract(lambda gate, up: F.silu(gate) * up, gate, up)
    assert report.idioms["glu"] == 1


# -------------------------------------------------------------------- near misses


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape), torch.randn(shape)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: F.silu(x) * x,
        lambda x, y: x * torch.sigmoid(1.702 * x),
        lambda x, y: F.gelu(x) * torch.sigmoid(x),
        lambda x, y: torch.sigmoid(x[..., :1]) * y,
        lambda x, y: F.silu(x) * y.mean(),
        lambda x, y: F.silu(x) * 0.5,
        lambda x, y: F.silu(x) + y,
        lambda x, y: x * y,
        lambda x, y: torch.tanh(x / 30.0) * 30.0,
        lambda x, y: (torch.sigmoid(x) * y[..., :1]).sum(-1),
    ],
    ids=["own input", "quick gelu", "two of one", "a gate a token", "scalar", "number", "sum", "no activation", "softcap", "scores"],
)
def test_not_a_gated_unit(function: Callable[..., Tensor]) -> None:
    """Neither fused nor reported as missed."""
    report = fused_within_contract(function, *pair(2, 5, 8))
    assert not report.idioms["glu"]
    assert not [site for site in report.missed if site.idiom == "glu"]


@pytest.mark.parametrize(
    "split",
    [
        lambda x: (x[..., :16], x[..., 8:]),
        lambda x: (x[..., :8], x[..., 16:]),
        lambda x: (x[..., :8], x[..., 8:16]),
        lambda x: (x[..., :12], x[..., :12].flip(-1)),
        lambda x: (x[..., 1::2], x[..., ::2]),
        lambda x: (x[:, :2].transpose(1, 2), x[:, 2:].transpose(1, 2)),
    ],
    ids=["overlapping", "gap", "two of three", "one half twice", "interleaved, up first", "halves of another dimension"],
)
def test_slices_that_are_no_halves(split: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Still a gated unit, of the slices as two tensors: the merged form would read the wrong elements."""

    def unit(x: Tensor) -> Tensor:
        gate, up = split(x)
        return F.silu(gate) * up

    report = fused_within_contract(unit, torch.randn(2, 4, 24))
    assert report.idioms["glu"] == 1
    assert not is_merged(report)


def test_halves_of_two_tensors() -> None:
    report = fused_within_contract(lambda x, y: F.silu(x[..., :4]) * y[..., 4:], *pair(2, 5, 8))
    assert report.idioms["glu"] == 1
    assert not is_merged(report)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.7), (-0.7, 0.5), (0.1, 0.7)])
def test_clamp_of_up_that_is_not_symmetric_stays_outside(low: float, high: float) -> None:
    report = fused_within_contract(lambda x, y: F.silu(x) * y.clamp(low, high), *pair(2, 5, 8))
    assert report.idioms["glu"] == 1
    assert "up_limit" not in call_of(report).kwargs


@pytest.mark.parametrize("clamp", [lambda x: x.clamp(min=-0.3), lambda x: x.clamp(-0.4, 0.4)], ids=["min", "both"])
def test_other_clamp_of_the_gate_stays_outside(clamp: Callable[[Tensor], Tensor]) -> None:
    report = fused_within_contract(lambda x, y: F.silu(clamp(x)) * y, *pair(2, 5, 8))
    assert report.idioms["glu"] == 1
    assert "gate_limit" not in call_of(report).kwargs


@pytest.mark.parametrize(
    "look_alike",
    [
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.05 * x**3))),
        lambda x: 0.5 * x * (1.0 + torch.erf(x)),
        lambda x: 0.6 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
        lambda x: 0.5 * x * (1.5 + torch.erf(x / math.sqrt(2.0))),
        lambda x: 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    ],
    ids=["constant", "cubic term", "no root of two", "not halved", "not one", "laplace"],
)
def test_look_alikes_of_gelu(look_alike: Callable[[Tensor], Tensor]) -> None:
    report = fused_within_contract(lambda x, y: look_alike(x) * y, *pair(2, 5, 8))
    calls = [node for node in report.graph("fused").graph.nodes if node.target is torch.ops.npu_fusion.glu.default]
    assert not any(str(call.kwargs["activation"]).startswith("gelu") for call in calls)


def test_unit_in_float64_stays_in_float64() -> None:
    """The fused op computes in the type of its widest input: one of them keeps its cast."""
    report = fused_within_contract(lambda x, y: (F.silu(x.double()) * y.double()).float(), *pair(2, 5, 8))
    assert report.idioms["glu"] == 1
    assert any(arg.meta["val"].dtype is torch.float64 for arg in call_of(report).all_input_nodes)


def test_float64_throughout() -> None:
    gate, up = (tensor.double() for tensor in pair(2, 5, 8))
    assert fused_within_contract(lambda x, y: F.silu(x) * y, gate, up).idioms["glu"] == 1


# -------------------------------------------------------------------- reasons and rounding


@pytest.mark.parametrize("activation", [F.mish, F.softplus, F.elu, F.hardswish, F.leaky_relu], ids=lambda f: f.__name__)
def test_activation_without_a_fused_op_is_named(activation: Callable[[Tensor], Tensor]) -> None:
    report = fused_within_contract(lambda x, y: activation(x) * y, *pair(2, 5, 8))
    [miss] = report.missed
    assert miss.idiom == "glu"
    assert activation.__name__ in str(miss.reason)


def test_gelu_with_a_constant_that_the_caller_passes() -> None:
    def unit(gate: Tensor, up: Tensor, root: float) -> Tensor:
        return 0.5 * gate * (1.0 + torch.tanh(root * (gate + 0.044715 * gate**3))) * up

    report = fused_within_contract(unit, *pair(2, 5, 8), 0.7978845608)
    assert call_of(report).kwargs["activation"] == "gelu_tanh"
    report = fused_within_contract(unit, *pair(2, 5, 8), 0.7978845608, dynamic=True)
    assert not report.idioms["glu"]
    [miss] = report.missed
    assert "not known at compile time" in str(miss.reason)


def test_exact_rounding_needs_float32_up_to_the_end() -> None:
    exact = FusionConfig(rounding="exact")
    gate, up = (tensor.bfloat16() for tensor in pair(2, 5, 8))
    _, rounded = fused(lambda x, y: F.silu(x) * y, gate, up, config=exact)
    assert not rounded.idioms["glu"]
    assert "rounding='exact'" in str(rounded.missed[0].reason)
    _, wide = fused(lambda x, y: (F.silu(x.float()) * y.float()).to(x.dtype), gate, up, config=exact)
    assert wide.idioms["glu"] == 1
    _, float32 = fused(lambda x, y: F.silu(x) * y, gate.float(), up.float(), config=exact)
    assert float32.idioms["glu"] == 1


@pytest.mark.parametrize(
    ("unit", "rounded"),
    [
        (lambda x, y: F.silu(x) * y, torch.bfloat16),
        (lambda x, y: y * F.gelu(x), torch.bfloat16),
        (lambda x, y: F.silu(x.float()).to(x.dtype) * y, torch.bfloat16),
        (lambda x, y: (F.silu(x).float() * y.float()).to(x.dtype), torch.bfloat16),
        (lambda x, y: x * torch.sigmoid(1.702 * x) * y, torch.bfloat16),
        (lambda x, y: (y.clamp(-0.5, 0.5) + 1) * F.silu(x), torch.bfloat16),
        (lambda x, y: F.silu(x.float()) * y, None),
        (lambda x, y: (F.silu(x.float()) * y.float()).to(x.dtype), None),
        (lambda x, y: x * y * torch.sigmoid(x), None),
    ],
    ids=["silu", "up first", "cast to 16 bits", "cast from 16 bits", "slope", "limits", "activation kept", "all kept", "spread"],
)
def test_what_the_activated_gate_is_rounded_to(unit: Callable[..., Tensor], rounded: torch.dtype | None) -> None:
    report = fused_within_contract(unit, *(tensor.bfloat16() for tensor in pair(2, 5, 8)))
    assert call_of(report).kwargs.get("round_dtype") == rounded


def test_float32_is_not_rounded() -> None:
    report = fused_within_contract(lambda x, y: F.silu(x) * y, *pair(2, 5, 8))
    assert "round_dtype" not in call_of(report).kwargs


def test_site_names_line_and_module() -> None:
    module, x = make(Unit(lambda gate, up: F.silu(gate) * up), torch.float32)
    _, report = fused(module, x)
    [site] = report.sites
    assert site.idiom == "glu"
    assert site.op == "glu"
    assert site.source is not None
    assert "test_glu.py" in site.source


def test_halves_of_a_symbolic_size() -> None:
    """`chunk` of a symbolic size guards that it is even; nothing else says that the halves are equal."""

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    outputs, report = fused(gated, torch.randn(2, 8, 64), dynamic=True)
    assert report.idioms["glu"] == 1
    assert outputs.shape == (2, 8, 32)
