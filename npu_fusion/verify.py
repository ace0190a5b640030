"""`verify=True`: on the first real inputs, every fused op beside the subgraph that it replaced.

The unfused ATen graph runs on copies of the inputs; each fused op then gets the inputs that its subgraph had there, so that one op's error
cannot hide in or excuse another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from .errors import VerificationError
from .numerics import error_bound, relative_error


@dataclass(frozen=True)
class Check:
    """One fused op as a module: its placeholders and outputs are named like nodes of the ATen graph."""

    rule: str
    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def make_check(rule: str, emitted: Sequence[Node], replaced: Mapping[Node, Node], original: Mapping[Node, str]) -> Check:
    """The check of one rewrite, from the nodes it emitted, old output node to new one, and the original names of rewritten inputs."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    inside = set(emitted)
    inputs: list[str] = []
    for node in emitted:
        for argument in node.all_input_nodes:
            if argument not in inside and argument not in copies:
                name = original.get(argument, argument.name)
                copies[argument] = graph.placeholder(name)
                inputs.append(name)
    for node in emitted:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[new] for new in replaced.values()))
    return Check(rule, GraphModule(torch.nn.Module(), graph), tuple(inputs), tuple(old.name for old in replaced))


def compare(aten: GraphModule, checks: Sequence[Check], args: Sequence[Any]) -> None:
    """Run the ATen graph on copies of the arguments and compare every check with it.

    Raises:
        VerificationError: a fused op's result is not finite where the model's is, or differs from it by more than twice the floor of the
            numeric contract, relative to the root mean square of the model's result.
    """
    wanted = {name for check in checks for name in (*check.inputs, *check.outputs)}
    recorder = _Recorder(aten, wanted)
    with torch.random.fork_rng(_cuda_devices(args)):  # the model draws its random numbers afterwards, as if this had not been
        recorder.run(*(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args))
    for check in checks:
        results = check.module(*(recorder.seen[name] for name in check.inputs))
        for name, actual in zip(check.outputs, results, strict=True):
            _compare(check.rule, name, actual, recorder.seen[name])


def _cuda_devices(args: Sequence[Any]) -> list[torch.device]:
    return list({arg.device for arg in args if isinstance(arg, torch.Tensor) and arg.is_cuda})


class _Recorder(Interpreter):
    """Keeps the results of the named nodes, copied: later nodes may write into them."""

    def __init__(self, module: GraphModule, wanted: set[str]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.seen: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.seen[n.name] = result.clone() if isinstance(result, torch.Tensor) else result
        return result


def _compare(rule: str, name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not expected.dtype.is_floating_point:
        if not torch.equal(actual, expected):
            raise VerificationError(f"rule {rule!r}: the fused op's result for node {name!r} differs")
        return
    error, limit = relative_error(actual, expected), 2 * error_bound(expected.dtype)
    if not error <= limit:
        raise VerificationError(
            f"rule {rule!r}: the fused op's result for node {name!r} differs from the model's by {error:.2e} of its rms; "
            f"the limit is {limit:.0e}"
        )
