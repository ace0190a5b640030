"""A `FusionReport` for the terminal: tables of idioms and misses, cost, configuration, notes."""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import sympy
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .record import IDIOMS, Site
from .report import short_source

if TYPE_CHECKING:
    from .report import FusionReport

WIDTH = 120
PLACES_SHOWN = 4
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|\[\d+\]")
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def as_text(report: FusionReport, width: int = WIDTH) -> str:
    """The report as plain text of a fixed width, without colours, the same wherever it is printed."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False, emoji=False)
    for part in renderables(report):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().split("\n"))


def renderables(report: FusionReport) -> Iterator[RenderableType]:
    """The parts of the report, top to bottom."""
    yield Text(headline(report), style="bold")
    if report.sites:
        yield _idiom_table(report)
    if report.missed:
        yield _miss_table(report)
    yield from _cost_lines(report)
    yield _line("Configuration", config_line(report))
    for title, lines in _remarks(report):
        yield Text(title, style="bold")
        for line in lines:
            yield Text(f"  {line}")


def headline(report: FusionReport) -> str:
    """One sentence that says how much was fused."""
    sites, fused = len(report.sites), sum(report.idioms.values())
    graphs = plural(len(report.records), "graph")
    if not sites:
        return f"npu_fusion: no idiom was recognised in {graphs}"
    return f"npu_fusion: {fused} of {plural(sites, 'site')} fused ({100 * fused // sites}%) in {graphs}"


def config_line(report: FusionReport) -> str:
    """The configuration in force, `option=value`, defaults other than the main ones left out."""
    config = report.effective_config
    parts = [f"target={config.target}", f"executor={config.executor}", f"rounding={config.rounding}"]
    if config.rules is not None:
        parts.append(f"rules={','.join(rule if isinstance(rule, str) else rule.name for rule in config.rules)}")
    if config.disable:
        parts.append(f"disable={','.join(config.disable)}")
    parts += [name for name in ("verify", "emulate") if getattr(config, name)]
    if not config.merge_weights:
        parts.append("merge_weights=False")
    if config.keep_prepared_weights:
        parts.append("keep_prepared_weights=True")
    if not config.read_index_buffers:
        parts.append("read_index_buffers=False")
    return " ".join(parts)


def group_misses(missed: Iterable[Site]) -> list[tuple[str, str, list[Site]]]:
    """Misses by idiom and reason, in the order of `IDIOMS`, the most frequent reason first."""
    groups: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in missed:
        groups[site.idiom, site.reason or "no reason recorded"].append(site)
    ordered = sorted(groups.items(), key=lambda item: (IDIOMS.index(item[0][0]), -len(item[1]), item[0][1]))
    return [(idiom, reason, sites) for (idiom, reason), sites in ordered]


def passed_over(sites: Iterable[Site]) -> list[str]:
    """Why fused ops do not run as the best provider of the target would: one line for each op and reason."""
    counts = Counter((site.op, site.lowered_to, site.reason) for site in sites if site.fused and site.reason)
    return [f"{op} runs as {runs_as} (x{count}): {reason}" for (op, runs_as, reason), count in counts.most_common()]


def places(sites: Iterable[Site]) -> list[str]:
    """Where sites are, one line for each source line, module paths that differ in an index alone written once: `layers.*.mlp (x48)`."""
    modules: dict[str, Counter[str]] = defaultdict(Counter)
    for site in sites:
        source = short_source(site.source) if site.source else f"node {site.node}" if site.node and not site.module else ""
        modules[source][generic_path(site.module or "")] += 1
    lines: list[str] = []
    for source, paths in modules.items():
        for path, count in paths.items():
            line = " ".join(part for part in (source, path) if part) or "an unknown place"
            lines.append(f"{line} (x{count})" if count > 1 else line)
    return lines


def generic_path(path: str) -> str:
    """A module path with its indices replaced: `model.layers.3.mlp` is `model.layers.*.mlp`."""
    return _INDEX.sub("*", path)


def human_bytes(amount: int) -> str:
    """1234567 is `1.23 MB` (powers of 1000)."""
    value = float(amount)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            return f"{value:.3g} {unit}" if unit != "B" else f"{amount} B"
        value /= 1000
    raise AssertionError("unreachable: the last unit returns")


def cost_text(before: sympy.Expr, after: sympy.Expr, *, unit: str = "") -> str:
    """`before → after`, with the change in percent where both are numbers."""
    if not (before.is_Integer and after.is_Integer):
        return f"{before} → {after}"
    first, last = int(before), int(after)
    change = f" ({100 * (last - first) / first:+.1f}%)" if first else ""
    if unit == "B":
        return f"{human_bytes(first)} → {human_bytes(last)}{change}"
    return f"{first:,} → {last:,}{change}"


def _idiom_table(report: FusionReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Idiom", no_wrap=True)
    table.add_column("Fused", justify="right", no_wrap=True)
    table.add_column("Ops")
    table.add_column("Runs as")
    covered, totals = report.idioms, report.totals
    ops: dict[str, Counter[str]] = defaultdict(Counter)
    providers: dict[str, Counter[str]] = defaultdict(Counter)
    for site in report.sites:
        if site.fused:
            ops[site.idiom][site.op or "?"] += 1
            providers[site.idiom][site.lowered_to or "not lowered"] += 1
    for idiom in IDIOMS:
        if totals[idiom]:
            share = f"{covered[idiom]}/{totals[idiom]}"
            style = "green" if covered[idiom] == totals[idiom] else "yellow"
            table.add_row(idiom, Text(share, style=style), _counts(ops[idiom]), _counts(providers[idiom]))
    return table


def _miss_table(report: FusionReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Not fused", title_justify="left", title_style="bold")
    table.add_column("Idiom", no_wrap=True)
    table.add_column("Count", justify="right", no_wrap=True)
    table.add_column("Reason", ratio=3)
    table.add_column("Where", ratio=3, overflow="fold")
    for idiom, reason, sites in group_misses(report.missed):
        lines = places(sites)
        if len(lines) > PLACES_SHOWN:
            lines = [*lines[:PLACES_SHOWN], f"and {len(lines) - PLACES_SHOWN} more places"]
        table.add_row(idiom, str(len(sites)), Text(reason), Text("\n".join(lines)))
    return table


def _cost_lines(report: FusionReport) -> Iterator[RenderableType]:
    yield _line("Launches", cost_text(report.launches_before, report.launches_after))
    before, after = report.bytes_before, report.bytes_after
    yield _line("Bytes", cost_text(before, after, unit="B"))
    used = {str(symbol) for expr in (before, after) for symbol in expr.free_symbols}
    meanings = [f"{name} is {meaning}" for name, meaning in report.symbols.items() if name in used]
    if meanings:
        yield _line("Sizes", ", ".join(meanings))


def _remarks(report: FusionReport) -> Iterator[tuple[str, list[str]]]:
    if report.graph_breaks:
        yield f"{plural(len(report.graph_breaks), 'graph break')}:", report.graph_breaks
    if lines := passed_over(report.sites):
        yield "Providers that could not take a call:", lines
    if report.rule_errors:
        yield "Rules that raised (their sites were skipped):", [f"{rule}: {error}" for rule, error in report.rule_errors.items()]
    if report.notes:
        yield "Notes:", report.notes


def _line(title: str, text: str) -> Text:
    return Text.assemble((f"{title:<14}", "bold"), text)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(name if count == counter.total() else f"{name} x{count}" for name, count in counter.most_common())


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
