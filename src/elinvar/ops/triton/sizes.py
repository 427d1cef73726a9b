"""Matrices on a GPU (matrices.py, weights.py), told where there is none: no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from elinvar.ops.layout import GROUP, PANEL, QUANTISED, Kinds, WeightKind
from elinvar.ops.stored import STORED

Floats = Literal["f32", "bf16", "f16"]

TAKEN: Kinds = frozenset(STORED)  # type: ignore[arg-type]
"""Kinds that come as files have them (Ops.stored)."""
_PAD = 128
"""To which inputs of packed kinds are filled up."""
TOGETHER = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
"""Matrices of a layer that are multiplied by at once, and so joined."""
ARRIVING = 1 << 24
"""Numbers of a matrix that are taken apart at once."""
_IN_PIECES = 8
"""Bytes that one takes then, at most."""
_GROUP_BYTES = {"q4": GROUP // 2 + 4, "q5": GROUP // 2 + 4 + 4, "q8": GROUP + 2}
"""Codes, then scales and mins, and q5's fifth bits."""


def matrix_bytes(kind: WeightKind, shape: tuple[int, int]) -> int:
    """Of what from_weight makes of a matrix of this kind, for activations of two bytes."""
    n, k = shape
    padded = -(-k // _PAD) * _PAD
    if kind in STORED:
        form = STORED[kind]
        codes = k if form.in_byte == 1 else padded // 2
        scales = padded // form.group if form.scales is not None else 0
        blocks = 4 * -(-n // PANEL) * -(-k // form.group) if form.by_panel else 0
        return n * (codes + scales + 4 * form.factors) + blocks
    if kind in QUANTISED:
        return n * (padded // GROUP) * _GROUP_BYTES[kind]
    return n * k * (4 if kind == "f32" else 2)


def arriving_bytes(matrices: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Most that is there for a while as matrices, by name, kind and shape, come to the device: a slice
    in pieces (panels.py), what is joined (weights.py) still beside the whole of it, and, of weights that
    take the place of others, these."""
    joined: Counter[str] = Counter()
    slice_ = 0
    for name, kind, shape in matrices:
        if kind == "vector":
            continue
        own: Any = kind
        layer, expert, _ = name.partition(".experts.")
        stem, _, last = name.rpartition(".")
        key = layer if expert else f"{stem}.{TOGETHER.get(last, last)}"
        joined[key] += matrix_bytes(own, (shape[0], shape[1]))
        slice_ = max(slice_, min(shape[0] * shape[1], ARRIVING))
    return 2 * max(joined.values(), default=0) + _IN_PIECES * slice_


def activations(matrices: Iterable[tuple[str, int]]) -> Floats:
    """In what a model computes whose matrices are of these kinds and bytes: in that of most, bf16 for
    those that are quantised. Matrices of floats come in it, too, but for f32."""
    sizes: dict[Floats, int] = {"f32": 0, "bf16": 0, "f16": 0}
    for kind, nbytes in matrices:
        sizes[kind if kind in ("f32", "f16") else "bf16"] += nbytes  # type: ignore[index]
    return max(sizes, key=lambda kind: sizes[kind])


def kind_there(kind: Any, floats: Floats) -> Any:
    """As what a matrix of this kind comes to a device that computes in `floats`."""
    return floats if kind in ("bf16", "f16") else kind


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What the experts of a layer are."""

    kind: Any
    """Of gates above ups."""
    down_kind: Any
    count: int
    top: int
    """Of a token."""
    dim: int
    ff_dim: int

    @property
    def names(self) -> tuple[str, str]:
        """Of gates above ups, and of downs, in the table (tuned.name)."""
        e, d, f = self.count, self.dim, self.ff_dim
        return f"experts/{e}/{self.kind}/{2 * f}x{d}", f"experts/{e}/{self.down_kind}/{d}x{f}"
