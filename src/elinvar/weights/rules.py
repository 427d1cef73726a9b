"""Name rules: one table a family says where each weight lies in each format, and how to turn it
into canonical form and back. The same table loads and saves.

Canonical form: rotary pairs half-split as in Hugging Face, RMS gains as they are multiplied.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError
from elinvar.ops.layout import Weight, unpack
from elinvar.weights.atomic import atomic_file
from elinvar.weights.quants import dequantize
from elinvar.weights.safetensors import SINGLE, write_safetensors
from elinvar.weights.tensor import BLOCKS, HostTensor

State = dict[str, Weight | NDArray[np.float32]]
"""Canonical name -> packed matrix or float32 vector."""


class Fix(Protocol):
    """An invertible change between a stored tensor (its part, if the rule names one) and its
    canonical form. Shape stays, but in TransposeHeads; a matrix also keeps its stored type. Fixes
    are frozen dataclasses: their repr names them."""

    def apply(self, tensor: HostTensor) -> HostTensor: ...

    def invert(self, tensor: HostTensor) -> HostTensor: ...


@dataclass(frozen=True, slots=True)
class UnpermuteRows:
    """Rows of q or k, or elements of their biases, from interleaved rotary pairs (2i, 2i+1) to
    half-split ones (i, i + R/2): llama.cpp's converter stores them so for the llama architecture, and
    GLM is trained so. Whole rows move, so it works on quantised blocks as they lie."""

    num_heads: int
    """Heads of this matrix: num_kv_heads for k."""
    rotary: int = 0
    """R, the rows of a head that are rotated; 0: all."""
    last: bool = False
    """They are a head's last rows, as DeepSeek has them, not its first ones."""

    def apply(self, tensor: HostTensor) -> HostTensor:
        return self._reorder(tensor, (self.num_heads, -1, 2))

    def invert(self, tensor: HostTensor) -> HostTensor:
        return self._reorder(tensor, (self.num_heads, 2, -1))

    def _reorder(self, tensor: HostTensor, pairs: tuple[int, int, int]) -> HostTensor:
        heads = np.arange(tensor.shape[0]).reshape(self.num_heads, -1)
        rotary = self.rotary or heads.shape[1]
        turned = heads[:, -rotary:] if self.last else heads[:, :rotary]
        turned[:] = turned.reshape(pairs).swapaxes(1, 2).reshape(turned.shape)
        order = heads.reshape(-1)
        if len(tensor.shape) > 1:
            return replace(tensor, data=tensor.data[order])
        elements = tensor.data.reshape(len(order), -1)[order]
        return replace(tensor, data=elements.reshape(1, -1))


@dataclass(frozen=True, slots=True)
class TransposeHeads:
    """Every head's rows [n, k] to [k, n]. What is quantised along k cannot be turned as it lies: it
    becomes float32 (see load_weights)."""

    num_heads: int

    def apply(self, tensor: HostTensor) -> HostTensor:
        rows, k = tensor.shape
        if tensor.matrix is not None or BLOCKS[tensor.dtype][0] > 1:
            values = dequantize(tensor).view(np.uint8)
            tensor = HostTensor(tensor.name, tensor.shape, "F32", values)
        stack = HostTensor(
            tensor.name, (self.num_heads, rows // self.num_heads, k), tensor.dtype, tensor.data
        )
        turned = transpose(stack)
        return HostTensor(
            tensor.name, (self.num_heads * k, rows // self.num_heads), tensor.dtype, turned.data
        )

    def invert(self, tensor: HostTensor) -> HostTensor:
        return self.apply(tensor)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what becomes `shape`."""
        rows, k = shape
        return self.num_heads * k, rows // self.num_heads


@dataclass(frozen=True, slots=True)
class AddOne:
    """Gains stored as g - 1 (Gemma in Hugging Face form) to g, in float32."""

    def apply(self, tensor: HostTensor) -> HostTensor:
        return _f32_vector(tensor.name, dequantize(tensor) + np.float32(1))

    def invert(self, tensor: HostTensor) -> HostTensor:
        return _f32_vector(tensor.name, dequantize(tensor) - np.float32(1))


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a larger stored tensor, whose leading dims count as rows: q of a merged qkv, an
    expert of a stack. Of a vector, or for a vector, elements."""

    of: tuple[int, ...]
    """Shape of the whole, the contiguous dimension last."""
    start: int = 0
    block: int = 0
    """Rows that lie together; 0: all of them."""
    stride: int = 0
    """From one block to the next."""

    def rows(self, count: int) -> slice | NDArray[np.int64]:
        if not self.block:
            return slice(self.start, self.start + count)
        starts = self.start + self.stride * np.arange(count // self.block)
        return (starts[:, None] + np.arange(self.block)).reshape(-1)


@dataclass(frozen=True, slots=True)
class Rule:
    """One weight, or with {i} in its names one weight a layer."""

    name: str
    """Canonical name, for example "layers.{i}.q"."""
    hf: str | None
    """Name in Hugging Face checkpoints; None: they hold no such tensor."""
    gguf: str | None
    shape: tuple[int, ...] | None = None
    """Expected shape, (out, in) for a matrix; None: any."""
    hf_fix: Fix | None = None
    gguf_fix: Fix | None = None
    optional: bool = False
    hf_part: Part | None = None
    """A rule with a part has a shape."""
    gguf_part: Part | None = None
    hf_transposed: bool = False
    """The checkpoint holds the matrix, or each of a stack, as (in, out); a part is of what lies
    the other way round."""
    layers: Sequence[int] | None = None
    """Layers that have this weight; None: all."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A rule for one format and one layer."""

    name: str
    source: str
    shape: tuple[int, ...] | None
    fix: Fix | None
    optional: bool
    part: Part | None = None
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...] | None:
        """What the file should hold under `source`; None: any shape."""
        whole = self.part.of if self.part else self.shape
        if whole and self.transposed:
            return (*whole[:-2], whole[-1], whole[-2])
        return whole

    def canonical(self, stored: HostTensor) -> HostTensor:
        """The weight, from what the file holds."""
        tensor, part = stored, self.part
        if self.transposed:
            if part is not None and len(part.of) > 2:  # of a stack, turn only what is needed
                index, start = divmod(part.start, part.of[-2])
                tensor = _matrix_of(tensor, index)
                part = replace(part, of=part.of[-2:], start=start)
            tensor = transpose(tensor)
        if part is not None:
            assert self.shape is not None
            shape = self.shape
            if isinstance(self.fix, TransposeHeads):
                shape = self.fix.stored_shape(shape)
            tensor = _take(tensor, part, shape)
        return self.fix.apply(tensor) if self.fix else tensor


def bind(rules: Sequence[Rule], format: str, num_layers: int) -> list[Binding]:
    """The rules spelled out for "gguf" or "safetensors", one layer after the other."""
    bindings = []
    for layered, group in itertools.groupby(rules, key=lambda rule: "{i}" in rule.name):
        some = list(group)
        for i in range(num_layers if layered else 1):
            for rule in some:
                if layered and rule.layers is not None and i not in rule.layers:
                    continue
                gguf = format == "gguf"
                source = rule.gguf if gguf else rule.hf
                if source is not None:
                    bindings.append(
                        Binding(
                            rule.name.replace("{i}", str(i)),
                            source.replace("{i}", str(i)),
                            rule.shape,
                            rule.gguf_fix if gguf else rule.hf_fix,
                            rule.optional,
                            rule.gguf_part if gguf else rule.hf_part,
                            rule.hf_transposed and not gguf,
                        )
                    )
    return bindings


def _take(tensor: HostTensor, part: Part, shape: tuple[int, ...]) -> HostTensor:
    """The part, of `shape`; a view where its rows lie together."""
    row = _row_bytes(tensor, shape)
    rows = tensor.data.reshape(-1, row)[part.rows(shape[0])]
    return replace(tensor, shape=shape, data=rows if shape[1:] else rows.reshape(1, -1))


def _matrix_of(stack: HostTensor, index: int) -> HostTensor:
    rows = stack.shape[-2]
    data = stack.data[index * rows : (index + 1) * rows]
    return replace(stack, shape=stack.shape[-2:], data=data)


def _row_bytes(tensor: HostTensor, shape: tuple[int, ...]) -> int:
    """Bytes of a row of the weight: of one element for a vector."""
    if tensor.matrix is not None:
        return tensor.data.shape[1]
    elements, size = BLOCKS[tensor.dtype]
    return (shape[1] if len(shape) > 1 else 1) * size // elements


def transpose(tensor: HostTensor) -> HostTensor:
    """The last two dims the other way round. Raises ModelError for a type of blocks."""
    elements, size = BLOCKS[tensor.dtype]
    if elements > 1:
        raise ModelError(
            f"Tensor {tensor.name} is stored as (in, out) and cannot be {tensor.dtype}."
        )
    *stack, n, k = tensor.shape
    data = tensor.data.reshape(-1, n, k, size).swapaxes(1, 2)
    return HostTensor(
        tensor.name, (*stack, k, n), tensor.dtype, np.ascontiguousarray(data).reshape(-1, n * size)
    )


def as_published(rules: Sequence[Rule], names: Container[str]) -> list[Rule]:
    """The rules for a checkpoint with tensors of these names. One that was saved from the bare model
    (GPT-2 is published so) leaves out the first part of every name. Of several rules for one weight,
    which files hold in several ways, the first stays whose tensor is there, or else the first."""
    rules = _one_a_weight(rules, names)
    embed = next((rule.hf for rule in rules if rule.name == "embed"), None)
    prefix, _, bare = (embed or "").partition(".")
    if embed in names or bare not in names:
        return rules
    return [replace(rule, hf=rule.hf and rule.hf.removeprefix(f"{prefix}.")) for rule in rules]


def _one_a_weight(rules: Sequence[Rule], names: Container[str]) -> list[Rule]:
    several: dict[Any, list[Rule]] = {}
    for rule in rules:
        of = None if rule.layers is None else tuple(rule.layers)
        several.setdefault((rule.name, of), []).append(rule)

    def there(rule: Rule) -> bool:
        layer = str(rule.layers[0]) if rule.layers else "0"
        return any((name or "").replace("{i}", layer) in names for name in (rule.hf, rule.gguf))

    return [next(filter(there, same), same[0]) for same in several.values()]


def save_state(
    state: Mapping[str, Weight | NDArray[np.float32]],
    rules: Sequence[Rule],
    num_layers: int,
    folder: Path,
    config: Mapping[str, Any],
) -> None:
    """Writes a Hugging Face folder: model.safetensors and config.json (`config` as given).

    Float matrices keep their type and bits, quantised ones are written as the float32 values
    they stand for, vectors as float32. Raises ModelError when a weight is missing or the folder
    cannot be written.
    """
    sources: dict[str, list[Binding]] = {}
    for binding in bind(rules, "safetensors", num_layers):
        if binding.name in state:
            sources.setdefault(binding.source, []).append(binding)
        elif not binding.optional:
            raise ModelError(f"{folder} cannot be written: the weight {binding.name} is missing.")
    entries = []
    for source, bindings in sources.items():
        first = state[bindings[0].name]
        shape = bindings[0].stored_shape or first.shape
        entries.append((source, _joint_dtype(state[b.name] for b in bindings), tuple(shape)))

    dtypes = {source: dtype for source, dtype, _ in entries}

    def stored(source: str) -> NDArray[np.uint8]:
        bindings, dtype = sources[source], dtypes[source]
        whole: HostTensor | None = None
        for binding in bindings:
            tensor = _host_tensor(source, state[binding.name], dtype)
            tensor = binding.fix.invert(tensor) if binding.fix else tensor
            if binding.part is None:
                whole = tensor
                break
            row = _row_bytes(tensor, tensor.shape)
            if whole is None:
                size = math.prod(binding.part.of) * BLOCKS[dtype][1]
                data = np.zeros((size // row, row), np.uint8)
                whole = HostTensor(source, binding.part.of, dtype, data)
            whole.data.reshape(-1, row)[binding.part.rows(tensor.shape[0])] = tensor.data.reshape(
                -1, row
            )
        assert whole is not None
        return (transpose(whole) if bindings[0].transposed else whole).data

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder} cannot be made: {error.strerror}.") from error
    text = json.dumps(dict(config), indent=2).encode()
    with atomic_file(folder / "config.json", len(text)) as file:
        file.write(text)
    write_safetensors(folder / SINGLE, entries, stored)


_SAVED_DTYPES = {"f16": "F16", "bf16": "BF16"}


def _joint_dtype(values: Iterable[Weight | NDArray[np.float32]]) -> str:
    """The type in which all parts of one stored tensor are written."""
    kinds = {
        _SAVED_DTYPES.get(value.kind, "F32") if isinstance(value, Weight) else "F32"
        for value in values
    }
    return kinds.pop() if len(kinds) == 1 else "F32"


def _host_tensor(name: str, value: Weight | NDArray[np.float32], dtype: str) -> HostTensor:
    if not isinstance(value, Weight):
        return _f32_vector(name, value)
    w: NDArray[Any] = unpack(value)
    if dtype == "F16":
        w = w.astype("<f2")
    elif dtype == "BF16":
        # Exact: the values came from bf16, so the low half of each is zero.
        w = (w.view(np.uint32) >> 16).astype("<u2")
    # A matrix that does not fill its last panel comes as a view of one that does.
    return HostTensor(name, value.shape, dtype, np.ascontiguousarray(w).view(np.uint8))


def _f32_vector(name: str, values: NDArray[np.float32]) -> HostTensor:
    data = np.ascontiguousarray(values, "<f4").reshape(1, -1).view(np.uint8)
    return HostTensor(name, values.shape, "F32", data)
