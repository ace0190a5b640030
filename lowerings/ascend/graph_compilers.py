"""npugraph_ex and torchair: graph compilers of torch_npu, as executors and as backends that keep their users.

Executor: the lowered graph is handed over (`hand_over`). Semantic ops that stayed references become the ATen ops they consist of, which
these compilers know; inputs that the graph writes are marked, so that they are used where they lie and not copied.

Backend: whoever compiles with `backend="npugraph_ex"`, or with a backend of torchair's, goes on doing so and has his graphs fused by their
hook for the user's passes (`npugraph_ex_options`, `torchair_config`). His own pass runs first. On this way attention arrives as torch_npu's
op already, for there is no hook before AOT.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ... import torch_private
from ...backend import claim
from ...capture.check import written_inputs
from ...capture.host_lists import HostLists
from ...config import FusionConfig
from ...errors import ConfigError, NpuFusionError
from ...pipeline import fuse
from ...record import GraphRecord
from ...reinplace import reinplace
from ...semantic import find_semantic_op
from ..inductor import expand_call, is_training_graph

logger = logging.getLogger(__name__)

Boxed = Callable[[list[Any]], Any]
GraphPass = Callable[[GraphModule, Any, Any], Any]
HOOK = "post_grad_custom_pre_pass"


# The executors


def hand_over(gm: GraphModule, example_inputs: Sequence[Any], record: GraphRecord) -> Boxed:
    """The boxed function that runs a lowered graph through `record.config.executor`.

    Args:
        gm: the lowered graph; it is left as it is.
        example_inputs: its fake inputs.
        record: of the graph.

    Raises:
        ConfigError: torch_npu is not installed, or does not know one of `executor_options`.
    """
    config = record.config
    compiler = load_compiler(config.executor)
    graph = GraphModule(gm, copy.deepcopy(gm.graph))
    expand_references(graph)
    beside = Surroundings(graph)
    examples = [*example_inputs, *beside.examples]
    if captures(config):
        mark_inputs_in_place(graph, examples)
    compile_graph = {"npugraph_ex": _npugraph_ex, "torchair": _torchair}[config.executor]
    try:
        compiled = compile_graph(compiler, graph, examples, config)
    except (ValueError, AttributeError) as error:  # how they refuse an option
        if config.executor_options:
            raise ConfigError(f"{config.executor}: {error}") from error
        raise

    def run(inputs: list[Any]) -> Any:
        arguments = tuple(inputs)
        inputs.clear()
        return beside.call(compiled, arguments)

    return torch_private.boxed(run)


def captures(config: FusionConfig) -> bool:
    """Whether the compiler captures what it is given; torchair's graph engine, which takes marked inputs for constants, does not."""
    return config.executor == "npugraph_ex" or dict(config.executor_options).get("mode", "max-autotune") != "max-autotune"


def load_compiler(name: str) -> Any:
    """The module `npugraph_ex` or `torchair`, both of which come with torch_npu.

    Raises:
        ConfigError: torch_npu is not installed, or has no such compiler.
    """
    if importlib.util.find_spec("torch_npu") is None:
        raise ConfigError(f"executor {name!r} needs torch_npu, which is not installed here; 'graph' and 'eager' do without")
    torch_private.set_up_npu_compilers()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"executor {name!r}: this torch_npu cannot load it: {error}") from error


def _npugraph_ex(compiler: Any, gm: GraphModule, example_inputs: list[Any], config: FusionConfig) -> Callable[..., Any]:
    # A result that lies in the graph's memory would change under its owner at the next call.
    options = {"clone_output": True, "capture_limit": config.capture_limit, **dict(config.executor_options)}
    compiled: Callable[..., Any] = compiler.compile_fx(gm, example_inputs, options)
    return compiled


def _torchair(compiler: Any, gm: GraphModule, example_inputs: list[Any], config: FusionConfig) -> Callable[..., Any]:
    settings = compiler.CompilerConfig()
    for path, value in dict(config.executor_options).items():
        *parents, name = path.split(".")
        owner = settings
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    if settings.mode.value != "max-autotune":
        settings.debug.aclgraph.enable_output_clone = True
        settings.debug.aclgraph.static_capture_size_limit = config.capture_limit
    compiled: Callable[..., Any] = compiler.get_compiler(settings)(gm, example_inputs)
    return compiled


def expand_references(gm: GraphModule) -> int:
    """Replace the semantic ops that are left in a lowered graph by their references, in place. Returns how many there were."""
    left = [(node, op) for node in gm.graph.nodes if (op := find_semantic_op(node.target)) is not None]
    for node, op in left:
        expand_call(gm, node, op.reference)
    if left:
        gm.graph.lint()
        gm.recompile()
    return len(left)


def mark_inputs_in_place(gm: GraphModule, example_inputs: Sequence[Any]) -> None:
    """Mark the example inputs of parameters, and of caches that the graph writes, as tensors whose address belongs to a capture.

    The compilers look for an attribute. By themselves they find writes to an input, but not those to a view of one, and would write to a
    copy.
    """
    written = written_inputs(gm)
    static = set(torch_private.static_input_indices())
    for i, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)):
        if isinstance(value, torch.Tensor) and (node in written or i in static or torch_private.STATIC_INPUT in node.meta):
            value._torchair_is_parameter = True  # type: ignore[attr-defined]


class Surroundings:
    """What a graph that is handed over gets from beside it: inputs that it has in addition, and results that it need not compute.

    - Constants on the device, as masks that a lowering made, become inputs: the compilers fold constants of the host only.
    - Numbers that are computed for host lists become inputs. npugraph_ex updates a list between replays where its elements are inputs of
      the graph, and takes any other use of such an input as a reason to capture anew.
    - Numbers that are only passed on to a result are taken out, for that would be another use.

    Args:
        gm: the graph, which is changed in place.

    Attributes:
        examples: the fake values of the additional inputs.
    """

    def __init__(self, gm: GraphModule) -> None:
        graph = gm.graph
        lists = HostLists(gm, updatable=True)
        elements = [leaf for node in lists.variants for leaf in pytree.tree_leaves(lists.lists_of(node)) if isinstance(leaf, Node)]
        computed = [node for node in dict.fromkeys(elements) if node.op == "call_function"]
        constants = [node for node in graph.find_nodes(op="get_attr") if _on_device(node)]
        self.examples = [node.meta["val"] for node in (*computed, *constants)]
        self._constants = [getattr(gm, str(node.target)) for node in constants]
        self._returned = [place for place, _ in lists.returned]
        self._numbers = lists.program((computed, [node for _, node in lists.returned])) if computed or self._returned else None
        inputs = dict(zip((*computed, *constants), _new_inputs(graph, (*computed, *constants)), strict=True))
        for node in lists.variants:
            _replace_in_lists(node, list(lists.lists_of(node)), inputs)
        for node in constants:
            node.replace_all_uses_with(inputs[node])
            graph.erase_node(node)
            inputs[node].meta[torch_private.STATIC_INPUT] = True
        (output,) = graph.find_nodes(op="output")
        output.args = (tuple(result for place, result in enumerate(output.args[0]) if place not in self._returned),)
        graph.eliminate_dead_code()
        graph.lint()
        gm.recompile()

    def call(self, compiled: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Run the compiled graph on the inputs that it had before, and return the results that it had."""
        if self._numbers is None:
            return compiled(*arguments, *self._constants)
        computed, returned = self._numbers(*arguments)
        results = list(compiled(*arguments, *computed, *self._constants))
        for place, number in zip(self._returned, returned, strict=True):
            results.insert(place, number)
        return results


def _on_device(constant: Node) -> bool:
    val = constant.meta.get("val")
    return isinstance(val, torch.Tensor) and val.device.type != "cpu"


def _new_inputs(graph: Graph, nodes: Sequence[Node]) -> list[Node]:
    """Inputs behind those of a graph, for the values of `nodes`."""
    made = []
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        for node in nodes:
            made.append(graph.placeholder(f"{node.name}_outside"))
            made[-1].meta["val"] = node.meta["val"]
    return made


def _replace_in_lists(node: Node, names: Sequence[str], inputs: Mapping[Node, Node]) -> None:
    """Let host lists of a call take their elements from inputs."""

    def replaced(value: Any) -> Any:
        return map_arg(value, lambda element: inputs.get(element, element))

    positional = [argument.name for argument in node.target._schema.arguments if not argument.kwarg_only]  # type: ignore[union-attr]
    node.args = tuple(replaced(value) if name in names else value for name, value in zip(positional, node.args, strict=False))
    node.kwargs = {name: replaced(value) if name in names else value for name, value in node.kwargs.items()}


# The hooks


def npugraph_ex_options(config: FusionConfig | None = None, *, base: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Options that make `torch.compile(model, backend="npugraph_ex", options=...)` fuse as npu_fusion does.

    Args:
        config: the configuration; or
        options: its fields by name.
        base: further options for npugraph_ex. A pass among them runs before ours.

    Raises:
        ConfigError: an unknown option, rule or target.
    """
    config = config or FusionConfig.from_options(options)
    made = dict(base or {})
    made[HOOK] = fusion_pass(config, "npugraph_ex", before=made.get(HOOK))
    return made


def torchair_config(config: FusionConfig | None = None, *, base: Any = None, **options: Any) -> Any:
    """A `torchair.CompilerConfig` with which `torchair.get_npu_backend(compiler_config=...)` fuses as npu_fusion does.

    Args:
        config: the configuration; or
        options: its fields by name.
        base: the `CompilerConfig` to add to; a new one where left out. A pass that it has runs before ours.

    Raises:
        ConfigError: an unknown option, rule or target; torch_npu is not installed.
    """
    config = config or FusionConfig.from_options(options)
    made = base if base is not None else load_compiler("torchair").CompilerConfig()
    setattr(made, HOOK, fusion_pass(config, "torchair", before=getattr(made, HOOK).value))
    return made


def fusion_pass(config: FusionConfig, executor: str, *, before: GraphPass | None = None) -> GraphPass:
    """A pass that fuses and lowers an ATen graph in place, for a compiler that calls it with the graph, its inputs and its configuration.

    Graphs are reported by `npu_fusion.report` as under our own backend. A graph that records gradients is left alone.

    Args:
        config: the configuration.
        executor: the compiler's name, for the report.
        before: the pass that stood in this one's place; it runs first.
    """

    def run(gm: GraphModule, example_inputs: Any = None, compiler_config: Any = None) -> None:
        if before is not None:
            before(gm, example_inputs, compiler_config)
        if not is_training_graph(gm.graph):
            torch_private.accept_outputs_over_inputs()
            claim(_fuse_or_leave(gm, config, executor))

    return run


def _fuse_or_leave(gm: GraphModule, config: FusionConfig, executor: str) -> GraphRecord:
    """Fuse in place; where the engine itself fails, leave the graph as it was and say so in the record."""
    original = copy.deepcopy(gm.graph)
    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    try:
        fuse(gm, values, config)
        record: GraphRecord = gm.meta["npu_fusion_record"]
        if executor != "torchair":
            reinplace(gm, record)
        expand_references(gm)
        torch_private.allow_constants(gm)
    except NpuFusionError:
        raise
    except Exception as error:
        logger.error("npu_fusion failed on a graph, which runs unfused; please report this", exc_info=error)
        gm.graph = original
        record = GraphRecord(config)
        record.notes.append(f"npu_fusion failed on this graph, which runs unfused: {type(error).__name__}: {error}")
        record.stages["aten"] = record.stages["fused"] = GraphModule(gm, copy.deepcopy(original))
    record.config = dataclasses.replace(record.config, executor=executor)
    record.stages["lowered"] = gm
    return record
