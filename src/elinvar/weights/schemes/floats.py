"""Matrices of small floats: FP8 with scales of blocks, and the two kinds of FP4 with group scales.

FP8 and NVFP4 are requantised to int8 over groups of 32. MXFP4 is exact in five bits: twice its
values are whole numbers from -12 to 12, and its scales are powers of two, one for 32 columns. Where
products take them (ops.stored) all stay as they are, but for FP8 of e5m2 or of other blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elinvar.base.errors import ModelError
from elinvar.ops.layout import GROUP, PANEL, StoredParts, WeightKind
from elinvar.ops.stored import STORED, TABLES
from elinvar.weights.quants import Codes
from elinvar.weights.schemes.base import (
    F32,
    FLOATS,
    U8,
    Matrix,
    Parts,
    Requantised,
    Rows,
    as_f32,
    elements,
    finite,
    nibbles,
    rows_in,
)
from elinvar.weights.tensor import HostTensor

FP8 = ("F8_E4M3", "F8_E5M2")
_NVFP4_GROUP = 16


@dataclass(slots=True, eq=False)
class Fp8(Requantised):
    """w = scale * value, one scale for a block of rows and columns."""

    dtype: str
    bits: Callable[[Rows], U8]
    """[n, K]"""
    scale: HostTensor
    block: tuple[int, int]

    def dequantize(self, rows: Rows) -> F32:
        values = TABLES[self.dtype][self.bits(rows)]
        return values * self._scales(rows)[:, np.arange(self.shape[1]) // self.block[1]]

    def _scales(self, rows: Rows) -> F32:
        """A row's scales of its blocks."""
        columns = -(-self.shape[1] // self.block[1])
        grid = elements(self.scale).reshape(-1, columns)[rows // self.block[0]]
        return finite(self.scale, as_f32(self.scale.dtype, grid))

    def stored_kind(self) -> WeightKind | None:
        if self.dtype != "F8_E4M3":
            return None
        if self.block[1] >= self.shape[1]:
            return "fp8"
        return "fp8-blocks" if self.block[1] == STORED["fp8-blocks"].group else None

    def stored_parts(self, rows: Rows) -> StoredParts:
        codes = self.bits(rows)
        if (codes & 127 == 127).any():
            raise ModelError(
                f"Tensor {self.name} holds numbers that are not finite: the file is corrupt, "
                "download it again."
            )
        if self.stored_kind() == "fp8":
            return {"codes": codes, "factors": self._scales(rows)}
        return {"codes": codes, "scales": self._scales(rows[::PANEL])}

    def fits_panels(self, rows: Rows) -> bool:
        """In blocks: all are full, and of rows of one block."""
        if self.stored_kind() == "fp8":
            return True
        if len(rows) % PANEL:
            return False
        block = (rows // self.block[0]).reshape(-1, PANEL)
        return bool((block == block[:, :1]).all())


@dataclass(slots=True, eq=False)
class NvFp4(Requantised):
    """w = (scale of 16 columns * scale of the matrix) * value; some divide by the latter."""

    packed: HostTensor
    scale: HostTensor
    total: HostTensor
    divides: bool

    def dequantize(self, rows: Rows) -> F32:
        total = self._total()
        scales = finite(self.scale, TABLES["F8_E4M3"][elements(self.scale)[rows]])
        factors = scales / total if self.divides else scales * total
        values = TABLES["F4_E2M1"][nibbles(elements(self.packed)[rows])]
        return values * np.repeat(finite(self.total, factors), _NVFP4_GROUP, axis=1)

    def _total(self) -> F32:
        return finite(self.total, as_f32("F32", elements(self.total))).reshape(())

    def stored_kind(self) -> WeightKind:
        return "nvfp4"

    def stored_parts(self, rows: Rows) -> StoredParts:
        scales, total = elements(self.scale)[rows], self._total()
        finite(self.scale, TABLES["F8_E4M3"][scales])
        factor = finite(self.total, np.float32(1) / total if self.divides else total)
        factors = np.broadcast_to(factor, (len(rows), 1))
        return {"codes": elements(self.packed)[rows], "factors": factors, "scales": scales}


@dataclass(slots=True, eq=False)
class MxFp4(Matrix):
    """w = 2^(scale - 127) * value, a scale for 32 columns."""

    packed: HostTensor
    scale: HostTensor

    def plan(self) -> tuple[WeightKind, str]:
        return "q5", ""

    def codes(self, rows: Rows) -> Codes:
        doubled = (TABLES["F4_E2M1"] * 2 + 12).astype(np.uint8)
        pairs = doubled[nibbles(np.arange(256, dtype=np.uint8)[:, None])].view(np.uint16)
        codes = pairs[self._bytes(rows), 0].view(np.uint8)
        scales = (self._scales(rows) / 2).astype(np.float16)
        return Codes("q5", codes, scales, scales * np.float16(-12))

    def dequantize(self, rows: Rows) -> F32:
        values = TABLES["F4_E2M1"][nibbles(self._bytes(rows))]
        return values * np.repeat(self._scales(rows), GROUP, axis=1)

    def stored_kind(self) -> WeightKind:
        return "mxfp4"

    def stored_parts(self, rows: Rows) -> StoredParts:
        self._scales(rows)
        return {"codes": self._bytes(rows), "scales": self._exponents(rows)}

    def _bytes(self, rows: Rows) -> U8:
        return elements(self.packed).reshape(-1, self.shape[-1] // 2)[rows]

    def _exponents(self, rows: Rows) -> U8:
        found: U8 = elements(self.scale).reshape(-1, self.shape[-1] // GROUP)[rows]
        return found

    def _scales(self, rows: Rows) -> F32:
        return finite(self.scale, TABLES["F8_E8M0"][self._exponents(rows)])


def find_fp8(parts: Parts, settings: Mapping[str, Any]) -> Iterator[Matrix]:
    """X.weight F8 [N, K] with X.weight_scale_inv (DeepSeek: a scale for 128 x 128, to multiply
    by) or X.weight_scale (one, or one a row)."""
    block = block_of(parts, settings, "weight_block_size")
    for stem in parts.stems(".weight", *FP8):
        weight = parts.take(stem + ".weight", FP8)
        yield fp8(parts, stem, weight.shape, weight, rows_in(weight), block)


def find_modelopt(parts: Parts, settings: Mapping[str, Any]) -> Iterator[Matrix]:
    """FP8 as above, and NVFP4: X.weight U8 [N, K / 2], X.weight_scale F8 [N, K / 16], and
    X.weight_scale_2 F32, to multiply by."""
    parts.only(settings, "quant_algo", "FP8", "NVFP4")
    yield from find_fp8(parts, settings)
    for stem in parts.stems(".weight_scale_2", "F32"):
        yield nvfp4(parts, stem, ".weight", ".weight_scale_2", divides=False)


def find_mxfp4(parts: Parts, settings: Mapping[str, Any]) -> Iterator[Matrix]:
    """gpt-oss: X_blocks U8 [..., rows, K / 32, 16] and X_scales U8 [..., rows, K / 32] are X."""
    for stem in parts.stems("_blocks", "U8"):
        blocks = parts.take(stem + "_blocks", ("U8",))
        if len(blocks.shape) < 3 or blocks.shape[-1] != GROUP // 2:
            raise ModelError(
                f"Tensor {blocks.name} of {parts.folder} has shape {list(blocks.shape)}, and MXFP4 "
                "blocks have 16 bytes."
            )
        scales = parts.take(stem + "_scales", ("U8",), blocks.shape[:-1])
        yield mxfp4(stem, (*blocks.shape[:-2], blocks.shape[-2] * GROUP), blocks, scales)


def fp8(
    parts: Parts,
    stem: str,
    shape: tuple[int, ...],
    weight: HostTensor,
    bits: Callable[[Rows], U8],
    block: tuple[int, int],
) -> Matrix:
    """`weight` holds the matrix; `bits` gives its rows."""
    inverse = stem + ".weight_scale_inv"
    name = inverse if inverse in parts.left else stem + ".weight_scale"
    scale = parts.take(name, (*FLOATS, "F8_E8M0"))
    n, k = shape if len(shape) == 2 else (0, 0)
    grid = (-(-n // block[0]), -(-k // block[1]))
    sizes = {(): (n, k), (1,): (n, k), (1, 1): (n, k), grid: block, (n,): (1, k), (n, 1): (1, k)}
    if scale.shape not in sizes:
        raise ModelError(
            f"Tensor {scale.name} of {parts.folder} has shape {list(scale.shape)}, which fits "
            f"neither the rows nor the {block[0]} x {block[1]} blocks of a matrix {list(shape)}."
        )
    rows, cols = sizes[scale.shape]
    return Fp8(
        name=stem + ".weight",
        label="FP8 " + ("tensor" if (rows, cols) == (n, k) else f"{rows}x{cols}"),
        shape=shape,
        nbytes=weight.nbytes + scale.nbytes,
        dtype=weight.dtype,
        bits=bits,
        scale=scale,
        block=(rows, cols),
    )


def nvfp4(parts: Parts, stem: str, ending: str, total: str, divides: bool) -> Matrix:
    packed = parts.take(stem + ending, ("U8",))
    n, half = packed.shape if len(packed.shape) == 2 else (0, 0)
    shape = (n, 2 * half // _NVFP4_GROUP)
    scale = parts.take(stem + ".weight_scale", ("F8_E4M3",), shape)
    whole = parts.take(stem + total, ("F32",))
    if whole.shape not in ((), (1,)):
        raise ModelError(f"Tensor {whole.name} of {parts.folder} must hold one number.")
    nbytes = packed.nbytes + scale.nbytes + whole.nbytes
    return NvFp4(stem + ".weight", "NVFP4", (n, 2 * half), nbytes, packed, scale, whole, divides)


def mxfp4(name: str, shape: tuple[int, ...], packed: HostTensor, scale: HostTensor) -> Matrix:
    return MxFp4(name, "MXFP4", shape, packed.nbytes + scale.nbytes, packed, scale)


def block_of(parts: Parts, settings: Mapping[str, Any], key: str) -> tuple[int, int]:
    """Rows and columns of a block; 128 each where the settings say nothing."""
    value = settings.get(key)
    if value is None:
        return 128, 128
    if not isinstance(value, list) or len(value) != 2:
        parts.only(settings, key)
    sizes = {"rows": value[0], "columns": value[1]}
    return parts.count(sizes, "rows", 128), parts.count(sizes, "columns", 128)
