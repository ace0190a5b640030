"""`npu-fusion ops`: semantic ops, the rules that produce them, what runs them, and the table of Ascend ops."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..config import TARGETS
from ..lower import REFERENCE, providers_of
from ..rule import GroupRule, registered_rules
from ..semantic import SemanticOp, semantic_ops

if TYPE_CHECKING:
    from ..lowerings.ascend.table import AscendOp

SHORT_SOCS = {"ascend310p": "310P", "ascend910b": "A2", "ascend910_93": "A3", "ascend950": "A5"}
_REMARK = (
    "A2 is ascend910b, A3 ascend910_93, A5 ascend950. Capture: whether a captured graph may hold the op. Meta: torch_npu has a meta "
    "kernel. GE: torchair has a converter. Since: the oldest torch_npu with the op. Sources: docs/op-table.md, or --json."
)


def renderables(target: str) -> Iterator[RenderableType]:
    """What `npu-fusion ops --target` prints, top to bottom."""
    yield ops_table(target)
    yield rules_table()
    emitted = [op for op in _ascend_ops(target) if op.uses]
    others = [op for op in _ascend_ops(target) if not op.uses]
    if emitted:
        yield ascend_table(target, emitted)
        yield limits_table(target, emitted)
    if others:
        yield Text.assemble(("With a CPU kernel, never emitted: ", "bold"), ", ".join(op.shown for op in others), "\n")
    if emitted:
        yield Text(_REMARK, style="dim")


def as_data(target: str) -> dict[str, Any]:
    """The same as data that JSON can hold."""
    from ..lowerings.ascend.describe import op_record

    return {
        "target": target,
        "ops": [
            {"name": op.name, "family": op.family, "computes": _summary(op), "providers": _providers(op, target)} for op in semantic_ops()
        ],
        "rules": [
            {"name": rule.name, "produces": rule.produces, "idioms": _idioms(rule), "consumes": sorted(rule.consumes)}
            for rule in registered_rules()
        ],
        "ascend_ops": [op_record(op, target) for op in _ascend_ops(target)],
    }


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for heading in headings:
        table.add_column(heading)
    return table


def _summary(op: SemanticOp) -> str:
    return op.doc.split("\n", 1)[0]


def ops_table(target: str) -> Table:
    """Every semantic op with its family, what it computes, and its providers on a target, best first; on all of them for `auto`."""
    title = "Semantic ops" if target == "auto" else f"Semantic ops on {target}"
    table = _table(title, ("Op", "Family", "Computes", "Providers, best first"))
    for op in semantic_ops():
        table.add_row(op.name, op.family, _summary(op), ", ".join(_providers(op, target)))
    table.columns[-1].overflow = "fold"  # a name that is cut says nothing
    return table


def rules_table() -> Table:
    """Every rule of the package with the semantic op it produces and the idioms it recognises."""
    table = _table("Rules", ("Rule", "Produces", "Recognises", "Starts from"))
    for rule in registered_rules():
        idioms = ", ".join(_idioms(rule)) or "neighbouring calls"
        table.add_row(rule.name, rule.produces, idioms, ", ".join(sorted(rule.consumes)) or "ATen")
    return table


def _idioms(rule: Any) -> list[str]:
    return [] if isinstance(rule, GroupRule) else list(rule.idioms)


def _providers(op: SemanticOp, target: str) -> list[str]:
    if target != "auto":
        return [*dict.fromkeys(provider.name for provider in providers_of(op.name, target)), REFERENCE]
    targets: dict[str, list[str]] = defaultdict(list)
    for one in TARGETS:
        for name in dict.fromkeys(provider.name for provider in providers_of(op.name, one)):
            targets[name].append(one)
    return [*(f"{name} ({', '.join(where)})" for name, where in targets.items()), REFERENCE]


# -------------------------------------------------------------------- Ascend


def _ascend_ops(target: str) -> list[AscendOp]:
    """The ops of the table that exist on a target."""
    from ..lowerings.ascend.table import ascend_ops

    return [op for op in ascend_ops().values() if target in op.targets]


def ascend_table(target: str, ops: list[AscendOp]) -> Table:
    """One line an op: the results that are used, dtypes, SoCs, and where it can go."""
    from ..lowerings.ascend.describe import dtypes_of

    table = _table(f"Ascend ops on {target}", ())
    table.padding = (0, 1, 0, 0)
    table.add_column("Op", overflow="fold", max_width=38)
    table.add_column("Uses", overflow="fold", max_width=19)
    table.add_column("Dtypes", max_width=14)
    for heading in ("SoCs", "Capture", "Meta", "GE", "Since"):
        table.add_column(heading, no_wrap=True)
    for op in ops:
        capture = Text("safe", style="green") if op.capturable else Text("no", style="yellow")
        socs = " ".join(SHORT_SOCS.get(soc, soc) for soc in op.targets)
        table.add_row(
            op.shown, " ".join(op.uses), " ".join(dtypes_of(op, target)), socs, capture, _yes(op.meta), _yes(op.ge_converter), op.since
        )
    return table


def limits_table(target: str, ops: list[AscendOp]) -> Table:
    """What every op computes and what its calls must keep to."""
    from ..lowerings.ascend.describe import limit_lines

    table = _table(f"What they compute, and limits on {target}", ())
    table.add_column("Op", overflow="fold", ratio=3)
    table.add_column("", ratio=7)
    for op in ops:
        lines = Text(op.computes)
        for line in limit_lines(op, target):
            lines.append(f"\n- {line}", style="dim")
        if op.host_lists:
            lines.append(
                f"\n- a capture freezes {', '.join(op.host_lists)}: lists that the host reads, to be updated before a replay", style="dim"
            )
        if not op.capturable:
            lines.append(f"\n- not in a captured graph: {op.capture}", style="yellow")
        table.add_row(op.shown, lines)
    return table


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
