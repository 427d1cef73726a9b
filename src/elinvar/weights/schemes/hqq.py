"""HQQ: codes with a scale and a zero a group, both floats; everything about a matrix is in its tensors.

X.W_q holds the codes of groups, as [groups, group_size] (axis 1: a group is a run of columns) or as
[group_size, groups] (axis 0: every groups-th element of the flattened matrix). A byte holds
codes of rows that are far apart, of the first part of all rows in its highest bits; three bits go ten
to an I32. X.scale, X.zero [groups]; X.shape; X.nbits, X.group_size, X.axis. The library runs what some
others of its tensors say: here nobody reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elinvar.base.errors import ModelError
from elinvar.ops.layout import GROUP, WeightKind
from elinvar.weights.quants import Codes
from elinvar.weights.schemes.base import (
    F32,
    FLOATS,
    U8,
    Matrix,
    Parts,
    Rows,
    as_f32,
    elements,
    finite,
)
from elinvar.weights.tensor import HostTensor

_BITS = {8: 8, 6: 8, 5: 8, 4: 4, 3: 3, 2: 2, 1: 1}
"""Of a code -> that it takes as stored."""
_UNREAD = (
    *("packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "optimize"),
    *("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "round_zero"),
)


@dataclass(slots=True, eq=False)
class Hqq(Matrix):
    """w = scale * (code - zero). Codes of up to five bits keep their width where 32 columns share a
    group: scale and min = -zero * scale are rounded to f16. The rest is requantised."""

    packed: HostTensor
    scale: HostTensor
    zero: HostTensor
    bits: int
    size: int
    """Of a group."""
    axis: int

    def plan(self) -> tuple[WeightKind, str]:
        if self.axis == 0 or self.size % GROUP or self.bits > 5:
            return "q8", "requantised"
        rounded = "mins" if self.scale.dtype == "F16" else "scales and mins"
        return "q4" if self.bits < 5 else "q5", f"{rounded} rounded to f16"

    def codes(self, rows: Rows) -> Codes:
        kind, _ = self.plan()
        if kind == "q8":
            return self.requantized(rows)
        groups = np.repeat(self._groups(rows), self.size // GROUP, axis=1)
        scales = self._floats(self.scale, groups).astype(np.float16)
        mins = -scales.astype(np.float32) * self._floats(self.zero, groups)
        return Codes(kind, self._codes(rows), scales, mins.astype(np.float16))

    def dequantize(self, rows: Rows) -> F32:
        groups = self._groups(rows)
        codes = self._codes(rows).reshape(*groups.shape, -1).astype(np.float32)
        values = codes - self._floats(self.zero, groups)[..., None]
        values *= self._floats(self.scale, groups)[..., None]
        return values.reshape(len(rows), -1)

    def _groups(self, rows: Rows) -> Rows:
        """Numbers of the groups of each row, [n, K / size] or for axis 0 [n, K]."""
        if self.axis == 1:
            each = self.shape[1] // self.size
            return rows[:, None] * each + np.arange(each)
        return self._first(rows)[:, None] + np.arange(self.shape[1])

    def _first(self, rows: Rows) -> Rows:
        """Axis 0: where in a stored row, which holds one element of each group, a row begins."""
        num_groups = self.shape[0] * self.shape[1] // self.size
        return rows * self.shape[1] % num_groups

    def _codes(self, rows: Rows) -> U8:
        """[n, K]. Axis 1 stores a group as a row."""
        words, stored = elements(self.packed), _BITS[self.bits]
        groups = self._groups(rows)
        at = groups if self.axis == 1 else rows[:, None] * self.shape[1] // words.shape[1]
        part, word = np.divmod(at, words.shape[0])
        picked = words[word] if self.axis == 1 else words[word, groups]
        # All parts fill the word from its highest bit; of 32 bits, ten times three take 30.
        first = 8 - stored if self.packed.dtype == "U8" else 30 - stored
        shifts = (first - stored * part).astype(words.dtype)
        shifted = picked >> (shifts[..., None] if self.axis == 1 else shifts)
        codes = (shifted & words.dtype.type((1 << stored) - 1)).astype(np.uint8)
        return codes.reshape(len(rows), -1)

    def _floats(self, tensor: HostTensor, groups: Rows) -> F32:
        return finite(tensor, as_f32(tensor.dtype, elements(tensor).reshape(-1)[groups]))


def find(parts: Parts, settings: Mapping[str, Any]) -> Iterator[Matrix]:
    for stem in parts.stems(".W_q", "U8", "I32"):
        yield _matrix(parts, stem)


def _matrix(parts: Parts, stem: str) -> Matrix:
    packed = parts.take(stem + ".W_q", ("U8", "I32"))
    listed = elements(parts.take(stem + ".shape", ("I64", "I32"), (2,)))
    n, k = int(listed[0]), int(listed[1])
    bits, size, axis = (_number(parts, f"{stem}.{key}") for key in ("nbits", "group_size", "axis"))
    groups = n * k // size if size > 0 else 0
    shape = (groups, size) if axis == 1 else (size, groups)
    stored = _BITS.get(bits, 8)
    each, dtype = (10, "I32") if stored == 3 else (8 // stored, "U8")
    good = axis in (0, 1) and bits in _BITS and n > 0 and groups * size == n * k
    good = good and (n if axis == 0 else k) % size == 0 and (each == 10 or shape[0] % each == 0)
    if not good or packed.dtype != dtype or packed.shape != (-(-shape[0] // each), shape[1]):
        raise ModelError(
            f"Tensor {packed.name} of {parts.folder} is {packed.dtype} {list(packed.shape)}, which is "
            f"no packing of a matrix {[n, k]} in {bits} bits and groups of {size} along axis {axis}."
        )
    scale = parts.take(stem + ".scale", FLOATS)
    zero = parts.take(stem + ".zero", FLOATS)
    for tensor in (scale, zero):
        if math.prod(tensor.shape) != groups:
            raise ModelError(
                f"Tensor {tensor.name} of {parts.folder} has shape {list(tensor.shape)}, and there "
                f"are {groups} groups."
            )
    for key in _UNREAD:
        parts.left.pop(f"{stem}.{key}", None)
    return Hqq(
        name=stem + ".weight",
        label=f"HQQ int{bits} g{size}",
        shape=(n, k),
        nbytes=packed.nbytes + scale.nbytes + zero.nbytes,
        packed=packed,
        scale=scale,
        zero=zero,
        bits=bits,
        size=size,
        axis=axis,
    )


def _number(parts: Parts, name: str) -> int:
    return int(elements(parts.take(name, ("I32", "I64"), ())).reshape(-1)[0])
