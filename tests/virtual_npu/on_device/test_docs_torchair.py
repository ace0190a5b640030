"""The example of docs/ascend.md that needs torchair, which cannot be in one process with npugraph_ex."""

from __future__ import annotations

import pytest

from tests.test_docs import run

pytestmark = pytest.mark.npu_process("torchair")


def test_example_of_ascend_with_torchair(capfd: pytest.CaptureFixture[str]) -> None:
    run("docs/ascend.md", "", "torchair")
    assert capfd.readouterr().out.count("2 of 2 sites fused (100%)") == 2
