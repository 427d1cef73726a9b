"""Matrices of random numbers in every kind, as they lie on a device: for tuning and benchmarks."""

from __future__ import annotations

import torch

from elinvar.ops.triton import matrices
from elinvar.ops.triton.matrices import DeviceKind, Matrix

_LARGEST = {"q4": 15, "q5": 31}


def random_matrix(
    kind: DeviceKind, n: int, k: int, device: torch.device | str, seed: int = 0
) -> Matrix:
    """[N, K] of numbers about 1 / sqrt(K)."""
    g = torch.Generator(device).manual_seed(seed)

    def uniform(*shape: int, low: float = 0.5, high: float = 1.5) -> torch.Tensor:
        return torch.rand(shape, generator=g, device=device) * (high - low) + low

    def codes(low: int, high: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.randint(low, high + 1, (n, k), generator=g, device=device, dtype=dtype)

    size = k**-0.5
    if kind in ("f32", "bf16", "f16"):
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]
        w = torch.empty((n, k), dtype=dtype, device=device)
        return matrices.dense(w.normal_(generator=g).mul_(size))
    if kind == "int8":
        return matrices.int8(codes(-127, 127), uniform(n) * size / 64)
    if kind == "q8":
        return matrices.grouped(kind, codes(-127, 127), uniform(n, k // 32) * size / 64)
    if kind in _LARGEST:
        largest = _LARGEST[kind]
        scales = uniform(n, k // 32) * size * 4 / largest
        return matrices.grouped(kind, codes(0, largest), scales, -scales * (largest / 2))
    if kind == "fp8":
        exponents = codes(0, 0x7E, torch.uint8)  # all but NaN
        scales = uniform(-(-n // 128), -(-k // 128)) * size / 64
        return matrices.fp8(exponents, scales)
    e2m1 = codes(0, 15, torch.uint8)
    if kind == "mxfp4":
        scales = torch.full((n, k // 32), 127 - k.bit_length() // 2, device=device)
        return matrices.mxfp4(e2m1, scales.to(torch.uint8))
    one = torch.full((n, k // 16), 0x38, dtype=torch.uint8, device=device)  # 1.0 of e4m3
    return matrices.nvfp4(e2m1, one, torch.tensor(size / 2, device=device))
