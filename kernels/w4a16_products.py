"""Linear layers with 4-bit weights for a few rows on an NVIDIA GPU, by tensor cores: y = x W + bias, of the layout of kernels/w4a16.py.

In Gluon, the part of Triton in which a program names its layouts: a thread loads what it will multiply, as 16 bytes of words and 8 bytes of
x, and nothing changes threads before the sums meet. For that the columns of a tile and the inputs of a product are taken in the order in
which threads hold them: thread (g, t) of a warp loads the columns WIDE * g + r of the inputs 4 t + u, and they take part as the product's
column 8 r + g and input 8 (u / 2) + 2 t + u % 2. Weights are the left operand: tensor cores multiply 16 columns by 8 rows at least.

Neither triton-ascend nor the interpreter has Gluon: this module is imported where a GPU runs it, and an NPU takes `w4a16_gemv_kernel`.
"""

from __future__ import annotations

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .launch import Device, Launch, power_of_2

INPUTS_A_STEP = 128  # of a batch of warps: 16 rows of words


# -------------------------------------------------------------------- words


def _assembly(one: int) -> str:
    """The eight nibbles of two words as the last bits of `one`, a pair of numbers with no other last bits, plane by plane."""
    planes = []
    for place in range(8):
        half, shift = "lh"[place // 4], place % 4 * 4
        source = half if shift == 0 else "t"
        planes += [f"shr.b32 t, {half}, {shift};"] * (shift > 0)
        planes.append(f"lop3.b32 ${place}, {source}, 0x000f000f, {one:#010x}, 0xea;")
    joined = ["prmt.b32 l, $8, $9, 0x5410;", "prmt.b32 h, $8, $9, 0x7632;"]
    return "\n".join(["{", ".reg .b32 l, h, t;", *joined, *planes, "}"])


_ASSEMBLY_FP16 = gl.constexpr(_assembly(0x64006400))
_ASSEMBLY_BF16 = gl.constexpr(_assembly(0x43004300))
_REGISTERS = gl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")


@gluon.jit
def _unpacked(words, HALF: gl.constexpr):
    """The eight nibbles of words as eight tensors of ONE + nibble, exact: ONE is 1024 in fp16, 128 in bf16, whose last bits they are.

    Two words at a time, which a product takes side by side: sixteen instructions for sixteen weights.
    """
    if gl.float16 == HALF:
        planes = gl.inline_asm_elementwise(
            _ASSEMBLY_FP16,
            _REGISTERS,
            args=[words],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        planes = gl.inline_asm_elementwise(
            _ASSEMBLY_BF16,
            _REGISTERS,
            args=[words],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return planes


# -------------------------------------------------------------------- orders


@gluon.jit
def _columns_in_order(tile, SPLIT: gl.constexpr, WIDE: gl.constexpr):
    """[SPLIT, 8 * WIDE, 16]: column 8 r + g is that which was loaded as WIDE * g + r."""
    tile = gl.permute(gl.reshape(tile, (SPLIT, 8, WIDE, 16)), (0, 2, 1, 3))
    return gl.reshape(tile, (SPLIT, 8 * WIDE, 16))


@gluon.jit
def _inputs_in_order(tile, SPLIT: gl.constexpr, SIZE: gl.constexpr):
    """[SPLIT, SIZE, 16]: input 8 v + 2 t + u is that which was loaded as 4 t + 2 v + u."""
    tile = gl.permute(gl.reshape(tile, (SPLIT, SIZE, 4, 2, 2)), (0, 1, 3, 2, 4))
    return gl.reshape(tile, (SPLIT, SIZE, 16))


@gluon.jit
def _of_columns(vector, SPLIT: gl.constexpr, WIDE: gl.constexpr, PRODUCT: gl.constexpr):
    """[SPLIT, 8 * WIDE, 1] in the layout of products, of [SPLIT, 8 * WIDE] in the order of loads."""
    vector = gl.permute(gl.reshape(vector.to(gl.float32), (SPLIT, 8, WIDE)), (0, 2, 1))
    vector = gl.convert_layout(gl.reshape(vector, (SPLIT, 8 * WIDE)), gl.SliceLayout(2, PRODUCT), assert_trivial=True)
    return gl.expand_dims(vector, 2)


@gluon.jit
def _repeated(tile, SPLIT: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr):
    """[SPLIT, BLOCK, ROWS] of [SPLIT, 16, ROWS], whose columns are all the same."""
    if BLOCK == 32:
        tile = gl.reshape(gl.permute(gl.join(tile, tile), (0, 3, 1, 2)), (SPLIT, 32, ROWS))
    else:
        gl.static_assert(BLOCK == 16)
    return tile


# -------------------------------------------------------------------- the kernel


@gluon.jit
def w4a16_products_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    rows,
    x_stride,
    INPUTS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    SPLIT: gl.constexpr,
    BLOCK: gl.constexpr,
    AHEAD: gl.constexpr,
    WORD_LAYOUT: gl.constexpr,
    X_LAYOUT: gl.constexpr,
    SCALE_LAYOUT: gl.constexpr,
):
    """y = x W + bias for at most ROWS rows of x, contiguous [rows, OUTPUTS]; 128 divides INPUTS and GROUP.

    A program owns BLOCK columns. Blocks of 128 inputs go round its SPLIT warps, whose sums meet at the end, in one order. A warp asks for
    the words of AHEAD blocks first (`volatile`: else the compiler asks for each where it is used). What makes numbers of nibbles, ONE, is
    taken off with the zero point: both times the sum of x, itself a product.
    """
    HALF: gl.constexpr = x_ptr.dtype.element_ty
    ONE: gl.constexpr = 1024.0 if gl.float16 == HALF else 128.0
    WIDE: gl.constexpr = BLOCK // 8
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SPLIT, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    blocks: gl.constexpr = INPUTS // 128
    each: gl.constexpr = (blocks + SPLIT - 1) // SPLIT
    whole: gl.constexpr = OUTPUTS % BLOCK == 0 and blocks % (SPLIT * AHEAD) == 0
    word_batch = gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, WORD_LAYOUT)))[:, None, None]
    word_column = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(2, WORD_LAYOUT)))[None, :, None]
    word_row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, WORD_LAYOUT)))[None, None, :]
    x_batch = gl.arange(0, SPLIT, gl.SliceLayout(1, gl.SliceLayout(2, X_LAYOUT)))[:, None, None]
    x_row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, X_LAYOUT)))[None, :, None]
    x_column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, X_LAYOUT)))[None, None, :]
    scale_batch = gl.arange(0, SPLIT, gl.SliceLayout(1, SCALE_LAYOUT))[:, None]
    scale_column = gl.arange(0, BLOCK, gl.SliceLayout(0, SCALE_LAYOUT))[None, :]
    ones = gl.full((SPLIT, 16, 16), 1.0, HALF, LEFT)
    first = gl.program_id(0) * BLOCK  # a program for each tile: a loop over tiles, even of one, cost 2 us
    sums = gl.full((SPLIT, BLOCK, ROWS), 0.0, gl.float32, PRODUCT)
    for start in range(0, each, AHEAD):
        words, scales, zeros, xs = (), (), (), ()
        for ahead in gl.static_range(AHEAD):
            block = (start + ahead) * SPLIT + word_batch
            at = words_ptr + (block * 16 + word_row) * OUTPUTS + first + word_column
            if whole:
                words = words + (gl.load(at, volatile=True),)
            else:
                known = (block < blocks) & (first + word_column < OUTPUTS)
                words = words + (gl.load(at, mask=known, other=0, volatile=True),)
        for ahead in gl.static_range(AHEAD):
            block = (start + ahead) * SPLIT + x_batch
            known = (x_row < rows) & (block < blocks)
            for i in gl.static_range(8):
                at = x_ptr + x_row * x_stride + block * 128 + i * 16 + x_column
                xs = xs + (gl.load(at, mask=known, other=0.0),)
            # Beyond the last block x is 0, and the scale whatever it is; beyond the last column nothing is stored.
            group = gl.minimum((start + ahead) * SPLIT + scale_batch, blocks - 1) * 128 // GROUP
            if OUTPUTS % BLOCK == 0:
                column = first + scale_column
            else:
                column = gl.minimum(first + scale_column, OUTPUTS - 1)
            scales = scales + (gl.load(scales_ptr + group * OUTPUTS + column),)
            if zeros_ptr is not None:
                zeros = zeros + (gl.load(zeros_ptr + group * OUTPUTS + column),)
        for ahead in gl.static_range(AHEAD):
            w = _inputs_in_order(_columns_in_order(words[ahead], SPLIT, WIDE), SPLIT, BLOCK)
            planes = _unpacked(gl.convert_layout(w, LEFT, assert_trivial=True), HALF)
            part = gl.full((SPLIT, BLOCK, ROWS), 0.0, gl.float32, PRODUCT)
            x_sum = gl.full((SPLIT, 16, ROWS), 0.0, gl.float32, PRODUCT)
            for i in gl.static_range(8):
                x = gl.permute(_inputs_in_order(xs[ahead * 8 + i], SPLIT, ROWS), (0, 2, 1))
                x = gl.convert_layout(x, RIGHT, assert_trivial=True)
                part = mma_v2(planes[i], x, part)
                x_sum = mma_v2(ones, x, x_sum)
            offset = 8.0 + ONE
            if zeros_ptr is not None:
                offset = _of_columns(zeros[ahead], SPLIT, WIDE, PRODUCT) + ONE
            x_sum = gl.convert_layout(_repeated(x_sum, SPLIT, BLOCK, ROWS), PRODUCT, assert_trivial=True)
            sums += (part - x_sum * offset) * _of_columns(scales[ahead], SPLIT, WIDE, PRODUCT)
    y = gl.sum(sums, axis=0)
    place = gl.arange(0, BLOCK, gl.SliceLayout(1, gl.SliceLayout(0, PRODUCT)))[:, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(0, PRODUCT)))[None, :]
    column = first + place % 8 * WIDE + place // 8
    if bias_ptr is not None:
        y += gl.load(bias_ptr + column, mask=column < OUTPUTS, other=0.0).to(gl.float32)
    known = (row < rows) & (column < OUTPUTS)
    gl.store(y_ptr + row * OUTPUTS + column, y.to(y_ptr.dtype.element_ty), mask=known)


# -------------------------------------------------------------------- plan


@cache
def _layouts(split: int, block: int, rows: int) -> dict[str, gl.DistributedLinearLayout]:
    """Of loads: words [SPLIT, BLOCK, 16], x [SPLIT, ROWS, 16], scales [SPLIT, BLOCK]. Bits of the register, the lane, the warp lead to an
    element; the two lowest bits of a lane are t, the others g."""
    wide = block // 8
    warps, inner = _bits(split), _bits(wide)
    u, t, g = [[0, 0, 1], [0, 0, 2]], [[0, 0, 4], [0, 0, 8]], (1, 2, 4)
    lanes, batch = [*t, *([0, wide * bit, 0] for bit in g)], [[bit, 0, 0] for bit in warps]
    words = gl.DistributedLinearLayout([*([0, bit, 0] for bit in inner), *u], lanes, batch, [], [split, block, 16])
    lanes = [*t, *([0, bit, 0] for bit in g)]
    x = gl.DistributedLinearLayout([*u, *([0, 8 * bit, 0] for bit in _bits(rows // 8))], lanes, batch, [], [split, rows, 16])
    lanes = [[0, 0], [0, 0], *([0, wide * bit] for bit in g)]
    scales = gl.DistributedLinearLayout([[0, bit] for bit in inner], lanes, [[bit, 0] for bit in warps], [], [split, block])
    return {"WORD_LAYOUT": words, "X_LAYOUT": x, "SCALE_LAYOUT": scales}


def _bits(size: int) -> list[int]:
    return [1 << bit for bit in range((size - 1).bit_length())]


def w4a16_products_launch(rows: int, inputs: int, outputs: int, group: int, device: Device) -> Launch:
    """`w4a16_products_kernel` for [rows, inputs].

    Args:
        rows: at most 32.
        group: inputs that share a scale; `inputs` where a column has one.
    """
    tile_rows, blocks = max(8, power_of_2(rows)), inputs // INPUTS_A_STEP
    # Of 32 columns a row of words is a whole line of memory; 16 where there would be fewer programs than multiprocessors. The warps of a
    # program have up to 4 blocks each under way: with more warps and fewer blocks 4096 x 4096 is slower on an H100 (10.8 and 8.2 us).
    block = 32 if -(-outputs // 32) >= 0.9 * device.cores else 16
    split = 8 if blocks > 16 else 4 if blocks > 4 else power_of_2(blocks)
    ahead = min(4 if tile_rows == 8 else 2, -(-blocks // split))
    constants = {"INPUTS": inputs, "OUTPUTS": outputs, "GROUP": group, "ROWS": tile_rows, "SPLIT": split, "BLOCK": block, "AHEAD": ahead}
    return Launch(w4a16_products_kernel, -(-outputs // block), constants | _layouts(split, block, tile_rows), {"num_warps": split})
