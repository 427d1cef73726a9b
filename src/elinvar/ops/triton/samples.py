"""Matrices of random numbers in every kind, as they lie on a device: for tuning and benchmarks."""

from __future__ import annotations

import torch

from elinvar.ops.layout import WeightKind
from elinvar.ops.triton import matrices
from elinvar.ops.triton.matrices import Matrix

_FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_LARGEST = {"q4": 15, "q5": 31}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def random_matrix(
    kind: WeightKind, n: int, k: int, device: torch.device | str, seed: int = 0
) -> Matrix:
    """[N, K] of numbers about 1 / sqrt(K)."""
    return random_pair(kind, n, k, device, seed)[0]


def random_pair(
    kind: WeightKind, n: int, k: int, device: torch.device | str, seed: int = 0
) -> tuple[Matrix, torch.Tensor]:
    """It, and what it stands for [N, K] f32."""
    g, size = torch.Generator(device).manual_seed(seed), k**-0.5

    def scales(*shape: int, of: float) -> torch.Tensor:
        """That f16 holds."""
        drawn = torch.rand(shape, generator=g, device=device) + 0.5
        return (drawn * of).to(torch.float16).float()

    def codes(low: int, high: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.randint(low, high + 1, (n, k), generator=g, device=device, dtype=dtype)

    if kind in _FLOATS:
        w = torch.empty((n, k), dtype=_FLOATS[kind], device=device).normal_(generator=g).mul_(size)
        return matrices.dense(w), w.float()
    if kind in ("int8", "q8"):
        c, s = codes(-127, 127), scales(n, 1 if kind == "int8" else k // 32, of=size / 64)
        made = matrices.int8(c, s[:, 0]) if kind == "int8" else matrices.grouped(kind, c, s)
        return made, c.float() * _spread(s, k)
    if kind in _LARGEST:
        largest = _LARGEST[kind]
        c, s = codes(0, largest), scales(n, k // 32, of=size * 4 / largest)
        mins = (s * (-largest / 2)).to(torch.float16).float()
        return matrices.grouped(kind, c, s, mins), c.float() * _spread(s, k) + _spread(mins, k)
    if kind in ("fp8", "fp8-blocks"):
        c = (torch.randn((n, k), generator=g, device=device) * 30).to(torch.float8_e4m3fn)
        if kind == "fp8":
            s = scales(n, 1, of=size / 30)
            return matrices.fp8(c, s), c.float() * s
        s = scales(-(-n // 16), -(-k // 128), of=size / 30)
        blocks = s.repeat_interleave(16, 0).repeat_interleave(128, 1)[:n, :k]
        return matrices.fp8_blocks(c, s), c.float() * blocks
    c = codes(0, 15, torch.uint8)
    values = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=device)[c.int()]
    if kind == "mxfp4":
        exponent = 127 - k.bit_length() // 2 - 1
        powers = torch.full((n, k // 32), exponent, device=device, dtype=torch.uint8)
        return matrices.mxfp4(c, powers), values * 2.0 ** (exponent - 127)
    s = scales(n, k // 16, of=4.0).to(torch.float8_e4m3fn)
    whole = torch.tensor(size / 16, device=device)
    return matrices.nvfp4(c, s, whole), values * _spread(s.float(), k) * whole


def _spread(values_NG: torch.Tensor, k: int) -> torch.Tensor:
    """[N, K], each group's value for all of its numbers."""
    return values_NG.repeat_interleave(k // values_NG.shape[1], 1)
