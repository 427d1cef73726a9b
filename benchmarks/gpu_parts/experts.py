"""Mixtures of experts of Qwen3-30B-A3B and gpt-oss-20b: right, the same in every batch, fast."""

from __future__ import annotations

from typing import Any

import torch

from elinvar.ops.triton.matrices import stack
from elinvar.ops.triton.moe import DeviceExperts, moe
from elinvar.ops.triton.samples import random_pair
from gpu_parts.base import Part, error_of

MODELS = {
    "qwen3-30b-a3b/bf16": ("bf16", 128, 8, 2048, 768),
    "qwen3-30b-a3b/q4": ("q4", 128, 8, 2048, 768),
    "gpt-oss-20b/mxfp4": ("mxfp4", 32, 4, 2880, 2880),
}
"""Kind, experts, of them a token's, dims of the stream and of an expert."""
ROWS = (1, 8, 32, 128, 4096)


def measure(part: Part) -> None:
    small = {"tiny/bf16": ("bf16", 4, 2, 64, 96), "tiny/q4": ("q4", 4, 2, 64, 96)}
    for name, shape in (small if part.small else MODELS).items():
        part.attempt(name, lambda shape=shape: one(part, *shape))
        torch.cuda.empty_cache()


def one(part: Part, kind: Any, count: int, top: int, d: int, f: int) -> dict[str, Any]:
    both = [random_pair(kind, 2 * f, d, part.device, e) for e in range(count)]
    downs = [random_pair(kind, d, f, part.device, count + e) for e in range(count)]
    experts = DeviceExperts(stack([w for w, _ in both]), stack([w for w, _ in downs]))
    most = 24 if part.small else ROWS[-1]
    x = part.randn(most, d)
    g = torch.Generator(part.device).manual_seed(3)
    scores = torch.rand((most, count), generator=g, device=part.device)
    ids = scores.topk(top, 1).indices.sort(1).values.to(torch.int32)
    weights = torch.softmax(torch.rand((most, top), generator=g, device=part.device), 1)
    rows = min(most, 96)
    whole = moe(x[:rows], ids[:rows], weights[:rows], experts, "silu")
    wanted = exactly(x[:4], ids[:4], weights[:4], both, downs)
    error = error_of(whole[:4], wanted)
    counts = [c for c in (1, 2, 7, 16, 33) if c < rows]
    same = all(
        torch.equal(moe(x[:c], ids[:c], weights[:c], experts, "silu"), whole[:c]) for c in counts
    )
    # Activations between the two products are bf16.
    found: dict[str, Any] = {
        "error_of_largest": error,
        "right": error < part.tolerance(2e-2),
        "invariant": same,
    }
    matrix = both[0][0].nbytes + downs[0][0].nbytes
    for c in (1, 7) if part.small else ROWS:
        read = len(ids[:c].unique()) * matrix
        calls = [lambda c=c: moe(x[:c], ids[:c], weights[:c], experts, "silu")]
        found[str(c)] = part.rates(part.seconds(calls), read, 2 * c * top * 3 * d * f)
    return found


def exactly(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, both: Any, downs: Any
) -> Any:
    """In f64, of the first rows."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for t, (chosen, parts) in enumerate(zip(ids.tolist(), weights.double(), strict=True)):
        for e, part in zip(chosen, parts, strict=True):
            y = both[e][1].to(torch.bfloat16).double() @ x[t].double()
            gate, up = y.chunk(2)
            h = torch.nn.functional.silu(gate) * up
            out[t] += part * (downs[e][1].to(torch.bfloat16).double() @ h)
    return out
