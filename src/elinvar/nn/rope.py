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

from elinvar.base.config import RopeConfig, YarnConfig

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

MAX_POSITIONS = 1 << 20
"""Up to here n * _PI_2[i] below is exact."""

_FIRST_POSITIONS = 512
_PRECISE = decimal.Context(prec=40)

# pi/2 in three parts (Cody and Waite, 1980). The first two have 33 and 32 significant bits, so
# that n < 2**20 times a part is exact, and so is the first subtraction.
_PI_2 = (
    float.fromhex("0x1.921fb544p+0"),
    float.fromhex("0x1.0b4611a6p-34"),
    float.fromhex("0x1.3198a2e037073p-69"),
)
_2_PI = 2 / math.pi
_PI = decimal.Decimal("3.141592653589793238462643383279502884197")

# Taylor coefficients in r^2; on |r| <= pi/4 the first term left out is below 5e-17.
_SIN = [(-1.0) ** i / math.factorial(2 * i + 1) for i in range(8)]
_COS = [(-1.0) ** i / math.factorial(2 * i) for i in range(9)]


class RopeTable:
    """The table of one RopeConfig, grown by doubling as positions are asked for."""

    def __init__(self, config: RopeConfig) -> None:
        self._inv_freq_F = inverse_frequencies(config)
        self._factor = np.float32(config.attention_factor)
        self._table_PD = np.empty((0, config.dim), np.float32)

    def upto(self, num_positions: int) -> F32:
        """f32 [P, D], P >= num_positions: cosines in the first half of D, sines in the second,
        times the attention factor.

        Rows never change when the table grows. num_positions is at most MAX_POSITIONS.
        """
        have = len(self._table_PD)
        if num_positions > have:
            want = max(_FIRST_POSITIONS, 2 * have, num_positions)
            positions_P = np.arange(have, want, dtype=np.float32)
            angles_PF = positions_P[:, None] * self._inv_freq_F
            more_PD = _cos_sin(angles_PF) * self._factor
            self._table_PD = np.concatenate([self._table_PD, more_PD])
        return self._table_PD


def inverse_frequencies(config: RopeConfig) -> F32:
    """f32 [F] of 1 / base ** (2 i / D), scaled as the config says.

    The power is taken in decimal arithmetic, which is software and so equal on every machine.
    """
    with decimal.localcontext(_PRECISE):
        base = decimal.Decimal(config.base)
        powers_F = np.array(
            [base ** (decimal.Decimal(2 * i) / config.dim) for i in range(config.dim // 2)],
            np.float64,
        ).astype(np.float32)
    if config.yarn is not None:
        return _yarn(powers_F, config.base, config.dim, config.yarn)
    inv_freq = (np.float32(1) / powers_F).astype(np.float64)
    if config.llama3 is not None:
        inv_freq = np.array([_llama3(f, *config.llama3) for f in inv_freq.tolist()])
    inv_freq /= config.factor
    if config.divisors is not None:
        inv_freq /= np.array(config.divisors)
    return inv_freq.astype(np.float32)


def _llama3(freq: float, factor: float, low: float, high: float, original_context: int) -> float:
    """Llama 3.1's scaling: frequencies that turn fewer than `low` times in the original context
    are divided by `factor`, those that turn `high` times or more stay, between is a blend."""
    turns = original_context * freq / (2 * math.pi)
    if turns < low:
        return freq / factor
    if turns >= high:
        return freq
    blend = (turns - low) / (high - low)
    return (1 - blend) * freq / factor + blend * freq


def _yarn(powers_F: F32, base: float, dim: int, yarn: YarnConfig) -> F32:
    """YaRN's blend, rounded to float32 at each step as in transformers."""
    one = np.float32(1)
    kept_F, divided_F = one / powers_F, one / (np.float32(yarn.factor) * powers_F)
    with decimal.localcontext(_PRECISE):
        # The index (a fraction) of the frequency that turns so often in the original context.
        low, high = (
            dim
            * (yarn.original_context / (decimal.Decimal(turns) * 2 * _PI)).ln()
            / (2 * decimal.Decimal(base).ln())
            for turns in (yarn.beta_fast, yarn.beta_slow)
        )
        if yarn.truncate:
            low, high = decimal.Decimal(math.floor(low)), decimal.Decimal(math.ceil(high))
    first, last = max(float(low), 0.0), min(float(high), dim - 1.0)
    if first == last:
        last += 0.001
    index_F = np.arange(dim // 2, dtype=np.float32)
    ramp_F = ((index_F - np.float32(first)) / np.float32(last - first)).clip(0, 1)
    keep_F = one - ramp_F
    return divided_F * (one - keep_F) + kept_F * keep_F


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on attention for a context `factor` times the original."""
    return 1.0 if factor <= 1 else 0.1 * mscale * ln(factor) + 1.0


def ln(x: float) -> float:
    """The natural logarithm, the same on every machine."""
    return float(decimal.Decimal(x).ln(_PRECISE))


def power(x: float, y: float) -> float:
    """x ** y, the same on every machine."""
    with decimal.localcontext(_PRECISE):
        return float(decimal.Decimal(x) ** decimal.Decimal(y))


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
