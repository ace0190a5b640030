"""CPU kernels of gated units and activations: npu_swiglu, npu_geglu, npu_clipped_swiglu, npu_gelu_mul, npu_gelu, npu_fast_gelu, npu_silu.

Source: op-plugin docs of each op; rounding points from ops-nn `activation/*/op_kernel`. All compute in fp32 and round once, at the end, but
npu_geglu, which multiplies the rounded gelu in fp16 (on A2 and A3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import FLOATS, check, check_dtype, emulates

MAX_RANK = 8
_GELU_MODES = ("none", "tanh")


def _check_halves(op: str, name: str, x: Tensor, dim: int, least_rank: int = 1) -> None:
    """`x` has a dtype and rank that the gated units take, and an even size along `dim`, where that is known."""
    check_dtype(op, name, x, *FLOATS)
    check(op, least_rank <= x.dim() <= MAX_RANK, f"{name} must have {least_rank} to {MAX_RANK} dimensions, not {x.dim()}")
    check(op, -x.dim() <= dim < x.dim(), f"dim must be in [{-x.dim()}, {x.dim() - 1}], not {dim}")
    size = x.shape[dim]
    check(op, not isinstance(size, int) or size % 2 == 0, f"{name} must have an even size along dim {dim}, not {size}")


def _half_like(x: Tensor, dim: int) -> Tensor:
    sizes = list(x.shape)
    sizes[dim] = sizes[dim] // 2
    return x.new_empty(sizes)


@emulates("npu::npu_swiglu")
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """`silu(a) * b` of the two halves a and b along `dim`."""
    _check_halves("npu_swiglu", "input", input, dim)
    a, b = input.float().chunk(2, dim)
    return (F.silu(a) * b).to(input.dtype)


@npu_swiglu.fake
def _(input: Tensor, dim: int = -1) -> Tensor:
    _check_halves("npu_swiglu", "input", input, dim)
    return _half_like(input, dim)


@emulates("npu::npu_geglu")
def npu_geglu(input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False) -> tuple[Tensor, Tensor]:
    """One half times the gelu of the other, and that gelu; the second half is activated, or, with `activate_left`, the first.

    `approximate` is 1 for the tanh form, 0 for erf.
    """
    op = "npu_geglu"
    _check_halves(op, "input", input, dim)
    check(op, approximate in (0, 1), f"approximate must be 0 (erf) or 1 (tanh), not {approximate}")
    left, right = input.float().chunk(2, dim)
    gate, up = (left, right) if activate_left else (right, left)
    gelu = F.gelu(gate, approximate=_GELU_MODES[approximate])
    rounded = gelu.to(input.dtype)
    factor = rounded.float() if input.dtype == torch.float16 else gelu
    return (factor * up).to(input.dtype), rounded


@npu_geglu.fake
def _(input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False) -> tuple[Tensor, Tensor]:
    _check_halves("npu_geglu", "input", input, dim)
    return _half_like(input, dim), _half_like(input, dim)


@emulates("npu::npu_clipped_swiglu")
def npu_clipped_swiglu(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    """`a * sigmoid(alpha * a) * (b + bias)` with a cut off at `limit` from above, b at `limit` on both sides.

    The dimensions before `dim` are rows; the rest of a row, flattened, is a and b in turn (`interleaved`), or a and then b.

    Args:
        group_index: int64 [groups], the numbers of rows in each group; only as many rows as they sum to are computed. The operator leaves
            the others undefined, here they are 0.
    """
    op = "npu_clipped_swiglu"
    _check_halves(op, "x", x, dim)
    check(op, x.is_contiguous(), "x must be contiguous")
    check(op, limit > 0, f"limit must be positive, not {limit}")
    rows = x.float().reshape(x.shape[: dim % x.dim()].numel(), x.shape[dim % x.dim() :].numel())
    a, b = (rows[:, 0::2], rows[:, 1::2]) if interleaved else rows.chunk(2, dim=1)
    a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    y = a * torch.sigmoid(alpha * a) * (b + bias)
    if group_index is not None:
        y[_rows_in_groups(op, group_index) :] = 0
    return y.to(x.dtype).reshape(_half_like(x, dim).shape)


def _rows_in_groups(op: str, group_index: Tensor) -> int:
    check_dtype(op, "group_index", group_index, torch.int64)
    check(op, group_index.dim() == 1, f"group_index must have 1 dimension, not {group_index.dim()}")
    check(op, group_index.numel() <= 8192, f"group_index must have at most 8192 elements, not {group_index.numel()}")
    check(op, bool((group_index >= 0).all()), "group_index must not be negative")
    return int(group_index.sum())


@npu_clipped_swiglu.fake
def _(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    _check_halves("npu_clipped_swiglu", "x", x, dim)
    return _half_like(x, dim)


@emulates("npu::npu_gelu_mul")
def npu_gelu_mul(input: Tensor, *, approximate: str = "none") -> Tensor:
    """The gelu of the first half of the last dimension times the second half."""
    op = "npu_gelu_mul"
    _check_halves(op, "input", input, -1, least_rank=2)
    _check_mode(op, approximate)
    width, rows = input.shape[-1], input.shape[:-1].numel()
    check(op, 0 < width <= 1024, f"input must have a last dimension of 2 to 1024, not {width}")
    check(op, rows <= 200_000, f"input must have at most 200000 rows, not {rows}")
    a, b = input.float().chunk(2, -1)
    return (F.gelu(a, approximate=approximate) * b).to(input.dtype)


@npu_gelu_mul.fake
def _(input: Tensor, *, approximate: str = "none") -> Tensor:
    _check_halves("npu_gelu_mul", "input", input, -1, least_rank=2)
    return _half_like(input, -1)


# -------------------------------------------------------------------- activations


def _check_activation(op: str, input: Tensor) -> None:
    check_dtype(op, "input", input, *FLOATS)
    check(op, input.dim() <= MAX_RANK, f"input must have at most {MAX_RANK} dimensions, not {input.dim()}")


def _check_mode(op: str, approximate: str) -> None:
    check(op, approximate in _GELU_MODES, f"approximate must be 'none' or 'tanh', not {approximate!r}")


@emulates("npu::npu_gelu")
def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU in its erf form, or in its tanh approximation; unlike `aten.gelu` on an NPU, which takes tanh whatever is asked for."""
    _check_activation("npu_gelu", input)
    _check_mode("npu_gelu", approximate)
    return F.gelu(input.float(), approximate=approximate).to(input.dtype)


@npu_gelu.fake
def _(input: Tensor, *, approximate: str = "none") -> Tensor:
    return torch.empty_like(input)


@emulates("npu::npu_fast_gelu")
def npu_fast_gelu(input: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, also known as QuickGELU."""
    _check_activation("npu_fast_gelu", input)
    x = input.float()
    return (x * torch.sigmoid(1.702 * x)).to(input.dtype)


@npu_fast_gelu.fake
def _(input: Tensor) -> Tensor:
    return torch.empty_like(input)


@emulates("npu::npu_silu")
def npu_silu(input: Tensor) -> Tensor:
    """`x * sigmoid(x)`."""
    _check_activation("npu_silu", input)
    return F.silu(input.float()).to(input.dtype)


@npu_silu.fake
def _(input: Tensor) -> Tensor:
    return torch.empty_like(input)
