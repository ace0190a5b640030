"""What one compilation knows of itself: the raw material of a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import GraphModule

from .assume import Assumptions
from .config import FusionConfig
from .prepare import WeightPreparer
from .verify import Check
from .weights import WeightMerger

IDIOMS = (
    "rms_norm",
    "gated_rms_norm",
    "l2_norm",
    "layer_norm",
    "residual_add",
    "rope",
    "glu",
    "quantize",
    "dequantize",
    "attention",
    "router",
    "experts",
    "mla",
    "lora",
    "conv1d",
    "delta_rule",
    "tri_inv",
    "kv_update",
    "bmm_transpose",
    "linear_all_reduce",
    "all_gather_linear",
    "linear_reduce_scatter",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One occurrence of an idiom in the model.

    Attributes:
        idiom: one of `IDIOMS`.
        fused: whether a fused op really computes it in the final graph.
        op: the semantic op that absorbed it, without namespace, or None.
        lowered_to: what the target runs for that op, e.g. `reference` or `npu.npu_rms_norm`, or None.
        reason: for a miss, the constraint that failed, in words for the model's author.
        source: `file.py:line` in the author's code.
        module: path of the nn.Module, e.g. `model.layers.0.input_layernorm`.
        node: name of the node in the ATen graph at which the idiom ends, or at which the match stopped.
        rule: the rule that took the site or came nearest to it.
        call: name of the fused op's node in the fused graph.
    """

    idiom: str
    fused: bool
    op: str | None = None
    lowered_to: str | None = None
    reason: str | None = None
    source: str | None = None
    module: str | None = None
    node: str | None = None
    rule: str | None = None
    call: str | None = None


@dataclass
class GraphRecord:
    """One compiled graph: its sites, its stages and what was decided about it.

    Attributes:
        config: the configuration in force, with `target` and `executor` resolved.
        sites: every site, fused or missed.
        stages: the graph after a stage: `aten`, `merged` (with merged weights, for `verify=True`), `fused`, `lowered`.
        notes: decisions that concern the whole graph, e.g. that a training graph was left unfused.
        rule_errors: rule name to the exception that made it skip a site.
        seconds: stage to the seconds spent in it.
        checks: what `verify=True` compares on the first run.
        weights: what supplies the merged weights that the graph takes as further inputs; None where there are none.
        prepared: what supplies the weights that are kept as kernels want them; None where there are none.
        assumptions: which numbers of the model's buffers the graph relies on; None where on none.
        graph_break: why Dynamo ended the graph before the function did; None where it did not.
        calls: how often the compiled graph ran.
        dry_run: whether the graph is compiled to be looked at, for a target that need not be here, and never runs.
    """

    config: FusionConfig
    sites: list[Site] = field(default_factory=list)
    stages: dict[str, GraphModule] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rule_errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    weights: WeightMerger | None = None
    prepared: WeightPreparer | None = None
    assumptions: Assumptions | None = None
    graph_break: str | None = None
    calls: int = 0
    dry_run: bool = False
