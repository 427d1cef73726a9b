"""What must be seen before anything is fast: that bits are equal, on this chip, where the contract needs
it. Of every kind of matrix, of attention, experts and the step's graph; "seen" says which cuts beyond the
default the tuner may use here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from elinvar.ops import layout
from elinvar.ops.triton import gather, linear, matrices, moe, rows, tuner
from elinvar.ops.triton.configs import Tile, default
from elinvar.ops.triton.matrices import Matrix
from elinvar.ops.triton.samples import random_matrix
from elinvar.ops.triton.tuner_heads import Filled, Heads, same_attention, tiles
from gpu_parts.base import Part

KINDS = (
    "bf16", "q4", "q8", "fp8-blocks", "mxfp4", "int8", "f16", "f32", "q5", "nvfp4", "fp8",
    "fp8-tensor",
)  # fmt: skip
DECODED = ("q4", "q5", "q8", "fp8", "fp8-blocks", "mxfp4", "nvfp4")
"""By instructions of the chip where it has them."""


def measure(part: Part) -> None:
    kinds = ("q4", "fp8-tensor") if part.small else KINDS
    if part.small:
        tuner.LOOKED_AT, tuner.MANY = (1, 17), 65
    for kind in kinds:
        part.attempt(f"products/{kind}", lambda kind=kind: product(part, kind))
    for kind in ("int8",) if part.small else ("bf16", "f16", "int8", "fp8"):
        part.attempt(f"attention/{kind}", lambda kind=kind: attention(part, kind))
    for kind in ("q4",) if part.small else ("bf16", "q4", "mxfp4"):
        part.attempt(f"experts/{kind}", lambda kind=kind: experts(part, kind))
    for kind in ("q4",) if part.small else ("f16", "q4", "q5", "q8"):
        part.attempt(f"panels/{kind}", lambda kind=kind: panels(part, kind))


def made(part: Part, name: str, n: int, k: int) -> Matrix:
    if name != "fp8-tensor":
        return random_matrix(name, n, k, part.device)  # type: ignore[arg-type]
    w = random_matrix("fp8", n, k, part.device)
    return replace(w, factors=torch.full((n,), k**-0.5 / 32, device=part.device))


def product(part: Part, name: str) -> dict[str, Any]:
    n, k = (80, 256) if part.small else (1040, 2048)
    w = made(part, name, n, k)
    base = default(w.kind)

    def of(**other: Any) -> Matrix:
        return replace(w, tuned=replace(base, **other))

    call = tuner.product(w, tuner.MANY, False)
    whole = call()
    heights = {m: tuner.product(of(block_m=m), tuner.MANY, False)() for m in (16, 64, 128)}
    found: dict[str, Any] = {
        "invariant": tuner.same_bits(w),
        "seen": {f"{m} rows a tile": yes(torch.equal(heights[m], heights[64])) for m in (16, 128)},
    }
    if w.kind in DECODED:
        with plain():
            found["plain_is_ptx"] = torch.equal(tuner.product(w, tuner.MANY, False)(), whole)
        if w.factors is None:  # else they follow the sum
            dense = matrices.dense(gather.unpack(w).to(torch.bfloat16))
            # The interpreter adds up what a turn of the loop gives: for it of one piece.
            dense = replace(dense, tuned=replace(base, block_k=32) if part.small else base)
            as_dense = tuner.product(dense, tuner.MANY, False)()
            found["seen"]["dense"] = yes(torch.equal(as_dense, whole))
    if w.kind != "int8":
        x = tuner.inputs(w, tuner.MANY)
        both = linear.linear(x, [w], dtype=torch.float32)
        gated = linear.gated_linear(x, w, "silu")
        found["gated_is_product"] = torch.equal(gated, rows.gated(both, "silu", x.dtype))
    if name in ("bf16", "q4"):
        found["seen"] |= {
            "few": yes(tuner.same_bits(of(block_m=128, few=16))),
            "parts": yes(tuner.same_bits(of(parts=4))),
        }
    if not part.small:
        found["graph_is_eager"] = torch.equal(captured(call), whole)
    return found


def attention(part: Part, kind: Any) -> dict[str, Any]:
    heads = Heads(4, 2, 32, kind) if part.small else Heads(32, 8, 128, kind)
    size = (2, 1060, 2) if part.small else (3, 2500, 70)
    filled = Filled(heads, *size, part.device)
    found: dict[str, Any] = {"invariant": same_attention(filled, None)}
    if not part.small:
        base = tiles(heads)[0]
        tall = Tile(base.rows, 128, 32 if kind in ("int8", "fp8") else 64, 3)
        found["seen"] = {"128 rows a tile": yes(same_attention(filled, tall))}
        call = filled.attend(1)
        found["graph_is_eager"] = torch.equal(captured(call), call())
    return found


def experts(part: Part, kind: Any) -> dict[str, Any]:
    e, top, d, f = (4, 2, 64, 64) if part.small else (16, 4, 512, 256)
    both, downs = (
        matrices.stack([random_matrix(kind, *shape, part.device, i) for i in range(e)])
        for shape in ((2 * f, d), (d, f))
    )
    some = moe.DeviceExperts(both, downs)
    found: dict[str, Any] = {"invariant": tuner.same_experts(some, top)}
    if not part.small:
        low = replace(default(kind), block_m=128, few=16)
        fewer = moe.DeviceExperts(replace(both, tuned=low), downs)
        found["seen"] = {"few": yes(tuner.same_experts(fewer, top))}
        call = tuner.routed(some, 5, top)
        found["graph_is_eager"] = torch.equal(captured(call), call())
    return found


def panels(part: Part, kind: Any) -> dict[str, Any]:
    """What files of GGUF, GPTQ, AWQ and others become on a CPU, taken apart on the device."""
    n, k = (40, 64) if part.small else (272, 512)
    rng = np.random.default_rng(0)
    scales, mins = (rng.uniform(*r, (n, k // 32)) for r in ((0.01, 0.02), (-0.3, 0)))
    scales, mins = scales.astype(np.float16), mins.astype(np.float16)
    if kind == "f16":
        w = layout.pack_float(kind, rng.standard_normal((n, k)).astype(np.float16))
    elif kind == "q8":
        w = layout.pack_q8(rng.integers(-127, 128, (n, k)).astype(np.int8), scales)
    else:
        codes = rng.integers(0, 2 ** int(kind[1]), (n, k)).astype(np.uint8)
        w = (layout.pack_q4 if kind == "q4" else layout.pack_q5)(codes, scales, mins)
    there = matrices.from_weight(w, torch.float16, part.device)
    here = matrices.from_weight(w, torch.float16, "cpu")
    pairs = zip(there.tensors, here.tensors, strict=True)
    equal = all(a is b is None or (b is not None and torch.equal(a.cpu(), b)) for a, b in pairs)
    exact = torch.from_numpy(layout.unpack(w)).to(part.device)
    error = float((gather.unpack(there) - exact).abs().max() / exact.abs().max())
    return {"there_is_here": equal, "right": error < 1e-2}


def plain() -> ExitStack:
    """Without the chip's own instructions in kernels."""
    stack = ExitStack()
    for module in (linear, gather, moe):
        stack.enter_context(patch.object(module, "ptx", lambda x: False))
    return stack


def captured(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a replay of it gives."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return out


def yes(equal: bool) -> str:
    """No failure where it is not: nothing uses it then."""
    return "equal" if equal else "other bits"
