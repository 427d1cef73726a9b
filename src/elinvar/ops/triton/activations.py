"""Activations inside kernels, in f32 (base.config.Activation says what each is)."""

from __future__ import annotations

import triton
import triton.language as tl

from elinvar.ops.triton.numbers import narrow


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of x alone."""
    if ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu_tanh":
        # Phi(x) by tanh is a sigmoid: (1 + tanh(z)) / 2 = 1 / (1 + e^(-2 z)).
        y = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu2":
        y = tl.maximum(x, 0) * tl.maximum(x, 0)
    else:
        tl.static_assert(ACTIVATION == "swiglu_oai")
        x = tl.minimum(x, 7)
        y = x / (1 + tl.exp(-1.702 * x))
    return y


@triton.jit
def gated_product(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up, of swiglu_oai * (1 + up) with up within -7 .. 7."""
    if ACTIVATION == "swiglu_oai":
        up = 1 + tl.minimum(tl.maximum(up, -7), 7)
    return activated(gate, ACTIVATION) * up


@triton.jit
def rounded_product(gate, up, KIND: tl.constexpr, ACTIVATION: tl.constexpr):
    """act(gate) * up, both rounded first as a product that is not gated rounds them."""
    gate, up = narrow(gate, KIND).to(tl.float32), narrow(up, KIND).to(tl.float32)
    return gated_product(gate, up, ACTIVATION)
