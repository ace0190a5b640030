"""Processes with a gloo group, made once for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from .ranks import Ranks, start_importing


@pytest.fixture(scope="session", autouse=True)
def _imports(request: pytest.FixtureRequest) -> None:
    """Ranks are forked late in a run: what they need is imported until then, unless another worker may be the one that needs them."""
    if "PYTEST_XDIST_WORKER" not in os.environ and any("two" in getattr(item, "fixturenames", ()) for item in request.session.items):
        start_importing()


def _ranks(number: int) -> Iterator[Ranks]:
    ranks = Ranks(number)
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a machine with other work, threads wait for each other longer than these tensors take to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    yield from _ranks(4)


@pytest.fixture
def alone() -> Iterator[str]:
    """The name of a group of which this process is the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield str(dist.group.WORLD.group_name)
    dist.destroy_process_group()
