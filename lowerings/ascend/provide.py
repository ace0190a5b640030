"""How an Ascend provider is written: a function from a semantic call to calls of ops of the table.

    @provides("rms_norm", "npu::npu_rms_norm")
    def rms_norm(b: Builder, a: Arguments, npu: Npu) -> Node:
        y, _ = npu("npu::npu_rms_norm", a.x, a.weight, a.eps)
        return y

Every call is held against the table's limits for the target: what does not fit falls to the next provider, with the reason in the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...config import TARGETS, FusionConfig
from ...lower import Arguments, Builder, Provider, register_provider
from . import library
from .table import SOCS, ascend_ops

Lowering = Callable[[Builder, Arguments, "Npu"], "Node | Sequence[Node | None]"]
AtenLowering = Callable[[Builder, Arguments], "Node | Sequence[Node | None]"]


@dataclass(frozen=True)
class Npu:
    """Calls ops of the table in the graph that is being lowered."""

    builder: Builder

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Emit a call of a table op, or refuse it with the limit that it does not keep.

        Returns:
            the node of its result; a list of nodes for an op with several results, one for each.
        """
        op = ascend_ops()[name]
        overload = library.overload_of(op)
        if overload is None:
            self.builder.refuse(f"{op.shown} is not in the installed {library.package_of(op)}")
        arguments = {spec.name: spec.default_value for spec in overload._schema.arguments}
        arguments |= dict(zip(arguments, args, strict=False)) | kwargs
        if (reason := op.refusal(arguments, self.builder.config.target)) is not None:
            self.builder.refuse(reason)
        call = self.builder.emit(overload, *args, **kwargs)
        count = len(overload._schema.returns)
        return call if count == 1 else self.builder.results(call, count)


def provides(
    op: str,
    ascend_op: str,
    *,
    rank: int = 0,
    name: str | None = None,
    launches: int = 1,
    available: Callable[[FusionConfig, bool], bool] = lambda config, dry_run: True,
) -> Callable[[Lowering], Lowering]:
    """Register a function as the provider of a semantic op that is named after an op of the table, on the targets that have that op.

    Args:
        op: the semantic op.
        ascend_op: qualified name of the op of the table that does the work.
        rank: providers of lower rank are tried first.
        name: what the report shows, where that is not the op's name.
        launches, available: as in `Provider`.
    """
    row = ascend_ops()[ascend_op]
    targets = tuple(target for target in TARGETS if target in row.targets)

    def declare(function: Lowering) -> Lowering:
        @functools.wraps(function)
        def lower(builder: Builder, arguments: Arguments) -> Node | Sequence[Node | None]:
            library.prepare(emulate=builder.config.emulate)
            return function(builder, arguments, Npu(builder))

        register_provider(Provider(name or row.shown, op, targets, lower, rank, launches, available))
        return function

    return declare


def provides_aten(op: str, name: str, *, rank: int = 0) -> Callable[[AtenLowering], AtenLowering]:
    """Register a function as the provider of a semantic op that calls PyTorch's own ops alone, on all Ascend targets.

    Args:
        op: the semantic op.
        name: what the report shows: the ops that are called.
        rank: providers of lower rank are tried first.
    """

    def declare(function: AtenLowering) -> AtenLowering:
        register_provider(Provider(name, op, tuple(target for target in TARGETS if target in SOCS), function, rank))
        return function

    return declare


def keeps_rounding(b: Builder, rounds_at: torch.dtype | None, model_rounds_at: torch.dtype | None, what: str) -> None:
    """Refuse a call where an op rounds an intermediate at another point than the configuration allows.

    Args:
        rounds_at: the dtype to which the op rounds `what`; None where it keeps fp32.
        model_rounds_at: the dtype to which the model does.
        what: names the intermediate.
    """
    if rounds_at == model_rounds_at:
        return
    b.require(rounds_at is None or rounds_at == torch.float32, f"it rounds {what} to {rounds_at}, the model keeps it in fp32")
    b.require(b.config.rounding != "exact", f"it keeps {what} in fp32, the model rounds it to {model_rounds_at}: rounding is 'exact'")
