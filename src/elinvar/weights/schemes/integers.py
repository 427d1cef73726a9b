"""Integers: matrices of 2, 4 or 8-bit codes with a scale and a zero a group of columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError
from elinvar.ops.layout import GROUP, StoredParts, WeightKind
from elinvar.weights.quants import Codes, requantize
from elinvar.weights.schemes.base import F32, U8, Matrix, Rows, as_f32, elements, finite
from elinvar.weights.tensor import HostTensor

I16 = NDArray[np.int16]


@dataclass(slots=True, eq=False)
class Integers(Matrix):
    """w = scale * (code - zero), where column k takes the scale and the zero number groups[k].

    Codes of 4 bits keep their width: scale and min = -zero * scale are rounded to f16. Codes of 8
    bits become code - zero with the scale rounded to f16; a group where that leaves -127..127 is
    requantised. Where neighbouring columns belong to other groups (GPTQ's act-order) all of it is.
    What is meant for activations of int8, a symmetric scale a row, products may take as it is.
    """

    bits: int
    scale: HostTensor
    all_codes: Callable[[Rows], U8]
    """[n, K] from 0 up."""
    all_scales: Callable[[Rows], F32]
    """[n, S]"""
    all_zeros: Callable[[Rows], I16]
    """[n, S]"""
    groups: Callable[[], NDArray[np.int64]]
    """[K]"""
    symmetric: Callable[[], bool]
    """Whether every zero is half the range: then mins are exact."""
    by_int8: bool = False
    """Whether the file has it multiplied by activations of int8, and a scale for no less than a row."""

    def stored_kind(self) -> WeightKind | None:
        return "int8" if self.by_int8 and self.symmetric() else None

    def stored_parts(self, rows: Rows) -> StoredParts:
        return {"codes": self.all_codes(rows) ^ np.uint8(128), "factors": self._scales(rows)}

    def plan(self) -> tuple[WeightKind, str]:
        if self._group_of_32() is None:
            return "q8", "act-order, requantised"
        rounded = [] if self.scale.dtype == "F16" else ["scales"]
        if self.bits > 4:
            loss = [f"{what} rounded to f16" for what in rounded]
            return "q8", ", ".join([*loss, "groups beyond ±127 requantised"])
        if not self.symmetric():
            rounded.append("mins")
        return "q4", f"{' and '.join(rounded)} rounded to f16" if rounded else ""

    def codes(self, rows: Rows) -> Codes:
        group = self._group_of_32()
        if group is None:
            return self.requantized(rows)
        codes = self.all_codes(rows)
        scales = self._scales(rows)[:, group].astype(np.float16)
        zeros = self.all_zeros(rows)[:, group]
        if self.bits <= 4:
            # From the scale as rounded, so that a code that equals its zero stays near nothing.
            mins = (-scales.astype(np.float32) * zeros).astype(np.float16)
            return Codes("q4", codes, scales, mins)
        values = codes.reshape(len(rows), -1, GROUP) - zeros[:, :, None]
        beyond = (np.abs(values) > 127).any(axis=2)
        if beyond.any():
            exact = self._scales(rows)[:, group][beyond][:, None] * values[beyond]
            values[beyond], scales[beyond] = requantize(exact)
        return Codes("q8", values.astype(np.int8).reshape(codes.shape), scales)

    def dequantize(self, rows: Rows) -> F32:
        groups = self.groups()
        values = self.all_codes(rows) - self.all_zeros(rows)[:, groups]
        return self._scales(rows)[:, groups] * values.astype(np.float32)

    def _scales(self, rows: Rows) -> F32:
        return finite(self.scale, self.all_scales(rows))

    def _group_of_32(self) -> NDArray[np.int64] | None:
        """The group of each 32 columns, [K / 32]; None where some 32 columns have several."""
        groups = self.groups().reshape(-1, GROUP)
        return groups[:, 0] if (groups == groups[:, :1]).all() else None


def even_groups(k: int, size: int) -> Callable[[], NDArray[np.int64]]:
    """Groups of `size` neighbouring columns."""
    return lambda: np.arange(k) // size


def columns(tensor: HostTensor) -> Callable[[Rows], F32]:
    """Scales that lie as [S, N]."""
    return lambda rows: as_f32(tensor.dtype, elements(tensor).T[rows])


def rows_of(tensor: HostTensor, num_rows: int) -> Callable[[Rows], F32]:
    """Scales that lie as [N, S]; also [N], or one for the whole matrix."""

    def scales(rows: Rows) -> F32:
        stored = elements(tensor).reshape(-1)
        if stored.size == 1:
            return np.broadcast_to(as_f32(tensor.dtype, stored), (len(rows), 1))
        return as_f32(tensor.dtype, stored.reshape(num_rows, -1)[rows])

    return scales


def constant(zero: int, num_scales: int) -> Callable[[Rows], I16]:
    """The same zero for all."""
    return lambda rows: np.broadcast_to(np.int16(zero), (len(rows), num_scales))


def across(
    tensor: HostTensor, bits: int, order: Sequence[int] = (), rows_first: bool = False
) -> Callable[[Rows], U8]:
    """Codes packed along the rows of w, as [*, N / c] or (rows_first) [N / c, *]: gives [n, *].

    `order` says where in its word a row's code lies, by the row's number modulo c."""
    each = 32 // bits
    shifts = np.array(order or range(each), np.uint32) * np.uint32(bits)

    def codes(rows: Rows) -> U8:
        words = elements(tensor) if rows_first else elements(tensor).T
        shifted = words[rows // each] >> shifts[rows % each, None]
        return (shifted & np.uint32((1 << bits) - 1)).astype(np.uint8)

    return codes


def listed_groups(g_idx: HostTensor, num_groups: int) -> Callable[[], NDArray[np.int64]]:
    """The group of each column as the file lists it."""

    def groups() -> NDArray[np.int64]:
        listed: NDArray[np.int64] = elements(g_idx).astype(np.int64)
        if listed.max() >= num_groups:
            raise ModelError(
                f"Tensor {g_idx.name} names the group {listed.max()}, and there are {num_groups}; "
                "the file is corrupt, download it again."
            )
        return listed

    return groups


def unpack_words(words: NDArray[np.uint32], bits: int) -> U8:
    """[..., W] -> [..., W * 32 / bits], the lowest bits of each word first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)


def all_equal(words: NDArray[Any], code: int, bits: int) -> bool:
    """Whether every code of `bits` bits in these words is `code`."""
    word = sum(code << shift for shift in range(0, 32, bits))
    return bool((words == np.uint32(word)).all())
