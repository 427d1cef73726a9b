"""GGML's I-quants, ternary blocks and MXFP4: blocks to codes, or to float32.

Each is written once, as whole-number codes with float32 factors that are exact; the tables at the
end say how the factors become the f16 scales (and mins) of codes that are packed. Block formats as
in ggml's ggml-common.h. Legend: B blocks of 256 (MXFP4: 32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.ops.layout import WeightKind
from elinvar.weights.blocks import F16, F32, IQ4_VALUES, U8, crumbs, f32, half, nibbles
from elinvar.weights.grids import grid

I8 = NDArray[np.int8]
Parts = tuple[I8, F32]
"""Signed codes [B, S, 256 / S] and a factor [B, S] for each run of them: w = factor * code."""

_EIGHT = np.arange(8, dtype=np.uint8)
_PARITY = np.array([bin(i).count("1") & 1 for i in range(128)], np.uint8)


def _words(blocks: U8, start: int, stop: int, dtype: str) -> NDArray[Any]:
    """Bytes start .. stop of each block as numbers: [B, *]."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(dtype)


def _signed(codes: I8, signs: U8) -> I8:
    """codes [B, *, 8] negated where the bits of signs [B, *] are set."""
    negative = (signs[..., None] >> _EIGHT) & np.uint8(1)
    return codes * (1 - 2 * negative.view(np.int8))


def _seven_signs(words: NDArray[np.uint32]) -> U8:
    """Four times seven sign bits of each word [B, S] -> [B, 4 S]; the eighth makes them even."""
    seven = (words[..., None] >> np.array([0, 7, 14, 21], np.uint32)).astype(np.uint8) & 127
    signs: U8 = seven | _PARITY[seven] << np.uint8(7)
    return signs.reshape(len(words), -1)


def _halves(packed: U8) -> U8:
    """[B, n] -> [B, 2n], the low half of each byte first."""
    return nibbles(packed[..., None]).reshape(len(packed), -1)


def _iq2_xxs(blocks: U8) -> Parts:
    words = _words(blocks, 2, 66, "<u4").reshape(-1, 8, 2)
    index = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    codes = _signed(grid("IQ2_XXS")[index], _seven_signs(words[..., 1]))
    factors = f32(half(blocks, 0)) * (np.float32(0.5) + (words[..., 1] >> 28).astype(np.float32))
    return codes.reshape(-1, 8, 32), factors * np.float32(0.25)


def _iq2_xs(blocks: U8) -> Parts:
    words = _words(blocks, 2, 66, "<u2")
    seven = (words >> 9).astype(np.uint8)
    codes = _signed(grid("IQ2_XS")[words & 511], seven | _PARITY[seven] << np.uint8(7))
    return codes.reshape(-1, 16, 16), _iq2_factors(blocks, 66)


def _iq2_s(blocks: U8) -> Parts:
    high = crumbs(blocks[:, 66:74, None]).reshape(-1, 32).astype(np.uint16)
    codes = _signed(grid("IQ2_S")[blocks[:, 2:34] | high << 8], blocks[:, 34:66])
    return codes.reshape(-1, 16, 16), _iq2_factors(blocks, 74)


def _iq2_factors(blocks: U8, at: int) -> F32:
    scales = np.float32(0.5) + _halves(blocks[:, at:]).astype(np.float32)
    return f32(half(blocks, 0)) * scales * np.float32(0.25)


def _iq3_xxs(blocks: U8) -> Parts:
    words = _words(blocks, 66, 98, "<u4")
    codes = _signed(_pairs("IQ3_XXS", blocks[:, 2:66]), _seven_signs(words))
    factors = f32(half(blocks, 0)) * (np.float32(0.5) + (words >> 28).astype(np.float32))
    return codes.reshape(-1, 8, 32), factors * np.float32(0.5)


def _iq3_s(blocks: U8) -> Parts:
    high = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
    codes = _signed(_pairs("IQ3_S", blocks[:, 2:66] | high << 8), blocks[:, 74:106])
    scales = 1 + 2 * _halves(blocks[:, 106:]).astype(np.float32)
    return codes.reshape(-1, 8, 32), f32(half(blocks, 0)) * scales


def _pairs(name: str, index: NDArray[Any]) -> I8:
    """Two rows of a grid of four are one of eight: [B, n] -> [B, n / 2, 8]."""
    return grid(name)[index].reshape(len(index), -1, 8)


def _iq1_s(blocks: U8) -> tuple[U8, F32, F32]:
    """Codes 0..2, factors and shifts of each 32: w = factor * (code - 1 + shift)."""
    high = _words(blocks, 34, 50, "<u2")
    index = blocks[:, 2:34] | (high[..., None] >> np.array([0, 3, 6, 9]) & 7).reshape(-1, 32) << 8
    factors = f32(half(blocks, 0)) * (2 * (high >> 12 & 7) + 1).astype(np.float32)
    shifts = np.where(high & 0x8000, np.float32(-0.125), np.float32(0.125))
    return (grid("IQ1_S")[index] + 1).view(np.uint8).reshape(-1, 8, 32), factors, shifts


def _iq1_m(blocks: U8) -> F32:
    scales = _words(blocks, 48, 56, "<u2")
    top = (scales >> 12) << np.array([0, 4, 8, 12], np.uint16)  # a nibble of the f16 in each
    d = f32(np.bitwise_or.reduce(top, axis=1).astype(np.uint16).view(np.float16))
    threes = (scales[..., None] >> np.array([0, 3, 6, 9]) & 7).reshape(-1, 16)
    high = _halves(blocks[:, 32:48]).astype(np.uint16)
    shifts = np.where(high & 8, np.float32(-0.125), np.float32(0.125))
    values = grid("IQ1_S")[blocks[:, :32] | (high & 7) << 8] + shifts[..., None]
    factors = d * (2 * threes + 1).astype(np.float32)
    return factors[..., None] * values.reshape(-1, 16, 16)


def _iq4_xs(blocks: U8) -> Parts:
    high = _words(blocks, 2, 4, "<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (_halves(blocks[:, 4:8]) | high.astype(np.uint8) << np.uint8(4)).view(np.int8) - 32
    codes = IQ4_VALUES[nibbles(blocks[:, 8:].reshape(-1, 8, 16))]
    return codes, f32(half(blocks, 0)) * scales.astype(np.float32)


def _tq1_0(blocks: U8) -> tuple[U8, F16]:
    """Five ternary digits a byte, as a fraction of 256: multiplied by three they come out."""

    def digits(packed: U8, count: int) -> U8:
        powers = np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]
        shifted = packed[:, None, :] * powers
        return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)

    parts = [digits(blocks[:, :32], 5), digits(blocks[:, 32:48], 5), digits(blocks[:, 48:52], 4)]
    return np.concatenate(parts, axis=1).reshape(-1, 8, 32), half(blocks, 52)


def _tq2_0(blocks: U8) -> tuple[U8, F16]:
    return crumbs(blocks[:, :64].reshape(-1, 2, 32)).reshape(-1, 8, 32), half(blocks, 64)


def _mxfp4(blocks: U8) -> Parts:
    """Doubled values; the scale is a power of two."""
    values = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
    codes = np.concatenate([values, -values])[nibbles(blocks[:, 1:])]
    return codes[:, None], np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)


# From these to what quants.py dispatches on.


def _dequantized(parts: Callable[[U8], Parts]) -> Callable[[U8], F32]:
    def values(blocks: U8) -> F32:
        codes, factors = parts(blocks)
        return factors[..., None] * codes.astype(np.float32)

    return values


def _rounded(parts: Callable[[U8], Parts]) -> Callable[[U8], tuple[I8, F16]]:
    def codes_scales(blocks: U8) -> tuple[I8, F16]:
        codes, factors = parts(blocks)
        return codes, factors.astype(np.float16)

    return codes_scales


def _iq1_s_values(blocks: U8) -> F32:
    codes, factors, shifts = _iq1_s(blocks)
    return factors[..., None] * (codes.astype(np.float32) - 1 + shifts[..., None])


def _iq1_s_codes(blocks: U8) -> tuple[U8, F16, F16]:
    codes, factors, shifts = _iq1_s(blocks)
    return codes, factors.astype(np.float16), (factors * (shifts - 1)).astype(np.float16)


def _ternary_values(ternary: Callable[[U8], tuple[U8, F16]]) -> Callable[[U8], F32]:
    def values(blocks: U8) -> F32:
        codes, d = ternary(blocks)
        return f32(f32(d)) * (codes.view(np.int8) - np.int8(1)).astype(np.float32)

    return values


def _ternary_codes(
    ternary: Callable[[U8], tuple[U8, F16]],
) -> Callable[[U8], tuple[U8, F16, F16]]:
    def codes_scales_mins(blocks: U8) -> tuple[U8, F16, F16]:
        codes, d = ternary(blocks)
        scales = np.repeat(d, 8)
        return codes, scales, -scales

    return codes_scales_mins


def _mxfp4_codes(blocks: U8) -> tuple[U8, F16, F16]:
    codes, factors = _mxfp4(blocks)
    scales = factors.astype(np.float16)
    return (codes + np.int8(12)).view(np.uint8), scales, scales * np.float16(-12)


MIN_CODES: dict[str, tuple[WeightKind, Callable[[U8], tuple[U8, F16, F16]]]] = {
    "IQ1_S": ("q4", _iq1_s_codes),
    "TQ1_0": ("q4", _ternary_codes(_tq1_0)),
    "TQ2_0": ("q4", _ternary_codes(_tq2_0)),
    "MXFP4": ("q5", _mxfp4_codes),
}
Q8_CODES: dict[str, Callable[[U8], tuple[I8, F16]]] = {
    "IQ2_XXS": _rounded(_iq2_xxs),
    "IQ3_XXS": _rounded(_iq3_xxs),
    "IQ3_S": _rounded(_iq3_s),
    "IQ4_XS": _rounded(_iq4_xs),
}
DEQUANTIZERS: dict[str, Callable[[U8], F32]] = {
    "IQ1_S": _iq1_s_values,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _dequantized(_iq2_xxs),
    "IQ2_XS": _dequantized(_iq2_xs),
    "IQ2_S": _dequantized(_iq2_s),
    "IQ3_XXS": _dequantized(_iq3_xxs),
    "IQ3_S": _dequantized(_iq3_s),
    "IQ4_XS": _dequantized(_iq4_xs),
    "TQ1_0": _ternary_values(_tq1_0),
    "TQ2_0": _ternary_values(_tq2_0),
    "MXFP4": _dequantized(_mxfp4),
}
EXACT = ("TQ1_0", "TQ2_0", "MXFP4")
