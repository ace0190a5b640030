"""Execute: how a lowered graph runs.

`eager` runs the FX graph's own code, `graph` captures it on the device and replays it (`capture/`); `inductor`, `npugraph_ex` and
`torchair` hand it on to these compilers.
Every executor is a boxed function: it takes its inputs as one list and empties it, so that an input nobody else holds is freed as
soon as the graph is done with it.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from . import torch_private
from .record import GraphRecord

logger = logging.getLogger(__name__)

Boxed = Callable[[list[Any]], Any]

# Compilers that make writes functional again and re-inplace what they can by themselves.
FUNCTIONAL = frozenset({"inductor", "torchair"})


def resolve_executor(executor: str, target: str, emulate: bool = False) -> str:
    """What `auto` means on a target: Inductor on cuda, which fuses what no rule takes; elsewhere, and on CPU tensors, the FX graph."""
    if executor != "auto":
        return executor
    return "inductor" if target == "cuda" and not emulate else "eager"


def execute(gm: GraphModule, example_inputs: Sequence[Any], record: GraphRecord) -> Boxed:
    """The boxed function that runs `gm` as `record.config.executor` says.

    Where a graph cannot be captured it runs eagerly; `record.config.executor` then says `eager`, and `record.notes` why.

    Raises:
        ConfigError: what the executor needs is not installed.
    """
    executor = record.config.executor
    if record.config.target.startswith("ascend") and not record.config.emulate:
        torch_private.accept_outputs_over_inputs()
    if executor == "inductor":
        return _inductor(GraphModule(gm, copy.deepcopy(gm.graph)), example_inputs, record)
    if executor == "eager":
        return eager(gm)
    if reasons := _unsuitable(gm, executor):
        return _in_place_of(executor, gm, record, reasons)
    if executor == "graph":
        from .capture import capture

        return capture(eager(gm), gm, record)
    from .lowerings.ascend.graph_compilers import hand_over

    return hand_over(gm, example_inputs, record)


def _unsuitable(gm: GraphModule, executor: str) -> list[str]:
    """Why a graph is nothing for an executor that captures, or for torchair, whose graph engine may not capture."""
    from .capture import find_obstacles
    from .capture.check import captured_device

    if executor == "torchair":
        device = captured_device(gm)
        return [device] if isinstance(device, str) else []
    return [str(obstacle) for obstacle in find_obstacles(gm)]


def _in_place_of(executor: str, gm: GraphModule, record: GraphRecord, reasons: Sequence[str]) -> Boxed:
    """Run the graph eagerly, and say why in the record."""
    record.config = dataclasses.replace(record.config, executor="eager")
    record.notes += [f"executor eager in place of {executor}: {reason}" for reason in reasons]
    logger.info("%s executor: running eagerly, %s", executor, "; ".join(reasons))
    return eager(gm)


class _BoxedCode(CodeGen):
    """Code of a graph as a function of one list of inputs; every input is a local variable, which FX's code drops after its last use."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **kwargs: Any) -> str:
        names = [var.split(":")[0].split("=")[0].strip() for var in free_vars]
        inputs = [name for name in names if name != "self"]
        lines = [f"def {self._func_name}(self, inputs):"]
        if inputs:
            lines.append(f"    {', '.join(inputs)}, = inputs")
        lines.append("    inputs.clear()")
        return "\n".join(lines)


def eager(gm: GraphModule) -> Boxed:
    """Run the FX graph as Python code. The graph of `gm` is left as it is."""
    runner = GraphModule(gm, copy.deepcopy(gm.graph))
    runner.graph.set_codegen(_BoxedCode())
    runner.recompile()
    forward = runner.forward

    def run(inputs: list[Any]) -> Any:
        return forward(inputs)

    return torch_private.boxed(run)


def _inductor(gm: GraphModule, example_inputs: Sequence[Any], record: GraphRecord) -> Boxed:
    from .lowerings.inductor import compile_with_inductor

    compiled = compile_with_inductor(gm, example_inputs, record.config)

    def run(inputs: list[Any]) -> Any:
        # compile_fx says that it takes a list, and takes arguments.
        arguments = tuple(inputs)
        inputs.clear()
        return compiled(*arguments)

    return torch_private.boxed(run)
