"""What torch_npu says of this machine: its devices, and which ops of the Ascend table it has.

torch_npu is asked where it is loaded already, as torch loads it by itself on a machine that is set up; otherwise it is imported only when a
self test asks for it. Everything that it raises becomes a line of the report: a broken installation is what people run the doctor for.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..backend import EMULATED, soc_target
from ..errors import UnsupportedInputError
from ..table import plural
from .loading import first_line

if TYPE_CHECKING:
    from ..lowerings.ascend.selftest import Case, Outcome

_log = logging.getLogger(__name__)
_STYLES = {"ok": "green", "mismatch": "bold red", "error": "bold red", "missing": "yellow"}


def is_loaded() -> bool:
    """Whether torch_npu is in this process."""
    return sys.modules.get("torch_npu") is not None


def device_names() -> list[str]:
    """Names of the npu devices that a loaded torch_npu sees, e.g. `["Ascend910B3"]`; none where it is not loaded or fails."""
    if not is_loaded():
        return []
    try:
        npu = torch.get_device_module("npu")
        return [npu.get_device_name(index) for index in range(npu.device_count())]
    except RuntimeError as error:  # what torch_npu raises for a driver or CANN that does not answer
        _log.debug("torch_npu cannot list its devices", exc_info=error)
        return []


def load() -> None:
    """Import torch_npu.

    Raises:
        UnsupportedInputError: it is not installed, cannot be imported, or sees no device; the message says which.
    """
    from ..lowerings.ascend.library import has_torch_npu

    try:
        installed = has_torch_npu()
    except RuntimeError as error:  # raised by CANN's own initialisation, beside the import errors that has_torch_npu reports
        raise UnsupportedInputError(f"torch_npu cannot be imported: {first_line(error)}") from error
    if not installed:
        raise UnsupportedInputError("torch_npu is not installed; --device cpu compares the CPU kernels with themselves")
    if not device_names():
        raise UnsupportedInputError("torch_npu sees no npu device; --device cpu compares the CPU kernels with themselves")


def soc() -> str | None:
    """The target that this machine's first npu device is, or None."""
    names = device_names()
    return soc_target(names[0]) if names else None


def presence_table() -> Table:
    """The ops of the table that the installed libraries have, lack, or have with another schema."""
    from ..lowerings.ascend.installed import state_of
    from ..lowerings.ascend.table import ascend_ops

    table = _table("Ascend ops here", ("State", "Count", "Ops"))
    groups: dict[str, list[str]] = defaultdict(list)
    for op in ascend_ops().values():
        groups[state_of(op)].append(op.shown if op.uses else f"{op.shown} (not emitted)")
    for state, style in (("present", "green"), ("another schema", "bold red"), ("missing", "yellow")):
        if groups[state]:
            table.add_row(Text(state, style=style), str(len(groups[state])), Text(", ".join(groups[state])))
    return table


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    return table


# -------------------------------------------------------------------- self test


def run_self_test(device: str, names: Collection[str], progress: Callable[[Case], Any]) -> tuple[str, list[Outcome]]:
    """Run the self test on a device, with torch_npu loaded where that is an npu; the target, and what came of each case.

    Raises:
        UnsupportedInputError: there is no such device here.
        SelfTestError: a name is not that of an emitted op.
    """
    from ..lowerings.ascend import selftest

    if device != "cpu":
        load()
    target = (soc() if device != "cpu" else None) or EMULATED
    outcomes = []
    for case in selftest.planned(target, names):
        progress(case)
        outcomes.append(selftest.run_case(case, device))
    return target, outcomes


def outcomes_table(title: str, outcomes: Iterable[Outcome]) -> Table:
    """One row a case, below its op: the greatest error, what was allowed, and the verdict."""
    table = _table(title, ())
    table.add_column("Op and case", overflow="fold")
    for name in ("Max error", "Allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Verdict", overflow="fold")
    previous = ""
    for outcome in outcomes:
        if outcome.case.op != previous:
            table.add_row(Text(outcome.case.op.replace("::", "."), style="bold"))
        previous = outcome.case.op
        verdict = Text(outcome.verdict, style=_STYLES[outcome.verdict])
        if outcome.detail:
            verdict.append(f": {outcome.detail}", style="not bold default")
        table.add_row(Padding(Text(outcome.case.label), (0, 0, 0, 2)), _number(outcome.error), _number(outcome.allowed), verdict)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def summary(outcomes: Iterable[Outcome]) -> str:
    """`25 cases of 4 ops: 24 ok, 1 mismatch`."""
    counts: dict[str, int] = defaultdict(int)
    ops = set()
    for outcome in outcomes:
        counts[outcome.verdict] += 1
        ops.add(outcome.case.op)
    verdicts = ", ".join(f"{counts[name]} {name}" for name in _STYLES if counts[name])
    return f"{plural(sum(counts.values()), 'case')} of {plural(len(ops), 'op')}: {verdicts or 'none ran'}"


def failed(outcomes: Collection[Outcome]) -> bool:
    """Whether a case failed, or none could run at all, which proves nothing."""
    return any(outcome.failed for outcome in outcomes) or not any(outcome.verdict == "ok" for outcome in outcomes)
