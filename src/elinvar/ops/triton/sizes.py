"""Matrices on a GPU (matrices.py, weights.py), told where there is none: no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from elinvar.ops.layout import GROUP, QUANTISED, WeightKind

Floats = Literal["f32", "bf16", "f16"]

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


def activations(matrices: Iterable[tuple[str, int]]) -> Floats:
    """In what a model computes whose matrices are of these kinds and bytes: in that of most, bf16 for
    those that are quantised. Matrices of floats come in it, too, but for f32."""
    sizes: dict[Floats, int] = {"f32": 0, "bf16": 0, "f16": 0}
    for kind, nbytes in matrices:
        sizes[kind if kind in ("f32", "f16") else "bf16"] += nbytes  # type: ignore[index]
    return max(sizes, key=lambda kind: sizes[kind])


def kind_there(kind: Any, floats: Floats) -> Any:
    """As what a matrix of this kind comes to a device that computes in `floats`."""
    return floats if kind in ("bf16", "f16") else kind


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What the experts of a layer are."""

    kind: Any
    """Of gates above ups."""
    down_kind: Any
    count: int
    top: int
    """Of a token."""
    dim: int
    ff_dim: int

    @property
    def names(self) -> tuple[str, str]:
        """Of gates above ups, and of downs, in the table (tuned.name)."""
        e, d, f = self.count, self.dim, self.ff_dim
        return f"experts/{e}/{self.kind}/{2 * f}x{d}", f"experts/{e}/{self.down_kind}/{d}x{f}"
