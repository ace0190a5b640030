"""Inductor as an executor, and as the route of `torch.compile(model, backend="inductor", options=inductor_options())`.

Executor: memory-bound semantic ops become the ATen code of their reference, so that Inductor fuses them with what stands beside them
(`expand_for_inductor`).

Route: two of Inductor's custom passes. The pre-grad pass sees torch functions; it lifts attention and rms_norm, and hides behind opaque ops
what Inductor's decompositions would take apart beyond recognition (silu becomes neg, exp, add, div). The post-grad pass uncovers these
again, fuses and lowers, and decomposes what is left, for Inductor lowers decomposed graphs only. This route cannot see what Inductor's own
pre-grad and joint-graph passes, which run in between, have changed, nor training graphs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .. import lift, torch_private
from ..backend import claim, resolve
from ..config import FusionConfig
from ..errors import ConfigError
from ..record import GraphRecord
from ..semantic import find_semantic_op

aten = torch.ops.aten

# Families whose ops move bytes and do little else: Inductor fuses their reference with its neighbours. The reference of a product is the
# model's own product.
EXPANDED_FAMILIES = frozenset({"norm", "rope", "glu", "quant", "matmul"})
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "from_node", "seq_nr")


def compile_with_inductor(gm: GraphModule, example_inputs: Sequence[Any], config: FusionConfig) -> Callable[..., Any]:
    """Compile a lowered graph; the result takes its arguments one by one.

    Raises:
        ConfigError: Inductor has no such option, or cannot compile for an NPU here.
    """
    options = dict(config.executor_options)
    for name in options:
        if not torch_private.inductor_has_option(name):
            raise ConfigError(f"Inductor has no option {name!r}")
    if any(isinstance(value, Tensor) and value.device.type == "npu" for value in example_inputs):
        if (missing := _missing_for_npu()) is not None:
            raise ConfigError(f"executor 'inductor' on an NPU needs {missing}; 'graph', 'npugraph_ex' and 'eager' do without")
        torch_private.load_npu_inductor()
    return torch_private.inductor_compile(gm, example_inputs, options or None)


def _missing_for_npu() -> str | None:
    """What torch_npu's Inductor needs and is not installed, or None. Its default code generator is triton-ascend's."""
    if os.environ.get("TORCHINDUCTOR_NPU_BACKEND", "default") not in ("default", "triton"):
        return None
    found = importlib.util.find_spec("triton") is not None and importlib.util.find_spec("triton.backends.ascend") is not None
    return None if found else "triton-ascend, which is not installed here"


def _load_npu_passes() -> None:
    """Have torch_npu put its passes into Inductor's configuration now, so that ours keep them: later it would replace what it finds."""
    if "torch_npu" in sys.modules and torch.get_device_module("npu").is_available() and _missing_for_npu() is None:
        torch_private.load_npu_inductor()


def expand_for_inductor(gm: GraphModule, record: GraphRecord) -> int:
    """Replace the semantic ops that Inductor should see as ATen by their references, in place. Returns how many there were."""
    expanded: set[str] = set()
    for node in list(gm.graph.nodes):
        op = find_semantic_op(node.target)
        if op is not None and op.family in EXPANDED_FAMILIES:
            expanded.add(node.name)
            expand_call(gm, node, op.reference)
    if expanded:
        record.sites = [dataclasses.replace(site, lowered_to="inductor") if site.call in expanded else site for site in record.sites]
        gm.graph.lint()
        gm.recompile()
    return len(expanded)


def expand_call(gm: GraphModule, node: Node, function: Callable[..., Any], decompositions: dict[Any, Any] | None = None) -> None:
    """Replace one call by the ops that `function` runs for its arguments.

    Args:
        gm: the graph with `meta["val"]`; sizes stay symbolic.
        node: a call with one result, or with several that `getitem` nodes take.
        function: takes the arguments of the call.
        decompositions: applied to the ops of `function`.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Node)]

    def call(*values: Any) -> Any:
        filled = list(leaves)
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    with torch_private.fake_mode_of(gm), torch.no_grad():
        traced = make_fx(call, decomposition_table=decompositions)(*(leaves[i].meta["val"] for i in places))
    results = _inline(gm, node, traced, [leaves[i] for i in places])
    if not isinstance(results, (tuple, list)):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            place: Any = user.args[1]
            user.replace_all_uses_with(results[place])
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _inline(gm: GraphModule, before: Node, traced: GraphModule, inputs: Sequence[Node]) -> Any:
    """Copy a traced graph into `gm` ahead of a node; returns what the traced graph returns."""
    copies: dict[Node, Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.graph.nodes:
        if node.op == "output":
            return torch.fx.node.map_arg(node.args[0], copies.__getitem__)
        if node.op == "placeholder":
            continue
        with gm.graph.inserting_before(before):
            copy = gm.graph.node_copy(node, copies.__getitem__)
        if node.op == "get_attr":
            copy.target = _adopt(gm, getattr(traced, node.target))
        copy.meta.update({key: before.meta[key] for key in _PROVENANCE if key in before.meta})
        copies[node] = copy
    raise AssertionError("a traced graph has an output")


def _adopt(gm: GraphModule, constant: Any) -> str:
    serial = 0
    while hasattr(gm, name := f"_npu_fusion_constant{serial}"):
        serial += 1
    setattr(gm, name, constant)
    return name


# The route through Inductor's custom passes


def inductor_options(config: FusionConfig | None = None, **options: Any) -> dict[str, Any]:
    """Options that make `torch.compile(model, backend="inductor", options=...)` fuse as npu_fusion does.

    Passes that Inductor's configuration holds already, torch_npu's among them, are kept, and run first. Graphs are reported by
    `npu_fusion.report` as under our own backend; one that Inductor takes from its on-disk cache has no record, for no pass ran.

    Args:
        config: the configuration; or
        options: its fields by name.

    Raises:
        ConfigError: an unknown option, rule or target.
    """
    config = config or FusionConfig.from_options(options)
    _load_npu_passes()
    before = {name: torch_private.current_inductor_passes(name) for name in ("pre_grad_custom_pass", "post_grad_custom_pre_pass")}
    passes = _passes()
    notes: list[str] = []
    return {
        "pre_grad_custom_pass": passes.lift(config, before["pre_grad_custom_pass"], notes),
        "post_grad_custom_pre_pass": passes.fuse(config, before["post_grad_custom_pre_pass"], notes),
    }


@dataclass(frozen=True)
class _Passes:
    lift: type
    fuse: type


@cache
def _passes() -> _Passes:
    """The two pass classes; made on first use, for their base class imports Inductor."""
    base = torch_private.inductor_pass_base()

    class _Pass(base):  # type: ignore[misc, valid-type]
        """Runs what stood in its place, then itself."""

        def __init__(self, config: FusionConfig, before: Sequence[Callable[[Any], Any]], notes: list[str]) -> None:
            self.config = config
            self.before = tuple(before)
            self.notes = notes

        def __call__(self, graph: Graph) -> None:
            for earlier in self.before:
                earlier(graph)
            gm = graph.owning_module
            assert gm is not None
            self.apply(gm)

        @abstractmethod
        def apply(self, gm: GraphModule) -> None:
            """Rewrite the graph in place."""

        def uuid(self) -> Any:
            """What Inductor's caches are keyed by; None, which turns them off, where a pass or rule cannot say what it does."""
            return fingerprint(type(self).__name__, self.config, self.before)

    class LiftPass(_Pass):
        def apply(self, gm: GraphModule) -> None:
            self.notes[:] = prepare(gm)

    class FusePass(_Pass):
        def apply(self, gm: GraphModule) -> None:
            if not is_training_graph(gm.graph):
                rewrite(gm, self.config, self.notes)

    return _Passes(LiftPass, FusePass)


def is_training_graph(graph: Graph) -> bool:
    """Whether AOT made a graph as the forward or backward part of one that records gradients: it names inputs accordingly."""
    return any(node.name.startswith(("primals_", "tangents_")) for node in graph.find_nodes(op="placeholder"))


def prepare(gm: GraphModule) -> list[str]:
    """The pre-grad pass, in place: lift and hide. Returns what could not be, and why."""
    values = [node.meta.get("example_value", node.meta.get("val")) for node in gm.graph.find_nodes(op="placeholder")]
    if (reason := lift.unsafe_graph(gm, values)) is not None:
        return [f"nothing was lifted: {reason}"]
    report = lift.lift(gm, values)
    for node in list(gm.graph.nodes):
        _hide(gm.graph, node)
    gm.graph.lint()
    gm.recompile()
    return report.notes


def rewrite(gm: GraphModule, config: FusionConfig, notes: Iterable[str] = ()) -> GraphRecord:
    """The post-grad pass, in place: uncover, fuse, lower, and decompose what Inductor has no lowering for."""
    from ..lower import lower_graph
    from ..pipeline import fuse_graph

    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    resolved = dataclasses.replace(resolve(config, gm, values), executor="inductor")
    route = "compiled by Inductor: what its own pre-grad and joint passes changed before this pass is not seen"
    record = GraphRecord(config=resolved, notes=[route, *notes])
    plain = {node for node in gm.graph.nodes if lift.find_lifted(node.target) is None}
    plain -= _uncover(gm.graph)
    fuse_graph(gm, resolved, record)
    expand_for_inductor(gm, record)
    lower_graph(gm, resolved, record)
    table = torch_private.inductor_decompositions()
    for node in list(gm.graph.nodes):
        if node not in plain and isinstance(node.target, OpOverload) and (node.target in table or torch_private.is_composite(node.target)):
            expand_call(gm, node, node.target, table)
    gm.graph.lint()
    gm.recompile()
    record.stages["lowered"] = gm
    claim(record)
    return record


# Hidden ops: exactly an ATen op, opaque to Inductor's decompositions

_LIBRARY = torch.library.Library(lift.NAMESPACE, "FRAGMENT")
_HIDDEN: dict[Any, OpOverload] = {}


def _declare_hidden(op: OpOverload) -> OpOverload:
    name = "hidden_" + op._schema.name.split("::")[1].lstrip("_")
    schema = str(op._schema)
    _LIBRARY.define(name + schema[schema.index("(") :], tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{lift.NAMESPACE}::{name}", op, lib=_LIBRARY)
    hidden: OpOverload = getattr(getattr(torch.ops, lift.NAMESPACE), name).default
    _HIDDEN[hidden] = op
    return hidden


_SILU = _declare_hidden(aten.silu.default)
_GELU = _declare_hidden(aten.gelu.default)
_SOFTMAX = _declare_hidden(aten._softmax.default)
_LAYER_NORM = _declare_hidden(aten.native_layer_norm.default)


def _silu(graph: Graph, input: Node, inplace: bool = False) -> Node | None:
    return None if inplace else graph.call_function(_SILU, (input,))


def _gelu(graph: Graph, input: Node, approximate: str = "none") -> Node:
    return graph.call_function(_GELU, (input,), {"approximate": approximate})


def _softmax(graph: Graph, input: Node, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Node | None:
    if not isinstance(dim, int) or not isinstance(value := _value(input), Tensor) or not value.dim():
        return None
    if dtype is not None and dtype != value.dtype:
        input = graph.call_method("to", (input, dtype))
    return graph.call_function(_SOFTMAX, (input, dim, False))


def _softmax_method(graph: Graph, input: Node, dim: int | None = None, dtype: torch.dtype | None = None) -> Node | None:
    return _softmax(graph, input, dim, dtype=dtype)


def _layer_norm(
    graph: Graph, input: Node, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Node | None:
    if any(isinstance(t, Node) and _value(t).dtype != _value(input).dtype for t in (weight, bias)):
        return None
    three = graph.call_function(_LAYER_NORM, (input, list(normalized_shape), weight, bias, eps))
    return graph.call_function(_first, (three,))


def _first(results: Sequence[Any]) -> Any:
    return results[0]


_ADAPTERS: dict[Any, Callable[..., Node | None]] = {
    F.silu: _silu,
    F.gelu: _gelu,
    F.softmax: _softmax,
    torch.softmax: _softmax_method,
    ("method", "softmax"): _softmax_method,
    F.layer_norm: _layer_norm,
}


def _value(node: Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _hide(graph: Graph, node: Node) -> None:
    """Put a hidden op in place of a torch function that Inductor would decompose."""
    if node.op not in ("call_function", "call_method"):
        return
    adapter = _ADAPTERS.get(("method", node.target) if node.op == "call_method" else node.target)
    value = _value(node)
    if adapter is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return
    with graph.inserting_before(node):
        hidden = adapter(graph, *node.args, **node.kwargs)
    if hidden is not None:
        hidden.meta.update(node.meta)
        node.replace_all_uses_with(hidden)
        graph.erase_node(node)


def _uncover(graph: Graph) -> set[Node]:
    """Turn hidden ops back into the ATen ops they are. Returns their nodes."""
    uncovered = {node for node in graph.nodes if node.op == "call_function" and node.target in _HIDDEN}
    for node in uncovered:
        node.target = _HIDDEN[node.target]
    return uncovered


# Cache keys


def fingerprint(kind: str, config: FusionConfig, before: Iterable[Any]) -> str | None:
    """A hash of all that the passes' result depends on: our code, the user's rules, the configuration, torch, and the earlier passes."""
    digest = hashlib.sha256(f"{kind} {torch.__version__} {_code_hash()}".encode())
    for field in dataclasses.fields(config):
        if field.name != "rules":
            digest.update(f"{field.name}={getattr(config, field.name)!r};".encode())
    texts = [rule if isinstance(rule, str) else _rule_text(rule) for rule in config.rules or ()]
    if None in texts:
        return None
    digest.update(repr(texts).encode())
    digest.update(b"all rules" if config.rules is None else b"these rules")
    for earlier in before:
        uuid = earlier.uuid() if hasattr(earlier, "uuid") else None
        if uuid is None:
            return None
        digest.update(repr(uuid).encode())
    return digest.hexdigest()


def _rule_text(rule: Any) -> str | None:
    """The source file of a user's rule, and the rule's fields; None where there is no source: a rule typed into a shell."""
    sources: list[str] = []
    for value in (vars(rule)[field.name] for field in dataclasses.fields(rule)):
        if not callable(value):
            continue
        if getattr(value, "__closure__", None):
            return None
        try:
            sources.append(Path(inspect.getfile(value)).read_text())
        except (TypeError, OSError):
            return None
    return f"{rule.name}\n" + "\n".join(sources)


@cache
def _code_hash() -> str:
    """A hash of this package's source, rules, lowerings and tables of ops included."""
    package = Path(lift.__file__).parent
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(package, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith((".py", ".toml")):
                digest.update(Path(folder, name).read_bytes())
    return digest.hexdigest()
