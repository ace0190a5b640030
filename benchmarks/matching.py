"""What it costs to find and rewrite the idioms of a large graph; writes docs/matching.md.

The graph is a Qwen3-MoE of 48 layers (tiny dimensions: matching does not see them) in bfloat16, as Dynamo and AOT hand it to npu_fusion.
Measured are CPU seconds by stage, their growth with the number of layers, whether the number of distinct eps values matters, and
torch's own pattern matcher on the same RMSNorms and gated units of the same graph in the same process.

    python benchmarks/matching.py                # about five minutes on two cores
    python benchmarks/matching.py --layers 4 8   # quicker; the document is left alone
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch.fx import GraphModule
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from npu_fusion import FusionConfig, GraphRecord, lift
from npu_fusion.aot import trace
from npu_fusion.ops.glu import glu
from npu_fusion.ops.norm import rms_norm
from npu_fusion.pipeline import fuse_graph
from npu_fusion.rule import Rule, registered_rules

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "matching.md"
LAYERS = (12, 24, 48)
EPS_VALUES = (1, 10, 40)
STAGES = ("view", "match", "select", "rewrite")
SEQUENCE, HIDDEN, HEAD = 32, 64, 16
EPS = 1e-6
GOALS = {"seconds": 1.0, "faster": 10.0, "of_tracing": 0.05}


class _Traced(BaseException):
    """Ends a compilation once its ATen graph is there."""


@dataclass
class Graph:
    """One traced model: its ATen graph, and the CPU seconds that Dynamo and AOT took."""

    gm: GraphModule
    seconds: float

    @property
    def nodes(self) -> int:
        return len(self.gm.graph.nodes)


def capture(layers: int) -> Graph:
    """Trace a prefill of the model as the backend would."""
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        num_experts=4,
        num_experts_per_tok=2,
        rms_norm_eps=EPS,
    )
    model: torch.nn.Module = Qwen3MoeForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    found: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def keep(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            found.append(graph)
            raise _Traced

        lift.lift(gm, inputs)
        return trace(gm, inputs, keep, keep, keep)

    torch.compiler.reset()
    started = time.process_time()
    try:
        with torch.no_grad():
            torch.compile(model, backend=backend)(torch.randint(0, 128, (1, SEQUENCE)), use_cache=False)
    except _Traced:
        pass
    return Graph(found[0], time.process_time() - started)


def with_eps(gm: GraphModule, distinct: int) -> GraphModule:
    """A copy in which the norms have that many different eps values between them."""
    gm = copy.deepcopy(gm)
    values = itertools.cycle(EPS * (1 + i) for i in range(distinct))
    for node in gm.graph.nodes:
        if node.target in (torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar) and node.args[1] == EPS:
            node.args = (node.args[0], next(values))
    return gm


# -------------------------------------------------------------------- measuring


@dataclass
class Fused:
    """One run of the engine: CPU seconds by stage, how often each semantic op is in the graph now, and which idioms that covers."""

    seconds: dict[str, float]
    total: float
    ops: Counter[str]
    idioms: Counter[str]

    @property
    def stages(self) -> float:
        return sum(self.seconds[stage] for stage in STAGES)


def fuse(gm: GraphModule, rules: tuple[str, ...] | None = None, repeat: int = 3) -> Fused:
    """The median run of the engine over copies of the graph."""
    runs = []
    for _ in range(repeat):
        with _uncollected():
            runs.append(_fuse_once(copy.deepcopy(gm), FusionConfig(target="cpu", rules=rules)))
    return sorted(runs, key=lambda run: run.stages)[repeat // 2]


def _fuse_once(gm: GraphModule, config: FusionConfig) -> Fused:
    record = GraphRecord(config)
    started = time.process_time()
    fuse_graph(gm, config, record)
    seconds = time.process_time() - started
    return Fused(record.seconds, seconds, semantic_calls(gm), Counter(site.idiom for site in record.sites if site.fused))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, as timeit has it, and without the garbage of what ran before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def semantic_calls(gm: GraphModule) -> Counter[str]:
    targets = [node.target for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return Counter(target._opname for target in targets if target.namespace == "npu_fusion")


def rules_for(*ops: str) -> tuple[str, ...]:
    """The rules that make these ops of plain operators."""
    return tuple(rule.name for rule in registered_rules() if rule.produces in ops and isinstance(rule, Rule) and not rule.consumes)


# -------------------------------------------------------------------- torch's own matcher


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h.to(torch.bfloat16)


def _fused_norm(x: Tensor, weight: Tensor) -> Tensor:
    normed: Tensor = rms_norm(x, weight, EPS, round_dtype=torch.bfloat16)
    return normed


def _glu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _fused_glu(gate: Tensor, up: Tensor) -> Tensor:
    product: Tensor = glu(gate, up)
    return product


def inductor(gm: GraphModule, repeat: int = 3) -> tuple[float, Counter[str]]:
    """CPU seconds of torch's pattern matcher over copies of the graph, registration not counted, and what it fused."""
    patterns = PatternMatcherPass()
    row, weight = torch.empty(1, SEQUENCE, HIDDEN, dtype=torch.bfloat16), torch.empty(HIDDEN, dtype=torch.bfloat16)
    register_replacement(_norm, _fused_norm, [row, weight], _plain, patterns)
    register_replacement(_glu, _fused_glu, [row.clone(), row.clone()], _plain, patterns)
    seconds = []
    for _ in range(repeat):
        with _uncollected():
            graph = copy.deepcopy(gm)
            started = time.process_time()
            patterns.apply(graph.graph)
            seconds.append(time.process_time() - started)
    return statistics.median(seconds), semantic_calls(graph)


def _plain(fn: Any, args: Any, run_functional_passes: bool = True, **_: Any) -> GraphModule:
    """Trace a pattern as the graph was traced: without decompositions."""
    return fwd_only(fn, args, run_functional_passes=run_functional_passes, get_decomp_fn=dict)


# -------------------------------------------------------------------- tables


def stages_table(graphs: Iterable[Graph]) -> Table:
    after = ("Sum", "us a node", "With snapshots and report", "Dynamo + AOT", "Share", "Fused ops")
    table = _table("CPU seconds", "Layers", "Nodes", *STAGES, *after)
    for graph in graphs:
        run = fuse(graph.gm)
        figures = [f"{run.seconds[stage]:.3f}" for stage in STAGES]
        layers = str(sum(node.target is torch.ops.aten.topk.default for node in graph.gm.graph.nodes))
        share = f"{run.stages / graph.seconds:.1%}"
        per_node = f"{run.stages / graph.nodes * 1e6:.0f}"
        fused = str(sum(run.ops.values()))
        table.add_row(
            layers, str(graph.nodes), *figures, f"{run.stages:.3f}", per_node, f"{run.total:.3f}", f"{graph.seconds:.1f}", share, fused
        )
    return table


def eps_table(gm: GraphModule) -> Table:
    table = _table("Distinct eps values", "Values", *STAGES, "Sum", "RMSNorms fused")
    fuse(gm, repeat=1)  # warm up
    for distinct in EPS_VALUES:
        run = fuse(with_eps(gm, distinct))
        figures = [f"{run.seconds[stage]:.3f}" for stage in STAGES]
        table.add_row(str(distinct), *figures, f"{run.stages:.3f}", str(run.idioms["rms_norm"]))
    return table


def inductor_table(gm: GraphModule) -> Table:
    """Both matchers on RMSNorm and gated units alone."""
    theirs, their_ops = inductor(gm)
    ours = fuse(gm, rules_for("rms_norm", "glu"))
    table = _table("The same matches", "Matcher", "CPU seconds", "RMSNorms", "Gated units", "ms a match", "Times as long")
    for name, seconds, ops in (("npu_fusion", ours.stages, ours.ops), ("torch._inductor.pattern_matcher", theirs, their_ops)):
        per_match = seconds / max(sum(ops.values()), 1) * 1e3
        table.add_row(name, f"{seconds:.3f}", str(ops["rms_norm"]), str(ops["glu"]), f"{per_match:.2f}", f"{seconds / ours.stages:.1f}")
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.MARKDOWN)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def document(tables: Sequence[Table]) -> str:
    """The tables as Markdown."""
    lines = [
        "# Cost of matching",
        "",
        f"Written by `benchmarks/matching.py` (torch {torch.__version__}, transformers {transformers.__version__}, one CPU core).",
        "The graph is a bf16 prefill of a Qwen3-MoE with tiny dimensions, as Dynamo and AOT hand it over. Figures are CPU seconds, medians",
        "of three runs with the garbage collector off (it would charge a random stage for the whole process). Goals at 48 layers: all",
        f"stages under {GOALS['seconds']:.0f} s and under {GOALS['of_tracing']:.0%} of Dynamo + AOT, linear in nodes, flat in the number",
        f"of eps values, and {GOALS['faster']:.0f} times as fast as torch's own matcher on the same matches in the same process.",
        "",
    ]
    for table in tables:
        console = Console(width=240, record=True, file=io.StringIO())
        title, table.title = str(table.title), None
        console.print(table)
        table.title = title
        body = "\n".join(line.rstrip() for line in console.export_text().splitlines() if line.strip())
        lines += [f"## {title}", "", body, ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS), help="numbers of layers, the last for the comparisons")
    arguments = parser.parse_args()
    graphs = []
    console = Console(width=200)
    for layers in arguments.layers:
        graphs.append(capture(layers))
        console.print(f"{layers} layers: {graphs[-1].nodes} nodes traced in {graphs[-1].seconds:.1f} s")
    largest = graphs[-1].gm
    tables = [stages_table(graphs), eps_table(largest), inductor_table(largest)]
    for table in tables:
        console.print(table)
    if tuple(arguments.layers) == LAYERS:
        DOCUMENT.write_text(document(tables), encoding="utf-8")
        console.print(f"written to {DOCUMENT.name}")


if __name__ == "__main__":
    main()
