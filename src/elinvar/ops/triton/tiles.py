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

from elinvar.ops.triton.decoding import (
    affine,
    as_inputs,
    e2m1_tiles,
    e4m3,
    e4m3_tile,
    e8m0,
    half,
    nibbles,
    signed,
    with_fifth,
)
from elinvar.ops.triton.numbers import dot

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
            first, second = e2m1_tiles(both, PTX)
            first *= e8m0(word, place).to(first.dtype)
            second *= e8m0(word, place + 1).to(first.dtype)
        elif KIND == "nvfp4":
            word = tl.load(scales + row + columns_N)[:, None]
            low = j[None, :] < 16
            first, second = e2m1_tiles(both, PTX)
            low_scale, high_scale = e4m3(word).to(first.dtype), e4m3(word >> 8).to(first.dtype)
            first *= tl.where(low, low_scale, high_scale)
            low_scale, high_scale = (
                e4m3(word >> 16).to(first.dtype),
                e4m3(word >> 24).to(first.dtype),
            )
            second *= tl.where(low, low_scale, high_scale)
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
         COUNT: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """A tile [BLOCK_N, COUNT] of a matrix stored by rows, COUNT at most 128."""
    ks = first + tl.arange(0, COUNT)
    at = codes + columns_N[:, None].to(tl.int64) * K + ks[None, :]
    w = tl.load(at) if EVEN else tl.load(at, mask=ks[None, :] < K, other=0)
    if KIND == "fp8" or KIND == "fp8-blocks":
        w = e4m3_tile(w, PTX)
    if KIND == "fp8-blocks":
        blocks: tl.constexpr = (K + 127) // 128
        scale = tl.load(scales + columns_N // 16 * blocks + first // 128)
        w = w.to(tl.float32) * scale[:, None]
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
                acc = dot(as_inputs(w0, x0.dtype), x0, acc)
                x1 = inputs(x, rows_M, index * 64 + 32, K, 32, EVEN)
                acc = dot(as_inputs(w1, x1.dtype), x1, acc)
        else:
            w = wide(codes, scales, columns_N, turn * BLOCK_K, K, KIND, BLOCK_K, EVEN, PTX)
            xs = inputs(x, rows_M, turn * BLOCK_K, K, BLOCK_K, EVEN)
            if KIND == "f32":
                acc = dot(w, xs.to(tl.float32), acc)
            elif KIND == "int8":
                acc = tl.dot(w, xs, acc, out_dtype=tl.int32)
            else:
                acc = dot(as_inputs(w, xs.dtype), xs, acc)
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
