"""Execute: how a lowered graph runs.

`eager` runs the FX graph's own code, `graph` captures it on the device and replays it (`capture.py`), `inductor` hands it on to Inductor.
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


def resolve_executor(executor: str, target: str) -> str:
    """What `auto` means on a target: Inductor on cuda, which fuses what no rule takes, and the FX graph elsewhere."""
    if executor != "auto":
        return executor
    return "inductor" if target == "cuda" else "eager"


def execute(gm: GraphModule, example_inputs: Sequence[Any], record: GraphRecord) -> Boxed:
    """The boxed function that runs `gm` as `record.config.executor` says.

    Where a graph cannot be captured it runs eagerly; `record.config.executor` then says `eager`, and `record.notes` why.
    """
    executor = record.config.executor
    if executor == "inductor":
        return _inductor(GraphModule(gm, copy.deepcopy(gm.graph)), example_inputs)
    if executor == "graph":
        from .capture import capture, unsuitable

        reason = unsuitable(gm)
        if reason is None:
            return capture(eager(gm), gm, record)
        record.config = dataclasses.replace(record.config, executor="eager")
        record.notes.append(f"executor eager in place of graph: {reason}")
        logger.info("graph executor: running eagerly, %s", reason)
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


def _inductor(gm: GraphModule, example_inputs: Sequence[Any]) -> Boxed:
    compiled = torch_private.inductor_compile(gm, example_inputs)

    def run(inputs: list[Any]) -> Any:
        # compile_fx says that it takes a list, and takes arguments.
        arguments = tuple(inputs)
        inputs.clear()
        return compiled(*arguments)

    return torch_private.boxed(run)
