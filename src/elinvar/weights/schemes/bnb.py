"""bitsandbytes: 4-bit codes into a table of 16 values (nf4, fp4), and LLM.int8.

4 bits: X.weight U8 [N * K / 2, 1], the first of two codes in the high half; X.weight.quant_map F32
[16]; X.weight.absmax, a scale for each block of the flattened matrix, itself perhaps U8 codes with
X.weight.nested_quant_map and X.weight.nested_absmax; and JSON with the sizes. int8: X.weight I8
[N, K] and X.SCB F32 [N], the largest value of each row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elinvar.base.errors import ModelError
from elinvar.ops.layout import GROUP
from elinvar.weights.schemes.base import (
    F32,
    FLOATS,
    Matrix,
    Parts,
    Requantised,
    Rows,
    as_f32,
    elements,
    finite,
    nibbles,
    rows_in,
)
from elinvar.weights.schemes.integers import Integers, constant, even_groups
from elinvar.weights.tensor import HostTensor

_STATE = ".quant_state.bitsandbytes__"


@dataclass(slots=True, eq=False)
class Nested:
    """Scales that are codes into a table of 256 values, with scales and a mean of their own."""

    table: HostTensor
    absmax: HostTensor
    block: int
    offset: float


@dataclass(slots=True, eq=False)
class Table(Requantised):
    """w = scale of its block * quant_map[code]."""

    packed: HostTensor
    table: HostTensor
    absmax: HostTensor
    block: int
    nested: Nested | None

    def dequantize(self, rows: Rows) -> F32:
        k = self.shape[1]
        swapped = elements(self.packed).reshape(-1, k // 2)[rows]
        codes = nibbles(swapped >> np.uint8(4) | swapped << np.uint8(4))
        values = finite(self.table, elements(self.table))[codes].reshape(len(rows), -1, GROUP)
        block = (rows[:, None] * k + np.arange(0, k, GROUP)) // self.block
        return (values * self._scales(block)[:, :, None]).reshape(len(rows), k)

    def _scales(self, block: Rows) -> F32:
        scales = elements(self.absmax)[block]
        if self.nested is not None:
            table, absmax = elements(self.nested.table), elements(self.nested.absmax)
            scales = table[scales] * absmax[block // self.nested.block]
            scales = scales + np.float32(self.nested.offset)
        return finite(self.absmax, as_f32("F32", scales))


def find(parts: Parts, settings: Mapping[str, Any]) -> Iterator[Matrix]:
    for stem in parts.stems(".weight.absmax", "F32", "U8"):
        yield _table(parts, stem + ".weight")
    for stem in parts.stems(".SCB", *FLOATS):
        yield _int8(parts, stem)


def _table(parts: Parts, name: str) -> Matrix:
    kind = "fp4" if name + _STATE + "fp4" in parts.left else "nf4"
    state = _read_state(parts, parts.take(name + _STATE + kind, ("U8",)))
    n, k = state["shape"]
    packed = parts.take(name, ("U8",), (n * k // 2, 1))
    num_blocks = -(-n * k // state["blocksize"])
    absmax = parts.take(name + ".absmax", ("F32", "U8"), (num_blocks,))
    nested = None
    if absmax.dtype == "U8":
        nested = Nested(
            parts.take(name + ".nested_quant_map", ("F32",), (256,)),
            parts.take(
                name + ".nested_absmax", ("F32",), (-(-num_blocks // state["nested_blocksize"]),)
            ),
            state["nested_blocksize"],
            state["nested_offset"],
        )
    return Table(
        name=name,
        label=f"bitsandbytes {kind}",
        shape=(n, k),
        nbytes=packed.nbytes + absmax.nbytes,
        packed=packed,
        table=parts.take(name + ".quant_map", ("F32",), (16,)),
        absmax=absmax,
        block=state["blocksize"],
        nested=nested,
    )


def _read_state(parts: Parts, tensor: HostTensor) -> dict[str, Any]:
    """The sizes, checked."""
    try:
        state = json.loads(tensor.data.tobytes())
        shape = state["shape"]
        offset = float(state.get("nested_offset") or 0)
        sizes = [*shape, state["blocksize"], state.get("nested_blocksize") or 256]
        good = len(shape) == 2 and all(type(size) is int and size >= 1 for size in sizes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        good = False
    if not good or sizes[2] % GROUP:
        raise ModelError(
            f"Tensor {tensor.name} of {parts.folder} does not describe a matrix in blocks of 32 or "
            "more: the file is corrupt, download it again."
        )
    state = {"shape": shape, "blocksize": sizes[2], "nested_blocksize": sizes[3]}
    return state | {"nested_offset": offset}


def _int8(parts: Parts, stem: str) -> Matrix:
    weight = parts.take(stem + ".weight", ("I8",))
    n, k = weight.shape if len(weight.shape) == 2 else (0, 0)
    largest = parts.take(stem + ".SCB", FLOATS, (n,))
    order = parts.take_if_there(stem + ".weight_format", ("U8",))
    if order and elements(order).any():
        raise ModelError(
            f"Tensor {order.name} of {parts.folder} says that rows are not stored one after the "
            "other, which is not supported; save the model again with a newer bitsandbytes."
        )
    return Integers(
        name=stem + ".weight",
        label="bitsandbytes int8",
        shape=weight.shape,
        nbytes=weight.nbytes + largest.nbytes,
        bits=8,
        scale=largest,
        all_codes=lambda rows: rows_in(weight)(rows).view(np.uint8) ^ np.uint8(128),
        all_scales=lambda rows: (
            as_f32(largest.dtype, elements(largest)[rows, None]) / np.float32(127)
        ),
        all_zeros=constant(128, 1),
        groups=even_groups(k, max(k, 1)),
        symmetric=lambda: True,
    )
