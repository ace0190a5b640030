"""AOT: from a Dynamo graph to the functional ATen graph that rules see, without decompositions.

Inputs that the program mutates are written back by `copy_` nodes at the end of an inference graph. A graph that records gradients is split
into a forward and a backward part, which run as they are.

AOT may abandon a run by an exception of its own (`TensorifyScalarRestartAnalysis`), upon which Dynamo traces again and calls the backend
anew. Nothing here catches it. What a compiler learns of an abandoned run must go with it: records are made inside the compilers, and are
published after `trace` has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from . import torch_private
from .semantic import NAMESPACE

GraphCompiler = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def trace(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    compile_inference: GraphCompiler,
    compile_forward: GraphCompiler,
    compile_backward: GraphCompiler,
) -> Callable[..., Any]:
    """Trace a Dynamo graph with AOTAutograd, compile what comes out, and return the callable for Dynamo.

    A compiler is called with an ATen graph and its fake inputs and returns a boxed function: it takes its arguments as one list, which it
    empties, and has the attribute `_boxed_call`.

    Args:
        gm: the Dynamo graph, lifted.
        example_inputs: its fake inputs.
        compile_inference: compiles a graph that records no gradients.
        compile_forward: compiles the forward part of a graph that does; the backward part, maybe long after, is for `compile_backward`.
    """
    inference, forward, backward = (_of_plain_calls(compile_) for compile_ in (compile_inference, compile_forward, compile_backward))
    return torch_private.aot_compile(gm, example_inputs, inference=inference, forward=forward, backward=backward)


def _of_plain_calls(compile_: GraphCompiler) -> GraphCompiler:
    """A compiler that sees the calls of our ops as such where AOT wraps them to keep their order, which no pass of ours changes."""
    return lambda gm, inputs: compile_(torch_private.without_tokens(gm, NAMESPACE), inputs)
