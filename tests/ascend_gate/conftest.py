"""The gate's tests: each worker that collects them asks the ascend environment for the cases; one of them compiles them all, once."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """`-m gpu` is for machines that may have no network to build the ascend environment from, and nothing here is marked so."""
    return True if config.getoption("markexpr") == "gpu" else None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("ascend_gate"))
