"""`FusionReport`: what was fused, what was not and why, and what that is worth.

A report is made of `GraphRecord`s, one for each compiled graph, and adds nothing to them that cannot be read off the graphs themselves:
`ops` counts calls in the final graphs, launches and bytes are those of `npu_fusion.cost`.

JSON schema (`to_json`, version `JSON_SCHEMA_VERSION`; keys are only ever added within a version)::

    {"schema_version": int, "npu_fusion": str, "torch": str,
     "config": {option: value},                               # in force, target and executor resolved
     "graphs": [{"nodes": {stage: int}, "calls": int, "seconds": {stage: float}}],
     "idioms": {idiom: {"covered": int, "total": int}},
     "ops": {semantic op: int},
     "sites": [{"graph": int, "idiom": str, "fused": bool, "op": str?, "lowered_to": str?, "reason": str?, "source": str?,
                "module": str?, "node": str?, "rule": str?, "call": str?}],
     "launches": {"before": str, "after": str},               # sympy expressions
     "bytes": {"before": str, "after": str},
     "symbols": {symbol: what it is the size of},
     "graph_breaks": [str], "notes": [str], "rule_errors": {rule: str}}
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Graph, GraphModule

from .config import FusionConfig
from .cost import bytes_moved, launches
from .errors import ConfigError, ReportError
from .record import IDIOMS, GraphRecord, Site
from .semantic import find_semantic_op
from .symbols import symbol_names
from .torch_private import compile_contexts_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

JSON_SCHEMA_VERSION = 1
STAGES = ("aten", "fused", "lowered")


def report(compiled: Any) -> FusionReport:
    """The report of what a compiled function or module really runs.

    Args:
        compiled: what `torch.compile(..., backend="npu_fusion")` returned, or a module compiled in place; it must have been called.

    Raises:
        ReportError: it was never compiled with npu_fusion, or was not called yet.
    """
    from .backend import records_of

    records = records_of(compiled)
    if not records:
        raise ReportError(f"there is nothing to report on {_describe(compiled)}: {_why_no_records(compiled)}")
    return FusionReport(records)


class FusionReport:
    """Fused and missed sites of all graphs of one compilation, with their cost before and after.

    Args:
        records: one for each compiled graph, in the order of compilation; there may be none (a function without tensor code).
        graph_breaks: where Dynamo cut the function, one line a cut with its reason; those the records know of when left out.
        config: the configuration asked for, used when there is no record to tell the one in force.
    """

    def __init__(
        self, records: Sequence[GraphRecord], *, graph_breaks: Sequence[str] | None = None, config: FusionConfig | None = None
    ) -> None:
        self.records = tuple(records)
        known = [record.graph_break for record in self.records] if graph_breaks is None else graph_breaks
        self.graph_breaks: list[str] = list(dict.fromkeys(reason for reason in known if reason))
        self._config = config

    @property
    def sites(self) -> list[Site]:
        """Every occurrence of an idiom, graph by graph."""
        return [site for record in self.records for site in record.sites]

    @property
    def missed(self) -> list[Site]:
        """The sites that no fused op computes."""
        return [site for site in self.sites if not site.fused]

    @property
    def idioms(self) -> Counter[str]:
        """Occurrences of each idiom that fused ops compute in the final graphs."""
        return Counter(site.idiom for site in self.sites if site.fused)

    @property
    def totals(self) -> Counter[str]:
        """Occurrences of each idiom, fused or not."""
        return Counter(site.idiom for site in self.sites)

    @cached_property
    def ops(self) -> Counter[str]:
        """Calls of each semantic op in the fused graphs, by name without namespace."""
        found = (find_semantic_op(node.target) for record in self.records for node in _nodes(record.stages.get("fused")))
        return Counter(op.name for op in found if op is not None)

    @property
    def effective_config(self) -> FusionConfig:
        """The configuration that was in force for the first graph, target and executor resolved.

        Graphs that differ from it (a function over tensors of two devices) say so in `notes`.
        """
        return self.records[0].config if self.records else self._config or FusionConfig()

    @property
    def notes(self) -> list[str]:
        """Decisions that concern whole graphs, without repetitions."""
        notes = [note for record in self.records for note in record.notes]
        first = self.effective_config
        for index, record in enumerate(self.records):
            if record.config != first:
                notes.append(f"graph {index} differs in its configuration: {_config_line(record.config, first)}")
        return list(dict.fromkeys(notes))

    @property
    def rule_errors(self) -> dict[str, str]:
        """Rules that raised, with the exception; their sites were skipped."""
        return {rule: error for record in self.records for rule, error in record.rule_errors.items()}

    @cached_property
    def launches_before(self) -> sympy.Expr:
        """Kernel launches of one run of every graph as Dynamo and AOT made it."""
        return self._sum(launches, "before")

    @cached_property
    def launches_after(self) -> sympy.Expr:
        """Kernel launches of one run of every graph as it was lowered."""
        return self._sum(launches, "after")

    @cached_property
    def bytes_before(self) -> sympy.Expr:
        """Bytes read and written by one run of every graph as Dynamo and AOT made it."""
        return self._sum(bytes_moved, "before")

    @cached_property
    def bytes_after(self) -> sympy.Expr:
        """Bytes read and written by one run of every graph as it was lowered."""
        return self._sum(bytes_moved, "after")

    @property
    def symbols(self) -> dict[str, str]:
        """What each symbol of the cost expressions is the size of, e.g. `{"s27": "input_ids.size(1)"}`."""
        return self._symbols[1]

    @cached_property
    def _symbols(self) -> tuple[list[dict[sympy.Symbol, sympy.Symbol]], dict[str, str]]:
        """For each record a renaming that keeps the symbols of different graphs apart, and the meaning of the renamed symbols."""
        meanings: dict[str, str] = {}
        renamings: list[dict[sympy.Symbol, sympy.Symbol]] = []
        for index, record in enumerate(self.records):
            graph = record.stages.get("aten") or record.stages.get("fused")
            renaming: dict[sympy.Symbol, sympy.Symbol] = {}
            for symbol, meaning in (symbol_names(graph) if graph is not None else {}).items():
                name = str(symbol)
                if meanings.get(name, meaning) != meaning:
                    name = f"{name}_{index}"
                    renaming[symbol] = sympy.Symbol(name, **symbol.assumptions0)
                meanings[name] = meaning
            renamings.append(renaming)
        return renamings, meanings

    def _sum(self, cost: Callable[[Graph | GraphModule], sympy.Expr], side: str) -> sympy.Expr:
        total = sympy.Integer(0)
        for record, renaming in zip(self.records, self._symbols[0], strict=True):
            graph = _before(record) if side == "before" else _after(record)
            if graph is not None:
                total += cost(graph).xreplace(renaming)
        return total

    def graph(self, stage: str, index: int = 0) -> GraphModule:
        """The graph after a stage: `aten` (as the model was traced), `fused` (with semantic ops) or `lowered` (what runs).

        Raises:
            ReportError: the stage is unknown, there is no graph of that index, or the graph never reached that stage.
        """
        if stage not in STAGES:
            raise ReportError(f"unknown stage {stage!r}. Known: {', '.join(STAGES)}")
        if not -len(self.records) <= index < len(self.records):
            raise ReportError(f"there is no graph {index}: {len(self.records)} were compiled")
        stages = self.records[index].stages
        if stage not in stages:
            raise ReportError(f"graph {index} never reached stage {stage!r}. Reached: {', '.join(stages) or 'none'}; see report.notes")
        return stages[stage]

    def expect(self, **least: int) -> FusionReport:
        """Assert that at least so many occurrences of each idiom are fused: for the CI of a model.

        Returns:
            the report itself.

        Raises:
            ConfigError: an unknown idiom.
            AssertionError: fewer are fused; the message lists the misses with their reasons.
        """
        for idiom in least:
            if idiom not in IDIOMS:
                raise ConfigError(f"unknown idiom {idiom!r}. Known: {', '.join(IDIOMS)}")
        covered = self.idioms
        short = [idiom for idiom, count in least.items() if covered[idiom] < count]
        if short:
            raise AssertionError("\n".join(self._shortfall(idiom, least[idiom]) for idiom in short))
        return self

    def _shortfall(self, idiom: str, expected: int) -> str:
        lines = [f"{idiom}: {self.idioms[idiom]} fused, {expected} expected"]
        missed = [site for site in self.missed if site.idiom == idiom]
        lines += [f"  missed at {site_place(site)}: {site.reason or 'no reason recorded'}" for site in missed]
        if not missed:
            lines.append("  no further occurrence was recognised")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as JSON; the module docstring has the schema."""
        return json.dumps(self._as_dict(), indent=2)

    def _as_dict(self) -> dict[str, Any]:
        covered, totals = self.idioms, self.totals
        return {
            "schema_version": JSON_SCHEMA_VERSION,
            "npu_fusion": package_version(),
            "torch": torch.__version__,
            "config": config_dict(self.effective_config),
            "graphs": [
                {
                    "nodes": {stage: len(graph.graph.nodes) for stage, graph in record.stages.items()},
                    "calls": record.calls,
                    "seconds": record.seconds,
                }
                for record in self.records
            ],
            "idioms": {idiom: {"covered": covered[idiom], "total": totals[idiom]} for idiom in IDIOMS if totals[idiom]},
            "ops": dict(sorted(self.ops.items())),
            "sites": [{"graph": index, **dataclasses.asdict(site)} for index, record in enumerate(self.records) for site in record.sites],
            "launches": {"before": str(self.launches_before), "after": str(self.launches_after)},
            "bytes": {"before": str(self.bytes_before), "after": str(self.bytes_after)},
            "symbols": self.symbols,
            "graph_breaks": self.graph_breaks,
            "notes": self.notes,
            "rule_errors": self.rule_errors,
        }

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Write the report as one self-contained HTML file, with the graphs before and after. Returns its path."""
        from .html import render_html

        path = Path(path)
        path.write_text(render_html(self), encoding="utf-8")
        return path

    def __str__(self) -> str:
        from .table import as_text

        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .table import renderables

        yield from renderables(self)

    def __repr__(self) -> str:
        return f"<FusionReport: {len(self.records)} graphs, {sum(self.idioms.values())} of {len(self.sites)} sites fused>"


def site_place(site: Site) -> str:
    """Where a site is, for people: `file.py:12 (model.layers.0)`, or whichever half is known."""
    if site.source and site.module:
        return f"{short_source(site.source)} ({site.module})"
    if site.source:
        return short_source(site.source)
    return site.module or (f"node {site.node}" if site.node else "an unknown place")


def short_source(source: str) -> str:
    """`file.py:12` of a source with its folders."""
    return re.split(r"[/\\]", source)[-1]


def config_dict(config: FusionConfig) -> dict[str, Any]:
    """The options of a configuration as plain JSON values; users' own rules by name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "executor_options":
            plain = (str, int, float, type(None))
            values[field.name] = {name: option if isinstance(option, plain) else repr(option) for name, option in value}
            continue
        values[field.name] = [item if isinstance(item, str) else item.name for item in value] if isinstance(value, tuple) else value
    return values


def package_version() -> str:
    """The installed version of npu-fusion, or `unknown` in a bare checkout."""
    try:
        return importlib.metadata.version("npu-fusion")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _config_line(config: FusionConfig, base: FusionConfig) -> str:
    values, known = config_dict(config), config_dict(base)
    return ", ".join(f"{name}={value}" for name, value in values.items() if value != known[name])


def _before(record: GraphRecord) -> GraphModule | None:
    return record.stages.get("aten")


def _after(record: GraphRecord) -> GraphModule | None:
    """The graph whose cost is what runs: the last stage reached.

    For Inductor, which fuses the parts that a semantic op is expanded into, it is the graph with the semantic ops still whole.
    """
    stages = [stage for stage in STAGES if stage != "lowered" or record.config.executor != "inductor"]
    reached = [record.stages[stage] for stage in stages if stage in record.stages]
    return reached[-1] if reached else None


def _nodes(graph: GraphModule | None) -> list[torch.fx.Node]:
    return [] if graph is None else list(graph.graph.nodes)


def _why_no_records(compiled: Any) -> str:
    if not compile_contexts_of(compiled):
        return 'it was never compiled. Give what torch.compile(..., backend="npu_fusion") returned'
    return "npu_fusion compiled no graph of it. Call it once before asking for the report, and see that its backend is npu_fusion"


def _describe(compiled: Any) -> str:
    name = getattr(compiled, "__qualname__", None) or type(compiled).__qualname__
    return f"{name!r}"
