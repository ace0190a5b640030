"""What a kernel must keep on Ascend, held against what the gate found out."""

from __future__ import annotations

from collections.abc import Iterator

from .result import STAGES, UNKNOWN, Result

KIB = 1024
UB_LIMIT = 144 * KIB  # three quarters of a vector core's unified buffer: the rest is for what hivmc adds
GRID_LIMIT = 65535  # the runtime's coreDim


def violations(result: Result) -> list[str]:
    """The limits that a compiled case does not keep, in words; empty where it keeps all."""
    return [*_stages(result), *_sizes(result), *_loops(result), *_double_buffering(result)]


def _stages(result: Result) -> Iterator[str]:
    for name, stage in result.stages.items():
        if not stage.ok:
            yield f"{name} failed: {stage.error}"
    if all(stage.ok for stage in result.stages.values()) and not result.ok:
        yield f"no result of {', '.join(name for name in STAGES if name not in result.stages)}"
    if result.overflow:
        yield f"{result.overflow.memory} overflows: {result.overflow.needed} of {result.overflow.available} bytes"


def _sizes(result: Result) -> Iterator[str]:
    if result.ub > UB_LIMIT:
        yield f"{result.ub / KIB:.1f} KiB of unified buffer are over the limit of {UB_LIMIT // KIB}"
    if not 1 <= result.subject.grid <= GRID_LIMIT:
        yield f"a grid of {result.subject.grid} is not within 1 to {GRID_LIMIT}"


def _loops(result: Result) -> Iterator[str]:
    declared = set(result.subject.loops)
    if declared and not result.subject.note:
        yield "scalar loops are declared without a note that says why"
    for loop in result.scalar_loops:
        if not loop.rows and loop.trips not in declared:
            yield f"scalar loop that is not declared: {loop}"
    if result.ok:  # else there is no module to look for them in
        for trips in sorted(declared - {loop.trips for loop in result.scalar_loops}):
            yield f"a scalar loop of {'unknown length' if trips == UNKNOWN else f'{trips} trips'} is declared, and there is none"


def _double_buffering(result: Result) -> Iterator[str]:
    if result.lost_double_buffering and not result.subject.note:
        yield f"double buffering is lost without a note: {result.lost_double_buffering}"
