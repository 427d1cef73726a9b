"""Name rules: one table a family says where each weight lies in each format, and how to turn it
into canonical form and back. The same table loads and saves.

Canonical form: rotary pairs half-split as in Hugging Face, RMS gains as they are multiplied.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
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
from elinvar.weights.tensor import HostTensor

State = dict[str, Weight | NDArray[np.float32]]
"""Canonical name -> packed matrix or float32 vector."""


class Fix(Protocol):
    """An invertible change between a stored tensor and its canonical form. Shape stays; a
    matrix also keeps its stored type. Fixes are frozen dataclasses: their repr names them."""

    def apply(self, tensor: HostTensor) -> HostTensor: ...

    def invert(self, tensor: HostTensor) -> HostTensor: ...


@dataclass(frozen=True, slots=True)
class UnpermuteRows:
    """Rows of q or k from interleaved rotary pairs (2i, 2i+1), as llama.cpp's converter orders
    them for the llama architecture, to half-split pairs (i, i + D/2). Whole rows move, so it
    works on quantised blocks as they lie."""

    num_heads: int
    """Heads of this matrix: num_kv_heads for k."""

    def apply(self, tensor: HostTensor) -> HostTensor:
        return self._reorder(tensor, (self.num_heads, -1, 2))

    def invert(self, tensor: HostTensor) -> HostTensor:
        return self._reorder(tensor, (self.num_heads, 2, -1))

    def _reorder(self, tensor: HostTensor, shape: tuple[int, int, int]) -> HostTensor:
        order = np.arange(len(tensor.data)).reshape(shape).swapaxes(1, 2).reshape(-1)
        return replace(tensor, data=tensor.data[order])


@dataclass(frozen=True, slots=True)
class AddOne:
    """Gains stored as g - 1 (Gemma in Hugging Face form) to g, in float32."""

    def apply(self, tensor: HostTensor) -> HostTensor:
        return _f32_vector(tensor.name, dequantize(tensor) + np.float32(1))

    def invert(self, tensor: HostTensor) -> HostTensor:
        return _f32_vector(tensor.name, dequantize(tensor) - np.float32(1))


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


@dataclass(frozen=True, slots=True)
class Binding:
    """A rule for one format and one layer."""

    name: str
    source: str
    shape: tuple[int, ...] | None
    fix: Fix | None
    optional: bool


def bind(rules: Sequence[Rule], format: str, num_layers: int) -> list[Binding]:
    """The rules spelled out for "gguf" or "safetensors", one layer after the other."""
    bindings = []
    for layered, group in itertools.groupby(rules, key=lambda rule: "{i}" in rule.name):
        some = list(group)
        for i in range(num_layers if layered else 1):
            for rule in some:
                source = rule.gguf if format == "gguf" else rule.hf
                fix = rule.gguf_fix if format == "gguf" else rule.hf_fix
                if source is not None:
                    name, source = rule.name.replace("{i}", str(i)), source.replace("{i}", str(i))
                    bindings.append(Binding(name, source, rule.shape, fix, rule.optional))
    return bindings


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
    bindings = {b.source: b for b in bind(rules, "safetensors", num_layers)}
    for binding in list(bindings.values()):
        if binding.name not in state:
            if not binding.optional:
                raise ModelError(
                    f"{folder} cannot be written: the weight {binding.name} is missing."
                )
            del bindings[binding.source]
    entries = [
        (source, _saved_dtype(state[b.name]), tuple(state[b.name].shape))
        for source, b in bindings.items()
    ]

    def stored(source: str) -> NDArray[np.uint8]:
        binding = bindings[source]
        tensor = _host_tensor(source, state[binding.name])
        return (binding.fix.invert(tensor) if binding.fix else tensor).data

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder} cannot be made: {error.strerror}.") from error
    text = json.dumps(dict(config), indent=2).encode()
    with atomic_file(folder / "config.json", len(text)) as file:
        file.write(text)
    write_safetensors(folder / SINGLE, entries, stored)


_SAVED_DTYPES = {"f16": "F16", "bf16": "BF16"}


def _saved_dtype(value: Weight | NDArray[np.float32]) -> str:
    return _SAVED_DTYPES.get(value.kind, "F32") if isinstance(value, Weight) else "F32"


def _host_tensor(name: str, value: Weight | NDArray[np.float32]) -> HostTensor:
    if not isinstance(value, Weight):
        return _f32_vector(name, value)
    dtype = _saved_dtype(value)
    w: NDArray[Any] = unpack(value)
    if dtype == "F16":
        w = w.astype("<f2")
    elif dtype == "BF16":
        # Exact: the values came from bf16, so the low half of each is zero.
        w = (w.view(np.uint32) >> 16).astype("<u2")
    return HostTensor(name, value.shape, dtype, w.view(np.uint8))


def _f32_vector(name: str, values: NDArray[np.float32]) -> HostTensor:
    data = np.ascontiguousarray(values, "<f4").reshape(1, -1).view(np.uint8)
    return HostTensor(name, values.shape, "F32", data)
