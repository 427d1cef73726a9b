"""Kernels that treat each element for itself, or move rows. What they compute: ops/api.py.

Every one is bound by memory. Bytes are per element of the result, of inputs in f32 (4 bytes) and of a
result `a` bytes wide: 2 where it is made for a matrix product, else 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from elinvar.base.config import Activation
from elinvar.ops.triton.activations import activated, rounded_product
from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.device import INTERPRETER
from elinvar.ops.triton.numbers import narrow

BLOCK = 65536 if INTERPRETER else 1024
"""Most columns of a row that a program has."""
ROWS = 64 if INTERPRETER else 1
_ANY_ROWS = ["num_rows"]


@triton.jit
def _place(num_rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, BLOCK] of this program, and which of them are there."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return rows, at, (rows < num_rows) & (at < D)


@triton.jit
def tanh(x):
    """By e^(2 x), and near 0, where that cancels, by the series."""
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.125, series, far)


@triton.jit(do_not_specialize=_ANY_ROWS)
def _map_kernel(x, out, num_rows, factor, D: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    row, at, inside = _place(num_rows, D, ROWS, BLOCK)
    value = tl.load(x + row * D + at, inside, 0.0).to(tl.float32)
    if KIND == "scale":
        value = value * factor
    elif KIND == "softcap":
        value = factor * tanh(value / factor)
    else:
        value = activated(value, KIND)
    tl.store(out + row * D + at, narrow(value, out.dtype.element_ty), inside)


def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    """8 bytes."""
    return _map(x, "scale", torch.float32, factor)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """8 bytes."""
    return _map(x, "softcap", torch.float32, cap)


def activate(x: torch.Tensor, activation: Activation, dtype: torch.dtype) -> torch.Tensor:
    """4 + a bytes."""
    return _map(x, activation, dtype, 0.0)


def _map(x: torch.Tensor, kind: str, dtype: torch.dtype, factor: float) -> torch.Tensor:
    x, (rows, dim) = x.contiguous(), x.shape
    out, block = torch.empty_like(x, dtype=dtype), _block(dim)
    _map_kernel[_grid(rows, dim)](x, out, rows, factor, dim, kind, ROWS, block)
    return out


def _block(dim: int) -> int:
    return min(BLOCK, triton.next_power_of_2(dim))


def _grid(rows: int, dim: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(dim, _block(dim))


@triton.jit(do_not_specialize=_ANY_ROWS)
def _columns_kernel(x, y, out, num_rows, y_stride, first, D: tl.constexpr, KIND: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A row of x with D columns of a row of y, from `first` on."""
    row, at, inside = _place(num_rows, D, ROWS, BLOCK)
    a = tl.load(x + row * D + at, inside, 0.0).to(tl.float32)
    b = tl.load(y + row * y_stride + first + at, inside, 0.0).to(tl.float32)
    if KIND == "add":
        value = a + b
    elif KIND == "mul":
        value = a * b
    else:
        value = a / (1.0 + tl.exp(-b))
    tl.store(out + row * D + at, narrow(value, out.dtype.element_ty), inside)


def add(x_TD: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
    """8 + a bytes."""
    return _columns(x_TD, y_TD, "add", torch.float32)


def mul(x_TD: torch.Tensor, y_TN: torch.Tensor, start: int = 0) -> torch.Tensor:
    """12 bytes; with one row of y 8."""
    return _columns(x_TD, y_TN, "mul", torch.float32, start)


def sigmoid_gate(x_TN: torch.Tensor, gate_TN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """4 + 2 a bytes: x is what attention gave."""
    return _columns(x_TN, gate_TN, "sigmoid", dtype)


def _columns(
    x: torch.Tensor, y: torch.Tensor, kind: str, dtype: torch.dtype, first: int = 0
) -> torch.Tensor:
    x, y = x.contiguous(), y.contiguous()
    (rows, dim), stride = x.shape, 0 if len(y) < len(x) else y.shape[1]
    out = torch.empty_like(x, dtype=dtype)
    block = _block(dim)
    _columns_kernel[_grid(rows, dim)](x, y, out, rows, stride, first, dim, kind, ROWS, block)
    return out


@triton.jit(do_not_specialize=_ANY_ROWS)
def _gated_kernel(x, out, num_rows, N: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    row, at, inside = _place(num_rows, N, ROWS, BLOCK)
    gate = tl.load(x + row * 2 * N + at, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * N + N + at, inside, 0.0).to(tl.float32)
    kind: tl.constexpr = out.dtype.element_ty
    value = rounded_product(gate, up, kind, ACTIVATION)
    tl.store(out + row * N + at, narrow(value, kind), inside)


def gated(x_TN: torch.Tensor, activation: Activation, dtype: torch.dtype) -> torch.Tensor:
    """8 + a bytes. Both halves are rounded to dtype first, as `gated_linear` does."""
    x = x_TN.contiguous()
    rows, dim = len(x), x.shape[1] // 2
    out = torch.empty((rows, dim), dtype=dtype, device=x.device)
    block = _block(dim)
    _gated_kernel[_grid(rows, dim)](x, out, rows, dim, activation, ROWS, block)
    return out


@triton.jit(do_not_specialize=_ANY_ROWS)
def _scale_heads_kernel(q, positions, factors, out, num_rows, N: tl.constexpr, ROWS: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    row, at, inside = _place(num_rows, N, ROWS, BLOCK)
    factor = tl.load(factors + tl.load(positions + tl.minimum(row, num_rows - 1)))
    value = tl.load(q + row * N + at, inside, 0.0).to(tl.float32) * factor
    tl.store(out + row * N + at, narrow(value, out.dtype.element_ty), inside)


def scale_heads(
    q_THD: torch.Tensor, positions_T: torch.Tensor, factors_P: torch.Tensor
) -> torch.Tensor:
    """2 a bytes."""
    q = q_THD.contiguous()
    out, dim = torch.empty_like(q), q.shape[1] * q.shape[2]
    block = _block(dim)
    _scale_heads_kernel[_grid(len(q), dim)](
        q, positions_T, factors_P, out, len(q), dim, ROWS, block
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _mix_kernel(x, coefs, out, rows, D: tl.constexpr, S: tl.constexpr, OUTPUTS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """One output stream of one row."""
    row = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(S):
        coef = tl.load(coefs + row * OUTPUTS * S + stream * S + s)
        value = tl.fma(tl.load(x + (s * rows + row) * D + at, at < D, 0.0), coef, value)
    tl.store(out + (stream * rows + row) * D + at, value, at < D)


def mix(xs_TD: Sequence[torch.Tensor], coefs_TC: torch.Tensor) -> torch.Tensor:
    """8 S + 4 bytes, of which 4 S to put the streams side by side."""
    x, coefs = torch.stack(list(xs_TD)), coefs_TC.contiguous()
    streams, rows, dim = x.shape
    outputs = coefs.shape[1] // streams
    out = torch.empty((outputs, rows, dim), dtype=torch.float32, device=x.device)
    block = _block(dim)
    grid = rows, outputs, triton.cdiv(dim, block)
    _mix_kernel[grid](x, coefs, out, rows, dim, streams, outputs, block)
    return out


@triton.jit
def _pool_kernel(x, starts, weights, out, D: tl.constexpr, BLOCK: tl.constexpr):
    """One text's rows, one after the other."""
    text = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.full((BLOCK,), float("-inf") if weights is None else 0.0, tl.float32)
    row = tl.load(starts + text).to(tl.int64)
    last = tl.load(starts + text + 1)
    while row < last:
        x_row = tl.load(x + row * D + at, at < D, 0.0).to(tl.float32)
        if weights is None:
            value = tl.maximum(value, x_row)
        else:
            value = tl.fma(x_row, tl.load(weights + row), value)
        row += 1
    tl.store(out + text * D + at, value, at < D)


def pool(x_TD: torch.Tensor, starts: torch.Tensor, weights_T: torch.Tensor | None) -> torch.Tensor:
    """a bytes an element of x."""
    x, dim = x_TD.contiguous(), x_TD.shape[1]
    out = torch.empty((len(starts) - 1, dim), dtype=torch.float32, device=x.device)
    block = min(128, _block(dim))
    _pool_kernel[len(out), triton.cdiv(dim, block)](x, starts, weights_T, out, dim, block)
    return out


@triton.jit(do_not_specialize=_ANY_ROWS)
def _spread_kernel(x, columns, out, num_rows, C: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    row, at, inside = _place(num_rows, V, ROWS, BLOCK)
    column = tl.load(columns + at, at < V, -1)
    value = tl.load(x + row * C + column, inside & (column >= 0), float("-inf"))
    tl.store(out + row * V + at, value, inside)


def spread(x_LC: torch.Tensor, columns_V: torch.Tensor) -> torch.Tensor:
    """4 bytes, of x and of the result."""
    x, (rows, held), size = x_LC.contiguous(), x_LC.shape, len(columns_V)
    out = x.new_empty((rows, size))
    _spread_kernel[_grid(rows, size)](x, columns_V, out, rows, held, size, ROWS, _block(size))
    return out


_X_TO_OUT = {"x": "*fp32", "out": "*bf16"}
COMPILED = [
    KernelCase(
        "map/silu",
        _map_kernel,
        {**_X_TO_OUT, "num_rows": "i32", "factor": "fp32"},
        {"D": 14336, "KIND": "silu", "ROWS": 1, "BLOCK": 1024},
    ),
    KernelCase(
        "map/softcap",
        _map_kernel,
        {"x": "*fp32", "out": "*fp32", "num_rows": "i32", "factor": "fp32"},
        {"D": 256000, "KIND": "softcap", "ROWS": 1, "BLOCK": 1024},
    ),
    KernelCase(
        "columns/add",
        _columns_kernel,
        {
            "x": "*fp32",
            "y": "*fp32",
            "out": "*fp32",
            "y_stride": "i32:16",
            "num_rows": "i32",
            "first": "i32:16",
        },
        {"D": 4096, "KIND": "add", "ROWS": 1, "BLOCK": 1024},
    ),
    KernelCase(
        "columns/sigmoid",
        _columns_kernel,
        {
            "x": "*bf16",
            "y": "*fp32",
            "out": "*bf16",
            "y_stride": "i32:16",
            "num_rows": "i32",
            "first": "i32:16",
        },
        {"D": 4096, "KIND": "sigmoid", "ROWS": 1, "BLOCK": 1024},
    ),
    KernelCase(
        "gated/silu",
        _gated_kernel,
        {**_X_TO_OUT, "num_rows": "i32"},
        {"N": 14336, "ACTIVATION": "silu", "ROWS": 1, "BLOCK": 1024},
    ),
    KernelCase(
        "scale_heads",
        _scale_heads_kernel,
        {"q": "*bf16", "positions": "*i32", "factors": "*fp32", "out": "*bf16", "num_rows": "i32"},
        {"N": 4096, "ROWS": 1, "BLOCK": 1024},
    ),
    KernelCase(
        "mix/4",
        _mix_kernel,
        {"x": "*fp32", "coefs": "*fp32", "out": "*fp32", "rows": "i32"},
        {"D": 2048, "S": 4, "OUTPUTS": 4, "BLOCK": 1024},
    ),
    KernelCase(
        "pool",
        _pool_kernel,
        {"x": "*fp32", "starts": "*i32", "weights": "*fp32", "out": "*fp32"},
        {"D": 1024, "BLOCK": 128},
    ),
    KernelCase(
        "pool/largest",
        _pool_kernel,
        {"x": "*bf16", "starts": "*i32", "out": "*fp32"},
        {"weights": None, "D": 1024, "BLOCK": 128},
    ),
    KernelCase(
        "spread",
        _spread_kernel,
        {"x": "*fp32", "columns": "*i32", "out": "*fp32", "num_rows": "i32"},
        {"C": 32000, "V": 128256, "ROWS": 1, "BLOCK": 1024},
    ),
]
