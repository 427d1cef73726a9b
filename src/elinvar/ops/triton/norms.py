"""Kernels that norm rows. What they compute: ops/api.py.

A program has a row, all of it at once, so that it is read once; its sums are the trees that one
width of a tile gives, for every number of rows. (The interpreter, which is slow to start a program,
has many rows in one.) Bytes are per element, of inputs in f32 and of a
result `a` bytes wide: 2 where it is made for a matrix product, else 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.device import INTERPRETER
from elinvar.ops.triton.numbers import narrow, row_codes

ROWS = 64 if INTERPRETER else 1
_ANY_ROWS = ["num_rows"]


@triton.jit
def _rows(num_rows, ROWS: tl.constexpr):
    """[ROWS, 1] of this program; those behind the last one do what that does."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return tl.minimum(rows, num_rows - 1)


@triton.jit(do_not_specialize=_ANY_ROWS)
def _norm_kernel(x, y, gain, bias, total, out, scales, num_rows, eps, D: tl.constexpr,
                 CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """total: where x + y goes, where there is a y; scales: of out, where that is int8."""
    row = _rows(num_rows, ROWS) * D
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < D
    value = tl.load(x + row + at, inside, 0.0).to(tl.float32)
    if y is not None:
        value += tl.load(y + row + at, inside, 0.0).to(tl.float32)
        tl.store(total + row + at, value, inside)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, 1)[:, None] / D, 0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1)[:, None] / D + eps)
    value = value * inverse * tl.load(gain + at, inside, 0.0)
    if bias is not None:
        value += tl.load(bias + at, inside, 0.0)
    if scales is not None:
        value, scale = row_codes(narrow(value, tl.bfloat16).to(tl.float32))
        tl.store(scales + row // D, scale)
        tl.store(out + row + at, value, inside)
    else:
        tl.store(out + row + at, narrow(value, out.dtype.element_ty), inside)


def rms_norm(
    x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """4 + a bytes."""
    return _norm(x_TD, None, gain_D, None, eps, dtype, centred=False)[1]


def add_rms_norm(
    x_TD: torch.Tensor, y_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """12 + a bytes."""
    return _norm(x_TD, y_TD, gain_D, None, eps, dtype, centred=False)


def add_rms_norm_codes(
    x_TD: torch.Tensor, y_TD: torch.Tensor | None, gain_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum, and its norm as `gather.quantise_rows` has that of add_rms_norm in bf16: int8 codes and
    scales [T], for products of W8A8. 13 bytes (5 without y)."""
    scales = torch.empty(len(x_TD), dtype=torch.float32, device=x_TD.device)
    total, codes = _norm(x_TD, y_TD, gain_D, None, eps, torch.int8, centred=False, scales=scales)
    return total, codes, scales


def layer_norm(
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """4 + a bytes."""
    return _norm(x_TD, None, gain_D, bias_D, eps, dtype, centred=True)[1]


def add_layer_norm(
    x_TD: torch.Tensor,
    y_TD: torch.Tensor,
    gain_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """12 + a bytes."""
    return _norm(x_TD, y_TD, gain_D, bias_D, eps, dtype, centred=True)


def _norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    centred: bool,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = x.contiguous(), None if y is None else y.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    total = x if y is None else torch.empty_like(x, dtype=torch.float32)
    rows, dim = x.shape
    block = triton.next_power_of_2(dim)
    _norm_kernel[triton.cdiv(rows, ROWS),](
        x, y, gain, bias, total, out, scales, rows, eps, dim, centred, ROWS, block,
        num_warps=_warps(block),
    )  # fmt: skip
    return total, out


def _warps(block: int) -> int:
    """16 to 32 elements a thread, where a row is long enough for more than one warp."""
    return min(max(block // 1024, 1), 16)


@triton.jit(do_not_specialize=_ANY_ROWS)
def _gated_norm_kernel(x, gate, gain, out, num_rows, gate_stride, first, eps, HEADS: tl.constexpr,
                       D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = _rows(num_rows, ROWS)
    head = tl.program_id(1) * D
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < D
    place = row * HEADS * D + head + at
    value = tl.load(x + place, inside, 0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1)[:, None] / D + eps)
    value = value * inverse * tl.load(gain + at, inside, 0.0)
    g = tl.load(gate + row * gate_stride + first + head + at, inside, 0.0)
    value = value * (g / (1.0 + tl.exp(-g)))
    tl.store(out + place, narrow(value, out.dtype.element_ty), inside)


def gated_rms_norm(
    x_TN: torch.Tensor,
    gate_TN: torch.Tensor,
    first: int,
    gain_D: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """8 + a bytes."""
    x, gate, dim = x_TN.contiguous(), gate_TN.contiguous(), len(gain_D)
    out, heads = torch.empty_like(x, dtype=dtype), x.shape[1] // dim
    block = triton.next_power_of_2(dim)
    _gated_norm_kernel[triton.cdiv(len(x), ROWS), heads](
        x,
        gate,
        gain_D,
        out,
        len(x),
        gate.shape[1],
        first,
        eps,
        heads,
        dim,
        ROWS,
        block,
        num_warps=1,
    )
    return out


@triton.jit(do_not_specialize=_ANY_ROWS)
def _match_kernel(x, y, out, num_rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = _rows(num_rows, ROWS) * D
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < D
    a = tl.load(x + row + at, inside, 0.0).to(tl.float32)
    b = tl.load(y + row + at, inside, 0.0).to(tl.float32)
    own = tl.sqrt_rn(tl.maximum(tl.sum(a * a, 1)[:, None] / D, 1e-5))
    wanted = tl.sqrt_rn(tl.sum(b * b, 1)[:, None] / D)
    tl.store(out + row + at, a * tl.div_rn(wanted, own), inside)


def match_rms(x_TD: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
    """12 bytes."""
    x, y, dim = x_TD.contiguous(), y_TD.contiguous(), x_TD.shape[1]
    out, block = torch.empty_like(x, dtype=torch.float32), triton.next_power_of_2(dim)
    _match_kernel[triton.cdiv(len(x), ROWS),](
        x, y, out, len(x), dim, ROWS, block, num_warps=_warps(block)
    )
    return out


@triton.jit(do_not_specialize=_ANY_ROWS)
def _sparsify_kernel(
    x, out, num_rows, deviations, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = _rows(num_rows, ROWS) * D
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < D
    value = tl.load(x + row + at, inside, 0.0).to(tl.float32)
    mean = tl.sum(value, 1)[:, None] / D
    centred = tl.where(inside, value - mean, 0.0)
    least = mean + deviations * tl.sqrt_rn(tl.sum(centred * centred, 1)[:, None] / D)
    tl.store(out + row + at, tl.maximum(value - least, 0.0), inside)


def sparsify(x_TN: torch.Tensor, deviations: float) -> torch.Tensor:
    """8 bytes."""
    x, dim = x_TN.contiguous(), x_TN.shape[1]
    out, block = torch.empty_like(x, dtype=torch.float32), triton.next_power_of_2(dim)
    _sparsify_kernel[triton.cdiv(len(x), ROWS),](
        x, out, len(x), deviations, dim, ROWS, block, num_warps=_warps(block)
    )
    return out


_ADDED = {"x": "*fp32", "y": "*fp32", "gain": "*fp32", "total": "*fp32", "out": "*bf16"}
COMPILED = [
    KernelCase(
        "norm/rms-4096",
        _norm_kernel,
        {
            "x": "*fp32",
            "gain": "*fp32",
            "total": "*fp32",
            "out": "*bf16",
            "num_rows": "i32",
            "eps": "fp32",
        },
        {
            "y": None,
            "bias": None,
            "scales": None,
            "D": 4096,
            "CENTRED": False,
            "ROWS": 1,
            "BLOCK": 4096,
        },
    ),
    KernelCase(
        "norm/add-rms-4096",
        _norm_kernel,
        {**_ADDED, "num_rows": "i32", "eps": "fp32"},
        {"bias": None, "scales": None, "D": 4096, "CENTRED": False, "ROWS": 1, "BLOCK": 4096},
    ),
    KernelCase(
        "norm/add-rms-16384",
        _norm_kernel,
        {**_ADDED, "num_rows": "i32", "eps": "fp32"},
        {"bias": None, "scales": None, "D": 16384, "CENTRED": False, "ROWS": 1, "BLOCK": 16384},
        num_warps=16,
    ),
    KernelCase(
        "norm/add-rms-codes-4096",
        _norm_kernel,
        {**_ADDED, "out": "*i8", "scales": "*fp32", "num_rows": "i32", "eps": "fp32"},
        {"bias": None, "D": 4096, "CENTRED": False, "ROWS": 1, "BLOCK": 4096},
    ),
    KernelCase(
        "norm/add-layer-2560",
        _norm_kernel,
        {**_ADDED, "bias": "*fp32", "num_rows": "i32", "eps": "fp32"},
        {"scales": None, "D": 2560, "CENTRED": True, "ROWS": 1, "BLOCK": 4096},
    ),
    KernelCase(
        "gated_norm/128",
        _gated_norm_kernel,
        {
            **{"x": "*fp32", "gate": "*fp32", "gain": "*fp32", "out": "*bf16"},
            **{"gate_stride": "i32", "first": "i32:16", "num_rows": "i32", "eps": "fp32"},
        },
        {"HEADS": 32, "D": 128, "ROWS": 1, "BLOCK": 128},
        num_warps=1,
    ),
    KernelCase(
        "match_rms/2048",
        _match_kernel,
        {"x": "*fp32", "y": "*fp32", "out": "*fp32", "num_rows": "i32"},
        {"D": 2048, "ROWS": 1, "BLOCK": 2048},
        num_warps=2,
    ),
    KernelCase(
        "sparsify/16384",
        _sparsify_kernel,
        {"x": "*fp32", "out": "*fp32", "num_rows": "i32", "deviations": "fp32"},
        {"D": 16384, "ROWS": 1, "BLOCK": 16384},
        num_warps=16,
    ),
]
