"""Tensor-parallel layers on Ascend: `npu_mm_all_reduce_base`, `npu_all_gather_base_mm`, `npu_mm_reduce_scatter_base`.

What an op does not take is known before the graph is rewritten, and then the model's product and collective stay where they are.

- The all-reduce is Ascend910B's (A2) alone, in groups of 1, 2, 4 or 8. It is meant for prefill: where sequences have one token for
  certain the product and the all-reduce stay apart, and so they do under an executor that captures, as nobody says that a capture may
  hold it. No op of torch_npu adds a residual and normalises as well (CANN's aclnnMatmulAllReduceAddRmsNorm is not exposed; `x3` is added
  on each rank *before* the reduction): add + RMSNorm are fused by themselves.
- Gather and scatter are called in mode `aiv`, the one for inference. torchair cannot convert that.
- Of the group the ops want HCCL's name, which this process has once the group's communicator exists: it is made here if need be, on all
  ranks, as all of them compile.

Source: op-plugin docs of the three ops; torchair's converters in torch_npu 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Node

from ...config import FusionConfig
from ...errors import CollectiveError
from ...lower import Arguments, Builder
from ...moe.ascend import communicator
from ...moe.transport import resolve
from ...view import Value
from ...view.shapes import known_equal
from ...whole import register_whole
from . import library
from .provide import Npu, provides
from .table import SOCS, ascend_ops, find_op

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "npu::npu_mm_all_reduce_base", "npu::npu_all_gather_base_mm", "npu::npu_mm_reduce_scatter_base"
_RANKS = (1, 2, 4, 8)
_CAPTURING = ("graph", "npugraph_ex")

# -------------------------------------------------------------------- what they take


def _why_not_group(name: str, ranks: int | None) -> str | None:
    try:
        found = resolve(name, ranks).ranks
    except CollectiveError as error:
        return str(error)
    if ranks is None and found not in _RANKS:
        return f"the group has {found} ranks, not {', '.join(map(str, _RANKS))}"
    return None


def _has_one_token(x: Any) -> bool:
    """Whether the rows are those of sequences [..., 1, K]; of rows whose sequences are not known, whether there is one."""
    behind = x.args[0] if isinstance(x, Value) and x.op == "reshape" and x.args[0].ndim > 2 else x
    return known_equal(behind.shape[-2], 1)


def _why_not_all_reduce(a: Mapping[str, Any], config: FusionConfig) -> str | None:
    if config.executor in _CAPTURING:
        return f"executor {config.executor}: {ascend_ops()[ALL_REDUCE].capture}"
    if _has_one_token(a["x"]):
        return "the sequences have one token: the op is for prefill"
    return _why_not_group(a["group"], None)


def _why_not_sharded(a: Mapping[str, Any], config: FusionConfig) -> str | None:
    if config.executor == "torchair":
        return "torchair cannot convert its mode for inference, aiv"
    return _why_not_group(a["group"], a["ranks"])


def _beforehand(name: str, semantic: str, why_not: Callable[[Mapping[str, Any], FusionConfig], str | None]) -> None:
    """Register what says, of values of the view, whether the op takes a call: what `why_not` says, and the limits of the table."""
    op = ascend_ops()[name]

    @register_whole(semantic, [target for target in op.targets if target in SOCS])
    def ask(a: Mapping[str, Any], config: FusionConfig) -> str | None:
        first, second = (argument.name for argument in _schema(name)[:2])
        given = {argument.name: argument.default_value for argument in _schema(name)}
        given |= {first: a["x"], second: a["weight"], "bias": a["bias"], **_options(name, a)}
        return why_not(a, config) or op.refusal(given, config.target)


def _schema(name: str) -> Any:
    library.prepare()
    overload = library.overload_of(ascend_ops()[name])
    assert overload is not None
    return overload._schema.arguments


def _options(name: str, a: Mapping[str, Any]) -> dict[str, Any]:
    return {} if name == ALL_REDUCE else {"world_size": a["ranks"], "comm_mode": "aiv"}


_beforehand(ALL_REDUCE, "linear_all_reduce", _why_not_all_reduce)
_beforehand(ALL_GATHER, "all_gather_linear", _why_not_sharded)
_beforehand(REDUCE_SCATTER, "linear_reduce_scatter", _why_not_sharded)

# -------------------------------------------------------------------- calls


def _hcom(b: Builder, group: str) -> str:
    """The name by which the op knows the group: HCCL's, or on CPU tensors, and where nothing runs, the group's own."""
    members = resolve(group, None)
    name = group if b.config.emulate or b.dry_run else communicator(members.process_group, members.rank)
    if b.config.target == "ascend910b":
        others = {str(node.args[2]) for node in b.graph.nodes if (op := find_op(node.target)) is not None and op.name in _ALL}
        b.require(others <= {name}, "on ascend910b all fused products of a model must be of one group, and another one came first")
    return name


_ALL = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER)


@provides("linear_all_reduce", ALL_REDUCE)
def linear_all_reduce(b: Builder, a: Arguments, npu: Npu) -> Node:
    x, weight, bias, group = a.x, a.weight, a.bias, a.group
    reason = _why_not_all_reduce({"x": b.val(x), "group": group}, b.config)
    b.require(reason is None, str(reason))
    y: Node = npu(ALL_REDUCE, b.contiguous(x), weight, _hcom(b, group), bias=bias)
    return y


@provides("all_gather_linear", ALL_GATHER)
def all_gather_linear(b: Builder, a: Arguments, npu: Npu) -> list[Node]:
    x, weight, bias, group, ranks = a.x, a.weight, a.bias, a.group, a.ranks
    reason = _why_not_sharded({"group": group, "ranks": ranks}, b.config)
    b.require(reason is None, str(reason))
    found: list[Node] = npu(ALL_GATHER, b.contiguous(x), weight, _hcom(b, group), ranks, bias=bias, comm_mode="aiv")
    return found


@provides("linear_reduce_scatter", REDUCE_SCATTER)
def linear_reduce_scatter(b: Builder, a: Arguments, npu: Npu) -> Node:
    x, weight, bias, group, ranks = a.x, a.weight, a.bias, a.group, a.ranks
    reason = _why_not_sharded({"group": group, "ranks": ranks}, b.config)
    b.require(reason is None, str(reason))
    y: Node = npu(REDUCE_SCATTER, b.contiguous(x), weight, _hcom(b, group), ranks, bias=bias, comm_mode="aiv")
    return y
