"""Random compositions of idioms and of what only looks like them: fused equals unfused within the numeric contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule

import npu_fusion
from npu_fusion.numerics import assert_within_contract
from tests.graphs import aten_graph

CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
DETERMINISTIC = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=CHECKS)

Step = Callable[["Block", Tensor], Tensor]
STEPS: dict[str, Step] = {}


@dataclass(frozen=True)
class Block:
    """What the steps of a composition share: weights and tables, in the dtype of the run."""

    weights: tuple[Tensor, ...]  # vectors [H]
    matrices: tuple[Tensor, ...]  # [H, H]
    cos: Tensor  # [S, H / 2]
    sin: Tensor
    eps: float


def step(function: Step) -> Step:
    STEPS[function.__name__.strip("_")] = function
    return function


def up(x: Tensor) -> Tensor:
    """In float32, as models do; in float64 where the whole computation is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -------------------------------------------------------------------- idioms


@step
def rms_norm(b: Block, x: Tensor) -> Tensor:
    h = up(x)
    return b.weights[0] * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + b.eps)).to(x.dtype)


@step
def rms_norm_one_plus(b: Block, x: Tensor) -> Tensor:
    h = up(x)
    return (h / torch.sqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + b.eps) * (1.0 + up(b.weights[1]))).to(x.dtype)


@step
def rms_norm_without_weight(b: Block, x: Tensor) -> Tensor:
    h = up(x)
    return (h * (h.square().mean(-1, keepdim=True) + b.eps) ** -0.5).to(x.dtype)


@step
def functional_rms_norm(b: Block, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), b.weights[0], b.eps)


@step
def gated_rms_norm(b: Block, x: Tensor) -> Tensor:
    h = up(x)
    normed = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + b.eps)).to(x.dtype) * b.weights[0]
    return (up(normed) * F.silu(up(x @ b.matrices[0]))).to(x.dtype)


@step
def layer_norm(b: Block, x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), b.weights[0], b.weights[1], b.eps)


@step
def residual_rms_norm(b: Block, x: Tensor) -> Tensor:
    total = x + x @ b.matrices[0]
    return rms_norm(b, total) + total


@step
def gated_unit(b: Block, x: Tensor) -> Tensor:
    return F.silu(x @ b.matrices[0]) * (x @ b.matrices[1])


@step
def gated_unit_merged(b: Block, x: Tensor) -> Tensor:
    up_, gate = (x @ torch.cat(b.matrices[:2], 1)).chunk(2, -1)
    return up_ * F.gelu(gate, approximate="tanh")


@step
def rope_half(b: Block, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = torch.cat([b.cos, b.cos], -1), torch.cat([b.sin, b.sin], -1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@step
def rope_interleaved(b: Block, x: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * b.cos - odd * b.sin, odd * b.cos + even * b.sin], -1).flatten(-2)


@step
def attention(b: Block, x: Tensor) -> Tensor:
    q, k, v = ((x @ matrix).unflatten(-1, (2, -1)).transpose(1, 2) for matrix in b.matrices)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


@step
def attention_by_hand(b: Block, x: Tensor) -> Tensor:
    q, k, v = ((x @ matrix).unflatten(-1, (2, -1)).transpose(1, 2) for matrix in b.matrices)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (up(scores).softmax(-1).to(x.dtype) @ v).transpose(1, 2).flatten(-2)


# -------------------------------------------------------------------- look-alikes


@step
def l2_norm(b: Block, x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + b.eps)


@step
def centred_norm(b: Block, x: Tensor) -> Tensor:
    h = up(x) - up(x).mean(-1, keepdim=True)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + b.eps)).to(x.dtype) * b.weights[0]


@step
def norm_over_positions(b: Block, x: Tensor) -> Tensor:
    h = up(x)
    return (h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + b.eps)).to(x.dtype) * b.weights[0]


@step
def norm_of_half(b: Block, x: Tensor) -> Tensor:
    h = up(x)
    half = h[..., : h.shape[-1] // 2]
    return (h * torch.rsqrt(half.pow(2).mean(-1, keepdim=True) + b.eps)).to(x.dtype)


@step
def norm_of_another(b: Block, x: Tensor) -> Tensor:
    h, other = up(x), up(x @ b.matrices[0])
    return (h * torch.rsqrt(other.pow(2).mean(-1, keepdim=True) + b.eps)).to(x.dtype) * b.weights[0]


@step
def rope_with_the_sign_reversed(b: Block, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = torch.cat([b.cos, b.cos], -1), torch.cat([b.sin, b.sin], -1)
    return x * cos + torch.cat([x[..., half:], -x[..., :half]], -1) * sin


@step
def rope_that_does_not_rotate(b: Block, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = torch.cat([b.cos, b.cos], -1), torch.cat([b.sin, b.sin], -1)
    return x * cos + torch.cat([x[..., half:], x[..., :half]], -1) * sin


@step
def gate_of_its_own_activation(b: Block, x: Tensor) -> Tensor:
    gate = x @ b.matrices[0]
    return F.silu(gate) * torch.sigmoid(gate) * gate.tanh()


@step
def gate_over_positions(b: Block, x: Tensor) -> Tensor:
    return F.silu(x[:, :1]) * x


@step
def anti_causal_attention(b: Block, x: Tensor) -> Tensor:
    q, k, v = ((x @ matrix).unflatten(-1, (2, -1)).transpose(1, 2) for matrix in b.matrices)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu()
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2)


# -------------------------------------------------------------------- compositions


@dataclass(frozen=True)
class Composition:
    """Steps in a row. `kept`: whose results are returned beside the last one; `skips`: whose input is added to the result."""

    steps: tuple[str, ...]
    kept: frozenset[int]
    skips: frozenset[int]

    def __call__(self, x: Tensor, eps: float, *tensors: Tensor) -> list[Tensor]:
        block = Block(tensors[:2], tensors[2:5], tensors[5], tensors[6], eps)
        results = []
        for index, name in enumerate(self.steps):
            y = STEPS[name](block, x)
            x = x + y if index in self.skips else y
            if index in self.kept:
                results.append(x)
        return [*results, x]


@st.composite
def compositions(draw: st.DrawFn) -> Composition:
    steps = draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=3))
    places = st.frozensets(st.integers(0, len(steps) - 1))
    return Composition(tuple(steps), draw(places), draw(places))


@st.composite
def hidden_states(draw: st.DrawFn) -> Tensor:
    """[B, S, H] in one of several memory layouts; H is a multiple of 4, no two sizes are equal or 1."""
    batch, positions, hidden = draw(st.sampled_from([(2, 3, 8), (3, 5, 16), (2, 7, 12)]))
    layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    if layout == "transposed":
        return torch.randn(positions, batch, hidden).transpose(0, 1)
    if layout == "sliced":
        return torch.randn(batch, positions, 2 * hidden)[..., 1 : hidden + 1]
    if layout == "expanded":
        return torch.randn(1, positions, hidden).expand(batch, positions, hidden)
    return torch.randn(batch, positions, hidden)


def tensors_for(x: Tensor) -> list[Tensor]:
    hidden = x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[1]) + 1.0, 0.7 ** torch.arange(hidden // 2))
    weights = [torch.rand(hidden) + 0.5 for _ in range(2)]
    matrices = [torch.randn(hidden, hidden) / hidden**0.5 for _ in range(3)]
    return [*weights, *matrices, angles.cos(), angles.sin()]


def functional_graph(composition: Composition, eps: float, *inputs: Tensor, dynamic: bool = False) -> GraphModule:
    return aten_graph(functionalize(lambda *args: composition(args[0], eps, *args[1:])), *inputs, dynamic=dynamic)


@DETERMINISTIC
@given(
    composition=compositions(),
    x=hidden_states(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    rounding=st.sampled_from(["fp32_internal", "exact"]),
    dynamic=st.booleans(),
)
def test_compositions(composition: Composition, x: Tensor, dtype: torch.dtype, eps: float, rounding: str, dynamic: bool) -> None:
    tensors = [x, *tensors_for(x)]
    inputs = [tensor.to(dtype) for tensor in tensors]
    gm = functional_graph(composition, eps, *inputs, dynamic=dynamic)
    npu_fusion.fuse(gm, config=npu_fusion.FusionConfig(target="cpu", rounding=rounding))
    gm.graph.lint()
    assert not gm.meta["npu_fusion_record"].rule_errors
    exact_inputs = [tensor.double() for tensor in inputs]
    with torch.no_grad():
        fused, eager = gm(*inputs), composition(inputs[0], eps, *inputs[1:])
        exact = composition(exact_inputs[0], eps, *exact_inputs[1:])
    for actual, expected, reference in zip(fused, eager, exact, strict=True):
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())
        assert_within_contract(actual, expected, reference, dtype, str(composition))


NOT_HERE = {"functional_rms_norm", "layer_norm", "attention"}  # one op of torch, taken as such from the Dynamo graph
IDIOMS = [name for name in list(STEPS)[: list(STEPS).index("l2_norm")] if name not in NOT_HERE]


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_fuse_when_they_stand_alone(name: str) -> None:
    """The property above is not vacuous."""
    x = torch.randn(2, 3, 8)
    gm = functional_graph(Composition((name,), frozenset(), frozenset()), 1e-6, x, *tensors_for(x))
    npu_fusion.fuse(gm)
    assert any(site.fused for site in gm.meta["npu_fusion_record"].sites)
