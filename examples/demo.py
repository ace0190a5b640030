"""The main job, end to end: two unmodified transformers models, compiled with npu_fusion, checked against eager.

Each model has random weights in bfloat16, fills a static cache with a prompt (prefill) and then takes decode steps. The program prints what
was fused, and compares the logits of every step with eager's by their errors against a float64 copy of the model. It exits with an error
when an idiom was missed or the numbers stray.

    python examples/demo.py [--device cpu|cuda] [--steps 6]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedConfig, Qwen3Config, StaticCache

import npu_fusion
from npu_fusion.numerics import EAGER_FACTOR, error_bound, relative_error

LAYERS, BATCH, PROMPT, CACHE = 4, 2, 32, 128
SHAPE: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "initializer_range": 0.06,
}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A model and the idioms of one forward pass of it, counted by hand."""

    name: str
    config: PreTrainedConfig
    idioms: dict[str, int]


def cases() -> list[Case]:
    # Both families normalise queries and keys, and norm every layer's input and MLP input; every norm but the first follows a residual
    # sum. Gemma also norms what attention and MLP return.
    common = {"residual_add": 2 * LAYERS, "rope": 2 * LAYERS, "glu": LAYERS, "attention": LAYERS}
    gemma_layers = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    gemma = Gemma3TextConfig(**SHAPE, layer_types=gemma_layers, sliding_window=16, query_pre_attn_scalar=64)
    return [
        Case("Qwen3", Qwen3Config(**SHAPE), {"rms_norm": 4 * LAYERS + 1, **common}),
        Case("Gemma3", gemma, {"rms_norm": 6 * LAYERS + 1, **common}),
    ]


class Generation:
    """A model, eager or compiled, with a static cache of its own; each call feeds tokens and returns the logits of the last position."""

    def __init__(self, forward: Callable[..., Any], config: PreTrainedConfig) -> None:
        self.forward = forward
        self.cache = StaticCache(config=config, max_cache_len=CACHE)
        self.seconds: list[float] = []

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        start = time.perf_counter()
        logits: Tensor = self.forward(input_ids=tokens, past_key_values=self.cache, use_cache=True).logits[:, -1]
        if tokens.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        return logits


def build(config: PreTrainedConfig, device: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=DTYPE).to(device).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norm weights: off the ones and zeros they start with, or leaving one out would not show
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def check(what: str, fused: Tensor, eager: Tensor, exact: Tensor) -> float:
    """The fused error against float64; exits when it is beyond the numeric contract."""
    error, eager_error = relative_error(fused, exact), relative_error(eager, exact)
    allowed = max(EAGER_FACTOR * eager_error, error_bound(DTYPE))
    if not error <= allowed:
        raise SystemExit(f"FAILED: {what}: error {error:.2e} against float64, allowed {allowed:.2e}, eager has {eager_error:.2e}")
    return error


def demonstrate(case: Case, device: str, steps: int) -> None:
    model = build(case.config, device)
    print(f"\n== {case.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {DTYPE}, {device}", flush=True)
    compiled = torch.compile(model, backend="npu_fusion")
    fused, eager = Generation(compiled, case.config), Generation(model, case.config)
    exact = Generation(copy.deepcopy(model).double(), case.config)

    tokens = torch.randint(3, case.config.vocab_size, (BATCH, PROMPT), device=device)
    worst = 0.0
    for step in range(steps + 1):
        logits = eager(tokens)
        what = f"{case.name}, decode step {step}" if step else f"{case.name}, prefill of {PROMPT} tokens"
        worst = max(worst, check(what, fused(tokens), logits, exact(tokens)))
        tokens = logits.argmax(-1, keepdim=True)

    report = npu_fusion.report(compiled)
    print(report)
    report.expect(**{idiom: 2 * count for idiom, count in case.idioms.items()})  # prefill and decode are a graph each
    seconds = [f"{sorted(run.seconds[2:])[len(run.seconds[2:]) // 2] * 1e3:.1f} ms" for run in (fused, eager)]
    print(
        f"{case.name}: prefill of {BATCH}x{PROMPT} tokens and {steps} decode steps agree with eager (error against float64: {worst:.1e})."
    )
    print(f"Every idiom counted by hand is fused, in both graphs. A decode step takes {seconds[0]} fused, {seconds[1]} eager.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile two transformers models with npu_fusion and check them against eager.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=6, help="decode steps, at least 2 (the first one compiles)")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps takes 2 or more")
    print(f"Compiling plain transformers models with npu_fusion, torch {torch.__version__}", flush=True)
    for case in cases():
        demonstrate(case, arguments.device, arguments.steps)
    print("\nBoth models fused and checked.")


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        raise SystemExit(f"FAILED: {error}") from error
