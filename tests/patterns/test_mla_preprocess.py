"""MLA before the attention: DeepSeek's absorbed code in its spellings becomes one op, look-alikes do not, caches get what they should."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion import FusionReport
from tests.patterns.mla_models import (
    Absorbed,
    Attending,
    Int8Linear,
    Sizes,
    angles,
    index_copied,
    rotate_half,
    rotate_neighbours,
    rotate_pairs,
    rotate_pairs_to_halves,
)
from tests.patterns.support import fused, fused_within_contract

ROTATIONS = {"half": rotate_half, "mla": rotate_pairs_to_halves, "complex": rotate_pairs, "neighbours": rotate_neighbours}
LAYOUTS = {"half": "half", "mla": "mla", "complex": "interleaved", "neighbours": "interleaved"}
PREFILL, DECODE, ONE = (2, 3), (2, 1), (1, 1)
Step = tuple[int, int]


def run(model: Absorbed, step: Step, *caches: Tensor, sizes: Sizes = Sizes(), dynamic: bool = False, seed: int = 0) -> FusionReport:  # noqa: B008
    torch.manual_seed(seed)
    dtype = model.kv_norm.weight.dtype
    x = torch.randn(*step, sizes.hidden).to(dtype)
    return fused_within_contract(model, x, *angles(*step, sizes.rope, dtype), *caches, dynamic=dynamic)


def arguments(report: FusionReport) -> dict[str, Any]:
    [call] = [node for node in report.graph("fused").graph.nodes if str(node.target) == "npu_fusion.mla_preprocess.default"]
    return dict(call.kwargs)


@pytest.mark.parametrize(
    ("rotation", "step", "int8"),
    [
        ("half", PREFILL, False),
        ("half", DECODE, True),
        ("mla", PREFILL, True),
        ("mla", DECODE, False),
        ("complex", PREFILL, True),
        ("complex", DECODE, False),
        ("neighbours", PREFILL, False),
        ("neighbours", DECODE, True),
    ],
)
def test_the_whole_is_one_op(rotation: str, step: Step, int8: bool) -> None:
    heads_first = step is DECODE or rotation == "neighbours"
    report = run(Absorbed(Sizes(), ROTATIONS[rotation], torch.bfloat16, int8=int8, heads_first=heads_first), step)
    assert set(report.ops) <= {"mla_preprocess", "quantize"}
    assert report.ops["mla_preprocess"] == report.idioms["mla"] == 1
    assert (report.idioms["rms_norm"], report.idioms["rope"]) == (2, 2)
    assert (report.idioms["quantize"], report.idioms["dequantize"]) == ((2, 3) if int8 else (0, 0))
    assert arguments(report).get("layout", "half") == LAYOUTS[rotation]


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float16, False), (torch.float32, True)], ids=["fp16", "fp32-dynamic"])
def test_other_dtypes_and_symbolic_sizes(dtype: torch.dtype, dynamic: bool) -> None:
    assert run(Absorbed(Sizes(), rotate_half, dtype), PREFILL, dynamic=dynamic).ops["mla_preprocess"] == 1


@pytest.mark.parametrize(("heads", "step", "int8"), [(1, PREFILL, True), (1, ONE, False), (2, ONE, True), (4, ONE, False)])
def test_shards_of_the_heads(heads: int, step: Step, int8: bool) -> None:
    sizes = dataclasses.replace(Sizes(), heads=heads)
    assert run(Absorbed(sizes, rotate_half, torch.bfloat16, int8=int8), step, sizes=sizes).ops["mla_preprocess"] == 1


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "w8a8"])
def test_weights_that_are_swapped(int8: bool) -> None:
    """The op reads the parameters: new values, loaded or written through `.data`, are those of the next call."""
    model = Absorbed(Sizes(), rotate_half, torch.bfloat16, int8=int8)
    x, tables = torch.randn(*DECODE, Sizes().hidden).bfloat16(), angles(*DECODE, Sizes().rope, torch.bfloat16)
    compiled = torch.compile(model, backend="npu_fusion", fullgraph=True)
    other = Absorbed(Sizes(), rotate_half, torch.bfloat16, int8=int8)
    with torch.no_grad():
        compiled(x, *tables)
        model.load_state_dict(other.state_dict())
        model.wq_b.weight.data.copy_(-other.wq_b.weight)
        actual, expected = compiled(x, *tables), model(x, *tables)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)


# -------------------------------------------------------------------- with caches and attention


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "w8a8"])
def test_decode_against_a_static_cache(int8: bool) -> None:
    """The latent goes into a cache that is longer than what is filled; a mask hides the rest."""
    sizes, length = Sizes(), 16
    caches = (torch.randn(2, length, sizes.latent).bfloat16(), torch.randn(2, length, sizes.rope).bfloat16())
    model = Attending(sizes, rotate_pairs_to_halves, torch.bfloat16, int8=int8, write=index_copied)
    report = run(model, DECODE, torch.tensor([7]), *caches)
    assert (report.ops["mla_preprocess"], report.ops["mla_attention"]) == (1, 1)


def test_the_reason_of_what_is_left_to_the_parts() -> None:
    """Of a projection with a bias the whole is not taken; its parts are, and the report says why."""
    model = Attending(Sizes(), rotate_half, torch.bfloat16, write=index_copied)
    model.wq_b.bias = nn.Parameter(torch.randn(model.wq_b.weight.shape[0]).bfloat16())
    caches = (torch.randn(2, 16, Sizes().latent).bfloat16(), torch.randn(2, 16, Sizes().rope).bfloat16())
    report = run(model, DECODE, torch.tensor([7]), *caches)
    assert {"mla_attention", "rms_norm", "rotary"} <= set(report.ops)
    [missed] = [site for site in report.missed if site.idiom == "mla"]
    assert "projection" in str(missed.reason)


# -------------------------------------------------------------------- look-alikes


class OtherHalf(Absorbed):
    """Absorbs the channels that are rotated."""

    def split(self, q: Tensor) -> tuple[Tensor, Tensor]:
        rope, nope = q.split([self.sizes.rope, self.sizes.nope], dim=-1)
        return nope, rope


class TwoInputs(Absorbed):
    """Projects queries from something else than the latent."""

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x * 2


class OneStep(Absorbed):
    """Queries without a latent of their own: DeepSeek-V2-Lite."""

    def query(self, x: Tensor) -> Tensor:
        return self.wq_b(x[..., : self.sizes.q_lora])


class Shifted(Absorbed):
    """The latent is taken one channel further left than the keys allow."""

    def latent(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        return kv[..., : self.sizes.latent], kv[..., -self.sizes.rope - 2 : -2]


class Unrotated(Absorbed):
    """Keys are rotated by another table."""

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return sin, cos


@pytest.mark.parametrize("kind", [OtherHalf, TwoInputs, OneStep, Shifted, Unrotated])
def test_look_alikes_stay_in_parts(kind: Callable[..., Absorbed]) -> None:
    report = run(kind(Sizes(), rotate_half, torch.bfloat16), PREFILL)
    assert not report.ops["mla_preprocess"]
    assert report.ops["rms_norm"] >= 1


def test_static_scales_stay_in_parts() -> None:
    class Static(Int8Linear):
        def row_scale(self, rows: Tensor) -> Tensor:
            return torch.full((1, 1), 0.02)

    model = Absorbed(Sizes(), rotate_half, torch.bfloat16, int8=True)
    model.wq_b.__class__ = Static
    assert not run(model, PREFILL).ops["mla_preprocess"]


def test_a_latent_that_is_read_before_its_norm() -> None:
    """What somebody else reads stays computed, right or wrong for the cost."""

    class Read(Absorbed):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
            return *super().forward(x, cos, sin), self.wkv_a(x) + 1

    torch.manual_seed(0)
    model, x = Read(Sizes(), rotate_half, torch.bfloat16), torch.randn(*PREFILL, Sizes().hidden).bfloat16()
    inputs = (x, *angles(*PREFILL, Sizes().rope, torch.bfloat16))
    outputs, _ = fused(model, *inputs)
    with torch.no_grad():
        for actual, expected in zip(outputs, model(*inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
