"""From the vectors of a text's tokens to one vector: pooling, and what may come after it
(Reimers and Gurevych, 2019). Every one is a sum in a fixed order, whatever else is in the batch.

Legend: L rows that pooling asked for, R texts, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import numpy as np

from elinvar.ops.api import F32, I32, Ops
from elinvar.ops.layout import Weight

PoolingMode = Literal[
    "cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"
]  # the order in which several are put side by side
After = Callable[[F32], F32]


class Pooling:
    """One vector a text: its first or last token's, the largest of each dim, or a weighted sum.
    Several modes stand side by side."""

    def __init__(self, modes: Sequence[PoolingMode], ops: Ops) -> None:
        self.modes, self.ops = tuple(modes), ops

    def rows(self, starts: I32) -> I32:
        """The tokens whose vectors are needed."""
        if self.modes == ("cls",):
            return starts[:-1]
        if self.modes == ("lasttoken",):
            return starts[1:] - np.int32(1)
        return np.arange(starts[-1], dtype=np.int32)

    def __call__(self, h_LD: F32, starts: I32) -> F32:
        if self.modes in (("cls",), ("lasttoken",)):
            return h_LD
        return reduce(self.ops.concat, [self._pooled(mode, h_LD, starts) for mode in self.modes])

    def _pooled(self, mode: PoolingMode, h_TD: F32, starts: I32) -> F32:
        if mode == "cls":
            return h_TD[starts[:-1]]
        if mode == "lasttoken":
            return h_TD[starts[1:] - 1]
        if mode == "max":
            return self.ops.pool(h_TD, starts, None)
        lengths = np.diff(starts)
        n_T = np.repeat(lengths.astype(np.float64), lengths)
        if mode == "mean":
            weights_T = 1 / n_T
        elif mode == "mean_sqrt_len_tokens":
            weights_T = 1 / np.sqrt(n_T)
        else:  # the i-th token weighs i
            i_T = np.arange(1, starts[-1] + 1) - np.repeat(starts[:-1], lengths)
            weights_T = 2 * i_T / (n_T * (n_T + 1))
        return self.ops.pool(h_TD, starts, weights_T.astype(np.float32))


class Normalize:
    """x / |x|; 0 stays 0."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    def __call__(self, x_RD: F32) -> F32:
        gain_D = np.full(x_RD.shape[1], x_RD.shape[1] ** -0.5, np.float32)
        return self.ops.rms_norm(x_RD, gain_D, 1e-30)


class Dense:
    """w x + b, perhaps with a tanh over it."""

    def __init__(self, w: Weight, bias: F32 | None, tanh: bool, ops: Ops) -> None:
        self.w, self.bias, self.tanh, self.ops = (w,), bias, tanh, ops
        self.num_dims = w.shape[0]

    def __call__(self, x_RD: F32) -> F32:
        y_RN = self.ops.linear(x_RD, self.w, self.bias)
        return self.ops.softcap(y_RN, 1.0) if self.tanh else y_RN
