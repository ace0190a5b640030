"""CPU kernels of the normalisations: npu_rms_norm, npu_add_rms_norm (and _cast, _v2), npu_gemma_rms_norm.

Source: op-plugin docs of each op; rounding points from ops-nn `norm/*/op_kernel`:
- rms_norm and gemma_rms_norm multiply gamma in fp32 and round once;
- add_rms_norm rounds the normalised sum to a 16-bit dtype before it multiplies gamma. In bf16 it normalises the fp32 sum, in fp16 the
  rounded one; add_rms_norm_cast multiplies gamma in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import FLOATS, check, check_dtype, check_same_dtype, emulates


def _check_gamma(op: str, x: Tensor, gamma: Tensor) -> None:
    fits = 0 < gamma.dim() <= x.dim() and gamma.shape == x.shape[x.dim() - gamma.dim() :]
    check(op, fits, f"gamma of shape {list(gamma.shape)} does not match the last dimensions of {list(x.shape)}")


def _rstd(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the dimensions of gamma, which are kept with size 1; x is fp32."""
    dims = list(range(x.dim() - gamma.dim(), x.dim()))
    return torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)


def _rstd_like(x: Tensor, gamma: Tensor) -> Tensor:
    kept = x.dim() - gamma.dim()
    return x.new_empty((*x.shape[:kept], *[1] * gamma.dim()), dtype=torch.float32)


@emulates("npu::npu_rms_norm")
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`y = x * rstd * gamma`, in fp32 with one cast to the dtype of x; gamma may be fp32 beside a 16-bit x."""
    op = "npu_rms_norm"
    check_dtype(op, "input", input, *FLOATS)
    check(op, gamma.dtype in (input.dtype, torch.float32), f"gamma must be {input.dtype} or torch.float32, not {gamma.dtype}")
    _check_gamma(op, input, gamma)
    x = input.float()
    rstd = _rstd(x, gamma, epsilon)
    return (x * rstd * gamma.float()).to(input.dtype), rstd


@npu_rms_norm.fake
def _(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), _rstd_like(input, gamma)


@emulates("npu::npu_gemma_rms_norm")
def npu_gemma_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`y = x * rstd * (1 + gamma)`, in fp32 with one cast to the dtype of x."""
    op = "npu_gemma_rms_norm"
    check_dtype(op, "input", input, *FLOATS)
    check_same_dtype(op, input=input, gamma=gamma)
    _check_gamma(op, input, gamma)
    x = input.float()
    rstd = _rstd(x, gamma, epsilon)
    return (x * rstd * (gamma.float() + 1.0)).to(input.dtype), rstd


@npu_gemma_rms_norm.fake
def _(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), _rstd_like(input, gamma)


def _check_add(op: str, x1: Tensor, x2: Tensor, gamma: Tensor, *dtypes: torch.dtype) -> None:
    check_dtype(op, "x1", x1, *dtypes)
    check_same_dtype(op, x1=x1, x2=x2, gamma=gamma)
    check(op, x1.shape == x2.shape, f"x1 and x2 must have one shape, not {list(x1.shape)} and {list(x2.shape)}")
    _check_gamma(op, x1, gamma)


def _sums(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """The sum in its dtype, and the fp32 value that is normalised."""
    if x1.dtype == torch.float16:
        total = x1 + x2
        return total, total.float()
    exact = x1.float() + x2.float()
    return exact.to(x1.dtype), exact


@emulates("npu::npu_add_rms_norm")
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """`x = x1 + x2`, `y = x * rstd * gamma`; returns y, rstd and x."""
    _check_add("npu_add_rms_norm", x1, x2, gamma, *FLOATS)
    total, value = _sums(x1, x2)
    rstd = _rstd(value, gamma, epsilon)
    return (value * rstd).to(x1.dtype) * gamma, rstd, total


@npu_add_rms_norm.fake
def _(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    return x1.new_empty(x1.shape), _rstd_like(x1, gamma), x1.new_empty(x1.shape)


@emulates("npu::npu_add_rms_norm_cast")
def npu_add_rms_norm_cast(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As npu_add_rms_norm with gamma multiplied in fp32; returns y as fp32 (of the rounded y), y, rstd and x."""
    _check_add("npu_add_rms_norm_cast", x1, x2, gamma, torch.float16, torch.bfloat16)
    total, value = _sums(x1, x2)
    rstd = _rstd(value, gamma, epsilon)
    y = (value * rstd * gamma.float()).to(x1.dtype)
    return y.float(), y, rstd, total


@npu_add_rms_norm_cast.fake
def _(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x1.new_empty(x1.shape, dtype=torch.float32), x1.new_empty(x1.shape), _rstd_like(x1, gamma), x1.new_empty(x1.shape)


@emulates("npu::npu_add_rms_norm_v2")
def npu_add_rms_norm_v2(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    """npu_add_rms_norm in place: y is written to x1, the sum to x2; returns rstd."""
    rstd: Tensor
    y, rstd, total = npu_add_rms_norm(x1, x2, gamma, epsilon)
    x1.copy_(y)
    x2.copy_(total)
    return rstd


@npu_add_rms_norm_v2.fake
def _(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    return _rstd_like(x1, gamma)


@emulates("npu::npu_add_rms_norm_v2_functional")
def npu_add_rms_norm_v2_functional(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """npu_add_rms_norm_v2 without mutation; returns rstd, y and the sum."""
    y, rstd, total = npu_add_rms_norm(x1, x2, gamma, epsilon)
    return rstd, y, total


@npu_add_rms_norm_v2_functional.fake
def _(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    return _rstd_like(x1, gamma), x1.new_empty(x1.shape), x1.new_empty(x1.shape)
