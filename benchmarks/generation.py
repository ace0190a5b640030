"""Tokens a second of whole models on a GPU, random weights, every way of running them side by side in one run.

    tools/run benchmarks/generation.py                                              # both models, all phases, all ways: tens of minutes
    tools/run benchmarks/generation.py --model llama-1b --phase decode-1 --json out.json
    tools/run benchmarks/generation.py --way "npu_fusion graph" --way "inductor reduce-overhead"

Ways: `eager`; `eager graph` is the model's own eager step in a CUDA graph; `inductor M` is torch.compile in mode M; `npu_fusion E` is
`backend="npu_fusion"` with executor E. A decode step reads one token a sequence from a StaticCache of 1024 places, 512 of them filled;
prefill reads 1 x 4096 tokens without a cache. Times are medians of steps, timed on the device; the floor is what it takes to read every
weight once at the bandwidth that a copy reached in the same run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

CACHE, FILLED, PROMPT = 1024, 512, 4096
WARM_UP, STEPS = 8, 48
MODELS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
PHASES = ("decode-1", "decode-16", "prefill")
WAYS = (
    "eager",
    "eager graph",
    "inductor default",
    "inductor reduce-overhead",
    "inductor max-autotune",
    "npu_fusion graph",
    "npu_fusion inductor",
)
Step = Callable[[], Any]


def build(name: str) -> Any:
    """The model in bf16 on the GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(MODELS[name])
    config = AutoConfig.for_model(fields.pop("model_type"), max_position_embeddings=8192, **fields)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def compiled(model: Any, way: str) -> Any:
    """The model as a way of running it has it."""
    kind, _, option = way.partition(" ")
    torch.compiler.reset()
    if kind == "inductor":
        return torch.compile(model, dynamic=False, mode=None if option == "default" else option)
    if kind == "npu_fusion":
        return torch.compile(model, dynamic=False, backend="npu_fusion", options={"executor": option})
    return model


def step_of(model: Any, phase: str, way: str) -> Step:
    """One step of a phase, ready to be timed."""
    runner = compiled(model, way)
    if phase == "prefill":
        ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device="cuda")

        def step() -> Any:
            return runner(ids, use_cache=False).logits
    else:
        from transformers import StaticCache

        batch = int(phase.removeprefix("decode-"))
        cache = StaticCache(config=model.config, max_cache_len=CACHE)
        model(torch.randint(0, model.config.vocab_size, (batch, FILLED), device="cuda"), past_key_values=cache, logits_to_keep=1)
        token = torch.randint(0, model.config.vocab_size, (batch, 1), device="cuda")

        def step() -> Any:
            return runner(token, past_key_values=cache).logits

    return graphed(step) if way == "eager graph" else step


def graphed(step: Step) -> Step:
    """The step in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(step: Step) -> float:
    """The median time of a step on the device, host gaps included."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    for mark in marks[:-1]:
        mark.record()
        step()
    marks[-1].record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in itertools.pairwise(marks)))


def bytes_a_second() -> float:
    """What a copy of a gigabyte reads and writes a second."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) / 1e3)


def floor(model: Any, bandwidth: float) -> float:
    """Milliseconds to read every weight once; an embedding that is no output layer is only looked up."""
    seen = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    if not tied:
        seen.pop(model.get_input_embeddings().weight.data_ptr())
    return 1e3 * float(sum(parameter.numel() * parameter.element_size() for parameter in seen.values())) / bandwidth


def tokens_of(phase: str) -> int:
    return PROMPT if phase == "prefill" else int(phase.removeprefix("decode-"))


@torch.no_grad()
def measure(models: list[str], phases: list[str], ways: list[str]) -> list[dict[str, Any]]:
    """A row for each model, phase and way: milliseconds a step or why there are none."""
    rows = []
    bandwidth = bytes_a_second()
    for name in models:
        model = build(name)
        for phase in phases:
            for way in ways:
                row: dict[str, Any] = {"model": name, "phase": phase, "way": way, "floor_ms": floor(model, bandwidth)}
                try:
                    row["ms"] = milliseconds(step_of(model, phase, way))
                    row["tokens_a_second"] = tokens_of(phase) / row["ms"] * 1e3
                except Exception as error:  # one way that cannot run must not lose the others
                    row["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                rows.append(row)
                Console(stderr=True).print(json.dumps(row))
                gc.collect()
                torch.cuda.empty_cache()
        del model
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("model", "phase", "way", "ms a step", "tokens/s", "x floor", title=torch.cuda.get_device_name())
    for row in rows:
        times = f"{row['ms'] / row['floor_ms']:.2f}" if row["phase"] != "prefill" and "ms" in row else ""
        cells = (f"{row['ms']:.2f}", f"{row['tokens_a_second']:.0f}", times) if "ms" in row else (row["failure"], "", "")
        shown.add_row(row["model"], row["phase"], row["way"], *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--phase", action="append", choices=PHASES)
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.model or [*MODELS], arguments.phase or [*PHASES], arguments.way or [*WAYS])
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    Console(width=160).print(table(rows))


if __name__ == "__main__":
    main()
