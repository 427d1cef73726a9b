"""How a matrix is stored for the kernels: packed panels of 16 output columns.

A Weight is a logical matrix w[N, K] (out, in) that `linear` multiplies by: y = x w^T. It is cut
into panels of PANEL rows of w (output columns), so that a kernel keeps 16 outputs in SIMD lanes
and walks k in ascending order; no horizontal sum exists. The layout is the same for every
instruction set: a packed file moves between machines.

One panel, padded to 64 bytes (G = K / 32 groups):

    q4   [G] of: codes [4][16][4] bytes, where byte (c, n, j) holds code k = 8c + j of the group
         in its low and k + 4 in its high nibble; scales f16 [16]; mins f16 [16];
         w = scale * code + min, code 0..15
    q5   [G] of: the low four bits of the codes as in q4; fifth bits [16][4] bytes, where bit c of
         byte (n, j) belongs to code k = 8c + j and bit 4 + c to k + 4; scales; mins;
         w = scale * code + min, code 0..31
    q8   [G] of: codes int8 [8][16][4], where byte (c, n, j) is k = 4c + j; scales f16 [16];
         w = scale * code, code -127..127
    f16, bf16, f32   [K][16] values

and of formats of files (stored.py), a part behind the other:

    fp8, int8    codes [16][K]; factors f32 [16]
    fp8-blocks   codes [16][K]; scales f32 [K / 128], rounded up: a block's rows are those of panels
    mxfp4        codes [16][K / 2], two in a byte; scales e8m0 [16][K / 32]
    nvfp4        codes [16][K / 2]; factors f32 [16]; scales e4m3 [16][K / 16]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elinvar.ops.stored import STORED, StoredKind

GROUP = 32
PANEL = 16
ALIGN = 64

WeightKind = Literal["q4", "q5", "q8", "f16", "bf16", "f32"] | StoredKind
Kinds = frozenset[WeightKind]
QUANTISED: tuple[WeightKind, ...] = ("q4", "q5", "q8")
CODE_BYTES = {kind: PANEL * GROUP * int(kind[1:]) // 8 for kind in QUANTISED}
GROUP_BYTES = {kind: CODE_BYTES[kind] + PANEL * (2 if kind == "q8" else 4) for kind in QUANTISED}
_FLOATS: dict[str, Any] = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}


@dataclass(slots=True, eq=False, weakref_slot=True)
class Weight:
    """A packed matrix. `data` is 1-D uint8, 64-byte aligned panels one after the other; it may
    be a read-only view of a mapped file. Never changed once made, but where a trainer's weights take the
    place of a model's, which then computes nothing."""

    kind: WeightKind
    shape: tuple[int, int]
    """(N, K): outputs, inputs."""
    data: NDArray[np.uint8]
    handle: Any = field(default=None, init=False, repr=False)
    """How a provider holds it, bound at its first use: looking it up must cost nothing."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def hold(self, kind: WeightKind, data: NDArray[np.uint8]) -> None:
        """Be another matrix of the same shape from now on."""
        self.kind, self.data, self.handle = kind, data, None


def num_panels(n: int) -> int:
    return -(-n // PANEL)


def panel_bytes(kind: WeightKind, k: int) -> int:
    """Bytes of one panel of 16 columns, padding included."""
    if kind in STORED:
        parts = stored_parts(kind, k).values()
        size = sum(rows * columns * dtype.itemsize for rows, columns, dtype in parts)
    elif kind in GROUP_BYTES:
        size = k // GROUP * GROUP_BYTES[kind]
    else:
        size = k * PANEL * np.dtype(_FLOATS[kind]).itemsize
    return -(-size // ALIGN) * ALIGN


def packed_bytes(kind: WeightKind, shape: tuple[int, int]) -> int:
    return num_panels(shape[0]) * panel_bytes(kind, shape[1])


def aligned_empty(nbytes: int) -> NDArray[np.uint8]:
    """Uninitialised bytes at a 64-byte aligned address."""
    raw = np.empty(nbytes + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + nbytes]


def pack_q4(
    codes: NDArray[np.uint8], scales: NDArray[np.float16], mins: NDArray[np.float16]
) -> Weight:
    """codes [N, K] in 0..15, scales and mins [N, K/32]: w = scale * code + min."""
    return _assemble("q4", codes.shape, _nibbles(codes), *map(_group_columns, (scales, mins)))


def pack_q5(
    codes: NDArray[np.uint8], scales: NDArray[np.float16], mins: NDArray[np.float16]
) -> Weight:
    """codes [N, K] in 0..31, scales and mins [N, K/32]: w = scale * code + min."""
    n, k = codes.shape
    # Four codes j at once: panel, n, g, c, half. Bit 4 half + c of byte j is code j's.
    fours = _panels(codes).view(np.uint32).reshape(num_panels(n), PANEL, k // GROUP, 4, 2)
    fifth = fours >> np.uint32(4) & np.uint32(0x01010101)
    bits = [fifth[..., c, half] << np.uint32(4 * half + c) for half in (0, 1) for c in range(4)]
    plane = np.bitwise_or.reduce(bits).transpose(0, 2, 1)
    columns = map(_group_columns, (scales, mins))
    return _assemble("q5", (n, k), _nibbles(codes & np.uint8(15)), plane, *columns)


def pack_q8(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> Weight:
    """codes [N, K] in -127..127, scales [N, K/32]: w = scale * code."""
    n, k = codes.shape
    c = _panels(codes).reshape(num_panels(n), PANEL, k // GROUP, 8, 4).transpose(0, 2, 3, 1, 4)
    return _assemble("q8", (n, k), c, _group_columns(scales))


def pack_float(kind: WeightKind, w: NDArray[Any]) -> Weight:
    """w [N, K]: float16 for f16, uint16 (the bits) for bf16, float32 for f32."""
    n, k = w.shape
    values = _panels(np.asarray(w, dtype=_FLOATS[kind])).reshape(num_panels(n), PANEL, k)
    return _assemble(kind, (n, k), values.transpose(0, 2, 1))


StoredParts = dict[str, NDArray[Any]]
"""Of a matrix of a kind in STORED, by the names of `stored_parts`; a part whose rows are a panel's has
them all [N, ...], else one for each panel."""


def stored_parts(kind: WeightKind, k: int) -> dict[str, tuple[int, int, np.dtype[Any]]]:
    """What lies in a panel of a kind in STORED, in this order: rows, columns and type of each."""
    form = STORED[kind]
    parts: dict[str, tuple[int, int, Any]] = {"codes": (PANEL, k // form.in_byte, np.uint8)}
    if form.factors:
        parts["factors"] = PANEL, 1, np.float32
    if form.group:
        rows, dtype = (1, np.float32) if form.by_panel else (PANEL, np.uint8)
        parts["scales"] = rows, -(-k // form.group), dtype
    return {
        name: (rows, columns, np.dtype(dtype)) for name, (rows, columns, dtype) in parts.items()
    }


def pack_stored(kind: WeightKind, parts: StoredParts) -> Weight:
    n, k = len(parts["codes"]), parts["codes"].shape[1] * STORED[kind].in_byte
    filled = [
        _panels(np.asarray(parts[name], dtype), rows).reshape(num_panels(n), 1, -1)
        for name, (rows, _, dtype) in stored_parts(kind, k).items()
    ]
    return _assemble(kind, (n, k), *filled)


def unpack_stored(w: Weight) -> StoredParts:
    (n, k), panels = w.shape, num_panels(w.shape[0])
    raw, at, parts = w.data.reshape(panels, -1), 0, StoredParts()
    for name, (rows, columns, dtype) in stored_parts(w.kind, k).items():
        size = rows * columns * dtype.itemsize
        values = np.ascontiguousarray(raw[:, at : at + size]).view(dtype).reshape(-1, columns)
        parts[name] = values[:n] if rows == PANEL else values
        at += size
    return parts


def stored_columns(kind: WeightKind, parts: StoredParts, start: int, stop: int) -> StoredParts:
    """The inputs start .. stop, both borders of groups."""
    form = STORED[kind]
    each = {"codes": form.in_byte, "scales": form.group}
    return {
        name: part[:, start // each[name] : -(-stop // each[name])] if name in each else part
        for name, part in parts.items()
    }


def _numbers(w: Weight) -> NDArray[np.float32]:
    (n, k), form, parts = w.shape, STORED[w.kind], unpack_stored(w)
    codes = parts["codes"]
    if form.in_byte == 2:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(n, k)
    full = form.numbers[codes]
    if form.group:
        scales = parts["scales"]
        scales = np.repeat(scales, PANEL, 0)[:n] if form.scales is None else form.scales[scales]
        full *= np.repeat(scales, form.group, axis=1)[:, :k]
    return full * parts["factors"] if form.factors else full


def unpack(w: Weight) -> NDArray[np.float32]:
    """The matrix [N, K] that a Weight stands for, in float32."""
    if w.kind in STORED:
        return _numbers(w)
    n, k = w.shape
    p, g = num_panels(n), k // GROUP
    raw = w.data.reshape(p, panel_bytes(w.kind, k))
    if w.kind in QUANTISED:
        codes, scales, mins = unpack_codes(w)
        full = codes.reshape(n, g, GROUP).astype(np.float32) * scales[:, :, None]
        if mins is not None:
            full += mins[:, :, None]
        return full.reshape(n, k)
    size = k * PANEL * np.dtype(_FLOATS[w.kind]).itemsize
    values = np.ascontiguousarray(raw[:, :size]).view(_FLOATS[w.kind]).reshape(p, k, PANEL)
    flat = values.transpose(0, 2, 1).reshape(p * PANEL, k)[:n]
    if w.kind == "bf16":
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(np.float32)


def unpack_codes(
    w: Weight,
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32] | None]:
    """Codes [N, K], scales [N, K/32] and (q4, q5) mins [N, K/32] of a quantised Weight."""
    n, k = w.shape
    p, g = num_panels(n), k // GROUP
    size = GROUP_BYTES[w.kind]
    raw = w.data.reshape(p, panel_bytes(w.kind, k))[:, : g * size].reshape(p, g, size)
    scales_at = CODE_BYTES[w.kind]
    body = raw[:, :, :scales_at]
    if w.kind != "q8":
        b = body[:, :, : CODE_BYTES["q4"]].reshape(p, g, 4, 1, PANEL, 4)
        halves = np.concatenate([b & 15, b >> 4], axis=3)  # panel, g, c, half, n, j
        if w.kind == "q5":
            plane = body[:, :, CODE_BYTES["q4"] :].reshape(p, g, PANEL, 4, 1)
            fifth = np.unpackbits(plane, axis=-1, bitorder="little").reshape(p, g, PANEL, 4, 2, 4)
            halves |= fifth.transpose(0, 1, 5, 4, 2, 3) << np.uint8(4)
        codes = halves.transpose(0, 4, 1, 2, 3, 5)
    else:
        codes = body.reshape(p, g, 8, PANEL, 4).transpose(0, 3, 1, 2, 4)
    codes8 = np.ascontiguousarray(codes).reshape(p * PANEL, k)[:n].view(np.int8)

    def column_values(at: int) -> NDArray[np.float32]:
        part = np.ascontiguousarray(raw[:, :, at : at + PANEL * 2]).view(np.float16)
        return part.transpose(0, 2, 1).reshape(p * PANEL, g)[:n].astype(np.float32)

    mins = column_values(scales_at + PANEL * 2) if w.kind != "q8" else None
    return codes8, column_values(scales_at), mins


def join(parts: Sequence[Weight], axis: int) -> Weight:
    """Matrices of one kind, one below the other (0) or side by side (1)."""
    kind = parts[0].kind
    if kind in STORED:
        taken = [unpack_stored(part) for part in parts]
        whole = {name: [part[name] for part in taken] for name in taken[0]}
        if axis == 1:
            whole["factors"] = whole.get("factors", [])[:1]
        return pack_stored(
            kind, {n: np.concatenate(some, axis) for n, some in whole.items() if some}
        )
    if kind in QUANTISED:
        codes, scales, mins = zip(*map(unpack_codes, parts), strict=True)
        values = np.concatenate(codes, axis)
        halves = [
            np.concatenate(f, axis).astype(np.float16) for f in (scales, mins) if f[0] is not None
        ]
        if kind == "q8":
            return pack_q8(values, *halves)
        return (pack_q4 if kind == "q4" else pack_q5)(values.view(np.uint8), *halves)
    full = np.concatenate([unpack(part) for part in parts], axis)
    # Exact: the low half of what came from bf16 is zero.
    return pack_float(kind, full.view(np.uint32) >> 16 if kind == "bf16" else full)


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, K] in 0..15 -> [P, G, 4, 16, 4]: k = 8c + j and k + 4 share a byte."""
    n, k = codes.shape
    c = _panels(codes).reshape(num_panels(n), PANEL, k // GROUP, 4, 2, 4)  # p, n, g, c, half, j
    nibbles: NDArray[np.uint8] = c[:, :, :, :, 0] | (c[:, :, :, :, 1] << 4)
    return nibbles.transpose(0, 2, 3, 1, 4)


def _panels(a: NDArray[Any], rows: int = PANEL) -> NDArray[Any]:
    """Rows padded with zeros to a multiple of those of a panel."""
    pad = -a.shape[0] % rows
    return np.concatenate([a, np.zeros((pad, a.shape[1]), a.dtype)]) if pad else a


def _group_columns(values: NDArray[np.float16]) -> NDArray[np.float16]:
    """[N, G] -> [P, G, 16]"""
    v = _panels(np.asarray(values, np.float16))
    return v.reshape(-1, PANEL, v.shape[1]).transpose(0, 2, 1)


def _assemble(kind: WeightKind, shape: tuple[int, int], *parts: NDArray[Any]) -> Weight:
    """Panels of records: each part is [P, records, ...], its bytes follow the part before."""
    p, records = parts[0].shape[:2]
    flat = [np.ascontiguousarray(part).reshape(p, records, -1).view(np.uint8) for part in parts]
    data = aligned_empty(packed_bytes(kind, shape))
    panels = data.reshape(p, -1)
    used = records * sum(part.shape[2] for part in flat)
    body, at = panels[:, :used].reshape(p, records, -1), 0
    for part in flat:
        body[:, :, at : at + part.shape[2]] = part
        at += part.shape[2]
    panels[:, used:] = 0
    return Weight(kind, shape, data)
