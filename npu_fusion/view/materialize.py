"""From values back to FX: the node that computes a value, or the few nodes of its canonical form."""

from __future__ import annotations

import functools
import operator
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from ..errors import NpuFusionError
from ..torch_private import FloorDiv, Max, Min, Mod, PythonMod
from .build import View
from .shapes import known_equal, to_dim
from .value import Dim, Value

aten = torch.ops.aten

_UNARY = {name: getattr(aten, name).default for name in "neg sqrt rsqrt reciprocal exp tanh sigmoid silu relu cos sin".split()}
_COMPLEX = {name: getattr(aten, name).default for name in ("view_as_real", "view_as_complex")}
_DIRECT = {**_UNARY, **_COMPLEX, "matmul": aten.matmul.default}
_ARITHMETIC = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Max: torch.sym_max,
    sympy.Min: torch.sym_min,
    Max: torch.sym_max,
    Min: torch.sym_min,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
}
_BINARY = {"add": aten.add, "sub": aten.sub, "mul": aten.mul, "div": aten.div, "pow": aten.pow}


class Materializer:
    """Names the FX node of a value, emitting ATen nodes for values that exist in canonical form only.

    New nodes go to the graph's current insertion point. `emit(target, args, kwargs)` creates a node and gives it metadata.
    """

    def __init__(self, view: View, graph: Graph, emit: Any) -> None:
        self.view = view
        self.graph = graph
        self.emit = emit

    def node(self, value: Value) -> Any:
        """The node, or the Python number, of a value."""
        if value.op == "const":
            return value.attrs["value"]
        if value.op == "sym":
            return self.size(value.attrs["expr"], value)
        if value.node is not None:
            return value.node
        if value.op == "symfloat":  # a power of a size
            return self._call(operator.pow, self.node(value.args[0]), value.attrs["power"])
        if value.op == "full":
            return self._full(value)
        return self._emit_value(value)

    def size(self, expr: Dim, value: Value | None = None) -> Any:
        """An int, or a node that holds the symbolic size."""
        if isinstance(expr, (int, sympy.Integer)):
            return int(expr)
        if value is None:
            value = self.view.canon.sym(expr)
        if value.node is not None:
            return value.node
        arithmetic = _ARITHMETIC.get(expr.func)
        if arithmetic is not None:  # from its parts: they come from inputs, which stand before everything else
            return functools.reduce(lambda a, b: self.emit(arithmetic, (a, b), {}), [self.size(part) for part in expr.args])
        for node in self.graph.nodes:
            val = node.meta.get("val")
            if isinstance(val, torch.Tensor):
                for dim, size in enumerate(val.shape):
                    if known_equal(to_dim(size), expr):
                        return self.emit(aten.sym_size.int, (node, dim), {})
        raise NpuFusionError(f"no tensor of the graph has the symbolic size {expr}")

    def emit_anew(self, value: Value) -> Node:
        """The few ATen nodes of a value's canonical form, also where a node computes the value in another way."""
        return self._emit_value(value)

    def _emit_value(self, value: Value) -> Node:
        op, attrs = value.op, value.attrs
        args = [self.node(arg) for arg in value.args]
        if op == "cast":
            return self._call(aten._to_copy.default, args[0], dtype=value.dtype)
        if op == "reshape":
            return self._call(aten.reshape.default, args[0], [self.size(d) for d in value.shape])
        if op == "expand":
            return self._call(aten.expand.default, args[0], [self.size(d) for d in value.shape])
        if op == "permute":
            return self._call(aten.permute.default, args[0], list(attrs["dims"]))
        if op == "slice":
            bounds = [self.size(attrs[name]) for name in ("start", "stop", "step")]
            return self._call(aten.slice.Tensor, args[0], attrs["dim"], *bounds)
        if op == "cat":
            return self._call(aten.cat.default, args, attrs["dim"])
        if op == "gather":
            return self._call(aten.gather.default, args[0], attrs["dim"], args[1])
        if op in ("mean", "sum"):
            return self._call(getattr(aten, op).dim_IntList if op == "sum" else aten.mean.dim, args[0], list(attrs["dims"]), True)
        if op == "square":
            return self._call(aten.mul.Tensor, args[0], args[0])
        if op == "gelu":
            return self._call(aten.gelu.default, args[0], approximate=attrs["approximate"])
        if op in ("where", "maximum", "and", "or", "not"):
            return self._choice(value, args)
        if op in _DIRECT:
            return self._call(_DIRECT[op], *args)
        if op in _BINARY:
            return self._binary(op, args)
        raise NpuFusionError(f"a rule names a value that the graph does not compute and that cannot be emitted: {value!r}")

    def _full(self, value: Value) -> Node:
        sizes = [self.size(d) for d in value.shape]
        return self._call(aten.full.default, sizes, value.attrs["value"], dtype=value.dtype, device=value.attrs["device"])

    def _choice(self, value: Value, args: list[Any]) -> Node:
        """Masks: `where`, `maximum` and logic, none of which takes Python numbers on every side."""
        if value.op in ("and", "or", "not"):
            return self._call(getattr(aten, f"logical_{value.op}").default, *args)
        like = next(arg for arg in args if isinstance(arg, Node)).meta["val"]
        tensors = [
            arg if isinstance(arg, Node) else self._call(aten.scalar_tensor.default, arg, dtype=value.dtype, device=like.device)
            for arg in args
        ]
        return self._call(aten.where.self if value.op == "where" else aten.maximum.default, *tensors)

    def _binary(self, op: str, args: list[Any]) -> Node:
        if not isinstance(args[0], Node) and op in ("add", "mul"):
            args = args[::-1]
        if not isinstance(args[0], Node):
            args[0] = self._call(aten.scalar_tensor.default, args[0], dtype=args[1].meta["val"].dtype, device=args[1].meta["val"].device)
        if op == "pow":
            return self._call(aten.pow.Tensor_Tensor if isinstance(args[1], Node) else aten.pow.Tensor_Scalar, *args)
        return self._call(_BINARY[op].Tensor, *args)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node: Node = self.emit(target, args, kwargs)
        return node
