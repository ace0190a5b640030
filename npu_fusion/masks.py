"""What an attention mask says, read from the arithmetic that makes it.

A mask is a function of the query index i and the key index j. Where the graph computes it from index ranges, comparisons and constants
alone, `structure_of` finds the causal and sliding-window structure that it equals, exactly, for every size; where anything else is in it
(padding, packed sequences, a position that only a tensor holds) it finds none, and the mask stays the tensor that it is.

A condition is a conjunction of affine inequalities in i and j; an additive mask is such a condition, 0 where it holds and one very negative
number elsewhere. Sizes may be symbolic, and what is not provable is not assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .affine import (
    ALWAYS,
    KEY,
    NEVER,
    ONE,
    QUERY,
    Affine,
    Condition,
    Index,
    IntegerReader,
    at_least,
    bounded,
    constant_of,
    operand_index,
    through_view,
)
from .view.canon import number_of
from .view.shapes import known_equal
from .view.value import Dim, Value

# A fill this low, or the lowest of the type, leaves a hidden key no weight beside any visible one. Softer masks are biases.
LOWEST_BIAS = -1e9


@dataclass(frozen=True)
class Structure:
    """Key j is visible to query i if `j <= i + causal_offset` (if `is_causal`) and `j > i + causal_offset - window` (if window > 0)."""

    is_causal: bool = False
    causal_offset: Dim = 0
    window: Dim = 0


def structure_of(mask: Value, query_len: Dim, kv_len: Dim) -> Structure | None:
    """The structure that a boolean (True is visible) or additive mask equals, or None.

    An additive mask with a finite fill averages over all keys where it hides every key, a structure gives zeros there: it is replaced only
    if every query provably sees a key.

    Args:
        mask: broadcastable to [B, N, query_len, kv_len].
        query_len, kv_len: the sizes over which i and j run.
    """
    if mask.ndim == 0 or mask.dtype is None:
        return None
    reader = _Reader()
    at: tuple[Index, ...] = bounded((*[None] * mask.ndim, QUERY, KEY)[-mask.ndim :], mask.shape)
    fill = -math.inf
    if mask.dtype is torch.bool:
        visible = reader.condition(mask, at)
    else:
        visible, fill = reader.additive(mask, at) or (None, fill)
    if visible is None or not hides(fill, mask.dtype):
        return None
    structure = _structure(visible, query_len, kv_len)
    if structure is not None and math.isfinite(fill) and not _every_query_sees_a_key(structure, query_len, kv_len):
        return None
    return structure


def boolean_of(mask: Value) -> Value | None:
    """The boolean mask (True is visible) in `where(visible, 0, -inf)`. With a finite fill a row that is all hidden means something else."""
    if mask.op != "where":
        return None
    visible, kept, hidden = mask.args
    if number_of(kept) == 0 and number_of(hidden) == -math.inf:
        return visible
    return None


def hides(fill: float, dtype: torch.dtype | None) -> bool:
    """Whether a number in place of a logit, or added to it, leaves no weight to a key beside one that is visible."""
    lowest = torch.finfo(dtype).min if dtype is not None and dtype.is_floating_point else -math.inf
    return fill <= max(LOWEST_BIAS, lowest)


# -------------------------------------------------------------------- from conditions to structure


def _structure(visible: Condition, query_len: Dim, kv_len: Dim) -> Structure | None:
    """The conjunction as one upper and one lower bound of j that move with i; None if it says anything else."""
    upper: list[Dim] = []  # j <= i + bound
    lower: list[Dim] = []  # j >= i + bound
    for term in visible:
        if _always_holds(term, query_len, kv_len):
            continue
        if (term.query, term.key) == (1, -1):
            upper.append(term.constant)
        elif (term.query, term.key) == (-1, 1):
            lower.append(-term.constant)
        else:
            return None
    offset, first = _tightest(upper, low=True), _tightest(lower, low=False)
    if (upper and offset is None) or (lower and first is None):
        return None
    if first is None:
        return Structure() if offset is None else Structure(True, offset)
    if offset is not None:
        window = offset - first + 1
        return Structure(True, offset, window) if at_least(window, 1) else None
    # A window alone: hides j <= i + offset - window, for whichever offset.
    return Structure(False, 0, 1 - first) if at_least(0, first) else Structure(False, first, 1)


def _always_holds(term: Affine, query_len: Dim, kv_len: Dim) -> bool:
    """Whether an affine expression is >= 0 for all 0 <= i < query_len and 0 <= j < kv_len."""
    least = term.constant
    for factor, size in ((term.query, query_len), (term.key, kv_len)):
        if factor < 0:
            least = least + factor * (size - 1)
    return at_least(least, 0)


def _tightest(bounds: list[Dim], low: bool) -> Dim | None:
    """The smallest (or largest) of the bounds, if one provably is."""
    for bound in bounds:
        if all(at_least(other, bound) if low else at_least(bound, other) for other in bounds):
            return bound
    return None


def _every_query_sees_a_key(structure: Structure, query_len: Dim, kv_len: Dim) -> bool:
    offset, window = structure.causal_offset, structure.window
    if structure.is_causal and not at_least(offset, 0):
        return False
    first_of_last_query = query_len - 1 + offset - window + 1
    return structure.window == 0 or at_least(kv_len - 1, first_of_last_query)


# -------------------------------------------------------------------- reading values


class _Reader(IntegerReader):
    """Evaluates values at one symbolic index."""

    def condition(self, value: Value, at: tuple[Index, ...]) -> Condition | None:
        """When the boolean at an index is true."""
        found: Condition | None = self._once("condition", self._condition, value, at)
        return found

    def additive(self, value: Value, at: tuple[Index, ...]) -> tuple[Condition, float] | None:
        """When the number at an index is 0, and the one number that it is otherwise."""
        found: tuple[Condition, float] | None = self._once("additive", self._additive, value, at)
        return found

    # ---------------------------------------------------------------- booleans

    def _condition(self, value: Value, at: tuple[Index, ...]) -> Condition | None:
        constant = constant_of(value)
        if constant is not None:
            return ALWAYS if constant else NEVER
        if value.op in ("lt", "le", "eq", "ne"):
            return self._comparison(value, at)
        if value.op in ("and", "or", "not"):
            return self._combination(value, at)
        if value.op == "where" and value.dtype is torch.bool:
            test, then, otherwise = (self.condition(arg, operand_index(arg, at)) for arg in value.args)
            return _either(_both(test, then), _both(_negated(test), otherwise))
        if value.op in ("tril", "triu") and value.dtype is torch.bool:
            return _both(self.condition(value.args[0], at), _triangle(value, at))
        if value.op == "cast" and value.args[0].dtype is torch.bool:
            return self.condition(value.args[0], at)
        inner = through_view(value, at)
        return None if inner is None else self.condition(*inner)

    def _comparison(self, value: Value, at: tuple[Index, ...]) -> Condition | None:
        left, right = value.args
        if left.op == "abs" and value.op in ("lt", "le"):  # |x| <= y is x <= y and -x <= y
            bound, inside = (self.integer(x, operand_index(x, at)) for x in (right, left.args[0]))
            return None if bound is None or inside is None else _less(value.op, inside, bound) | _less(value.op, inside.times(-1), bound)
        a, b = (self.integer(x, operand_index(x, at)) for x in (left, right))
        if a is None or b is None:
            return None
        if value.op == "ne" and known_equal(a.constant, b.constant) and (a.query, a.key) == (b.query, b.key):
            return NEVER
        if value.op == "ne":
            return _negated(_equal(a, b))
        return _equal(a, b) if value.op == "eq" else _less(value.op, a, b)

    def _combination(self, value: Value, at: tuple[Index, ...]) -> Condition | None:
        operands = [self.condition(arg, operand_index(arg, at)) for arg in value.args]
        if value.op == "not":
            return _negated(operands[0])
        return (_both if value.op == "and" else _either)(*operands)

    # ---------------------------------------------------------------- numbers added to logits

    def _additive(self, value: Value, at: tuple[Index, ...]) -> tuple[Condition, float] | None:
        constant = constant_of(value)
        if constant is not None:
            return (ALWAYS, -math.inf) if constant == 0 else (NEVER, float(constant))
        if value.op == "where":
            return self._where(value, at)
        if value.op in ("tril", "triu"):
            return self._triangular(value, at)
        if value.op == "mul":
            return self._product(value, at)
        if value.op == "add":
            return _joined(*(self.additive(arg, operand_index(arg, at)) for arg in value.args))
        if value.op == "maximum":
            return self._floored(value, at)
        if value.op == "cast":
            inner = self.additive(value.args[0], at) if value.args[0].dtype != torch.bool else None
            return None if inner is None else (inner[0], _rounded(inner[1], value.dtype))
        inside = through_view(value, at)
        return None if inside is None else self.additive(*inside)

    def _where(self, value: Value, at: tuple[Index, ...]) -> tuple[Condition, float] | None:
        """where(test, then, otherwise): a key is visible where the chosen side is 0."""
        test = self.condition(value.args[0], operand_index(value.args[0], at))
        then, otherwise = (self.additive(arg, operand_index(arg, at)) for arg in value.args[1:])
        fill = _common_fill(then, otherwise)
        if test is None or then is None or otherwise is None or fill is None:
            return None
        visible = _either(_both(test, then[0]), _both(_negated(test), otherwise[0]))
        return None if visible is None else (visible, _rounded(fill, value.dtype))

    def _floored(self, value: Value, at: tuple[Index, ...]) -> tuple[Condition, float] | None:
        """No lower than a negative number."""
        for bound, other in (value.args, value.args[::-1]):
            floor, inner = constant_of(bound), self.additive(other, operand_index(other, at))
            if floor is not None and floor < 0 and inner is not None:
                return inner[0], max(inner[1], float(floor)) if inner[0] != ALWAYS else inner[1]
        return None

    def _triangular(self, value: Value, at: tuple[Index, ...]) -> tuple[Condition, float] | None:
        """Zero outside of the triangle."""
        inner = self.additive(value.args[0], at)
        visible = None if inner is None else _either(inner[0], _negated(_triangle(value, at)))
        return None if inner is None or visible is None else (visible, inner[1])

    def _product(self, value: Value, at: tuple[Index, ...]) -> tuple[Condition, float] | None:
        """A number, or an additive mask, times a boolean seen as a number: zero where that is false."""
        for factor, other in (value.args, value.args[::-1]):
            number, inner = constant_of(factor), self.additive(other, operand_index(other, at))
            if number is not None and number > 0 and inner is not None and other.op not in ("const", "full"):
                return inner[0], inner[1] * number
            hidden = self._indicator(factor, operand_index(factor, at))
            if hidden is not None and inner is not None and math.isfinite(inner[1]):
                visible = _either(inner[0], _negated(hidden))
                return None if visible is None else (visible, inner[1])
        return None

    def _indicator(self, value: Value, at: tuple[Index, ...]) -> Condition | None:
        """When a value that is 1 or 0 is 1: a boolean as a number, one minus such, a triangle of ones."""
        if value.op == "cast":
            source = value.args[0]
            return self.condition(source, at) if source.dtype is torch.bool else self._indicator(source, at)
        if value.op == "sub" and constant_of(value.args[0]) == 1:
            return _negated(self._indicator(value.args[1], operand_index(value.args[1], at)))
        if value.op in ("tril", "triu"):
            return _both(self._indicator(value.args[0], at), _triangle(value, at))
        if constant_of(value) in (0, 1) and value.op == "full":
            return ALWAYS if constant_of(value) else NEVER
        inner = through_view(value, at)
        return None if inner is None else self._indicator(*inner)


# -------------------------------------------------------------------- conditions


def _less(op: str, a: Affine, b: Affine) -> Condition:
    """a < b or a <= b, of integers."""
    difference = b.plus(a.times(-1))
    return _simplified(difference.plus(ONE.times(-1)) if op == "lt" else difference)


def _equal(a: Affine, b: Affine) -> Condition | None:
    return _both(_less("le", a, b), _less("le", b, a))


def _simplified(term: Affine) -> Condition:
    if term.is_constant and at_least(term.constant, 0):
        return ALWAYS
    if term.is_constant and at_least(-1, term.constant):
        return NEVER
    divisor = math.gcd(term.query, term.key)
    if divisor > 1 and isinstance(term.constant, int):  # of integers: floor
        term = Affine(term.query // divisor, term.key // divisor, term.constant // divisor)
    return frozenset({term})


def _both(a: Condition | None, b: Condition | None) -> Condition | None:
    if a == NEVER or b == NEVER:
        return NEVER
    return None if a is None or b is None else a | b


def _either(a: Condition | None, b: Condition | None) -> Condition | None:
    if a == ALWAYS or b == ALWAYS:
        return ALWAYS
    if a is None or b is None:
        return None
    if a == NEVER or _implies(a, b):
        return b
    return a if b == NEVER or _implies(b, a) else None


def _implies(a: Condition, b: Condition) -> bool:
    return all(any((x.query, x.key) == (y.query, y.key) and at_least(y.constant, x.constant) for x in a) for y in b)


def _negated(condition: Condition | None) -> Condition | None:
    if condition is None or len(condition) > 1:
        return None
    if not condition:
        return NEVER
    (term,) = condition
    return _simplified(term.times(-1).plus(ONE.times(-1)))


def _triangle(value: Value, at: tuple[Index, ...]) -> Condition | None:
    """Where `tril` or `triu` keeps its operand: row r, column c with c <= r + diagonal, or c >= r + diagonal."""
    row, column, diagonal = at[-2], at[-1], value.attrs.get("diagonal")
    if row is None or column is None or not isinstance(diagonal, int):
        return None
    edge = row.plus(Affine(0, 0, diagonal))
    return _less("le", column, edge) if value.op == "tril" else _less("le", edge, column)


def _common_fill(a: tuple[Condition, float] | None, b: tuple[Condition, float] | None) -> float | None:
    """The fill of two additive masks; one that is 0 throughout has none of its own."""
    fills = {mask[1] for mask in (a, b) if mask is not None and mask[0] != ALWAYS}
    return fills.pop() if len(fills) == 1 else None


def _joined(a: tuple[Condition, float] | None, b: tuple[Condition, float] | None) -> tuple[Condition, float] | None:
    """The sum of two additive masks. Where both hide, the sum of their fills hides no less."""
    if a is None or b is None:
        return None
    visible = _both(a[0], b[0])
    return None if visible is None else (visible, max(mask[1] for mask in (a, b) if mask[0] != ALWAYS) if visible else -math.inf)


def _rounded(fill: float, dtype: torch.dtype | None) -> float:
    return torch.tensor(fill, dtype=dtype).item() if dtype is not None and dtype.is_floating_point else fill
