"""What the chip reaches: a copy in its memory, and the vendor's bf16 product. All else is measured
against these, not against a datasheet."""

from __future__ import annotations

import torch

from gpu_parts.base import Part


def measure(part: Part) -> None:
    size = 1 << (16 if part.small else 31)
    source = torch.zeros(size, dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    copy = 2 * size / part.seconds([lambda: target.copy_(source)])
    n = 64 if part.small else 8192
    a, b = part.randn(n, n), part.randn(n, n, seed=1)
    matmul = 2 * n**3 / part.seconds([lambda: torch.matmul(a, b)])
    part.put("ceilings", {"copy": copy, "matmul": matmul})
