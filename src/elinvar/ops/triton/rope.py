"""One kernel from a step's queries, keys and values to the cache: norms, rotation, formats, writing.

A program has some heads, of queries, of keys or of values, those of a token side by side. What it computes:
`rope_write` in ops/api.py; how the cache lies: caches.py. Bytes of a token are those of its row of
qkv (4 each), of its queries in `a` bytes and of its keys and values as the cache stores them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elinvar.ops.triton.caches import KVLayer
from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.device import INTERPRETER
from elinvar.ops.triton.numbers import narrow, saturate_int8, to_cache, to_int8

ROWS = 256 if INTERPRETER else 8
"""Heads of a program."""


@triton.jit
def _squares(row, first, COUNT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """Sums of squares of the COUNT heads of each token from head `first` on, one after the other."""
    at = tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((ROWS,), tl.float32)
    for head in range(COUNT):
        x = tl.load(row + (first + head) * D + at, at < D, 0.0).to(tl.float32)
        sums += tl.sum(x * x, 1)
    return sums


@triton.jit
def _normed(x, at, heads, gain, inverse, D: tl.constexpr, WHOLE: tl.constexpr, inside):
    """x times 1 / rms times its gain; heads [ROWS, 1]: their places among those of their part."""
    place = heads * D + at if WHOLE else at
    return x * inverse[:, None] * tl.load(gain + place, inside, 0.0)


@triton.jit
def _part(row, first, heads, gain, table, eps, COUNT: tl.constexpr, D: tl.constexpr,
          R: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """A head of each token, of a part that begins at head `first` and has COUNT [ROWS, BLOCK]: normed
    where there is a gain, of each head or of all as one row (WHOLE), and the first R dims rotated.
    row, heads, table [ROWS, 1]: where the token's row begins, which head, the cosines of its place."""
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < D
    head_row = row + (first + heads) * D
    x = tl.load(head_row + at, inside, 0.0).to(tl.float32)
    inverse = tl.zeros((ROWS,), tl.float32)
    if gain is not None:
        if WHOLE:
            inverse = _squares(row, first, COUNT, D, ROWS, BLOCK) / (COUNT * D)
        else:
            inverse = tl.sum(x * x, 1) / D
        inverse = 1.0 / tl.sqrt_rn(inverse + eps)
        x = _normed(x, at, heads, gain, inverse, D, WHOLE, inside)
    if R > 0:
        HALF: tl.constexpr = R // 2
        low = at < HALF
        turned = at < R
        other = tl.where(low, at + HALF, at - HALF)
        pair = tl.load(head_row + other, turned, 0.0).to(tl.float32)
        if gain is not None:
            pair = _normed(pair, other, heads, gain, inverse, D, WHOLE, turned)
        angle = tl.where(low, at, at - HALF)
        cos = tl.load(table + angle, turned, 1.0)
        sin = tl.load(table + HALF + angle, turned, 0.0)
        x = tl.where(turned, tl.fma(x, cos, tl.where(low, -pair, pair) * sin), x)
    return x


@triton.jit
def _turned(x, TURNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums and differences of dims 16, 32 .. apart, TURNED of them together."""
    APART: tl.constexpr = BLOCK if TURNED == 1 else 16
    if APART < BLOCK:
        for stage in tl.static_range(5):
            if 2 << stage <= TURNED:
                pairs = tl.reshape(x, (ROWS, BLOCK // (32 << stage), 2, 16 << stage))
                a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
                both = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
                x = tl.reshape(both, (ROWS, BLOCK))
    return x


@triton.jit
def _store(x, heads, live, cache, scales, slots, block_stride, head_stride, scale_block, scale_head,
           D: tl.constexpr, PADDED: tl.constexpr, KIND: tl.constexpr, TURNED: tl.constexpr,
           ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Vectors [ROWS, BLOCK] in the cache's format, each of a head (heads [ROWS, 1]) and in a slot."""
    at = tl.arange(0, BLOCK)[None, :]
    block, place = (slots // 32).to(tl.int64), slots % 32
    to = cache + block * block_stride + heads * head_stride + place * PADDED + at
    if KIND == "int8":
        x = _turned(saturate_int8(x, TURNED), TURNED, ROWS, BLOCK)
        codes, scale = to_int8(x, tl.max(tl.abs(x), 1)[:, None])
        tl.store(to, codes, live & (at < D))
        to = scales + block * scale_block + heads * scale_head + place
        tl.store(to, scale / TURNED, live)
    else:
        tl.store(to, to_cache(x, KIND), live & (at < D))


@triton.jit(do_not_specialize=["num_tokens"])
def _rope_kernel(x, positions, table, q_out, q_gain, k_gain, v_gain, k, v, k_scales, v_scales,
                 slots, num_tokens, eps, block_stride, head_stride, scale_block, scale_head,
                 H: tl.constexpr, HKV: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
                 R: tl.constexpr, PADDED: tl.constexpr, Q_WHOLE: tl.constexpr,
                 K_WHOLE: tl.constexpr, KIND: tl.constexpr, TURNED: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """First the tiles of queries, heads of a token side by side, then those of keys, of values."""
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(num_tokens * H, ROWS)
    kv_tiles = tl.cdiv(num_tokens * HKV, ROWS)
    if tile < q_tiles:
        which = tile * ROWS + tl.arange(0, ROWS)[:, None]
        live = which < num_tokens * H
        token = tl.where(live, which // H, 0)
        cosines = table + tl.load(positions + token).to(tl.int64) * R
        row = x + token.to(tl.int64) * N
        q = _part(row, 0, which % H, q_gain, cosines, eps, H, D, R, Q_WHOLE, ROWS, BLOCK)
        at = tl.arange(0, BLOCK)[None, :]
        q_to = q_out + which.to(tl.int64) * D + at
        tl.store(q_to, narrow(q, q_out.dtype.element_ty), live & (at < D))
    elif HKV > 0:
        values = tile >= q_tiles + kv_tiles
        which = (tile - q_tiles) % kv_tiles * ROWS + tl.arange(0, ROWS)[:, None]
        live = which < num_tokens * HKV
        token = tl.where(live, which // HKV, 0)
        heads = which % HKV
        row = x + token.to(tl.int64) * N
        to = tl.load(slots + token)
        if values:
            y = _part(row, H + HKV, heads, v_gain, table, eps, HKV, D, 0, False, ROWS, BLOCK)
            _store(y, heads, live, v, v_scales, to, block_stride, head_stride, scale_block,
                   scale_head, D, PADDED, KIND, 1, ROWS, BLOCK)  # fmt: skip
        else:
            cosines = table + tl.load(positions + token).to(tl.int64) * R
            y = _part(row, H, heads, k_gain, cosines, eps, HKV, D, R, K_WHOLE, ROWS, BLOCK)
            _store(y, heads, live, k, k_scales, to, block_stride, head_stride, scale_block,
                   scale_head, D, PADDED, KIND, TURNED, ROWS, BLOCK)  # fmt: skip


def rope_write(
    qkv_TN: torch.Tensor,
    positions_T: torch.Tensor,
    rope_PD: torch.Tensor,
    kv: KVLayer,
    slots_T: torch.Tensor,
    num_heads: int,
    q_gain: torch.Tensor | None,
    k_gain: torch.Tensor | None,
    eps: float,
    v_gain: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    qkv = qkv_TN.contiguous()
    dim, num_kv = kv.head_dim, kv.k.shape[1]
    out = torch.empty((len(qkv), num_heads, dim), dtype=dtype, device=qkv.device)
    block_stride, head_stride, padded, _ = kv.k.stride()
    scale_strides = (0, 0) if kv.k_scales is None else kv.k_scales.stride()[:2]
    kv_parts = 1 if kv.keys_alone else 2
    tokens = len(qkv)
    tiles = triton.cdiv(tokens * num_heads, ROWS) + kv_parts * triton.cdiv(tokens * num_kv, ROWS)
    _rope_kernel[tiles,](
        *(qkv, positions_T, rope_PD, out, q_gain, k_gain, v_gain),
        *(kv.k, kv.v, kv.k_scales, kv.v_scales, slots_T, tokens, eps),
        *(block_stride, head_stride, *scale_strides),
        *(num_heads, num_kv, qkv.shape[1], dim, rope_PD.shape[1], padded),
        *(_whole(q_gain, dim), _whole(k_gain, dim), kv.dtype, kv.turned_dims),
        *(ROWS, triton.next_power_of_2(dim)),
    )
    return out


def rope_queries(
    q_TN: torch.Tensor,
    positions_T: torch.Tensor,
    rope_PD: torch.Tensor,
    num_heads: int,
    gain_D: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    q = q_TN.contiguous()
    dim = q.shape[1] // num_heads
    out = torch.empty((len(q), num_heads, dim), dtype=dtype, device=q.device)
    _rope_kernel[triton.cdiv(len(q) * num_heads, ROWS),](
        *(q, positions_T, rope_PD, out, gain_D, None, None),
        *(None, None, None, None, None, len(q), eps, 0, 0, 0, 0),
        *(num_heads, 0, q.shape[1], dim, rope_PD.shape[1], dim),
        *(_whole(gain_D, dim), False, "", 1, ROWS, triton.next_power_of_2(dim)),
    )
    return out


def _whole(gain: torch.Tensor | None, dim: int) -> bool:
    """Whether it is of all heads as one row."""
    return gain is not None and len(gain) != dim


def _case(name: str, cache: str, **other: object) -> KernelCase:
    pointers = {"x": "*fp32", "positions": "*i32", "table": "*fp32", "q_out": "*bf16"}
    pointers |= {"k": cache, "v": cache, "slots": "*i32", "num_tokens": "i32", "eps": "fp32"}
    strides = dict.fromkeys(("block_stride", "head_stride", "scale_block", "scale_head"), "i32:16")
    optional = dict.fromkeys(("q_gain", "k_gain", "v_gain", "k_scales", "v_scales"))
    constexprs: dict[str, object] = {
        **{"H": 32, "HKV": 8, "N": 6144, "D": 128, "R": 128, "PADDED": 128, "Q_WHOLE": False},
        **{"K_WHOLE": False, "KIND": "f16", "TURNED": 1, "ROWS": 8, "BLOCK": 128},
    }
    given = {name: "*fp32" for name in optional if other.pop(name, False)}
    rest = {name: None for name in optional if name not in given}
    return KernelCase(name, _rope_kernel, pointers | strides | given, constexprs | rest | other)


COMPILED = [
    _case("rope/llama-f16", "*fp16"),
    _case("rope/qwen3-fp8", "*u8", KIND="fp8", q_gain=True, k_gain=True),
    _case(
        "rope/olmo2-bf16",
        "*bf16",
        KIND="bf16",
        q_gain=True,
        k_gain=True,
        Q_WHOLE=True,
        K_WHOLE=True,
    ),
    _case("rope/partial-int8", "*i8", KIND="int8", R=64, TURNED=8, k_scales=True, v_scales=True),
]
