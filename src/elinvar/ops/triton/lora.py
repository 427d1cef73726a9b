"""LoRA: what the adapter of each row adds to the products of a matrix (ops/api.py `lora`).

A row has its own programs, so that it never sees whose neighbour it is. Two kernels: h = scale A x,
then y += B h. Bytes: of each row that has an adapter its A and B, which stay in the L2 cache from one
row to the next, x once and the outputs of y twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from elinvar.ops.triton.cases import KernelCase


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What all adapters have for one matrix; those that have nothing are 0."""

    column: int
    """Where its outputs begin."""
    a: torch.Tensor
    """f32 [adapters, R, K], R of the largest rank, scales multiplied in."""
    b: torch.Tensor
    """f32 [adapters, N, R]"""


@triton.jit
def _down_kernel(x, adapters, a, h, K: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """h [T, RANK] of one row."""
    token = tl.program_id(0).to(tl.int64)
    adapter = tl.load(adapters + token)
    rank = tl.arange(0, RANK)
    if adapter >= 0:
        sums = tl.zeros((RANK, BLOCK), tl.float32)
        a += adapter.to(tl.int64) * RANK * K
        for first in range(0, K, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x_K = tl.load(x + token * K + at, at < K, 0.0).to(tl.float32)
            a_RK = tl.load(a + rank[:, None] * K + at[None, :], at[None, :] < K, 0.0)
            sums = tl.fma(a_RK, tl.broadcast_to(x_K[None, :], (RANK, BLOCK)), sums)
        tl.store(h + token * RANK + rank, tl.sum(sums, 1))


@triton.jit
def _up_kernel(h, adapters, b, y, y_stride, column, N: tl.constexpr, RANK: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    adapter = tl.load(adapters + token)
    if adapter >= 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        rank = tl.arange(0, RANK)
        b += adapter.to(tl.int64) * N * RANK
        b_NR = tl.load(b + at[:, None] * RANK + rank[None, :], (at < N)[:, None], 0.0)
        more = tl.sum(b_NR * tl.load(h + token * RANK + rank)[None, :], 1)
        to = y + token * y_stride + column + at
        tl.store(to, tl.load(to, at < N, 0.0) + more, at < N)


def lora(y_TN: torch.Tensor, x_TK: torch.Tensor, adapters_T: torch.Tensor, part: Part) -> None:
    """Adds to y, f32, in place."""
    x = x_TK.contiguous()
    rows, dim = x.shape
    _, outputs, rank = part.b.shape
    h = torch.empty((rows, rank), dtype=torch.float32, device=x.device)
    _down_kernel[rows,](x, adapters_T, part.a, h, dim, rank, min(256, triton.next_power_of_2(dim)))
    block = 128
    _up_kernel[rows, triton.cdiv(outputs, block)](
        h, adapters_T, part.b, y_TN, y_TN.stride(0), part.column, outputs, rank, block
    )


COMPILED = [
    KernelCase(
        "lora/down-16",
        _down_kernel,
        {"x": "*bf16", "adapters": "*i32", "a": "*fp32", "h": "*fp32"},
        {"K": 4096, "RANK": 16, "BLOCK": 256},
    ),
    KernelCase(
        "lora/up-16",
        _up_kernel,
        {
            **{"h": "*fp32", "adapters": "*i32", "b": "*fp32", "y": "*fp32"},
            **{"y_stride": "i32:16", "column": "i32:16"},
        },
        {"N": 4096, "RANK": 16, "BLOCK": 128},
    ),
]
