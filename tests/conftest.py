"""What holds for every test: a fresh compiler and random state, and an order that finds failures early."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run on the CPU


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first, of the slow ones those that one process must run together; tests marked `gpu` only where there is a CUDA device.

    They are deselected rather than skipped: a machine without a GPU has nothing to say about them.
    """
    if not torch.cuda.is_available():
        on_gpu = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=on_gpu)
    items.sort(key=lambda item: 0 if not item.get_closest_marker("slow") else 1 if item.get_closest_marker("xdist_group") else 2)


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Seeds the generators, and forgets what a test compiled: no test sees another's graphs or recompile counts."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
