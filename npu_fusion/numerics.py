"""The numeric contract: how far a fused result may stray from float64.

The error of a fused result against float64 may be at most 2.5 times the error of eager PyTorch against the same float64 values, or the
floor of its dtype where that is larger. Errors are root mean squares, relative to the root mean square of the reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import VerificationError

EAGER_FACTOR = 2.5
FLOORS: dict[torch.dtype, float] = {
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
    torch.float32: 2e-5,
    torch.float64: 1e-12,  # room for another order of summation, nothing more
}


def error_bound(dtype: torch.dtype) -> float:
    """The floor of the numeric contract for results of `dtype`: the relative rms error that is allowed whatever eager achieves.

    Raises:
        TypeError: the contract says nothing about `dtype`.
    """
    if dtype not in FLOORS:
        raise TypeError(f"the numeric contract covers {', '.join(map(str, FLOORS))}, not {dtype}")
    return FLOORS[dtype]


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """Root mean square of `actual - reference` over that of `reference`, in float64; 0 for empty tensors.

    An element where the reference is not finite counts as exact when `actual` holds the same NaN or infinity, otherwise the error is
    infinite, as it is when `actual` is not finite where the reference is. Against an all-zero reference the error is absolute.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(reference.shape)}")
    if actual.numel() == 0:
        return 0.0
    actual, reference = actual.detach().double(), reference.detach().double()
    finite = reference.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return math.inf
    if not torch.equal(actual[~finite].nan_to_num(), reference[~finite].nan_to_num()):
        return math.inf
    difference = torch.where(finite, actual - reference, 0.0).square().mean().sqrt().item()
    scale = torch.where(finite, reference, 0.0).square().mean().sqrt().item()
    return difference / scale if scale else difference


def assert_within_contract(actual: Tensor, eager: Tensor, reference_f64: Tensor, dtype: torch.dtype, what: str = "result") -> None:
    """Check `actual` against the numeric contract.

    Args:
        actual: the fused result.
        eager: what eager PyTorch computes from the same inputs.
        reference_f64: the same computation in float64 on the same (already rounded) inputs.
        dtype: the dtype whose floor applies: the lowest precision that the computation passes through.
        what: a name for the result, for the message.

    Raises:
        VerificationError: the error exceeds the contract.
    """
    error, eager_error = relative_error(actual, reference_f64), relative_error(eager, reference_f64)
    # An eager result that is itself not finite proves nothing: the floor alone counts then.
    allowed = max(EAGER_FACTOR * eager_error if math.isfinite(eager_error) else 0.0, error_bound(dtype))
    if not error <= allowed:
        raise VerificationError(f"{what}: error {error:.3g} relative to float64, allowed is {allowed:.3g} (eager: {eager_error:.3g})")
