"""Formats of files that the products of some providers take as they are (`Ops.stored`): what their
codes stand for, and which scales are beside them. How they lie in memory: layout.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
StoredKind = Literal["fp8", "fp8-blocks", "int8", "mxfp4", "nvfp4"]


def _e4m3() -> F32:
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    values[127] = np.nan  # this variant has no infinities
    return np.concatenate([values, -values]).astype(np.float32)


def _e8m0() -> F32:
    values = np.ldexp(1.0, np.arange(256) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
TABLES: dict[str, F32] = {
    "F8_E4M3": _e4m3(),
    "F8_E5M2": (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32),
    "F8_E8M0": _e8m0(),
    "F4_E2M1": np.concatenate([_E2M1, -_E2M1]),
}
"""The values of the small float formats by their bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """w = number * scale of its group * factor of its row; what there is none of is 1."""

    numbers: F32
    """What each of 256 or 16 codes stands for."""
    group: int = 0
    """Inputs that share a scale; 0: there are none."""
    scales: F32 | None = None
    """What each byte of a scale stands for; None: scales are f32, one for the rows of a panel."""
    factors: bool = False
    """f32, one a row."""

    @property
    def in_byte(self) -> int:
        """Codes, the first one in the low half where they are two."""
        return 1 if len(self.numbers) == 256 else 2

    @property
    def by_panel(self) -> bool:
        """Whether a scale is of the rows of a panel, not of one."""
        return self.group > 0 and self.scales is None


_INT8 = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
STORED: dict[str, Stored] = {
    "fp8": Stored(TABLES["F8_E4M3"], factors=True),
    "fp8-blocks": Stored(TABLES["F8_E4M3"], 128),
    # Multiplied with activations that are rounded to int8, a scale a row, too.
    "int8": Stored(_INT8, factors=True),
    "mxfp4": Stored(TABLES["F4_E2M1"], 32, TABLES["F8_E8M0"]),
    "nvfp4": Stored(TABLES["F4_E2M1"], 16, TABLES["F8_E4M3"], factors=True),
}
