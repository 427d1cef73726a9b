"""The gated MLP (Shazeer, 2020)."""

from __future__ import annotations

from elinvar.ops.api import F32, Activation, Ops
from elinvar.ops.layout import Weight


class GatedMLP:
    """down(act(gate x) * up x)."""

    def __init__(
        self, gate: Weight, up: Weight, down: Weight, activation: Activation, ops: Ops
    ) -> None:
        self.gate, self.up, self.down = gate, up, (down,)
        self.activation = activation
        self.ops = ops

    def __call__(self, x_TD: F32) -> F32:
        h_TF = self.ops.gated_linear(x_TD, self.gate, self.up, self.activation)
        return self.ops.linear(h_TF, self.down)
