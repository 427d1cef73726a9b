"""Rows of matrices as numbers (embedding), and rows of activations as int8 (W8A8)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elinvar.ops.triton.linear import ptx
from elinvar.ops.triton.matrices import Matrix
from elinvar.ops.triton.tiles import pair, wide


@triton.jit
def gather_kernel(ids, codes, scales, extra, factors, y, factor, N: tl.constexpr, K: tl.constexpr,
                  KIND: tl.constexpr, PACKED: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Grid: tokens, spans of 128 dims. A tile of 16 rows that are all the same one: the layouts of
    tiles.py hold no less, and their loads are the same addresses."""
    token, span = tl.program_id(0), tl.program_id(1)
    row = tl.load(ids + token)
    row = tl.where((row >= 0) & (row < N), row, 0)
    rows_N = row + tl.zeros((16,), tl.int32)
    if factors is not None:
        factor *= tl.load(factors + row)
    y += token.to(tl.int64) * K
    first_row = (tl.arange(0, 16) == 0)[:, None]
    if PACKED:
        j = tl.arange(0, 32)[None, :]
        for i in tl.static_range(2):
            low, high = pair(codes, scales, extra, span * 2 + i, rows_N, N, KIND, PTX)
            at = span * 128 + i * 64 + j + tl.zeros((16, 1), tl.int32)
            tl.store(y + at, low * factor, mask=first_row & (at < K))
            tl.store(y + at + 32, high * factor, mask=first_row & (at + 32 < K))
    else:
        w = wide(codes, scales, rows_N, span * 128, K, KIND, 128, False).to(tl.float32)
        at = span * 128 + tl.arange(0, 128)[None, :] + tl.zeros((16, 1), tl.int32)
        tl.store(y + at, w * factor, mask=first_row & (at < K))


@triton.jit
def quantise_kernel(x, codes, scales, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        values = tl.load(x + row * x_stride + k, mask=k < K, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    most = tl.minimum(tl.max(largest), 3.4e38)
    scale = tl.where(most < 1e-30, 0.0, most / 127)
    inverse = tl.where(most < 1e-30, 0.0, 127 / most)
    tl.store(scales + row, scale)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        values = tl.load(x + row * x_stride + k, mask=k < K, other=0).to(tl.float32) * inverse
        # The nearest integer, of two as near the even one, lies in the mantissa of this sum.
        codes_K = (values + 12582912.0) - 12582912.0
        codes_K = tl.minimum(tl.maximum(codes_K, -127.0), 127.0)
        tl.store(codes + row * K + k, codes_K.to(tl.int8), mask=k < K)


def embed(ids_T: torch.Tensor, w: Matrix, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Rows of w times scale -> [T, K]; an id that w has no row for has row 0. Moves the rows."""
    n, k = w.shape
    y = w.codes.new_empty((len(ids_T), k), dtype=dtype)
    if len(ids_T):
        gather_kernel[(len(ids_T), triton.cdiv(k, 128))](
            ids_T, *w.tensors, w.factors, y, scale, n, k, w.kind, w.packed, ptx(y)
        )
    return y


def unpack(w: Matrix) -> torch.Tensor:
    """What w stands for, f32 [N, K]."""
    return embed(torch.arange(w.shape[0], device=w.codes.device), w, 1.0, torch.float32)


def quantise_rows(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [T, K] and scales [T], largest |x| / 127. Moves x twice (the second time out of
    the L2 cache) and half of it again."""
    t, k = x_TK.shape
    codes = x_TK.new_empty((t, k), dtype=torch.int8)
    scales = x_TK.new_empty(t, dtype=torch.float32)
    if t:
        quantise_kernel[(t,)](x_TK, codes, scales, x_TK.stride(0), k, 1024)
    return codes, scales
