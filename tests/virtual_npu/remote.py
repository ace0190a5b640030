"""Tests that run on the virtual NPU: collected here, run by a pytest of its own in the environment that has torch_npu.

A test file in `on_device/` is an ordinary one, and its tests are collected as such, parameters and markers included. Where there is
torch_npu they run in this process; elsewhere (in the project's own environment) a stand-in for each takes its place. The first stand-in
that runs has all selected tests run in one process on the virtual NPU, because starting it takes longer than most tests; each then reports
what became of its own. Files that are marked `npu_process("name")` have a process of their own, which those of one name share.
"""

from __future__ import annotations

import importlib.util
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from .run import VirtualNpuError, virtual_npu

TIMEOUT = 1200.0  # seconds for a process
OUTPUT_LINES = 60  # of a process that died


class RemoteFailure(Exception):
    """A test failed in the other process; the message is what pytest says there."""


class RemoteTest(pytest.Item):
    """Stands for a test function that runs in the other process."""

    remote_id: str
    process: str

    @classmethod
    def standing_for(cls, function: pytest.Function) -> RemoteTest:
        assert function.parent is not None
        item: RemoteTest = cls.from_parent(function.parent, name=function.name)
        item.remote_id = function.nodeid
        marker = function.get_closest_marker("npu_process")
        item.process = f"npu {marker.args[0]}" if marker else "npu"
        item.own_markers.extend(function.own_markers)
        item.keywords.update(function.keywords)
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.xdist_group(item.process))  # one worker runs all of a process
        return item

    def runtest(self) -> None:
        failure = _outcomes(self)[self.remote_id]
        if failure is not None:
            raise RemoteFailure(failure)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, RemoteFailure) else super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name


def has_torch_npu() -> bool:
    """Whether this process can have an NPU, virtual or not."""
    return importlib.util.find_spec("torch_npu") is not None


_KEY = pytest.StashKey[dict[str, dict[str, "str | None"]]]()


def _outcomes(item: RemoteTest) -> dict[str, str | None]:
    """What became of the selected tests of the item's process, by node id: the text of a failure, or None."""
    known = item.session.stash.setdefault(_KEY, {})
    if item.process not in known:
        of_process = [other for other in item.session.items if isinstance(other, RemoteTest) and other.process == item.process]
        known[item.process] = run_tests([other.remote_id for other in of_process])
    return known[item.process]


def run_tests(tests: Sequence[str]) -> dict[str, str | None]:
    """Run tests in one process on the virtual NPU.

    Args:
        tests: their node ids, `path/test_file.py::test_name[parameters]`; no two of them with the same name in files of the same name.

    Returns:
        what became of each: the text of its failure, or None.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        settings = ["-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={folder}/tests"]
        try:
            npu = virtual_npu()
        except VirtualNpuError as error:
            return dict.fromkeys(tests, str(error))
        done = npu.run([*settings, *tests], trace=Path(folder) / "trace.txt", timeout=TIMEOUT)
        found = outcomes(report) if report.exists() else {}
    lines = "\n".join(done.stdout.splitlines()[-OUTPUT_LINES:])
    missing = f"the process on the virtual NPU ended with status {done.returncode} and says nothing of this test:\n{lines}"
    return {test: found.get(_reported_as(test), missing) for test in tests}


def _reported_as(test: str) -> str:
    """The name of a test in what `outcomes` returns."""
    path, _, name = test.partition("::")
    return f"{Path(path).stem}::{name}"


def outcomes(report: Path) -> dict[str, str | None]:
    """The outcome of each test in a JUnit report, by `module::name`: the text of a failure (what was skipped did not do its job either)."""
    found: dict[str, str | None] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problems = [child for child in case if child.tag in ("failure", "error", "skipped")]
        texts = ["\n".join(filter(None, (child.text or child.get("message"), case.findtext("system-out")))) for child in problems]
        module = case.get("classname", "").rpartition(".")[2]
        found[f"{module}::{case.get('name')}"] = "\n".join(texts) or None
    return found
