"""Lowering: each semantic op becomes what the target runs.

A `Provider` says for which targets and semantic ops it can do that, which calls it cannot take and why, and how to rewrite the node. The
providers of a target are tried in the order of their rank; the reference, which every semantic op is born with, comes last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from .config import FusionConfig
from .lift import restore
from .record import GraphRecord
from .semantic import find_semantic_op

REFERENCE = "reference"


@dataclass(frozen=True, eq=False)
class Provider:
    """One way to run a semantic op on a target.

    Args:
        name: what the report shows, e.g. `npu.npu_rms_norm` or `triton.rms_norm`.
        op: the semantic op.
        targets: targets on which it exists.
        refuses: why this call cannot be taken (dtype, layout, size, ...), or None.
        lower: rewrites the node in place.
        rank: providers of lower rank are tried first.
    """

    name: str
    op: str
    targets: tuple[str, ...]
    refuses: Callable[[Node, FusionConfig], str | None]
    lower: Callable[[Graph, Node], None]
    rank: int = 0


_PROVIDERS: list[Provider] = []


def register_provider(*providers: Provider) -> None:
    """Add providers; what lowerings/ do when they are imported."""
    _PROVIDERS.extend(providers)


def providers_of(op: str, target: str) -> list[Provider]:
    """The providers of a semantic op on a target, best first, without the reference."""
    return sorted((p for p in _PROVIDERS if p.op == op and target in p.targets), key=lambda p: p.rank)


def lower_graph(gm: GraphModule, config: FusionConfig, record: GraphRecord) -> None:
    """Lower all semantic ops of the graph for `config.target`, in place; lifted ops that no rule took become what they were.

    Fills `lowered_to` of the record's sites, and `reason` where a better provider had to be passed over.
    """
    chosen: dict[str, tuple[str, str | None]] = {}
    for node in list(gm.graph.nodes):
        op = find_semantic_op(node.target)
        if op is not None:
            chosen[node.name] = _lower(gm.graph, node, providers_of(op.name, config.target), config)
    record.sites[:] = [
        dataclasses.replace(site, lowered_to=chosen[site.call][0], reason=chosen[site.call][1]) if site.call in chosen else site
        for site in record.sites
    ]
    restore(gm)
    gm.recompile()


def _lower(graph: Graph, node: Node, providers: Iterable[Provider], config: FusionConfig) -> tuple[str, str | None]:
    """Lower one node; the provider taken, and why those before it were not."""
    passed_over: list[str] = []
    for provider in providers:
        reason = provider.refuses(node, config)
        if reason is None:
            provider.lower(graph, node)
            return provider.name, "; ".join(passed_over) or None
        passed_over.append(f"{provider.name}: {reason}")
    return REFERENCE, "; ".join(passed_over) or None
