"""Every emitted op, traced on an npu device with fake tensors: torch_npu takes the call, and gives what our own fake kernel says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from npu_fusion.lowerings.ascend.table import ascend_ops

# Collectives of a group's product have no case of one rank: test_tensor_parallel.py.
EMITTED = [name for name, op in ascend_ops().items() if op.uses and op.namespace == "npu" and not op.collective]


def traced(name: str, arguments: dict[str, Any], mode: str) -> tuple[Any, dict[str, Any]]:
    """What torch_npu's own meta says of a call on npu tensors, and the fake arguments it was given."""
    from npu_fusion.lowerings.ascend.library import overload_of

    overload = overload_of(ascend_ops()[name])
    assert overload is not None, f"torch_npu has no {name}"
    leaves, spec = pytree.tree_flatten(dict(arguments))
    leaves = [leaf.npu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def filled(tensors: Sequence[Any]) -> dict[str, Any]:
        there = dict(zip(places, tensors, strict=True))
        result: dict[str, Any] = pytree.tree_unflatten([there.get(place, leaf) for place, leaf in enumerate(leaves)], spec)
        return result

    def call(*tensors: Tensor) -> Any:
        return overload(**filled(tensors))

    graph = make_fx(call, tracing_mode=mode)(*(leaves[place] for place in places)).graph
    fakes = filled([node.meta["val"] for node in graph.find_nodes(op="placeholder")])
    [node] = graph.find_nodes(op="call_function", target=overload)  # one that only writes has no result
    return node.meta.get("val"), fakes


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("name", EMITTED)
def test_schema_and_meta(name: str, mode: str) -> None:
    from npu_fusion.lowerings.ascend.emulation import emulated_ops
    from npu_fusion.lowerings.ascend.selftest import planned

    op, [ours] = ascend_ops()[name], emulated_ops()[name]._fakes
    cases = list(islice((case for target in op.targets if target != "ascend310p" for case in planned(target, [name])), 2))
    assert cases
    for case in cases:
        theirs, fakes = traced(name, case.arguments(), mode)
        known = {spec.name: spec.default_value for spec in _arguments_of(name)}
        expected = ours(**{**known, **fakes})
        for place, (a, b) in enumerate(zip(pytree.tree_leaves(theirs), pytree.tree_leaves(expected), strict=True)):
            if a is b is None or op.outputs[place] not in op.uses:  # a result that is not there, or not used
                continue
            assert a.dtype == b.dtype, f"{case}: {op.outputs[place]}"
            assert len(a.shape) == len(b.shape), f"{case}: {op.outputs[place]}: {a.shape} and {b.shape}"
            assert all(map(_same_size, a.shape, b.shape)), f"{case}: {a.shape} and {b.shape}"


def _arguments_of(name: str) -> Any:
    from npu_fusion.lowerings.ascend.library import overload_of

    overload = overload_of(ascend_ops()[name])
    assert overload is not None
    return overload._schema.arguments


def _same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; in symbols, whether they are so for some values: torch_npu writes s / 2, rounded, for s // 2."""
    expressions = [sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size) for size in (a, b)]
    symbols = sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)
    for start in (32, 256):
        values = {symbol: start * (place + 3) for place, symbol in enumerate(symbols)}
        first, second = (int(expression.subs(values)) for expression in expressions)
        if first != second:
            return False
    return True
