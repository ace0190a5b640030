"""The virtual NPU for tests that run programs on it."""

from __future__ import annotations

import pytest

from .run import VirtualNpu, virtual_npu


@pytest.fixture(scope="session")
def npu() -> VirtualNpu:
    """The virtual NPU, built where that is not done yet."""
    return virtual_npu()
