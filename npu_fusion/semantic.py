"""Semantic ops: `npu_fusion::name`, what is computed, free of any target.

A semantic op is declared once, by decorating its reference implementation::

    @semantic_op("norm", "(Tensor x, Tensor? weight, float eps) -> Tensor")
    def rms_norm(x, weight, eps): ...

    @rms_norm.fake
    def _(x, weight, eps): return torch.empty_like(x)

The reference is written in plain PyTorch and runs on every device; the fake kernel computes metadata only and must accept symbolic
sizes without adding guards. Ops are registered with `torch.library.Library.impl` rather than `custom_op`: a call costs a third as much
on the host, and none of these ops mutates or aliases its inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from .errors import RuleError

NAMESPACE = "npu_fusion"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_OPS: dict[str, SemanticOp] = {}


@dataclass(frozen=True, eq=False)
class SemanticOp:
    """One semantic op: its family, schema, reference and fake kernel.

    Calling it runs the torch operator, so that a call can be traced, faked and profiled like any other. `parts` names the ops that compute
    the same one after the other, where it stands for several; its reference is written with them (see decompose.py). `ordered` says that it
    is a collective: all ranks must make its calls in the same order, and none may be left out, or made twice. `launches` is how many
    kernels the reference launches, for selection, where nothing else computes the op.
    The reference of a `plain` op calls PyTorch's own ops, which a graph should rather hold than a call of it that nothing on the target
    takes: a compiler, or whoever reads the graph, knows them.
    """

    name: str
    family: str
    schema: str
    reference: Callable[..., Any]
    parts: tuple[str, ...] = ()
    ordered: bool = False
    launches: int = 1
    plain: bool = False
    _fakes: list[Callable[..., Any]] = field(default_factory=list)

    @property
    def overload(self) -> OpOverload:
        """The torch operator `torch.ops.npu_fusion.<name>.default`."""
        overload: OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        return overload

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.reference) or ""

    def fake(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Register the fake kernel (decorator)."""
        if self._fakes:
            raise RuleError(f"semantic op {self.name!r} has a fake kernel already")
        self._fakes.append(kernel)
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", kernel, lib=_LIBRARY)
        return kernel

    def differentiate(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        """Register the gradient, as `torch.library.register_autograd` has it."""
        torch.library.register_autograd(f"{NAMESPACE}::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)


def semantic_op(
    family: str, schema: str, *, parts: tuple[str, ...] = (), ordered: bool = False, launches: int = 1, plain: bool = False
) -> Callable[[Callable[..., Any]], SemanticOp]:
    """Declare the semantic op named like the decorated reference function, with the given schema tail `(args) -> returns`."""

    def declare(reference: Callable[..., Any]) -> SemanticOp:
        name = reference.__name__
        if name in _OPS:
            raise RuleError(f"semantic op {name!r} is declared twice")
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        op = SemanticOp(name, family, schema, reference, parts, ordered, launches, plain)
        _OPS[name] = op
        return op

    return declare


def semantic_ops() -> Iterator[SemanticOp]:
    """All declared semantic ops, in the order of declaration."""
    return iter(_OPS.values())


def parts_of(name: str) -> tuple[str, ...]:
    """The ops that compute the same as the op of this name, one after the other; none where it stands for itself alone."""
    return _OPS[name].parts if name in _OPS else ()


def reference_launches(name: str) -> int:
    """How many kernels the reference of the op of this name launches, 1 where nothing is known of it."""
    return _OPS[name].launches if name in _OPS else 1


def is_ordered(target: Any) -> bool:
    """Whether an FX call target is a collective of ours."""
    op = find_semantic_op(target)
    return op is not None and op.ordered


def find_semantic_op(target: Any) -> SemanticOp | None:
    """The semantic op behind an FX call target, or None."""
    if isinstance(target, OpOverload) and target.namespace == NAMESPACE:
        return _OPS.get(target._opname)
    return None
