"""What the families share: argument checks, precision, and the memory order of results.

The checks run in the reference and in the fake kernel, so that a wrong call fails while the graph is being rewritten. Ranks and dtypes
are always known there; sizes may be symbolic, and a check on a size fails only when it is *known* to be wrong: it never adds a guard.

A result that is stored like an input has the strides of `torch.empty_like(input)`, which are those of an elementwise op on it: the graph
that is being rewritten has the guards that this order may need (on gapped graph inputs) from its own elementwise ops.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = Any  # int or torch.SymInt: one dimension

# Activation name to the function. `silu` is here for alpha = 1; see `glu` for the scaled one.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "identity": lambda x: x,
}


def check_type(op: str, condition: bool, message: str) -> None:
    """Raise TypeError with `message` unless `condition`."""
    if not condition:
        raise TypeError(f"{op}: {message}")


def check_value(op: str, condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition`, which must not depend on a symbolic size."""
    if not condition:
        raise ValueError(f"{op}: {message}")


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every given tensor has a real floating-point dtype."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_floating_dtype(op, name, tensor.dtype)


def check_floating_dtype(op: str, name: str, dtype: torch.dtype | None) -> None:
    """Raise TypeError unless `dtype` is None or a real floating-point dtype."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be floating point, not {dtype}")


def check_index(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every given tensor is int32 or int64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} must be int32 or int64, not {tensor.dtype}")


def check_same_dtype(op: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all tensors have one dtype."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        raise TypeError(f"{op}: {', '.join(tensors)} must have one dtype, not {', '.join(sorted(map(str, dtypes)))}")


def check_rank(op: str, rank: int, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every given tensor has exactly `rank` dimensions."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() != rank:
            raise ValueError(f"{op}: {name} must have {rank} dimensions, not {tensor.dim()}")


def check_min_rank(op: str, rank: int, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has at least `rank` dimensions."""
    for name, tensor in tensors.items():
        if tensor.dim() < rank:
            raise ValueError(f"{op}: {name} must have at least {rank} dimensions, not {tensor.dim()}")


def check_choice(op: str, name: str, value: object, known: Collection[object]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, known))}, not {value!r}")


def check_sizes(op: str, name: str, actual: Sequence[Size], expected: Sequence[Size]) -> None:
    """Raise ValueError if the shapes are known to differ."""
    if len(actual) != len(expected) or any(statically_known_true(a != e) for a, e in zip(actual, expected)):
        raise ValueError(f"{op}: {name} must have shape {list(expected)}, not {list(actual)}")


def check_broadcastable(op: str, name: str, actual: Sequence[Size], target: Sequence[Size]) -> None:
    """Raise ValueError if a tensor of shape `actual` is known not to broadcast to the shape `target`."""
    pairs = zip(reversed(actual), reversed(target))
    if len(actual) > len(target) or any(known_different(a, t) and known_different(a, 1) for a, t in pairs):
        raise ValueError(f"{op}: {name} of shape {list(actual)} does not broadcast to {list(target)}")


def known_different(left: Size, right: Size) -> bool:
    """Whether two sizes are known to differ, without a guard."""
    return statically_known_true(left != right)


def broadcast_sizes(op: str, left: Sequence[Size], right: Sequence[Size]) -> list[Size]:
    """The shape that `left` and `right` broadcast to. Sizes that are not known to be 1 are taken to be equal, without a guard.

    Raises:
        ValueError: the shapes are known not to broadcast.
    """
    rank = max(len(left), len(right))
    pairs = zip([1] * (rank - len(left)) + list(left), [1] * (rank - len(right)) + list(right))
    sizes = []
    for a, b in pairs:
        if known_different(a, b) and known_different(a, 1) and known_different(b, 1):
            raise ValueError(f"{op}: shapes {list(left)} and {list(right)} do not broadcast")
        # Of two sizes taken to be equal the static one says more.
        take_right = statically_known_true(a == 1) or (isinstance(b, int) and b != 1)
        sizes.append(b if take_right else a)
    return sizes


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: float32, or float64 if any tensor is float64."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def stored_like(result: Tensor, like: Tensor) -> Tensor:
    """`result`, a fresh tensor of the shape of `like`, in the memory order of `torch.empty_like(like)`: copied if it has another."""
    if result.stride() == like.stride():
        return result
    expected = torch.empty_like(like, dtype=result.dtype)
    return result if result.stride() == expected.stride() else expected.copy_(result)


def empty_token_major(like: Tensor, batch: Size, heads: Size, tokens: Size, dim: Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised [batch, heads, tokens, dim] tensor whose memory is a contiguous [batch, tokens, heads, dim]."""
    return like.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)


def token_major(result: Tensor) -> Tensor:
    """`result` [batch, heads, tokens, dim], with its memory a contiguous [batch, tokens, heads, dim]."""
    return result.transpose(1, 2).contiguous().transpose(1, 2)
