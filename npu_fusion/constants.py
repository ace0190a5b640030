"""Tensors that a graph computes from constants alone: ranges, tables written in the model's code, arithmetic on both."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from . import torch_private
from .assume import OFFER, Offer
from .view.value import Value

MOST_ELEMENTS = 1 << 18
_MAKES = frozenset({"arange", "full", "zeros", "ones"})


def constant_tensor(value: Value, *, may_read: bool = False) -> Tensor | None:
    """The tensor, on the CPU, that a value holds whatever the graph's inputs are; None for any other value, and for large ones.

    Nothing but the value's own ops is run, on constants that the graph owns, and with `may_read` on small integer buffers of the model
    (npu_fusion/assume.py), of which the graph then assumes that they stay what they are.
    """
    key = "constant or buffer" if may_read else "constant"
    if key not in value.notes:
        with torch_private.without_fake():
            value.notes[key] = _of_value(value, may_read)
    constant: Tensor | None = value.notes[key]
    return constant


def _of_value(value: Value, may_read: bool) -> Tensor | None:
    if value.op == "const":
        return torch.tensor(value.attrs["value"])
    if not all(type(size) is int for size in value.shape) or math.prod(value.shape) > MOST_ELEMENTS:
        return None
    if value.op == "full" and value.dtype is not None:
        return torch.full(value.shape, value.attrs["value"], dtype=value.dtype)
    if value.node is not None:
        return _of_node(value.node, {}, may_read)
    inner = _of_value(value.args[0], may_read) if value.op in ("reshape", "permute", "expand", "cast") else None
    if inner is None:
        return None
    if value.op == "cast":
        return inner.to(value.dtype)
    if value.op == "permute":
        return inner.permute(value.attrs["dims"])
    return inner.reshape(value.shape) if value.op == "reshape" else inner.expand(value.shape)


def _of_node(node: Node, known: dict[Node, Tensor | None], may_read: bool) -> Tensor | None:
    if node not in known:
        known[node] = None
        known[node] = _computed(node, known, may_read)
    return known[node]


def _computed(node: Node, known: dict[Node, Tensor | None], may_read: bool) -> Tensor | None:
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or not all(type(size) is int for size in val.shape) or val.numel() > MOST_ELEMENTS:
        return None
    if node.op == "placeholder":
        offer = node.meta.get(OFFER) if may_read else None
        return offer.read() if isinstance(offer, Offer) else None
    if node.op == "get_attr":
        held = getattr(node.graph.owning_module, str(node.target), None)
        named = str(node.target).startswith("_tensor_constant")
        return held.cpu() if named and type(held) is Tensor and held.device.type != "meta" else None
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or not _is_pure(target):
        return None
    inputs = node.all_input_nodes
    if not inputs and target._opname not in _MAKES:
        return None
    values = {arg: _of_node(arg, known, may_read) for arg in inputs}
    if any(held is None for held in values.values()):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda arg: values[arg])
    kwargs = {name: held for name, held in kwargs.items() if name != "pin_memory"}
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    result = target(*args, **kwargs)
    return result if isinstance(result, Tensor) else None


def _is_pure(target: OpOverload) -> bool:
    return target.namespace == "aten" and not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
