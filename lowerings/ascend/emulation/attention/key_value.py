"""Keys and values of inference attention as they lie in a cache: pages of a block table, and integers with their scales.

Integers stand for `(x + offset) * scale`, computed in fp32 and rounded to the dtype of the query before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import check, check_dtype

_PACKED_INT4 = 8  # int4 values in an int32
_ROW_LIMIT = 65535  # elements of a token in a cache [blocks, block_size, H]


class Paging(NamedTuple):
    """The block table of a paged cache, [B, blocks of a sequence] int32, and the tokens of a block."""

    table: Tensor
    block_size: int

    @property
    def capacity(self) -> int:
        """The tokens that a row of the table holds."""
        return self.table.shape[1] * self.block_size


def check_paging(op: str, paging: Paging, batch: int, multiple: int, most: int) -> None:
    """Raise unless the block size is a multiple of `multiple`, at most `most`, and the table has a row for each sequence."""
    table, size = paging
    check(op, 0 < size <= most, f"block_size must be within 1 and {most}, not {size}")
    check(op, size % multiple == 0, f"block_size must be a multiple of {multiple}, not {size}")
    check_dtype(op, "block_table", table, torch.int32)
    check(op, table.dim() == 2, f"block_table must have 2 dimensions, not {table.dim()}")
    check(op, table.shape[0] == batch, f"block_table must have {batch} rows (the batch), not {table.shape[0]}")


def _pages(op: str, name: str, cache: Tensor, heads: int, block_size: int) -> Tensor:
    """View a cache as [blocks, N, block_size, D]."""
    check(op, cache.dim() in (3, 4, 5), f"{name} must have 3, 4 or 5 dimensions with block_table, not {cache.dim()}")
    if cache.dim() == 3:
        width = cache.shape[-1]
        check(op, width % heads == 0, f"the last dimension of {name}, {width}, is not a multiple of its {heads} heads")
        wide = f"a token of {name} must have at most {_ROW_LIMIT} elements, not {width}; lay the cache out as [blocks, N, block_size, D]"
        check(op, width <= _ROW_LIMIT, wide)
        cache = cache.unflatten(-1, (heads, width // heads)).transpose(1, 2)
    elif cache.dim() == 5:
        fraction = 32 // cache.element_size()
        check(op, cache.shape[-1] == fraction, f"the last dimension of {name}, in the NZ format, must be {fraction}, not {cache.shape[-1]}")
        cache = cache.transpose(2, 3).flatten(3)
    check(op, cache.shape[1] == heads, f"{name} has {cache.shape[1]} heads, but the arguments say {heads}")
    check(op, cache.shape[2] == block_size, f"the blocks of {name} hold {cache.shape[2]} tokens, but block_size is {block_size}")
    return cache


def gather_pages(op: str, name: str, cache: Tensor, heads: int, paging: Paging, lengths: Sequence[int]) -> Tensor:
    """The sequences of a paged cache as [B, N, tokens, D]; past its length a sequence holds any tokens.

    The cache is [blocks, block_size, N * D], [blocks, N, block_size, D], or in the NZ format [blocks, N, D / c, block_size, c] where c
    elements have 32 bytes.
    """
    pages = _pages(op, name, cache, heads, paging.block_size)
    return _gather(op, name, pages, paging, lengths).transpose(1, 2).flatten(2, 3)


def _gather(op: str, name: str, pages: Tensor, paging: Paging, lengths: Sequence[int]) -> Tensor:
    """[blocks, ...] to [B, blocks of the longest sequence, ...]."""
    size = paging.block_size
    counts = torch.tensor([-(-length // size) for length in lengths]).unsqueeze(1)
    table = paging.table[:, : int(counts.max())].long()
    used = torch.arange(table.shape[1]) < counts
    fits = (table >= 0) & (table < pages.shape[0])
    check(op, bool((fits | ~used).all()), f"block_table names a block that {name} does not have: it has {pages.shape[0]}")
    return pages[table.masked_fill(~used, 0)]


class Scales(NamedTuple):
    """How the integers of an operand are scaled.

    Attributes:
        scale, offset: tensors of a shape that the mode names.
        mode: 0 a channel (or all), 1 a token, 2 a head, 3 a token and head, 4 and 5 as 1 and 3 with the pages of the cache.
        name: the argument that holds the scale.
    """

    scale: Tensor
    offset: Tensor | None
    mode: int
    name: str


def unpack_int4(tensor: Tensor) -> Tensor:
    """Eight int4 values of each int32, the lowest bits first, in the last dimension."""
    nibbles = (tensor.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return ((nibbles ^ 8) - 8).to(torch.int8).flatten(-2)


def dequantise(op: str, x: Tensor, scales: Scales, dtype: torch.dtype, paging: Paging | None, lengths: Sequence[int]) -> Tensor:
    """Floats of integers [B, N, tokens, D], rounded to `dtype`."""
    by_token = scales.mode in (1, 3, 4, 5)
    check_dtype(op, scales.name, scales.scale, torch.float32 if by_token else dtype)
    values = x.float()
    if scales.offset is not None:
        check(op, scales.offset.shape == scales.scale.shape, f"the offset of {scales.name} must have its shape")
        check_dtype(op, f"the offset of {scales.name}", scales.offset, scales.scale.dtype)
        values = values + _broadcast(op, scales.offset, scales, x, paging, lengths)
    return (values * _broadcast(op, scales.scale, scales, x, paging, lengths)).to(dtype)


def _broadcast(op: str, factor: Tensor, scales: Scales, x: Tensor, paging: Paging | None, lengths: Sequence[int]) -> Tensor:
    """View a scale so that it broadcasts to [B, N, tokens, D], in fp32."""
    batch, heads, tokens, width = x.shape
    factor, shape = factor.float(), list(factor.shape)
    wrong = f"{scales.name} of shape {shape} does not fit mode {scales.mode} with B={batch}, N={heads}, S={tokens}, D={width}"
    if scales.mode in (4, 5):
        check(op, paging is not None, f"{scales.name} with mode {scales.mode} needs block_table")
        assert paging is not None
        check(op, factor.shape[1:] == ((paging.block_size,) if scales.mode == 4 else (heads, paging.block_size)), wrong)
        pages = _gather(op, scales.name, factor if scales.mode == 5 else factor.unsqueeze(1), paging, lengths)
        return pages.transpose(1, 2).flatten(2).unsqueeze(-1)
    if scales.mode == 0 and factor.numel() == 1:
        return factor.reshape(())
    if scales.mode == 0:
        plain = shape[1:] if len(shape) > 1 and shape[0] == 1 and heads * width == factor.numel() else shape
        check(op, plain in ([heads, 1, width], [heads, width], [heads * width]), wrong)
        return factor.reshape(1, heads, 1, width)
    if scales.mode == 2:
        check(op, shape == [heads], wrong)
        return factor.reshape(1, heads, 1, 1)
    kept = [batch, factor.shape[-1]] if scales.mode == 1 else [batch, heads, factor.shape[-1]]
    check(op, shape in (kept, [1, *kept]) and factor.shape[-1] >= tokens, wrong)
    return factor.reshape(batch, 1 if scales.mode == 1 else heads, -1, 1)[:, :, :tokens]


def quantise(op: str, x: Tensor, scale: Tensor, offset: Tensor | None, name: str, dtype: torch.dtype) -> Tensor:
    """int8 of `x * scale + offset`, x being [B, N, S, D] in fp32: one scale for all, or N * D of them; to nearest, saturating.

    `name` is the argument that holds the scale, `dtype` that of the query.
    """
    check_dtype(op, name, scale, *((torch.float32, torch.bfloat16) if dtype == torch.bfloat16 else (torch.float32,)))
    heads, width = x.shape[1], x.shape[3]
    check(op, scale.numel() in (1, heads * width), f"{name} must have 1 or {heads * width} elements, not {scale.numel()}")
    shape = (1, heads, 1, width) if scale.numel() > 1 else ()
    scaled = x * scale.float().reshape(shape)
    if offset is not None:
        same = offset.shape == scale.shape and offset.dtype == scale.dtype
        check(op, same, f"the offset beside {name} must have its shape and dtype")
        scaled = scaled + offset.float().reshape(shape)
    return scaled.round().clamp(-128, 127).to(torch.int8)
