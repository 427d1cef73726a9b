"""Inside kernels: tiles of matrices as numbers, and the one loop over K that every product has.

A tile of y is made transposed, [BLOCK_N, BLOCK_M] = w [BLOCK_N, K] x^T [K, BLOCK_M]: the outputs
take the side of which a wgmma has 64, the rows the side that may be 8 to 256. So tensor cores run the
same instruction (k 16) with a tile of 16 rows, for decoding, as with one of 128; what dequantises w
keeps it in registers, from where a wgmma may take that side; and no row is padded to 64.

Columns and rows beyond the end are clamped, so loads need no mask there; stores have one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elinvar.ops.triton.numbers import INTERPRETED, dot, narrow

BAND = tl.constexpr(8)


@triton.jit
def place(index, tiles_m, tiles_n):
    """Which tile a program makes -> (row tile, column tile): in bands of 8 row tiles, rows first,
    so that programs that run at one time share rows and columns in the L2 cache."""
    first = index // (BAND * tiles_n) * BAND
    height = tl.minimum(tiles_m - first, BAND)
    inside = index % (BAND * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def inputs(x, rows_M, first, K: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """x^T [COUNT, BLOCK_M] from dim `first` on; rows_M: where each row begins."""
    ks = first + tl.arange(0, COUNT)
    at = x + rows_M[None, :] + ks[:, None]
    return tl.load(at) if EVEN else tl.load(at, mask=ks[:, None] < K, other=0)


@triton.jit
def half(word, PLACE: tl.constexpr):
    """The f16 in the low (0) or high (1) half of a word, as f32."""
    return (word >> (16 * PLACE)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def nibbles(byte, PTX: tl.constexpr):
    """128 + the low and 128 + the high four bits -> two f32 with the bits in their mantissas:
    conversions of integers are slow. PTX: one instruction a byte takes it there."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            and.b32 low, $8, 0x0f0f0f0f;
            shr.u32 high, $8, 4;
            and.b32 high, high, 0x0f0f0f0f;
            prmt.b32 $0, low, 0x43, 0x4055;
            prmt.b32 $1, low, 0x43, 0x4155;
            prmt.b32 $2, low, 0x43, 0x4255;
            prmt.b32 $3, low, 0x43, 0x4355;
            prmt.b32 $4, high, 0x43, 0x4055;
            prmt.b32 $5, high, 0x43, 0x4155;
            prmt.b32 $6, high, 0x43, 0x4255;
            prmt.b32 $7, high, 0x43, 0x4355;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [byte],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((byte & 15).to(tl.uint32) << 16) | 0x43000000
        high = ((byte >> 4).to(tl.uint32) << 16) | 0x43000000
        return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def signed(code, scale, PTX: tl.constexpr):
    """scale * a code of int8 -> f32, exact: by the mantissa of 2^15 + 128 + code, as above."""
    if INTERPRETED:  # whose fma rounds twice (seen in Triton 3.6.0)
        return code.to(tl.float32) * scale
    if PTX:
        number = tl.inline_asm_elementwise(
            """{
            .reg .b32 byte;
            xor.b32 byte, $4, 0x80808080;
            prmt.b32 $0, byte, 0x47, 0x4505;
            prmt.b32 $1, byte, 0x47, 0x4515;
            prmt.b32 $2, byte, 0x47, 0x4525;
            prmt.b32 $3, byte, 0x47, 0x4535;
            }""",
            "=r,=r,=r,=r,r",
            [code],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        bits = ((code.to(tl.int32) + 128) << 8) | 0x47000000
        number = bits.to(tl.float32, bitcast=True)
    return tl.fma(number, scale, -32896 * scale)


@triton.jit
def with_fifth(number, word, j):
    """128 + a code of five bits, of which `number` has four and bit j of the word is the last."""
    bits = number.to(tl.int32, bitcast=True) | (((word >> j) & 1) << 20)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def affine(number, word):
    """scale * code + least of 128 + code; the sum is exact, or the last bits of a least below
    scale / 64 are lost."""
    scale = half(word, 0)
    return tl.fma(number, scale, half(word, 1) - 128 * scale)


@triton.jit
def e4m3(code):
    """A byte as the float of 4 exponent bits -> f32. Its bits lie in those of an f32 that is 2^120
    too small, subnormals too. No NaN: weights have none."""
    bits = ((code & 0x80).to(tl.uint32) << 24) | ((code & 0x7F).to(tl.uint32) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.3292279957849159e36  # 2^120


@triton.jit
def e2m1(code):
    """Four bits as a float -> f32, in the same way: 2^126 too small."""
    bits = ((code & 8).to(tl.uint32) << 28) | ((code & 7).to(tl.uint32) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def e8m0(word, place):
    """The power of two in byte `place` of a word -> f32; 2^-127 is a subnormal."""
    exponent = (word >> (8 * place)) & 0xFF
    bits = tl.where(exponent == 0, 0x400000, exponent << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def pair(
    codes, scales, extra, index, columns_N, N: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr
):
    """Two tiles [BLOCK_N, 32] of a packed matrix, f32: dims 64 index .. + 31 and + 32 .. + 63. How
    they are stored: matrices.py."""
    j = tl.arange(0, 32)
    row = tl.cast(index, tl.int64) * N
    if KIND == "q8":
        at = codes + row * 64 + columns_N[:, None] * 64 + j[None, :]
        word = tl.load(scales + row + columns_N)[:, None]
        first = signed(tl.load(at), half(word, 0), PTX)
        second = signed(tl.load(at + 32), half(word, 1), PTX)
    else:
        both = tl.load(codes + row * 32 + columns_N[:, None] * 32 + j[None, :])
        if KIND == "mxfp4":
            word = tl.load(scales + tl.cast(index // 2, tl.int64) * N + columns_N)[:, None]
            place = index % 2 * 2
            first = e2m1(both) * e8m0(word, place)
            second = e2m1(both >> 4) * e8m0(word, place + 1)
        elif KIND == "nvfp4":
            word = tl.load(scales + row + columns_N)[:, None]
            low = j[None, :] < 16
            first = e2m1(both) * tl.where(low, e4m3(word), e4m3(word >> 8))
            second = e2m1(both >> 4) * tl.where(low, e4m3(word >> 16), e4m3(word >> 24))
        else:
            first, second = nibbles(both, PTX)
            if KIND == "q5":
                first = with_fifth(first, tl.load(extra + row * 2 + columns_N)[:, None], j[None, :])
                word = tl.load(extra + row * 2 + N + columns_N)[:, None]
                second = with_fifth(second, word, j[None, :])
            first = affine(first, tl.load(scales + row * 2 + columns_N)[:, None])
            second = affine(second, tl.load(scales + row * 2 + N + columns_N)[:, None])
    return first, second


@triton.jit
def wide(codes, scales, columns_N, first, K: tl.constexpr, KIND: tl.constexpr,
         COUNT: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """A tile [BLOCK_N, COUNT] of a matrix stored by rows, COUNT at most 128."""
    ks = first + tl.arange(0, COUNT)
    at = codes + columns_N[:, None].to(tl.int64) * K + ks[None, :]
    w = tl.load(at) if EVEN else tl.load(at, mask=ks[None, :] < K, other=0)
    if KIND == "fp8":
        w = e4m3(w)
        if scales is not None:
            blocks: tl.constexpr = (K + 127) // 128
            w *= tl.load(scales + columns_N // 128 * blocks + first // 128)[:, None]
    return w


@triton.jit
def walk(codes, scales, extra, columns_N, x, rows_M, first, last,
         N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr,
         BLOCK_K: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """sum over the turns first .. last - 1 of BLOCK_K dims each, ascending -> [BLOCK_N, BLOCK_M].

    w is rounded to the dtype of x first (an f32 matrix, a router, has x rounded to its own): a
    quantised product has the bits of the dense one of what its codes stand for."""
    SHAPE: tl.constexpr = (columns_N.shape[0], rows_M.shape[0])
    acc = tl.zeros(SHAPE, tl.int32 if KIND == "int8" else tl.float32)
    EVEN: tl.constexpr = K % BLOCK_K == 0
    for turn in range(first, last):
        if PACKED:
            for i in tl.static_range(BLOCK_K // 64):
                index = turn * (BLOCK_K // 64) + i
                w0, w1 = pair(codes, scales, extra, index, columns_N, N, KIND, PTX)
                x0 = inputs(x, rows_M, index * 64, K, 32, EVEN)
                acc = dot(narrow(w0, x0.dtype), x0, acc)
                x1 = inputs(x, rows_M, index * 64 + 32, K, 32, EVEN)
                acc = dot(narrow(w1, x1.dtype), x1, acc)
        else:
            w = wide(codes, scales, columns_N, turn * BLOCK_K, K, KIND, BLOCK_K, EVEN)
            xs = inputs(x, rows_M, turn * BLOCK_K, K, BLOCK_K, EVEN)
            if KIND == "f32":
                acc = dot(w, xs.to(tl.float32), acc)
            elif KIND == "int8":
                acc = tl.dot(w, xs, acc, out_dtype=tl.int32)
            else:
                acc = dot(narrow(w.to(tl.float32), xs.dtype), xs, acc)
    return acc.to(tl.float32)


@triton.jit
def product(codes, scales, extra, columns_N, x, rows_M,
            N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr,
            BLOCK_K: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """The whole of K by one program: the sums of its parts, added in ascending order."""
    turns: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if PARTS == 1:
        return walk(codes, scales, extra, columns_N, x, rows_M, 0, turns,
                    N, K, KIND, PACKED, BLOCK_K, PTX)  # fmt: skip
    acc = tl.zeros((columns_N.shape[0], rows_M.shape[0]), tl.float32)
    for part in range(PARTS):
        acc += one_part(codes, scales, extra, columns_N, x, rows_M, part,
                        N, K, KIND, PACKED, BLOCK_K, PARTS, PTX)  # fmt: skip
    return acc


@triton.jit
def one_part(codes, scales, extra, columns_N, x, rows_M, part,
             N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr,
             BLOCK_K: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    turns: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    length: tl.constexpr = (turns + PARTS - 1) // PARTS
    return walk(codes, scales, extra, columns_N, x, rows_M,
                part * length, tl.minimum(part * length + length, turns),
                N, K, KIND, PACKED, BLOCK_K, PTX)  # fmt: skip
