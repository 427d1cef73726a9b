"""The oracle of the ops that multiply by matrices (see ref.py)."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import Activation
from elinvar.ops.api import F32, I32
from elinvar.ops.arguments import Lora
from elinvar.ops.layout import GROUP, QUANTISED, Weight, unpack, unpack_codes
from elinvar.ops.ref_rows import MAX_FLOAT, gated_product, saturate


class LinearRef:
    def __init__(self) -> None:
        self._dense: WeakKeyDictionary[Weight, F32] = WeakKeyDictionary()

    def embed(self, ids_T: I32, w_VD: Weight, scale: float) -> F32:
        ids = np.where(ids_T < w_VD.shape[0], ids_T, 0)
        return (self._matrix(w_VD)[ids] * np.float32(scale)).astype(np.float32)

    def linear(self, x_TK: F32, weights: Sequence[Weight], bias_N: F32 | None = None) -> F32:
        y = np.concatenate([self._linear(x_TK, w) for w in weights], axis=1)
        return y if bias_N is None else y + bias_N

    def gated_linear(self, x_TK: F32, gate: Weight, up: Weight, activation: Activation) -> F32:
        return gated_product(self._linear(x_TK, gate), self._linear(x_TK, up), activation)

    def lora(self, y_TN: F32, x_TK: F32, adapters_T: I32, lora: Lora) -> None:
        for column, pairs in zip(lora.columns, lora.pairs, strict=True):
            for adapter, pair in enumerate(pairs):
                rows = np.flatnonzero(adapters_T == adapter)
                if pair is not None and len(rows):
                    a, b = (self._matrix(w).astype(np.float64) for w in (pair.a, pair.b))
                    more = x_TK[rows].astype(np.float64) @ a.T @ b.T * pair.scale
                    y_TN[rows, column : column + len(b)] += more.astype(np.float32)

    def head_linear(self, x_TK: F32, w: Weight, num_heads: int) -> F32:
        y = self._linear(x_TK.reshape(-1, w.shape[1]), w)  # every head by every head's rows
        y = y.reshape(len(x_TK), num_heads, num_heads, -1)
        own = np.arange(num_heads)
        return np.ascontiguousarray(y[:, own, own]).reshape(len(x_TK), -1)

    def _matrix(self, w: Weight) -> F32:
        dense = self._dense.get(w)
        if dense is None:
            dense = self._dense[w] = unpack(w)
        return dense

    def _linear(self, x_TK: F32, w: Weight) -> F32:
        if w.kind not in QUANTISED:
            return (x_TK.astype(np.float64) @ self._matrix(w).T.astype(np.float64)).astype(
                np.float32
            )
        x_codes, x_scales = quantize_rows(x_TK)
        codes, scales, mins = unpack_codes(w)
        t, k = x_TK.shape
        xg = x_codes.reshape(t, k // GROUP, GROUP).astype(np.float64)
        wg = codes.reshape(w.shape[0], k // GROUP, GROUP).astype(np.float64)
        y = np.zeros((t, w.shape[0]))
        for g in range(k // GROUP):
            factor = (x_scales[:, g, None] * scales[None, :, g]).astype(np.float64)
            y += xg[:, g] @ wg[:, g].T * factor
            if mins is not None:
                sums = x_scales[:, g] * xg[:, g].sum(-1).astype(np.float32)
                y += sums[:, None].astype(np.float64) * mins[None, :, g]
        return y.astype(np.float32)


def quantize_rows(x_TK: F32) -> tuple[NDArray[np.int8], F32]:
    """int8 codes [T, K] and scales [T, K/32]; groups whose largest |x| is below 1e-30 are zero."""
    t, k = x_TK.shape
    groups = saturate(x_TK, MAX_FLOAT).reshape(t, k // GROUP, GROUP)
    largest = np.abs(groups).max(-1)
    live = largest >= np.float32(1e-30)
    safe = np.where(live, largest, np.float32(1))
    scales = np.where(live, safe / np.float32(127), np.float32(0))
    inverse = np.where(live, np.float32(127) / safe, np.float32(0))
    codes = np.rint(groups * inverse[..., None]).astype(np.int8)
    return codes.reshape(t, k), scales
