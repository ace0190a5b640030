"""Activations: the sub-patterns that rules about gated units, experts and quantisation share.

The canonical view has made `silu`, `gelu` and `sigmoid` of what models write by hand (`x / (1 + exp(-x))`, `0.5 x (1 + tanh(...))`), and
`relu` of `clamp(min=0)`. A pattern of `activation` binds, besides what its argument binds, the value `activation.<name>`, from which
`activation_of` tells which one it was; a silu with a slope inside (`x * sigmoid(1.702 x)`, QuickGELU) binds the slope as `alpha`.
"""

from __future__ import annotations

from npu_fusion.match import Match
from npu_fusion.pattern import Pattern, any_of, gelu, lit, op, opt_cast, prod, relu, sigmoid, silu, square, tanh
from npu_fusion.view import Value

NAMES = ("silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "relu", "relu2")
"""The activations of the semantic op `glu` that a model can write."""

UNSUPPORTED = ("softplus", "elu", "celu", "selu", "mish", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh", "log_sigmoid_forward")
"""Activations of PyTorch that no fused op has."""


def slope(x: Pattern) -> Pattern:
    """The sigmoid inside a silu whose x and sigmoid differ in type, or that has a slope: sigmoid(x) or sigmoid(alpha x)."""
    return opt_cast(sigmoid(opt_cast(any_of(x * lit("alpha"), x))))


def activation(x: Pattern) -> Pattern:
    """An activation of x, in whatever type it is computed."""
    return any_of(
        any_of(silu(x), prod(x, slope(x))).as_("activation.silu"),
        gelu(x, approximate="none").as_("activation.gelu"),
        gelu(x, approximate="tanh").as_("activation.gelu_tanh"),
        sigmoid(x).as_("activation.sigmoid"),
        tanh(x).as_("activation.tanh"),
        square(relu(x)).as_("activation.relu2"),
        relu(x).as_("activation.relu"),
    )


def activation_of(m: Match) -> str:
    """The name of the activation that the match found."""
    return next(name for name in NAMES if f"activation.{name}" in m)


_TRANSPARENT = frozenset(
    "cast reshape permute expand neg clamp square sqrt exp abs silu gelu sigmoid tanh relu erf".split() + list(UNSUPPORTED)
)


def source_of(value: Value) -> Value:
    """The tensor of which the value is an elementwise function, of that tensor alone."""
    while True:
        if value.op in _TRANSPARENT and value.args:
            value = value.args[0]
        elif value.op in ("add", "mul", "sub", "div") and any(arg.ndim == 0 for arg in value.args):
            value = next((arg for arg in value.args if arg.ndim), value.args[0])
        elif value.op in ("mul", "add") and source_of(value.args[0]) is source_of(value.args[1]):
            value = source_of(value.args[0])
        else:
            return value


def is_unsupported(value: Value) -> bool:
    return value.op in UNSUPPORTED


def unsupported() -> Pattern:
    """An activation that PyTorch has and the fused ops have not."""
    return any_of(*(op_any(name) for name in UNSUPPORTED))


def op_any(name: str) -> Pattern:
    return op(name)
