"""Products of Llama-3.1-8B in every kind of matrix: right, the same for every number of rows, fast."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from elinvar.ops.triton.linear import gated_linear, linear, quantised_linear
from elinvar.ops.triton.matrices import Matrix
from elinvar.ops.triton.samples import random_matrix, random_pair
from elinvar.ops.triton.timing import copies
from gpu_parts.base import Part, error_of

SHAPES = {
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
}  # fmt: skip
KINDS = ("bf16", "q4", "q8", "fp8-blocks", "mxfp4", "q5", "nvfp4", "int8")
ROWS = (1, 16, 128, 4096)
LARGEST_ERROR = 2e-3
"""Of outputs in f32, where inputs and weights are bf16: sums come in another order, no more."""


def measure(part: Part) -> None:
    shapes = {"qkv": (192, 128), "gate_up": (128, 128)} if part.small else SHAPES
    rows = (1, 17) if part.small else ROWS
    for kind in KINDS[:2] if part.small else KINDS:
        part.attempt(f"right/{kind}", lambda kind=kind: right(part, kind))
    for kind in KINDS[:2] if part.small else KINDS:
        for name, shape in shapes.items():
            if kind in KINDS[4:] and name != "qkv":
                continue
            part.attempt(
                f"speed/{kind}/{name}", lambda k=kind, n=name, s=shape: speed(part, k, n, s, rows)
            )
            torch.cuda.empty_cache()


def multiplied(x: torch.Tensor, w: Matrix, dtype: torch.dtype | None = None) -> torch.Tensor:
    if w.kind != "int8":
        return linear(x, [w], dtype=dtype)
    scales = x.float().abs().amax(1) / 127
    codes = (x.float() / scales[:, None]).round().to(torch.int8)
    return quantised_linear(codes, scales, w, dtype or x.dtype)


def right(part: Part, kind: Any) -> dict[str, Any]:
    """Against f64; and a row's bits in batches of every size."""
    n, k = (80, 96) if part.small else (1040, 4096)
    w, exact = random_pair(kind, n, k, part.device)
    x = part.randn(24 if part.small else 300, k)
    whole = multiplied(x, w, torch.float32)
    if kind == "int8":
        scales = x.float().abs().amax(1) / 127
        codes = (x.float() / scales[:, None]).round().double()
        wanted = (codes @ exact.double().T) * scales.double()[:, None]
    else:
        wanted = x.double() @ exact.to(torch.bfloat16).double().T
    counts = [c for c in (1, 2, 7, 16, 17, 33, 64, 129, 256) if c < len(x)]
    same = all(torch.equal(multiplied(x[:c], w, torch.float32), whole[:c]) for c in counts)
    alone = torch.equal(multiplied(x[5:6], w, torch.float32), whole[5:6])
    error = error_of(whole, wanted)
    return {
        "error_of_largest": error,
        "right": error < part.tolerance(LARGEST_ERROR),
        "invariant": same and alone,
    }


def speed(
    part: Part, kind: Any, name: str, shape: tuple[int, int], rows: tuple[int, ...]
) -> dict[str, Any]:
    (n, k), gated = shape, name == "gate_up" and kind != "int8"
    first = random_matrix(kind, n, k, part.device)
    number = 1 if part.small else copies(first.nbytes)
    ws = [first, *(copied(first) for _ in range(number - 1))]
    found: dict[str, Any] = {}
    for count in rows:
        x = part.randn(count, k)
        product = partial(gated_linear, activation="silu") if gated else multiplied
        calls = [partial(product, x, w) for w in ws]
        outs = n // 2 if gated else n
        moved = first.nbytes + 2 * count * (k + outs)
        found[str(count)] = part.rates(part.seconds(calls), moved, 2 * count * n * k)
        if kind == "bf16":
            vendor = part.seconds([partial(torch.matmul, x, w.codes.T) for w in ws])
            found[str(count)] |= {"vendor_us": vendor * 1e6}
            found[str(count)]["of_vendor"] = vendor * 1e6 / found[str(count)]["us"]
    return found


def copied(w: Matrix) -> Matrix:
    """The same numbers in other places, where no cache has them."""
    held = "codes", "scales", "extra", "factors"
    tensors = {name: getattr(w, name) for name in held}
    return replace(w, **{name: None if t is None else t.clone() for name, t in tensors.items()})
