"""Inside kernels: what codes stand for, with as few instructions as it takes: a product of few rows with
a packed matrix is bound by them.

The pieces of PTX take two bytes at once, as a thread has them beside one another in the registers of a
wgmma. Without (AMD, the interpreter) the same numbers are made by what Triton has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elinvar.ops.triton.numbers import INTERPRETED, narrow

NIBBLES = tl.constexpr("""{
.reg .b32 low, high;
and.b32 low, $4, 0x0f0f;
shr.u32 high, $4, 4;
and.b32 high, high, 0x0f0f;
prmt.b32 $0, low, 0x43, 0x4055;
prmt.b32 $1, low, 0x43, 0x4155;
prmt.b32 $2, high, 0x43, 0x4055;
prmt.b32 $3, high, 0x43, 0x4155;
}""")
SIGNED = tl.constexpr("""{
.reg .b32 byte;
xor.b32 byte, $2, 0x8080;
prmt.b32 $0, byte, 0x47, 0x4505;
prmt.b32 $1, byte, 0x47, 0x4515;
}""")
E4M3 = tl.constexpr("""{
.reg .b32 both, signs, scale, none;
mov.b32 scale, 0x7b807b80;
mov.b32 none, 0x80008000;
prmt.b32 both, $1, 0, 0x1404;
and.b32 signs, both, none;
shr.u32 both, both, 4;
and.b32 both, both, 0x07f007f0;
or.b32 both, both, signs;
fma.rn.bf16x2 $0, both, scale, none;
}""")
E2M1 = tl.constexpr("""{
.reg .b32 both, signs, bits, scale, none;
mov.b32 scale, 0x7e807e80;
mov.b32 none, 0x80008000;
prmt.b32 both, $2, 0, 0x1404;
shl.b32 signs, both, 4;
and.b32 signs, signs, none;
shr.u32 bits, both, 2;
and.b32 bits, bits, 0x01c001c0;
or.b32 bits, bits, signs;
fma.rn.bf16x2 $0, bits, scale, none;
and.b32 signs, both, none;
shr.u32 bits, both, 6;
and.b32 bits, bits, 0x01c001c0;
or.b32 bits, bits, signs;
fma.rn.bf16x2 $1, bits, scale, none;
}""")


@triton.jit
def half(word, PLACE: tl.constexpr):
    """The f16 in the low (0) or high (1) half of a word, as f32."""
    return (word >> (16 * PLACE)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def nibbles(byte, PTX: tl.constexpr):
    """128 + the low and 128 + the high four bits -> two f32 with the bits in their mantissas:
    conversions of integers are slow."""
    if PTX:
        return tl.inline_asm_elementwise(
            NIBBLES,
            "=r,=r,=r,=r,r",
            [byte],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=2,
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
            SIGNED,
            "=r,=r,r",
            [code],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
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
def e4m3_tile(code, PTX: tl.constexpr):
    """The same of a tile, bf16 with PTX: two at once in the halves of a word."""
    if PTX:
        return tl.inline_asm_elementwise(
            E4M3,
            "=r,r",
            [code],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return e4m3(code)


@triton.jit
def e2m1(code):
    """The low four bits as a float -> f32, in the same way: 2^126 too small."""
    bits = ((code & 8).to(tl.uint32) << 28) | ((code & 7).to(tl.uint32) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def e2m1_tiles(both, PTX: tl.constexpr):
    """Those of the low and of the high four bits -> two tiles, bf16 with PTX. Times a scale of theirs
    they are exact in bf16, too."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            E2M1,
            "=r,=r,r",
            [both],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
        return low, high
    else:
        return e2m1(both), e2m1(both >> 4)


@triton.jit
def e8m0(word, place):
    """The power of two in byte `place` of a word -> f32; 2^-127 is a subnormal."""
    exponent = (word >> (8 * place)) & 0xFF
    bits = tl.where(exponent == 0, 0x400000, exponent << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_inputs(w, DTYPE: tl.constexpr):
    if w.dtype == DTYPE:
        return w
    else:
        return narrow(w.to(tl.float32), DTYPE)
