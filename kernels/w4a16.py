"""Linear layers with 4-bit weights and 16-bit activations: y = x W + bias, W[k, n] = (q[k, n] - zero[g, n]) * scale[g, n], g = k // group.

**Layout.** q is 0 to 15, eight to a word: int32 [K / 8, N]. Inputs come in blocks of 8 * P, P = min(group, 128) / 8; nibble i of row
b * P + j holds input b * 8 P + i * P + j. A tile of words so yields eight tiles of weights, each of inputs that lie side by side, all of
one group, and no weight has to change places, in registers or in memory. `awq_repack_kernel` makes it of AWQ's layout, once.

**Few rows** (`w4a16_gemv_kernel`). Vectors only, fp32. A program owns some columns and walks all their inputs, the rows of x side by side,
so that weights are read once, in one launch, and the sums have one order. Its threads keep a sum for each word of the tile; they meet at
the end.

**Few rows on a GPU** (kernels/w4a16_products.py). By tensor cores: what a weight costs hardly grows with the rows.

**More rows** (`w4a16_gemm_kernel`). A block's weights are made in registers, rounded to the type of x, and multiplied by `tl.dot`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Device, Launch, cube_grid, power_of_2, product_columns, takes_turns, vector_grid
from .tile import turns_end, turns_step

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word of AWQ holds column AWQ_ORDER[i] of eight."""


def plane_rows(inputs: int, group: int) -> int:
    """Rows of words that hold one block of inputs, P; 0 where the layout does not fit the number of inputs."""
    for size in (128, 64, 32):
        if size <= group and inputs % size == 0 and group % size == 0:
            return size // 8
    return 0


# -------------------------------------------------------------------- few rows


@triton.jit
def _nibble_in_place(words, i: tl.constexpr):
    """nibble i * 16^(i % 5) as fp32: five of a word's nibbles need no shift."""
    return ((words >> (20 * (i // 5))) & (15 << (4 * (i % 5)))).to(tl.float32)


@triton.jit
def load_columns(ptr, at, width, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of rows [.., WIDTH], as fp32; `width` are their columns, which end inside the tile unless BLOCK divides WIDTH."""
    if WIDTH % BLOCK == 0:
        values = tl.load(ptr + at)
    else:
        values = tl.load(ptr + at, mask=width < WIDTH, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _number_of_field(words, PLACE: tl.constexpr):
    """2^(23 - 4 PLACE) + the nibble at PLACE, as the last bits of that power of 2: the one instruction of which the compiler makes two."""
    if PLACE == 0:
        number = tl.inline_asm_elementwise("lop3.b32 $0, $1, 0xf, 0x4b000000, 0xea;", "=r,r", [words], tl.float32, True, 1)
    elif PLACE == 1:
        number = tl.inline_asm_elementwise("lop3.b32 $0, $1, 0xf0, 0x49000000, 0xea;", "=r,r", [words], tl.float32, True, 1)
    elif PLACE == 2:
        number = tl.inline_asm_elementwise("lop3.b32 $0, $1, 0xf00, 0x47000000, 0xea;", "=r,r", [words], tl.float32, True, 1)
    elif PLACE == 3:
        number = tl.inline_asm_elementwise("lop3.b32 $0, $1, 0xf000, 0x45000000, 0xea;", "=r,r", [words], tl.float32, True, 1)
    else:
        number = tl.inline_asm_elementwise("lop3.b32 $0, $1, 0xf0000, 0x43000000, 0xea;", "=r,r", [words], tl.float32, True, 1)
    return number


@triton.jit
def _nibble_less_8(words, i: tl.constexpr, LOP3: tl.constexpr):
    """nibble i - 8 as fp32, exact: two instructions of a GPU (LOP3), whose conversions take longer. The interpreter knows no such."""
    PLACE: tl.constexpr = i % 5
    words = words >> (20 * (i // 5))
    if LOP3:
        number = _number_of_field(words, PLACE)
    else:
        number = ((words & (15 << 4 * PLACE)) | ((150 - 4 * PLACE) << 23)).to(tl.float32, bitcast=True)
    return number - (2.0 ** (23 - 4 * PLACE) + 8.0)


@triton.jit
def _step_words(words_ptr, row, r, n, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    at = words_ptr + row * OUTPUTS + r * OUTPUTS + n
    if WHOLE and OUTPUTS % BLOCK == 0:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=(row + r < INPUTS // 8) & (n < OUTPUTS), other=0)
    return words


@triton.jit
def _step_sums(
    words,
    x_ptr,
    scales_ptr,
    zeros_ptr,
    x_stride,
    rows,
    row,
    m,
    r,
    n,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    BITS: tl.constexpr,
    LOP3: tl.constexpr,
):
    """What WORDS rows of words from `row` on give: [TOKENS, WORDS, BLOCK]."""
    if WORDS > PLANE:
        k = (r // PLANE) * (8 * PLANE) + r % PLANE
    else:
        k = r
    part = tl.zeros((TOKENS, WORDS, BLOCK), dtype=tl.float32)
    x_sum = tl.zeros((TOKENS, WORDS, 1), dtype=tl.float32)
    for i in tl.static_range(8):
        at_x = x_ptr + row * 8 + i * PLANE + m * x_stride + k
        if TOKENS == 1 and WHOLE:
            x = tl.load(at_x).to(tl.float32)
        else:
            x = tl.load(at_x, mask=(m < rows) & (row + r < INPUTS // 8), other=0.0).to(tl.float32)
        if BITS:
            part += x * _nibble_less_8(words, i, LOP3)
        else:
            part += x * 0.0625 ** (i % 5) * _nibble_in_place(words, i)
        x_sum += x
    if WHOLE and GROUP % (8 * WORDS) == 0:
        scale_at = (row * 8 // GROUP) * OUTPUTS + n
    elif WHOLE and 8 * WORDS % GROUP == 0:
        scale_at = (row * 8 // GROUP) * OUTPUTS + (r * 8 // GROUP) * OUTPUTS + n
    else:  # beyond the last word x is 0, and the scale whatever it is
        scale_at = tl.minimum(row + r, INPUTS // 8 - 1) * 8 // GROUP * OUTPUTS + n
    if zeros_ptr is not None:
        part -= x_sum * (load_columns(zeros_ptr, scale_at, n, OUTPUTS, BLOCK) - (8.0 if BITS else 0.0))
    elif not BITS:
        part -= x_sum * 8.0
    return part * load_columns(scales_ptr, scale_at, n, OUTPUTS, BLOCK)


@triton.jit
def _row_sums(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    x_stride,
    rows,
    column,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    BITS: tl.constexpr,
    LOP3: tl.constexpr,
):
    """x W for `rows` (at most TOKENS) rows of x and BLOCK columns: [TOKENS, BLOCK] fp32. WORDS rows of words a step, of which the words
    of AHEAD steps are asked for before any is used."""
    WHOLE: tl.constexpr = INPUTS // 8 % (WORDS * AHEAD) == 0
    m = tl.arange(0, TOKENS)[:, None, None]
    r = tl.arange(0, WORDS)[None, :, None]
    n = column + tl.arange(0, BLOCK)[None, None, :]
    sums = tl.zeros((TOKENS, WORDS, BLOCK), dtype=tl.float32)
    for row in tl.range(0, INPUTS // 8, WORDS * AHEAD, num_stages=STAGES):
        if AHEAD == 1:
            words = _step_words(words_ptr, row, r, n, INPUTS, OUTPUTS, BLOCK, WHOLE)
            sums += _step_sums(
                words,
                x_ptr,
                scales_ptr,
                zeros_ptr,
                x_stride,
                rows,
                row,
                m,
                r,
                n,
                INPUTS,
                OUTPUTS,
                GROUP,
                PLANE,
                WORDS,
                BLOCK,
                TOKENS,
                WHOLE,
                BITS,
                LOP3,
            )
        else:
            asked = ()
            for step in tl.static_range(AHEAD):
                asked = asked + (_step_words(words_ptr, row + step * WORDS, r, n, INPUTS, OUTPUTS, BLOCK, WHOLE),)
            for step in tl.static_range(AHEAD):
                sums += _step_sums(
                    asked[step],
                    x_ptr,
                    scales_ptr,
                    zeros_ptr,
                    x_stride,
                    rows,
                    row + step * WORDS,
                    m,
                    r,
                    n,
                    INPUTS,
                    OUTPUTS,
                    GROUP,
                    PLANE,
                    WORDS,
                    BLOCK,
                    TOKENS,
                    WHOLE,
                    BITS,
                    LOP3,
                )
    return tl.sum(sums, axis=1)


@triton.jit
def w4a16_gemv_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    ids_ptr,
    y_ptr,
    rows,
    slots,
    experts,
    x_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    BITS: tl.constexpr,
    LOP3: tl.constexpr,
    TURNS: tl.constexpr,
):
    """y[row] = x[row // slots] W + bias, contiguous [rows, OUTPUTS].

    With ids (TOKENS = 1) by the weights of expert ids[row], and 0 where there is no such expert; without them `slots` is 1.
    """
    columns: tl.constexpr = (OUTPUTS + BLOCK - 1) // BLOCK
    for tile in range(tl.program_id(0), turns_end(tl.cdiv(rows, TOKENS) * columns, TURNS), turns_step(TURNS)):
        row = (tile // columns) * TOKENS
        column = (tile % columns) * BLOCK
        expert = 0
        if ids_ptr is not None:
            expert = tl.load(ids_ptr + row)
        n = column + tl.arange(0, BLOCK)[None, :]
        y = tl.zeros((TOKENS, BLOCK), dtype=tl.float32)
        if (expert >= 0) & (expert < experts):
            of = tl.cast(expert, tl.int64)
            zeros_of = zeros_ptr
            if zeros_ptr is not None:
                zeros_of = zeros_ptr + of * (INPUTS // GROUP * OUTPUTS)
            y = _row_sums(
                x_ptr + (row // slots).to(tl.int64) * x_stride,
                words_ptr + of * (INPUTS // 8 * OUTPUTS),
                scales_ptr + of * (INPUTS // GROUP * OUTPUTS),
                zeros_of,
                x_stride,
                rows - row,
                column,
                INPUTS,
                OUTPUTS,
                GROUP,
                PLANE,
                WORDS,
                BLOCK,
                TOKENS,
                STAGES,
                AHEAD,
                BITS,
                LOP3,
            )
            if bias_ptr is not None:
                y += load_columns(bias_ptr + of * OUTPUTS, n, n, OUTPUTS, BLOCK)
        m = tl.arange(0, TOKENS)[:, None]
        at = y_ptr + row.to(tl.int64) * OUTPUTS + m * OUTPUTS + n
        y = y.to(y_ptr.dtype.element_ty)
        if TOKENS == 1 and OUTPUTS % BLOCK == 0:
            tl.store(at, y)
        else:
            tl.store(at, y, mask=(row + m < rows) & (n < OUTPUTS))


# -------------------------------------------------------------------- more rows


@triton.jit
def _nibble(words, i: tl.constexpr):
    return (words >> (4 * i)) & 15


@triton.jit
def _joined(a0, a1, a2, a3, a4, a5, a6, a7):
    """[..., 2, 2, 2]: eight tensors side by side. A vector of eight shifts in their stead would be a loop on an NPU."""
    evens = tl.join(tl.join(a0, a4), tl.join(a2, a6))
    odds = tl.join(tl.join(a1, a5), tl.join(a3, a7))
    return tl.join(evens, odds)


@triton.jit
def nibble_places(PLACES: tl.constexpr):
    """The bits of nibbles 0 to PLACES - 1 (at most 4), and 16^-i: [PLACES, 1, 1]. A vector of shifts in their stead is a loop on an NPU."""
    place = tl.arange(0, PLACES)[:, None, None]
    mask = tl.full((PLACES, 1, 1), 15, dtype=tl.int32)
    inverse = tl.full((PLACES, 1, 1), 1.0, dtype=tl.float32)
    for i in tl.static_range(1, PLACES):
        mask = tl.where(place == i, 15 << (4 * i), mask)
        inverse = tl.where(place == i, 0.0625**i, inverse)
    return mask, inverse


@triton.jit
def w4a16_gemm_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    rows,
    x_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BAND: tl.constexpr,
):
    """y = x W + bias for rows of x, contiguous [rows, OUTPUTS].

    A step multiplies by the weights of PLACES nibbles of PLANE words a column. BAND rows of tiles are dealt out together, to share weights.
    """
    columns: tl.constexpr = (OUTPUTS + BLOCK - 1) // BLOCK
    tiles_down = tl.cdiv(rows, ROWS)
    for tile in range(tl.program_id(0), tiles_down * columns, tl.num_programs(0)):
        first = tile // (BAND * columns) * BAND
        height = tl.minimum(tiles_down - first, BAND)
        within = tile % (BAND * columns)
        row = (first + within % height) * ROWS
        column = within // height * BLOCK
        m = tl.arange(0, ROWS)
        n = column + tl.arange(0, BLOCK)
        j = tl.arange(0, PLANE)
        k = tl.arange(0, PLACES * PLANE)
        at_x = x_ptr + row.to(tl.int64) * x_stride + (m[:, None] * x_stride + k[None, :])
        known = (row + m < rows)[:, None]
        mask, inverse = nibble_places(PLACES)
        sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for block in range(INPUTS // (8 * PLANE)):
            at = block * (PLANE * OUTPUTS) + (j[:, None] * OUTPUTS + n[None, :])
            if OUTPUTS % BLOCK == 0:
                words = tl.load(words_ptr + at)
            else:
                words = tl.load(words_ptr + at, mask=n[None, :] < OUTPUTS, other=0)
            scale_at = block * (8 * PLANE) // GROUP * OUTPUTS + n
            scale = load_columns(scales_ptr, scale_at, n, OUTPUTS, BLOCK)[None, None, :]
            zero = tl.full((1, 1, 1), 8.0, dtype=tl.float32)
            if zeros_ptr is not None:
                zero = load_columns(zeros_ptr, scale_at, n, OUTPUTS, BLOCK)[None, None, :]
            for part in tl.static_range(8 // PLACES):
                x = tl.load(at_x + block * (8 * PLANE) + part * (PLACES * PLANE), mask=known, other=0.0)
                q = ((words >> (4 * PLACES * part))[None, :, :] & mask).to(tl.float32) * inverse
                w = tl.reshape((q - zero) * scale, (PLACES * PLANE, BLOCK))
                sums = tl.dot(x, w.to(x.dtype), sums)
        if bias_ptr is not None:
            sums += load_columns(bias_ptr, n, n, OUTPUTS, BLOCK)[None, :]
        at = y_ptr + row.to(tl.int64) * OUTPUTS + (m[:, None] * OUTPUTS + n[None, :])
        tl.store(at, sums.to(y_ptr.dtype.element_ty), mask=known & (n < OUTPUTS)[None, :])


# -------------------------------------------------------------------- preparation


@triton.jit
def awq_repack_kernel(awq_ptr, words_ptr, rows, COLUMNS: tl.constexpr, PLANE: tl.constexpr, BLOCK: tl.constexpr):
    """AWQ's words [rows, COLUMNS], eight columns a word, to ours [rows / 8, 8 * COLUMNS], eight inputs a word; 8 * PLANE divides rows."""
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    j = tl.arange(0, PLANE)[:, None]
    for tile in range(tl.program_id(0), rows // (8 * PLANE) * blocks, tl.num_programs(0)):
        row = tile // blocks
        column = (tile % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
        c0 = tl.zeros((PLANE, BLOCK), dtype=tl.int32)
        c1 = c0
        c2 = c0
        c3 = c0
        c4 = c0
        c5 = c0
        c6 = c0
        c7 = c0
        for i in range(8):
            at = (row.to(tl.int64) * 8 + i) * (PLANE * COLUMNS) + (j * COLUMNS + column)
            awq = tl.load(awq_ptr + at, mask=column < COLUMNS, other=0)
            c0 |= _nibble(awq, 0) << (4 * i)
            c2 |= _nibble(awq, 1) << (4 * i)
            c4 |= _nibble(awq, 2) << (4 * i)
            c6 |= _nibble(awq, 3) << (4 * i)
            c1 |= _nibble(awq, 4) << (4 * i)
            c3 |= _nibble(awq, 5) << (4 * i)
            c5 |= _nibble(awq, 6) << (4 * i)
            c7 |= _nibble(awq, 7) << (4 * i)
        packed = tl.reshape(_joined(c0, c1, c2, c3, c4, c5, c6, c7), (PLANE, BLOCK * 8))
        n = (tile % blocks) * (BLOCK * 8) + tl.arange(0, BLOCK * 8)[None, :]
        at = row.to(tl.int64) * (PLANE * COLUMNS * 8) + (j * (COLUMNS * 8) + n)
        tl.store(words_ptr + at, packed, mask=n < COLUMNS * 8)


# -------------------------------------------------------------------- plans


def _gemv_tile(problems: int, inputs: int, outputs: int, group: int, plane: int, tokens: int, device: Device) -> tuple[int, int]:
    """Rows and columns of the tile of words that a step takes. On an NPU a step lies in one group and ends where the inputs end."""
    if device.kind == "npu":
        return plane, min(64 if tokens in (1, 4) else 32, max(8, power_of_2(outputs)))
    # As many columns as leave a program for every multiprocessor, 64 bytes at the least; of 16 warps, up to 16 words a thread.
    block = next((size for size in (64, 32) if problems * -(-outputs // size) >= 0.9 * device.cores), 16)
    return min(256, 8192 // (tokens * block), max(4, power_of_2(inputs // 8))), block


def w4a16_gemv_launch(rows: int, inputs: int, outputs: int, group: int, device: Device, *, experts: bool = False) -> Launch:
    """`w4a16_gemv_kernel` for [rows, inputs].

    Args:
        group: inputs that share a scale; `inputs` where a column has one.
        experts: whether each row has weights of its own.
    """
    plane = plane_rows(inputs, group)
    tokens = 1 if experts else min(power_of_2(rows), most_gemv_rows(device))
    words, block = _gemv_tile(-(-rows // tokens), inputs, outputs, group, plane, tokens, device)
    layer = {"INPUTS": inputs, "OUTPUTS": outputs, "GROUP": group, "PLANE": plane}
    grid = vector_grid(-(-rows // tokens) * -(-outputs // block), device)
    steps = -(-inputs // 8 // words)
    if device.kind == "npu":
        stages, ahead, options = min(4, steps), 1, {}
    else:
        # A GPU's threads keep the words that they load, up to 32 each; several stages would take them by way of shared memory.
        warps = min(max(words * block // 128, 1), 16)
        stages, ahead, options = 1, max(1, min(steps, 1024 * warps // (words * block * tokens))), {"num_warps": warps}
    how = {"BITS": device.kind != "npu", "LOP3": device.kind == "cuda", "TURNS": takes_turns(device)}
    tile = {"WORDS": words, "BLOCK": block, "TOKENS": tokens, "STAGES": stages, "AHEAD": ahead}
    return Launch(w4a16_gemv_kernel, grid, layer | tile | how, options)


def most_gemv_rows(device: Device) -> int:
    """Up to so many rows vectors compute a layer; a GPU's threads hold the sums of two rows, and beyond them products cost less."""
    return 8 if device.kind == "npu" else 2


def takes_products(rows: int, inputs: int, group: int, device: Device) -> bool:
    """Whether kernels/w4a16_products.py is for so many rows."""
    return device.kind == "cuda" and 2 <= rows <= 32 and plane_rows(inputs, group) == 16


def w4a16_gemm_launch(rows: int, inputs: int, outputs: int, group: int, device: Device) -> Launch:
    """`w4a16_gemm_kernel` for [rows, inputs]; `group` as in `w4a16_gemv_launch`."""
    tile_rows = min(max(power_of_2(rows), 16), 128)
    if device.kind == "npu":
        block, options = min(64, max(16, power_of_2(outputs))), {}
    else:
        block = product_columns(-(-rows // tile_rows), outputs, device)
        options = {"num_warps": 8 if tile_rows == 128 else 4, "num_stages": 4}
    layer = {"INPUTS": inputs, "OUTPUTS": outputs, "GROUP": group, "PLANE": plane_rows(inputs, group)}
    grid = cube_grid(-(-rows // tile_rows) * -(-outputs // block), device)
    return Launch(w4a16_gemm_kernel, grid, {**layer, "PLACES": 4, "ROWS": tile_rows, "BLOCK": block, "BAND": 8}, options)


def awq_repack_launch(rows: int, columns: int, plane: int, device: Device) -> Launch:
    """`awq_repack_kernel` for AWQ's words [rows, columns]; `plane` is `plane_rows` of the layer."""
    block = min(8 if device.kind == "npu" else 32, power_of_2(columns))
    grid = vector_grid(rows // (8 * plane) * -(-columns // block), device)
    return Launch(awq_repack_kernel, grid, {"COLUMNS": columns, "PLANE": plane, "BLOCK": block})
