"""A model whose weights are merged."""

from __future__ import annotations

import pytest

from tests.weights.models import Compiled, Model, frozen, gate_and_up, is_merged


@pytest.fixture
def compiled() -> Compiled:
    """A model that has run once, its weights merged."""
    result = Compiled(frozen(Model()))
    result.check()
    assert is_merged(*gate_and_up(result.model))
    return result
