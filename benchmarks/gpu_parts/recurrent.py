"""Layers with recurrent states as Qwen3-Next has them: a convolution over 8,192 channels, and the gated
delta rule of 32 heads of 128 x 128. Decoding should wait for states alone; a prompt is computed token by
token, and what counts is how long one takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from elinvar.base.config import DeltaConfig, KVSpec
from elinvar.ops import load_provider
from elinvar.ops.triton import timing
from gpu_parts.base import Part, error_of

NEXT = DeltaConfig(key_heads=16, heads=32, key_dim=128, value_dim=128, taps=4)
SMALL = DeltaConfig(key_heads=1, heads=2, key_dim=20, value_dim=16, taps=4)
STEPS = ((1, 1), (8, 1), (32, 1), (128, 1), (1, 512), (1, 8192), (8, 1024))
"""Sequences and tokens of each."""


class Layers:
    """`count` sequences that compute `tokens` each, after 32 others, in as many layers as no cache holds
    the states of."""

    def __init__(self, part: Part, count: int, tokens: int) -> None:
        self.c = c = SMALL if part.small else NEXT
        self.ops: Any = load_provider("cuda")
        copies = 1 if part.small else timing.copies(4 * count * c.state_floats)
        spec = KVSpec("linear", tuple(range(copies)), 1, 8, state=c)
        self.states = self.ops.kv_layers(spec, count)
        rng, self.count, self.tokens = np.random.default_rng(0), count, tokens
        self.a_log = rng.uniform(0, 2.7, c.heads).astype(np.float32)
        self.dt_bias = rng.uniform(-4, 0, c.heads).astype(np.float32)
        self.w = rng.normal(0, 0.5, (c.taps, c.channels)).astype(np.float32)
        width = c.channels + c.heads * (c.value_dim + 2)
        self.x = part.randn(count * tokens, width, dtype=torch.float32)
        self.qkv = part.randn(count * tokens, c.channels, dtype=torch.float32, seed=1)
        i32 = {"device": part.device, "dtype": torch.int32}
        self.where = (
            torch.arange(count + 1, **i32) * tokens,
            torch.full((count,), 32 + tokens, **i32),
            torch.arange(count, **i32)[:, None].repeat(1, 2 + tokens // 32),
        )

    def conv(self, layer: int = 0) -> torch.Tensor:
        found: torch.Tensor = self.ops.causal_conv(self.x, self.w, self.states[layer], *self.where)
        return found

    def rule(self, layer: int = 0) -> torch.Tensor:
        numbers = self.qkv, self.x, self.a_log, self.dt_bias
        found: torch.Tensor = self.ops.delta_rule(*numbers, self.states[layer], *self.where)
        return found

    def conv_bytes(self) -> int:
        c = self.c
        return 8 * c.channels * self.count * (self.tokens + c.taps - 1)

    def rule_bytes(self) -> int:
        c, tokens = self.c, self.count * self.tokens
        size = c.heads * c.key_dim * c.value_dim
        return 8 * size * self.count + 4 * tokens * (c.channels + c.heads * (c.value_dim + 2))


def measure(part: Part) -> None:
    part.attempt("right", lambda: right(part))
    for count, tokens in ((2, 3),) if part.small else STEPS:
        part.attempt(f"speed/{count}x{tokens}", lambda r=count, t=tokens: speed(part, r, t))
        if part.device.type == "cuda":
            torch.cuda.empty_cache()


def speed(part: Part, count: int, tokens: int) -> dict[str, Any]:
    layers = Layers(part, count, tokens)
    found = {}
    for name, run, moved in (
        ("causal_conv", layers.conv, layers.conv_bytes()),
        ("delta_rule", layers.rule, layers.rule_bytes()),
    ):
        taken = part.seconds([partial(run, layer) for layer in range(len(layers.states))])
        found[name] = {**part.rates(taken, moved), "us_per_token": taken * 1e6 / tokens}
    return found


def right(part: Part) -> dict[str, Any]:
    """Against f64; in two chunks and token by token as at once; alone as in a batch."""
    layers = Layers(part, 2, 5 if part.small else 70)
    n, whole, state = layers.tokens, run(layers, [layers.tokens]), layers.states[0]
    kept = state.states.clone()
    return {
        "right": error_of(whole[:n], exact(layers)) < part.tolerance(1e-4),
        "chunks": torch.equal(run(layers, [n // 2, n - n // 2]), whole),
        "decode_is_prefill": torch.equal(run(layers, [1] * n), whole),
        "states": torch.equal(state.states, kept),
        "invariant": torch.equal(run(layers, [n], first=1), whole[n:]),
    }


def run(layers: Layers, chunks: list[int], first: int = 0) -> torch.Tensor:
    """Both ops from the sequences' beginnings in these chunks, of the sequences from `first` on; outputs
    of one sequence after the other."""
    ops, state, n = layers.ops, layers.states[0], layers.tokens
    count, device = layers.count - first, layers.x.device
    x = layers.x.view(layers.count, n, -1)[first:]
    table, parts, at = layers.where[2][first:], [], 0
    for size in chunks:
        starts = torch.arange(count + 1, device=device, dtype=torch.int32) * size
        lens = torch.full((count,), at + size, device=device, dtype=torch.int32)
        chunk = x[:, at : at + size].flatten(0, 1).contiguous()
        qkv = ops.causal_conv(chunk, layers.w, state, starts, lens, table)
        gates = layers.a_log, layers.dt_bias
        out = ops.delta_rule(qkv, chunk, *gates, state, starts, lens, table)
        parts.append(out.view(count, size, -1))
        at += size
    return torch.cat(parts, 1).flatten(0, 1)


def exact(layers: Layers) -> torch.Tensor:
    """Of the first sequence, from its beginning, in f64."""
    c, n = layers.c, layers.tokens
    x = layers.x[:n].double().cpu()
    w, keys = torch.from_numpy(layers.w).double(), c.key_heads * c.key_dim
    inputs = torch.cat([torch.zeros(c.taps - 1, c.channels).double(), x[:, : c.channels]])
    qkv = torch.stack([w[j] * inputs[j : j + n] for j in range(c.taps)]).sum(0)
    q, k, v = torch.nn.functional.silu(qkv).split([keys, keys, c.heads * c.value_dim], 1)
    q, k = (
        (p / (p.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(
            c.heads // c.key_heads, 1
        )
        for p in (part.reshape(n, c.key_heads, c.key_dim) for part in (q, k))
    )
    v = v.reshape(n, c.heads, c.value_dim)
    beta, gate = x[:, -2 * c.heads :].chunk(2, 1)
    rate, shift = torch.from_numpy(layers.a_log).double().exp(), torch.from_numpy(layers.dt_bias)
    decay = (-rate * torch.nn.functional.softplus(gate + shift.double())).exp()
    s, outputs = torch.zeros(c.heads, c.key_dim, c.value_dim).double(), []
    for t in range(n):
        s = s * decay[t, :, None, None]
        u = (v[t] - torch.einsum("hd,hdv->hv", k[t], s)) * beta[t].sigmoid()[:, None]
        s = s + k[t][..., None] * u[:, None]
        outputs.append(torch.einsum("hd,hdv->hv", q[t], s) * c.key_dim**-0.5)
    return torch.stack(outputs).flatten(1).to(layers.x.device)
