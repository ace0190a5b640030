"""Processes with a gloo group, made once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .ranks import Ranks


def _ranks(number: int) -> Iterator[Ranks]:
    ranks = Ranks(number)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    yield from _ranks(4)
