"""Where there is no torch_npu, the tests of this folder run on the virtual NPU, in a process that has it."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tests.virtual_npu.launches import Trace, parse
from tests.virtual_npu.remote import RemoteTest, has_torch_npu


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    found = yield
    if has_torch_npu() or not isinstance(found, list):
        return found
    return [RemoteTest.standing_for(item) if isinstance(item, pytest.Function) else item for item in found]


@pytest.fixture
def traced() -> Callable[[], Trace]:
    """Gives what has been launched, captured and replayed since the test began, or since the last time it was asked."""
    import torch

    path = Path(os.environ["VIRTUAL_NPU_TRACE"])

    def lines() -> list[str]:
        torch.npu.synchronize()  # launches go through a queue
        return path.read_text().splitlines() if path.exists() else []

    seen = len(lines())

    def since() -> Trace:
        nonlocal seen
        new = lines()[seen:]
        seen += len(new)
        return parse(new)

    return since
