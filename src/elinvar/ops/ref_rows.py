"""The oracle of ops that treat each row for itself: norms, activations, sums (see ref.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import Activation
from elinvar.ops.api import F32, I32

F64 = NDArray[np.float64]

MAX_FLOAT = np.finfo(np.float32).max


class RowsRef:
    def rms_norm(self, x_TD: F32, gain_D: F32, eps: float) -> F32:
        x = x_TD.astype(np.float64)
        return (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain_D).astype(np.float32)

    def add(self, x_TD: F32, y_TD: F32) -> F32:
        return x_TD + y_TD

    def concat(self, x_TD: F32, y_TE: F32) -> F32:
        return np.concatenate([x_TD, y_TE], axis=1)

    def add_rms_norm(self, x_TD: F32, y_TD: F32, gain_D: F32, eps: float) -> tuple[F32, F32]:
        s = x_TD + y_TD
        return s, self.rms_norm(s, gain_D, eps)

    def layer_norm(self, x_TD: F32, gain_D: F32, bias_D: F32 | None, eps: float) -> F32:
        x = x_TD.astype(np.float64)
        x -= x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain_D
        return (y if bias_D is None else y + bias_D).astype(np.float32)

    def add_layer_norm(
        self, x_TD: F32, y_TD: F32, gain_D: F32, bias_D: F32 | None, eps: float
    ) -> tuple[F32, F32]:
        s = x_TD + y_TD
        return s, self.layer_norm(s, gain_D, bias_D, eps)

    def scale(self, x_TD: F32, factor: float) -> F32:
        return x_TD * np.float32(factor)

    def scale_heads(self, q_THD: F32, positions_T: I32, factors_P: F32) -> F32:
        return q_THD * factors_P[positions_T][:, None, None]

    def softcap(self, x_TD: F32, cap: float) -> F32:
        return (cap * np.tanh(x_TD.astype(np.float64) / cap)).astype(np.float32)

    def activate(self, x_TD: F32, activation: Activation) -> F32:
        return activated(x_TD, activation).astype(np.float32)

    def gated(self, x_TN: F32, activation: Activation) -> F32:
        gate, up = np.split(x_TN, 2, axis=1)
        return gated_product(gate, up, activation)

    def mul(self, x_TD: F32, y_TN: F32, start: int = 0) -> F32:
        return x_TD * y_TN[:, start : start + x_TD.shape[1]]

    def mix(self, xs_TD: Sequence[F32], coefs_TC: F32) -> F32:
        coefs = coefs_TC.reshape(len(coefs_TC), -1, len(xs_TD)).astype(np.float64)
        return np.einsum("tos,std->otd", coefs, np.stack(xs_TD)).astype(np.float32)

    def sparsify(self, x_TN: F32, deviations: float) -> F32:
        x = x_TN.astype(np.float64)
        least = x.mean(-1, keepdims=True) + deviations * x.std(-1, keepdims=True)
        return np.maximum(x - least, 0).astype(np.float32)

    def match_rms(self, x_TD: F32, y_TD: F32) -> F32:
        x, y = ((a.astype(np.float64) ** 2).mean(-1, keepdims=True) for a in (x_TD, y_TD))
        return (x_TD * np.sqrt(y / np.maximum(x, 1e-5))).astype(np.float32)

    def pool(self, x_TD: F32, starts: I32, weights_T: F32 | None) -> F32:
        if weights_T is None:
            return np.maximum.reduceat(x_TD, starts[:-1])
        weighted = x_TD.astype(np.float64) * weights_T[:, None]
        sums = [weighted[a:b].sum(0) for a, b in pairwise(starts)]
        return np.array(sums, np.float32).reshape(-1, x_TD.shape[1])


def saturate(x: F32, limit: np.float32) -> F32:
    """Within -limit .. limit; NaN becomes limit."""
    return np.where(np.isnan(x), limit, np.clip(x, -limit, limit)).astype(np.float32)


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def activated(x: F32, activation: Activation) -> F64:
    g = x.astype(np.float64)
    with np.errstate(over="ignore"):
        if activation == "silu":
            return g / (1 + np.exp(-g))
        if activation == "gelu_tanh":
            return 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        if activation == "gelu":
            return 0.5 * g * _erfc(-g / np.sqrt(2))
        if activation == "relu2":
            return np.maximum(g, 0) ** 2
        low = np.minimum(g, 7)
        return low / (1 + np.exp(-1.702 * low))


def gated_product(g: F32, u: F32, activation: Activation) -> F32:
    factor = np.clip(u.astype(np.float64), -7, 7) + 1 if activation == "swiglu_oai" else u
    return (activated(g, activation) * factor).astype(np.float32)
