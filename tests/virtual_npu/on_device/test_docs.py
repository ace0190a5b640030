"""The examples of docs/ascend.md, those that need torch_npu and npugraph_ex among them."""

from __future__ import annotations

import pytest

from tests.test_docs import run


def test_examples_of_ascend_with_torch_npu(capfd: pytest.CaptureFixture[str]) -> None:
    names = run("docs/ascend.md", "", "npu")
    assert {"npu_model", "compile_piece"} <= set(names)
    assert capfd.readouterr().out.count("2 of 2 sites fused (100%)") == 3
