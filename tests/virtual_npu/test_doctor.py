"""`npu-fusion doctor` with the real torch_npu: the self test runs through, and says what it finds, which on the virtual NPU is garbage."""

from __future__ import annotations

import re

import pytest

from npu_fusion.lowerings.ascend.table import ascend_ops

from .run import VirtualNpu

DOCTOR = ["-m", "npu_fusion.cli", "doctor"]


@pytest.mark.slow
def test_self_test_completes_and_lists_every_op(npu: VirtualNpu) -> None:
    """Results there are what their memory held, but shapes and dtypes are right: each emitted op is called, and none raises."""
    done = npu.run([*DOCTOR, "--self-test"], timeout=600)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    assert "1 x Ascend910B3" in done.stdout
    report = done.stdout.partition("Self test of ascend910b on npu")[2]
    for op in ascend_ops().values():
        if op.uses and "ascend910b" in op.targets and not op.collective:
            assert op.shown in report, op.name
    assert "the CPU kernel gives" not in report
    summary = report.strip().splitlines()[-1]
    counts = {verdict: int(count) for count, verdict in re.findall(r"(\d+) (ok|mismatch|error|missing)", summary)}
    assert counts["mismatch"] > 50
    old_cann = " ".join(report.split()).count(
        "CANN version should greater"
    )  # a guard of torch_npu's: the virtual NPU's CANN has no version
    assert counts.get("error", 0) == old_cann, report


@pytest.mark.slow
def test_doctor_knows_the_soc_and_which_ops_torch_npu_has(npu: VirtualNpu) -> None:
    done = npu.run(DOCTOR, soc="Ascend910_9382", count=2)
    assert done.returncode == 0, done.stdout
    assert "2 x Ascend910_9382" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["ascend910_93", "yes", "yes"] in lines
    assert "ascend910b     yes       no: the devices here are ascend910_93" in done.stdout
    present = done.stdout.partition("Ascend ops here")[2]
    assert "another schema" not in present
    missing = present.partition(" missing ")[2].split()
    assert [name for name in missing if name.startswith("npu.")] == []
