"""Products with matrices of every kind (dense, W4A16 and its like, W8A8), gated ones too.

y [M, N] = x [M, K] w^T, times factors, plus bias; f32 sums over ascending k (tiles.py), one rounding
to the dtype of y. Of a gated matrix, gate above up [2 N, K], y = act(gate x) * (up x), where both are
rounded to the dtype of y first: to the bit what `gated` makes of the product. Rows of x are rounded to int8 before
an int8 matrix, where they have not come so.

Bits do not depend on M: tiles differ in who computes what alone. K is one ascending chain, or
`Config.parts` chains that are added in ascending order: by one program where there are many rows,
else by one program each and `merge`. Height of tiles: see tiles.py and Config.few.

Moves, in bytes: the matrix once (N K times 2 bf16, 0.625 q4, 0.75 q5, 1.0625 q8, 0.53 mxfp4, 0.5625 nvfp4,
1 fp8 and int8), x and y. Computes 2 M N K FLOPs. Expected on an H200 (4.3 TB/s, 770 TFLOP/s;
not yet measured): bytes bind below some 180 rows for bf16 and 50 for q4; N = K = 4096 at one row
takes 7.8 us as bf16 and 2.4 us as q4 at the full rate. q4 is bound by dequantising
before it is by bytes if a weight takes more than 4 instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from elinvar.base.config import Activation
from elinvar.ops.triton.activations import rounded_product
from elinvar.ops.triton.cases import KernelCase, Want
from elinvar.ops.triton.configs import Config, default
from elinvar.ops.triton.gather import quantise_rows
from elinvar.ops.triton.matrices import PACKED, Matrix, operands, ptx
from elinvar.ops.triton.numbers import narrow
from elinvar.ops.triton.tiles import one_part, place, product

_ANY_ROWS = ["num_rows"]
"""An integer that is 1 or a multiple of 16 would be compiled in: another kernel for other rows."""


@triton.jit
def finish(acc, factors, bias, columns, x_scales):
    """Sums times the factors of columns and of rows, plus bias."""
    if factors is not None:
        acc *= tl.load(factors + columns)
    if x_scales is not None:
        acc *= x_scales
    if bias is not None:
        acc += tl.load(bias + columns)
    return acc


@triton.jit
def gate_halves(acc, BLOCK_M: tl.constexpr):
    """[BLOCK_N, BLOCK_M] with gate's outputs in its first half, up's in its second -> both"""
    both = tl.reshape(acc, (2, acc.shape[0] // 2, BLOCK_M))
    return tl.split(tl.permute(both, (1, 2, 0)))


@triton.jit(do_not_specialize=_ANY_ROWS)
def linear_kernel(x, codes, scales, extra, factors, bias, x_scales, y, num_rows, x_stride, y_stride,
                  N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr, KIND: tl.constexpr,
                  PACKED: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
                  APART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Grid: tiles, heads, parts. OUT: outputs of a head (all N without heads, half of them gated);
    head h has the rows h OUT .. of w and the columns h K .. of x. APART: y is f32 [PARTS, M, N], what
    `merge` takes."""
    WIDTH: tl.constexpr = BLOCK_N if ACTIVATION is None else BLOCK_N // 2
    head = tl.program_id(1)
    tile_m, tile_n = place(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(OUT, WIDTH))
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_M = tl.minimum(rows, num_rows - 1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    columns_N = tile_n * WIDTH + n % WIDTH
    if OUT % WIDTH != 0:
        columns_N = tl.minimum(columns_N, OUT - 1)
    columns_N += head * OUT + n // WIDTH * OUT
    x += head * K
    if APART:
        part = tl.program_id(2)
        acc = one_part(codes, scales, extra, columns_N, x, rows_M * x_stride, part,
                       N, K, KIND, PACKED, BLOCK_K, PARTS, PTX)  # fmt: skip
        y += part.to(tl.int64) * num_rows * N
    else:
        acc = product(codes, scales, extra, columns_N, x, rows_M * x_stride,
                      N, K, KIND, PACKED, BLOCK_K, PARTS, PTX)  # fmt: skip
        row_scales = None if x_scales is None else tl.load(x_scales + rows_M)[None, :]
        acc = finish(acc, factors, bias, columns_N[:, None], row_scales)
    live_M = rows[None, :] < num_rows
    kind: tl.constexpr = y.dtype.element_ty
    if ACTIVATION is None or APART:
        live = live_M & (tile_n * WIDTH + n % WIDTH < OUT)[:, None]
        tl.store(y + rows_M[None, :] * y_stride + columns_N[:, None], narrow(acc, kind), mask=live)
    else:
        gate, up = gate_halves(acc, BLOCK_M)
        out = rounded_product(gate, up, kind, ACTIVATION)
        outs = tile_n * WIDTH + tl.arange(0, WIDTH)
        live = live_M & (outs < OUT)[:, None]
        tl.store(y + rows_M[None, :] * y_stride + outs[:, None], narrow(out, kind), mask=live)


@triton.jit(do_not_specialize=_ANY_ROWS)
def merge_kernel(partial, factors, bias, x_scales, y, num_rows, y_stride, N: tl.constexpr,
                 OUT: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """y of the sums of parts [PARTS, M, N], f32. Grid: rows, blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < OUT
    at = tl.where(live, columns, 0)
    row_scale = None if x_scales is None else tl.load(x_scales + row)
    kind: tl.constexpr = y.dtype.element_ty
    out = added(partial, row, at, num_rows, N, PARTS)
    out = finish(out, factors, bias, at, row_scale)
    if ACTIVATION is not None:
        up = added(partial, row, at + OUT, num_rows, N, PARTS)
        up = finish(up, factors, bias, at + OUT, row_scale)
        out = rounded_product(out, up, kind, ACTIVATION)
    tl.store(y + row * y_stride + columns, narrow(out, kind), mask=live)


@triton.jit
def added(partial, row, columns, num_rows, N: tl.constexpr, PARTS: tl.constexpr):
    acc = tl.zeros(columns.shape, tl.float32)
    for part in range(PARTS):
        acc += tl.load(partial + (part * num_rows + row) * N + columns)
    return acc


def linear(
    x_TK: torch.Tensor,
    weights: Sequence[Matrix],
    bias_N: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x w^T of matrices with one K side by side -> [T, sum of N] of `dtype`, that of x unless said."""
    total = sum(w.shape[0] for w in weights)
    y = x_TK.new_empty((len(x_TK), total), dtype=dtype or x_TK.dtype)
    at = 0
    for w in weights:
        n = w.shape[0]
        _launch(x_TK, w, y[:, at : at + n], bias=None if bias_N is None else bias_N[at : at + n])
        at += n
    return y


def gated_linear(x_TK: torch.Tensor, both: Matrix, activation: Activation) -> torch.Tensor:
    """act(x gate^T) * (x up^T) -> [T, N] of matrices that were joined, gate above up."""
    y = x_TK.new_empty((len(x_TK), both.shape[0] // 2))
    _launch(x_TK, both, y, activation=activation)
    return y


def head_linear(x_TK: torch.Tensor, w: Matrix, num_heads: int) -> torch.Tensor:
    """x [T, H K] by the rows h N .. of w [H N, K] for head h -> [T, H N]"""
    y = x_TK.new_empty((len(x_TK), w.shape[0]))
    _launch(x_TK, w, y, heads=num_heads)
    return y


def quantised_linear(
    codes_TK: torch.Tensor, scales_T: torch.Tensor, w: Matrix, dtype: torch.dtype
) -> torch.Tensor:
    """W8A8 of rows that came as int8, each with a scale. Sums are exact."""
    y = codes_TK.new_empty((len(codes_TK), w.shape[0]), dtype=dtype)
    _launch(codes_TK, w, y, x_scales=scales_T)
    return y


def _launch(
    x: torch.Tensor,
    w: Matrix,
    y: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    x_scales: torch.Tensor | None = None,
    activation: Activation | None = None,
    heads: int = 1,
) -> None:
    rows, (n, k) = len(x), w.shape
    if not rows:
        return
    if w.kind == "int8" and x_scales is None:
        x, x_scales = quantise_rows(x)
    out = n // heads if activation is None else n // 2
    config = w.config
    block_m = row_tile(config, rows)
    width = config.block_n if activation is None else config.block_n // 2
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(out, width)
    apart = config.parts > 1 and rows <= config.block_m and heads == 1
    target = x.new_empty((config.parts, rows, n), dtype=torch.float32) if apart else y
    linear_kernel[(tiles, heads, config.parts if apart else 1)](
        x, *w.tensors, w.factors, bias, x_scales, target, rows, x.stride(0), target.stride(-2),
        n, k, out, w.kind, w.packed, activation, config.parts, apart,
        block_m, config.block_n, config.block_k, ptx(x),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if apart:
        merge_kernel[(rows, triton.cdiv(out, 512))](
            target, w.factors, bias, x_scales, y, rows, y.stride(0),
            n, out, activation, config.parts, 512,
        )  # fmt: skip


def row_tile(config: Config, rows: int) -> int:
    """Height of the tiles of a product with so many rows."""
    return config.few if config.few is not None and rows <= config.few else config.block_m


def case_of(
    name: str, kernel: Any, pointers: dict[str, str | None], shape: dict[str, Any],
    kind: str, config: Config, wants: Want = "",
) -> KernelCase:  # fmt: skip
    """Of a kernel with a matrix of some kind in it; `few` stands for block_m where it is set."""
    named = {**operands(kind), **pointers}
    constexprs = {
        **{name: None for name, type_ in named.items() if type_ is None},
        **{"KIND": kind, "PACKED": kind in PACKED, "PARTS": config.parts},
        **{"BLOCK_M": config.few or config.block_m, "BLOCK_N": config.block_n},
        **{"BLOCK_K": config.block_k, "PTX": True, **shape},
    }
    signature = {name: type_ for name, type_ in named.items() if type_ is not None}
    return KernelCase(
        name, kernel, signature, constexprs, config.num_warps, config.num_stages, wants,
        on_amd={"PTX": False, "num_stages": min(config.num_stages, 3)},
    )  # fmt: skip


def _case(
    name: str, kind: str, config: Config, activation: str | None = None, apart: bool = False,
    heads: int = 1,
) -> KernelCase:  # fmt: skip
    n, k = (8192 if activation else 4096), 4096 // heads
    pointers = {
        **{"x": "*i8" if kind == "int8" else "*bf16", "bias": None, "y": "*fp32"},
        **{"x_scales": "*fp32" if kind == "int8" else None},
        **{"num_rows": "i32", "x_stride": "i32:16", "y_stride": "i32:16"},
    }
    if activation:
        pointers["y"] = "*bf16"
    shape = {"N": n, "K": k, "OUT": 4096 // heads, "ACTIVATION": activation, "APART": apart}
    wants: Want = "" if kind == "f32" else "wgmma"
    return case_of(f"linear/{name}", linear_kernel, pointers, shape, kind, config, wants)


_KINDS = ("f32", "bf16", "fp8", "fp8-blocks", "int8", "q4", "q5", "q8", "mxfp4", "nvfp4")
_DENSE, _FOUR = default("bf16"), default("q4")

COMPILED = [
    *(_case(kind, kind, default(kind)) for kind in _KINDS),
    _case("bf16/few", "bf16", replace(_DENSE, few=16)),
    _case("bf16/many", "bf16", Config(128, 128, 64, 8, 4)),
    _case("bf16/parts", "bf16", Config(64, 128, 64, 4, 3, parts=4)),
    _case("bf16/apart", "bf16", Config(64, 128, 64, 4, 3, parts=4), apart=True),
    _case("bf16/heads", "bf16", _DENSE, heads=32),
    _case("bf16/gated", "bf16", _DENSE, "silu"),
    _case("q4/few", "q4", replace(_FOUR, few=16)),
    _case("q4/gated", "q4", replace(_FOUR, block_n=128), "silu"),
    KernelCase(
        "linear/merge",
        merge_kernel,
        {"partial": "*fp32", "y": "*fp32", "num_rows": "i32", "y_stride": "i32:16"},
        {
            **{"factors": None, "bias": None, "x_scales": None, "N": 4096, "OUT": 4096},
            **{"ACTIVATION": None, "PARTS": 4, "BLOCK": 512},
        },
    ),
]
