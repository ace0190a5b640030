"""What experts by products of whole tensors have in common, of gathered matrices or of all of them: the way from tokens to their sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npu_fusion.match import Match
from npu_fusion.pattern import Pattern, any_of, anything, op, opt_cast, sem, sum_, through
from npu_fusion.view import Value

from .activation import activation, activation_of
from .experts import unit_arguments

VIEWS = ("reshape", "permute", "expand")


def results_of(projected: Callable[[Pattern, str], Pattern]) -> Pattern:
    """What the experts make of their rows; `projected(rows, name)` is the product with the matrices of that name."""
    first = projected(anything(), "gate_up").as_("first")
    unit = any_of(
        sem("glu", gate=first, up=None).as_("unit"),
        sem("glu", gate=first, up=projected(anything(), "up").as_("second")).as_("unit"),
        activation(first).as_("ungated"),
    ).as_("hidden")
    return projected(through(VIEWS, unit), "down").as_("results")


def weighted_sum_of(results: Pattern) -> Pattern:
    """The results of a token's experts times a factor, and added up: one after the other, or as a product of matrices."""
    weighted = opt_cast((opt_cast(through(VIEWS, results)) * anything().as_("factor")).as_("products"))
    return any_of(
        sum_(opt_cast(through(VIEWS, weighted))).as_("sum"),
        op("matmul", through(VIEWS, results), anything().as_("factor")).as_("sum"),
        op("matmul", anything().as_("factor"), through(VIEWS, results)).as_("sum"),
    )


def base_of(value: Value) -> Value:
    """What the value is a view of."""
    while value.op in VIEWS:
        value = value.args[0]
    return value


def activation_arguments(m: Match) -> dict[str, Any]:
    """What `moe_experts` must know of the activation."""
    return unit_arguments(m) if "unit" in m else {"gated": False, "activation": activation_of(m)}
