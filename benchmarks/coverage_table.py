"""The documents that benchmarks/coverage.py writes: docs/coverage.md and its like."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.coverage import Result

# Column to the idioms that it adds up.
COLUMNS = {
    "RMSNorm": ("rms_norm", "gated_rms_norm"),
    "add → norm": ("residual_add",),
    "RoPE": ("rope",),
    "gated activation": ("glu",),
    "attention": ("attention",),
    "latent attention": ("mla_attention",),
    "latent preprocess": ("mla",),
    "router": ("router",),
    "experts": ("experts",),
    "quantise": ("quantize",),
    "dequantise": ("dequantize",),
    "quantised linear": ("quantized_linear",),
}
GOALS = {"RMSNorm": 0.98} | dict.fromkeys(list(COLUMNS)[1:], 0.95)
BROKEN = "the model breaks the graph: what lies outside runs eagerly, or runs a compiled graph several times that is counted once"
UNRECOGNISED = "no rule came near it: the report does not list it"

INTRODUCTION = """\
# Coverage

Written by `benchmarks/coverage.py`; do not edit. How much of transformers' causal language models runs in fused ops: for each architecture
a tiny random model, in bfloat16 and float32, with static and dynamic shapes, prefill and decode, SDPA and eager attention.

- *Executed* sites are counted in an eager pass by hooks, independently of the compiler (tests/models/sites.py). RMSNorm counts plain and
  gated ones; add → norm the sums that feed an RMSNorm; RoPE the rotated tensors; a gated activation is an activation times another tensor.
- *Covered* sites are those that a fused op computes in the graphs that ran (`npu_fusion.report`).
- The contract: the logits of the pass, and of an eager step that goes on with the cache it left, have an error against float64 of at most
  {factor} times eager's own, or the floor of the dtype.
- Routing is pinned: every expert is chosen, so that no rounding error can send a token elsewhere.
- Architectures put together from a text model and others are represented by the text model.
- Latent attention counts among attention, too: here stands what keeps the parts of its keys apart. A router and its experts count once a
  block, whatever they are written with.
"""

QUANTISED = """\
# Coverage of quantised models and latent attention

Written by `benchmarks/coverage.py --suite quantised`; do not edit. How much of what quantisation's producers make runs in fused ops
(torchao's own tensors, and linears written by hand as AWQ, GPTQ, HQQ, compressed-tensors and LLM.int8() do), and of latent attention as
DeepSeek's code for inference writes it, absorbed: tests/models/producers.py. In bfloat16 and float32, with static and dynamic shapes,
prefill and decode.

- How often an idiom occurs is known by construction. *Covered* sites are those that a fused op computes (`npu_fusion.report`).
- A quantised linear is one whose scales are part of the op that multiplies; dequantised tensors count each.
- The contract: an error against eager of at most the floor of the dtype.
"""

_LOWERED = """\
Here the fused ops are lowered for {target} and run as its ops (`torch.ops.npu.*`), through their CPU kernels
(`npu_fusion.lowerings.ascend.emulation`): these figures say that the lowering computes the right numbers, not that a device ran it.
"""


def document(results: Sequence[Result], suite: str = "models") -> str:
    """The whole of a document; columns of which nothing was executed or covered are left out."""
    from npu_fusion.numerics import EAGER_FACTOR

    measured = [result for result in results if result.status in ("ok", "wrong")]
    parts = [
        QUANTISED if suite == "quantised" else INTRODUCTION.format(factor=EAGER_FACTOR),
        *(_LOWERED.format(target=target) for target in sorted({result.cell.target for result in results} - {"cpu"})),
        f"Measured with {'; '.join(sorted({result.code for result in results}))}: {_summary(results)}.",
        "## Totals",
        _totals(measured),
        "## By configuration",
        _by_configuration(measured),
        *(["## What runs", _providers(measured)] if any(result.cell.target != "cpu" for result in results) else []),
        "## Why sites were missed",
        _reasons(measured),
        "## More covered than executed",
        "Where the report counts more sites than the hooks did; only as many as were executed count above.",
        _surplus(measured),
        "## Numbers beyond the contract, and failures",
        _failures(results),
        "## By architecture",
        "Sites covered / executed, over all measured configurations; a dash where the model has none.",
        _by_architecture(measured),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _summary(results: Sequence[Result]) -> str:
    statuses = Counter(result.status for result in results)
    architectures = len({result.cell.arch for result in results if result.status in ("ok", "wrong")})
    texts = {
        "ok": "within the contract",
        "wrong": "beyond it",
        "failed": "failed to compile or run",
        "eager": "do not run eagerly here",
        "absent": "without such an attention in the model",
    }
    listed = ", ".join(f"{statuses[status]} {text}" for status, text in texts.items() if statuses[status])
    return f"{architectures} architectures, {len(results)} configurations ({listed or 'none yet'})"


def columns_of(results: Sequence[Result]) -> list[str]:
    """The columns that are not empty."""
    found = {idiom for result in results for sites in (result.executed, result.covered) for idiom, count in sites.items() if count}
    return [column for column, idioms in COLUMNS.items() if found.intersection(idioms)]


def counts(results: Iterable[Result], column: str) -> tuple[int, int]:
    """Sites covered and executed. Of one configuration no more count as covered than were executed."""
    covered = executed = 0
    for result in results:
        there = sum(result.executed.get(idiom, 0) for idiom in COLUMNS[column])
        executed += there
        covered += min(there, sum(result.covered.get(idiom, 0) for idiom in COLUMNS[column]))
    return covered, executed


def _fraction(covered: int, executed: int) -> str:
    return f"{covered}/{executed}" if executed else "-"


def _percent(covered: int, executed: int) -> str:
    return f"{100 * covered / executed:.1f}%" if executed else "-"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _totals(results: Sequence[Result]) -> str:
    rows = []
    for column in columns_of(results):
        covered, executed = counts(results, column)
        rows.append([column, str(covered), str(executed), _percent(covered, executed), f"{GOALS[column]:.0%}"])
    return _table(["idiom", "covered", "executed", "", "goal"], rows)


def _by_configuration(results: Sequence[Result]) -> str:
    axes: dict[str, Callable[[Result], str]] = {
        "dtype": lambda result: result.cell.dtype,
        "shapes": lambda result: result.cell.shapes,
        "phase": lambda result: result.cell.phase,
        "attention": lambda result: result.cell.attention,
    }
    columns, rows = columns_of(results), []
    for name, axis in axes.items():
        values = sorted({axis(result) for result in results})
        for value in values if len(values) > 1 else []:
            chosen = [result for result in results if axis(result) == value]
            rows.append([f"{name}: {value}", *(_percent(*counts(chosen, column)) for column in columns)])
    return _table(["", *columns], rows)


def _providers(results: Sequence[Result]) -> str:
    """What the semantic ops were lowered to, and why better providers were passed over."""
    calls: Counter[tuple[str, str]] = Counter()
    reasons: Counter[str] = Counter()
    where: defaultdict[str, set[str]] = defaultdict(set)
    for result in results:
        for op, providers in result.lowered.items():
            for provider, count in providers.items():
                calls[op, provider] += count
        for line, count in result.passed_over.items():
            reasons[line] += count
            where[line].add(result.cell.arch)
    totals: Counter[str] = Counter()
    for (op, _), count in calls.items():
        totals[op] += count
    rows = [[op, provider, str(count), _percent(count, totals[op])] for (op, provider), count in sorted(calls.items())]
    passed = [[_escape(line), str(count), _some(where[line])] for line, count in reasons.most_common()]
    table = _table(["semantic op", "runs as", "calls", ""], rows)
    return f"{table}\n\nProviders that were passed over:\n\n{_table(['call', 'sites', 'architectures'], passed)}" if passed else table


def _reasons(results: Sequence[Result]) -> str:
    """Reasons of misses with the sites and architectures they hold for. Misses that the report does not list have a line of their own."""
    sites: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for result in results:
        for column, idioms in COLUMNS.items():
            covered, executed = counts([result], column)
            missing = executed - covered
            for idiom in idioms:
                for reason, count in result.reasons.get(idiom, {}).items():
                    count = min(count, missing)
                    missing -= count
                    if count:
                        sites[column, reason] += count
                        where[column, reason].add(result.cell.arch)
            if missing:
                broken = any(note.startswith("graph break") for note in result.notes)
                reason = BROKEN if broken else UNRECOGNISED
                sites[column, reason] += missing
                where[column, reason].add(result.cell.arch)
    rows = [[column, _escape(reason), str(count), _some(where[column, reason])] for (column, reason), count in sites.most_common()]
    return _table(["idiom", "reason", "sites", "architectures"], rows) if rows else "None was."


def _surplus(results: Sequence[Result]) -> str:
    sites: Counter[tuple[str, str]] = Counter()
    for result in results:
        for column, idioms in COLUMNS.items():
            claimed = sum(result.covered.get(idiom, 0) for idiom in idioms)
            sites[column, result.cell.arch] += max(0, claimed - sum(result.executed.get(idiom, 0) for idiom in idioms))
    rows = [[column, arch, str(count)] for (column, arch), count in sorted(sites.items()) if count]
    return _table(["idiom", "architecture", "sites"], rows) if rows else "None."


def _failures(results: Sequence[Result]) -> str:
    groups: defaultdict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result.status in ("wrong", "failed", "eager"):
            groups[result.cell.arch, result.status].append(result)
    rows = []
    for (arch, status), group in sorted(groups.items()):
        configurations = " ".join(f"{r.cell.dtype}/{r.cell.shapes}/{r.cell.phase}/{r.cell.attention}" for r in group[:2])
        more = f" and {len(group) - 2} more" if len(group) > 2 else ""
        rows.append([arch, status, configurations + more, _escape(group[0].detail)])
    return _table(["architecture", "what", "configurations", "detail"], rows) if rows else "None."


def _by_architecture(results: Sequence[Result]) -> str:
    columns, rows = columns_of(results), []
    for arch in sorted({result.cell.arch for result in results}):
        chosen = [result for result in results if result.cell.arch == arch]
        worst = max(result.error / result.allowed for result in chosen)
        cells = [_fraction(*counts(chosen, column)) for column in columns]
        rows.append([arch, str(len(chosen)), *cells, f"{worst:.2f}"])
    return _table(["architecture", "configurations", *columns, "error / allowed"], rows)


def _some(names: Iterable[str], limit: int = 6) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
