"""Activations: the sub-patterns that rules about gated units, experts and quantisation share.

The canonical view has made `silu`, `gelu` and `sigmoid` of what models write by hand (`x / (1 + exp(-x))`, `0.5 x (1 + tanh(...))`), and
`relu` of `clamp(min=0)`. A pattern of `activation` binds, besides what its argument binds, the value `activation.<name>`, from which
`activation_of` tells which one it was; a silu with a slope inside (`x * sigmoid(1.702 x)`, QuickGELU) binds the slope as `alpha`.
"""

from __future__ import annotations

from collections.abc import Container

from npu_fusion.pattern import Pattern, any_of, anything, erf, gelu, lit, op_any_args, opt_cast, prod, relu, sigmoid, silu, square, tanh
from npu_fusion.view import Value

NAMES = ("silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "relu2", "relu")
"""Activations that the semantic op `glu` knows."""

OTHERS = ("softplus", "elu", "mish", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh")
"""Activations of PyTorch that no fused op knows; `celu`, `selu`, `relu6` and `logsigmoid` are written in terms of these in ATen."""


def slope(x: Pattern) -> Pattern:
    """sigmoid(x) or sigmoid(alpha x), in whatever type it is computed."""
    return opt_cast(sigmoid(opt_cast(any_of(x * lit("alpha"), x))))


def activation(x: Pattern) -> Pattern:
    """An activation of x."""
    return any_of(
        any_of(silu(x), prod(x, slope(x))).as_("activation.silu"),
        gelu(x, approximate="none").as_("activation.gelu"),
        gelu(x, approximate="tanh").as_("activation.gelu_tanh"),
        sigmoid(x).as_("activation.sigmoid"),
        tanh(x).as_("activation.tanh"),
        square(relu(x)).as_("activation.relu2"),
        relu(x).as_("activation.relu"),
    )


def other_activation() -> Pattern:
    """An activation that no fused op knows, bound as `activation.other`: one of PyTorch's, or what looks like a GELU and is none."""
    look_alike = prod(anything(), 1 + any_of(tanh(anything()), erf(anything())))
    return any_of(*(op_any_args(name) for name in OTHERS), look_alike).as_("activation.other")


def why_not(other: Value) -> str:
    """What is wrong with the value bound as `activation.other`."""
    if other.op in OTHERS:
        return f"the activation is {other.op}, which no fused op has"
    return (
        "what looks like a GELU has other constants, or constants that are not known at compile time (dynamic=True keeps floats symbolic)"
    )


def activation_of(m: Container[str]) -> str:
    """The name of the activation that the match found; a match without one is of a silu spread over a product."""
    return next((name for name in NAMES if f"activation.{name}" in m), "silu")


_ONE_TENSOR = frozenset("cast reshape permute neg clamp square sqrt rsqrt exp abs silu gelu sigmoid tanh relu erf".split()) | frozenset(
    OTHERS
)


def source_of(value: Value) -> Value:
    """The tensor of which the value is an elementwise function, with numbers but without other tensors."""
    while value.args:
        if value.op in _ONE_TENSOR:
            value = value.args[0]
        elif value.op in ("add", "mul", "sub", "div") and any(arg.ndim == 0 for arg in value.args):
            value = next((arg for arg in value.args if arg.ndim), value.args[0])
        else:
            break
    return value
