"""Where the gate's tests run: not on machines without its environment, and all in one process, so that everything is compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """`-m gpu` is for machines that may have no network to build the ascend environment from, and nothing here is marked so."""
    return True if config.getoption("markexpr") == "gpu" else None


@pytest.hookimpl(trylast=True)  # after pytest-xdist's own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Make the marks `xdist_group` of this folder count.

    pytest-xdist (3.8) groups tests by a suffix of their ids, which it sets through an attribute that pytest 9.2 does not read any more.
    """
    for item in items if getattr(config.option, "loadgroup", False) else []:
        mark = item.get_closest_marker("xdist_group")
        if mark and FOLDER in item.path.parents and not item.nodeid.endswith(suffix := f"@{mark.args[0]}"):
            item._id = type(item.id).parse(item.nodeid + suffix)
