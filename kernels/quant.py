"""Quantisation to int8 and back, of [rows, hidden]: per token with scales that are found, symmetric or not, and with scales that are given.

All compute in fp32, round halves to even, and clamp before they round. A NaN or an infinity is seen in the scale of its own row alone. A
scale below the smallest normal number counts as 0: its row is one of zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Device, Launch, power_of_2, vector_grid
from .norm import row_tiles
from .numeric import TO_NEAREST, to_nearest
from .tile import load_tile, load_vector, store_tile

LARGEST: tl.constexpr = tl.constexpr(127.0)
_SMALLEST_SCALE: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # 2^-126: the reciprocals of smaller numbers are infinite
_SIGN: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # all bits of an fp32 but its sign


@triton.jit
def magnitude(x):
    """|x| as an integer of the same order, in which a NaN is the largest: the maximum of floating-point numbers may lose it."""
    return x.to(tl.int32, bitcast=True) & _SIGN


@triton.jit
def _ordered(bits):
    """Between the bits of an fp32 and an integer of the same order, in which NaNs are the largest and the least; its own inverse."""
    return bits ^ ((bits >> 31) & _SIGN)


@triton.jit
def divided(x, y):
    """x / y, correctly rounded: `/` is not, on NVIDIA."""
    return tl.math.div_rn(x, tl.broadcast_to(y, x.shape))


@triton.jit
def not_below(scale, least):
    """A scale, or the least there may be; 0 for what is too small to divide by."""
    return tl.where(scale < tl.maximum(least, _SMALLEST_SCALE), least, scale)


@triton.jit
def symmetric_scale(largest, least):
    """Scales [ROWS] of rows of which the largest magnitudes are given, as integers."""
    largest = largest.to(tl.float32, bitcast=True)
    return not_below(divided(largest, tl.full(largest.shape, 127.0, tl.float32)), least)


@triton.jit
def scaled(x, scale, DIVIDE: tl.constexpr):
    """A tile in units of its rows' scales [ROWS], by dividing or by multiplying by the reciprocal. What has scale 0 rounds to 0."""
    scale = tl.where(scale == 0.0, 1.0, scale)
    if DIVIDE:
        y = divided(x, scale[:, None])
    else:
        y = x * divided(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    return y


@triton.jit
def to_int8_range(x, LOWEST: tl.constexpr):
    """The nearest whole numbers from LOWEST to 127."""
    return to_nearest(tl.minimum(tl.maximum(x, LOWEST), LARGEST))


@triton.jit
def symmetric_int8(x, BITS: tl.constexpr):
    """The nearest whole numbers of a tile in units of what `symmetric_scale` gives, which are at most a last bit beyond 127.

    BITS makes int8 of them, by the last bits of the sum that rounds, for a GPU: its conversions take long. What is not finite becomes some
    number. Else they stay fp32 until they are stored: an NPU pads tiles of int8.
    """
    if BITS:
        x = tl.minimum(x, LARGEST)  # a product that is rounded before something is added to it
        q = (x + TO_NEAREST).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        q = to_int8_range(x, -127.0)
    return q


@triton.jit
def store_int8(ptr, q, row, rows, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr = False):
    """Store a tile of whole numbers in a contiguous int8 matrix.

    One row is a vector on an NPU, which pads each row of an int8 tile to many. On a GPU (BITS) a thread stores the 8 elements that it
    loaded, as 16 bytes, side by side; for 16 the compiler would exchange them between threads.
    """
    if ROWS == 1:
        ptr += row.to(tl.int64) * WIDTH
        if BITS:
            at = column + tl.max_contiguous(tl.arange(0, BLOCK), 8)[None, :]
        else:
            at = column + tl.arange(0, BLOCK)
            q = tl.reshape(q, (BLOCK,))
        if WIDTH % BLOCK == 0:
            tl.store(ptr + at, q.to(tl.int8))
        else:
            tl.store(ptr + at, q.to(tl.int8), mask=at < WIDTH)
    else:
        store_tile(ptr, q, WIDTH, row, rows, column, WIDTH, ROWS, BLOCK)


@triton.jit
def store_of_rows(ptr, values, row, rows, ROWS: tl.constexpr):
    """Store one number of each row of a tile."""
    at = row + tl.arange(0, ROWS)
    if ROWS == 1:
        tl.store(ptr + at, values)
    else:
        tl.store(ptr + at, values, mask=at < rows)


# -------------------------------------------------------------------- per token


@triton.jit
def _smoothed(x_ptr, smooth_ptr, x_stride, row, rows, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    x = load_tile(x_ptr, x_stride, row, rows, column, WIDTH, ROWS, BLOCK).to(tl.float32)
    if smooth_ptr is not None:
        x *= load_vector(smooth_ptr, column, WIDTH, BLOCK)
    return x


@triton.jit
def dynamic_quantize_kernel(
    x_ptr,
    smooth_ptr,
    q_ptr,
    scale_ptr,
    rows,
    x_stride,
    least,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIVIDE: tl.constexpr,
    BITS: tl.constexpr,
):
    """scale = max(|x * smooth|) / 127 of each row, but at least `least`; q = round(x * smooth / scale)."""
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS
        if BLOCK >= HIDDEN:
            x = _smoothed(x_ptr, smooth_ptr, x_stride, row, rows, 0, HIDDEN, ROWS, BLOCK)
            scale = symmetric_scale(tl.max(magnitude(x), axis=1), least)
            store_int8(q_ptr, symmetric_int8(scaled(x, scale, DIVIDE), BITS), row, rows, 0, HIDDEN, ROWS, BLOCK, BITS)
        else:
            largest = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
            for column in range(0, HIDDEN, BLOCK):
                x = _smoothed(x_ptr, smooth_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK)
                largest = tl.maximum(largest, magnitude(x))
            scale = symmetric_scale(tl.max(largest, axis=1), least)
            for column in range(0, HIDDEN, BLOCK):
                x = _smoothed(x_ptr, smooth_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK)
                store_int8(q_ptr, symmetric_int8(scaled(x, scale, DIVIDE), BITS), row, rows, column, HIDDEN, ROWS, BLOCK, BITS)
        store_of_rows(scale_ptr, scale, row, rows, ROWS)


@triton.jit
def _key(x, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BEYOND: tl.constexpr):
    """A tile as ordered integers, BEYOND after the rows' end."""
    key = _ordered(x.to(tl.int32, bitcast=True))
    if WIDTH % BLOCK != 0:
        key = tl.where((column + tl.arange(0, BLOCK) < WIDTH)[None, :], key, BEYOND)
    return key


@triton.jit
def _asymmetric_scale(low, high, least, LOWEST: tl.constexpr, WITH_ZERO: tl.constexpr, WHOLE_ZERO: tl.constexpr):
    """Scales and zero points [ROWS] of rows whose extremes are given, as ordered integers."""
    low = _ordered(low).to(tl.float32, bitcast=True)
    high = _ordered(high).to(tl.float32, bitcast=True)
    if WITH_ZERO:
        low = tl.where(low > 0.0, 0.0, low)
        high = tl.where(high < 0.0, 0.0, high)
    # A row of one value alone takes its magnitude as the scale, so that it comes back.
    steps = tl.full(high.shape, 127.0 - LOWEST, tl.float32)
    scale = tl.where(low == high, tl.abs(high), divided(high - low, steps))
    scale = not_below(scale, least)
    zero = LARGEST - divided(high, tl.where(scale == 0.0, 1.0, scale))
    if WHOLE_ZERO:
        zero = to_nearest(zero)
    return scale, zero


@triton.jit
def asymmetric_quantize_kernel(
    x_ptr,
    smooth_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    x_stride,
    least,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIVIDE: tl.constexpr,
    LOWEST: tl.constexpr,
    WITH_ZERO: tl.constexpr,
    WHOLE_ZERO: tl.constexpr,
):
    """v = x * smooth; of each row scale = (max(v) - min(v)) / (127 - LOWEST), zero = 127 - max(v) / scale; q = round(v / scale + zero)."""
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS
        if BLOCK >= HIDDEN:
            x = _smoothed(x_ptr, smooth_ptr, x_stride, row, rows, 0, HIDDEN, ROWS, BLOCK)
            low = tl.min(_key(x, 0, HIDDEN, BLOCK, _SIGN), axis=1)
            high = tl.max(_key(x, 0, HIDDEN, BLOCK, -_SIGN), axis=1)
            scale, zero = _asymmetric_scale(low, high, least, LOWEST, WITH_ZERO, WHOLE_ZERO)
            q = to_int8_range(scaled(x, scale, DIVIDE) + zero[:, None], LOWEST)
            store_int8(q_ptr, q, row, rows, 0, HIDDEN, ROWS, BLOCK)
        else:
            low = tl.full((ROWS, BLOCK), _SIGN, dtype=tl.int32)
            high = tl.full((ROWS, BLOCK), -_SIGN, dtype=tl.int32)
            for column in range(0, HIDDEN, BLOCK):
                x = _smoothed(x_ptr, smooth_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK)
                low = tl.minimum(low, _key(x, column, HIDDEN, BLOCK, _SIGN))
                high = tl.maximum(high, _key(x, column, HIDDEN, BLOCK, -_SIGN))
            scale, zero = _asymmetric_scale(tl.min(low, axis=1), tl.max(high, axis=1), least, LOWEST, WITH_ZERO, WHOLE_ZERO)
            for column in range(0, HIDDEN, BLOCK):
                x = _smoothed(x_ptr, smooth_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK)
                q = to_int8_range(scaled(x, scale, DIVIDE) + zero[:, None], LOWEST)
                store_int8(q_ptr, q, row, rows, column, HIDDEN, ROWS, BLOCK)
        store_of_rows(scale_ptr, scale, row, rows, ROWS)
        store_of_rows(zero_ptr, zero, row, rows, ROWS)


# -------------------------------------------------------------------- with given scales


@triton.jit
def only_element(ptr, ONE: tl.constexpr):
    """The element of a vector of one, as fp32, to be read before a loop."""
    if ONE:
        element = tl.load(ptr).to(tl.float32)
    else:
        element = 0.0
    return element


@triton.jit
def element_or_vector(one, ptr, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr):
    """That element, or [1, BLOCK] elements of a vector, as fp32."""
    if ONE:
        factor = one
    else:
        factor = load_vector(ptr, column, WIDTH, BLOCK)
    return factor


@triton.jit
def static_quantized(
    x,
    one_scale,
    one_zero,
    scale_ptr,
    zero_ptr,
    column,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    ONE_ZERO: tl.constexpr,
    DIVIDE: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """x / scale + zero, or x * scale + zero, as whole numbers from LOWEST to 127; `one_scale`, `one_zero` are `only_element`s."""
    scale = element_or_vector(one_scale, scale_ptr, column, WIDTH, BLOCK, ONE_SCALE)
    if DIVIDE:
        q = divided(x, scale)
    else:
        q = x * scale
    if zero_ptr is not None:
        q += element_or_vector(one_zero, zero_ptr, column, WIDTH, BLOCK, ONE_ZERO)
    return to_int8_range(q, LOWEST)


@triton.jit
def static_quantize_kernel(
    x_ptr,
    scale_ptr,
    zero_ptr,
    q_ptr,
    rows,
    x_stride,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    ONE_ZERO: tl.constexpr,
    DIVIDE: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """q = round(x / scale + zero), or with `x * scale`, of each channel or of all."""
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    one_scale = only_element(scale_ptr, ONE_SCALE)
    one_zero = only_element(zero_ptr, ONE_ZERO)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * BLOCKS, tl.num_programs(0)):
        row = tile // BLOCKS * ROWS
        column = tile % BLOCKS * BLOCK
        x = load_tile(x_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK).to(tl.float32)
        q = static_quantized(x, one_scale, one_zero, scale_ptr, zero_ptr, column, HIDDEN, BLOCK, ONE_SCALE, ONE_ZERO, DIVIDE, LOWEST)
        store_int8(q_ptr, q, row, rows, column, HIDDEN, ROWS, BLOCK)


@triton.jit
def _load_of_rows(ptr, row, rows, ROWS: tl.constexpr):
    """[ROWS, 1] numbers of a vector [rows], as fp32."""
    at = row + tl.arange(0, ROWS)
    if ROWS == 1:
        values = tl.load(ptr + at)
    else:
        values = tl.load(ptr + at, mask=at < rows, other=0.0)
    return values.to(tl.float32)[:, None]


@triton.jit
def dequantize_kernel(
    x_ptr,
    row_scale_ptr,
    scale_ptr,
    row_zero_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    rows,
    x_stride,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    ONE_ZERO: tl.constexpr,
    WHOLE_BIAS: tl.constexpr,
):
    """y = (x - zero) * scale * row scale + bias; a bias of whole numbers (WHOLE_BIAS) is added to x instead."""
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    one_scale = only_element(scale_ptr, ONE_SCALE)
    one_zero = only_element(zero_ptr, ONE_ZERO)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * BLOCKS, tl.num_programs(0)):
        row = tile // BLOCKS * ROWS
        column = tile % BLOCKS * BLOCK
        x = load_tile(x_ptr, x_stride, row, rows, column, HIDDEN, ROWS, BLOCK)
        if WHOLE_BIAS:
            at = column + tl.arange(0, BLOCK)
            if HIDDEN % BLOCK == 0:
                x += tl.load(bias_ptr + at)[None, :]
            else:
                x += tl.load(bias_ptr + at, mask=at < HIDDEN, other=0)[None, :]
        y = x.to(tl.float32)
        if row_zero_ptr is not None:
            y -= _load_of_rows(row_zero_ptr, row, rows, ROWS)
        if zero_ptr is not None:
            y -= element_or_vector(one_zero, zero_ptr, column, HIDDEN, BLOCK, ONE_ZERO)
        if scale_ptr is not None:
            y *= element_or_vector(one_scale, scale_ptr, column, HIDDEN, BLOCK, ONE_SCALE)
        if row_scale_ptr is not None:
            y *= _load_of_rows(row_scale_ptr, row, rows, ROWS)
        if bias_ptr is not None and not WHOLE_BIAS:
            y += load_vector(bias_ptr, column, HIDDEN, BLOCK)
        store_tile(y_ptr, y, HIDDEN, row, rows, column, HIDDEN, ROWS, BLOCK)


# -------------------------------------------------------------------- plans


def int8_tiles(
    rows: int, hidden: int, device: Device, *, whole: int, chunk: int, held: int = 16
) -> tuple[int, dict[str, int], dict[str, int]]:
    """`row_tiles` for int8 results: on an NPU a tile has one row, or at least the 32 to which its rows would be padded."""
    grid, tile, options = row_tiles(rows, hidden, device, whole=whole, chunk=chunk, held=held)
    if device.kind == "npu" and tile["ROWS"] < 32:
        grid, tile = vector_grid(rows, device), {**tile, "ROWS": 1}
    return grid, tile, options


def dynamic_quantize_launch(rows: int, hidden: int, device: Device, *, smooth: bool = False, divide: bool = False) -> Launch:
    """`dynamic_quantize_kernel` for [rows, hidden].

    Args:
        smooth: whether x is multiplied by a vector first.
        divide: divides by the scale instead of multiplying by its reciprocal.
    """
    block = 2048 if smooth else 4096
    # Warps wait for the largest magnitude, and again where results change threads to be stored side by side.
    grid, tile, options = int8_tiles(rows, hidden, device, whole=block, chunk=block, held=32)
    return Launch(dynamic_quantize_kernel, grid, {"HIDDEN": hidden, **tile, "DIVIDE": divide, "BITS": device.kind != "npu"}, options)


def asymmetric_quantize_launch(
    rows: int,
    hidden: int,
    device: Device,
    *,
    divide: bool = False,
    lowest: int = -128,
    with_zero: bool = False,
    whole_zero: bool = False,
) -> Launch:
    """`asymmetric_quantize_kernel` for [rows, hidden].

    Args:
        divide: divides by the scale instead of multiplying by its reciprocal.
        lowest: the least result.
        with_zero: the range of a row is extended to hold 0.
        whole_zero: zero points are rounded to whole numbers.
    """
    grid, tile, options = int8_tiles(rows, hidden, device, whole=1024, chunk=1024)  # two extremes are kept for each element of a block
    choices = {"DIVIDE": divide, "LOWEST": float(lowest), "WITH_ZERO": with_zero, "WHOLE_ZERO": whole_zero}
    return Launch(asymmetric_quantize_kernel, grid, {"HIDDEN": hidden, **tile, **choices}, options)


def element_tiles(rows: int, hidden: int, device: Device, *, most: int, int8: bool = False) -> tuple[int, dict[str, int], dict[str, int]]:
    """How the elements of a matrix are dealt out where none needs another: the grid, the constants ROWS and BLOCK, and options.

    Of the blocks from 1024 elements to `most`, which is what a tile has, the one with the fewest elements beyond a row's end is taken. With
    `int8` results the rows on an NPU are as in `int8_tiles`.
    """
    block = power_of_2(hidden)
    if block > 1024:
        blocks = [size for size in (1024, 2048, 4096, 8192) if size <= min(most, block)]
        block = min(blocks, key=lambda size: (-(-hidden // size) * size, -size))
    tile_rows = min(max(1, most // block), power_of_2(rows))
    if int8 and device.kind == "npu" and tile_rows < 32:
        tile_rows = 1
    tiles = -(-rows // tile_rows) * -(-hidden // block)
    warps = {} if device.kind == "npu" else {"num_warps": min(max(tile_rows * block // 512, 1), 8)}
    return vector_grid(tiles, device), {"ROWS": tile_rows, "BLOCK": block}, warps


def static_quantize_launch(
    rows: int, hidden: int, device: Device, *, one_scale: bool, one_zero: bool = False, divide: bool = True, lowest: int = -128
) -> Launch:
    """`static_quantize_kernel` for [rows, hidden].

    Args:
        one_scale, one_zero: whether there is one for all channels.
        divide: x is divided by the scale, not multiplied.
        lowest: the least result.
    """
    grid, tile, options = element_tiles(rows, hidden, device, most=4096, int8=True)
    choices = {"ONE_SCALE": one_scale, "ONE_ZERO": one_zero, "DIVIDE": divide, "LOWEST": float(lowest)}
    return Launch(static_quantize_kernel, grid, {"HIDDEN": hidden, **tile, **choices}, {**options, **unfused(device)})


def unfused(device: Device) -> dict[str, bool]:
    """The compiler's option to round a product before something is added to it, as PyTorch does."""
    return {} if device.kind == "npu" else {"enable_fp_fusion": False}


def dequantize_launch(
    rows: int, hidden: int, device: Device, *, one_scale: bool = False, one_zero: bool = False, whole_bias: bool = False
) -> Launch:
    """`dequantize_kernel` for [rows, hidden].

    Args:
        one_scale, one_zero: whether there is one for all channels.
        whole_bias: whether the bias is of whole numbers.
    """
    grid, tile, options = element_tiles(rows, hidden, device, most=4096)
    choices = {"ONE_SCALE": one_scale, "ONE_ZERO": one_zero, "WHOLE_BIAS": whole_bias}
    return Launch(dequantize_kernel, grid, {"HIDDEN": hidden, **tile, **choices}, options)
