"""Rows of matrices as numbers (embedding), which may be sampled a moment ago; rows of activations as
int8 (W8A8)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.matrices import PACKED, Matrix, operands, ptx
from elinvar.ops.triton.numbers import narrow, row_scale, within_int8
from elinvar.ops.triton.tiles import pair, wide


@triton.jit(do_not_specialize=["num_ids"])
def gather_kernel(ids, codes, scales, extra, factors, y, factor, num_ids, N: tl.constexpr,
                  K: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr, PTX: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Grid: blocks of tokens, spans of 128 dims."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * 128
    live = (tokens < num_ids)[:, None]
    rows = tl.load(ids + tokens, mask=tokens < num_ids, other=0)
    rows = tl.where((rows >= 0) & (rows < N), rows, 0)
    times = tl.full((BLOCK, 1), factor, tl.float32)
    if factors is not None:
        times *= tl.load(factors + rows)[:, None]
    y += tokens[:, None].to(tl.int64) * K + first
    kind: tl.constexpr = y.dtype.element_ty
    if PACKED:
        j = tl.arange(0, 32)[None, :]
        for i in tl.static_range(2):
            low, high = pair(codes, scales, extra, first // 64 + i, rows, N, KIND, PTX)
            at = i * 64 + j
            tl.store(y + at, narrow(low * times, kind), mask=live & (first + at < K))
            at += 32
            tl.store(y + at, narrow(high * times, kind), mask=live & (first + at < K))
    else:
        at = tl.arange(0, 128)[None, :]
        w = wide(codes, scales, rows, first, K, KIND, 128, K % 128 == 0, PTX).to(tl.float32)
        tl.store(y + at, narrow(w * times, kind), mask=live & (first + at < K))


@triton.jit
def quantise_kernel(x, codes, scales, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        values = tl.load(x + row * x_stride + k, mask=k < K, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    scale, inverse = row_scale(tl.max(largest))
    tl.store(scales + row, scale)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        values = tl.load(x + row * x_stride + k, mask=k < K, other=0).to(tl.float32) * inverse
        tl.store(codes + row * K + k, within_int8(values).to(tl.int8), mask=k < K)


# Token ids [T], of which ~k stands for that of row k in `last` [L]: they take its place. Must move 4 bytes
# an id, and 8 more for each that has come.
@triton.jit(do_not_specialize=["num_ids"])
def arrive_kernel(ids, last, num_ids, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(ids + at, mask=at < num_ids, other=0)
    tl.store(ids + at, tl.load(last + ~found, mask=found < 0), mask=found < 0)


def embed(
    ids_T: torch.Tensor, w: Matrix, scale: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows of w times scale -> [T, K]; an id that w has no row for has row 0. Moves the rows."""
    n, k = w.shape
    y = w.codes.new_empty((len(ids_T), k), dtype=dtype)
    if len(ids_T):
        gather_kernel[(triton.cdiv(len(ids_T), 16), triton.cdiv(k, 128))](
            ids_T, *w.tensors, w.factors, y, scale, len(ids_T), n, k, w.kind, w.packed, ptx(y), 16
        )
    return y


def arrive(ids_T: torch.Tensor, last_L: torch.Tensor) -> None:
    """Where ids are ~k they become those of `last`."""
    arrive_kernel[(triton.cdiv(len(ids_T), 256),)](ids_T, last_L, len(ids_T), 256)


def unpack(w: Matrix) -> torch.Tensor:
    """What w stands for, f32 [N, K]."""
    return embed(torch.arange(w.shape[0], device=w.codes.device), w, 1.0)


def quantise_rows(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [T, K] and scales [T], largest |x| / 127. Moves x twice (the second time out of
    the L2 cache) and half of it again."""
    t, k = x_TK.shape
    codes = x_TK.new_empty((t, k), dtype=torch.int8)
    scales = x_TK.new_empty(t, dtype=torch.float32)
    if t:
        quantise_kernel[(t,)](x_TK, codes, scales, x_TK.stride(0), k, 1024)
    return codes, scales


def _case(kind: str) -> KernelCase:
    found = {"ids": "*i32", **operands(kind), "y": "*fp32", "factor": "fp32", "num_ids": "i32"}
    constexprs = {
        **{name: None for name, type_ in found.items() if type_ is None},
        **{"N": 128256, "K": 4096, "KIND": kind, "PACKED": kind in PACKED, "PTX": True},
        "BLOCK": 16,
    }
    signature = {name: type_ for name, type_ in found.items() if type_ is not None}
    return KernelCase(f"gather/{kind}", gather_kernel, signature, constexprs, on_amd={"PTX": False})


COMPILED = [
    *map(_case, ("bf16", "q4", "q8")),
    KernelCase(
        "gather/quantise",
        quantise_kernel,
        {"x": "*bf16", "codes": "*i8", "scales": "*fp32", "x_stride": "i32:16"},
        {"K": 4096, "BLOCK": 1024},
    ),
    KernelCase(
        "gather/arrive",
        arrive_kernel,
        {"ids": "*i32", "last": "*i32", "num_ids": "i32"},
        {"BLOCK": 256},
    ),
]
