"""What Ascend's own ops take and refuse is seen without the Triton kernels, which stand behind them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
