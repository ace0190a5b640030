"""Kernel launches in the graph that an NPU captures: plain, by torch_npu's compilers, and with npu_fusion.

    tools/run benchmarks/launches.py                               # every model, prefill and decode: minutes
    tools/run benchmarks/launches.py --model demo --list           # and what is left, by kernel
    tools/run benchmarks/launches.py --model llama --phase decode --way plain --way "npu_fusion graph"

Nothing of this needs an NPU: the real torch_npu runs on the virtual one (tests/virtual_npu), which traces launches and computes nothing.
Launches are a count, no time; copies between buffers of the device are not among them. Each case has a process of its own.

Ways: `plain` is AOT's graph, run eagerly under `torch.npu.graph`; `npugraph_ex` and `torchair` are torch_npu's backends, torchair in its
mode reduce-overhead; `npu_fusion E` is `backend="npu_fusion"` with executor E. Models: `demo` is the program of two Llama layers that
the project's goals name (float16, 2 x 8 tokens, no cache); `deepseek_w8a8` is a decode step of two layers of DeepSeek-V3's sizes, in int8;
the others are tiny models of the tests' zoo. A decode step has a StaticCache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WAYS = ("plain", "npugraph_ex", "torchair", "npu_fusion graph", "npu_fusion npugraph_ex")
MODELS = ("demo", "llama", "qwen3", "gemma", "phi3", "deepseek_v2", "qwen3_moe", "deepseek_w8a8")
DECODE_ONLY = ("deepseek_w8a8",)
PHASES = ("prefill", "decode")
BATCH, SEQUENCE = 2, 8
TIMEOUT = 600.0
_WORKER = "--worker"


@dataclass(frozen=True)
class Case:
    """One program, captured one way."""

    model: str
    phase: str
    attention: str
    way: str

    @property
    def program(self) -> str:
        return f"{self.model}, {self.phase}, {self.attention}"


@dataclass
class Outcome:
    """The kernels of the captured graph by name and its device copies, or why there is none."""

    kernels: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    failure: str = ""

    def __str__(self) -> str:
        return "failed" if self.failure else str(self.kernels.total())


# In the process on the virtual NPU


def _model(name: str, attention: str) -> Any:
    import torch

    from tests.models import deepseek_w8a8, zoo

    if name == "deepseek_w8a8":
        return deepseek_w8a8.build()
    if name != "demo":
        return zoo.build(name, torch.float16, attention)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float16, attn_implementation=attention).eval().requires_grad_(False)


def _inputs(model: Any, phase: str) -> dict[str, Any]:
    import torch

    from tests.models import deepseek_w8a8, zoo

    if isinstance(model, deepseek_w8a8.Decoder):
        return deepseek_w8a8.inputs(model, BATCH)
    if phase == "decode":
        return zoo.decode_inputs(model, BATCH, SEQUENCE)
    tokens = torch.full((BATCH, SEQUENCE), zoo.FIRST_TOKEN, device=next(model.parameters()).device)
    return {"input_ids": tokens, "use_cache": False}


def _compiled(model: Any, way: str) -> Callable[..., Any]:
    """The model, compiled in a way that captures by itself; `plain` does not."""
    import torch

    name, _, executor = way.partition(" ")
    backend: Any = {"plain": "aot_eager", "npugraph_ex": "npugraph_ex", "npu_fusion": "npu_fusion"}.get(name)
    if name == "torchair":
        import torchair

        compiler = torchair.CompilerConfig()
        compiler.mode = "reduce-overhead"
        backend = torchair.get_npu_backend(compiler_config=compiler)
    options: dict[str, Any] | None = {"executor": executor} if executor else None
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, options=options, fullgraph=True, dynamic=False)
    return compiled


def capture(case: Case) -> None:
    """Have the case's graph captured; the last one in the process's trace that holds launches.

    Raises:
        RuntimeError: npu_fusion ran the graph without capturing it; the message says why.
    """
    import torch

    npu: Any = torch.get_device_module("npu")
    model = _model(case.model, case.attention).to("npu")
    if hasattr(model, "store_inputs_first"):
        model.store_inputs_first()  # on the device, in its format
    inputs = _inputs(model, case.phase)
    compiled = _compiled(model, case.way)
    with torch.no_grad():
        compiled(**inputs)
        if case.way == "plain":
            with npu.graph(npu.NPUGraph()):
                compiled(**inputs)
        else:
            compiled(**inputs)
    npu.synchronize()
    if case.way.startswith("npu_fusion"):
        import npu_fusion

        report = npu_fusion.report(compiled)
        if report.effective_config.executor == "eager":
            raise RuntimeError("; ".join(report.notes))


# In the process that prints


def measure(case: Case) -> Outcome:
    """Run a case on the virtual NPU and read its trace."""
    from tests.virtual_npu.launches import read
    from tests.virtual_npu.run import virtual_npu

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.txt"
        try:
            done = virtual_npu().run([__file__, _WORKER, json.dumps(asdict(case))], trace=trace, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return Outcome(failure=f"took more than {TIMEOUT:.0f} s")
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            errors = [line for line in lines if "Error: " in line]
            return Outcome(failure=(errors or lines or [f"exit status {done.returncode}"])[-1].strip())
        captured = read(trace).captured
    if not captured:
        return Outcome(failure="captured nothing")
    return Outcome(captured[-1].launches, captured[-1].copies)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for model in arguments.model or MODELS:
        for phase in arguments.phase or (PHASES[1:] if model in DECODE_ONLY else PHASES):
            for attention in arguments.attention or (("sdpa", "eager") if model == "demo" else ("sdpa",)):
                for way in arguments.way or WAYS:
                    yield Case(model, phase, attention, way)


def show(outcomes: dict[Case, Outcome], with_kernels: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    ways = list(dict.fromkeys(case.way for case in outcomes))
    table = Table("program", *ways, title="Kernel launches in the captured graph")
    for program in dict.fromkeys(case.program for case in outcomes):
        found = {case.way: str(outcome) for case, outcome in outcomes.items() if case.program == program}
        table.add_row(program, *(found[way] for way in ways))
    console.print(table)
    for case, outcome in outcomes.items():
        if outcome.failure:
            console.print(f"{case.program}, {case.way}: {outcome.failure}", markup=False)
        elif with_kernels:
            console.print(_kernel_table(case, outcome))


def _kernel_table(case: Case, outcome: Outcome) -> Any:
    from rich.table import Table

    table = Table("launches", "kernel", title=f"{case.program}, {case.way}", title_justify="left")
    for kernel, count in sorted(outcome.kernels.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(str(count), kernel)
    if outcome.copies:
        table.add_row(str(outcome.copies), "copies on the device, not counted as launches")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the kernel launches in captured graphs, on the virtual NPU.")
    parser.add_argument("--model", action="append", help=f"demo, or a model of the zoo; can be repeated ({', '.join(MODELS)})")
    parser.add_argument("--phase", action="append", choices=PHASES)
    parser.add_argument("--attention", action="append", choices=("sdpa", "eager"))
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--list", action="store_true", help="list the launches of each graph by kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the kernels of each case to FILE as well")
    parser.add_argument(_WORKER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        capture(Case(**json.loads(arguments.worker)))
        return
    outcomes: dict[Case, Outcome] = {}
    for case in cases(arguments):
        print(f"{case.program}, {case.way} ...", file=sys.stderr, flush=True)
        outcomes[case] = measure(case)
    show(outcomes, arguments.list)
    if arguments.json:
        arguments.json.write_text(json.dumps([{**asdict(case), **vars(outcome)} for case, outcome in outcomes.items()], indent=1))


if __name__ == "__main__":
    main()
