"""Values: hash-consed nodes of the canonical view, and the table that interns them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy
import torch
from torch.fx import Node

if TYPE_CHECKING:
    from ..match import Match

Dim: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Dim, ...]


class Value:
    """One computation in canonical form.

    Attributes:
        op: operator name, e.g. `mul`, `cast`, `slice`; ATen names without namespace where no canonical operator exists.
        args: operand values. Tensor lists are flattened.
        attrs: everything else that the operator needs, by name.
        shape: sizes, plain ints or sympy expressions over the graph's symbolic sizes.
        dtype: element type; None for Python scalars and tuples.
        node: the first FX node that computes it; None for a value that exists in canonical form only.
        users: values that have this one as an operand.
        forms: semantic ops known to compute this value.
        index: order of creation; operands come before users.
        notes: what analyses found out about it, by a name of their own.
    """

    __slots__ = ("args", "attrs", "dtype", "forms", "index", "node", "notes", "op", "shape", "users")

    def __init__(
        self, op: str, args: tuple[Value, ...], attrs: dict[str, Any], shape: Shape, dtype: torch.dtype | None, index: int
    ) -> None:
        self.op = op
        self.args = args
        self.attrs = attrs
        self.shape = shape
        self.dtype = dtype
        self.index = index
        self.node: Node | None = None
        self.users: list[Value] = []
        self.forms: list[Form] = []
        self.notes: dict[str, Any] = {}

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def form(self, op: str) -> Form | None:
        """The newest semantic form of that name."""
        return next((form for form in reversed(self.forms) if form.op == op), None)

    def __repr__(self) -> str:
        name = self.node.name if self.node is not None else f"%{self.index}"
        operands = ", ".join(a.node.name if a.node is not None else f"%{a.index}" for a in self.args)
        attrs = "".join(f", {k}={v}" for k, v in self.attrs.items())
        return f"{name} = {self.op}({operands}{attrs})"


@dataclass(frozen=True, eq=False)
class Form:
    """A value, known as output `output` of a semantic op: what a rule found there.

    `args` holds the semantic op's arguments by name: values, literals, lists of values, plain Python attributes.
    """

    op: str
    args: dict[str, Any]
    output: int
    match: Match


@dataclass(frozen=True)
class Literal:
    """A number captured from the graph.

    `value` is the number where the graph holds it as a constant. A float that Dynamo keeps symbolic (dynamic=True turns module floats
    into inputs) has `value` None and `source`, the 0-d tensor or SymFloat value that carries it at run time.
    """

    value: float | int | None
    source: Value | None = None
    scale: float = 1.0

    @property
    def known(self) -> bool:
        return self.value is not None


class ValueTable:
    """Interns values: asking twice for the same computation gives the same object."""

    def __init__(self) -> None:
        self._table: dict[tuple[Any, ...], Value] = {}
        self.values: list[Value] = []
        self.by_op: dict[str, list[Value]] = {}

    def intern(self, op: str, args: Iterable[Value], attrs: dict[str, Any], shape: Shape, dtype: torch.dtype | None) -> Value:
        args = tuple(args)
        key = (op, tuple(arg.index for arg in args), tuple((k, attribute_key(v)) for k, v in sorted(attrs.items())), dtype)
        found = self._table.get(key)
        if found is None:
            found = self._table[key] = self._new(op, args, attrs, shape, dtype)
        return found

    def unique(self, op: str, args: Iterable[Value], attrs: dict[str, Any], shape: Shape, dtype: torch.dtype | None) -> Value:
        """A value equal to no other: inputs, random numbers, mutations, collectives."""
        return self._new(op, tuple(args), attrs, shape, dtype)

    def _new(self, op: str, args: tuple[Value, ...], attrs: dict[str, Any], shape: Shape, dtype: torch.dtype | None) -> Value:
        value = Value(op, args, attrs, shape, dtype, len(self.values))
        self.values.append(value)
        self.by_op.setdefault(op, []).append(value)
        for arg in dict.fromkeys(args):
            arg.users.append(value)
        return value

    def __iter__(self) -> Iterator[Value]:
        return iter(self.values)


def attribute_key(attr: Any) -> Any:
    """A hashable key under which 1, True and 1.0, and 0.0 and -0.0, stay apart."""
    if isinstance(attr, float):
        return ("float", attr.hex())
    if isinstance(attr, (bool, int)):
        return (type(attr).__name__, attr)
    if isinstance(attr, (tuple, list)):
        return tuple(attribute_key(item) for item in attr)
    return attr
