"""Rows of a matrix of any kind, by ids: embeddings. Moves a row as it is stored, and 4 bytes an
element of the result, which is the residual stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.matrices import Matrix
from elinvar.ops.triton.tiles import pair, wide


@triton.jit
def _embed_kernel(ids, codes, scales, extra, factors, out, scale, N: tl.constexpr,
                  K: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Programs (token, block of dims)."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token)
    row = tl.where(row < N, row, 0) + tl.arange(0, 1)
    first = tl.program_id(1) * BLOCK
    factor = tl.load(factors + row)[:, None] * scale if factors is not None else scale
    at = tl.arange(0, BLOCK if not PACKED else 32)[None, :]
    to = out + token * K + first + at
    if PACKED:
        for i in tl.static_range(BLOCK // 64):
            if first + 64 * i < K:
                low, high = pair(codes, scales, extra, first // 64 + i, row, N, KIND)
                dims = first + 64 * i + at
                tl.store(to + 64 * i, low * factor, dims < K)
                tl.store(to + 64 * i + 32, high * factor, dims + 32 < K)
    else:
        w = wide(codes, scales, row, first, K, KIND, BLOCK, K % BLOCK == 0)
        tl.store(to, w.to(tl.float32) * factor, first + at < K)


def embed(ids_T: torch.Tensor, w_VD: Matrix, scale: float) -> torch.Tensor:
    n, k = w_VD.shape
    out = torch.empty((len(ids_T), k), dtype=torch.float32, device=ids_T.device)
    block = 128  # what a scale of fp8 is for
    _embed_kernel[len(ids_T), triton.cdiv(k, block)](
        ids_T, *w_VD.tensors, w_VD.factors, out, scale, n, k, w_VD.kind, w_VD.packed, block
    )
    return out


def _case(kind: str, codes: str, scales: str | None, packed: bool) -> KernelCase:
    pointers = {"ids": "*i32", "codes": codes, "out": "*fp32", "scale": "fp32"}
    pointers |= {} if scales is None else {"scales": scales}
    rest = {name: None for name in ("scales", "extra", "factors") if name not in pointers}
    shape = {"N": 128256, "K": 4096, "KIND": kind, "PACKED": packed, "BLOCK": 128}
    return KernelCase(f"embed/{kind}", _embed_kernel, pointers, {**shape, **rest}, num_warps=1)


COMPILED = [
    _case("bf16", "*bf16", None, False),
    _case("q8", "*i8", "*i32", True),
    _case("q4", "*u8", "*i32", True),
]
