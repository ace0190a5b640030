"""Memory that a kernel does not write is seen: what `empty` gives is full of NaN, or of the largest integer."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from npu_fusion.kernels.launch import Device


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the float64 references of one test take gigabytes, which other processes on this GPU need


@pytest.fixture
def device() -> str:
    """Where kernels run: on the GPU, or on the CPU by Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["own", "npu"])
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As which device kernels are planned: as the one they run on, or as an NPU of two cores, which take turns with tiles and walk rows."""
    if request.param == "npu":
        for name, module in list(sys.modules.items()):
            if name.startswith("npu_fusion.lowerings.triton.") and not name.endswith(".define") and hasattr(module, "device_for"):
                monkeypatch.setattr(module, "device_for", lambda tensor, cores: Device("npu", 2, 2))
    return str(request.param)
