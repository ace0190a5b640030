"""How results come back from the other process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .remote import outcomes, run_tests

REPORT = """\
<testsuites><testsuite>
<testcase classname="tests.virtual_npu.on_device.test_x" name="test_good[llama]"/>
<testcase classname="tests.virtual_npu.on_device.test_x" name="test_bad">
  <failure message="assert 1 == 2">def test_bad: assert 1 == 2</failure><system-out>said so</system-out></testcase>
<testcase classname="tests.virtual_npu.on_device.test_x" name="test_torn"><error message="fixture gone">at setup</error></testcase>
<testcase classname="tests.virtual_npu.on_device.test_x" name="test_left_out"><skipped message="no reason"/></testcase>
</testsuite></testsuites>
"""


def test_every_failure_comes_with_its_text(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    assert outcomes(path) == {
        "test_x::test_good[llama]": None,
        "test_x::test_bad": "def test_bad: assert 1 == 2\nsaid so",
        "test_x::test_torn": "at setup",
        "test_x::test_left_out": "no reason",
    }


@pytest.mark.slow
def test_tests_run_in_one_process_that_may_die(tmp_path: Path) -> None:
    file = tmp_path / "test_sample.py"
    file.write_text(
        "import os, torch\n"
        "def test_good(): torch.zeros(2).npu()\n"
        "def test_bad(): assert torch.zeros(2, device='npu').device.type == 'cpu'\n"
        "def test_gone(): os._exit(7)\n"
    )
    good, bad = (f"{file}::test_{name}" for name in ("good", "bad"))
    results = run_tests([good, bad])
    assert results[good] is None
    assert "AssertionError: assert 'npu' == 'cpu'" in str(results[bad])
    [failure] = run_tests([f"{file}::test_gone"]).values()
    assert failure is not None
    assert failure.startswith("the process on the virtual NPU ended with status 7 and says nothing of this test:\n")


@pytest.mark.slow
def test_one_process_runs_all_of_a_group(tmp_path: Path) -> None:
    """With some versions of pytest nothing comes of pytest-xdist's groups: then every process runs all tests of every file."""
    file = tmp_path / "test_sample.py"
    file.write_text(
        "import os, pathlib, pytest\n"
        "@pytest.mark.xdist_group('one')\n"
        "@pytest.mark.parametrize('i', range(8))\n"
        "def test_who(i): (pathlib.Path(__file__).parent / f'{i}.worker').write_text(os.environ['PYTEST_XDIST_WORKER'])\n"
    )
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider", "--rootdir", tmp_path, file]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    workers = [path.read_text() for path in tmp_path.glob("*.worker")]
    assert len(workers) == 8
    assert len(set(workers)) == 1
