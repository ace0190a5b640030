"""The numeric contract's own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from npu_fusion.errors import VerificationError
from npu_fusion.numerics import assert_within_contract, error_bound, relative_error

REFERENCE = torch.tensor([3.0, -4.0, 0.0, 5.0], dtype=torch.float64)


def test_floors_are_the_designs() -> None:
    assert (error_bound(torch.bfloat16), error_bound(torch.float16), error_bound(torch.float32)) == (2e-2, 4e-3, 2e-5)
    with pytest.raises(TypeError, match="int8"):
        error_bound(torch.int8)


def test_relative_error() -> None:
    assert relative_error(REFERENCE, REFERENCE) == 0
    assert relative_error(REFERENCE * 1.01, REFERENCE) == pytest.approx(0.01)
    assert relative_error(REFERENCE * 1e3 * 1.01, REFERENCE * 1e3) == pytest.approx(0.01)
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0
    assert relative_error(torch.full((2,), 0.5), torch.zeros(2)) == 0.5
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(REFERENCE[:1], REFERENCE)


def test_non_finite_values_must_be_the_same() -> None:
    reference = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert relative_error(reference.clone(), reference) == 0
    for wrong in ([1.0, 1.0, -math.inf, math.nan], [1.0, -math.inf, -math.inf, math.nan], [math.nan, math.inf, -math.inf, math.nan]):
        assert relative_error(torch.tensor(wrong), reference) == math.inf
    assert relative_error(torch.tensor([1.0, math.nan, -math.inf, math.nan]), reference) == math.inf


def test_contract_is_the_larger_of_floor_and_eager() -> None:
    def check(error: float, eager_error: float) -> None:
        assert_within_contract(REFERENCE * (1 + error), REFERENCE * (1 + eager_error), REFERENCE, torch.float16, "y")

    check(3.9e-3, 0.0)
    check(2.4e-2, 1e-2)
    with pytest.raises(VerificationError, match=r"y: error 0\.0041"):
        check(4.1e-3, 0.0)
    with pytest.raises(VerificationError, match=r"allowed is 0\.025"):
        check(2.6e-2, 1e-2)


def test_nothing_excuses_a_nan() -> None:
    bad = REFERENCE.clone()
    bad[0] = math.nan
    with pytest.raises(VerificationError):
        assert_within_contract(bad, REFERENCE, REFERENCE, torch.bfloat16)
    with pytest.raises(VerificationError):
        assert_within_contract(bad, bad, REFERENCE, torch.bfloat16)
    assert_within_contract(REFERENCE, bad, REFERENCE, torch.bfloat16)
