"""Graphs lowered for CUDA run on CPU tensors here, which needs Triton's interpreter: it is off where Triton compiles for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        left_out = [item for item in items if Path(__file__).parent in item.path.parents and not item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
