"""MLPs, gated (Shazeer, 2020) and not."""

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


class MLP:
    """down(act(up x)), each with a bias if the family has them."""

    def __init__(
        self,
        up: Weight,
        down: Weight,
        activation: Activation,
        ops: Ops,
        up_bias: F32 | None = None,
        down_bias: F32 | None = None,
    ) -> None:
        self.up, self.down = (up,), (down,)
        self.up_bias, self.down_bias = up_bias, down_bias
        self.activation = activation
        self.ops = ops

    def __call__(self, x_TD: F32) -> F32:
        h_TF = self.ops.linear(x_TD, self.up, self.up_bias)
        return self.ops.linear(self.ops.activate(h_TF, self.activation), self.down, self.down_bias)
