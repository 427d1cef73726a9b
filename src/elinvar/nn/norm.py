"""Norms, each with the sum before it: a layer's result is added to the stream and normed at once."""

from __future__ import annotations

from typing import Protocol

from elinvar.ops.api import F32, Ops


class Norm(Protocol):
    def __call__(self, x_TD: F32, /) -> F32: ...

    def add(self, x_TD: F32, y_TD: F32) -> tuple[F32, F32]:
        """(x + y, its norm)."""
        ...


class RMSNorm:
    """x / rms(x) * gain (Zhang and Sennrich, 2019)."""

    def __init__(self, gain_D: F32, eps: float, ops: Ops) -> None:
        self.gain, self.eps, self.ops = gain_D, eps, ops

    def __call__(self, x_TD: F32) -> F32:
        return self.ops.rms_norm(x_TD, self.gain, self.eps)

    def add(self, x_TD: F32, y_TD: F32) -> tuple[F32, F32]:
        return self.ops.add_rms_norm(x_TD, y_TD, self.gain, self.eps)


class NoNorm:
    """x itself, where a family has norms only behind attention and MLP."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    def __call__(self, x_TD: F32) -> F32:
        return x_TD

    def add(self, x_TD: F32, y_TD: F32) -> tuple[F32, F32]:
        sum_TD = self.ops.add(x_TD, y_TD)
        return sum_TD, sum_TD


class Scale:
    """x * factor, where a family scales what it adds to the stream."""

    def __init__(self, factor: float, ops: Ops) -> None:
        self.factor, self.ops = factor, ops

    def __call__(self, x_TD: F32) -> F32:
        return self.ops.scale(x_TD, self.factor)


class LayerNorm:
    """(x - mean) / deviation * gain + bias (Ba et al., 2016)."""

    def __init__(self, gain_D: F32, bias_D: F32 | None, eps: float, ops: Ops) -> None:
        self.gain, self.bias, self.eps, self.ops = gain_D, bias_D, eps, ops

    def __call__(self, x_TD: F32) -> F32:
        return self.ops.layer_norm(x_TD, self.gain, self.bias, self.eps)

    def add(self, x_TD: F32, y_TD: F32) -> tuple[F32, F32]:
        return self.ops.add_layer_norm(x_TD, y_TD, self.gain, self.bias, self.eps)
