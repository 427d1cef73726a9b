"""Matrices of every kind that a GPU multiplies by, and what they stand for, in f64."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from elinvar.ops import layout
from elinvar.ops.triton import matrices
from elinvar.ops.triton.matrices import Matrix

LAYOUT_KINDS = ("f32", "bf16", "f16", "q4", "q5", "q8")
KINDS = (*LAYOUT_KINDS, "fp8", "fp8-blocks", "mxfp4", "nvfp4")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def made(
    kind: str, n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Matrix, NDArray[np.float64]]:
    """A matrix, and the numbers that kernels shall take it for (those of f16, q4, q5 and q8 before
    they are rounded to bf16)."""
    rng = np.random.default_rng((n, k, seed))
    if kind in LAYOUT_KINDS:
        w = packed(kind, n, k, rng)
        return matrices.from_weight(w, dtype, "cpu"), layout.unpack(w).astype(np.float64)
    if kind.startswith("fp8"):
        codes = torch.from_numpy(rng.normal(0, 30, (n, k))).to(torch.float8_e4m3fn)
        if kind == "fp8":
            scales = torch.from_numpy(rng.uniform(0.001, 0.002, n))
            spread, w = scales[:, None], matrices.fp8(codes, scales)
        else:
            scales = torch.from_numpy(rng.uniform(0.001, 0.002, (-(-n // 16), -(-k // 128))))
            spread = scales.repeat_interleave(16, 0).repeat_interleave(128, 1)[:n, :k]
            w = matrices.fp8_blocks(codes, scales)
        return w, (codes.double() * spread.float().double()).numpy()
    codes = torch.from_numpy(rng.integers(0, 16, (n, k)))
    full = E2M1[codes.numpy()]
    if kind == "mxfp4":
        powers = rng.integers(120, 125, (n, k // 32))
        scales = torch.from_numpy(powers.astype(np.uint8))
        full *= np.repeat(2.0 ** (powers - 127), 32, axis=1)
        return matrices.mxfp4(codes, scales), full
    scales = torch.from_numpy(rng.uniform(1, 8, (n, k // 16))).to(torch.float8_e4m3fn)
    full *= np.repeat(scales.double().numpy(), 16, axis=1) * 0.015625
    return matrices.nvfp4(codes, scales, torch.tensor(0.015625)), full


def packed(kind: str, n: int, k: int, rng: np.random.Generator) -> layout.Weight:
    g = k // 32
    if kind == "q8":
        codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
        return layout.pack_q8(codes, rng.uniform(0.001, 0.002, (n, g)).astype(np.float16))
    if kind in ("q4", "q5"):
        codes = rng.integers(0, 2 ** int(kind[1]), (n, k)).astype(np.uint8)
        scales, mins = (
            rng.uniform(*r, (n, g)).astype(np.float16) for r in ((0.01, 0.02), (-0.3, 0))
        )
        return (layout.pack_q4 if kind == "q4" else layout.pack_q5)(codes, scales, mins)
    w = rng.normal(0, 0.1, (n, k)).astype(np.float32)
    if kind == "bf16":
        return layout.pack_float("bf16", (w.view(np.uint32) >> 16).astype(np.uint16))
    return layout.pack_float(kind, w)  # type: ignore[arg-type]
