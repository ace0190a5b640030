"""Functions that the kernels share, in fp32: activations, and rounding to a narrower type in between.

Written with what triton-ascend, triton and the interpreter have in common: `tl.extra.libdevice` is not.
"""

from __future__ import annotations

import triton
import triton.language as tl

_DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}


def dtype_of(name: str | None) -> tl.dtype | None:
    """A kernel's constant for the name of a dtype, as its signature writes it (`bf16`); None for None."""
    return None if name is None else _DTYPES[name]


TO_NEAREST: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it has no room for a fraction


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 as it is after a stay in DTYPE; unchanged where DTYPE is None."""
    if DTYPE is not None:
        x = x.to(DTYPE).to(tl.float32)
    return x


@triton.jit
def to_nearest(x):
    """The nearest integers, halves to even, of numbers of magnitude below 2^22: a cast to an integer truncates."""
    return (x + TO_NEAREST) - TO_NEAREST


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def tanh(x):
    """By the exponential of what is not positive, so that nothing overflows."""
    small = tl.exp(-2.0 * tl.abs(x))
    positive = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -positive, positive)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of that name, as in `npu_fusion.ops`."""
    if ACTIVATION == "silu":
        y = silu(x)
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "tanh":
        y = tanh(x)
    elif ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)  # a NaN stays one
    elif ACTIVATION == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        y = x
    return y
