"""GGML blocks: dequantised to float32, and turned into the codes that the kernels pack.

Block formats as in ggml's ggml-common.h and ggml-quants.c. Everything works on a range of rows,
so that callers bound their memory. Legend: B blocks, N rows, K columns, G groups of 32 (K / 32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError
from elinvar.ops.layout import GROUP, QUANTISED, StoredParts, WeightKind
from elinvar.ops.stored import TABLES
from elinvar.weights import iquants
from elinvar.weights.blocks import F16, F32, IQ4_VALUES, U8, crumbs, f32, half, nibbles
from elinvar.weights.tensor import BLOCKS, HostTensor

_FLOAT_KINDS: dict[str, WeightKind] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Rows of a matrix in the form that ops.layout packs."""

    kind: WeightKind
    values: NDArray[Any]
    """[N, K]: uint8 codes 0..15 (q4) or 0..31 (q5), int8 codes -127..127 (q8), float16, uint16 (bf16 bits)
    or float32."""
    scales: F16 | None = None
    """[N, G]: w = scale * code (+ min)."""
    mins: F16 | None = None
    """[N, G], q4 and q5 only."""


def dequantize(tensor: HostTensor, start: int = 0, stop: int | None = None) -> F32:
    """Rows start .. stop as float32 [N, K]; all of a vector comes as [K].

    Raises ModelError for a stored type that cannot be loaded.
    """
    if tensor.matrix is not None:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return tensor.matrix.dequantize(tensor.row_numbers[start:stop])
    _check_supported(tensor)
    rows = tensor.data[start:stop]
    if tensor.dtype == "F32":
        out: F32 = rows.view("<f4").astype(np.float32)
    elif tensor.dtype == "F16":
        out = rows.view("<f2").astype(np.float32)
    elif tensor.dtype == "BF16":
        out = (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            out = _DEQUANTIZERS[tensor.dtype](_blocks(tensor, rows)).reshape(len(rows), -1)
    return out.reshape(-1) if len(tensor.shape) < 2 else out


def kind_of(tensor: HostTensor) -> tuple[WeightKind, str]:
    """The kind that `to_codes` gives, and a note such as "Q6_K -> q8 g32 (requantised)".

    Raises ModelError for a stored type that cannot be loaded.
    """
    if tensor.matrix is not None:
        kind, loss = tensor.matrix.plan()
        group = " g32" if kind in QUANTISED else ""
        return kind, f"{tensor.dtype} -> {kind}{group}" + (f" ({loss})" if loss else "")
    _check_supported(tensor)
    dtype = tensor.dtype
    if dtype in _FLOAT_KINDS:
        return _FLOAT_KINDS[dtype], f"{dtype} -> {_FLOAT_KINDS[dtype]}"
    if dtype in _MIN_CODES:
        kind = _MIN_CODES[dtype][0]
        rounded = "" if dtype in _EXACT else " (scales and mins rounded to f16)"
        return kind, f"{dtype} -> {kind} g32{rounded}"
    if dtype in _Q8_CODES:
        return "q8", f"{dtype} -> q8 g32" + ("" if dtype in _EXACT else " (scales rounded to f16)")
    return "q8", f"{dtype} -> q8 g32 (requantised)"


def describe_types() -> list[tuple[str, str]]:
    """(stored type, what it becomes), for every type that can be loaded."""
    nothing = np.empty((0, 0), np.uint8)
    notes = (kind_of(HostTensor("", (0, 0), dtype, nothing))[1] for dtype in SUPPORTED)
    return [(stored, here) for stored, _, here in (note.partition(" -> ") for note in notes)]


def to_codes(tensor: HostTensor, start: int = 0, stop: int | None = None) -> Codes:
    """Rows start .. stop in the kind of `kind_of`.

    Floats and the types of _EXACT keep their values; others with codes of their own round each
    group's scale and min to f16; the rest is quantised again to 8 bits over groups of 32. Raises
    ModelError when a scale is not finite, which only a corrupt file has.
    """
    if tensor.matrix is not None:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            found = tensor.matrix.codes(tensor.row_numbers[start:stop])
        _check_finite(tensor, *(f for f in (found.scales, found.mins) if f is not None))
        return found
    kind, _ = kind_of(tensor)
    rows = tensor.data[start:stop]
    n = len(rows)
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "f32":
            return Codes(kind, rows.view("<f4"))
        if kind in ("f16", "bf16"):
            return Codes(kind, rows.view("<f2" if kind == "f16" else "<u2"))
        if tensor.dtype in _MIN_CODES:
            codes, scales, mins = _MIN_CODES[tensor.dtype][1](_blocks(tensor, rows))
            _check_finite(tensor, scales, mins)
            return Codes(kind, codes.reshape(n, -1), scales.reshape(n, -1), mins.reshape(n, -1))
        if tensor.dtype in _Q8_CODES:
            codes8, scales = _Q8_CODES[tensor.dtype](_blocks(tensor, rows))
        else:
            groups = _DEQUANTIZERS[tensor.dtype](_blocks(tensor, rows)).reshape(-1, GROUP)
            codes8, scales = requantize(groups)
    _check_finite(tensor, scales)
    return Codes(kind, codes8.reshape(n, -1), scales.reshape(n, -1))


def stored_kind(tensor: HostTensor) -> WeightKind | None:
    """Of ops.stored, which holds the tensor as it is; None: none does."""
    if tensor.matrix is not None:
        return tensor.matrix.stored_kind()
    return "mxfp4" if tensor.dtype == "MXFP4" else None


def stored_parts(tensor: HostTensor) -> StoredParts:
    """All of its rows in the kind of `stored_kind`, as ops.layout packs them. Raises as `to_codes`."""
    if tensor.matrix is not None:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return tensor.matrix.stored_parts(tensor.row_numbers)
    blocks = _blocks(tensor, tensor.data)
    scales = blocks[:, 0].reshape(len(tensor.data), -1)
    _check_finite(tensor, TABLES["F8_E8M0"][scales])
    codes = nibbles(blocks[:, 1:]).reshape(len(tensor.data), -1)
    return {"codes": codes[:, ::2] | codes[:, 1::2] << np.uint8(4), "scales": scales}


def requantize(groups: F32) -> tuple[NDArray[np.int8], F16]:
    """Groups [*, 32] -> int8 codes -127..127 [*, 32] and their f16 scales [*].

    The scale is amax / 127 rounded up to f16, so that no code leaves the range; codes are
    rounded (half to even) against the scale as stored.
    """
    exact = np.abs(groups).max(axis=1) / np.float32(127)
    scales = exact.astype(np.float16)
    up = scales.astype(np.float32) < exact
    scales[up] = np.nextafter(scales[up], np.float16(np.inf))
    divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
    return np.rint(groups / divisor[:, None]).astype(np.int8), scales


def _check_supported(tensor: HostTensor) -> None:
    if tensor.dtype not in _FLOAT_KINDS and tensor.dtype not in _DEQUANTIZERS:
        raise ModelError(
            f"Tensor {tensor.name} has type {tensor.dtype}, which is not supported; use a file "
            f"with {', '.join(SUPPORTED)}."
        )


def _check_finite(tensor: HostTensor, *values: NDArray[Any]) -> None:
    if not all(np.isfinite(v).all() for v in values):
        raise ModelError(
            f"Tensor {tensor.name} holds scales that are not finite: the file is corrupt, "
            "download it again."
        )


def _blocks(tensor: HostTensor, rows: U8) -> U8:
    return rows.reshape(-1, BLOCKS[tensor.dtype][1])


# Blocks of 32: code = nibble (+ a fifth bit), one f16 scale, perhaps one f16 min.


def _fifth_bits(blocks: U8, at: int) -> U8:
    """The 32 bits at byte `at`, as 0 or 16: [B, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_0_codes(blocks: U8) -> tuple[U8, F16, F16]:
    scales = half(blocks, 0)
    return nibbles(blocks[:, 2:]), scales, scales * np.float16(-8)


def _q4_1_codes(blocks: U8) -> tuple[U8, F16, F16]:
    return nibbles(blocks[:, 4:]), half(blocks, 0), half(blocks, 2)


def _q5_0_codes(blocks: U8) -> tuple[U8, F16, F16]:
    scales = half(blocks, 0)
    return nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), scales, scales * np.float16(-16)


def _q5_1_codes(blocks: U8) -> tuple[U8, F16, F16]:
    return nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), half(blocks, 0), half(blocks, 2)


def _q8_0_codes(blocks: U8) -> tuple[NDArray[np.int8], F16]:
    codes, scales = blocks[:, 2:].view(np.int8), half(blocks, 0)
    # No quantiser writes -128, but the format can hold it and the kernels cannot.
    low = (codes == -128).any(axis=1)
    if low.any():
        codes, scales = codes.copy(), scales.copy()
        codes[low], scales[low] = requantize(f32(scales[low]) * codes[low].astype(np.float32))
    return codes, scales


def _iq4_nl_codes(blocks: U8) -> tuple[NDArray[np.int8], F16]:
    return IQ4_VALUES[nibbles(blocks[:, 2:])], half(blocks, 0)


def _q4_0(blocks: U8) -> F32:
    codes = nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8)
    return f32(half(blocks, 0)) * codes.astype(np.float32)


def _q5_0(blocks: U8) -> F32:
    codes = (nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).view(np.int8) - np.int8(16)
    return f32(half(blocks, 0)) * codes.astype(np.float32)


def _with_mins(codes: Callable[[U8], tuple[U8, F16, F16]]) -> Callable[[U8], F32]:
    def dequantized(blocks: U8) -> F32:
        values, scales, mins = codes(blocks)
        return f32(scales) * values.astype(np.float32) + f32(mins)

    return dequantized


def _q8_0(blocks: U8) -> F32:
    return f32(half(blocks, 0)) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _iq4_nl(blocks: U8) -> F32:
    values, scales = _iq4_nl_codes(blocks)
    return f32(scales) * values.astype(np.float32)


# K-quants: super-blocks of 256 with small integer scales (and mins) of their sub-blocks.


def _k_scales_mins(packed: U8) -> tuple[U8, U8]:
    """12 bytes -> eight 6-bit scales and eight 6-bit mins: [B, 8] each."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    mins = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales, mins


def _k_factors(blocks: U8) -> tuple[F32, F32]:
    """Q4_K and Q5_K: scale and min of each sub-block of 32, exact in f32: [B, 8, 1] each."""
    scales, mins = _k_scales_mins(blocks[:, 4:16])
    d, dmin = f32(half(blocks, 0)), f32(half(blocks, 2))
    return (d * scales.astype(np.float32))[..., None], (dmin * mins.astype(np.float32))[..., None]


def _q4_k_nibbles(packed: U8) -> U8:
    """[B, 128] -> [B, 8, 32]"""
    return nibbles(packed.reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _q4_k_codes(blocks: U8) -> tuple[U8, F16, F16]:
    scales, mins = _k_factors(blocks)
    return _q4_k_nibbles(blocks[:, 16:]), scales.astype(np.float16), -mins.astype(np.float16)


def _q4_k(blocks: U8) -> F32:
    scales, mins = _k_factors(blocks)
    return scales * _q4_k_nibbles(blocks[:, 16:]).astype(np.float32) - mins


def _q5_k_values(blocks: U8) -> U8:
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return _q4_k_nibbles(blocks[:, 48:]) | (high << np.uint8(4))


def _q5_k_codes(blocks: U8) -> tuple[U8, F16, F16]:
    scales, mins = _k_factors(blocks)
    return _q5_k_values(blocks), scales.astype(np.float16), -mins.astype(np.float16)


def _q5_k(blocks: U8) -> F32:
    scales, mins = _k_factors(blocks)
    return scales * _q5_k_values(blocks).astype(np.float32) - mins


def _q2_k(blocks: U8) -> F32:
    d, dmin = f32(half(blocks, 80)), f32(half(blocks, 82))
    packed = blocks[:, :16]
    scales, mins = d * (packed & 15).astype(np.float32), dmin * (packed >> 4).astype(np.float32)
    codes = crumbs(blocks[:, 16:80].reshape(-1, 2, 32)).reshape(-1, 16, 16)
    return scales[..., None] * codes.astype(np.float32) - mins[..., None]


def _q3_k(blocks: U8) -> F32:
    low, high = nibbles(blocks[:, 96:104]), crumbs(blocks[:, 104:108]).reshape(-1, 16)
    scales = (low | (high << 4)).view(np.int8) - np.int8(32)
    factors = f32(half(blocks, 108)) * scales.astype(np.float32)
    low_bits = crumbs(blocks[:, 32:96].reshape(-1, 2, 32)).reshape(-1, 8, 32)
    unset = 1 - ((blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1)
    codes = low_bits.view(np.int8) - (unset << 2).view(np.int8)
    return factors[..., None] * codes.reshape(-1, 16, 16).astype(np.float32)


def _q6_k(blocks: U8) -> F32:
    low = nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = crumbs(blocks[:, 128:192].reshape(-1, 2, 32))
    codes = (low | (high << 4)).view(np.int8) - np.int8(32)
    factors = f32(half(blocks, 208)) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return factors[..., None] * codes.reshape(-1, 16, 16).astype(np.float32)


_MIN_CODES: dict[str, tuple[WeightKind, Callable[[U8], tuple[U8, F16, F16]]]] = {
    "Q4_0": ("q4", _q4_0_codes),
    "Q4_1": ("q4", _q4_1_codes),
    "Q4_K": ("q4", _q4_k_codes),
    "Q5_0": ("q5", _q5_0_codes),
    "Q5_1": ("q5", _q5_1_codes),
    "Q5_K": ("q5", _q5_k_codes),
    **iquants.MIN_CODES,
}
_Q8_CODES: dict[str, Callable[[U8], tuple[NDArray[np.int8], F16]]] = {
    "Q8_0": _q8_0_codes,
    "IQ4_NL": _iq4_nl_codes,
    **iquants.Q8_CODES,
}
_EXACT = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", *iquants.EXACT}
_DEQUANTIZERS: dict[str, Callable[[U8], F32]] = {
    "Q4_0": _q4_0,
    "Q4_1": _with_mins(_q4_1_codes),
    "Q5_0": _q5_0,
    "Q5_1": _with_mins(_q5_1_codes),
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    **iquants.DEQUANTIZERS,
}
SUPPORTED = (*_FLOAT_KINDS, *_DEQUANTIZERS)
"""Stored types that can be loaded."""
