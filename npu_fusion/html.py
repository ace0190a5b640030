"""A `FusionReport` as one self-contained HTML page: no external assets, and all content readable with JavaScript switched off.

The page shows the summary, every site, the misses with their reasons, and for each graph the nodes before and after fusion side by side.
Nodes are grouped into sections by module (one for each layer, or submodule outside of the layers); the sections of both sides are
aligned, so that what a fused op replaced stands beside it. A fused op and the nodes it replaced share a colour and light up together.

The nodes that a semantic op replaced are read from `node.meta["npu_fusion_replaced"]`, a list of names in the `aten` graph.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch.fx import GraphModule, Node

from .cost import node_launches
from .provenance import module_of, source_of
from .record import IDIOMS, GraphRecord, Site
from .report import FusionReport, package_version, short_source
from .semantic import find_semantic_op
from .table import config_line, cost_text, group_misses, headline, passed_over, places

REPLACED = "npu_fusion_replaced"
MAX_ARGS = 90
SMALL_GRAPH = 60
_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


@dataclass(frozen=True)
class Row:
    """One node as the page shows it.

    Attributes:
        anchor: id of the row in the page.
        region: number of the fused op that it is or that replaced it, or None.
        colour: index into the page's palette, by semantic op.
        partner: anchor of a row on the other side to jump to, or None.
        free: whether the node launches nothing (a view).
        miss: the reason, when a missed site ends here.
    """

    anchor: str
    name: str
    op: str
    args: str
    type: str
    source: str
    module: str
    free: bool
    fused: bool = False
    region: str | None = None
    colour: int | None = None
    partner: str | None = None
    runs_as: str | None = None
    miss: str | None = None


@dataclass
class Section:
    """Consecutive nodes of one layer."""

    key: str
    rows: list[Row] = field(default_factory=list)

    @property
    def fused(self) -> int:
        return sum(row.fused for row in self.rows)

    @property
    def launches(self) -> int:
        return sum(not row.free for row in self.rows)


@dataclass(frozen=True)
class GraphView:
    """One compiled graph: aligned pairs of sections before and after, and the listing of what runs."""

    index: int
    pairs: list[tuple[Section | None, Section | None]]
    lowered: list[Section]
    legend: list[tuple[str, int]]
    calls: int
    seconds: dict[str, float]

    @property
    def opened(self) -> frozenset[int]:
        """Pairs that are unfolded at first: all of a small graph, else the first layer that has a fused op or a miss."""
        if sum(len(section.rows) for pair in self.pairs for section in pair if section) <= SMALL_GRAPH:
            return frozenset(range(len(self.pairs)))
        telling = (number for number, pair in enumerate(self.pairs) if any(s and any(r.fused or r.miss for r in s.rows) for s in pair))
        return frozenset({next(telling, 0)})


def render_html(report: FusionReport) -> str:
    """The page as text."""
    template = _environment().get_template("report.html.jinja")
    covered, totals = report.idioms, report.totals
    return template.render(
        report=report,
        headline=headline(report),
        config=config_line(report),
        launches=cost_text(report.launches_before, report.launches_after),
        bytes=cost_text(report.bytes_before, report.bytes_after, unit="B"),
        idioms=[(idiom, covered[idiom], totals[idiom], _ops_of(report, idiom)) for idiom in IDIOMS if totals[idiom]],
        misses=[(idiom, reason, len(sites), places(sites)) for idiom, reason, sites in group_misses(report.missed)],
        passed_over=passed_over(report.sites),
        sites=_site_rows(report),
        graphs=[_graph_view(index, record) for index, record in enumerate(report.records)],
        versions=f"npu_fusion {package_version()}, torch {torch.__version__}",
    )


@cache
def _environment() -> Environment:
    loader = PackageLoader("npu_fusion")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short_source"] = short_source
    return environment


def _ops_of(report: FusionReport, idiom: str) -> str:
    pairs = {(site.op or "", site.lowered_to or "") for site in report.sites if site.fused and site.idiom == idiom}
    return ", ".join(f"{op} → {runs_as}" if runs_as else op for op, runs_as in sorted(pairs))


def _site_rows(report: FusionReport) -> list[tuple[int, Site, str]]:
    """Every site with the index of its graph and the anchor of its row in the graph, if it has one."""
    rows = []
    for index, record in enumerate(report.records):
        graph = record.stages.get("aten")
        names = {node.name for node in graph.graph.nodes} if graph is not None else set()
        rows += [(index, site, _anchor(index, "b", site.node) if site.node in names else "") for site in record.sites]
    return rows


def _graph_view(index: int, record: GraphRecord) -> GraphView:
    before, after, lowered = (record.stages.get(stage) for stage in ("aten", "fused", "lowered"))
    fused_nodes = _semantic_nodes(after)
    names = sorted({name for _, name in fused_nodes})
    colours = {name: number for number, name in enumerate(names)}
    region_of: dict[str, tuple[str, int, str]] = {}
    for node, name in fused_nodes:
        for replaced in node.meta.get(REPLACED, ()):
            region_of.setdefault(replaced, (f"{index}-{node.name}", colours[name], _anchor(index, "a", node.name)))
    misses = {site.node: f"{site.idiom}: {site.reason}" for site in record.sites if not site.fused and site.node}
    runs_as = {site.call: site.lowered_to for site in record.sites if site.fused and site.call}
    order = {node.name: position for position, node in enumerate(_calls(before))}
    left = _sections(_before_row(index, node, region_of, misses) for node in _calls(before))
    right = _sections(_after_row(index, node, colours, runs_as, order) for node in _calls(after))
    return GraphView(
        index=index,
        pairs=_align(left, right),
        lowered=_sections(_plain_row(_anchor(index, "l", node.name), node) for node in _calls(lowered)),
        legend=list(colours.items()),
        calls=record.calls,
        seconds=record.seconds,
    )


def _semantic_nodes(graph: GraphModule | None) -> list[tuple[Node, str]]:
    found = ((node, find_semantic_op(node.target)) for node in _calls(graph))
    return [(node, op.name) for node, op in found if op is not None]


def _calls(graph: GraphModule | None) -> list[Node]:
    return [] if graph is None else [node for node in graph.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


def _before_row(index: int, node: Node, region_of: dict[str, tuple[str, int, str]], misses: dict[str, str]) -> Row:
    region, colour, partner = region_of.get(node.name, (None, None, None))
    anchor = _anchor(index, "b", node.name)
    return _plain_row(anchor, node, region=region, colour=colour, partner=partner, miss=misses.get(node.name))


def _after_row(index: int, node: Node, colours: dict[str, int], runs_as: dict[str, str | None], order: dict[str, int]) -> Row:
    anchor = _anchor(index, "a", node.name)
    op = find_semantic_op(node.target)
    if op is None:
        return _plain_row(anchor, node)
    replaced = [name for name in node.meta.get(REPLACED, ()) if name in order]
    return _plain_row(
        anchor,
        node,
        fused=True,
        region=f"{index}-{node.name}",
        colour=colours[op.name],
        partner=_anchor(index, "b", min(replaced, key=order.__getitem__)) if replaced else None,
        runs_as=runs_as.get(node.name),
    )


def _plain_row(anchor: str, node: Node, **more: Any) -> Row:
    return Row(
        anchor=anchor,
        name=node.name,
        op=_op_name(node),
        args=_arguments(node),
        type=_type_text(node.meta.get("val")),
        source=source_of(node) or "",
        module=module_of(node) or "",
        free=node_launches(node) == 0,
        **more,
    )


def _sections(rows: Iterable[Row]) -> list[Section]:
    """Runs of rows of one layer; a node that names no module belongs to the run it stands in."""
    sections: list[Section] = []
    for row in rows:
        key = _section_key(row.module)
        if not sections or (row.module and sections[-1].key != key):
            sections.append(Section(key))
        sections[-1].rows.append(row)
    return sections


def _section_key(module: str) -> str:
    """The layer of a module path (`model.layers.3`), or its first two parts where there is no layer (`model.norm`)."""
    layer = _LAYER.match(module)
    return layer.group(1) if layer else ".".join(module.split(".")[:2])


def _align(left: Sequence[Section], right: Sequence[Section]) -> list[tuple[Section | None, Section | None]]:
    """Pairs of sections of one key, in order; a section that the other side lacks stands alone."""
    matcher = difflib.SequenceMatcher(a=[s.key for s in left], b=[s.key for s in right], autojunk=False)
    pairs: list[tuple[Section | None, Section | None]] = []
    for tag, l0, l1, r0, r1 in matcher.get_opcodes():
        if tag == "equal":
            pairs += zip(left[l0:l1], right[r0:r1], strict=True)
        else:
            pairs += [(section, None) for section in left[l0:l1]]
            pairs += [(None, section) for section in right[r0:r1]]
    return pairs


def _anchor(index: int, side: str, name: str | None) -> str:
    return f"g{index}-{side}-{name}"


def _op_name(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    name = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    return name.removesuffix(".default")


def _arguments(node: Node) -> str:
    parts = [_value_text(value) for value in node.args] + [f"{name}={_value_text(value)}" for name, value in node.kwargs.items()]
    text = ", ".join(parts)
    return text if len(text) <= MAX_ARGS else f"{text[: MAX_ARGS - 1]}…"


def _value_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value_text(item) for item in value)}]"
    if isinstance(value, torch.dtype):
        return _dtype_text(value)
    return value.name if isinstance(value, Node) else str(value)


def _type_text(value: Any) -> str:
    """`bf16[1, s27, 64]`; several for a tuple; the expression of a symbolic size."""
    if isinstance(value, torch.Tensor):
        return f"{_dtype_text(value.dtype)}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return ", ".join(text for text in (_type_text(item) for item in value) if text)
    return "" if value is None else str(value)


def _dtype_text(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))
