"""What patterns ask of values: the number that one holds, whether a cast rounds, how to name it to a reader."""

from __future__ import annotations

import torch

from ..view.canon import number_of
from ..view.value import Literal, Value


def literal_of(value: Value) -> Literal | None:
    """The number that a value holds, known or carried by a 0-d float64 input or a SymFloat."""
    number = number_of(value)
    if number is not None:
        return Literal(number)
    if value.op == "symfloat":
        return Literal(None, value)
    if value.ndim == 0 and value.dtype is not None and value.dtype.is_floating_point:
        source = value
        while source.op == "cast":
            source = source.args[0]
        if source.op == "input" and str(source.dtype) == "torch.float64":
            return Literal(None, source)
    return None


def widens(cast_: Value) -> bool:
    return bits(cast_.args[0].dtype) <= bits(cast_.dtype)


def narrows(cast_: Value) -> bool:
    return bits(cast_.args[0].dtype) > bits(cast_.dtype)


def bits(dtype: torch.dtype | None) -> int:
    """Width of an element; 0 for what is no floating-point tensor."""
    return dtype.itemsize * 8 if dtype is not None and dtype.is_floating_point else 0


def describe(value: Value) -> str:
    if value.op == "input":
        return "an input of the graph"
    if value.op == "const":
        return f"the number {value.attrs['value']}"
    return value.op
