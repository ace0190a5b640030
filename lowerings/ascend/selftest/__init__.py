"""The self test of a machine: every op that the project emits, run on the device and by its CPU kernel, on equal arguments.

    from npu_fusion.lowerings.ascend import selftest

    outcomes = list(selftest.self_test("ascend910b"))      # as `npu-fusion doctor --self-test`
    assert not any(outcome.failed for outcome in outcomes)

`cases()` holds the arguments, a handful a op, and serves the tests of the CPU kernels as well. `device="cpu"` runs the ops as the
dispatcher finds them there, which are the same CPU kernels: a test of the self test.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from .. import sgl
from ..library import prepare
from . import attention, cache, glu, matmul, mla, moe, moe_collectives, norm, quant, rope, weight_only
from .case import Case
from .compare import Outcome, SelfTestError, Verdict, cases_of, elementwise_error, emitted_ops, run_case

__all__ = ["Case", "Outcome", "SelfTestError", "Verdict", "cases", "elementwise_error", "planned", "run_case", "self_test"]


def cases() -> Iterator[Case]:
    """Every case of the self test, also of ops that no target emits."""
    for family in (norm, rope, glu, attention, cache, matmul, moe, moe_collectives, quant, weight_only, mla):
        yield from family.cases()


def planned(target: str, names: Collection[str] = ()) -> list[Case]:
    """The cases to run on a target: of the ops that are emitted there, those calls that the table allows there.

    Args:
        target: the SoC.
        names: ops to restrict it to; all where empty.

    Raises:
        SelfTestError: a name is not that of an op that is emitted on the target.
    """
    prepare(emulate=True)
    sgl.register()
    every = list(cases())
    return [case for op in emitted_ops(target, names) for case in cases_of(op, target, every)]


def self_test(target: str, device: str = "npu", names: Collection[str] = ()) -> Iterator[Outcome]:
    """Run the planned cases one after another; an op that raises is an outcome.

    Args:
        target: the SoC, which decides what is emitted and allowed.
        device: the device to run on.
        names: ops to restrict it to; all where empty.
    """
    return (run_case(case, device) for case in planned(target, names))
