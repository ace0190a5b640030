"""`npu-fusion ops`: semantic ops, and the rules that produce them."""

from __future__ import annotations

from collections import defaultdict

from rich import box
from rich.table import Table

from .. import ops, patterns  # noqa: F401  (declare ops and rules)
from ..rule import registered_rules
from ..semantic import SemanticOp, semantic_ops


def ops_table() -> Table:
    """Every semantic op with its family, what it computes, and the rules that produce it."""
    makers: dict[str, list[str]] = defaultdict(list)
    for rule in registered_rules():
        makers[rule.produces].append(rule.name)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Semantic ops", title_justify="left", title_style="bold")
    for heading in ("Op", "Family", "Computes", "Made by rule"):
        table.add_column(heading)
    for op in semantic_ops():
        table.add_row(op.name, op.family, _summary(op), ", ".join(makers[op.name]) or "[dim]none[/]")
    return table


def _summary(op: SemanticOp) -> str:
    return op.doc.split("\n", 1)[0]
