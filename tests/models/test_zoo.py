"""The zoo's models build, its inputs are what they say, and its counts agree with counts made by hand from the models' code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion.numerics import relative_error
from tests.models import zoo
from tests.models.configs import EXPERTS, tiny_config
from tests.models.float64 import Float64Mode
from tests.models.sites import SiteCounter

# By hand from the modeling files, two layers each. A layer of llama has two norms, the first of which follows the embedding in layer 0;
# the last norm follows the sum of the last layer: 5 norms, 4 of them fed by a sum.
KNOWN = {
    "llama": {"rms_norm": 5, "residual_add": 4, "rope": 4, "glu": 2, "attention": 2},
    # and a norm each for queries and keys
    "qwen3": {"rms_norm": 9, "residual_add": 4, "rope": 4, "glu": 2, "attention": 2},
    # and norms on what attention and MLP return, before the sum
    "gemma3_text": {"rms_norm": 13, "residual_add": 4, "rope": 4, "glu": 2, "attention": 2},
    # norms on the latents of queries and of keys and values; a dense layer, then one with routed and with shared experts
    "deepseek_v3": {"rms_norm": 9, "residual_add": 4, "rope": 4, "glu": 3, "attention": 2}
    | {"mla_attention": 2, "router": 1, "experts": 1},
    # clamped gates written out as x * sigmoid(a x), times up + 1; softmax over scores and sinks
    "gpt_oss": {"rms_norm": 5, "residual_add": 4, "rope": 4, "glu": 2, "attention": 2, "router": 2, "experts": 2},
    # one norm a layer, and the scan's output gated
    "mamba": {"rms_norm": 3, "residual_add": 2, "glu": 2},
    # a delta-rule layer (gated norm, q and k normalised) and an attention layer (q and k norms, output gated); routed and shared experts
    "qwen3_next": {"rms_norm": 7, "gated_rms_norm": 1, "l2_norm": 2, "residual_add": 4, "rope": 2, "glu": 5, "attention": 1}
    | {"router": 2, "experts": 2},
    # LayerNorm, attention and MLP in parallel
    "cohere": {"layer_norm": 3, "rope": 4, "glu": 2, "attention": 2},
}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("model_type", KNOWN)
def test_executed_sites_agree_with_counts_by_hand(model_type: str, phase: str) -> None:
    model = zoo.build(model_type, torch.bfloat16, "eager")
    inputs = zoo.prefill_inputs(model, 2, 8) if phase == "prefill" else zoo.decode_inputs(model, 2, 8)
    assert zoo.executed_sites(model, inputs) == KNOWN[model_type]


def test_sdpa_and_eager_attention_count_the_same() -> None:
    models = [zoo.build("llama", attn_implementation=name) for name in ("sdpa", "eager")]
    sdpa, eager = (zoo.executed_sites(model, zoo.prefill_inputs(model, 1, 8)) for model in models)
    assert sdpa == eager == KNOWN["llama"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", zoo.architectures())
def test_every_architecture_builds(model_type: str) -> None:
    with torch.device("meta"):
        model = zoo.AutoModelForCausalLM.from_config(tiny_config(model_type))
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000


def test_the_zoo_covers_the_causal_models() -> None:
    names = zoo.architectures()
    assert len(names) >= 91
    assert {"llama", "qwen3", "gemma3_text", "deepseek_v3", "gpt_oss", "mamba"} <= set(names)
    assert "gemma3" not in names  # with its image tower; gemma3_text stands for it


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_routing_is_pinned(model_type: str) -> None:
    config = tiny_config(model_type)
    assert config.num_experts_per_tok == config.num_local_experts == EXPERTS


# A static cache, one with sliding layers, a recurrent state, both, a dynamic cache, and a state of the model's own kind.
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mamba", "qwen3_next", "inkling_text", "minimax"])
def test_decoding_a_token_equals_seeing_the_whole_sequence(model_type: str) -> None:
    model = zoo.build(model_type, attn_implementation="eager")
    past = 8
    step = zoo.run(model, zoo.decode_inputs(model, 2, past))[0]
    (whole,) = zoo.run(model, {"input_ids": zoo.prefill_inputs(model, 2, past + 1)["input_ids"]})
    assert step.shape[1] == 1
    torch.testing.assert_close(step[:, 0], whole[:, -1], rtol=1e-3, atol=1e-4)


def test_runs_leave_model_and_inputs_alone() -> None:
    model = zoo.build("gemma3_text")
    inputs = zoo.decode_inputs(model, 2, 8)
    before = copy.deepcopy([layer.keys for layer in inputs["past_key_values"].layers])
    first, after = zoo.run(model, inputs)
    zoo.run_float64(model, inputs)
    zoo.executed_sites(model, inputs)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(inputs["past_key_values"].layers, before, strict=True))
    assert next(model.parameters()).dtype is torch.float32
    again, after_again = zoo.run(model, inputs)
    assert torch.equal(first, again)
    assert torch.equal(after, after_again)


def test_the_step_after_a_pass_shows_what_it_wrote_to_the_cache() -> None:
    model = zoo.build("llama")

    def without_its_cache(model: nn.Module) -> Callable[..., Any]:
        return lambda past_key_values, **inputs: model(past_key_values=copy.deepcopy(past_key_values), **inputs)

    inputs = zoo.decode_inputs(model, 2, 8)
    right, wrong = zoo.run(model, inputs), zoo.run(model, inputs, wrap=without_its_cache)
    assert torch.equal(right[0], wrong[0])
    assert relative_error(wrong[1], right[1]) > 0.01


def test_weights_do_not_depend_on_the_dtype() -> None:
    exact, rounded = zoo.build("qwen3").state_dict(), zoo.build("qwen3", torch.bfloat16).state_dict()
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    assert not torch.equal(exact["model.norm.weight"], torch.ones_like(exact["model.norm.weight"]))


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_float64_runs_are_float64_throughout(model_type: str) -> None:
    model = zoo.build(model_type)
    inputs = zoo.decode_inputs(model, 2, 8)
    exact, after = zoo.run_float64(model, inputs)
    assert exact.dtype is after.dtype is torch.float64
    assert 1e-9 < relative_error(zoo.run(model, inputs)[0], exact) < 2e-6
    # A perturbation far below float32's resolution shows, so nothing was rounded to float32 on the way.
    nudged = copy.deepcopy(model).double()
    nudged.model.embed_tokens.weight.mul_(1 + 1e-12)  # type: ignore[union-attr, operator]
    assert 1e-14 < relative_error(zoo.run_float64(nudged, inputs)[0], exact) < 1e-10


def test_float64_mode_widens_casts_factories_and_keywords() -> None:
    x = torch.randn(3, dtype=torch.float64)
    with Float64Mode():
        made = [torch.ones(2), torch.zeros(2, dtype=torch.bfloat16)]
        results = [x.float(), x.to(torch.float32), torch.softmax(x, -1, dtype=torch.float32), *made]
    assert {result.dtype for result in results} == {torch.float64}
    assert torch.ones(1).dtype is torch.float32


class _Norm(nn.Module):
    """An RMSNorm; the counter knows norms by this name and by the one mean they take."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class _LookAlikes(nn.Module):
    """Near misses and doubles of every idiom."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other_norm = _Norm(), _Norm()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        silu_by_hand = x * torch.sigmoid(x)  # an activation, not a gate
        router = torch.softmax(x, -1) * y  # softmax that no matrix product takes
        scale = torch.sigmoid(y[:, :1]) * x  # one factor a row
        shifted = self.norm(x + 1.0)  # no sum of two tensors
        total = x + y
        return self.norm(total) + self.other_norm(total.view(4, 8)) + silu_by_hand * y + router + scale + shifted


def test_look_alikes_are_not_counted_and_doubles_once() -> None:
    model = _LookAlikes()
    with SiteCounter(model) as counter:
        model(torch.randn(4, 8), torch.randn(4, 8))
    assert counter.sites == {"rms_norm": 3, "residual_add": 1, "glu": 1}


def test_the_counter_leaves_no_hooks_behind() -> None:
    model = zoo.build("llama")
    inputs = zoo.prefill_inputs(model, 1, 4)
    first, second = zoo.executed_sites(model, inputs), zoo.executed_sites(model, inputs)
    assert first == second == KNOWN["llama"]
