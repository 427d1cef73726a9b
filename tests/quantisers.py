"""Quantised matrices as their tools publish them, packed here from the formats' descriptions.

A packer takes a matrix w [N, K] and gives the tensors that stand for it, by the ending of their
names, and the values they stand for: float math, one code after the other, no cleverness.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

F32 = np.ndarray[Any, np.dtype[np.float32]]
Packed = tuple[dict[str, torch.Tensor], F32]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = np.array(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ],
    np.float32,
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def words(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Packs 32 / bits neighbours along the axis into an int32, the first in the lowest bits."""
    each = 32 // bits
    moved = np.moveaxis(codes, axis, 0).astype(np.uint32)
    packed = np.zeros((len(moved) // each, *moved.shape[1:]), np.uint32)
    for place, which in enumerate(order or range(each)):
        packed |= moved[which::each] << np.uint32(bits * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, 0, axis)).view(np.int32))


def affine(
    w: F32, bits: int, group: np.ndarray, symmetric: bool, smallest_zero: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, F32]:
    """Codes [N, K], scales f16 [N, S], zeros [N, S] and the values; group [K] names the scale."""
    top = (1 << bits) - 1
    num = group.max() + 1
    scales, zeros = np.zeros((len(w), num), np.float16), np.zeros((len(w), num), np.int64)
    for g in range(num):
        part = w[:, group == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        span = 2 * np.maximum(-low, high) if symmetric else high - low
        scales[:, g] = span / top
        z = np.rint(-low / scales[:, g].astype(np.float32))
        zeros[:, g] = (top + 1) // 2 if symmetric else np.maximum(z, smallest_zero)
    s, z = scales[:, group].astype(np.float32), zeros[:, group]
    codes = np.clip(np.rint(w / s) + z, 0, top).astype(np.int64)
    return codes, scales, zeros, (s * (codes - z)).astype(np.float32)


def half(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float16))


def even(k: int, size: int) -> np.ndarray:
    return np.arange(k) // (k if size == -1 else size)


def gptq(
    w: F32, bits: int = 4, size: int = 32, v2: bool = False, act: bool = False, sym: bool = False
) -> Packed:
    group = even(w.shape[1], size)
    if act:
        group = group[np.random.default_rng(w.shape[0]).permutation(len(group))]
    codes, scales, zeros, dense = affine(w, bits, group, sym, smallest_zero=1)
    stored = zeros - (0 if v2 else 1)
    return {
        ".qweight": words(codes.T, bits, 0),
        ".qzeros": words(stored.T, bits, 1),
        ".scales": half(scales.T),
        ".g_idx": torch.from_numpy(group.astype(np.int32)),
    }, dense


def awq(w: F32, size: int = 32) -> Packed:
    codes, scales, zeros, dense = affine(w, 4, even(w.shape[1], size), symmetric=False)
    return {
        ".qweight": words(codes.T, 4, 1, AWQ_ORDER),
        ".qzeros": words(zeros.T, 4, 1, AWQ_ORDER),
        ".scales": half(scales.T),
    }, dense


def packed_ints(w: F32, bits: int = 4, size: int = 32, sym: bool = True) -> Packed:
    """compressed-tensors, pack-quantized; scales in bf16."""
    codes, scales, zeros, _ = affine(w, bits, even(w.shape[1], size), sym)
    stored = torch.from_numpy(scales.astype(np.float32)).bfloat16()
    spread = np.repeat(stored.float().numpy(), w.shape[1] // stored.shape[1], 1)
    tensors = {
        ".weight_packed": words(codes, bits, 1),
        ".weight_scale": stored,
        ".weight_shape": torch.tensor(w.shape),
    }
    if not sym:
        tensors[".weight_zero_point"] = words(zeros, bits, 0)
    each = np.repeat(zeros, w.shape[1] // zeros.shape[1], 1)
    return tensors, (spread * (codes - each)).astype(np.float32)


def int8(w: F32) -> Packed:
    """compressed-tensors, int-quantized: a scale a row; some codes are -128."""
    scales = np.abs(w).max(1, keepdims=True) / np.float32(127.5)
    codes = np.clip(np.rint(w / scales), -128, 127)
    tensors = {
        ".weight": torch.from_numpy(codes.astype(np.int8)),
        ".weight_scale": torch.from_numpy(scales),
    }
    return tensors, (scales * codes).astype(np.float32)


def fp8(w: F32, block: tuple[int, int] | None, name: str = ".weight_scale") -> Packed:
    """A scale for a block; None: one for all."""
    n, k = w.shape
    rows, cols = block or (n, k)
    scales = np.zeros((-(-n // rows), -(-k // cols)), np.float32)
    for i, j in np.ndindex(*scales.shape):
        part = w[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
        scales[i, j] = np.abs(part).max() / 448
    spread = scales.repeat(rows, 0)[:n].repeat(cols, 1)[:, :k]
    stored = torch.from_numpy(w / spread).to(torch.float8_e4m3fn)
    tensors = {".weight": stored, name: torch.from_numpy(scales if block else scales[0])}
    return tensors, stored.float().numpy() * spread


def fp4_codes(values: F32) -> np.ndarray:
    return np.abs(values[..., None] - E2M1).argmin(-1)


def bytes_of(codes: np.ndarray, high_first: bool = False) -> np.ndarray:
    first, second = codes[..., ::2].astype(np.uint8), codes[..., 1::2].astype(np.uint8)
    return first << 4 | second if high_first else first | second << 4


def nvfp4(w: F32, divided: bool) -> Packed:
    n, k = w.shape
    total = np.float32(np.abs(w).max() / (448 * 6))
    groups = w.reshape(n, -1, 16)
    scales = torch.from_numpy(np.abs(groups).max(-1) / 6 / total).to(torch.float8_e4m3fn)
    whole = np.float32(1 / total) if divided else total
    factors = scales.float().numpy() / whole if divided else scales.float().numpy() * whole
    codes = fp4_codes(groups / np.maximum(factors, 1e-30)[..., None])
    endings = (
        (".weight_packed", ".weight_global_scale") if divided else (".weight", ".weight_scale_2")
    )
    tensors = {
        endings[0]: torch.from_numpy(bytes_of(codes.reshape(n, k))),
        ".weight_scale": scales,
        endings[1]: torch.tensor([whole]) if divided else torch.tensor(whole),
    }
    return tensors, (E2M1[codes] * factors[..., None]).reshape(n, k)


def mxfp4(w: F32, endings: tuple[str, str] = (".weight_blocks", ".weight_scales")) -> Packed:
    n, k = w.shape
    groups = w.reshape(n, -1, 32)
    exponents = np.ceil(np.log2(np.abs(groups).max(-1) / 6)).astype(np.int64)
    factors = np.exp2(exponents).astype(np.float32)[..., None]
    codes = fp4_codes(groups / factors)
    blocks = bytes_of(codes)
    if endings[0] == ".weight_packed":
        blocks = blocks.reshape(n, k // 2)
    tensors = {
        endings[0]: torch.from_numpy(blocks),
        endings[1]: torch.from_numpy((exponents + 127).astype(np.uint8)),
    }
    return tensors, (E2M1[codes] * factors).reshape(n, k)


def nf4(w: F32, nested: bool = False) -> Packed:
    """bitsandbytes with blocks of 64; nested: the scales are codes too."""
    blocks = w.reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    codes = np.abs(blocks[..., None] / absmax[:, None, None] - NF4).argmin(-1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": list(w.shape)}
    tensors: dict[str, Any] = {}
    if nested:
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        mean = np.float32(absmax.mean())
        outer = np.array(
            [np.abs(absmax[i : i + 256] - mean).max() for i in range(0, len(absmax), 256)]
        )
        spread = outer.repeat(256)[: len(absmax)]
        scale_codes = np.abs((absmax - mean)[:, None] / spread[:, None] - table).argmin(1)
        absmax = table[scale_codes] * spread + mean
        state |= {"nested_blocksize": 256, "nested_offset": float(mean)}
        tensors[".weight.nested_absmax"] = torch.from_numpy(outer)
        tensors[".weight.nested_quant_map"] = torch.from_numpy(table.copy())
        tensors[".weight.absmax"] = torch.from_numpy(scale_codes.astype(np.uint8))
    else:
        tensors[".weight.absmax"] = torch.from_numpy(absmax)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    tensors |= {
        ".weight": torch.from_numpy(bytes_of(codes.reshape(-1), high_first=True)[:, None]),
        ".weight.quant_map": torch.from_numpy(NF4.copy()),
        ".weight.quant_state.bitsandbytes__nf4": torch.from_numpy(text),
    }
    return tensors, (NF4[codes] * absmax[:, None]).reshape(w.shape)


def llm_int8(w: F32) -> Packed:
    largest = np.abs(w).max(1)
    codes = np.rint(w / largest[:, None] * 127)
    tensors = {
        ".weight": torch.from_numpy(codes.astype(np.int8)),
        ".SCB": torch.from_numpy(largest),
    }
    return tensors, (codes * (largest / np.float32(127))[:, None]).astype(np.float32)


def sparse24(w: F32, then: str) -> Packed:
    """The two largest of every four; `then` bf16, or fp8 with a scale a row."""
    quads = np.abs(w).reshape(len(w), -1, 4)
    keep = (quads.argsort(-1).argsort(-1) >= 2).reshape(w.shape)
    tensors: dict[str, torch.Tensor] = {}
    if then == "bf16":
        values = torch.from_numpy(w).bfloat16()
        dense = values.float().numpy()
    else:
        tensors, dense = fp8(w, (1, w.shape[1]))
        values = tensors.pop(".weight")
    kept = values.view(torch.uint8 if then == "fp8" else torch.int16)[torch.from_numpy(keep)]
    tensors |= {
        ".compressed": kept.reshape(len(w), -1).view(values.dtype),
        ".bitmask": torch.from_numpy(np.packbits(keep, axis=1, bitorder="little")),
        ".shape": torch.tensor(w.shape).reshape(-1, 1),
    }
    return tensors, dense * keep


def hqq(w: F32, bits: int = 4, size: int = 32, axis: int = 1) -> Packed:
    """Half-quadratic quantisation without its optimisation: the layout is the same."""
    groups = w.reshape(-1, size).T if axis == 1 else w.reshape(size, -1)
    low, high = groups.min(0), groups.max(0)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16)
    s = scale.astype(np.float32)
    zero = (-low / s).astype(np.float16)
    codes = np.rint(groups / s + zero.astype(np.float32)).clip(0, 2**bits - 1).astype(np.int64)
    values = ((codes - zero.astype(np.float32)) * s).astype(np.float32)
    values = (values.T if axis == 1 else values).reshape(w.shape)
    rows = codes.T if axis == 1 else codes
    stored, word = {3: (3, 30), 5: (8, 8), 6: (8, 8)}.get(bits, (bits, 8))
    each = word // stored
    rows = np.concatenate([rows, np.zeros((-len(rows) % each, rows.shape[1]), np.int64)])
    step = len(rows) // each
    packed = sum(rows[i * step : (i + 1) * step] << (word - stored * (i + 1)) for i in range(each))
    shape = (-1, 1) if axis == 1 else (1, -1)
    tensors = {
        ".W_q": torch.from_numpy(packed.astype(np.int32 if bits == 3 else np.uint8)),
        ".scale": torch.from_numpy(scale.reshape(shape)),
        ".zero": torch.from_numpy(zero.reshape(shape)),
        ".shape": torch.tensor(w.shape),
        ".nbits": torch.tensor(bits, dtype=torch.int32),
        ".group_size": torch.tensor(size, dtype=torch.int32),
        ".axis": torch.tensor(axis, dtype=torch.int32),
        ".packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
    }
    return tensors, values
