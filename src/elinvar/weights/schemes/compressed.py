"""compressed-tensors (LLM Compressor): what each matrix is can be read off its tensors.

X.weight_packed I32, X.weight_scale, perhaps X.weight_zero_point and X.weight_g_idx: int4, int8
X.weight I8, X.weight_scale, perhaps X.weight_zero_point: int8 of w8a8
X.weight F8, X.weight_scale: a scale for all, for a row or for a block
X.weight_packed U8, X.weight_scale, X.weight_global_scale: NVFP4, which is divided by the last
X.weight_packed U8, X.weight_scale U8: MXFP4
X.compressed, X.bitmask, X.shape: the values of a 2:4 sparse matrix and where they stand
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError
from elinvar.ops.layout import GROUP, WeightKind
from elinvar.weights.quants import Codes
from elinvar.weights.schemes.base import (
    F32,
    FLOATS,
    Matrix,
    Parts,
    Rows,
    as_f32,
    elements,
    rows_in,
)
from elinvar.weights.schemes.floats import FP8, block_of, fp8, mxfp4, nvfp4
from elinvar.weights.schemes.integers import (
    I16,
    Integers,
    across,
    constant,
    even_groups,
    listed_groups,
    rows_of,
    unpack_words,
)
from elinvar.weights.tensor import HostTensor

_FORMATS = (
    *("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"),
)
_KINDS: dict[str, WeightKind] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def find(parts: Parts, settings: Mapping[str, Any]) -> Iterator[Matrix]:
    parts.only(settings, "format", *_FORMATS)
    parts.only(settings.get("sparsity_config") or {}, "format", "dense", "sparse-24-bitmask")
    if settings.get("transform_config"):
        parts.only(settings, "transform_config")  # rotates activations
    form = _Form(_block(parts, settings), _by_int8(settings))
    for stem in parts.stems(".weight_packed", "I32"):
        yield _packed(parts, stem)
    for stem in parts.stems(".weight_packed", "U8"):
        if stem + ".weight_global_scale" in parts.left:
            yield nvfp4(parts, stem, ".weight_packed", ".weight_global_scale", divides=True)
        else:
            yield _mxfp4(parts, stem)
    for stem in parts.stems(".bitmask", "U8"):
        yield _sparse(parts, stem, form)
    for stem in parts.stems(".weight", "I8", *FP8):
        weight = parts.take(stem + ".weight", ("I8", *FP8))
        yield _plain(parts, stem, weight.shape, weight, rows_in(weight), form)


@dataclass(frozen=True, slots=True)
class _Form:
    """What settings say of matrices of eight bits."""

    block: tuple[int, int]
    by_int8: bool


def _groups(settings: Mapping[str, Any], part: str) -> Iterator[Mapping[str, Any]]:
    """What the groups of matrices say of their weights, or of activations; {} where they say nothing."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        found = group.get(part) if isinstance(group, dict) else None
        yield found if isinstance(found, dict) else {}


def _block(parts: Parts, settings: Mapping[str, Any]) -> tuple[int, int]:
    for weights in _groups(settings, "weights"):
        if weights.get("block_structure"):
            return block_of(parts, weights, "block_structure")
    return 128, 128


def _by_int8(settings: Mapping[str, Any]) -> bool:
    """Whether activations are int8, symmetric, wherever weights are."""
    pairs = zip(
        *(_groups(settings, part) for part in ("weights", "input_activations")), strict=True
    )
    inputs = [of_inputs for weights, of_inputs in pairs if _is_int8(weights)]
    return bool(inputs) and all(_is_int8(x) and x.get("symmetric", True) for x in inputs)


def _is_int8(numbers: Mapping[str, Any]) -> bool:
    return numbers.get("num_bits") == 8 and numbers.get("type", "int") == "int"


def _packed(parts: Parts, stem: str) -> Matrix:
    """Codes packed along the columns, from which half of the range was taken; zeros likewise
    along the rows."""
    packed = parts.take(stem + ".weight_packed", ("I32",))
    listed = elements(parts.take(stem + ".weight_shape", ("I64", "I32"), (2,)))
    n, k = int(listed[0]), int(listed[1])
    words = packed.shape[1] if len(packed.shape) == 2 and packed.shape[0] == n else 0
    bits = 32 * words // k if k > 0 else 0
    if bits not in (2, 4, 8) or words * 32 != k * bits:
        raise ModelError(
            f"Tensor {packed.name} of {parts.folder} has shape {list(packed.shape)}, which is no "
            f"packing of a matrix {[n, k]} in 2, 4 or 8 bits."
        )
    scale = parts.take(stem + ".weight_scale", FLOATS)
    num_groups = _num_groups(parts, scale, n, k)
    zero = parts.take_if_there(stem + ".weight_zero_point", ("I32", "I8"))
    g_idx = parts.take_if_there(stem + ".weight_g_idx", ("I32",), (k,))
    size = k // num_groups
    return Integers(
        name=stem + ".weight",
        label=f"compressed-tensors int{bits} g{size}",
        shape=(n, k),
        nbytes=sum(t.nbytes for t in (packed, scale, zero, g_idx) if t),
        bits=bits,
        scale=scale,
        all_codes=lambda rows: unpack_words(elements(packed)[rows], bits),
        all_scales=rows_of(scale, n),
        all_zeros=_zeros(parts, zero, bits, (n, num_groups)),
        groups=listed_groups(g_idx, num_groups) if g_idx else even_groups(k, size),
        symmetric=lambda: zero is None,
    )


def _plain(
    parts: Parts,
    stem: str,
    shape: tuple[int, ...],
    weight: HostTensor,
    rows_of_bits: Callable[[Rows], NDArray[Any]],
    form: _Form,
) -> Matrix:
    """Eight bits an element: FP8, or int8."""
    if weight.dtype != "I8":
        return fp8(parts, stem, shape, weight, rows_of_bits, form.block)
    n, k = shape if len(shape) == 2 else (0, 0)
    scale = parts.take(stem + ".weight_scale", FLOATS)
    num_groups = _num_groups(parts, scale, n, k)
    zero = parts.take_if_there(stem + ".weight_zero_point", ("I8",))
    return Integers(
        name=stem + ".weight",
        label="compressed-tensors int8" + (f" g{k // num_groups}" if num_groups > 1 else ""),
        shape=shape,
        nbytes=weight.nbytes + scale.nbytes,
        bits=8,
        scale=scale,
        all_codes=lambda rows: rows_of_bits(rows).view(np.uint8) ^ np.uint8(128),
        all_scales=rows_of(scale, n),
        all_zeros=_zeros(parts, zero, 8, (n, num_groups)),
        groups=even_groups(k, max(k // num_groups, 1)),
        symmetric=lambda: zero is None,
        by_int8=form.by_int8 and num_groups == 1,
    )


def _zeros(
    parts: Parts, zero: HostTensor | None, bits: int, shape: tuple[int, int]
) -> Callable[[Rows], I16]:
    """Zeros as codes from 0 up: those stored are half the range less."""
    n, num_groups = shape
    half = 1 << (bits - 1)
    if zero is None:
        return constant(half, num_groups)
    if zero.dtype == "I32" and zero.shape == (-(-n * bits // 32), num_groups):
        codes = across(zero, bits, rows_first=True)
        return lambda rows: codes(rows).astype(np.int16)
    if zero.dtype == "I8" and elements(zero).size == n * num_groups:
        plain = elements(zero).reshape(shape)
        return lambda rows: plain[rows].astype(np.int16) + np.int16(half)
    raise ModelError(
        f"Tensor {zero.name} of {parts.folder} is {zero.dtype} {list(zero.shape)}, which does not "
        f"fit {num_groups} scales for each of {n} rows."
    )


def _num_groups(parts: Parts, scale: HostTensor, n: int, k: int) -> int:
    """Scales a row."""
    if scale.shape in ((), (1,), (1, 1), (n,)):
        return 1
    if len(scale.shape) == 2 and scale.shape[0] == n and k % max(scale.shape[1], 1) == 0:
        return max(scale.shape[1], 1)
    raise ModelError(
        f"Tensor {scale.name} of {parts.folder} has shape {list(scale.shape)}, which does not fit "
        f"the rows of a matrix {[n, k]}."
    )


def _mxfp4(parts: Parts, stem: str) -> Matrix:
    packed = parts.take(stem + ".weight_packed", ("U8",))
    n, half = packed.shape if len(packed.shape) == 2 else (0, 0)
    scale = parts.take(stem + ".weight_scale", ("U8", "F8_E8M0"), (n, 2 * half // GROUP))
    return mxfp4(stem + ".weight", (n, 2 * half), packed, scale)


@dataclass(slots=True, eq=False)
class Sparse(Matrix):
    """Floats of which some are left out, because they are zero."""

    stored: HostTensor
    rows: Callable[[Rows], NDArray[Any]]

    def plan(self) -> tuple[WeightKind, str]:
        return _KINDS[self.stored.dtype], ""

    def codes(self, rows: Rows) -> Codes:
        return Codes(_KINDS[self.stored.dtype], self.rows(rows))

    def dequantize(self, rows: Rows) -> F32:
        return as_f32(self.stored.dtype, self.rows(rows))


def _sparse(parts: Parts, stem: str, form: _Form) -> Matrix:
    listed = elements(parts.take(stem + ".shape", ("I64", "I32"))).reshape(-1)
    n, k = (int(listed[0]), int(listed[1])) if listed.size == 2 else (0, 0)
    mask = parts.take(stem + ".bitmask", ("U8",), (n, -(-k // 8)))
    stored = parts.take(stem + ".compressed", (*_KINDS, "I8", *FP8), (n, k // 2))

    def dense(rows: Rows) -> NDArray[Any]:
        present = np.unpackbits(elements(mask)[rows], axis=1, count=k, bitorder="little") != 0
        values = elements(stored)[rows]
        if (present.sum(axis=1) != values.shape[1]).any():
            raise ModelError(
                f"Tensor {mask.name} of {parts.folder} does not leave half of each row: the file "
                "is corrupt, download it again."
            )
        full = np.zeros(present.shape, values.dtype)
        full[present] = values.reshape(-1)
        return full

    if stored.dtype not in _KINDS:
        return _plain(parts, stem, (n, k), stored, dense, form)
    nbytes = stored.nbytes + mask.nbytes
    label = f"2:4 sparse {stored.dtype}"
    return Sparse(stem + ".weight", label, (n, k), nbytes, stored, dense)
