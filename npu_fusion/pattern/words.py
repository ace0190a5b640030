"""The words in which patterns are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..view import Value
from .core import Anything, Lit, Op, Pattern, Prod, Sem, Through, Var, alternatives, as_pattern
from .values import narrows, widens

VIEW_OPS = ("reshape", "permute", "expand")


def var(name: str) -> Pattern:
    """Any tensor, bound under the name."""
    return Var(name)


def lit(name: str) -> Pattern:
    """A number, bound as a `Literal`: a Python number, a 0-d constant, a SymFloat, or a float that Dynamo passes as a 0-d float64 input."""
    return Lit(name)


def anything() -> Pattern:
    return Anything()


def op(name: str, *args: Pattern | float, commutative: bool = False, **attrs: Any) -> Pattern:
    """The canonical operator applied to operands. Attributes are compared, tested (`AttrIs`) or bound (`AttrAs`)."""
    return Op(name, tuple(as_pattern(arg) for arg in args), attrs, commutative)


def op_any_args(name: str, **attrs: Any) -> Pattern:
    """The canonical operator, whatever its operands."""
    return Op(name, None, attrs)


def torch_op(name: str, *args: Pattern | float, tensors: str, **attrs: Any) -> Pattern:
    """An op of PyTorch that the view has no canonical form of, applied to operands; `tensors` names the parameters that they are given
    for, in order. A parameter that takes a list, here of one tensor, is written `indices[]`."""
    given: dict[str, Any] = {}
    for parameter in tensors.split():
        given[f"@{parameter.removesuffix('[]')}"] = (True,) if parameter.endswith("[]") else 1
    return Op(name, tuple(as_pattern(arg) for arg in args), given | attrs)


def sem(name: str, *, output: int = 0, **args: Any) -> Pattern:
    """A value that an earlier rule knows as output `output` of the semantic op; arguments named here must match theirs."""
    return Sem(name, args, output)


def opt_cast(inner: Pattern, accept: Callable[[Value], bool] | None = None) -> Pattern:
    """The pattern, behind casts or not; only behind casts that are accepted, where a predicate is given."""
    return Through(frozenset({"cast"}), inner, 2, accept)


def opt_upcast(inner: Pattern) -> Pattern:
    """The pattern, behind a cast to a wider type or not: nothing is rounded in between."""
    return Through(frozenset({"cast"}), inner, 2, widens)


def opt_round(inner: Pattern) -> Pattern:
    """The pattern, rounded to a narrower type afterwards or not."""
    return Through(frozenset({"cast"}), inner, 1, narrows)


def opt_view(inner: Pattern, *names: str) -> Pattern:
    """The pattern, behind views (reshape, permute, expand, or those named) or not."""
    return Through(frozenset(names or VIEW_OPS), inner)


def through(names: Sequence[str], inner: Pattern) -> Pattern:
    """The pattern, behind any number of the named operators (their first operand is followed) or not."""
    return Through(frozenset(names), inner)


def any_of(*patterns: Pattern) -> Pattern:
    """Any of the patterns; the same as `p | q | ...`."""
    return alternatives(*patterns)


def prod(*factors: Pattern | float) -> Pattern:
    """A product of all factors, in any order and association."""
    return Prod("mul", tuple(as_pattern(factor) for factor in factors))


def total(*terms: Pattern | float) -> Pattern:
    """A sum of all terms, in any order and association."""
    return Prod("add", tuple(as_pattern(term) for term in terms))


def _unary(name: str) -> Callable[..., Pattern]:
    def build(x: Pattern, **attrs: Any) -> Pattern:
        return op(name, x, **attrs)

    build.__name__ = name
    build.__doc__ = f"The canonical operator `{name}`."
    return build


square, rsqrt, sqrt, exp, tanh, sigmoid, silu, relu, gelu, reciprocal, cast, mean, sum_, softmax, amax, reshape, permute, expand, erf = map(
    _unary,
    "square rsqrt sqrt exp tanh sigmoid silu relu gelu reciprocal cast mean sum softmax amax reshape permute expand erf".split(),
)


def sliced(x: Pattern, **attrs: Any) -> Pattern:
    """x[start:stop:step] along `dim`."""
    return op("slice", x, **attrs)


def cat(*parts: Pattern, **attrs: Any) -> Pattern:
    return op("cat", *parts, **attrs)
