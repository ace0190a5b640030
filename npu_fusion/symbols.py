"""What the symbols in a graph's sizes stand for, in the words of the function's signature."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule

_LOCAL = re.compile(r"L\['(\w+)'\]")
_KEYWORD = re.compile(r"\bkwargs\['(\w+)'\]")
_NO_SOURCE = "__meta_utils_unknown_tensor"  # how torch calls a tensor that was made fake outside of Dynamo
_SIZE = re.compile(r"\.(size|stride)\(\)\[(\d+)\]")


def symbol_names(graph: Graph | GraphModule) -> dict[sympy.Symbol, str]:
    """The free symbols of the graph's inputs, in order, each with its source, e.g. `{s27: "input_ids.size(1)"}`.

    A symbol whose source the shape environment does not know (a graph made by hand) is named after the first input it is a size of.
    """
    names: dict[sympy.Symbol, str] = {}
    for node in (graph.graph if isinstance(graph, GraphModule) else graph).nodes:
        if node.op != "placeholder":
            continue
        for dim, size in _symbolic(node.meta.get("val")):
            for symbol in sorted(size.node.expr.free_symbols, key=str):
                if symbol not in names:
                    place = node.name if dim is None else f"{node.name}.size({dim})"
                    names[symbol] = _source(size, symbol) or place
    return names


def clean_source(name: str) -> str:
    """A Dynamo source name as the author would write it: `L['kwargs']['input_ids'].size()[1]` is `input_ids.size(1)`."""
    name = _KEYWORD.sub(r"\1", _LOCAL.sub(r"\1", name))
    return _SIZE.sub(r".\1(\2)", name)


def _symbolic(value: Any) -> Iterator[tuple[int | None, Any]]:
    """The symbolic sizes of an input, each with its dimension; None for an input that is a size itself."""
    if isinstance(value, torch.SymInt):
        yield None, value
    elif isinstance(value, torch.Tensor):
        sizes: tuple[Any, ...] = value.shape  # torch types a size as int, which a SymInt is not
        yield from ((dim, size) for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt))


def _source(size: Any, symbol: sympy.Symbol) -> str | None:
    sources = size.node.shape_env.var_to_sources.get(symbol) if size.node.shape_env is not None else None
    if not sources:
        return None
    name = sources[0].name  # a method in torch 2.11, a property since
    name = name() if callable(name) else name
    return None if name.startswith(_NO_SOURCE) else clean_source(name)
