"""Tiles of matrices whose rows may lie apart: [ROWS, BLOCK] elements, read as fp32, with zeros where there is no element.

A row's place is a 64-bit scalar, what is added to it a 32-bit vector: 64-bit vectors become loops on an NPU. A mask is made only along
an axis that may end inside the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turns_end(tiles, TURNS: tl.constexpr):
    """Where a program's walk over tiles ends, from its own number on in steps of `turns_step`: behind its only tile without TURNS.

    Where each tile has a program of its own a GPU gains by knowing it: 0.2 to 0.8 us of a norm on an H100.
    """
    if TURNS:
        end = tiles
    else:
        end = tl.program_id(0) + 1
    return end


@triton.jit
def turns_step(TURNS: tl.constexpr):
    if TURNS:
        step = tl.num_programs(0)
    else:
        step = 1
    return step


@triton.jit
def tile_offsets(stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Places of the elements of a tile after its first."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_tile(ptr, stride, row, rows, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The elements from (`row`, `column`) of a matrix [`rows`, WIDTH], as they are stored."""
    at = ptr + row.to(tl.int64) * stride + column + tile_offsets(stride, ROWS, BLOCK)
    in_width = (column + tl.arange(0, BLOCK) < WIDTH)[None, :]
    in_rows = (row + tl.arange(0, ROWS) < rows)[:, None]
    if ROWS == 1:
        if WIDTH % BLOCK == 0:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=in_width, other=0.0)
    else:
        if WIDTH % BLOCK == 0:
            tile = tl.load(at, mask=in_rows, other=0.0)
        else:
            tile = tl.load(at, mask=in_rows & in_width, other=0.0)
    return tile


@triton.jit
def store_tile(ptr, tile, stride, row, rows, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile at (`row`, `column`), rounded to the matrix's dtype."""
    at = ptr + row.to(tl.int64) * stride + column + tile_offsets(stride, ROWS, BLOCK)
    in_width = (column + tl.arange(0, BLOCK) < WIDTH)[None, :]
    in_rows = (row + tl.arange(0, ROWS) < rows)[:, None]
    tile = tile.to(ptr.dtype.element_ty)
    if ROWS == 1:
        if WIDTH % BLOCK == 0:
            tl.store(at, tile)
        else:
            tl.store(at, tile, mask=in_width)
    else:
        if WIDTH % BLOCK == 0:
            tl.store(at, tile, mask=in_rows)
        else:
            tl.store(at, tile, mask=in_rows & in_width)


@triton.jit
def load_vector(ptr, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[1, BLOCK] elements of a vector from `column`, as fp32."""
    at = column + tl.arange(0, BLOCK)
    if WIDTH % BLOCK == 0:
        vector = tl.load(ptr + at)
    else:
        vector = tl.load(ptr + at, mask=at < WIDTH, other=0.0)
    return vector.to(tl.float32)[None, :]
