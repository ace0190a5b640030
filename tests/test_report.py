"""Reports and pages made of hand-made records: a real ATen graph, and the fused one that belongs to it."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sympy
import torch
from rich.console import Console
from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import npu_fusion.ops  # noqa: F401  (declares the semantic ops)
from npu_fusion.config import FusionConfig
from npu_fusion.errors import ConfigError, ReportError
from npu_fusion.html import REPLACED, render_html
from npu_fusion.record import GraphRecord, Site
from npu_fusion.report import JSON_SCHEMA_VERSION, FusionReport, report
from npu_fusion.table import as_text, cost_text, generic_path, human_bytes, places

HIDDEN = 8
REASON = "the variance is taken over <part> of the hidden size"


def plain_norm(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def fused_norm(x: Tensor, w: Tensor) -> Tensor:
    result: Tensor = torch.ops.npu_fusion.rms_norm(x, w, 1e-6)
    return result


def trace(function: object, *, dynamic: bool) -> GraphModule:
    """The graph of `function` over x [rows, 8] and w [8] in f32, with module paths as Dynamo leaves them."""
    kind = DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext([kind, DimDynamic.STATIC])
    x = mode.from_tensor(torch.ones(4, HIDDEN), symbolic_context=sizes, source=LocalSource("hidden"))
    w = mode.from_tensor(torch.ones(HIDDEN), symbolic_context=StatelessSymbolicContext([DimDynamic.STATIC]))
    with mode:
        gm = make_fx(function, tracing_mode="real")(x, w)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["nn_module_stack"] = {"norm": ("L['self'].model.layers.0.norm", torch.nn.Module)}
            node.meta["stack_trace"] = 'File "/somewhere/model.py", line 12, in forward\n    return norm(x)'
    return gm


def make_record(*, dynamic: bool = False, missed: int = 1) -> GraphRecord:
    """One RMSNorm fused, `missed` of them not."""
    aten, fused = trace(plain_norm, dynamic=dynamic), trace(fused_norm, dynamic=dynamic)
    calls = [node.name for node in aten.graph.nodes if node.op == "call_function"]
    (op,) = (node for node in fused.graph.nodes if node.op == "call_function")
    op.meta[REPLACED] = sorted(calls)
    place = "/somewhere/model.py:12"
    sites = [Site("rms_norm", True, "rms_norm", "reference", None, place, "model.layers.0.norm", calls[-1], "rms_norm", op.name)]
    sites += [
        Site("rms_norm", False, reason=REASON, source=place, module=f"model.layers.{layer}.norm", node=calls[0], rule="rms_norm")
        for layer in range(1, missed + 1)
    ]
    return GraphRecord(
        FusionConfig(target="cpu", executor="eager"),
        sites=sites,
        stages={"aten": aten, "fused": fused, "lowered": fused},
        notes=["weights were not merged"],
        rule_errors={"rope_half": "KeyError: 'cos'"},
        seconds={"aot": 0.25},
        calls=3,
    )


def make_report(**options: object) -> FusionReport:
    return FusionReport([make_record(**options)], graph_breaks=["Data-dependent branching, at model.py:27"])  # type: ignore[arg-type]


def test_counts() -> None:
    made = make_report(missed=2)
    assert made.idioms == {"rms_norm": 1}
    assert made.totals == {"rms_norm": 3}
    assert made.ops == {"rms_norm": 1}
    assert [site.fused for site in made.sites] == [True, False, False]
    assert made.missed == made.sites[1:]
    assert made.rule_errors == {"rope_half": "KeyError: 'cos'"}
    assert made.effective_config.target == "cpu"


def test_cost_before_and_after() -> None:
    made = make_report()
    assert (made.launches_before, made.launches_after) == (6, 1)
    x, w, r = 4 * HIDDEN * 4, HIDDEN * 4, 4 * 4
    pow_, mean, add, rsqrt, mul, weight = x + x, x + r, r + r, r + r, x + r + x, w + x + x
    assert made.bytes_before == pow_ + mean + add + rsqrt + mul + weight
    assert made.bytes_after == x + w + x


def test_symbols_of_several_graphs_are_kept_apart() -> None:
    first, second = make_record(dynamic=True), make_record(dynamic=True)
    (symbol,) = FusionReport([first]).bytes_after.free_symbols
    # Dynamo numbers symbols by a hash of their sources, so that two sources may have one name.
    size = next(iter(second.stages["aten"].graph.nodes)).meta["val"].shape[0]
    size.node.shape_env.var_to_sources[size.node.expr] = [LocalSource("other")]
    made = FusionReport([first, second])
    renamed = sympy.Symbol(f"{symbol}_1", **symbol.assumptions0)
    assert made.bytes_after == 64 * symbol + 64 * renamed + 64
    assert made.symbols == {str(symbol): "hidden.size(0)", f"{symbol}_1": "other"}


def test_symbols_of_one_meaning_are_summed() -> None:
    made = FusionReport([make_record(dynamic=True), make_record(dynamic=True)])
    (symbol,) = made.bytes_after.free_symbols
    assert made.bytes_after == 128 * symbol + 64
    assert made.launches_before == 12


def test_graph_of_a_stage() -> None:
    made = make_report()
    assert made.graph("fused") is made.records[0].stages["fused"]
    with pytest.raises(ReportError, match=r"unknown stage 'lifted'. Known: aten, fused, lowered"):
        made.graph("lifted")
    with pytest.raises(ReportError, match="no graph 1: 1 were compiled"):
        made.graph("aten", 1)
    del made.records[0].stages["lowered"]
    with pytest.raises(ReportError, match=r"never reached stage 'lowered'. Reached: aten, fused"):
        made.graph("lowered")


def test_expect_passes_and_returns_the_report() -> None:
    made = make_report()
    assert made.expect(rms_norm=1, rope=0) is made


def test_expect_lists_the_misses() -> None:
    with pytest.raises(AssertionError) as failure:
        make_report().expect(rms_norm=2, rope=1)
    lines = str(failure.value).splitlines()
    assert lines[0] == "rms_norm: 1 fused, 2 expected"
    assert lines[1] == f"  missed at model.py:12 (model.layers.1.norm): {REASON}"
    assert "rope: 0 fused, 1 expected" in lines
    assert "  no further occurrence was recognised" in lines


def test_expect_knows_its_idioms() -> None:
    with pytest.raises(ConfigError, match=r"unknown idiom 'rmsnorm'. Known: rms_norm, "):
        make_report().expect(rmsnorm=1)


def test_table() -> None:
    text = str(make_report(missed=3))
    assert text.startswith("npu_fusion: 1 of 4 sites fused (25%) in 1 graph\n")
    assert "model.py:12 model.layers.*.norm (x3)" in text
    assert REASON in " ".join(text.split())
    assert "6 → 1 (-83.3%)" in text
    assert "target=cpu executor=eager rounding=fp32_internal" in text
    assert "Data-dependent branching, at model.py:27" in text
    assert "rope_half: KeyError: 'cos'" in text
    assert "weights were not merged" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_provider_passed_over_is_told_of() -> None:
    record = make_record()
    record.sites[0] = dataclasses.replace(record.sites[0], reason="npu.npu_rms_norm: the hidden size 8 is not a multiple of 16")
    line = "rms_norm runs as reference (x1): npu.npu_rms_norm: the hidden size 8 is not a multiple of 16"
    assert line in str(FusionReport([record]))
    assert line in render_html(FusionReport([record]))
    assert FusionReport([record]).missed == FusionReport([make_record()]).missed


def test_table_names_symbols() -> None:
    made = make_report(dynamic=True)
    (symbol,) = made.bytes_after.free_symbols
    assert f"→ 64*{symbol} + 32" in str(made)
    assert f"{symbol} is hidden.size(0)" in str(made)


def test_table_fits_the_width_asked_for() -> None:
    assert max(map(len, as_text(make_report(), width=72).splitlines())) <= 72


def test_rich_prints_the_same_table_in_colour(capsys: pytest.CaptureFixture[str]) -> None:
    Console(force_terminal=True, color_system="standard", width=120).print(make_report())
    assert "\x1b[" in capsys.readouterr().out


def test_report_without_graphs() -> None:
    empty = FusionReport([], config=FusionConfig(target="ascend910b"))
    assert str(empty).startswith("npu_fusion: no idiom was recognised in 0 graphs")
    assert empty.launches_before == 0
    assert empty.effective_config.target == "ascend910b"
    assert "no idiom" in render_html(empty)


def test_graphs_of_unlike_configuration_are_noted() -> None:
    other = make_record()
    other.config = FusionConfig(target="cuda", executor="inductor")
    assert "graph 1 differs in its configuration: target=cuda, executor=inductor" in FusionReport([make_record(), other]).notes


def test_json() -> None:
    made = json.loads(make_report().to_json())
    assert made["schema_version"] == JSON_SCHEMA_VERSION
    assert made["idioms"] == {"rms_norm": {"covered": 1, "total": 2}}
    assert made["ops"] == {"rms_norm": 1}
    assert made["launches"] == {"before": "6", "after": "1"}
    assert made["config"]["target"] == "cpu"
    assert made["graphs"][0]["calls"] == 3
    assert made["sites"][1]["reason"] == REASON
    assert set(made) == {
        *("schema_version", "npu_fusion", "torch", "config", "graphs", "idioms", "ops", "sites", "launches", "bytes", "symbols"),
        *("graph_breaks", "notes", "rule_errors"),
    }


class Page(HTMLParser):
    """What a page links to and loads, its rows by id, and whether its tags are closed in order."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: dict[str, dict[str, str | None]] = {}
        self.links: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if values.get("id"):
            assert values["id"] not in self.ids
            self.ids[str(values["id"])] = values
        if tag == "a":
            self.links.append(str(values["href"]))
        self.loads += [str(values[name]) for name in ("src",) if values.get(name)]
        assert tag != "link"

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" and self.open[-1] != "p":
            raise AssertionError("a paragraph holds a block")
        assert self.open.pop() == tag


def test_html_is_self_contained_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    path = make_report(missed=3, dynamic=True).to_html(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.loads
    assert "http" not in text
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)


def test_html_ties_a_fused_op_to_the_nodes_it_replaced() -> None:
    made = make_report()
    page = Page(render_html(made))
    op = next(node.name for node in made.graph("fused").graph.nodes if node.op == "call_function")
    region = page.ids[f"g0-a-{op}"]["data-r"]
    before = [node.name for node in made.graph("aten").graph.nodes if node.op == "call_function"]
    assert region
    assert [page.ids[f"g0-b-{name}"]["data-r"] for name in before] == [region] * len(before)
    assert f"#g0-b-{before[0]}" in page.links


def test_html_shows_reasons_types_and_sources_escaped() -> None:
    text = render_html(make_report(dynamic=True))
    assert "<part>" not in text
    assert "&lt;part&gt;" in text
    assert "f32[4, 1]" in render_html(make_report())
    assert "model.py:12" in text


def test_report_of_what_ran() -> None:
    compiled = torch.compile(plain_norm, backend="npu_fusion")
    with pytest.raises(ReportError, match="Call it once before asking for the report"):
        report(compiled)
    with torch.no_grad():
        compiled(torch.ones(2, HIDDEN), torch.ones(HIDDEN))
        compiled(torch.ones(2, HIDDEN), torch.ones(HIDDEN))
    made = report(compiled).expect(rms_norm=1)
    assert [record.calls for record in made.records] == [2]
    assert made.effective_config == FusionConfig(target="cpu", executor="eager")
    assert {site.lowered_to for site in made.sites} == {"reference"}


def test_report_of_something_else() -> None:
    with pytest.raises(ReportError, match="'Linear': it was never compiled"):
        report(torch.nn.Linear(2, 2))
    other = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    with torch.no_grad():
        other(torch.ones(1, 2))
    with pytest.raises(ReportError, match="see that its backend is npu_fusion"):
        report(other)


def test_words() -> None:
    assert human_bytes(999) == "999 B"
    assert human_bytes(1_234_567) == "1.23 MB"
    assert cost_text(sympy.Integer(1000), sympy.Integer(900)) == "1,000 → 900 (-10.0%)"
    assert generic_path("model.layers.3.mlp.experts[12].act") == "model.layers.*.mlp.experts*.act"
    assert places([Site("rope", False)]) == ["an unknown place"]
