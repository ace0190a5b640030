"""Memory that a kernel does not write is seen: what `empty` gives is full of NaN, or of the largest integer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> str:
    """Where kernels run: on the GPU, or on the CPU by Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
