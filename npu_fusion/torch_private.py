"""The one door to torch's private APIs, so that a new torch release is met in this file alone. Written for torch 2.11 to 2.13."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

import sympy
import torch
from torch._C._dynamo.eval_frame import reset_code as reset_code
from torch._dynamo.utils import counters as counters
from torch._subclasses import FakeTensor as FakeTensor
from torch._subclasses import FakeTensorMode as FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils._sympy.functions import FloorDiv as FloorDiv
from torch.utils._sympy.functions import Max as Max
from torch.utils._sympy.functions import Min as Min
from torch.utils._sympy.functions import Mod as Mod
from torch.utils._sympy.functions import PythonMod as PythonMod

GraphCompiler = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


# Dynamo: which torch.compile call is running


def _compile_wrapper_code() -> CodeType:
    """Code of the closure that `torch.compile` puts around a function; every compiled call has one frame of it."""
    from torch._dynamo.eval_frame import _TorchDynamoContext

    def nested(code: CodeType) -> Iterator[CodeType]:
        for const in code.co_consts:
            if isinstance(const, CodeType):
                yield const
                yield from nested(const)

    for code in nested(_TorchDynamoContext.__call__.__code__):
        if code.co_name in ("compile_wrapper", "_fn") and "self" in code.co_freevars:
            return code
    raise RuntimeError(f"torch {torch.__version__} wraps compiled functions in a way that npu_fusion does not know")


_WRAPPER_CODE: CodeType | None = None


def current_compile_context() -> Any | None:
    """The Dynamo context of the `torch.compile` call under which this thread runs, innermost first; None outside.

    There is one context a `torch.compile` call, alive as long as the compiled object, which makes it the identity of that object.
    It is found on the Python stack, which holds while Dynamo compiles and while a compiled graph runs alike.
    """
    global _WRAPPER_CODE
    if _WRAPPER_CODE is None:
        _WRAPPER_CODE = _compile_wrapper_code()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _WRAPPER_CODE:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def compile_contexts_of(compiled: Any) -> list[Any]:
    """The Dynamo contexts behind what a user calls compiled.

    Understands what `torch.compile` returns for modules, functions and methods, modules compiled in place by `module.compile()`, and
    modules that hold compiled modules or compiled methods (also under a name of their own, as transformers' `generate` does).
    """
    from torch._dynamo.eval_frame import OptimizedModule

    found: dict[int, Any] = {}

    def add(value: Any) -> None:
        context = value.dynamo_ctx if isinstance(value, OptimizedModule) else _context_of_function(value)
        if context is not None:
            found.setdefault(id(context), context)

    if not isinstance(compiled, torch.nn.Module):
        add(compiled)
        return list(found.values())
    for module in compiled.modules():
        add(module)
        for value in vars(module).values():
            if callable(value) and not isinstance(value, torch.nn.Module):
                add(value)
    return list(found.values())


def _context_of_function(function: Any) -> Any | None:
    """The context in the closure of a compiled function or method, or None where `function` is none."""
    from torch._dynamo.eval_frame import _TorchDynamoContext

    function = getattr(function, "__func__", function)
    if not hasattr(function, "_torchdynamo_orig_callable"):
        return None
    names = function.__code__.co_freevars if hasattr(function, "__code__") else ()
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        if name == "self" and isinstance(cell.cell_contents, _TorchDynamoContext):
            return cell.cell_contents
    return None


def register_dynamo_backend(name: str, backend: Callable[..., Any]) -> None:
    """Register `backend` with Dynamo under `name`, unless an entry point or an earlier call did."""
    from torch._dynamo.backends.registry import list_backends, register_backend

    if name not in list_backends(exclude_tags=()):
        register_backend(backend, name=name)


GUARDS_PARAMETERS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
"""Whether Dynamo compiles anew where a parameter's data was rebound to memory of other sizes or strides; torch 2.11 does not."""


# AOTAutograd


def aot_compile(
    gm: GraphModule, example_inputs: Sequence[Any], *, inference: GraphCompiler, forward: GraphCompiler, backward: GraphCompiler
) -> Callable[..., Any]:
    """AOTAutograd without decompositions; mutations of inputs stay in an inference graph, as `copy_` nodes at its end.

    `forward` and `backward` compile the parts of a graph that needs gradients, `inference` any other graph.
    """
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_module_simplified

    compilers: dict[str, Any] = {"fw_compiler": forward, "bw_compiler": backward, "inference_compiler": inference}
    with config.patch(unlift_effect_tokens=True):  # tokens that keep calls in order are no inputs
        return aot_module_simplified(gm, example_inputs, decompositions={}, keep_inference_input_mutations=True, **compilers)


def boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Mark a function that takes its arguments as one list, and empties it, for AOTAutograd."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def static_input_indices() -> tuple[int, ...]:
    """Positions of the inputs, in the graph AOT is compiling, whose addresses stay the same: parameters and buffers."""
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    indices = metadata.static_input_indices if metadata is not None else None
    return tuple(indices or ())


STATIC_INPUT = "npu_fusion_static_input"
"""Key in the `meta` of a placeholder of ours whose address stays the same, as parameters' do."""


def real_inputs(gm: GraphModule) -> list[Any]:
    """For each placeholder of a Dynamo graph the tensor that will be passed, or None. To be asked before AOT runs."""
    arguments = [node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder")]
    return [None if argument is None else argument.example for argument in arguments]


# Memory of tensors


def has_no_memory(value: torch.Tensor) -> bool:
    """Whether a tensor is fake or on the meta device."""
    from torch._subclasses import FakeTensor

    return value.is_meta or isinstance(value, FakeTensor)


def storage_users(value: torch.Tensor) -> int:
    """How many tensors refer to the storage of `value`, itself included."""
    storage = value.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # `storage` is a user too


def is_torch_memory(value: torch.Tensor) -> bool:
    """Whether PyTorch's own allocator made the storage: not a mapped file, an array of numpy or what DLPack handed over."""
    return value.untyped_storage().resizable()


class MemoryReference:
    """Refers to the storage of a tensor without keeping it alive."""

    def __init__(self, value: torch.Tensor) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        self._reference = StorageWeakRef(value.untyped_storage())

    def freed(self) -> bool:
        """Whether the storage is gone; its address may belong to another one by now."""
        return bool(self._reference.expired())


def stop_filling_pool(device: torch.device, pool: Any) -> None:
    """End what a graph capture began: that allocations go to its pool. Does nothing where they do not."""
    end: Callable[..., Any] | None = None
    if device.type == "cuda":
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    elif device.type == "npu":
        import torch_npu

        end = getattr(torch_npu._C, "_npu_endAllocateToPool", None)
    if end is not None:
        with contextlib.suppress(RuntimeError):  # "not recording to this pool"
            end(device.index, pool)


def unowned_npu_tensor(value: torch.Tensor) -> torch.Tensor:
    """A tensor over the memory of an npu tensor that does not keep it alive."""
    import torch_npu

    unowned: torch.Tensor = torch_npu._C._weak_ref_tensor(value)
    return unowned


def npu_format_of(value: torch.Tensor) -> int:
    """The number of the format in which a tensor of an NPU is stored."""
    with without_fake():
        return int(importlib.import_module("torch_npu").get_npu_format(value))


def npu_tensor_in_format(value: torch.Tensor, format_: int) -> torch.Tensor:
    """The tensor in a format that torch_npu does not make unless it is allowed to: it is, for this call."""
    torch_npu = importlib.import_module("torch_npu")
    before = torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT")
    torch_npu._C._npu_setOption({"ALLOW_INTERNAL_FORMAT": "enable"})
    try:
        result: torch.Tensor = torch_npu.npu_format_cast(value, format_)
    finally:
        torch_npu._C._npu_setOption({"ALLOW_INTERNAL_FORMAT": "enable" if before in (b"enable", "enable") else "disable"})
    return result


def set_up_npu_compilers() -> None:
    """Make npugraph_ex, torchair and torch_npu's device known to Dynamo. Imports torch_npu."""
    from torch_npu.utils._dynamo import _lazy_dynamo_setup

    _lazy_dynamo_setup()


def accept_outputs_over_inputs() -> None:
    """Let graphs run ops of torch_npu that return given memory without a word of it in their schema.

    Such are the `.out` overloads, and `npu_format_cast` of what has the format already. Torch looks for them at a graph's first call: it
    warns, and where the variable CI is set it refuses the call.
    """
    from torch._functorch import config

    if hasattr(config, "error_on_custom_op_aliasing"):
        config.error_on_custom_op_aliasing = False


# Schemas


def parse_schema(text: str) -> Any:
    """The schema of an operator from its line, `name(Tensor x) -> Tensor`."""
    return torch._C.parse_schema(text)


# Dispatcher state and tensor kinds


def is_wrapper_subclass(value: Any) -> bool:
    """Whether `value` is a tensor subclass that AOT takes apart into plain tensors (DTensor, torchao's, ...)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(value))


def is_other_subclass(value: Any) -> bool:
    """Whether `value` is a tensor of a class of the user's own, neither torch's nor one that AOT takes apart."""
    from torch._subclasses import FakeTensor

    plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
    return isinstance(value, torch.Tensor) and type(value) not in plain and not is_wrapper_subclass(value)


def autocast_active() -> bool:
    """Whether autocast is on, for any device."""
    return bool(torch._C._is_any_autocast_enabled())


def grad_may_be_enabled(nodes: Iterator[Node]) -> bool:
    """Whether grad mode is on now, or turned on somewhere in a Dynamo graph."""
    if torch.is_grad_enabled():
        return True
    return any(node.target is torch._C._set_grad_enabled and node.args[0] is not False for node in nodes)


def region_kind(node: Node) -> str | None:
    """What kind of region a node of a Dynamo graph opens that an opaque op cannot live in, or None.

    Autocast regions change the dtypes that ops see; functorch transforms (vmap, grad, jvp) need a rule for each op; `sdpa_kernel`
    pins a kernel for the time of the call.
    """
    if node.op != "call_function":
        return None
    if node.target is torch.amp.autocast_mode._enter_autocast:
        return "autocast"
    module = getattr(node.target, "__module__", None) or ""
    if module.startswith(("torch._functorch", "torch._C._functorch")):
        return "a functorch transform"
    if module.startswith("torch.nn.attention") and "sdpa_kernel" in getattr(node.target, "__name__", ""):
        return "sdpa_kernel"
    return None


def fake_mode_of(gm: GraphModule) -> Any:
    """The fake tensor mode of a graph's metadata; None for a graph without any."""
    from torch._guards import detect_fake_mode

    modes = (detect_fake_mode(node.meta.get("val", node.meta.get("example_value"))) for node in gm.graph.nodes)
    return next((mode for mode in modes if mode is not None), None)


def allow_constants(gm: GraphModule) -> None:
    """Let whoever runs a graph on fake tensors meet real ones among its constants."""
    mode = fake_mode_of(gm)
    if mode is not None:
        mode.allow_non_fake_inputs = True


def without_fake() -> Any:
    """A context in which tensors are real, whatever fake mode is in force."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def lazy_graph_module(root: torch.nn.Module, graph: torch.fx.Graph) -> GraphModule:
    """A graph module whose Python code is generated at its first use: most are looked at and never run."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


def constant_number(tensor: Any) -> float | int | bool | None:
    """The number in a 0-d CPU tensor that tracing found in the model's code, also while fake tensors are in force; None for any other."""
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, (FakeTensor, torch.nn.Parameter)) or tensor.device.type != "cpu":
        return None
    if tensor.ndim or tensor.is_complex():
        return None
    with unset_fake_temporarily():
        number: float | int | bool = tensor.item()
    return number


def unbacked_float(mode: Any) -> Any:
    """A SymFloat of unknown value, for the metadata of a node that reads a number out of a tensor."""
    with mode.shape_env.ignore_fresh_unbacked_symbols():
        return mode.shape_env.create_unbacked_symfloat()


def unbacked_symbols(value: torch.Tensor) -> Any:
    """The symbols in the sizes and strides of a fake tensor that stand for numbers found in data."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return free_unbacked_symbols(value)


def is_configuration(grapharg: Any) -> bool:
    """Whether a graph argument of Dynamo comes from a module's attribute, a global or a closure rather than from the call's arguments."""
    from torch._dynamo.source import GlobalSource, LocalSource, UnspecializedNNModuleSource
    from torch._guards import ChainedSource

    source = getattr(grapharg, "source", None)
    while source is not None:
        if isinstance(source, (GlobalSource, UnspecializedNNModuleSource)):
            return True
        if isinstance(source, LocalSource):
            return bool(source.is_derefed_cell_contents)
        source = source.base if isinstance(source, ChainedSource) else None
    return False


def statically_true(shape_env: Any, condition: Any) -> bool:
    """Whether a sympy condition on symbolic sizes follows from what the shape environment knows. Adds no guard and reads no hint."""
    return shape_env._maybe_evaluate_static(condition) is sympy.true


def is_composite(op: torch._ops.OpOverload) -> bool:
    """Whether an op is written in terms of others, so that its schema does not say what its result aliases."""
    return bool(op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def is_dynamo_exception(error: BaseException) -> bool:
    """Whether an exception is Dynamo's own, e.g. its way to start a compilation over: it must reach Dynamo."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


# Inductor


def inductor_compile(gm: GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile an ATen graph with Inductor from inside another backend's compiler; the result takes its arguments one by one.

    `compile_fx` calls AOT again, which writes into the ambient tracing context: it gets one of its own, that shares the fake mode and with
    it the symbols and guards.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx

    ambient = TracingContext.try_get()
    fake_mode = ambient.fake_mode if ambient is not None else fake_mode_of(gm)
    with tracing(TracingContext(fake_mode)):
        compiled = compile_fx(gm, list(example_inputs), config_patches=patches)
    assert callable(compiled)
    return compiled


def inductor_has_option(name: str) -> bool:
    """Whether Inductor's configuration has an option, e.g. `triton.cudagraphs`."""
    import torch._inductor.config as inductor_config

    return name in inductor_config.get_config_copy()


def load_npu_inductor() -> None:
    """Let torch_npu register device, lowerings and passes with Inductor, as it does when `torch.compile` is told to use Inductor."""
    from torch_npu.utils._dynamo import _lazy_inductor_setup

    set_up_npu_compilers()
    _lazy_inductor_setup()


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions that Inductor applies before its post-grad passes, for the configuration in force."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def inductor_pass_base() -> type:
    """`CustomGraphPass`, of which Inductor asks a `uuid` for its cache keys."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def current_inductor_passes(name: str) -> list[Callable[[Any], Any]]:
    """The passes set already under `name` (e.g. `pre_grad_custom_pass`) in Inductor's configuration, one or a list of them."""
    import torch._inductor.config as inductor_config

    passes = getattr(inductor_config, name)
    if passes is None:
        return []
    return list(passes) if isinstance(passes, (list, tuple)) else [passes]


# Process groups


def process_group(name: str) -> Any:
    """The process group of a name, as graphs refer to it. Raises where there is none."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type,attr-defined]


def group_store(group: Any) -> Any:
    """The store through which the processes of a group find each other."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_process_group_store(group)


def keep_in_graphs(op: Any) -> None:
    """Let no pass over an FX graph drop a call of an op whose results nobody uses."""
    from torch.fx.node import has_side_effect

    has_side_effect(op)


def keep_order(op: torch._ops.OpOverload) -> None:
    """Let no compiler change the order of the calls of all ops so marked: AOT passes a token from one call to the next.

    What comes of it in a graph is `with_effects(token, op, ...)`, whose results are another token and then the op's. See also
    `without_tokens` and `keep_order_in_inductor`.
    """
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    _register_effectful_op(op, _EffectType.ORDERED)


def without_tokens(gm: GraphModule, namespace: str) -> GraphModule:
    """Make calls of a namespace's ops that tokens keep in order plain calls again, in the order that they are in. Changes the graph."""
    from torch._higher_order_ops.effects import with_effects

    graph = gm.graph
    ordered = [n for n in graph.nodes if n.target is with_effects and getattr(n.args[1], "namespace", "") == namespace]
    for node in ordered:
        token, op, *args = node.args
        with graph.inserting_before(node):
            call = graph.call_function(op, tuple(args), node.kwargs)
        _, *values = node.meta["val"]
        call.meta = {**node.meta, "val": tuple(values) if len(op._schema.returns) > 1 else values[0]}
        for item in list(node.users):
            if item.args[1] == 0:
                item.replace_all_uses_with(token)
            elif len(op._schema.returns) == 1:
                item.replace_all_uses_with(call)
            else:
                item.args = (call, item.args[1] - 1)
                continue
            graph.erase_node(item)
        graph.erase_node(node)
    if ordered:
        for sink in graph.find_nodes(op="call_function", target=torch.ops.prims._sink_tokens.default):
            if all(token.target is torch.ops.prims._make_token.default for token in sink.args[0]):
                graph.erase_node(sink)
        for token in graph.find_nodes(op="call_function", target=torch.ops.prims._make_token.default):
            if not token.users:
                graph.erase_node(token)
        gm.recompile()
    return gm


def keep_order_in_inductor(ops: Sequence[torch._ops.OpOverload]) -> None:
    """Let Inductor's scheduler know the order of ops for which `keep_order` was called. Does nothing unless Inductor was imported.

    torch 2.13 notes what an ordered call must come after by the names of buffers, and looks it up by those of operations: its scheduler
    sees none of it. What knows no such notes (torch before 2.12) has the dependency in the kernel.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None:
        return
    for op in ops:
        if op not in lowering.lowerings:
            lowering.lowerings[op] = functools.partial(_inductor_fallback, op)


def _inductor_fallback(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """What Inductor does with an op that it does not know, and the notes, by the names that they are looked up by."""
    from torch._higher_order_ops.effects import _EffectType
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    graph = V.graph
    before, count = graph.effectful_ops.get(_EffectType.ORDERED), len(graph.operations)
    made = ir.FallbackKernel.create(op, *args, **kwargs)
    result = torch.utils._pytree.tree_map(lambda x: x.wrap_for_lowering() if isinstance(x, ir.IRNode) else x, made)
    if before is not None and hasattr(graph, "additional_star_deps"):
        for operation in graph.operations[count:]:
            graph.additional_star_deps[operation.get_operation_name()].add(before.get_name())
    return result
