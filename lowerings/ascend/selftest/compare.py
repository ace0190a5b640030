"""Runs the cases of the self test: an op on a device against its CPU kernel, on equal arguments.

The CPU kernels round where the operators' sources say, so that what is left between the two is another order of summation, approximated
functions, and a last bit here and there where the unrounded values straddle the middle.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ....errors import NpuFusionError
from ..emulation import emulated_ops
from ..installed import schema_of, state_of
from ..library import overload_of, package_of
from ..table import AscendOp, ascend_ops
from .case import Case

log = logging.getLogger(__name__)

Verdict = Literal["ok", "mismatch", "error", "missing"]

TOLERANCES: dict[torch.dtype, float] = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-4}
"""Allowed errors: two units in the last place for the 16-bit dtypes; in float32 what other sums and approximated functions make. A float32
result of 16-bit arguments may have passed through their dtype. Quantised bytes may be one step apart, where a quotient lies in the middle;
other results that are no floats must be equal."""

_BYTES = (torch.int8, torch.uint8)


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        verdict: `ok`; `mismatch`, results differ; `error`, the op or its CPU kernel raised; `missing`, the library here has no such op, or
            a process by itself cannot run it.
        error: the greatest error of a result, or of an argument that the op writes to; see `elementwise_error`.
        allowed: the tolerance for that result.
        detail: what is wrong, where something is.
    """

    case: Case
    verdict: Verdict
    error: float | None = None
    allowed: float | None = None
    detail: str = ""

    @property
    def failed(self) -> bool:
        """A missing op is no failure: it is not emitted then."""
        return self.verdict in ("mismatch", "error")


class SelfTestError(NpuFusionError):
    """The self test was asked for something that it cannot do."""


def emitted_ops(target: str, names: Collection[str] = ()) -> list[AscendOp]:
    """The ops of the table that the project emits on a target, but for those that several ranks call together.

    Args:
        target: the SoC.
        names: if there are any, only these: `npu_rms_norm`, `npu.npu_rms_norm` or `npu::npu_rms_norm`.

    Raises:
        SelfTestError: a name is not that of such an op.
    """
    emitted = [op for op in ascend_ops().values() if op.uses and target in op.targets and not op.collective]
    by_name = {alias: op for op in emitted for alias in (op.name, op.shown, op.shown.partition(".")[2])}
    for name in names:
        if name not in by_name:
            raise SelfTestError(f"unknown op {name!r}. Known on {target}: {', '.join(op.shown for op in emitted)}")
    wanted = [by_name[name] for name in names]
    return [op for op in emitted if not names or op in wanted]


def cases_of(op: AscendOp, target: str, cases: Iterable[Case]) -> list[Case]:
    """The cases of an op that the table allows on a target."""
    return [case for case in cases if case.op == op.name and op.refusal({**_defaults(op), **case.arguments()}, target) is None]


def run_case(case: Case, device: str) -> Outcome:
    """Run one case on a device, and by the CPU kernel, and compare. Whatever the op raises is an outcome."""
    op = ascend_ops()[case.op]
    log.debug("self test on %s: %s", device, case)  # the last such line is the case that took the process with it
    overload, state = overload_of(op), "present" if device == "cpu" else state_of(op)
    if overload is None or state == "missing":
        return Outcome(case, "missing", detail=f"not in the installed {package_of(op)}")
    if state == "another schema":
        return Outcome(case, "error", detail=f"the installed {package_of(op)} has it as {overload._schema}")
    if not case.alone and device != "cpu":
        return Outcome(case, "missing", detail="a collective of two ranks and more: the self test is one process")
    emulated = emulated_ops().get(op.name)
    if emulated is None:
        return Outcome(case, "error", detail="there is no CPU kernel to compare it with")
    try:
        expected = _results(case, op, emulated.kernel, "cpu")
    except Exception as error:  # a kernel may raise anything, and a row that says so helps more than a traceback
        return Outcome(case, "error", detail=f"CPU kernel: {_raised(error, case)}")
    try:
        actual = _results(case, op, overload, device)
    except Exception as error:  # the same for the device, whose libraries raise errors of all kinds
        return Outcome(case, "error", detail=_raised(error, case))
    return _judged(case, actual, expected)


def _raised(error: Exception, case: Case) -> str:
    log.debug("self test: %s raised", case, exc_info=error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _results(case: Case, op: AscendOp, function: Callable[..., Any], device: str) -> dict[str, Tensor]:
    """What a call leaves that the project uses, on the CPU: results by name, and arguments that the op writes to."""
    arguments = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), case.arguments())
    schema = schema_of(op)
    positional = [arguments.pop(spec.name, spec.default_value) for spec in schema.arguments if not spec.kwarg_only]
    written = {
        spec.name: value
        for spec, value in zip(schema.arguments, positional, strict=False)
        if spec.alias_info is not None and spec.alias_info.is_write
    }
    returned = function(*positional, **arguments)
    values = returned if isinstance(returned, (tuple, list)) else [] if returned is None else [returned]
    names = set(op.uses).difference(case.meaningless)
    used = {name: value for name, value in zip(op.outputs, values, strict=True) if name in names}
    return {name: value.cpu() for name, value in {**used, **written}.items()}


def _defaults(op: AscendOp) -> dict[str, Any]:
    return {spec.name: spec.default_value for spec in schema_of(op).arguments}


# -------------------------------------------------------------------- judging


def _judged(case: Case, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Outcome:
    """The outcome of the result that is the furthest off."""
    worst = Outcome(case, "ok", 0.0, 0.0)
    for name, reference in expected.items():
        value = actual[name]
        if value.shape != reference.shape or value.dtype != reference.dtype:
            return Outcome(case, "mismatch", detail=f"{name} is {_described(value)}, the CPU kernel gives {_described(reference)}")
        error, allowed = _error(value, reference), _tolerance(reference, case)
        if error > allowed:
            return Outcome(case, "mismatch", error, allowed, f"{name} differs")
        if error >= (worst.error or 0.0):
            worst = Outcome(case, "ok", error, allowed)
    return worst


def _error(actual: Tensor, reference: Tensor) -> float:
    """The greatest difference: of bytes in steps, of other numbers relative."""
    if reference.dtype not in _BYTES:
        return elementwise_error(actual, reference)
    return float((actual.int() - reference.int()).abs().max()) if reference.numel() else 0.0


def _tolerance(result: Tensor, case: Case) -> float:
    if result.dtype in _BYTES:
        return 1.0
    if not result.is_floating_point():
        return 0.0
    arguments = [value.dtype for value in case.arguments().values() if isinstance(value, Tensor)]
    return max(TOLERANCES.get(dtype, 0.0) for dtype in (result.dtype, *arguments))


def elementwise_error(actual: Tensor, reference: Tensor) -> float:
    """The greatest difference of two elements, relative to the reference's element plus the rms of all of its elements.

    Infinite where one holds NaN or an infinity that the other does not.
    """
    if actual.numel() == 0:
        return 0.0
    actual, reference = actual.double(), reference.double()
    finite = reference.isfinite()
    if not torch.equal(actual.isfinite(), finite) or not torch.equal(actual[~finite].nan_to_num(), reference[~finite].nan_to_num()):
        return math.inf
    difference = torch.where(finite, actual - reference, 0.0).abs()
    reference = torch.where(finite, reference, 0.0)
    scale = reference.abs() + reference.square().mean().sqrt()
    return float((difference / scale.clamp_min(torch.finfo(torch.float32).tiny)).max())


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
