"""RopeTable: cosines and sines of the rotary embedding (Su et al., 2021), the same bits everywhere.

libm's cos and sin differ between machines in the last bit, and the sampled tokens must not. So
the table comes from IEEE add, subtract, multiply and round alone: elementwise numpy ufuncs round
correctly and are never contracted to FMA. Frequencies and angles are rounded to float32 where
models in float32 round them (transformers, vLLM): models were trained with those angles.

Legend: P positions, D rotary dim, F = D / 2 frequencies.
"""

from __future__ import annotations

import decimal
import math

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import RopeConfig

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

MAX_POSITIONS = 1 << 20
"""Up to here n * _PI_2[i] below is exact."""

_FIRST_POSITIONS = 512

# pi/2 in three parts (Cody and Waite, 1980). The first two have 33 and 32 significant bits, so
# that n < 2**20 times a part is exact, and so is the first subtraction.
_PI_2 = (
    float.fromhex("0x1.921fb544p+0"),
    float.fromhex("0x1.0b4611a6p-34"),
    float.fromhex("0x1.3198a2e037073p-69"),
)
_2_PI = 2 / math.pi

# Taylor coefficients in r^2; on |r| <= pi/4 the first term left out is below 5e-17.
_SIN = [(-1.0) ** i / math.factorial(2 * i + 1) for i in range(8)]
_COS = [(-1.0) ** i / math.factorial(2 * i) for i in range(9)]


class RopeTable:
    """The table of one RopeConfig, grown by doubling as positions are asked for."""

    def __init__(self, config: RopeConfig) -> None:
        self._inv_freq_F = inverse_frequencies(config)
        self._table_PD = np.empty((0, config.dim), np.float32)

    def upto(self, num_positions: int) -> F32:
        """f32 [P, D], P >= num_positions: cosines in the first half of D, sines in the second.

        Rows never change when the table grows. num_positions is at most MAX_POSITIONS.
        """
        have = len(self._table_PD)
        if num_positions > have:
            want = max(_FIRST_POSITIONS, 2 * have, num_positions)
            positions_P = np.arange(have, want, dtype=np.float32)
            angles_PF = positions_P[:, None] * self._inv_freq_F
            grown = np.concatenate([self._table_PD, _cos_sin(angles_PF)])
            self._table_PD = grown
        return self._table_PD


def inverse_frequencies(config: RopeConfig) -> F32:
    """f32 [F] of 1 / base ** (2 i / D), scaled as the config says.

    The power is taken in decimal arithmetic, which is software and so equal on every machine.
    """
    with decimal.localcontext() as context:
        context.prec = 40
        base = decimal.Decimal(config.base)
        powers = [
            float(base ** (decimal.Decimal(2 * i) / config.dim)) for i in range(config.dim // 2)
        ]
    inv_freq = (np.float32(1) / np.array(powers, np.float32)).astype(np.float64)
    if config.llama3 is not None:
        inv_freq = np.array([_llama3(f, *config.llama3) for f in inv_freq.tolist()])
    inv_freq /= config.factor
    if config.divisors is not None:
        inv_freq /= np.array(config.divisors)
    return inv_freq.astype(np.float32)


def _llama3(freq: float, factor: float, low: float, high: float, original_context: int) -> float:
    """Llama 3.1's scaling: frequencies that turn fewer than `low` times in the original context
    are divided by `factor`, those that turn more than `high` times stay, between is a blend."""
    turns = original_context * freq / (2 * math.pi)
    if turns < low:
        return freq / factor
    if turns > high:
        return freq
    blend = (turns - low) / (high - low)
    return (1 - blend) * freq / factor + blend * freq


def _cos_sin(angles: F32) -> F32:
    """[P, F] -> [P, 2F]: cos, then sin, within 1 ulp of the rounded true values."""
    x = angles.astype(np.float64)
    n = np.rint(x * _2_PI)
    r = ((x - n * _PI_2[0]) - n * _PI_2[1]) - n * _PI_2[2]
    r2 = r * r
    sin, cos = r * _horner(_SIN, r2), _horner(_COS, r2)
    quarter = n.astype(np.int64) & 3
    odd = (quarter & 1).astype(bool)
    sines = np.where(odd, cos, sin)
    cosines = np.where(odd, sin, cos)
    sines = np.where(quarter >= 2, -sines, sines)
    cosines = np.where((quarter == 1) | (quarter == 2), -cosines, cosines)
    return np.concatenate([cosines, sines], axis=1).astype(np.float32)


def _horner(coefficients: list[float], x: F64) -> F64:
    y = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y
