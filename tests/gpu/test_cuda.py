"""The whole way on a CUDA device: executors, caches, transformers' own `generate`. Run with `make gpu-test`."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

import npu_fusion
from npu_fusion.numerics import assert_within_contract

pytestmark = pytest.mark.gpu

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
MODELS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}


def build(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A bf16 model on the device and its float64 copy."""
    torch.manual_seed(0)
    model_class, config_class = MODELS[name]
    model = model_class(config_class(**SIZES)).to("cuda", torch.bfloat16).eval()
    wide = model_class(config_class(**SIZES)).to("cuda", torch.float64).eval()
    wide.load_state_dict(model.state_dict())
    return model, wide


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("executor", ["eager", "graph", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_prefill_is_within_the_contract(name: str, executor: str, dynamic: bool):
    model, wide = build(name)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 32), device="cuda")
    compiled = torch.compile(model, backend="npu_fusion", dynamic=dynamic, options={"executor": executor})
    with torch.no_grad():
        for _ in range(3):
            fused = compiled(ids, use_cache=False).logits
        eager, reference = model(ids, use_cache=False).logits, wide(ids, use_cache=False).logits
    assert_within_contract(fused, eager, reference, torch.bfloat16)
    report = npu_fusion.report(compiled)
    norms = 9 if name == "qwen3" else 5
    report.expect(rms_norm=norms, rope=4, glu=2, attention=2, residual_add=4)
    assert report.effective_config.target == "cuda"


@pytest.mark.parametrize("executor", ["eager", "graph", "inductor"])
def test_static_cache_decode_follows_eager(executor: str):
    model, wide = build("qwen3")
    ids = torch.randint(0, SIZES["vocab_size"], (2, 16), device="cuda")
    compiled = torch.compile(model, backend="npu_fusion", dynamic=False, options={"executor": executor})
    caches = {m: StaticCache(config=m.config, max_cache_len=64) for m in (model, wide)}
    fused_cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        for m, cache in (*caches.items(), (model, fused_cache)):
            m(ids, past_key_values=cache)
        for step in range(6):
            token = torch.randint(0, SIZES["vocab_size"], (2, 1), device="cuda")
            fused = compiled(token, past_key_values=fused_cache).logits
            eager, reference = (m(token, past_key_values=cache).logits for m, cache in caches.items())
            assert_within_contract(fused, eager, reference, torch.bfloat16, f"step {step}")


def test_generate_compiles_through_transformers():
    model, _ = build("llama")
    ids = torch.randint(0, SIZES["vocab_size"], (1, 12), device="cuda")
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static", disable_compile=True)
    config = CompileConfig(backend="npu_fusion", mode=None, options={"executor": "eager"}, dynamic=False, fullgraph=False)
    fused = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static", compile_config=config)
    report = npu_fusion.report(model.get_compiled_call(config))
    report.expect(rms_norm=5, rope=4, glu=2, attention=2)
    assert fused.shape == plain.shape
    assert (fused == plain).float().mean() > 0.7, "greedy tokens may part at a near tie, not from the start"


def test_dynamic_cache_grows():
    model, wide = build("llama")
    compiled = torch.compile(model, backend="npu_fusion", dynamic=True)
    caches = {m: DynamicCache(config=m.config) for m in (model, wide)}
    fused_cache = DynamicCache(config=model.config)
    ids = torch.randint(0, SIZES["vocab_size"], (1, 8), device="cuda")
    with torch.no_grad():
        for m, cache in (*caches.items(), (model, fused_cache)):
            m(ids, past_key_values=cache)
        for step in range(4):
            token = torch.randint(0, SIZES["vocab_size"], (1, 1), device="cuda")
            fused = compiled(token, past_key_values=fused_cache).logits
            eager, reference = (m(token, past_key_values=cache).logits for m, cache in caches.items())
            assert_within_contract(fused, eager, reference, torch.bfloat16, f"step {step}")


def test_inductor_users_get_the_same_rewriting():
    model, wide = build("llama")
    ids = torch.randint(0, SIZES["vocab_size"], (2, 32), device="cuda")
    compiled = torch.compile(model, backend="inductor", options=npu_fusion.inductor_options())
    with torch.no_grad():
        fused = compiled(ids, use_cache=False).logits
        eager, reference = model(ids, use_cache=False).logits, wide(ids, use_cache=False).logits
    assert_within_contract(fused, eager, reference, torch.bfloat16)
