"""The Dynamo backend: lift, AOT, fuse, lower, reinplace, execute; and which graphs belong to which `torch.compile` call."""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from . import lift, torch_private
from .aot import trace
from .assume import Assumptions, offer
from .config import FusionConfig
from .errors import NpuFusionError
from .execute import FUNCTIONAL, Boxed, eager, execute, resolve_executor
from .graph_breaks import break_reason
from .prepare import take_out
from .record import GraphRecord
from .reinplace import reinplace
from .simplify import fold_constants
from .specialize import specialize_floats
from .verify import compare

logger = logging.getLogger(__name__)

NAME = "npu_fusion"
_TRAINING = "gradients are recorded: forward and backward run unfused (compile under torch.no_grad or torch.inference_mode to fuse)"


def npu_fusion_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | FusionConfig | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile(model, backend="npu_fusion", mode=..., options=...)` calls.

    Args:
        gm: the Dynamo graph.
        example_inputs: its fake inputs.
        mode: `"reduce-overhead"` captures graphs (`executor="graph"`).
        options: fields of `FusionConfig` by name, or a `FusionConfig`.

    Raises:
        ConfigError: an unknown option, mode, rule or target.
        VerificationError: `verify=True` found a fused op that is off; raised at the first call.
    """
    config = options if isinstance(options, FusionConfig) else FusionConfig.from_options(options, mode)
    return FusionBackend(config)(gm, example_inputs)


class FusionBackend:
    """A Dynamo backend of one configuration: `torch.compile(model, backend=FusionBackend(config))`.

    Args:
        config: what is asked for; `target` and `executor` may be `auto`.
        dry_run: compile as usual, but run the graphs unfused: for a target that is not here.

    Attributes:
        records: of every graph compiled so far, in order. They live as long as the backend.
    """

    def __init__(self, config: FusionConfig | None = None, *, dry_run: bool = False) -> None:
        self.config = config or FusionConfig()
        self.dry_run = dry_run
        self.records: list[GraphRecord] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        config = resolve(self.config, gm, example_inputs)
        real_inputs = torch_private.real_inputs(gm)
        specialize_floats(gm)
        lifted = lift.lift(gm, example_inputs)
        made: list[GraphRecord] = []

        def new_record() -> GraphRecord:
            made.append(GraphRecord(config, notes=list(lifted.notes), graph_break=break_reason(gm), dry_run=self.dry_run))
            return made[-1]

        def compile_inference(graph: GraphModule, inputs: Sequence[Any]) -> Boxed:
            record = new_record()
            record.seconds["aot"] = time.perf_counter() - started
            return _counted(self._compile(graph, inputs, record, real_inputs), record)

        def compile_forward(graph: GraphModule, inputs: Sequence[Any]) -> Boxed:
            record = new_record()
            record.config = dataclasses.replace(config, executor="eager")
            record.notes = [_TRAINING]
            record.stages.update(dict.fromkeys(("aten", "fused", "lowered"), graph))
            return _counted(eager(graph), record)

        def compile_backward(graph: GraphModule, inputs: Sequence[Any]) -> Boxed:
            return eager(graph)

        started = time.perf_counter()
        compiled = trace(gm, example_inputs, compile_inference, compile_forward, compile_backward)
        for record in made:
            self.records.append(record)
            claim(record)
        return compiled

    def reset(self) -> None:
        """Called by `torch.compiler.reset()`."""
        forget_records()

    def _compile(self, gm: GraphModule, inputs: Sequence[Any], record: GraphRecord, real_inputs: Sequence[Any]) -> Boxed:
        """Fuse, lower and build the executor of one ATen inference graph."""
        original = copy.deepcopy(gm.graph)
        if not _rewrite(gm, record, real_inputs):
            _run_unfused(gm, copy.deepcopy(original), record)
        record.stages["lowered"] = gm
        if self.dry_run:
            return eager(_unfused(gm, original))
        with _timed(record, "execute"):
            merged = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")][len(inputs) :]
            run = execute(gm, [*inputs, *merged], record)
        if record.prepared is not None:
            run = record.prepared.supply(run)
        if record.checks:
            run = _verified(run, record)
        if record.weights is not None:
            run = record.weights.supply(run)
        return run if record.assumptions is None else record.assumptions.guard(run, lambda: eager(_unfused(gm, original)))


def _rewrite(gm: GraphModule, record: GraphRecord, real_inputs: Sequence[Any]) -> bool:
    """Fuse, lower and reinplace in place. False where the engine itself failed, which must not break the model.

    Raises:
        NpuFusionError: what the user asked to hear of: a bad configuration, a failed verification.
    """
    try:
        _rewrite_stages(gm, record, real_inputs)
    except NpuFusionError:
        raise
    except Exception as error:
        if torch_private.is_dynamo_exception(error):
            raise
        _log_once(error)
        record.notes.append(f"npu_fusion failed on this graph, which runs unfused: {type(error).__name__}: {error}")
        return False
    return True


def _rewrite_stages(gm: GraphModule, record: GraphRecord, real_inputs: Sequence[Any]) -> None:
    from .cache_writes import lower_writes
    from .lower import elsewhere, lower_graph
    from .pipeline import fuse_graph

    config = record.config
    offers = offer(gm, real_inputs) if config.read_index_buffers else []
    fuse_graph(gm, config, record, real_inputs)
    for offered in offers:
        offered.close()
    if read := [offered for offered in offers if offered.held is not None]:
        record.assumptions = Assumptions(read)
        record.notes.append(f"relies on the numbers in {len(read)} small integer buffers of the model (read_index_buffers=True)")
    with _timed(record, "lower"):
        if config.executor == "inductor":
            from .lowerings.inductor import expand_for_inductor

            expand_for_inductor(gm, record)
        else:  # Inductor folds constants by itself
            fold_constants(gm, record.dry_run)
        cannot_run = None if record.dry_run else elsewhere(gm, config)
        lower_graph(gm, config, record, reference_only=cannot_run)
        if config.keep_prepared_weights and not record.dry_run:
            record.prepared = take_out(gm, real_inputs)
            record.notes += [] if record.prepared is None else [record.prepared.note]
    if config.executor not in FUNCTIONAL:
        with _timed(record, "reinplace"):
            reinplace(gm, record)
            if cannot_run is None:
                lower_writes(gm, config, record)


def _run_unfused(gm: GraphModule, original: Graph, record: GraphRecord) -> None:
    """Put the graph back to what AOT traced, and say in the record that nothing is fused."""
    gm.graph = original
    lift.restore(gm)
    record.sites, record.checks, record.weights, record.prepared, record.assumptions = [], [], None, None, None
    aten = _unfused(gm, copy.deepcopy(original))
    record.stages = {"aten": aten, "fused": aten}


def _unfused(gm: GraphModule, original: Graph) -> GraphModule:
    unfused = GraphModule(gm, original)
    lift.restore(unfused)
    return unfused


def _verified(run: Boxed, record: GraphRecord) -> Boxed:
    """Compare the fused ops with what they replaced, on the first inputs, before anything runs."""
    pending = list(record.checks)

    def call(inputs: list[Any]) -> Any:
        if pending:
            compare(record.stages.get("merged", record.stages["aten"]), pending, list(inputs))
            pending.clear()
        return run(inputs)

    return torch_private.boxed(call)


_LOGGED: set[tuple[str, int]] = set()


def _log_once(error: Exception) -> None:
    """Log a failure of the engine with its traceback, once for each place in the code where it arises."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    place = (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno) if traceback is not None else ("", 0)
    if place not in _LOGGED:
        _LOGGED.add(place)
        logger.error("npu_fusion failed on a graph, which runs unfused; please report this", exc_info=error)


@contextmanager
def _timed(record: GraphRecord, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        record.seconds[stage] = record.seconds.get(stage, 0.0) + time.perf_counter() - started


# Configuration


def resolve(config: FusionConfig, gm: GraphModule, example_inputs: Sequence[Any]) -> FusionConfig:
    """The configuration with `target` and `executor` decided, from the devices of a graph's inputs, parameters and buffers."""
    target = config.target
    if target == "auto":
        tensors = [*example_inputs, *gm.parameters(), *gm.buffers()]
        target = _target_of({value.device.type for value in tensors if isinstance(value, Tensor)})
        if config.emulate and target == "cpu":
            target = EMULATED
    return dataclasses.replace(config, target=target, executor=resolve_executor(config.executor, target, config.emulate))


EMULATED = "ascend910b"
"""The target that `emulate=True` lowers for, where none is named."""


def _target_of(devices: set[str]) -> str:
    if "npu" in devices:
        return soc_target(torch.get_device_module("npu").get_device_name())
    return "cuda" if "cuda" in devices else "cpu"


def soc_target(name: str) -> str:
    """The target for a device name of torch_npu, e.g. `Ascend910B3`, `Ascend910_9382`, `Ascend950PR`; A2 where it is another."""
    if name.startswith("Ascend910_93"):
        return "ascend910_93"
    return "ascend950" if name.startswith(("Ascend950", "Ascend910_95")) else "ascend910b"


# Records

# Dynamo context of a torch.compile call -> its records, by identity.
_OWNED: WeakIdKeyDictionary = WeakIdKeyDictionary()
_OWNED_LOCK = threading.Lock()


def records_of(compiled: Any) -> list[GraphRecord]:
    """The records of the graphs that were compiled, or ran, under a compiled object, in the order in which it met them.

    A graph belongs to every `torch.compile` call during which it ran: two compiled objects with equal options may share graphs, as Dynamo
    shares them between modules of one class. `torch.compiler.reset()` forgets all graphs, here as in Dynamo.

    Args:
        compiled: what `torch.compile` returned for a module, a function or a method; a module compiled in place; a module that holds such.
    """
    found: dict[int, GraphRecord] = {}
    with _OWNED_LOCK:
        for context in torch_private.compile_contexts_of(compiled):
            found.update(_OWNED.get(context, {}))
    return list(found.values())


def reload_weights(compiled: Any) -> None:
    """Let a compiled object take note of new weights at its next call.

    Needed only after packed weights (with `keep_prepared_weights=True`) or small integer buffers that say how they are packed were written
    to in a way that PyTorch does not count: through `weight.data`, by a collective or a foreign kernel.

    Args:
        compiled: as for `report`.
    """
    for record in records_of(compiled):
        if record.prepared is not None:
            record.prepared.forget()
        if record.assumptions is not None:
            record.assumptions.forget()


def forget_records() -> None:
    """Forget which graphs belong to whom. Dynamo calls this when it drops its graphs."""
    with _OWNED_LOCK:
        _OWNED.clear()


npu_fusion_backend.reset = forget_records  # type: ignore[attr-defined]


def claim(record: GraphRecord) -> Any:
    """Note that a graph belongs to the `torch.compile` call that is running now. Returns that call's context, or None outside of any."""
    context = torch_private.current_compile_context()
    if context is not None:
        with _OWNED_LOCK:
            _OWNED.setdefault(context, {})[id(record)] = record
    return context


def _counted(run: Boxed, record: GraphRecord) -> Boxed:
    """Count the runs of a graph, and note on whose behalf it ran: Dynamo may share a graph between compiled objects."""
    last: Callable[[], Any] = _nobody

    def call(inputs: list[Any]) -> Any:
        nonlocal last
        record.calls += 1
        context = torch_private.current_compile_context()
        if context is not None and context is not last():
            claim(record)
            last = weakref.ref(context)
        return run(inputs)

    return torch_private.boxed(call)


def _nobody() -> None:
    return None


def register() -> None:
    """Make the name `npu_fusion` known to Dynamo, where no entry point of an installed package did."""
    torch_private.register_dynamo_backend(NAME, npu_fusion_backend)
