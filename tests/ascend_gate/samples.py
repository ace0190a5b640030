"""Small kernels that show the gate at work: `cases()` keep every limit, `broken()` break one each, as their names say."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from npu_fusion.kernels.launch import Device, Launch

from .case import Case

ASCEND = Device("npu", cores=40, cube_cores=20)
LARGEST = 65536


@triton.jit
def add_one_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    """y = x + 1, [rows, BLOCK], in the type of x."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * BLOCK + columns)
        tl.store(y_ptr + row * BLOCK + columns, x + 1)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, rows, BLOCK: tl.constexpr):
    """x = x * factor, or 2 x without a factor: x [rows, BLOCK], factor [BLOCK] or None."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * BLOCK + columns)
        x = x * 2.0 if factor_ptr is None else x * tl.load(factor_ptr + columns)
        tl.store(x_ptr + row * BLOCK + columns, x)


@triton.jit
def square_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    """y = x * x in int64, for which there is no vector instruction: x [rows, BLOCK] int32, y int64."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * BLOCK + columns).to(tl.int64)
        tl.store(y_ptr + row * BLOCK + columns, x * x)


@triton.jit
def histogram_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """y = how often each number is in a row, counted one element after the other: x [rows, BLOCK], y [rows, BINS], both int32."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * BLOCK + tl.arange(0, BLOCK))
        tl.store(y_ptr + row * BINS + tl.arange(0, BINS), tl.histogram(x, BINS))


@triton.jit
def sum_kernel(x_ptr, y_ptr, rows, columns):
    """y = sum of x over a row of run-time length, one element after the other: x [rows, columns], y [rows]."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        total = 0.0
        for column in range(columns):
            total += tl.load(x_ptr + row * columns + column)
        tl.store(y_ptr + row, total)


@triton.jit
def gather_rows_kernel(x_ptr, index_ptr, y_ptr, groups, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y = sum of the rows of x that index names: x [n, BLOCK], index [groups, ROWS], y [groups, BLOCK]."""
    columns = tl.arange(0, BLOCK)
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for place in range(ROWS):
            row = tl.load(index_ptr + group * ROWS + place)
            total += tl.load(x_ptr + row * BLOCK + columns)
        tl.store(y_ptr + group * BLOCK + columns, total)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, tiles, K: tl.constexpr, BLOCK: tl.constexpr):
    """c = a @ b for tiles of BLOCK rows of a: a [tiles * BLOCK, K], b [K, BLOCK], c [tiles * BLOCK, BLOCK]."""
    places = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for k in range(0, K, BLOCK):
            a = tl.load(a_ptr + (tile * BLOCK + places[:, None]) * K + k + places[None, :])
            b = tl.load(b_ptr + (k + places[:, None]) * BLOCK + places[None, :])
            total = tl.dot(a, b, total)
        tl.store(c_ptr + (tile * BLOCK + places[:, None]) * BLOCK + places[None, :], total.to(c_ptr.dtype.element_ty))


@triton.jit
def unequal_kernel(x_ptr, rows, BLOCK: tl.constexpr):
    """No Triton: it adds vectors of unequal length."""
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.arange(0, BLOCK) + tl.arange(0, 2 * BLOCK))


@triton.jit
def double_kernel(x_ptr, rows, BLOCK: tl.constexpr):
    """x = x + x, [BLOCK] in float64, which Ascend has not."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK)).to(tl.float64)
    tl.store(x_ptr + tl.arange(0, BLOCK), x + x)


class Deadly:
    """Takes the process that compiles it with it."""

    __name__ = "deadly_kernel"
    arg_names = ()

    @property
    def params(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def _add_one(name: str, dtype: str, block: int, grid: int = ASCEND.cores, note: str = "", **options: Any) -> Case:
    launch = Launch(add_one_kernel, grid, {"BLOCK": block}, options)
    return Case(name, launch, {"x_ptr": dtype, "y_ptr": dtype, "rows": "i32"}, note=note)


def _square(name: str, block: int, loops: tuple[int, ...] = (), note: str = "") -> Case:
    launch = Launch(square_kernel, ASCEND.cores, {"BLOCK": block})
    return Case(name, launch, {"x_ptr": "*i32", "y_ptr": "*i64", "rows": "i32"}, loops, note)


def _sum(name: str, loops: tuple[int, ...] = (), note: str = "") -> Case:
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32", "rows": "i32", "columns": "i32"}
    return Case(name, Launch(sum_kernel, ASCEND.cores, {}), types, loops, note)


def cases() -> Iterator[Case]:
    """Cases that keep every limit."""
    yield _add_one("vectors", "*fp32", 4096)
    yield _add_one("single-buffered with a note", "*fp32", 4096, note="to show that it can be", multibuffer=False)
    yield _square("scalar loop that is declared", 128, (128,), "int64 has no vector multiplication")
    yield _sum("scalar loop of unknown length", (0,), "to show that it can be")
    yield Case(
        "tensor that is left out",
        Launch(scale_kernel, ASCEND.cores, {"BLOCK": 1024}),
        {"x_ptr": "*fp32", "factor_ptr": None, "rows": "i32"},
    )
    rows = Launch(gather_rows_kernel, ASCEND.cores, {"ROWS": 8, "BLOCK": 1024})
    types = {"x_ptr": "*fp32", "index_ptr": "*i32", "y_ptr": "*fp32", "groups": "i32"}
    yield Case("rows by index", rows, types)
    yield Case("rows by index, declared", rows, types, (8,), "an index for each row")
    product = Launch(matmul_kernel, ASCEND.cube_cores, {"K": 512, "BLOCK": 64})
    yield Case("matrix product", product, {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16", "tiles": "i32"})


def broken() -> Iterator[Case]:
    """Cases that break a limit each."""
    one = {"x_ptr": "*fp32", "rows": "i32"}
    yield _add_one("unified buffer overflows", "*fp32", LARGEST)
    yield _add_one("unified buffer over the limit", "*fp32", 16384, note="that its double buffering is poor is not the point")
    yield _add_one("double buffering off", "*fp32", 4096, multibuffer=False)
    yield _add_one("double buffering given up", "*fp32", 32768)
    yield _add_one("double buffering shared", "*fp32", 16384)
    yield _add_one("grid too large", "*fp32", 1024, grid=65536)
    yield _add_one("unknown option", "*fp32", 1024, num_wraps=4)
    yield _square("scalar loop", 256)
    yield _square("scalar loop of another length", 256, (128,), "wrong")
    yield _square("scalar loop without a note", 256, (256,))
    yield _sum("scalar loop of unknown length")
    counts = Launch(histogram_kernel, ASCEND.cores, {"BLOCK": 256, "BINS": 128})
    yield Case("scalar loop beside vectors", counts, {"x_ptr": "*i32", "y_ptr": "*i32", "rows": "i32"})
    yield Case(
        "stale declaration", Launch(add_one_kernel, 1, {"BLOCK": 1024}), {"x_ptr": "*fp32", "y_ptr": "*fp32", "rows": "i32"}, (8,), "was"
    )
    yield Case("not Triton", Launch(unequal_kernel, 1, {"BLOCK": 64}), one)
    yield Case("not for Ascend", Launch(double_kernel, 1, {"BLOCK": 64}), one)
    yield Case("argument without type", Launch(add_one_kernel, 1, {"BLOCK": 64}), one)
    yield Case("constant with a type", Launch(unequal_kernel, 1, {}), {**one, "BLOCK": "i32"})
    yield Case("number with a value", Launch(unequal_kernel, 1, {"BLOCK": 64, "rows": 3}), {"x_ptr": "*fp32"})
    yield Case("unknown argument", Launch(unequal_kernel, 1, {"BLOCK": 64}), {**one, "z": "i32"})
    yield Case("process dies", Launch(Deadly(), 1, {}), {})
