"""Smart constructors: every spelling of a computation is built into one canonical value.

Only identities that hold for real numbers are used, and of those that change rounding only the ones that move it by an ulp of the
computation's own type (`x / sqrt(y)` for `x * rsqrt(y)`). Casts are never dropped, unless a value comes back from a wider type unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .canon_views import ViewCanon, folded_lead, only_leading_ones
from .gelu import gelu_of
from .shapes import broadcast, known_equal, normal_dim, product, same_shape
from .value import Dim, Shape, Value, ValueTable


class Canon(ViewCanon):
    """Builds canonical values into a table."""

    def __init__(self, table: ValueTable) -> None:
        super().__init__(table)
        self._reduced: set[Value] = set()

    # ---------------------------------------------------------------- elementwise

    def unary(self, op: str, x: Value, **attrs: Any) -> Value:
        if op == "neg":
            if x.op == "neg":
                return x.args[0]
            if x.op == "cast" and _is_floating(x.args[0]):
                return self.cast(self.unary("neg", x.args[0]), x.attrs["dtype"])
        if op == "exp" and x.op == "log_softmax" and _is_wide(x):
            return self.softmax(x.args[0], x.attrs["dim"])
        if op == "square":
            if x.op == "sqrt":
                return x.args[0]
            negated = self._negated(x)
            x = x if negated is None else negated
        if op == "reciprocal":
            if x.op == "sqrt":
                return self.unary("rsqrt", x.args[0])
            if x.op == "rsqrt":
                return self.unary("sqrt", x.args[0])
            sigmoid = self._as_sigmoid(x)
            if sigmoid is not None:
                return sigmoid
        if self._is_squeezed_reduction(x):
            return self.reshape(self._mark_reduced(self.unary(op, x.args[0], **attrs)), x.shape)
        return self._mark_reduced(self.table.intern(op, (x,), attrs, x.shape, x.dtype), x)

    # A reduction without keepdim, and arithmetic with numbers on it, is the kept form with the unit dimension dropped last.

    def _is_squeezed_reduction(self, x: Value) -> bool:
        return x.op == "reshape" and x.args[0] in self._reduced

    # A batch that is folded, or split into groups, around a product keeps the product's shape: the reshape moves behind what follows.

    def _ungrouped(self, operands: Sequence[Value], shape: Shape) -> list[Value] | None:
        """The operands as the product among them has its leading dimensions; None if there is none, or one cannot be brought to them."""
        regrouped = [x for x in operands if x.op == "reshape" and x.args[0] in self._products and same_shape(x.shape, shape)]
        if not regrouped or not same_shape(regrouped[0].shape[-2:], regrouped[0].args[0].shape[-2:]):
            return None
        lead = regrouped[0].args[0].shape[:-2]
        apart: list[Value] = []
        for x in operands:
            x = self.bare(x, regrouped[0], shape)
            if x.ndim > 2 and all(d == 1 for d in x.shape[:-2]):
                x = self.reshape(x, x.shape[-2:])
            if x.ndim > 2 and not same_shape(x.shape[:-2], shape[:-2]):
                return None
            apart.append(x if x.ndim <= 2 else self.reshape(x, (*lead, *x.shape[-2:])))
        return apart

    def where(self, test: Value, x: Value, y: Value, shape: Shape, dtype: torch.dtype | None) -> Value:
        apart = self._ungrouped((test, x, y), shape)
        if apart is None:
            return self.table.intern("where", (test, x, y), {}, shape, dtype)
        test, x, y = apart
        result = self.table.intern("where", (test, x, y), {}, broadcast(test.shape, broadcast(x.shape, y.shape)), dtype)
        self._products.add(result)
        return self.reshape(result, shape)

    def _mark_reduced(self, result: Value, operand: Value | None = None) -> Value:
        if operand is None or operand in self._reduced:
            self._reduced.add(result)
        return result

    def _as_sigmoid(self, denominator: Value) -> Value | None:
        """1 / (1 + exp(-x)) is sigmoid(x)."""
        if denominator.op != "add":
            return None
        a, b = denominator.args
        if not is_number(b, 1):
            a, b = b, a
        negated = self._negated(a.args[0]) if a.op == "exp" else None
        return self.unary("sigmoid", negated) if is_number(b, 1) and negated is not None else None

    def _negated(self, x: Value) -> Value | None:
        """y, where x is -y. Casts stand outside neg."""
        if x.op == "cast" and x.dtype is not None and _is_floating(x.args[0]):
            inner = self._negated(x.args[0])
            return None if inner is None else self.cast(inner, x.dtype)
        return x.args[0] if x.op == "neg" else None

    def binary(self, op: str, a: Value, b: Value, shape: Shape | None = None) -> Value:
        """`op` on operands of one dtype (casts are the caller's); a constant operand stays a Python number."""
        if shape is None:
            shape = broadcast(a.shape, b.shape)
        for x, y in ((a, b), (b, a)):
            if self._is_squeezed_reduction(x) and y.ndim == 0 and same_shape(x.shape, shape):
                kept = x.args[0]
                pair = (kept, y) if x is a else (y, kept)
                return self.reshape(self._mark_reduced(self.binary(op, *pair, kept.shape)), shape)
        apart = self._ungrouped((a, b), shape)
        if apart is not None:
            left, right = apart
            product = self.binary(op, left, right)
            self._products.add(product)
            return self.reshape(product, shape)
        a = self.bare(a, b, shape)
        b = self.bare(b, a, shape)
        result: Value = getattr(self, f"_{op}")(a, b, shape)
        return self._mark_reduced(result, a if b.ndim == 0 else b if a.ndim == 0 else result)

    def bare(self, x: Value, other: Value, shape: Shape) -> Value:
        """The operand without expands and leading unit dimensions that broadcasting supplies anyway."""
        while x.op == "expand" or (x.op == "reshape" and only_leading_ones(x)):
            inner = x.args[0]
            if not same_shape(broadcast(inner.shape, other.shape), shape):
                break
            x = inner
        return x

    def _emit(self, op: str, a: Value, b: Value, shape: Shape, commutative: bool) -> Value:
        if commutative and (a.index > b.index):
            a, b = b, a
        # A 0-d operand does not decide the type, unless the other one is a number or 0-d too.
        typed = b if a.dtype is None or (b.dtype is not None and b.ndim > a.ndim) else a
        return self.table.intern(op, (a, b), {}, shape, typed.dtype)

    def _add(self, a: Value, b: Value, shape: Shape) -> Value:
        if self._negated(a) is not None and self._negated(b) is None:
            a, b = b, a
        negated = self._negated(b)
        if negated is not None:
            return self._sub(a, negated, shape)
        for x, other in ((a, b), (b, a)):
            if (is_number(x, 0) or _is_zeros(x)) and same_shape(other.shape, shape):
                return other
            if _is_zeros(x) and other.dtype is not None and all(known_equal(size, 1) for size in shape):
                return self.reshape(other, shape)
        return self._emit("add", a, b, shape, commutative=True)

    def _sub(self, a: Value, b: Value, shape: Shape) -> Value:
        if is_number(b, 0) and same_shape(a.shape, shape):
            return a
        number = number_of(b)
        if number is not None and not isinstance(number, bool):
            return self._add(a, self.const(-number), shape)
        negated = self._negated(b)
        if negated is not None:
            return self._add(a, negated, shape)
        if is_number(a, 0) and same_shape(b.shape, shape):
            return self.unary("neg", b)
        if b.op == "logsumexp" and b.args[0] is a and len(b.attrs["dims"]) == 1 and _is_wide(a):
            return self.table.intern("log_softmax", (a,), {"dim": b.attrs["dims"][0]}, a.shape, a.dtype)
        return self._emit("sub", a, b, shape, commutative=False)

    def _mul(self, a: Value, b: Value, shape: Shape) -> Value:
        if a is b and a.dtype is not None:
            return self.unary("square", a)
        for x, y in ((a, b), (b, a)):
            negated = self._negated(x)
            if negated is not None:
                return self.unary("neg", self._mul(negated, y, shape))
            if is_number(x, 1) and same_shape(y.shape, shape):
                return y
            if is_number(x, -1) and same_shape(y.shape, shape):
                return self.unary("neg", y)
            if x.op == "reciprocal":
                return self._div(y, x.args[0], shape)
            if x.op == "sigmoid" and x.args[0] is y:
                return self.unary("silu", y)
            reduced = self._scaled_reduction(y, number_of(x))
            if reduced is not None:
                return reduced
        gelu = gelu_of(a, b)
        if gelu is not None and same_shape(gelu[0].shape, shape):
            return self.unary("gelu", gelu[0], approximate=gelu[1])
        return self._emit("mul", a, b, shape, commutative=True)

    def _div(self, a: Value, b: Value, shape: Shape) -> Value:
        number = number_of(b)
        if number is not None and number != 0 and a.dtype is not None and a.dtype.is_floating_point:
            return self._mul(a, self.const(1.0 / number), shape)
        if b.op == "sqrt":
            return self._mul(a, self.unary("rsqrt", b.args[0]), shape)
        if b.op == "rsqrt":
            return self._mul(a, self.unary("sqrt", b.args[0]), shape)
        if is_number(a, 1) and b.dtype is not None:
            return self.unary("reciprocal", b)
        sigmoid = self._as_sigmoid(b)
        if sigmoid is not None:
            return self._mul(a, sigmoid, shape)
        if b.op == "sym" and a.op == "sum" and known_equal(b.attrs["expr"], _reduced_size(a)):
            return self._mean_of(a)
        softmax = self._as_softmax(a, b)
        if softmax is not None:
            return softmax
        return self._emit("div", a, b, shape, commutative=False)

    def _as_softmax(self, a: Value, b: Value) -> Value | None:
        """exp(x) / sum(exp(x)) is softmax(x); so is it of x less what all its inputs have in common, as `softmax` finds."""
        if a.op != "exp" or b.op != "sum" or b.args[0] is not a or len(b.attrs["dims"]) != 1:
            return None
        return self.softmax(a.args[0], b.attrs["dims"][0])

    def power(self, x: Value, exponent: Value, shape: Shape) -> Value:
        number = number_of(exponent)
        if number is None or not same_shape(x.shape, shape):
            return self._emit("pow", x, exponent, shape, commutative=False)
        if number == 1:
            return x
        if number == 2:
            return self.unary("square", x)
        if number == 3:
            return self._mul(self.unary("square", x), x, shape)
        if number == -1:
            return self.unary("reciprocal", x)
        if number == 0.5:
            return self.unary("sqrt", x)
        if number == -0.5:
            return self.unary("rsqrt", x)
        return self.table.intern("pow", (x, exponent), {}, shape, x.dtype)

    def _scaled_reduction(self, x: Value, number: float | int | bool | None) -> Value | None:
        """sum(x) / N is a mean, and sqrt(sum(x)) / sqrt(N) the square root of one."""
        if number is None or x.op not in ("sum", "sqrt"):
            return None
        total = x if x.op == "sum" else x.args[0]
        if total.op != "sum":
            return None
        size = _reduced_size(total)
        factor = number if x.op == "sum" else number * abs(number)
        if not isinstance(size, int) or not math.isclose(factor * size, 1.0, rel_tol=1e-12):
            return None
        mean = self._mean_of(total)
        return mean if x.op == "sum" else self.unary("sqrt", mean)

    def _mean_of(self, total: Value) -> Value:
        return self.table.intern("mean", total.args, dict(total.attrs), total.shape, total.dtype)

    # ---------------------------------------------------------------- reductions

    def reduce(self, op: str, x: Value, dims: Sequence[int] | None, keepdim: bool) -> Value:
        """`op` over `dims` (all if None or empty), canonically with the reduced dimensions kept."""
        axes = tuple(sorted(normal_dim(d, x.ndim) for d in dims)) if dims else tuple(range(x.ndim))
        kept = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
        out = self.table.intern(op, (x,), {"dims": axes}, kept, x.dtype)
        if x.ndim - 1 in axes:  # a statistic of rows; a sum over experts is the next layer's input, and stays as it is
            self._mark_reduced(out)
        return out if keepdim else self.reshape(out, tuple(d for i, d in enumerate(x.shape) if i not in axes))

    def matmul(self, a: Value, b: Value) -> Value:
        """[..., M, K] @ [..., K, N]; a row by itself (einsum's way to add up squares) is the sum of its squares."""
        row = self._row_by_itself(a, b)
        if row is None:
            return super().matmul(a, b)
        return self.reshape(self.reduce("sum", self.unary("square", row), (-1,), keepdim=True), (*a.shape[:-1], 1))

    def _row_by_itself(self, a: Value, b: Value) -> Value | None:
        """The value [..., K] that `a` is as rows [..., 1, K] and `b` as columns [..., K, 1]; None for all other products."""
        if a.op == b.op == "cast" and a.dtype == b.dtype and a.dtype is not None:
            inner = self._row_by_itself(a.args[0], b.args[0])
            return None if inner is None else self.cast(inner, a.dtype)
        if not a.op == b.op == "reshape" or a.args[0] is not b.args[0]:
            return None
        row, size = a.args[0], a.shape[-1]
        rows = same_shape(a.shape, (*b.shape[:-2], 1, size)) and same_shape(b.shape[-2:], (size, 1))
        return row if rows and row.ndim > 0 and known_equal(row.shape[-1], size) else None

    def softmax(self, x: Value, dim: int) -> Value:
        dim = normal_dim(dim, x.ndim)
        if x.op == "sub" and x.args[1].op == "amax" and x.args[1].args[0] is x.args[0] and x.args[1].attrs["dims"] == (dim,):
            x = x.args[0]  # a softmax does not see what all its inputs have in common
        inner = x
        while inner.op == "cast":
            inner = inner.args[0]
        lead = inner.args[0].shape[:-2] if self._ungrouped((inner,), x.shape) is not None else folded_lead(x)
        if lead is not None and dim == x.ndim - 1:
            return self.reshape(self.softmax(self.reshape(x, (*lead, *x.shape[-2:])), -1), x.shape)
        return self.table.intern("softmax", (x,), {"dim": normal_dim(dim, x.ndim)}, x.shape, x.dtype)

    # ---------------------------------------------------------------- complex numbers
    # A complex tensor is a view of [..., 2] real ones; products are written out in real and imaginary parts, as PyTorch computes them.

    def view_as_complex(self, pairs: Value, dtype: torch.dtype) -> Value:
        """[..., 2] real numbers as complex ones."""
        if pairs.op == "view_as_real":
            return pairs.args[0]
        return self.table.intern("view_as_complex", (pairs,), {}, pairs.shape[:-1], dtype)

    def view_as_real(self, z: Value) -> Value:
        """Complex numbers as real ones [..., 2]."""
        if z.op == "view_as_complex":
            return z.args[0]
        if z.op == "conj":
            real, imag = self.complex_parts(z.args[0])
            return self.stack([real, self.unary("neg", imag)], -1)
        if z.op == "mul" and all(arg.dtype == z.dtype for arg in z.args):
            (a, b), (c, d) = map(self.complex_parts, z.args)
            real = self.binary("sub", self.binary("mul", a, c, z.shape), self.binary("mul", b, d, z.shape), z.shape)
            imag = self.binary("add", self.binary("mul", a, d, z.shape), self.binary("mul", b, c, z.shape), z.shape)
            return self.stack([real, imag], -1)
        assert z.dtype is not None
        return self.table.intern("view_as_real", (z,), {}, (*z.shape, 2), z.dtype.to_real())

    def complex_parts(self, z: Value) -> tuple[Value, Value]:
        """Real and imaginary part."""
        pairs = self.view_as_real(z)
        real, imag = (self.reshape(self.slice(pairs, -1, i, i + 1), z.shape) for i in range(2))
        return real, imag


def number_of(x: Value) -> float | int | bool | None:
    """The Python number that a value holds, if it is a constant."""
    if x.op == "const" or (x.op == "full" and x.ndim == 0):
        number: float | int | bool = x.attrs["value"]
        return number
    if x.op == "cast" and x.ndim == 0 and x.dtype is not None and x.dtype.is_floating_point:
        return number_of(x.args[0])
    return None


def is_number(x: Value, number: float) -> bool:
    found = number_of(x)
    return found is not None and not isinstance(found, bool) and found == number


def _is_floating(x: Value) -> bool:
    return x.dtype is not None and x.dtype.is_floating_point


def _is_zeros(x: Value) -> bool:
    while x.op in ("cast", "reshape", "expand"):
        x = x.args[0]
    return x.op == "full" and x.attrs["value"] == 0


def _reduced_size(total: Value) -> Dim:
    return product(total.args[0].shape[d] for d in total.attrs["dims"])


def _is_wide(x: Value) -> bool:
    """Whether a logarithm kept in x's type gives back what it is of to an ulp or so: not in half precision."""
    return x.dtype in (torch.float32, torch.float64)
