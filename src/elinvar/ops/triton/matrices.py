"""How matrices lie in a GPU's memory: what the panels of ops/layout.py become at load time.

A Matrix is w [N, K] (out, in), or E of them (experts) with [E] before every shape here. Floats, fp8
and int8 lie by rows: codes [N, K]. The others are packed: pieces of 64 dims one after the other, of
each piece row after row, so that a tile of any height is one run of bytes. With P = K / 64 pieces (K
padded to a multiple of 128 by groups that are 0):

    q4      codes [P, N, 32]: byte j holds dim j of the piece in its low, 32 + j in its high nibble;
            scales i32 [2 P, N], of each group of 32: f16 scale, above it f16 min
    q5      the same, and extra i32 [2 P, N]: bit j is the fifth of code j of the group
    q8      codes int8 [P, N, 64]; scales i32 [P, N]: f16 scales of both groups
    mxfp4   codes as q4, of e2m1; scales i32 [P / 2, N]: four e8m0, of groups of 32
    nvfp4   codes as q4, of e2m1; scales i32 [P, N]: four e4m3, of groups of 16; factors
    fp8     codes e4m3 [N, K]; factors; "fp8-blocks" has scales f32 [N / 16, K / 128], rounded up
    int8    codes [N, K], factors: multiplied with rows of int8 (gather.quantise_rows)

Scales are words of 32 bits, as asynchronous copies to shared memory take no less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from elinvar.ops.layout import PANEL, QUANTISED, Weight, WeightKind
from elinvar.ops.stored import STORED
from elinvar.ops.triton import panels
from elinvar.ops.triton.configs import Config, default

PACKED = ("q4", "q5", "q8", "mxfp4", "nvfp4")
PIECE = 64
_PAD = 128
_FLOATS: dict[torch.dtype, WeightKind] = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}
_ROWS_LAST = {"codes": -2, "scales": -1, "extra": -1, "factors": -1}
"""Where the outputs N are in each tensor of a packed kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    kind: WeightKind
    shape: tuple[int, int]
    """(N, K): outputs, inputs."""
    codes: torch.Tensor
    scales: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    """f32 [N]: what finished sums are multiplied by."""
    experts: int | None = None
    """How many lie one after the other; None: it is one matrix."""
    tuned: Config | None = None

    @property
    def config(self) -> Config:
        """The one configuration of its products, whatever they are multiplied with."""
        return self.tuned or default(self.kind)

    @property
    def packed(self) -> bool:
        return self.kind in PACKED

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.codes, self.scales, self.extra

    @property
    def nbytes(self) -> int:
        held = (*self.tensors, self.factors)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def ptx(x: torch.Tensor) -> bool:
    """Whether kernels on x may hold NVIDIA's instructions; bits are the same without."""
    return x.is_cuda and torch.version.hip is None


def operands(kind: str) -> dict[str, str | None]:
    """Types of what kernels take of a matrix, as a KernelCase names them. None: it has none."""
    codes = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "int8": "*i8", "q8": "*i8"}
    scales = "*i32" if kind in PACKED else "*fp32" if kind == "fp8-blocks" else None
    return {
        "codes": codes.get(kind, "*u8"),
        "scales": scales,
        "extra": "*i32" if kind == "q5" else None,
        "factors": "*fp32" if kind in ("fp8", "int8", "nvfp4") else None,
    }


def from_weight(w: Weight, dtype: torch.dtype, device: torch.device | str) -> Matrix:
    """What was packed, for activations of `dtype`. A float matrix is rounded to dtype,
    but for f32, which stays (routers)."""
    parts = [_from_slice(each, dtype, device) for each in panels.slices(w)]
    whole = parts[0] if len(parts) == 1 else join(parts)
    assert whole is not None, "slices are of one kind"
    return whole


def _from_slice(w: Weight, dtype: torch.dtype, device: torch.device | str) -> Matrix:
    if w.kind in STORED:
        return _stored(w.kind, **panels.stored(w, device))
    if w.kind in QUANTISED:
        return grouped(w.kind, *panels.codes(w, device))
    values = panels.floats(w, device)
    return dense(values if w.kind == "f32" else values.to(dtype))


def dense(w_NK: torch.Tensor) -> Matrix:
    n, k = w_NK.shape
    return Matrix(_FLOATS[w_NK.dtype], (n, k), w_NK.contiguous())


def grouped(
    kind: Any, codes_NK: torch.Tensor, scales_NG: torch.Tensor, mins_NG: torch.Tensor | None = None
) -> Matrix:
    """q4, q5, q8 of codes (any integers), and scales and mins that f16 can hold."""
    n, k = codes_NK.shape
    pieces = _pieces(codes_NK)
    scales = _halves(scales_NG, k)
    if kind == "q8":
        words = _words(scales.view(n, -1, 2))
        return Matrix(kind, (n, k), pieces.to(torch.int8).contiguous(), words)
    assert mins_NG is not None
    words = _words(torch.stack([scales, _halves(mins_NG, k)], -1))
    fifth = None
    if kind == "q5":
        bits = (_padded(codes_NK).view(n, -1, 8) >> 4).to(torch.uint8)
        bits <<= torch.arange(8, dtype=torch.uint8, device=bits.device)
        fifth = bits.sum(-1, dtype=torch.uint8).view(torch.int32).T.contiguous()
    return Matrix(kind, (n, k), _nibbles(pieces & 15), words, fifth)


def _stored(
    kind: WeightKind,
    codes: torch.Tensor,
    factors: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> Matrix:
    """Of the parts that layout.stored_parts names."""
    if kind == "fp8-blocks":
        assert scales is not None
        return fp8_blocks(codes, scales)
    if kind in ("fp8", "int8"):
        assert factors is not None
        return fp8(codes, factors) if kind == "fp8" else int8(codes.view(torch.int8), factors)
    assert scales is not None
    codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    return mxfp4(codes, scales) if factors is None else nvfp4(codes, scales, factors)


def fp8(codes_NK: torch.Tensor, scales: torch.Tensor) -> Matrix:
    """Bytes of e4m3, and scales: of the whole [], or of channels [N] or [N, 1]."""
    codes = codes_NK.view(torch.uint8).contiguous()
    return Matrix("fp8", _shape(codes), codes, factors=_factors(scales, len(codes)))


def fp8_blocks(codes_NK: torch.Tensor, scales: torch.Tensor) -> Matrix:
    """Bytes of e4m3, and scales of 16 by 128 [N / 16, K / 128], rounded up: with those of 128 by 128
    that files have, matrices would be joined at borders of blocks alone."""
    codes = codes_NK.view(torch.uint8).contiguous()
    return Matrix("fp8-blocks", _shape(codes), codes, scales.float().contiguous())


def int8(codes_NK: torch.Tensor, scales: torch.Tensor) -> Matrix:
    """Codes, and scales as `fp8` has them."""
    codes = codes_NK.contiguous()
    return Matrix("int8", _shape(codes), codes, factors=_factors(scales, len(codes)))


def mxfp4(codes_NK: torch.Tensor, scales_NG: torch.Tensor) -> Matrix:
    """Codes of e2m1 (0..15) and bytes of e8m0, a group of 32 (OCP Microscaling Formats 1.0)."""
    n, k = codes_NK.shape
    words = _int32(_bytes(scales_NG, k, 32)).T.contiguous()
    return Matrix("mxfp4", (n, k), _nibbles(_pieces(codes_NK)), words)


def nvfp4(codes_NK: torch.Tensor, scales_NG: torch.Tensor, scale: torch.Tensor) -> Matrix:
    """Codes of e2m1, bytes of e4m3 a group of 16, and scales of the whole or of rows as `fp8`."""
    n, k = codes_NK.shape
    words = _int32(_bytes(scales_NG.view(torch.uint8), k, 16)).T.contiguous()
    return Matrix("nvfp4", (n, k), _nibbles(_pieces(codes_NK)), words, factors=_factors(scale, n))


def _factors(scales: torch.Tensor, n: int) -> torch.Tensor:
    return scales.float().reshape(-1).expand(n).contiguous()


def _shape(codes_NK: torch.Tensor) -> tuple[int, int]:
    return codes_NK.shape[0], codes_NK.shape[1]


def join(parts: Sequence[Matrix]) -> Matrix | None:
    """Matrices of one kind, one below the other, or None where they are of several."""
    first = parts[0]
    if len({m.kind for m in parts}) > 1:
        return None
    assert first.kind != "fp8-blocks" or not any(m.shape[0] % PANEL for m in parts[:-1])
    joined: dict[str, Any] = {}
    for name, packed_dim in _ROWS_LAST.items():
        tensors = [getattr(m, name) for m in parts]
        dim = packed_dim if first.packed or name == "factors" else -2
        joined[name] = None if tensors[0] is None else torch.cat(tensors, dim)
    shape = sum(m.shape[0] for m in parts), first.shape[1]
    return replace(first, shape=shape, **joined)


def stack(parts: Sequence[Matrix]) -> Matrix:
    """Experts of one kind and shape, [E] before every shape."""
    stacked: dict[str, Any] = {}
    for name in _ROWS_LAST:
        tensors = [getattr(m, name) for m in parts]
        stacked[name] = None if tensors[0] is None else torch.stack(tensors)
    return replace(parts[0], experts=len(parts), **stacked)


def _padded(a_NK: torch.Tensor, to: int = _PAD) -> torch.Tensor:
    return torch.nn.functional.pad(a_NK, (0, -a_NK.shape[1] % to))


def _pieces(codes_NK: torch.Tensor) -> torch.Tensor:
    """-> [P, N, 64]"""
    padded = _padded(codes_NK)
    return padded.view(len(padded), -1, PIECE).transpose(0, 1)


def _nibbles(pieces: torch.Tensor) -> torch.Tensor:
    low, high = pieces.to(torch.uint8).split(PIECE // 2, -1)
    return (low | (high << 4)).contiguous()


def _halves(values_NG: torch.Tensor, k: int) -> torch.Tensor:
    """f16 bits [N, 2 P], as int16."""
    return _padded(values_NG.to(torch.float16), -(-k // _PAD) * _PAD // 32).view(torch.int16)


def _words(halves: torch.Tensor) -> torch.Tensor:
    """[N, G, 2] int16 -> [G, N] int32, the first of two below"""
    return halves.contiguous().view(torch.int32).squeeze(-1).T.contiguous()


def _bytes(scales_NG: torch.Tensor, k: int, group: int) -> torch.Tensor:
    """[N, G] bytes -> int64 words of four, padded with those that K is padded by"""
    fours = _padded(scales_NG, -(-k // _PAD) * _PAD // group)
    fours = fours.view(len(fours), -1, 4).to(torch.int64)
    return (fours << torch.arange(0, 32, 8, device=fours.device)).sum(-1)


def _int32(words: torch.Tensor) -> torch.Tensor:
    """The low 32 bits."""
    return (words - ((words >> 31) << 32)).to(torch.int32)
