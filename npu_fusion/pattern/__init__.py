"""The language of patterns.

A pattern is written with operators, as the formula it stands for::

    x, weight, eps = var("x"), var("weight"), lit("eps")
    h = opt_cast(x)
    normed = h * rsqrt(mean(square(h), dims=LAST) + eps)
    pattern = opt_cast(normed) * weight

It is matched against the canonical view (npu_fusion/view), where `x ** 2`, `x * x` and `square(x)` are one value, all casts are explicit
and sit outside views. What is left to say is: alternatives (`p | q`), optional casts (`opt_cast`) and views (`opt_view`), and products
whose association is free (`prod`). `+` and `*` match either operand order. A variable that occurs twice must be the same value twice.

Matching is backtracking search: `Pattern.match` yields once for every way in which the pattern fits, with the bindings in the `State`.
"""

from .core import LAST, AttrAs, AttrIs, Failure, Footprint, Pattern, State, as_pattern
from .values import bits, literal_of
from .words import (
    VIEW_OPS,
    amax,
    any_of,
    anything,
    cast,
    cat,
    erf,
    exp,
    expand,
    gelu,
    lit,
    mean,
    op,
    op_any_args,
    opt_cast,
    opt_round,
    opt_upcast,
    opt_view,
    permute,
    prod,
    reciprocal,
    relu,
    reshape,
    rsqrt,
    sem,
    sigmoid,
    silu,
    sliced,
    softmax,
    sqrt,
    square,
    sum_,
    tanh,
    through,
    torch_op,
    total,
    var,
)

__all__ = [
    "LAST",
    "VIEW_OPS",
    "AttrAs",
    "AttrIs",
    "Failure",
    "Footprint",
    "Pattern",
    "State",
    "amax",
    "any_of",
    "anything",
    "as_pattern",
    "bits",
    "cast",
    "cat",
    "erf",
    "exp",
    "expand",
    "gelu",
    "lit",
    "literal_of",
    "mean",
    "op",
    "op_any_args",
    "opt_cast",
    "opt_round",
    "opt_upcast",
    "opt_view",
    "permute",
    "prod",
    "reciprocal",
    "relu",
    "reshape",
    "rsqrt",
    "sem",
    "sigmoid",
    "silu",
    "sliced",
    "softmax",
    "sqrt",
    "square",
    "sum_",
    "tanh",
    "through",
    "torch_op",
    "total",
    "var",
]
