"""Names for the dimensions of values: what a product of matrices computes, however its operands were reshaped for it.

A dimension is the tuple of the names that it is made of, outermost first: `x.view(T * K, H)` of x [T, K, H] has the axes (t, k), (h). A
dimension of size 1 has no name. Names are followed through views, elementwise ops, sums and products of matrices; what a dimension was
broadcast to is a name that agrees with every other one of its size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from npu_fusion.view import Value
from npu_fusion.view.shapes import known_equal, product
from npu_fusion.view.value import Dim, Shape

Axis = tuple[str, ...]
Axes = tuple[Axis, ...]

_BROADCAST = "*"


class AxisNames:
    """Finds the axes of values that are made of others whose axes are known.

    Args:
        leaves: values and their axes; the search ends there.
        sizes: of each name.
    """

    def __init__(self, leaves: Mapping[Value, Axes], sizes: Mapping[str, Dim]) -> None:
        self._known: dict[Value, Axes | None] = dict(leaves)
        self._sizes = dict(sizes)

    def of(self, value: Value) -> Axes | None:
        """The axes of a value; None where it is not made of the leaves by ops that are understood."""
        if value not in self._known:
            self._known[value] = self._find(value)
        return self._known[value]

    def _find(self, value: Value) -> Axes | None:
        if value.op not in ("cast", "reshape", "permute", "expand", "add", "mul", "sum", "matmul"):
            return None
        operands = [self.of(arg) for arg in value.args]
        found = [axes for axes in operands if axes is not None]
        if len(found) < len(operands):
            return None
        if value.op == "cast":
            return found[0]
        if value.op == "reshape":
            return self.regrouped([name for axis in found[0] for name in axis], value.shape)
        if value.op == "permute":
            return tuple(found[0][dim] for dim in value.attrs["dims"])
        if value.op == "expand":
            return self._expanded(found[0], value.args[0].shape, value.shape)
        if value.op == "sum":
            return tuple(() if dim in value.attrs["dims"] else axis for dim, axis in enumerate(found[0]))
        return self._product(*found) if value.op == "matmul" else self._together(*found)

    def regrouped(self, names: Sequence[str], shape: Shape) -> Axes | None:
        """The names, in order, as the dimensions of a shape; None where one would be cut."""
        left, axes = list(names), []
        for size in shape:
            axis: list[str] = []
            while left and not known_equal(product(self._sizes[name] for name in axis), size):
                axis.append(left.pop(0))
            if not known_equal(product(self._sizes[name] for name in axis), size):
                return None
            axes.append(tuple(axis))
        return None if left else tuple(axes)

    def _expanded(self, axes: Axes, before: Shape, after: Shape) -> Axes:
        added = len(after) - len(before)
        padded, sizes = ((),) * added + axes, (1,) * added + before
        return tuple(
            axis if known_equal(old, new) else (self._broadcast(new),) for axis, old, new in zip(padded, sizes, after, strict=True)
        )

    @property
    def broadcast(self) -> dict[str, Dim]:
        """The names that were given to what dimensions were broadcast to, and their sizes."""
        return {name: size for name, size in self._sizes.items() if name.startswith(_BROADCAST)}

    def _broadcast(self, size: Dim) -> str:
        name = next(name for place in itertools.count() if (name := f"{_BROADCAST}{place}") not in self._sizes)
        self._sizes[name] = size
        return name

    def _together(self, a: Axes, b: Axes) -> Axes | None:
        """The axes of an elementwise op, or None where two dimensions do not go together."""
        length = max(len(a), len(b))
        pairs = zip(((),) * (length - len(a)) + a, ((),) * (length - len(b)) + b, strict=True)
        axes = [self.merged(x, y) for x, y in pairs]
        return None if any(axis is None for axis in axes) else tuple(axis for axis in axes if axis is not None)

    def merged(self, x: Axis, y: Axis) -> Axis | None:
        """The axis that two axes are, of which one may have been broadcast to the other."""
        if not x or not y:
            return x or y
        if len(x) != len(y):
            return None
        names = [self._name(a, b) for a, b in zip(x, y, strict=True)]
        return None if None in names else tuple(name for name in names if name is not None)

    def _name(self, a: str, b: str) -> str | None:
        if a == b:
            return a
        same = known_equal(self._sizes[a], self._sizes[b])
        if a.startswith(_BROADCAST):
            return b if same else None
        return a if b.startswith(_BROADCAST) and same else None

    def _product(self, a: Axes, b: Axes) -> Axes | None:
        if a[-1] != b[-2]:
            return None
        batch = self._together(a[:-2], b[:-2])
        return None if batch is None else (*batch, a[-2], b[-1])


def names_of(axes: Axes) -> tuple[str, ...]:
    """All names in order."""
    return tuple(name for axis in axes for name in axis)
