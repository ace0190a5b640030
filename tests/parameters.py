"""Parameters that many tests have."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch


def dtypes_and_shapes(dtypes: Sequence[torch.dtype]) -> pytest.MarkDecorator:
    """`dtype` and `dynamic`: every dtype, and static and dynamic shapes in turn.

    Not every pair of them: what a rule makes of a dtype does not depend on how sizes are written, and pairs would double the time.
    """
    pairs = [(dtype, bool(turn % 2)) for turn, dtype in enumerate(dtypes)]
    ids = [f"{dtype}-{'dynamic' if dynamic else 'static'}" for dtype, dynamic in pairs]
    return pytest.mark.parametrize(("dtype", "dynamic"), pairs, ids=ids)
