"""Tensor-parallel layers: a matrix product with the collective next to it, as DTensor and functional collectives make them.

    wait(all_reduce(x @ weight + bias, "sum", group))         # RowwiseParallel
    wait(all_gather(x, group)) @ weight + bias                # ColwiseParallel behind SequenceParallel
    wait(reduce_scatter(x @ weight + bias, "sum", group))     # RowwiseParallel before SequenceParallel

The view has made coalesced collectives single ones, and the in-place ones of torch.distributed, which Dynamo writes as functional ones and
a copy, the same. DTensor gathers and scatters along a dimension other than the first by chunks that it joins along that dimension: of one
sequence [1, S, H] that moves nothing, and the view has a reshape there; of a batch it moves tokens, and the collective stays apart.

A fused call stands where the wait was. What is read besides by others is kept: gathered tokens are a result of the fused op; a product that
somebody else reads before its reduction is not computed twice, but left alone.

Where nothing on the target takes a call the model's ops stay as they are: taken apart after all, the product and the collective would stand
side by side, where the model may have had other work between them.

Sources: Megatron-LM, https://arxiv.org/abs/1909.08053; Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198;
torch.distributed.tensor.parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.fx import Node

from npu_fusion.cost import node_launches
from npu_fusion.lower import providers_of
from npu_fusion.match import Match
from npu_fusion.ops.tensor_parallel import all_gather_linear, linear_all_reduce, linear_reduce_scatter
from npu_fusion.pattern import AttrAs, any_of, op, op_any_args, opt_view, var
from npu_fusion.rule import Call, Reject, Rule, register_builtin
from npu_fusion.semantic import SemanticOp
from npu_fusion.view import Value
from npu_fusion.view.shapes import known_equal, product
from npu_fusion.whole import why_not_whole

x, weight, bias = var("x"), var("weight"), var("bias")
GROUP, RANKS = AttrAs("group"), AttrAs("ranks")

multiplied = op("matmul", x, weight).as_("product")
layer = any_of(multiplied + bias, multiplied).as_("layer")
rows = opt_view(layer, "reshape").as_("rows")

# -------------------------------------------------------------------- what the rules share


def _joins_chunks(joined: Value) -> bool:
    """Whether the value is chunks of another one, joined along another dimension: DTensor's way to a dimension that is not the first."""
    sources = {part.args[0] for part in joined.args if part.op == "slice"}
    return len(sources) == 1 and all(part.op == "slice" and part.attrs["dim"] != joined.attrs["dim"] for part in joined.args)


def _joins_gathered(joined: Value) -> bool:
    return _joins_chunks(joined) and joined.args[0].args[0].op == "wait"


joined_chunks = op_any_args("cat").where(_joins_chunks, "no chunks are joined").as_("moved")
joined_gathered = op_any_args("cat").where(_joins_gathered, "no gathered chunks are joined").as_("moved")


def _flat(m: Match, value: Value) -> Value:
    """The value [..., W] as rows [M, W]."""
    return m.view.canon.reshape(value, (product(value.shape[:-1]), value.shape[-1]))


def _check_layer(m: Match) -> Reject | None:
    """The product is of rows with one matrix, in one dtype, and takes up a bias vector at most; the collective does not move its rows."""
    if "moved" in m:
        return Reject(
            "the tokens of several sequences are put into another order, as their collective is not along the first dimension", m["moved"]
        )
    multiplied_by: Value = m["weight"]
    if multiplied_by.ndim != 2:
        return Reject("the rows are not multiplied with one matrix", multiplied_by)
    if not m["product"].dtype.is_floating_point or m["x"].dtype != multiplied_by.dtype:
        return Reject("the operands are not of one floating-point dtype", m["product"])
    if "bias" in m and not (m["bias"].ndim == 1 and known_equal(m["bias"].shape[0], multiplied_by.shape[1])):
        return Reject("what is added before the reduction is not one vector along the outputs", m["bias"])
    if "bias" in m and m["bias"].dtype != multiplied_by.dtype:
        return Reject("the bias has another dtype", m["bias"])
    return None


def _check_target(m: Match, semantic: SemanticOp, arguments: Mapping[str, Any]) -> Reject | None:
    """Something on the target takes the call."""
    if not providers_of(semantic.name, m.config.target):
        return Reject(f"nothing on {m.config.target} is known to compute it as one", m.root, progress=8)
    reason = why_not_whole(semantic.name, arguments, m.config)
    return None if reason is None else Reject(f"left as the model has it: {reason}", m.root, progress=9)


def _nodes(m: Match, value: Value) -> Iterator[Node]:
    """The nodes of a value, in whatever shape."""
    base = value.args[0] if value.op == "reshape" else value
    for member in (base, *(user for user in base.users if user.op == "reshape")):
        yield from m.view.nodes.get(member, ())


def _read_elsewhere(m: Match, start: Value, end: Value) -> bool:
    """Whether anything but the match reads what becomes of `start` on the way to `end`.

    Equal products are one value: only the nodes that `end` is computed from count.
    """
    ends, inside = set(_nodes(m, end)), {node for value in m.visited for node in _nodes(m, value)}
    starts = set(_nodes(m, start))
    stack, seen = list(starts & _ancestors(m, ends, starts)), set[Node]()
    while stack:
        node = stack.pop()
        if node in seen or node in ends or _is_of_another(m, node):
            continue
        seen.add(node)
        for user in node.users:
            if user.op != "call_function" or (user not in inside and node_launches(user) and not _is_coalesced(m, user)):
                return True
            stack.append(user)
    return False


def _ancestors(m: Match, nodes: Iterable[Node], oldest: Iterable[Node]) -> set[Node]:
    """The nodes and what they are computed from, back to the first of the oldest."""
    first = min((m.view.position[node] for node in oldest), default=0)
    stack, found = list(nodes), set[Node]()
    while stack:
        node = stack.pop()
        if node not in found and m.view.position[node] >= first:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _is_coalesced(m: Match, node: Node) -> bool:
    """Whether the node calls the match's collective together with others."""
    return any(part in m.visited for part in m.view.of[node].attrs.get("parts", ()))


def _is_of_another(m: Match, node: Node) -> bool:
    """Whether the node is another tensor's part of the match's coalesced collective."""
    value = m.view.of[node]
    return value.op == m["collective"].op and value is not m["collective"]


# -------------------------------------------------------------------- matrix product, then a reduction


def _arguments(m: Match) -> dict[str, Any]:
    """What the ops have in common, but for x."""
    given = {"weight": m["weight"], "bias": m.get("bias"), "group": m["group"]}
    return given | ({"ranks": m["ranks"]} if "ranks" in m else {})


def _reduced_arguments(m: Match) -> dict[str, Any]:
    return {"x": _flat(m, m["x"]), **_arguments(m)}


def _check_reduced(m: Match, semantic: SemanticOp) -> Reject | None:
    rejected = _check_layer(m)
    if rejected is not None:
        return rejected
    if not known_equal(m["rows"].shape[-1], m["layer"].shape[-1]):
        return Reject("what is reduced does not have the rows of the product", m["rows"])
    if _read_elsewhere(m, m["product"], m.root):
        return Reject("this rank's product is read besides, before it is reduced", m["product"])
    return _check_target(m, semantic, _reduced_arguments(m))


def check_linear_all_reduce(m: Match) -> Reject | None:
    return _check_reduced(m, linear_all_reduce)


def rewrite_linear_all_reduce(m: Match) -> Call:
    return Call(linear_all_reduce, _reduced_arguments(m), [_flat(m, m.root)])


LINEAR_ALL_REDUCE = Rule(
    "linear_all_reduce",
    pattern=op("wait", op("all_reduce", rows, reduction="sum", group=GROUP).as_("collective")).as_("site"),
    check=check_linear_all_reduce,
    rewrite=rewrite_linear_all_reduce,
    produces="linear_all_reduce",
    idioms={"linear_all_reduce": "site"},
    gist=op("wait", op("all_reduce", rows)).as_("site"),
)


def check_linear_reduce_scatter(m: Match) -> Reject | None:
    return _check_reduced(m, linear_reduce_scatter)


def rewrite_linear_reduce_scatter(m: Match) -> Call:
    return Call(linear_reduce_scatter, _reduced_arguments(m), [_flat(m, m.root)])


LINEAR_REDUCE_SCATTER = Rule(
    "linear_reduce_scatter",
    pattern=op("wait", op("reduce_scatter", any_of(rows, joined_chunks), reduction="sum", group=GROUP, ranks=RANKS).as_("collective")).as_(
        "site"
    ),
    check=check_linear_reduce_scatter,
    rewrite=rewrite_linear_reduce_scatter,
    produces="linear_reduce_scatter",
    idioms={"linear_reduce_scatter": "site"},
    gist=op("wait", op("reduce_scatter", any_of(rows, joined_chunks))).as_("site"),
)

# -------------------------------------------------------------------- all-gather, then a matrix product

shard = var("shard")
gathered = op("wait", op("all_gather", shard, group=GROUP, ranks=RANKS).as_("collective")).as_("gathered")
gathered_rows = opt_view(any_of(gathered, joined_gathered), "reshape").as_("x")
of_gathered = op("matmul", gathered_rows, weight).as_("product")


def _gathered_arguments(m: Match) -> dict[str, Any]:
    return {"x": _flat(m, m["shard"]), **_arguments(m)}


def check_all_gather_linear(m: Match) -> Reject | None:
    """The gathered rows are multiplied as they come; a bias is taken up if nobody reads the product without it."""
    rejected = _check_layer(m)
    if rejected is not None:
        return rejected
    if m["shard"].ndim < 2 or not known_equal(m["x"].shape[-1], m["gathered"].shape[-1]):
        return Reject("what is multiplied does not have the rows that were gathered", m["x"])
    if "bias" in m and _read_elsewhere(m, m["product"], m.root):
        return Reject("the product is read besides, before the bias is added", m["product"])
    if not any(_nodes(m, m.root)):
        return Reject("the product is computed with its bias only", m.root)
    return _check_target(m, all_gather_linear, _gathered_arguments(m))


def rewrite_all_gather_linear(m: Match) -> Call:
    return Call(all_gather_linear, _gathered_arguments(m), [_flat(m, m.root), _flat(m, m["gathered"])])


ALL_GATHER_LINEAR = Rule(
    "all_gather_linear",
    pattern=any_of(of_gathered + bias, of_gathered).as_("site"),
    check=check_all_gather_linear,
    rewrite=rewrite_all_gather_linear,
    produces="all_gather_linear",
    idioms={"all_gather_linear": "gathered"},
    gist=op("matmul", opt_view(any_of(gathered, joined_gathered).as_("site"), "reshape"), weight),
)

register_builtin(LINEAR_ALL_REDUCE, LINEAR_REDUCE_SCATTER, ALL_GATHER_LINEAR)
