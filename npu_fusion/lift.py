"""Lift: torch functions that AOT would dissolve become opaque ops `npu_fusion_lifted::*`, before AOT sees them.

`scaled_dot_product_attention` and `rms_norm` are composites: AOT takes them apart, and differently on each device and torch release.
In the Dynamo graph they are still whole, with every argument as the author wrote it. A lifted op stands for the very same call; rules match
it in the ATen graph, and one that no rule takes is put back by `restore`.

The two differ in one thing only: the layout of a lifted op's result is fixed (`Lifted.layout`), where torch leaves it to the kernel it
happens to choose. Code after the call was traced with the layout torch told Dynamo of, so that `lift` compares the two, and makes the
result contiguous, or leaves the call alone, where somebody could notice.

Lifted ops have no autograd, autocast, batching or sharding rules: `lift` leaves graphs alone that would need one, and says why.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from . import torch_private

NAMESPACE = "npu_fusion_lifted"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Lifted:
    """One entry of the table of lifted ops.

    Attributes:
        name: the op is `torch.ops.npu_fusion_lifted.<name>`.
        schema: arguments, named and defaulted as the torch functions have them, and the result.
        origins: the Python functions it stands for in a Dynamo graph.
        aten: the op it stands for in an exported graph, and to which `restore` lowers it back.
        like: a tensor argument's name; the result has that tensor's dtype and device, and its strides where the shapes agree.
        refuse: reads the values of a call's arguments; the reason why it must stay as it is, or None.
        resolve: the arguments that the lifted op takes in place of the author's, e.g. a number for `eps=None`.
        result_shape: the result's shape, from the arguments of a call.
    """

    name: str
    schema: str
    origins: tuple[Callable[..., Any], ...]
    aten: OpOverload
    like: str
    refuse: Callable[[dict[str, Any]], str | None]
    resolve: Callable[[dict[str, Any]], dict[str, Any]]
    result_shape: Callable[..., Sequence[Any]]

    @property
    def overload(self) -> OpOverload:
        """The torch operator, for `node.target`."""
        overload: OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        return overload

    @property
    def parameters(self) -> dict[str, Any]:
        """Argument names in order, with their defaults (None where there is none)."""
        return {arg.name: arg.default_value if arg.has_default_value() else None for arg in self.aten._schema.arguments}

    def layout(self, like: Tensor, shape: Sequence[Any]) -> Tensor:
        """An uninitialised result: strides as `torch.empty_like(like)` where the shapes agree, else contiguous."""
        if len(shape) == like.dim() and all(statically_known_true(a == b) for a, b in zip(shape, like.shape, strict=True)):
            return torch.empty_like(like)
        return like.new_empty(shape)

    def fake(self, *args: Any, **kwargs: Any) -> Tensor:
        """Metadata of the result; accepts symbolic sizes and adds no guard."""
        call = bind(self, args, kwargs)
        return self.layout(call[self.like], self.result_shape(**call))

    def implementation(self, *args: Any, **kwargs: Any) -> Tensor:
        """What torch computes, in the layout that `fake` promises."""
        result: Tensor = self.aten(*args, **kwargs)
        expected = self.fake(*args, **kwargs)
        return result if result.stride() == expected.stride() else expected.copy_(result)


@dataclass
class LiftReport:
    """What `lift` did to one graph: op name to number of calls lifted, and (node name, reason) of the calls it left alone."""

    lifted: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """The reasons, one line each, for a `GraphRecord`."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped:
            by_reason.setdefault(reason, []).append(name)
        return [f"left as torch has it: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _refuse_attention(call: dict[str, Any]) -> str | None:
    dropout = call["dropout_p"]
    if not isinstance(dropout, (int, float)) or dropout != 0:
        return "dropout is on"
    query = call["query"]
    if not isinstance(query, Tensor) or query.dim() < 3:
        return "attention over fewer than three dimensions"
    if any(t.dtype != query.dtype for t in (call["key"], call["value"])):
        return "query, key and value differ in dtype"
    if query.is_nested or query.layout is not torch.strided:
        return "nested or sparse tensors"
    return None


def _attention_shape(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> list[Any]:
    """(*batch, query length, value's head size); batch dims of query, key and value broadcast, heads are query's."""
    return [*query.shape[:-1], value.shape[-1]]


def _refuse_rms_norm(call: dict[str, Any]) -> str | None:
    x, shape, weight = call["input"], call["normalized_shape"], call["weight"]
    if not x.is_floating_point():
        return "not a real floating-point tensor"
    if not 0 < len(shape) <= x.dim():
        return "normalized_shape does not name trailing dimensions"
    if not all(statically_known_true(a == b) for a, b in zip(shape, x.shape[-len(shape) :], strict=True)):
        return "normalized_shape is not provably the trailing dimensions"
    if weight is not None and weight.dtype != x.dtype:
        return "weight and input differ in dtype"
    return None


def _default_eps(call: dict[str, Any]) -> dict[str, Any]:
    """Torch takes the machine epsilon of the dtype it computes in: float32 for half types (aten/src/ATen/native/layer_norm.cpp)."""
    if call["eps"] is not None:
        return {}
    computed_in = torch.float64 if call["input"].dtype == torch.float64 else torch.float32
    return {"eps": torch.finfo(computed_in).eps}


_SDPA_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, *, "
    "float? scale=None, bool enable_gqa=False) -> Tensor"
)

LIFTED: tuple[Lifted, ...] = (
    Lifted(
        name="scaled_dot_product_attention",
        schema=_SDPA_SCHEMA,
        origins=(F.scaled_dot_product_attention,),
        aten=aten.scaled_dot_product_attention.default,
        like="query",
        refuse=_refuse_attention,
        resolve=lambda call: {},
        result_shape=_attention_shape,
    ),
    Lifted(
        name="rms_norm",
        schema="(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor",
        origins=(F.rms_norm, torch.rms_norm),
        aten=aten.rms_norm.default,
        like="input",
        refuse=_refuse_rms_norm,
        resolve=_default_eps,
        result_shape=lambda input, **_: input.shape,
    ),
)
_BY_ORIGIN: dict[Any, Lifted] = {origin: entry for entry in LIFTED for origin in (*entry.origins, entry.aten)}


def _declare(entry: Lifted) -> None:
    _LIBRARY.define(f"{entry.name}{entry.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(entry.name, entry.implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{entry.name}", entry.fake, lib=_LIBRARY)


for _entry in LIFTED:
    _declare(_entry)
_BY_OVERLOAD: dict[Any, Lifted] = {entry.overload: entry for entry in LIFTED}


def find_lifted(target: Any) -> Lifted | None:
    """The table's entry of a lifted op, from an FX call target."""
    return _BY_OVERLOAD.get(target) if isinstance(target, OpOverload) else None


def bind(entry: Lifted, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in.

    Raises:
        TypeError: more arguments than the op has, an unknown name, or a name given twice.
    """
    names = list(entry.parameters)
    if len(args) > len(names):
        raise TypeError(f"{entry.name} takes {len(names)} arguments, {len(args)} were given")
    positional = dict(zip(names, args, strict=False))
    if wrong := [name for name in kwargs if name not in entry.parameters or name in positional]:
        raise TypeError(f"{entry.name}: arguments unknown or given twice: {', '.join(wrong)}")
    return {**entry.parameters, **positional, **kwargs}


def lift(gm: GraphModule, example_inputs: Sequence[Any]) -> LiftReport:
    """Lift the calls of a Dynamo graph, in place.

    Args:
        gm: a graph as Dynamo hands it to a backend (`meta["example_value"]`).
        example_inputs: what Dynamo hands over with it; decides, with the modes in force, whether lifting is safe.
    """
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and _origin_of(node) is not None]
    report = LiftReport()
    if not calls:
        return report
    if reason := unsafe_graph(gm, example_inputs):
        report.skipped.extend((node.name, reason) for node in calls)
        return report
    for node in calls:
        _lift_call(node, report)
    gm.graph.lint()
    gm.recompile()
    return report


def lift_aten(gm: GraphModule) -> LiftReport:
    """Lift the calls of an ATen graph, in place: exported programs keep `aten.rms_norm` and `aten.scaled_dot_product_attention` whole."""
    report = LiftReport()
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and _origin_of(node) is not None:
            _lift_call(node, report)
    gm.recompile()
    return report


def restore(gm: GraphModule) -> int:
    """Lower the lifted ops that are left in an ATen graph back to the ops they stand for, in place. Returns how many there were.

    A call whose layout torch does not promise is followed by a permute-contiguous-permute, which copies only where torch chose another;
    one with a layout of neither kind stays, for its implementation keeps the promise.
    """
    restored = 0
    for node in list(gm.graph.nodes):
        entry = find_lifted(node.target)
        if entry is not None:
            restored += _restore_call(node, entry)
    if restored:
        gm.graph.lint()
        gm.recompile()
    return restored


def _origin_of(node: Node) -> Lifted | None:
    # A call target need not be hashable in general, but those in the table are functions and overloads.
    return _BY_ORIGIN.get(node.target) if callable(node.target) else None


def unsafe_graph(gm: GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Why no call of this graph can be lifted, or None."""
    tensors = [*_tensors(example_inputs), *gm.parameters(), *gm.buffers()]
    if any(torch_private.is_wrapper_subclass(t) or torch_private.is_other_subclass(t) for t in tensors):
        return "an input is a tensor subclass"
    if torch_private.grad_may_be_enabled(iter(gm.graph.nodes)) and any(t.requires_grad for t in tensors):
        return "gradients are recorded (compile under torch.no_grad or torch.inference_mode to fuse)"
    if torch_private.autocast_active():
        return "autocast is on"
    for node in gm.graph.nodes:
        if kind := torch_private.region_kind(node):
            return f"the graph uses {kind}"
    return None


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    return (value for value in values if isinstance(value, Tensor))


def _value_of(value: Any) -> Any:
    """The example value of a node's result, the value itself of anything else."""
    return value.meta.get("val", value.meta.get("example_value")) if isinstance(value, Node) else value


def _lift_call(node: Node, report: LiftReport) -> None:
    entry = _BY_ORIGIN[node.target]
    call = bind(entry, node.args, dict(node.kwargs))
    values = {name: map_arg(value, _value_of) for name, value in call.items()}
    reason = entry.refuse(values)
    if reason is None:
        resolved = entry.resolve(values)
        reason = _fit_layout(node, entry.fake(**{**values, **resolved}))
    if reason is not None:
        report.skipped.append((node.name, reason))
        return
    node.args, node.kwargs = _arguments(entry, {**call, **resolved})
    node.target = entry.overload
    report.lifted[entry.name] = report.lifted.get(entry.name, 0) + 1


def _arguments(entry: Lifted, call: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call of the lifted op; every argument is present."""
    keyword = [arg.name for arg in entry.aten._schema.arguments if arg.kwarg_only]
    return tuple(value for name, value in call.items() if name not in keyword), {name: call[name] for name in keyword}


def _fit_layout(node: Node, lifted: Tensor) -> str | None:
    """Make a result of the lifted op's layout fit the code that was traced with another. Returns why it cannot be done, or None."""
    traced = _value_of(node)
    if not isinstance(traced, Tensor) or traced.dtype != lifted.dtype:
        return f"torch would return another dtype than {lifted.dtype}"
    if _same(traced.stride(), lifted.stride()) or _layout_is_hidden(node):
        return None
    if not _same(traced.stride(), _contiguous_strides(traced.shape)):
        return "the code after it relies on a memory layout that a fused op does not give"
    graph = node.graph
    aten_level = isinstance(node.target, OpOverload)
    with graph.inserting_after(node):
        fixed = graph.call_function(aten.contiguous.default, (node,)) if aten_level else graph.call_method("contiguous", (node,))
    fixed.meta.update(node.meta)
    node.replace_all_uses_with(fixed, delete_user_cb=lambda user: user is not fixed)
    return None


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _contiguous_strides(shape: Sequence[Any]) -> list[Any]:
    strides: list[Any] = []
    step: Any = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * size
    return strides[::-1]


# Calls whose result is laid out afresh, whatever the layout of their input was, and calls that hand the question on to their users.
_RELAYS_OUT = {"contiguous", aten.contiguous.default, F.linear, torch.matmul, operator.matmul, aten.mm.default, aten.bmm.default}
_HANDS_ON = {
    "transpose", "permute", "unsqueeze", "reshape", "flatten", "to", "float", "half", "bfloat16", "mul", "add",
    torch.transpose, torch.permute, torch.unsqueeze, torch.reshape, torch.flatten,
    operator.mul, operator.add, torch.mul, torch.add, F.silu, F.gelu, torch.sigmoid, torch.relu, F.relu,
    aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.mul.Tensor, aten.add.Tensor, aten._to_copy.default,
}  # fmt: skip


def _layout_is_hidden(node: Node) -> bool:
    """Whether nothing after `node` can tell how its result lies in memory."""
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user in seen or (user.op != "output" and user.target in _RELAYS_OUT and not user.kwargs):
                continue
            if user.op == "output" or user.target not in _HANDS_ON:
                return False
            seen.add(user)
            todo.append(user)
    return True


def _restore_call(node: Node, entry: Lifted) -> bool:
    order = _dim_order(node.meta["val"])
    if order is None:
        return False
    node.target = entry.aten
    graph, after = node.graph, node
    inverse = [order.index(dim) for dim in range(len(order))]
    steps: list[tuple[OpOverload, tuple[Any, ...]]] = [(aten.contiguous.default, ())]
    if order != sorted(order):
        steps = [(aten.permute.default, (order,)), *steps, (aten.permute.default, (inverse,))]
    users = list(node.users)
    for op, args in steps:
        with graph.inserting_after(after):
            step = graph.call_function(op, (after, *args))
        step.meta.update({key: value for key, value in node.meta.items() if key != "val"})
        step.meta["val"] = op(after.meta["val"], *args)
        after = step
    for user in users:
        user.replace_input_with(node, after)
    return True


def _dim_order(val: Tensor) -> list[int] | None:
    """Dimensions from the outermost in memory to the innermost, where that is known without a guard and the tensor is dense."""

    def outer(a: int, b: int) -> bool:
        return statically_known_true(val.stride(a) >= val.stride(b) * val.shape[b])

    order: list[int] = []
    for dim in range(val.dim()):
        place = next((i for i, other in enumerate(order) if not outer(other, dim)), len(order))
        order.insert(place, dim)
    if not all(outer(a, b) for a, b in itertools.pairwise(order)):
        return None
    return order if _same([val.stride(dim) for dim in order], _contiguous_strides([val.shape[dim] for dim in order])) else None
