"""What moves bytes and computes little: norms, activations, rotation and the write of keys and values,
as Llama-3.1-8B has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from elinvar.base.config import KVSpec
from elinvar.ops import load_provider
from gpu_parts.base import Part, error_of

D, F, HEADS, KV_HEADS, DIMS = 4096, 14336, 32, 8, 128


def measure(part: Part) -> None:
    ops: Any = load_provider("cuda")
    for rows in (3,) if part.small else (1, 128, 8192):
        part.attempt(f"add_rms_norm/{rows}", lambda r=rows: norm(part, ops, r))
        part.attempt(f"gated/{rows}", lambda r=rows: gated(part, ops, r))
        part.attempt(f"rope_write/{rows}", lambda r=rows: rope(part, ops, r))


def norm(part: Part, ops: Any, rows: int) -> dict[str, Any]:
    d = 64 if part.small else D
    x, y = (part.randn(rows, d, dtype=torch.float32, seed=s) for s in (0, 1))
    gain = np.linspace(0.5, 1.5, d, dtype=np.float32)
    out = ops.add_rms_norm(x, y, gain, 1e-5)[1]
    exact = (x + y).double()
    exact = exact / (exact.square().mean(1, keepdim=True) + 1e-5).sqrt()
    error = error_of(out, exact * torch.from_numpy(gain).to(part.device).double())
    alone = ops.add_rms_norm(x[-1:], y[-1:], gain, 1e-5)[1]
    moved = rows * d * (4 + 4 + 4 + out.element_size())
    found = part.rates(part.seconds([lambda: ops.add_rms_norm(x, y, gain, 1e-5)]), moved)
    return {
        **found,
        "right": error < part.tolerance(8e-3),
        "invariant": torch.equal(alone, out[-1:]),
    }


def gated(part: Part, ops: Any, rows: int) -> dict[str, Any]:
    n = 96 if part.small else F
    x = part.randn(rows, 2 * n, dtype=torch.float32)
    out = ops.gated(x, "silu")
    gate, up = x.double().chunk(2, 1)
    error = error_of(out, torch.nn.functional.silu(gate) * up)
    moved = rows * n * (8 + out.element_size())
    found = part.rates(part.seconds([lambda: ops.gated(x, "silu")]), moved)
    same = torch.equal(ops.gated(x[-1:], "silu"), out[-1:])
    return {**found, "right": error < part.tolerance(8e-3), "invariant": same}


def rope(part: Part, ops: Any, rows: int) -> dict[str, Any]:
    heads, kv_heads, dims = (4, 2, 32) if part.small else (HEADS, KV_HEADS, DIMS)
    (kv,) = ops.kv_layers(KVSpec("full", (0,), kv_heads, dims, "bf16"), -(-rows // 32))
    qkv = part.randn(rows, (heads + 2 * kv_heads) * dims, dtype=torch.float32)
    at = torch.arange(rows, device=part.device, dtype=torch.int32)
    angles = np.arange(rows)[:, None] / 10000.0 ** (np.arange(dims // 2) * 2 / dims)
    table = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)

    def write(x: torch.Tensor = qkv, where: torch.Tensor = at) -> Any:
        return ops.rope_write(x, where, table, kv, where, heads, None, None, 1e-5)

    q = write()
    cos, sin = (
        torch.from_numpy(t).to(part.device).double()[:, None] for t in np.split(table, 2, 1)
    )
    first, second = qkv[:, : heads * dims].double().view(rows, heads, dims).chunk(2, 2)
    exact = torch.cat([first * cos - second * sin, second * cos + first * sin], 2)
    error = error_of(q, exact)
    moved = qkv.numel() * 4 + q.numel() * q.element_size() + rows * 2 * kv_heads * dims * 2
    found = part.rates(part.seconds([write]), moved)
    same = torch.equal(write(qkv[-1:], at[-1:]), q[-1:])
    return {**found, "right": error < part.tolerance(8e-3), "invariant": same}
