"""`npu-fusion ops`: semantic ops, the rules that produce them, and what runs them."""

from __future__ import annotations

from collections import defaultdict

from rich import box
from rich.table import Table

from ..config import TARGETS
from ..lower import REFERENCE, providers_of
from ..rule import GroupRule, registered_rules
from ..semantic import SemanticOp, semantic_ops


def ops_table(target: str) -> Table:
    """Every semantic op with its family, what it computes, and its providers on a target, best first; on all of them for `auto`."""
    title = "Semantic ops" if target == "auto" else f"Semantic ops on {target}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for heading in ("Op", "Family", "Computes", "Providers, best first"):
        table.add_column(heading)
    for op in semantic_ops():
        table.add_row(op.name, op.family, op.doc.split("\n", 1)[0], ", ".join(_providers(op, target)))
    return table


def rules_table() -> Table:
    """Every rule of the package with the semantic op it produces and the idioms it recognises."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Rules", title_justify="left", title_style="bold")
    for heading in ("Rule", "Produces", "Recognises", "Starts from"):
        table.add_column(heading)
    for rule in registered_rules():
        idioms = "neighbouring calls" if isinstance(rule, GroupRule) else ", ".join(rule.idioms)
        table.add_row(rule.name, rule.produces, idioms, ", ".join(sorted(rule.consumes)) or "ATen")
    return table


def _providers(op: SemanticOp, target: str) -> list[str]:
    if target != "auto":
        return [*(provider.name for provider in providers_of(op.name, target)), REFERENCE]
    targets: dict[str, list[str]] = defaultdict(list)
    for one in TARGETS:
        for provider in providers_of(op.name, one):
            targets[provider.name].append(one)
    return [*(f"{name} ({', '.join(where)})" for name, where in targets.items()), REFERENCE]
