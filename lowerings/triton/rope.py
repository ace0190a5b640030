"""Rotary embeddings by Triton: the ops rotary and rotary_, and the provider of rotary. With norms: rope_norm.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels import rope as kernels
from ...lower import Arguments, Builder
from ...ops._common import Size, check_broadcastable, check_choice, check_index, check_rank, check_sizes, check_value, known_different
from ...ops.rope import LAYOUTS
from ..rope_tables import Heads, Rotation, as_heads, halved, tables_of
from .checks import FLOATS, LIMIT_32, check_cores, check_dtypes, check_together
from .define import device_for, launch, triton_op
from .provide import provides

# -------------------------------------------------------------------- what the ops share


@dataclass(frozen=True)
class Angles:
    """The arguments of a rotation, which all ops of the family share.

    Attributes:
        cos, sin: tables that broadcast to [B, S, 1, W]; with `positions` [P, W], whose rows they name.
        positions: int32 or int64, broadcasting to [B, S], or None.
        layout: `half`, `interleaved` or `mla`.
        rotary_dim: how many leading elements of a head are rotated; -1 is all.
        sign: -1 rotates the other way.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    layout: str
    rotary_dim: int
    sign: int

    def width(self, head_dim: Size) -> Size:
        return head_dim if self.rotary_dim == -1 else self.rotary_dim

    def full(self, head_dim: int) -> bool:
        """Whether the tables have an entry for each member of a pair."""
        return bool(self.cos.shape[-1] == self.width(head_dim))

    def constants(self, head_dim: int) -> dict[str, Any]:
        """What a plan has to know of it."""
        return {"layout": self.layout, "sign": self.sign, "full": self.full(head_dim)}

    def check(self, op: str, leading: Sequence[Size], head_dim: Size) -> None:
        """Raise TypeError or ValueError if it is known not to fit tensors [*leading, N, head_dim]."""
        check_choice(op, "layout", self.layout, LAYOUTS)
        check_choice(op, "sign", self.sign, (1, -1))
        check_dtypes(op, FLOATS, cos=self.cos, sin=self.sin)
        width = self.width(head_dim)
        check_value(op, self.rotary_dim == -1 or self.rotary_dim > 0, f"rotary_dim must be positive or -1, not {self.rotary_dim}")
        check_value(op, not statically_known_true(width > head_dim), f"rotary_dim {width} exceeds the size of a head, {head_dim}")
        check_value(op, not known_different(width % 2, 0), f"an odd number of elements, {width}, cannot be rotated")
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            self._check_table(op, name, table, leading, width)
        check_sizes(op, "sin's last dimension", self.sin.shape[-1:], self.cos.shape[-1:])
        if self.positions is not None:
            check_index(op, positions=self.positions)
            check_broadcastable(op, "positions", self.positions.shape, leading)

    def _check_table(self, op: str, name: str, table: Tensor, leading: Sequence[Size], width: Size) -> None:
        if self.positions is not None:
            check_rank(op, 2, **{name: table})
        check_value(op, table.dim() >= 1, f"{name} must have at least 1 dimension")
        entries = table.shape[-1]
        fits = not (known_different(entries, width) and known_different(2 * entries, width))
        check_value(op, fits, f"{name} must end in {width} or half of it, not {entries}")
        if self.positions is None:
            check_broadcastable(op, name, table.shape[:-1], [*leading, 1])

    def arguments(self, batch: int, tokens: int) -> dict[str, Any]:
        """The kernel's arguments for [batch, tokens]; a table is copied only if its rows do not lie in one piece."""
        cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (self.cos, self.sin))
        pointers = {"cos_ptr": cos, "sin_ptr": sin, "positions_ptr": self.positions}
        if self.positions is None:
            steps = [table.expand(batch, tokens, 1, table.shape[-1]).stride()[:2] for table in (cos, sin)] + [(0, 0)]
        else:
            steps = [(0, cos.stride(0)), (0, sin.stride(0)), self.positions.expand(batch, tokens).stride()]
        names = ("cos", "sin", "positions")
        return pointers | {f"{name}_{dim}": step for name, pair in zip(names, steps) for dim, step in zip(("batch", "token"), pair)}


def check_heads(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError or ValueError unless all tensors are [B, S, N, D] or all [T, N, D], of known dtypes, and can be addressed."""
    check_dtypes(op, FLOATS, **tensors)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    rank = next(iter(given.values())).dim()
    check_value(op, rank in (3, 4), f"{next(iter(given))} must have 3 or 4 dimensions, not {rank}")
    check_rank(op, rank, **given)
    for name, tensor in given.items():
        reach = (tensor.shape[-2] - 1) * tensor.stride(-2) + tensor.shape[-1]
        check_value(
            op, not statically_known_true(reach > LIMIT_32), f"the heads of a token of {name} lie over {reach} elements, of which 2^31 fit"
        )


def batched(x: Tensor) -> Tensor:
    """[T, N, D] as [1, T, N, D]."""
    return x if x.dim() == 4 else x.unsqueeze(0)


def strided(name: str, x: Tensor | None) -> dict[str, Any]:
    """A kernel's arguments for a tensor [B, S, N, D]: its pointer and strides."""
    strides = (0, 0, 0) if x is None else x.stride()[:3]
    return {f"{name}_ptr": x} | {f"{name}_{dim}": stride for dim, stride in zip(("batch", "token", "head"), strides)}


def readable(x: Tensor) -> Tensor:
    """The tensor, copied if a head does not lie in one piece."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def writable(y: Tensor) -> Tensor:
    """Where a kernel writes what is to be `y`, for which `settle` is called then."""
    return y if y.stride(-1) == 1 or y.shape[-1] == 1 else torch.empty_like(y, memory_format=torch.contiguous_format)


def settle(y: Tensor, written: Tensor) -> Tensor:
    return y if written is y else y.copy_(written)


# -------------------------------------------------------------------- ops


def _check_rotary(op: str, xs: Sequence[Tensor], angles: Angles, cores: int) -> None:
    check_value(op, len(xs) > 0, "xs must have at least one tensor")
    names = {f"xs[{i}]": x for i, x in enumerate(xs)}
    check_heads(op, **names)
    check_together(op, **names, cos=angles.cos, sin=angles.sin, positions=angles.positions)
    check_cores(op, cores)
    for x in xs:
        angles.check(op, x.shape[:-2], x.shape[-1])


def _rotate(xs: Sequence[Tensor], ys: Sequence[Tensor] | None, angles: Angles, cores: int) -> None:
    """Rotate tensors into others, or where they are: two in a launch where they have the same tokens and size of heads."""
    places = [i for i, x in enumerate(xs) if x.numel() > 0]
    alike = [list(group) for _, group in groupby(places, lambda i: (xs[i].shape[:-2], xs[i].shape[-1]))]
    for pair in [group[i : i + 2] for group in alike for i in range(0, len(group), 2)]:
        tensors: dict[str, Any] = {}
        for name, i in zip(("q", "k"), (*pair, None)):
            x = None if i is None else batched(xs[i])
            tensors |= strided(name, x) | strided(f"{name}_out", x if ys is None or i is None else batched(ys[i]))
            if ys is None:
                tensors[f"{name}_out_ptr"] = None
        batch, tokens, q_heads, head_dim = tensors["q_ptr"].shape
        k_heads = 0 if tensors["k_ptr"] is None else tensors["k_ptr"].shape[2]
        width, device = angles.width(head_dim), device_for(xs[0], cores)
        plan = kernels.rotary_launch(batch * tokens, q_heads, k_heads, head_dim, width, device, **angles.constants(head_dim))
        launch(plan, xs[0], rows=batch * tokens, tokens=tokens, **tensors, **angles.arguments(batch, tokens))


@triton_op(
    "(Tensor[] xs, Tensor cos, Tensor sin, *, Tensor? positions=None, str layout='half', int rotary_dim=-1, int sign=1, "
    "ScalarType? out_dtype=None, int cores) -> Tensor[]"
)
def rotary(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> list[Tensor]:
    """`npu_fusion::rotary`: each two tensors of the same tokens and size of heads, such as q and k, in one launch.

    Args:
        xs: tensors [B, S, N, D], or all [T, N, D], fp16, bf16 or fp32, in any memory order: heads may be written before tokens, or lie
            within a merged projection. What has its last dimension not in one piece is copied first.
        cos, sin: tables [B or 1, S or 1, 1, W], or what broadcasts to that, where W is `rotary_dim` or half of it: an entry for each
            element of the result or for each pair. With `positions` [P, W]. Never expanded.
        positions: int32 or int64, broadcasting to [B, S]: the row of the tables for each token. They must be from 0 to P - 1, which is not
            checked: that would wait for the device.
        layout, rotary_dim, sign, out_dtype: as there.
        cores: vector cores of the device.

    Returns:
        One tensor for each of `xs`, of its shape and in its memory order.

    Rounding: fp32 inside, one cast at the end; what is not rotated is only cast.

    Raises:
        TypeError: a dtype is none of those named.
        ValueError: a shape, layout or sign does not fit, tensors lie on several devices, or the heads of a token lie over more than 2^31
            elements.
    """
    angles = Angles(cos, sin, positions, layout, rotary_dim, sign)
    _check_rotary("rotary", xs, angles, cores)
    check_value("rotary", out_dtype is None or out_dtype in FLOATS, f"out_dtype must be one of float16, bfloat16, float32, not {out_dtype}")
    ys = [torch.empty_like(x, dtype=out_dtype) for x in xs]
    written = [writable(y) for y in ys]
    _rotate([readable(x) for x in xs], written, angles, cores)
    return [settle(y, there) for y, there in zip(ys, written)]


@rotary.fake
def _(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    out_dtype: torch.dtype | None = None,
    cores: int,
) -> list[Tensor]:
    _check_rotary("rotary", xs, Angles(cos, sin, positions, layout, rotary_dim, sign), cores)
    check_value("rotary", out_dtype is None or out_dtype in FLOATS, f"out_dtype must be one of float16, bfloat16, float32, not {out_dtype}")
    return [torch.empty_like(x, dtype=out_dtype) for x in xs]


@triton_op(
    "(Tensor(a!)[] xs, Tensor cos, Tensor sin, *, Tensor? positions=None, str layout='half', int rotary_dim=-1, int sign=1, "
    "int cores) -> ()"
)
def rotary_(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    cores: int,
) -> None:
    """`rotary` written over its tensors; what is not rotated is not touched.

    Args:
        as `rotary`; the last dimension of `xs` must lie in one piece, and no two of them may share memory.

    Raises:
        as `rotary`; ValueError where a tensor's last dimension does not lie in one piece.
    """
    angles = Angles(cos, sin, positions, layout, rotary_dim, sign)
    _check_rotary_("rotary_", xs, angles, cores)
    _rotate(xs, None, angles, cores)


def _check_rotary_(op: str, xs: Sequence[Tensor], angles: Angles, cores: int) -> None:
    _check_rotary(op, xs, angles, cores)
    for i, x in enumerate(xs):
        check_in_one_piece(op, f"xs[{i}]", x)


def check_in_one_piece(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError for a tensor that is written where it is, unless its last dimension lies in one piece."""
    strays = known_different(x.stride(-1), 1) and known_different(x.shape[-1], 1) and not statically_known_true(x.numel() == 0)
    check_value(op, not strays, f"the last dimension of {name}, which is written, must have stride 1, not {x.stride(-1)}")


@rotary_.fake
def _(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    layout: str = "half",
    rotary_dim: int = -1,
    sign: int = 1,
    cores: int,
) -> None:
    _check_rotary_("rotary_", xs, Angles(cos, sin, positions, layout, rotary_dim, sign), cores)


# -------------------------------------------------------------------- providers


@dataclass(frozen=True)
class Rotated:
    """A tensor of heads with the tables that rotate it, [B or 1, S, 1, W]."""

    heads: Heads
    cos: Node
    sin: Node


def rotated(b: Builder, x: Node, r: Rotation) -> Rotated:
    """A tensor and its tables as the kernels take them, all of them views; of a table with equal entries for a pair, half."""
    floats = {b.val(node).dtype for node in (x, r.cos, r.sin)}
    b.require(floats <= {*FLOATS}, f"the kernels take no {', '.join(sorted(map(str, floats - {*FLOATS})))}")
    width = r.width(b, x)
    if r.layout != "interleaved":  # whose half would not lie in one piece
        r = halved(b, r, width)
    heads = as_heads(b, x, r)
    fixed = all(isinstance(size, int) for size in b.val(heads.node).shape[2:])
    b.require(fixed, "the number or the size of heads is known at run time only: a kernel is compiled for them")
    return Rotated(heads, *tables_of(b, replace(r, sign=1), heads, None))


@provides("rotary", "triton.rotary")
def _rotary(b: Builder, a: Arguments, cores: int) -> list[Node]:
    r, out_dtype = Rotation.of(a), a.out_dtype
    xs = [rotated(b, x, r) for x in a.xs]
    b.require(out_dtype is None or out_dtype in FLOATS, f"the kernels give no {out_dtype}")
    results: list[Node] = []
    for tables, group in groupby(xs, lambda x: (x.cos, x.sin)):
        some = [x.heads for x in group]
        options = {"layout": r.layout, "rotary_dim": r.rotary_dim, "sign": r.sign, "out_dtype": out_dtype}
        call = b.emit(rotary.overload, [heads.node for heads in some], *tables, **options, cores=cores)
        results += [heads.restored(b, y) for heads, y in zip(some, b.results(call, len(some)))]
    return results
