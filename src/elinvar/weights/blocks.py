"""Reading the fields of GGML's blocks. Legend: B blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]

IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
"""What the 4-bit codes of IQ4_NL and IQ4_XS stand for."""


def half(blocks: U8, at: int) -> F16:
    """The f16 at byte `at` of each block: [B]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0]


def f32(values: NDArray[Any]) -> F32:
    """[B] -> [B, 1] float32, to be multiplied with a block's codes."""
    return values.astype(np.float32)[..., None]


def nibbles(packed: U8) -> U8:
    """[..., n] -> [..., 2n]: all the low halves, then all the high ones."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def crumbs(packed: U8) -> U8:
    """[..., n] -> [..., 4, n] two bits each, the lowest first."""
    return (packed[..., None, :] >> np.array([[0], [2], [4], [6]], np.uint8)) & np.uint8(3)
