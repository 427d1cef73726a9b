"""Products of tokens with the experts that they are routed to, and their sum (ops.api.Ops.moe).

Five launches, none of which waits for the host: `count` and `arrange` make a list of the (token, place)
pairs by ascending expert, tokens in order, and cut it into row tiles of one expert each; `expert` is the
product of linear.py with rows and matrix found through that list, once by gate and up, once by down;
`combine` adds for each token by ascending expert id, one chain of FMAs from 0. No atomics: the list, too, is
the same whatever ran first, and no row's bits depend on where in it the row is.

Moves, in bytes: each expert that any token has once, T k (2 D + 2 N) of activations and as many again
between products. A decode step of Qwen3-30B-A3B (8 of 128 experts, D 2048, N 768): 37.7 M weights a
layer, 75 MB bf16 or 24 MB q4: 17.6 and 5.5 us on an H200 at full rate (expected; not yet measured), so
the five launches count, and belong into a graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from elinvar.base.config import Activation
from elinvar.ops.triton.activations import rounded_product
from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.configs import Config, default
from elinvar.ops.triton.gather import quantise_rows
from elinvar.ops.triton.linear import case_of, gate_halves, row_tile
from elinvar.ops.triton.matrices import PACKED, Matrix, ptx
from elinvar.ops.triton.numbers import narrow
from elinvar.ops.triton.tiles import place, product

_ANY_ROWS = ["num_pairs", "max_tiles"]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceExperts:
    """The experts of a layer, stacked: both [E, 2 N, D], gate above up, and downs [E, D, N]."""

    both: Matrix
    downs: Matrix
    both_bias: torch.Tensor | None = None
    """f32 [E, 2 N]"""
    down_bias: torch.Tensor | None = None
    """f32 [E, D]"""


@triton.jit(do_not_specialize=_ANY_ROWS)
def count_kernel(ids, counts, num_pairs, BLOCK: tl.constexpr):
    """How many pairs each expert has. Grid: experts."""
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_pairs, BLOCK):
        at = first + tl.arange(0, BLOCK)
        found += (tl.load(ids + at, mask=at < num_pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found))


@triton.jit(do_not_specialize=_ANY_ROWS)
def arrange_kernel(ids, counts, order, tiles, num_pairs, max_tiles, E: tl.constexpr,
                   BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """An expert's pairs into `order`, and its tiles into `tiles` [3, max_tiles]: expert, first place in
    `order`, and the end of the expert there. Grid: experts, and one more that says which tiles are
    none's."""
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    counts_E = tl.load(counts + e, mask=e < E, other=0)
    start = tl.sum(tl.where(e < expert, counts_E, 0))
    first_tile = tl.sum(tl.where(e < expert, (counts_E + BLOCK_M - 1) // BLOCK_M, 0))
    if expert == E:
        for first in range(first_tile, max_tiles, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(tiles + at, -1, mask=at < max_tiles)
    else:
        end = start + tl.sum(tl.where(e == expert, counts_E, 0))
        for first in range(start, end, BLOCK_M * BLOCK):
            i = tl.arange(0, BLOCK)
            row = first + i * BLOCK_M
            at = tiles + first_tile + (first - start) // BLOCK_M + i
            tl.store(at, expert, mask=row < end)
            tl.store(at + max_tiles, row, mask=row < end)
            tl.store(at + 2 * max_tiles, end, mask=row < end)
        for first in range(0, num_pairs, BLOCK):
            at = first + tl.arange(0, BLOCK)
            mine = (tl.load(ids + at, mask=at < num_pairs, other=-1) == expert).to(tl.int32)
            tl.store(order + start + tl.cumsum(mine, 0) - 1, at, mask=mine == 1)
            start += tl.sum(mine)


@triton.jit(do_not_specialize=["max_tiles"])
def expert_kernel(x, codes, scales, extra, factors, bias, x_scales, weights, order, tiles, y, max_tiles,
                  x_stride, TOP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr,
                  KIND: tl.constexpr, PACKED: tl.constexpr, ACTIVATION: tl.constexpr,
                  CODES: tl.constexpr, SCALES: tl.constexpr, EXTRA: tl.constexpr,
                  PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """One tile of one expert. With an activation: rows of x by token, y by place in `order`;
    without: x by place, y by pair. CODES, SCALES, EXTRA: elements from one expert to the next.
    weights: factors of what an expert sees, or None."""
    WIDTH: tl.constexpr = BLOCK_N if ACTIVATION is None else BLOCK_N // 2
    tile_m, tile_n = place(tl.program_id(0), max_tiles, tl.cdiv(OUT, WIDTH))
    expert = tl.load(tiles + tile_m)
    if expert < 0:
        return
    end = tl.load(tiles + 2 * max_tiles + tile_m)
    places = tl.load(tiles + max_tiles + tile_m) + tl.arange(0, BLOCK_M)
    live_M = (places < end)[None, :]
    places = tl.minimum(places, end - 1)
    pairs = tl.load(order + places).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    columns_N = tile_n * WIDTH + n % WIDTH
    if OUT % WIDTH != 0:
        columns_N = tl.minimum(columns_N, OUT - 1)
    columns_N += n // WIDTH * OUT
    matrix = expert.to(tl.int64)
    codes += matrix * CODES
    if scales is not None:
        scales += matrix * SCALES
    if extra is not None:
        extra += matrix * EXTRA
    rows_M = places.to(tl.int64) if ACTIVATION is None else pairs // TOP
    acc = product(codes, scales, extra, columns_N, x, rows_M * x_stride,
                  N, K, KIND, PACKED, BLOCK_K, PARTS, PTX)  # fmt: skip
    if factors is not None:
        acc *= tl.load(factors + matrix * N + columns_N)[:, None]
    if x_scales is not None:
        acc *= tl.load(x_scales + rows_M)[None, :]
    if weights is not None:
        acc *= tl.load(weights + pairs)[None, :]
    if bias is not None:
        acc += tl.load(bias + matrix * N + columns_N)[:, None]
    outs = tile_n * WIDTH + tl.arange(0, WIDTH)
    live = live_M & (outs < OUT)[:, None]
    kind: tl.constexpr = y.dtype.element_ty
    if ACTIVATION is None:
        tl.store(y + pairs[None, :] * OUT + outs[:, None], narrow(acc, kind), mask=live)
    else:
        gate, up = gate_halves(acc, BLOCK_M)
        h = narrow(rounded_product(gate, up, kind, ACTIVATION), kind)
        tl.store(y + places.to(tl.int64)[None, :] * OUT + outs[:, None], h, mask=live)


@triton.jit
def combine_kernel(x, weights, y, D: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: tokens, blocks of columns. weights: None for 1."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in range(TOP):
        pair = token * TOP + j
        values = tl.load(x + pair * D + d, mask=d < D, other=0).to(tl.float32)
        weight = 1.0 if weights is None else tl.load(weights + pair)
        acc = tl.fma(values, weight + tl.zeros((BLOCK,), tl.float32), acc)
    tl.store(y + token * D + d, acc, mask=d < D)


def moe(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    experts: DeviceExperts,
    activation: Activation,
    scale_inputs: bool = False,
) -> torch.Tensor:
    """-> f32 [T, D]; ids ascending in each row. What an expert gives a token is rounded to the dtype
    of x, which halves the bytes of many rows, and added as f32."""
    (t, d), top = x_TD.shape, ids_TK.shape[1]
    y = x_TD.new_empty((t, d), dtype=torch.float32)
    if not t:
        return y
    pairs = t * top
    height = tile_height(experts.both, pairs)
    order, tiles = _arrange(ids_TK, experts, height)
    hidden = x_TD.new_empty((pairs, experts.downs.shape[1]))
    inside = weights_TK if scale_inputs else None
    _experts(
        x_TD, experts.both, experts.both_bias, inside, order, tiles, hidden, top, height, activation
    )
    each = x_TD.new_empty((pairs, d))
    _experts(hidden, experts.downs, experts.down_bias, None, order, tiles, each, top, height, None)
    outside = None if scale_inputs else weights_TK
    combine_kernel[(t, triton.cdiv(d, 512))](each, outside, y, d, top, 512)
    return y


def tile_height(both: Matrix, pairs: int) -> int:
    """Of both products: `Config.few` where experts have so few pairs in the mean, else block_m."""
    assert both.experts is not None
    return row_tile(both.config, -(-pairs // both.experts))


def _arrange(
    ids_TK: torch.Tensor, experts: DeviceExperts, height: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, tiles) as `arrange_kernel` has them."""
    pairs, e = ids_TK.numel(), experts.both.experts
    assert e is not None
    counts = ids_TK.new_empty(e)
    order = ids_TK.new_empty(pairs)
    # No expert has more than one tile that is not full, and no tile is empty.
    tiles = ids_TK.new_empty((3, min(pairs, pairs // height + e)))
    block = min(1024, triton.next_power_of_2(pairs))
    count_kernel[(e,)](ids_TK, counts, pairs, block)
    arrange_kernel[(e + 1,)](
        ids_TK, counts, order, tiles, pairs, tiles.shape[1], e, triton.next_power_of_2(e),
        height, block,
    )  # fmt: skip
    return order, tiles


def _experts(
    x: torch.Tensor,
    w: Matrix,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    order: torch.Tensor,
    tiles: torch.Tensor,
    y: torch.Tensor,
    top: int,
    height: int,
    activation: Activation | None,
) -> None:
    (n, k), config = w.shape, w.config
    x_scales = None
    if w.kind == "int8":
        x, x_scales = quantise_rows(x)
    out = n if activation is None else n // 2
    width = config.block_n if activation is None else config.block_n // 2
    strides = [0 if part is None else part[0].numel() for part in w.tensors]
    max_tiles = tiles.shape[1]
    expert_kernel[(max_tiles * triton.cdiv(out, width),)](
        x, *w.tensors, w.factors, bias, x_scales, weights, order, tiles, y, max_tiles, x.stride(0),
        top, n, k, out, w.kind, w.packed, activation, *strides, config.parts,
        height, config.block_n, config.block_k, ptx(x),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _case(name: str, kind: str, config: Config, activation: str | None) -> KernelCase:
    """Of Qwen3-30B-A3B: 128 experts [768, 2048]; the strides of `extra` matter to none of these."""
    n, k = (1536, 2048) if activation else (2048, 768)
    pointers = {
        **{"x": "*i8" if kind == "int8" else "*bf16", "bias": None, "weights": None},
        **{"x_scales": "*fp32" if kind == "int8" else None},
        **{"order": "*i32", "tiles": "*i32"},
        **{"y": "*bf16", "max_tiles": "i32", "x_stride": "i32:16"},
    }
    shape = {
        **{"TOP": 8, "N": n, "K": k, "OUT": 768 if activation else n, "ACTIVATION": activation},
        **{"CODES": n * k // 2 if kind in PACKED else n * k, "EXTRA": 0},
        "SCALES": n * k // (16 * 128) if kind == "fp8-blocks" else n * k // 32,
    }
    return case_of(f"experts/{name}", expert_kernel, pointers, shape, kind, config, "wgmma")


COMPILED = [
    KernelCase(
        "experts/count",
        count_kernel,
        {"ids": "*i32", "counts": "*i32", "num_pairs": "i32"},
        {"BLOCK": 1024},
    ),
    KernelCase(
        "experts/arrange",
        arrange_kernel,
        {
            **{"ids": "*i32", "counts": "*i32", "order": "*i32", "tiles": "*i32"},
            **{"num_pairs": "i32", "max_tiles": "i32"},
        },
        {"E": 128, "BLOCK_E": 128, "BLOCK_M": 64, "BLOCK": 1024},
    ),
    _case("bf16/gated", "bf16", default("bf16"), "silu"),
    _case("bf16/down", "bf16", default("bf16"), None),
    _case("q4/gated", "q4", replace(default("q4"), block_n=128, few=16), "silu"),
    _case("fp8-blocks/gated", "fp8-blocks", default("fp8-blocks"), "silu"),
    _case("int8/gated", "int8", default("int8"), "silu"),
    _case("mxfp4/down", "mxfp4", default("mxfp4"), None),
    KernelCase(
        "experts/combine",
        combine_kernel,
        {"x": "*bf16", "weights": "*fp32", "y": "*fp32"},
        {"D": 2048, "TOP": 8, "BLOCK": 512},
    ),
]
