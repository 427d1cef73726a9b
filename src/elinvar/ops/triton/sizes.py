"""Bytes of matrices on a GPU (matrices.py), told where there is none: no torch."""

from __future__ import annotations

from elinvar.ops.layout import GROUP, QUANTISED, WeightKind

_PAD = 128
"""To which inputs of packed kinds are filled up."""
_GROUP_BYTES = {"q4": GROUP // 2 + 4, "q5": GROUP // 2 + 4 + 4, "q8": GROUP + 2}
"""Codes, then scales and mins, and q5's fifth bits."""


def matrix_bytes(kind: WeightKind, shape: tuple[int, int]) -> int:
    """Of what from_weight makes of a matrix of this kind, for activations of two bytes."""
    n, k = shape
    if kind in QUANTISED:
        return n * (-(-k // _PAD) * _PAD // GROUP) * _GROUP_BYTES[kind]
    return n * k * (4 if kind == "f32" else 2)
