"""MLA before the attention on Ascend: what becomes npu_mla_prolog_v3, with the model's caches, and what is left to its parts and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npu_fusion
from npu_fusion import FusionConfig, FusionReport, UnsupportedInputError
from npu_fusion.weight_storage import store_inputs_first
from tests.patterns.mla_models import (
    DEEPSEEK,
    Absorbed,
    Rotate,
    Sizes,
    Write,
    angles,
    index_copied,
    paged,
    rotate_half,
    rotate_neighbours,
    rotate_pairs_to_halves,
)
from tests.patterns.support import fused_within_contract

PROLOG = "npu.npu_mla_prolog_v3"
BLOCKS, PAGE, LENGTH = 2, 128, 64


def model_of(sizes: Sizes, rotate: Rotate, *, stored: bool = True, **options: Any) -> Absorbed:
    torch.manual_seed(0)
    model = Absorbed(sizes, rotate, torch.bfloat16, **options)
    if stored:
        store_inputs_first([model.wq_a, model.wq_b, model.wkv_a])
    return model


def inputs_of(model: Absorbed, batch: int, tokens: int) -> tuple[Tensor, ...]:
    s = model.sizes
    x = torch.randn(batch, tokens, s.hidden).bfloat16()
    inputs = (x, *angles(batch, tokens, s.rope, torch.bfloat16))
    if model.write is None:
        return inputs
    if model.write is paged:
        positions, shape = torch.randperm(BLOCKS * PAGE)[: batch * tokens], (BLOCKS, PAGE)
    else:
        positions, shape = torch.arange(5, 5 + tokens), (batch, LENGTH)
    return *inputs, positions, *(torch.randn(*shape, size).bfloat16() for size in (s.latent, s.rope))


def run(model: Absorbed, batch: int, tokens: int, **options: Any) -> FusionReport:
    config = FusionConfig(target="ascend910b", emulate=True, **options)
    return fused_within_contract(model, *inputs_of(model, batch, tokens), config=config)


def explained(model: Absorbed, **options: Any) -> FusionReport:
    return npu_fusion.explain(model, *inputs_of(model, 2, 1), config=FusionConfig(target="ascend910b", emulate=True, **options))


def calls(report: FusionReport, name: str) -> list[torch.fx.Node]:
    return [node for node in report.graph("lowered").graph.nodes if str(node.target) == f"npu.{name}.default"]


def lowered_to(report: FusionReport, idiom: str) -> set[str | None]:
    return {site.lowered_to for site in report.sites if site.idiom == idiom}


@pytest.mark.parametrize(
    ("write", "step", "heads", "int8"),
    [(paged, (2, 3), 2, False), (paged, (2, 1), 1, True), (index_copied, (2, 1), 4, True)],
    ids=["paged-prefill-bf16", "paged-decode-w8a8", "static-decode-w8a8"],
)
def test_one_launch_writes_the_caches_of_the_model(write: Write, step: tuple[int, int], heads: int, int8: bool) -> None:
    model = model_of(dataclasses.replace(DEEPSEEK, heads=heads), rotate_pairs_to_halves, int8=int8, write=write)
    report = run(model, *step)
    assert [lowered_to(report, idiom) for idiom in ("mla", "rms_norm", "rope", "kv_update")] == [{PROLOG}] * 4
    [call] = calls(report, "npu_mla_prolog_v3")
    assert call.kwargs.get("weight_quant_mode", 0) == (2 if int8 else 0)
    assert not calls(report, "npu_mla_prolog_v3_functional")


def test_without_caches_it_has_pages_of_its_own() -> None:
    """Neighbours in and out: the op's halves are put in pairs again, for the queries and for what would be cached."""
    report = run(model_of(DEEPSEEK, rotate_neighbours, heads_first=True), 2, 1)
    assert lowered_to(report, "mla") == {PROLOG}
    assert calls(report, "npu_mla_prolog_v3_functional")


def test_weights_may_be_swapped() -> None:
    """What is written to the parameters, whatever way, is what the next call reads."""
    model = model_of(DEEPSEEK, rotate_pairs_to_halves)
    inputs = inputs_of(model, 2, 1)
    compiled = torch.compile(model, backend="npu_fusion", options={"target": "ascend910b", "emulate": True})
    with torch.no_grad():
        before = compiled(*inputs)
        model.wq_b.weight.data.neg_()
        model.wkv_a.load_state_dict({"weight": -model.wkv_a.weight.detach().clone()})
        after = compiled(*inputs)
    assert "mla_preprocess" in npu_fusion.report(compiled).ops
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, -b, rtol=2e-2, atol=2e-2)


def test_exact_rounding_leaves_the_parts() -> None:
    report = explained(model_of(DEEPSEEK, rotate_pairs_to_halves, int8=True), rounding="exact")
    assert not report.ops["mla_preprocess"]


@pytest.mark.parametrize(
    ("sizes", "rotate", "stored"),
    [(Sizes(), rotate_pairs_to_halves, True), (DEEPSEEK, rotate_half, True), (DEEPSEEK, rotate_pairs_to_halves, False)],
    ids=["sizes", "halves", "stored as linears are"],
)
def test_what_does_not_fit_is_left_to_its_parts(sizes: Sizes, rotate: Rotate, stored: bool) -> None:
    report = explained(model_of(sizes, rotate, stored=stored))
    assert not report.ops["mla_preprocess"]
    assert lowered_to(report, "rms_norm") == {"npu.npu_rms_norm"}


# -------------------------------------------------------------------- how weights are stored


def test_a_weight_is_stored_with_its_inputs_first() -> None:
    layer = nn.Linear(8, 6)
    before = layer.weight.detach().clone()
    parameter = layer.weight
    store_inputs_first([layer, layer.weight])
    assert layer.weight is parameter
    assert layer.weight.stride() == (1, 6)
    assert torch.equal(layer.weight, before)


def test_a_weight_whose_memory_others_share_is_not_stored_anew() -> None:
    layer = nn.Linear(8, 6)
    other = layer.weight.detach()
    with pytest.raises(UnsupportedInputError, match="another tensor refers"):
        store_inputs_first([layer])
    assert other.data_ptr() == layer.weight.data_ptr()


def test_a_vector_is_no_weight() -> None:
    with pytest.raises(UnsupportedInputError, match="no matrix"):
        store_inputs_first([nn.LayerNorm(4)])
