"""Where heads and tokens lie in a tensor: names of its dimensions, followed through reshapes, permutations and cuts of the channels.

A dimension of size 1 has no name: a step of one token, or a shard of one head, moves nothing where others transpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from npu_fusion.view import Value
from npu_fusion.view.canon import Canon
from npu_fusion.view.shapes import known_equal, known_ge
from npu_fusion.view.value import Dim, Shape

HEADS, CHANNELS = "h", "c"
_MOST_VIEWS = 60


@dataclass(frozen=True)
class Axes:
    """The named dimensions of a tensor in order: what is one dimension of it may be several names.

    Attributes:
        order: the names; tokens are `t0`, `t1`, ...
        sizes: of all names.
        start, stop: of the channels that are left.
    """

    order: tuple[str, ...]
    sizes: Mapping[str, Dim]
    start: Dim
    stop: Dim

    @staticmethod
    def of(lead: Shape, heads: Dim, channels: Dim, order: str = "") -> Axes:
        """Of a tensor [*lead, heads, channels]; with `order` "heads first" of [heads, *lead, channels], with "heads second" of
        [lead[0], heads, *lead[1:], channels]."""
        tokens = [f"t{i}" for i in range(len(lead))]
        place = {"": len(tokens), "heads first": 0, "heads second": 1}[order]
        sizes = {**dict(zip(tokens, lead, strict=True)), HEADS: heads, CHANNELS: channels}
        names = [*tokens[:place], HEADS, *tokens[place:], CHANNELS]
        return Axes(tuple(name for name in names if not known_equal(sizes[name], 1)), sizes, 0, channels)

    def grouped(self, shape: Shape) -> list[tuple[str, ...]] | None:
        """The names that each dimension of a tensor of the shape consists of; None where one would be cut."""
        groups: list[tuple[str, ...]] = []
        left = list(self.order)
        for size in shape:
            group: list[str] = []
            whole: Dim = 1
            while not known_equal(whole, size):
                if not left or (group and known_ge(whole, size)):
                    return None
                group.append(left.pop(0))
                whole = whole * self.sizes[group[-1]]
            groups.append(tuple(group))
        return groups if not left else None

    def through(self, view: Value) -> Axes | None:
        """The axes of a view of a tensor with these; None where they cannot be told apart in it."""
        shape = view.args[0].shape
        if view.op == "reshape":
            return self if self.grouped(view.shape) is not None else None
        groups = self.grouped(shape)
        if groups is None:
            return None
        if view.op == "permute":
            return replace(self, order=tuple(name for dim in view.attrs["dims"] for name in groups[dim]))
        if view.op != "slice" or groups[view.attrs["dim"]] != (CHANNELS,) or view.attrs["step"] != 1:
            return None
        start, stop = view.attrs["start"], view.attrs["stop"]
        return replace(self, sizes={**self.sizes, CHANNELS: stop - start}, start=self.start + start, stop=self.start + stop)

    def cut(self, start: Dim, stop: Dim) -> Axes:
        """The same axes of some channels."""
        return replace(self, sizes={**self.sizes, CHANNELS: stop - start}, start=start, stop=stop)


def views_of(base: Value, axes: Axes) -> Iterator[tuple[Value, Axes]]:
    """The value, and its views up to the computations that read them, each with its axes."""
    pending, count = [(base, axes)], 0
    while pending and count < _MOST_VIEWS:
        value, known = pending.pop(0)
        count += 1
        yield value, known
        for user in dict.fromkeys(value.users):
            if user.op in ("reshape", "permute", "slice") and (found := known.through(user)) is not None:
                pending.append((user, found))


def axes_in(value: Value, base: Value, axes: Axes) -> Axes | None:
    """The axes of a value that is a view of `base`, which has the axes given; None for any other. Both may be casts to one type."""
    if value.op == "cast" and base.op == "cast":
        return axes_in(value.args[0], base.args[0], axes) if value.dtype == base.dtype else None
    if value is base:
        return axes
    if value.op not in ("reshape", "permute", "slice"):
        return None
    inner = axes_in(value.args[0], base, axes)
    return None if inner is None else inner.through(value)


def source_of_heads(canon: Canon, value: Value, heads: Dim) -> tuple[Value, Shape] | None:
    """What a value is channels of heads of, all heads side by side, found behind views of which one cuts the channels; and the leading
    dimensions with which the heads were told apart."""
    if value.op == "cast" and value.dtype is not None:
        found = source_of_heads(canon, value.args[0], heads)
        return None if found is None else (canon.cast(found[0], value.dtype), found[1])
    cut, lead = False, None
    while value.op in ("reshape", "permute", "slice"):
        if value.op == "slice":
            if cut or value.attrs["dim"] != value.ndim - 1:
                break
            cut = True
        elif value.op == "reshape" and value.ndim > 2 and known_equal(value.shape[-2], heads):
            lead = value.shape[:-2]
        value = value.args[0]
    divides = isinstance(heads, int) and known_equal(value.shape[-1] % heads, 0)
    return (value, lead) if cut and divides and lead is not None else None
