"""Numbers inside kernels: formats of the KV cache, matrix products, the project's FMA.

`fma` is written where an addition follows a product, so that no compiler chooses whether to fuse
them, and two kernels with the same arithmetic have the same bits.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
"""Kernels run on a CPU. There `tl.dot` of bf16 is garbage (seen in Triton 3.6.0 to 3.9.0), and that of
f32 is a BLAS' in which a row's bits depend on its place in the tile: in f64 they no longer show."""

_MAX_F16 = tl.constexpr(65504.0)
_MAX_BF16 = tl.constexpr(3.3895313892515355e38)
_MAX_F32 = tl.constexpr(3.4028234663852886e38)
_MAX_FP8 = tl.constexpr(448.0)
_MAX_INT8 = tl.constexpr(3.3761889516223275e38)  # 127 * 2^121


@triton.jit
def dot(a, b, acc):
    """acc + a b in f32: a and b of one dtype, of 16 bits for matrix instructions."""
    if INTERPRETED:
        wide = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return acc + wide.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def saturate(x, most):
    """x within -most .. most; NaN becomes -most, as in ops/api.py."""
    at_least = tl.where(x > -most, x, -most)
    return tl.where(at_least < most, at_least, most)


@triton.jit
def to_cache(x, KIND: tl.constexpr):
    """f32 as a cache of floats holds it: to nearest even, saturating; "fp8" is e4m3 as bits (u8)."""
    if KIND == "f16":
        return saturate(x, _MAX_F16).to(tl.float16)
    elif KIND == "bf16":
        return saturate(x, _MAX_BF16).to(tl.bfloat16)
    elif KIND == "fp8":
        return _to_e4m3(saturate(x, _MAX_FP8))
    else:
        return saturate(x, _MAX_F32)


@triton.jit
def to_int8(x, largest):
    """Codes (i8) of f32 x, and their scale, where `largest` [.., 1] is the largest |x| of each
    vector after `saturate_int8`."""
    live = largest >= 1e-30
    inverse = tl.where(live, 127.0 / tl.where(live, largest, 1.0), 0.0)
    scale = tl.where(live, largest / 127.0, 0.0)
    return round_even(x * inverse).to(tl.int8), scale


@triton.jit
def row_codes(x):
    """Codes (i8) of rows f32 [R, N], and scales [R, 1], the largest |x| / 127: of W8A8's activations."""
    scale, inverse = row_scale(tl.max(tl.abs(x), 1)[:, None])
    return within_int8(x * inverse).to(tl.int8), scale


@triton.jit
def row_scale(largest):
    """The scale of a row with this largest |x|, and what its numbers are multiplied by for codes."""
    most = tl.minimum(largest, 3.4e38)
    none = most < 1e-30
    scale = tl.where(none, 0.0, most / 127)
    return scale, tl.where(none, 0.0, 127 / tl.maximum(most, 1e-30))


@triton.jit
def within_int8(x):
    """To the nearest whole number, of two the even one, at most 127."""
    return tl.minimum(tl.maximum(round_even(x), -127.0), 127.0)


@triton.jit
def saturate_int8(x, count):
    """What `to_int8` may be given, where a scale is divided by `count` later."""
    return saturate(x, _MAX_INT8 / count)


@triton.jit
def round_even(x):
    """To the nearest whole number, of two the even one; |x| below 2^22."""
    magic: tl.constexpr = 12582912.0  # 1.5 * 2^23
    return (x + magic) - magic


@triton.jit
def keys_of(x):
    """i32 that order as f32 x do; 0 and -0 are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_e4m3(bits):
    """u8 -> f16, exact: the exponent's bias is 8 less there, so the bits stand for 2^-8 of it."""
    wide = bits.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _to_e4m3(x):
    """f32 of at most 448 -> u8. Below 2^-6 numbers lie 2^-9 apart."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # 120 exponents of 8 mantissas
    small = round_even(tl.abs(x) * 512.0).to(tl.uint32)
    code = tl.where(tl.abs(x) < 0.015625, small, normal)
    return (code | ((bits >> 31) << 7)).to(tl.uint8)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """f32 as another float, to nearest even: a plain conversion to bf16 cuts bits off where kernels
    are interpreted (seen in Triton 3.9.0)."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
