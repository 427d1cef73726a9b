"""How the C++ provider holds weights and caches: bound at their first use."""

from __future__ import annotations

from typing import Any

import numpy as np

from elinvar import _cpu
from elinvar.ops.arguments import Experts, Lora
from elinvar.ops.caches import KVLayer, StateLayer
from elinvar.ops.layout import Weight


def matrix(w: Weight) -> Any:
    if w.handle is None:
        w.handle = _cpu.Matrix(w.kind, *w.shape, w.data)
    return w.handle


def experts(experts: Experts) -> Any:
    if experts.handle is None:
        gates, ups, downs = (
            [matrix(w) for w in part] for part in (experts.gates, experts.ups, experts.downs)
        )
        biases = experts.gate_bias, experts.up_bias, experts.down_bias
        experts.handle = _cpu.Experts(gates, ups, downs, *biases)
    return experts.handle


def lora(lora: Lora) -> Any:
    if lora.handle is None:
        lora.handle = _cpu.Lora(list(lora.columns), len(lora.pairs[0]))
        for i, pairs in enumerate(lora.pairs):
            for adapter, pair in enumerate(pairs):
                if pair is not None:
                    matrices = matrix(pair.a), matrix(pair.b)
                    lora.handle.set(i, adapter, *matrices, pair.scale)
    return lora.handle


def cache(kv: KVLayer) -> Any:
    if kv.handle is None:
        k, v = (a.view(np.uint16) if a.dtype == np.float16 else a for a in (kv.k, kv.v))
        kv.handle = _cpu.Cache(k, v, kv.dtype)
    return kv.handle


def state(state: StateLayer) -> Any:
    if state.handle is None:
        c = state.config
        state.handle = _cpu.State(state.tails, state.states, c.key_heads, c.value_dim)
    return state.handle
