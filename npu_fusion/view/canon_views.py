"""Smart constructors of leaves, casts, views and matrix products.

Casts move outside views and `cat`, with which they commute exactly: a pattern that strips an optional cast then finds it. Reshapes that
only fold leading dimensions move behind products.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from .shapes import broadcast, known_equal, known_ge, normal_dim, same_shape
from .value import Dim, Shape, Value, ValueTable

_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.int32: (torch.int64, torch.float64),
    torch.bool: (torch.int64, torch.int32, torch.float32, torch.float64),
}


class ViewCanon:
    """Builds the canonical values of what moves elements about, into a table."""

    def __init__(self, table: ValueTable) -> None:
        self.table = table
        self._products: set[Value] = set()

    # ---------------------------------------------------------------- leaves

    def const(self, number: float | int | bool) -> Value:
        return self.table.intern("const", (), {"value": number}, (), None)

    def sym(self, expr: Dim) -> Value:
        """A symbolic or plain integer size."""
        if isinstance(expr, (int, sympy.Integer)):
            return self.const(int(expr))
        return self.table.intern("sym", (), {"expr": expr}, (), None)

    # ---------------------------------------------------------------- casts

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        if x.dtype is None or x.dtype == dtype:
            return x
        if x.op == "cast":
            inner = x.args[0]
            if inner.dtype is not None and x.dtype in _WIDER.get(inner.dtype, ()):
                return self.cast(inner, dtype)
        return self.table.intern("cast", (x,), {"dtype": dtype}, x.shape, dtype)

    # ---------------------------------------------------------------- views

    def reshape(self, x: Value, shape: Shape) -> Value:
        while x.op == "reshape" or (x.op == "permute" and _moves_only_ones(x)):
            x = x.args[0]
        x = self._permuted_without_ones(x)
        if same_shape(x.shape, shape):
            return x
        if x.op == "cast":
            return self.cast(self.reshape(x.args[0], shape), x.attrs["dtype"])
        if x.op == "permute" and len(shape) > 3 and x.ndim > 3 and _swaps_last(x) and same_shape(x.shape[-2:], shape[-2:]):
            unswapped = self.reshape(x.args[0], (*shape[:-2], shape[-1], shape[-2]))
            return self.permute(unswapped, (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2))
        simpler = self._slice_of_split(x, shape) or self._interleaved(x, shape)
        if simpler is not None:
            return simpler
        return self.table.intern("reshape", (x,), {"shape": shape}, shape, x.dtype)

    def _permuted_without_ones(self, x: Value) -> Value:
        """A permutation of a value to which unit dimensions were added (einsum does that), before a reshape: of the value as it was."""
        if x.op != "permute" or x.args[0].op != "reshape":
            return x
        added, inner = x.args[0], x.args[0].args[0]
        places = [d for d, size in enumerate(added.shape) if size != 1]
        if any(size == 1 for size in inner.shape) or not same_shape(tuple(added.shape[d] for d in places), inner.shape):
            return x
        return self.permute(inner, [places.index(d) for d in x.attrs["dims"] if d in places])

    def _slice_of_split(self, x: Value, shape: Shape) -> Value | None:
        """Splitting a dimension into (A, B), taking one index of A or B and dropping it, is a slice of the whole dimension."""
        if x.op != "slice" or x.args[0].op != "reshape":
            return None
        dim, start, split = x.attrs["dim"], x.attrs["start"], x.args[0]
        if not known_equal(x.shape[dim], 1) or not same_shape(shape, x.shape[:dim] + x.shape[dim + 1 :]):
            return None
        if dim == split.ndim - 1 or (dim == split.ndim - 2 and known_equal(split.shape[dim], 2)):  # pairs, or halves, of the last dimension
            whole = self.reshape(split.args[0], (*split.shape[:-2], _plain(split.shape[-2] * split.shape[-1])))
        else:
            whole = split.args[0]
        if whole.ndim != split.ndim - 1:
            return None
        if dim > 0 and _merges(split.shape, whole.shape, dim - 1):  # took an index of B
            step = split.shape[dim]
            return self.slice(whole, dim - 1, start, whole.shape[dim - 1], step, length=split.shape[dim - 1])
        if dim + 1 < split.ndim and _merges(split.shape, whole.shape, dim):  # took an index of A
            inner = split.shape[dim + 1]
            return self.slice(whole, dim, start * inner, (start + 1) * inner, 1)
        return None

    def _interleaved(self, x: Value, shape: Shape) -> Value | None:
        """stack((a, b), -1).flatten(-2) has a at even and b at odd positions."""
        if x.op != "cat" or len(x.args) != 2 or x.attrs["dim"] != x.ndim - 1 or len(shape) != x.ndim - 1:
            return None
        if not known_equal(x.shape[-1], 2) or not same_shape(shape[:-1], x.shape[:-2]):
            return None
        parts = [self.reshape(part, part.shape[:-1]) for part in x.args]
        if not all(known_equal(part.shape[-1] * 2, shape[-1]) for part in parts):
            return None
        return self.table.intern("interleave", parts, {}, shape, x.dtype)

    def expand(self, x: Value, shape: Shape) -> Value:
        if x.op == "expand":
            x = x.args[0]
        if same_shape(x.shape, shape):
            return x
        if x.op == "cast":
            return self.cast(self.expand(x.args[0], shape), x.attrs["dtype"])
        return self.table.intern("expand", (x,), {"shape": shape}, shape, x.dtype)

    def permute(self, x: Value, dims: Sequence[int]) -> Value:
        dims = tuple(normal_dim(d, x.ndim) for d in dims)
        if x.op == "permute":
            dims = tuple(x.attrs["dims"][d] for d in dims)
            x = x.args[0]
        if dims == tuple(range(x.ndim)):
            return x
        if x.op == "cast":
            return self.cast(self.permute(x.args[0], dims), x.attrs["dtype"])
        if x.ndim == 3 and dims == (0, 2, 1) and x.op == "reshape" and _folds_batch(x, x.args[0]):
            lead = x.args[0].ndim - 2
            return self.reshape(self.permute(x.args[0], (*range(lead), lead + 1, lead)), tuple(x.shape[d] for d in dims))
        return self.table.intern("permute", (x,), {"dims": dims}, tuple(x.shape[d] for d in dims), x.dtype)

    def slice(self, x: Value, dim: int, start: Dim | None, stop: Dim | None, step: Dim = 1, length: Dim | None = None) -> Value:
        """x[start:stop:step] along dim; a negative bound counts from the end, a bound past the end is the end.

        `length` is the resulting size, where it is known from elsewhere.
        """
        dim = normal_dim(dim, x.ndim)
        size = x.shape[dim]
        start = 0 if start is None else _bound(start, size)
        stop = size if stop is None else _bound(stop, size)
        if known_equal(start, 0) and known_equal(stop, size) and step == 1:
            return x
        if x.op == "cast":
            return self.cast(self.slice(x.args[0], dim, start, stop, step, length), x.attrs["dtype"])
        if x.op == "slice" and x.attrs["dim"] == dim and x.attrs["step"] == 1 and step == 1:
            offset = x.attrs["start"]
            return self.slice(x.args[0], dim, offset + start, offset + stop, 1)
        if x.op == "reshape" and dim == x.ndim - 2 and x.args[0].ndim == x.ndim - 1 and step == 1:
            whole, size = x.args[0], x.shape[-1]
            if _merges(x.shape, whole.shape, dim):  # some of the heads: cut before they are told apart
                return self.reshape(self.slice(whole, dim, start * size, stop * size), (*x.shape[:-2], _plain(stop - start), size))
        if x.op == "cat" and x.attrs["dim"] == dim and step == 1:
            inner = self._slice_of_cat(x, dim, start, stop)
            if inner is not None:
                return inner
        if length is None:
            length = stop - start if step == 1 else -(-(stop - start) // step)
        shape = x.shape[:dim] + (_plain(length),) + x.shape[dim + 1 :]
        attrs = {"dim": dim, "start": _plain(start), "stop": _plain(stop), "step": _plain(step)}
        return self.table.intern("slice", (x,), attrs, shape, x.dtype)

    def _slice_of_cat(self, x: Value, dim: int, start: Dim, stop: Dim) -> Value | None:
        offset: Dim = 0
        for part in x.args:
            end = offset + part.shape[dim]
            if known_ge(start, offset) and known_ge(end, stop):
                return self.slice(part, dim, _plain(start - offset), _plain(stop - offset))
            offset = end
        return None

    def cat(self, parts: Sequence[Value], dim: int) -> Value:
        dim = normal_dim(dim, parts[0].ndim)
        flat = [p for part in parts for p in (part.args if part.op == "cat" and part.attrs["dim"] == dim else (part,))]
        flat = [part for part in flat if not known_equal(part.shape[dim], 0)] or flat[:1]
        flat = self._rejoined(flat, dim)
        if len(flat) == 1:
            return flat[0]
        regrouped = self._regrouped(flat, dim)
        if regrouped is not None:
            return regrouped
        if all(part.op == "cast" and part.args[0].dtype == flat[0].args[0].dtype for part in flat):
            return self.cast(self.cat([part.args[0] for part in flat], dim), flat[0].attrs["dtype"])
        size: Dim = sum((part.shape[dim] for part in flat), start=0)
        shape = flat[0].shape[:dim] + (_plain(size),) + flat[0].shape[dim + 1 :]
        if dim < flat[0].ndim - 1 and known_equal(flat[0].shape[dim], 1) and all(part is flat[0] for part in flat):
            return self.expand(flat[0], shape)
        return self.table.intern("cat", flat, {"dim": dim}, shape, flat[0].dtype)

    def _rejoined(self, parts: Sequence[Value], dim: int) -> list[Value]:
        """The parts as one, where each is a slice of the same value that goes on where the one before it ended.

        Not some of them: slices that are repeated, which is how heads are, begin where others end as well.
        """
        joined = [parts[0]]
        for part in parts[1:]:
            before = joined[-1]
            if _adjoin(before, part) and before.attrs["dim"] == dim:
                joined[-1] = self.slice(before.args[0], dim, before.attrs["start"], part.attrs["stop"])
            else:
                return list(parts)
        return joined

    def _regrouped(self, parts: Sequence[Value], dim: int) -> Value | None:
        """Chunks of a value, taken along one dimension and joined along another, where nothing but units lies between: no element moves.

        So DTensor gathers and scatters along the tokens of one sequence [1, S, H].
        """
        first, whole = parts[0], parts[0].args[0] if parts[0].op == "slice" else None
        if whole is None or not all(map(_adjoin, parts, parts[1:])) or not all(same_shape(part.shape, first.shape) for part in parts):
            return None
        cut = first.attrs["dim"]
        complete = known_equal(first.attrs["start"], 0) and known_equal(parts[-1].attrs["stop"], whole.shape[cut])
        # The outer of the two dimensions, and all between it and the inner one, are 1 in a chunk.
        inner, outer = max(cut, dim), min(cut, dim)
        units = first.shape[outer:inner]
        if not complete or cut == dim or not all(known_equal(size, 1) for size in units):
            return None
        shape = (*first.shape[:dim], _plain(first.shape[dim] * len(parts)), *first.shape[dim + 1 :])
        return self.reshape(whole, shape)

    def stack(self, parts: Sequence[Value], dim: int) -> Value:
        """The parts along a new dimension `dim`."""
        dim = normal_dim(dim, parts[0].ndim + 1)
        return self.cat([self.reshape(part, (*part.shape[:dim], 1, *part.shape[dim:])) for part in parts], dim)

    # ---------------------------------------------------------------- products

    def matmul(self, a: Value, b: Value) -> Value:
        """[..., M, K] @ [..., K, N]. Reshapes that only fold leading dimensions move behind the product."""
        if a.ndim == 2 and a.op == "reshape" and b.ndim == 2:
            inner = a.args[0]
            if inner.ndim > 1 and known_equal(inner.shape[-1], a.shape[-1]):
                return self.reshape(self.matmul(inner, b), (a.shape[0], b.shape[1]))
        lead = min((found for found in (folded_lead(a), folded_lead(b)) if found is not None), key=len, default=None)
        if lead is not None and a.ndim == 3 and b.ndim == 3:
            left, right = (self.reshape(x, (*lead, *x.shape[1:])) for x in (a, b))
            return self.reshape(self.matmul(left, right), (a.shape[0], a.shape[1], b.shape[2]))
        batch = broadcast(a.shape[:-2], b.shape[:-2])
        product = self.table.intern("matmul", (a, b), {}, (*batch, a.shape[-2], b.shape[-1]), a.dtype)
        if product.ndim > 3:
            self._products.add(product)
        return product


def only_leading_ones(view: Value) -> bool:
    inner = view.args[0].shape
    extra = view.ndim - len(inner)
    return extra > 0 and all(d == 1 for d in view.shape[:extra]) and same_shape(view.shape[extra:], inner)


def _adjoin(before: Value, after: Value) -> bool:
    """Whether both are slices of one value, of which the second begins where the first ends."""
    if before.op != "slice" or after.op != "slice" or before.args[0] is not after.args[0] or before.attrs["dim"] != after.attrs["dim"]:
        return False
    plain = before.attrs["step"] == 1 and after.attrs["step"] == 1
    return plain and known_equal(before.attrs["stop"], after.attrs["start"])


def _moves_only_ones(permuted: Value) -> bool:
    """Whether the dimensions that are not 1 keep their order, so that the permutation is a reshape."""
    order = [d for d in permuted.attrs["dims"] if permuted.args[0].shape[d] != 1]
    return order == sorted(order)


def _swaps_last(permuted: Value) -> bool:
    return bool(permuted.attrs["dims"] == (*range(permuted.ndim - 2), permuted.ndim - 1, permuted.ndim - 2))


def _merges(split: Shape, whole: Shape, dim: int) -> bool:
    """Whether folding dimensions dim and dim+1 of `split` gives `whole`."""
    return same_shape(split[:dim] + (_plain(split[dim] * split[dim + 1]),) + split[dim + 2 :], whole)


def _folds_batch(folded: Value, inner: Value) -> bool:
    return inner.ndim > 3 and same_shape(inner.shape[-2:], folded.shape[-2:])


def folded_lead(x: Value) -> Shape | None:
    """The leading dimensions [A, B, ...] that a value [A * B * ..., M, K] was folded from, if it was."""
    while x.op == "cast":
        x = x.args[0]
    if x.ndim == 3 and x.op == "reshape" and _folds_batch(x, x.args[0]):
        return x.args[0].shape[:-2]
    return None


def _bound(bound: Dim, size: Dim) -> Dim:
    if isinstance(bound, int):
        if bound < 0:
            bound = bound + size if not isinstance(size, int) else max(bound + size, 0)
        elif isinstance(size, int):
            bound = min(bound, size)
        elif bound >= 2**62:
            bound = size
    elif known_ge(bound, size):
        bound = size
    return _plain(bound)


def _plain(dim: Dim) -> Dim:
    return int(dim) if isinstance(dim, sympy.Integer) else dim
