"""Which ops of the table the installed libraries have."""

from __future__ import annotations

from typing import Any, Literal

from ...torch_private import parse_schema
from . import sgl
from .library import define_ops, overload_of
from .table import AscendOp

State = Literal["present", "another schema", "missing"]


def state_of(op: AscendOp) -> State:
    """Whether the installed library of an op has it, taking at least the arguments that the table knows.

    Newer arguments with defaults are no other schema: calls made for the table's schema mean the same there. Ops that this package defined
    itself, where their library is absent, are missing. Of a function of sgl-kernel-npu, which is an op by our wrapping, it is known only
    whether the package is there.
    """
    if op.namespace == sgl.NAMESPACE:
        return "present" if sgl.installed() else "missing"
    overload = overload_of(op)
    if overload is None or op.name in define_ops():
        return "missing"
    schema: Any = overload._schema
    return "present" if schema.is_backward_compatible_with(schema_of(op)) else "another schema"


def schema_of(op: AscendOp) -> Any:
    """The schema of an op as the table has it."""
    return parse_schema(f"{op.namespace}::{op.schema}")
