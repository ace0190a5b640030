"""Lowering: each semantic op becomes what the target runs.

A `Provider` is one way to run a semantic op on a target: a function that emits the nodes which compute a call, or refuses the call and says
why. The providers of a target are tried in the order of their rank; the reference, which every semantic op is born with, comes last.

What keeps this sound:

- A provider emits into a transaction. When it refuses, or raises, what it emitted so far is taken back, and the next one is tried.
- An argument that a provider did not look at must have its default value: one that it knows nothing of is a refusal, not a wrong result.
- Results must agree in shape and dtype with what they replace, and in memory layout where somebody may rely on that.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from .config import FusionConfig
from .decompose import emit_parts
from .layout import emit_layout, memory_of, needs_layout, own_tensor, returned_memory, row_major, same_strides
from .lift import restore
from .metadata import Metadata
from .provenance import PROVENANCE
from .record import GraphRecord
from .semantic import SemanticOp, find_semantic_op, parts_of, reference_launches
from .torch_private import fake_mode_of, without_fake
from .view.shapes import known_equal, known_ge, same_shape, size_facts, to_dim, to_shape
from .view.value import attribute_key

log = logging.getLogger(__name__)

aten = torch.ops.aten
REFERENCE = "reference"
CALLS = "npu_fusion_calls"
"""Key of a node's metadata: names of the semantic calls whose results it holds."""
_MEMORY = frozenset({aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default})


class Refused(Exception):
    """A provider cannot take a call; the message is the reason, in words for the model's author.

    Without a message the call is no business of the provider's: nothing is worth saying of it.
    """


class Arguments:
    """The arguments of a semantic call by name, defaults filled in; remembers which were asked for.

    Tensors and symbolic sizes are FX nodes, everything else is a Python value.
    """

    def __init__(self, node: Node) -> None:
        assert isinstance(node.target, OpOverload)
        self._defaults = {spec.name: spec.default_value for spec in node.target._schema.arguments}
        names = [spec.name for spec in node.target._schema.arguments]
        self._values: dict[str, Any] = {**self._defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
        self._read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        try:
            value = self._values[name]
        except KeyError:
            raise AttributeError(f"the semantic op has no argument {name!r}; it has {', '.join(self._values)}") from None
        self._read.add(name)
        return value

    def unread(self) -> dict[str, Any]:
        """The arguments that nobody asked for and whose values are not their defaults."""
        return {
            name: value
            for name, value in self._values.items()
            if name not in self._read and attribute_key(value) != attribute_key(self._defaults[name])
        }


@dataclass(frozen=True, eq=False)
class Provider:
    """One way to run a semantic op on a target.

    Args:
        name: what the report shows, e.g. `npu.npu_rms_norm` or `triton.rms_norm`.
        op: the semantic op.
        targets: targets on which it exists.
        lower: emits the nodes that compute the call and returns that of its result; one for each result, None where a result is not
            computed, for an op with several. Raises `Refused`, by `builder.refuse` or `builder.require`, for a call that it cannot take.
        rank: providers of lower rank are tried first.
        launches: how many kernels a call of its usual form launches.
        available: whether what it calls can run under a configuration, or need not, because nothing does (a dry run).
    """

    name: str
    op: str
    targets: tuple[str, ...]
    lower: Callable[[Builder, Arguments], Node | Sequence[Node | None]]
    rank: int = 0
    launches: int = 1
    available: Callable[[FusionConfig, bool], bool] = lambda config, dry_run: True


_PROVIDERS: list[Provider] = []


def register_provider(*providers: Provider) -> None:
    """Add providers; what lowerings/ do when they are imported."""
    _PROVIDERS.extend(providers)


def providers_of(op: str, target: str) -> list[Provider]:
    """The providers of a semantic op on a target, best first, without the reference."""
    return sorted((p for p in _PROVIDERS if p.op == op and target in p.targets), key=lambda p: p.rank)


def launches_of(op: str, config: FusionConfig, dry_run: bool) -> int:
    """How many kernels a call of a semantic op is expected to launch on the target: what its best provider says, or its reference.

    An op of several parts that nothing computes is taken apart where something computes one of these, and counts as they do; unless it says
    how many its reference launches, being of no use but as a whole.
    """
    best = _best_provider(op, config, dry_run)
    if best is not None:
        return best.launches
    declared, parts = reference_launches(op), parts_of(op)
    if declared == 1 and any(_best_provider(part, config, dry_run) is not None for part in parts):
        return sum(launches_of(part, config, dry_run) for part in parts)
    return declared


def _best_provider(op: str, config: FusionConfig, dry_run: bool) -> Provider | None:
    return next((provider for provider in providers_of(op, config.target) if provider.available(config, dry_run)), None)


class Builder:
    """Emits nodes in place of one semantic call, and says what is known of their values.

    A computation that an earlier call of the same graph emitted already is not emitted again: what all layers share, the inverse of a mask
    or a gathered table, is computed once.

    Attributes:
        config: the configuration in force; `config.target` is what is lowered for.
        node: the semantic call.
        dry_run: whether the graph is only to be shown: its target may be absent.
    """

    def __init__(self, gm: GraphModule, config: FusionConfig, dry_run: bool = False) -> None:
        self.gm = gm
        self.config = config
        self.node: Node
        self.dry_run = dry_run
        self._metadata = Metadata(fake_mode_of(gm))
        self._emitted: list[tuple[Any, Node]] = []
        self._known: dict[Any, Node] = {}
        self._constants: dict[Any, str] = {}
        self._given_sizes = [node for node in gm.graph.find_nodes(op="placeholder") if isinstance(node.meta.get("val"), torch.SymInt)]

    @property
    def graph(self) -> Graph:
        return self.gm.graph

    # ---------------------------------------------------------------- refusing

    def refuse(self, reason: str) -> NoReturn:
        """Leave the call to the next provider."""
        raise Refused(reason)

    def require(self, condition: bool, reason: str) -> None:
        """Refuse the call with `reason`, which says what is in the way, unless `condition`."""
        if not condition:
            self.refuse(reason)

    def only_if(self, condition: bool) -> None:
        """Pass the call over in silence unless `condition`: it is of a form that is another provider's business."""
        if not condition:
            raise Refused

    # ---------------------------------------------------------------- what is known

    def val(self, node: Node) -> Tensor:
        """The fake tensor of a node."""
        val = node.meta["val"]
        assert isinstance(val, Tensor)
        return val

    def equal(self, a: Any, b: Any) -> bool:
        """Whether two sizes (ints, SymInts or nodes) are equal for certain."""
        return known_equal(_dim(a), _dim(b))

    def at_least(self, a: Any, b: Any) -> bool:
        """Whether size `a` is at least size `b` for certain."""
        return known_ge(_dim(a), _dim(b))

    # ---------------------------------------------------------------- emitting

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A node that calls `target`, its metadata computed by its own fake kernel alone."""
        key = _call_key(target, args, kwargs)
        known = self._known.get(key) if key is not None else None
        return self._insert(key, target, args, kwargs) if known is None else known

    def emit_anew(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """As `emit`, a node that no later call shares."""
        return self._insert(None, target, args, kwargs)

    def copy(self, node: Node) -> Node:
        """A copy of the node in memory of its own, which nothing else shares."""
        return self._insert(None, aten.clone.default, (node,), {})

    def _insert(self, key: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        self._emitted.append((key, node))
        node.meta["val"] = self._metadata.of(target, args, kwargs)
        node.meta.update({name: self.node.meta[name] for name in PROVENANCE if name in self.node.meta})
        if key is not None:
            self._known[key] = node
        return node

    def results(self, call: Node, count: int) -> list[Node]:
        """The first `count` results of a call that has several."""
        return [self.emit(operator.getitem, call, i) for i in range(count)]

    def size(self, node: Node, dim: int) -> Any:
        """A size of a tensor: an int, or a node that holds it, that of the graph's inputs where one does."""
        size: Any = self.val(node).shape[dim]
        if isinstance(size, int):
            return size
        for given in self._given_sizes:
            if known_equal(to_dim(size), to_dim(given.meta["val"])):
                return given
        return self.emit(aten.sym_size.int, node, dim % self.val(node).dim())

    def transpose(self, node: Node, i: int, j: int) -> Node:
        """The node with two dimensions swapped; of a swap of the same dimensions, what was swapped."""
        rank = self.val(node).dim()
        dims = {i % rank, j % rank}
        if node.target is aten.transpose.int and {int(d) % rank for d in node.args[1:]} == dims:  # type: ignore[arg-type]
            source = node.args[0]
            assert isinstance(source, Node)
            return source
        return self.emit(aten.transpose.int, node, min(dims), max(dims))

    def reshape(self, node: Node, sizes: Sequence[Any]) -> Node:
        """The node in another shape; sizes are ints or nodes."""
        if same_shape(to_shape(self.val(node).shape), tuple(_dim(size) for size in sizes)):
            return node
        return self.emit(aten.reshape.default, node, list(sizes))

    def contiguous(self, node: Node) -> Node:
        """The node in row-major order: a copy unless it surely lies so."""
        return node if row_major(self.val(node)) else self.emit(aten.clone.default, node, memory_format=torch.contiguous_format)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        return node if self.val(node).dtype == dtype else self.emit(aten._to_copy.default, node, dtype=dtype)

    def constant(self, key: Hashable, make: Callable[[], Tensor]) -> Node:
        """A tensor that the graph owns, made by `make` once a graph for each `key`; fake in a dry run, whose device may be absent."""
        name = self._constants.get(key)
        if name is None:
            with self._metadata.fake_mode if self.dry_run else without_fake():
                name = self._constants[key] = own_tensor(self.gm, make())
        known = self._known.get(("constant", name))
        if known is not None:
            return known
        node = self.graph.get_attr(name)
        self._emitted.append((("constant", name), node))
        node.meta["val"] = self._metadata.of_constant(getattr(self.gm, name))
        self._known["constant", name] = node
        return node

    def forget(self, *nodes: Node) -> None:
        """Emit anew what would lie in the memory of the nodes: an op that was emitted has written over it."""
        written = {memory_of(node) for node in nodes}
        self._known = {key: node for key, node in self._known.items() if memory_of(node) not in written}

    # ---------------------------------------------------------------- transactions

    def begin(self, node: Node) -> None:
        """Start to lower `node`: what is emitted from here on stands before it."""
        self.node = node
        self._emitted = []
        self.graph.inserting_before(node)

    def inputs(self) -> list[Node]:
        """The nodes that what was emitted since `begin` reads, besides each other."""
        emitted = {node for _, node in self._emitted}
        return [node for node in dict.fromkeys(read for made in emitted for read in made.all_input_nodes) if node not in emitted]

    def calls(self) -> list[tuple[Node, SemanticOp]]:
        """The calls of semantic ops among what was emitted since `begin`."""
        found = [(node, find_semantic_op(node.target)) for _, node in self._emitted]
        return [(node, op) for node, op in found if op is not None]

    def take_back(self) -> None:
        """Erase what was emitted since `begin`."""
        for key, node in reversed(self._emitted):
            self._known.pop(key, None)
            self.graph.erase_node(node)
        self._emitted = []

    def drop_constants(self) -> None:
        """Delete the constants that no node reads: those of calls that were taken back."""
        used = {node.target for node in self.graph.find_nodes(op="get_attr")}
        for name in self._constants.values():
            if name not in used:
                delattr(self.gm, name)

    def sweep(self) -> None:
        """Erase what was emitted since `begin` and is of no use."""
        kept = []
        for key, node in reversed(self._emitted):
            if node.users or node.is_impure():
                kept.append((key, node))
                continue
            self._known.pop(key, None)
            self.graph.erase_node(node)
        self._emitted = kept[::-1]


DEVICES = {"cuda": "cuda", "cpu": "cpu"}  # of the targets that are not Ascend's


def device_of(config: FusionConfig) -> str:
    """The device type of the tensors on which what is lowered for `config.target` runs."""
    return "cpu" if config.emulate else DEVICES.get(config.target, "npu")


def elsewhere(gm: GraphModule, config: FusionConfig) -> str | None:
    """Why ops of the target cannot run on the tensors of the graph, or None."""
    wanted = device_of(config)
    found = {node.meta["val"].device.type for node in gm.graph.nodes if isinstance(node.meta.get("val"), Tensor)} - {"meta"}
    if not found or wanted in found:
        return None
    where = ", ".join(sorted(found))
    hint = "" if wanted != "npu" else "; options={'emulate': True} runs the Ascend lowering on CPU tensors"
    return f"target {config.target} needs tensors on {wanted}, these are on {where}: fused ops run as their references{hint}"


def lower_graph(gm: GraphModule, config: FusionConfig, record: GraphRecord, *, reference_only: str | None = None) -> None:
    """Lower all semantic ops of the graph for `config.target`, in place; lifted ops that no rule took become what they were.

    Fills `lowered_to` of the record's sites, and `reason` where a better provider had to be passed over.

    Args:
        gm: the fused graph.
        config: target and rounding contract.
        record: the graph's record.
        reference_only: why no provider of the target can run here; every op then stays its reference.
    """
    mode = fake_mode_of(gm)
    with size_facts(None if mode is None else mode.shape_env):
        chosen = _lower_all(gm, config, record, reference_only)
    record.sites[:] = [
        dataclasses.replace(site, lowered_to=chosen[site.call][0], reason=chosen[site.call][1]) if site.call in chosen else site
        for site in record.sites
    ]
    restore(gm)
    _erase_dead(gm.graph)
    gm.recompile()


def _erase_dead(graph: Graph) -> None:
    """Erase what only calls that were lowered needed: views that a provider looked through."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not node.is_impure():
            graph.erase_node(node)


def _lower_all(gm: GraphModule, config: FusionConfig, record: GraphRecord, reference_only: str | None) -> dict[str, tuple[str, str | None]]:
    """Node name of each semantic call to the provider taken and why those before it were not."""
    chosen: dict[str, tuple[str, str | None]] = {}
    builder: Builder | None = None
    for node in list(gm.graph.nodes):
        op = find_semantic_op(node.target)
        if op is None:
            continue
        known = not reference_only and any(providers_of(name, config.target) for name in (op.name, *parts_of(op.name)))
        if known and builder is None:
            builder = Builder(gm, config, record.dry_run)
        name = node.name
        if builder is not None and known:
            chosen[name] = _lower(builder, node, op, record)
        else:
            chosen[name] = REFERENCE, None if reference_only else _why_none(op, config.target)
    if builder is not None:
        builder.drop_constants()
    if reference_only and chosen:
        record.notes.append(reference_only)
    return chosen


def _why_none(op: SemanticOp, target: str) -> str | None:
    """What to say of an op without a provider; nothing on a target without any."""
    return f"nothing on {target} is known to compute it" if any(target in provider.targets for provider in _PROVIDERS) else None


def _lower(builder: Builder, node: Node, op: SemanticOp, record: GraphRecord) -> tuple[str, str | None]:
    """Lower one node; the provider taken, and why those before it were not.

    A call of several parts that no provider takes is taken apart, each part lowered by itself, where there is a provider of one of them;
    one of a plain op becomes PyTorch's own ops.
    """
    target = builder.config.target
    passed_over: list[str] = []
    providers = providers_of(op.name, target)
    for provider in providers:
        reason = _try(builder, node, op, provider, record)
        if reason is None:
            return provider.name, "; ".join(passed_over) or None
        if reason:
            passed_over.append(f"{provider.name}: {reason}")
    if not providers and (reason := _why_none(op, target)) is not None:
        passed_over.append(reason)
    divisible = op.plain or any(providers_of(part, target) for part in op.parts)
    if divisible and _take_apart(builder, node, op, record):
        lowered = [(part, *_lower(builder, call, part, record)) for call, part in builder.calls()]
        passed_over += [f"{part.name}: {reason}" for part, _, reason in lowered if reason]
        return " + ".join(name for _, name, _ in lowered) or REFERENCE, "; ".join(passed_over) or None
    return REFERENCE, "; ".join(passed_over) or None


def _take_apart(builder: Builder, node: Node, op: SemanticOp, record: GraphRecord) -> bool:
    """Replace the node by calls of its parts; False, the graph being as it was, if that cannot be done."""
    builder.begin(node)
    try:
        _replace(builder, node, emit_parts(op, node, builder.emit_anew, builder.results))
    except Exception as error:  # a reference may raise anything for the values of a graph; it then runs as a whole
        builder.take_back()
        text = f"{type(error).__name__}: {error}"
        if record.rule_errors.setdefault(op.name, text) is text:
            log.warning("a call of %s cannot be taken apart", op.name, exc_info=error)
        return False
    builder.sweep()
    return True


def _try(builder: Builder, node: Node, op: SemanticOp, provider: Provider, record: GraphRecord) -> str | None:
    """Replace the node by what the provider emits; why it does not take the call, the graph being as it was, or None."""
    builder.begin(node)
    arguments = Arguments(node)
    try:
        results = provider.lower(builder, arguments)
        unread = arguments.unread()
        if unread:
            builder.refuse(f"it does not take {', '.join(f'{name}={_shown(value)}' for name, value in unread.items())}")
        _replace(builder, node, results)
    except Refused as refusal:
        builder.take_back()
        return str(refusal)
    except Exception as error:  # a provider's arguments may make any op's fake kernel raise: the next one is tried
        builder.take_back()
        text = f"{type(error).__name__}: {error}"
        if record.rule_errors.setdefault(provider.name, text) is text:
            log.warning("provider %r cannot lower a call of %s", provider.name, op.name, exc_info=error)
        return text
    builder.sweep()
    return None


def _replace(builder: Builder, node: Node, results: Node | Sequence[Node | None]) -> None:
    """Let the users of a semantic call use what a provider emitted for it."""
    if isinstance(results, Node):
        pairs = [(node, _agreeing(builder, node, results))]
    else:
        pairs = []
        for user in [user for user in node.users if user.users]:
            place: Any = user.args[1]
            result = results[place]
            if result is None:
                builder.refuse(f"it does not compute result {place}")
            pairs.append((user, _agreeing(builder, user, result)))
    for old, new in pairs:
        old.replace_all_uses_with(new)
        new.meta[CALLS] = new.meta.get(CALLS, frozenset()) | old.meta.get(CALLS, frozenset()) | {node.name}
    for unused in (*node.users, node) if not isinstance(results, Node) else (node,):
        builder.graph.erase_node(unused)


def _agreeing(builder: Builder, old: Node, new: Node) -> Node:
    """`new`, which must stand for `old`; copied into its memory layout where somebody may rely on that."""
    before, after = builder.val(old), builder.val(new)
    if before.dtype != after.dtype:
        builder.refuse(f"it gives {after.dtype} where the model has {before.dtype}")
    if not same_shape(to_shape(before.shape), to_shape(after.shape)):
        builder.refuse(f"it gives shape {list(after.shape)} where the model has {list(before.shape)}")
    if same_strides(before, after) or not needs_layout(old):
        return builder.copy(new) if _would_alias(builder.graph, old, new) else new
    laid_out = emit_layout(builder.emit, new, before)
    if laid_out is None:
        builder.refuse("its result has another memory layout, on which something outside the graph may rely")
    return laid_out


def _would_alias(graph: Graph, old: Node, new: Node) -> bool:
    """Whether the caller, who gets `old` as a tensor of its own, would get memory that it has: an input, or what an equal call gave it."""
    returned, memory = returned_memory(graph), memory_of(new)
    return old in returned and (memory.op != "call_function" or memory in returned)


def _dim(size: Any) -> Any:
    return to_dim(size.meta["val"] if isinstance(size, Node) else size)


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Node) else repr(value)


def _call_key(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What equal calls have in common; None for a call that must not be shared: one that writes, draws, or gives memory to write to."""
    if target in _MEMORY:
        return None
    if isinstance(target, OpOverload) and (target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags):
        return None

    def key(value: Any) -> Any:
        return (
            ("node", value)
            if isinstance(value, Node)
            else tuple(map(key, value))
            if isinstance(value, (list, tuple))
            else attribute_key(value)
        )

    return target, key(args), key(tuple(sorted(kwargs.items())))
