"""Name rules: one table a family says where each weight lies in each format, and how to turn it
into canonical form and back. The same table loads, saves (weights.save) and cuts for ranks.

Canonical form: rotary pairs half-split as in Hugging Face, RMS gains as they are multiplied.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from elinvar.ops.layout import Weight
from elinvar.weights.fixes import Fix, TransposeHeads, UnpermuteRows, element_bytes
from elinvar.weights.tensor import BLOCKS, HostTensor

Rows = NDArray[np.int64]
"""Numbers of rows."""
State = dict[str, Weight | NDArray[np.float32]]
"""Canonical name -> packed matrix or float32 vector."""


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

    def rows(self, of: Rows) -> Rows:
        """Where these rows of the weight lie in the whole."""
        if not self.block:
            return self.start + of
        return self.start + self.stride * (of // self.block) + of % self.block


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows or the columns of a matrix, or the elements of a vector, that one rank holds."""

    axis: Literal[0, 1]
    """0: rows, the outputs."""
    start: int
    stop: int

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what it leaves of `shape`."""
        return (*shape[: self.axis], self.stop - self.start, *shape[self.axis + 1 :])


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
    cut: Cut | None = None
    """The part of the weight that is wanted; None: all of it."""


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
    cut: Cut | None = None

    @property
    def stored_shape(self) -> tuple[int, ...] | None:
        """What the file should hold under `source`; None: any shape."""
        whole = self.part.of if self.part else self.shape
        if whole and self.transposed:
            return (*whole[:-2], whole[-1], whole[-2])
        return whole

    def vector(self, stored: HostTensor) -> HostTensor:
        """The weight, a vector, from what the file holds."""
        assert self.part is None or self.shape is not None
        tensor = _elements(stored, self.part, self.shape) if self.part and self.shape else stored
        tensor = self.fix.apply(tensor) if self.fix else tensor
        if self.cut is None:
            return tensor
        return _elements(tensor, Part(tensor.shape, self.cut.start), self.cut.of(tensor.shape))

    def rows(self, stored: HostTensor, start: int, stop: int) -> HostTensor:
        """Some rows of the weight, a matrix, from what the file holds, of which nothing else is
        read. Rows are counted from where the cut begins; columns are not cut here, as groups of
        codes may lie across the border."""
        shape = self.shape or stored.shape
        first = self.cut.start if self.cut and self.cut.axis == 0 else 0
        wanted = np.arange(first + start, first + stop)
        if isinstance(self.fix, UnpermuteRows):
            return self._stored_rows(stored, shape, self.fix.order(shape[0])[wanted])
        if isinstance(self.fix, TransposeHeads):
            return self._turned_rows(self.fix, stored, shape, first + start, first + stop)
        if self.fix is None:
            return self._stored_rows(stored, shape, wanted)
        tensor = self.fix.apply(self._stored_rows(stored, shape, np.arange(shape[0])))
        return replace(tensor, shape=(len(wanted), *shape[1:]), data=tensor.data[wanted])

    def _turned_rows(
        self, fix: TransposeHeads, stored: HostTensor, shape: tuple[int, ...], start: int, stop: int
    ) -> HostTensor:
        """Whole heads are turned, and what is not wanted of the first and the last is left out."""
        n, k = shape[0] // fix.num_heads, shape[1]
        first, last = start // n, -(-stop // n)
        heads = self._stored_rows(stored, (fix.num_heads * k, n), np.arange(first * k, last * k))
        turned = TransposeHeads(last - first).apply(heads)
        data = turned.data[start - first * n : stop - first * n]
        return replace(turned, shape=(stop - start, k), data=data)

    def _stored_rows(self, stored: HostTensor, shape: tuple[int, ...], rows: Rows) -> HostTensor:
        """Rows of the matrix of `shape` that the file holds, before the fix."""
        if self.part is not None:
            rows = self.part.rows(rows)
        if self.transposed:
            return _columns(stored, rows)
        data = stored.data.reshape(-1, _row_bytes(stored, shape))
        together = np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
        picked = data[rows[0] : rows[0] + len(rows)] if together else data[rows]
        return replace(stored, shape=(len(rows), *shape[1:]), data=picked)


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
                            rule.cut,
                        )
                    )
    return bindings


def _elements(tensor: HostTensor, part: Part, shape: tuple[int, ...]) -> HostTensor:
    data = tensor.data.reshape(-1, _row_bytes(tensor, shape))[part.rows(np.arange(shape[0]))]
    return replace(tensor, shape=shape, data=data.reshape(1, -1))


def _columns(tensor: HostTensor, rows: Rows) -> HostTensor:
    """Rows of what lies as (in, out): these columns. Of a stack, of one of its matrices."""
    size = element_bytes(tensor)
    n, k = tensor.shape[-2:]
    which = int(rows[0]) // k
    stack = tensor.data.view(f"u{size}").reshape(-1, n, k)
    data = np.ascontiguousarray(stack[which, :, rows - which * k]).view(np.uint8)
    return replace(tensor, shape=(len(rows), n), data=data)


def _row_bytes(tensor: HostTensor, shape: tuple[int, ...]) -> int:
    """Bytes of a row of the weight: of one element for a vector."""
    if tensor.matrix is not None:
        return tensor.data.shape[1]
    elements, size = BLOCKS[tensor.dtype]
    return (shape[1] if len(shape) > 1 else 1) * size // elements


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
    several: dict[tuple[str, tuple[int, ...] | None], list[Rule]] = {}
    for rule in rules:
        of = None if rule.layers is None else tuple(rule.layers)
        several.setdefault((rule.name, of), []).append(rule)

    def there(rule: Rule) -> bool:
        layer = str(rule.layers[0]) if rule.layers else "0"
        return any((name or "").replace("{i}", layer) in names for name in (rule.hf, rule.gguf))

    return [next(filter(there, same), same[0]) for same in several.values()]
