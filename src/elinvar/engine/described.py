"""A model as its files describe it: its shape and its weights' sizes, of which nothing is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from elinvar.base.config import ModelConfig
from elinvar.models.registry import find_family, read_config
from elinvar.ops.layout import Kinds
from elinvar.ops.triton.sizes import TOGETHER, ExpertShape, Floats, activations, kind_there
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.described import config_alone, described_checkpoint, described_entries
from elinvar.weights.load import packed_entries
from elinvar.weights.packfile import Entry
from elinvar.weights.rules import as_published


@dataclass(frozen=True, slots=True)
class Described:
    """A model as its files describe it."""

    config: ModelConfig
    entries: list[Entry]
    exact: bool
    """Of a checkpoint; otherwise of config.json alone, without biases that only some have."""

    @property
    def floats(self) -> Floats:
        """In which a GPU computes it."""
        return _floats(self.entries)


def describe(
    path: Path, weight_format: Literal["auto", "f32"] = "auto", stored: Kinds = frozenset()
) -> Described:
    """stored: kinds that are kept where it will run (Ops.stored). Raises ModelError for what is no
    model, or one that cannot be run."""
    alone = config_alone(path)
    checkpoint = described_checkpoint(alone) if alone else open_checkpoint(path)
    try:
        return _describe(checkpoint, weight_format, stored, exact=alone is None)
    finally:
        checkpoint.close()


def _describe(
    checkpoint: Checkpoint, weight_format: Literal["auto", "f32"], stored: Kinds, exact: bool
) -> Described:
    family, config = find_family(checkpoint), read_config(checkpoint)
    rules = as_published(family.rules(config), checkpoint.tensors)
    if exact:
        entries = packed_entries(checkpoint, rules, config, weight_format, stored)
        return Described(config, entries, True)
    entries = described_entries(checkpoint, rules, config.num_layers, stored)
    if weight_format == "f32":
        entries = [Entry(e.name, e.kind if e.kind == "vector" else "f32", e.shape) for e in entries]
    return Described(config, entries, False)


Product = tuple[Any, tuple[int, int], bool]
"""Kind and shape of the matrix that is multiplied by on a GPU, and whether it is gate above up."""


def products(entries: Sequence[Entry]) -> dict[Product, int]:
    """The products of a forward, but for those of experts, and how often each comes: matrices that are
    multiplied by at once lie together, where they are of one kind."""
    together: dict[str, list[Entry]] = {}
    names, floats = {entry.name for entry in entries}, _floats(entries)
    for entry in entries:
        if len(entry.shape) != 2 or ".experts." in entry.name or entry.name == "own_embed":
            continue
        if entry.name == "embed" and "head" in names:
            continue
        stem, _, last = entry.name.rpartition(".")
        together.setdefault(f"{stem}.{TOGETHER.get(last, last)}", []).append(entry)
    found: Counter[Product] = Counter()
    for name, parts in together.items():
        gated = name.endswith("gate_up") and len(parts) == 2
        kinds = [kind_there(entry.kind, floats) for entry in parts]
        joined = len(set(kinds)) == 1
        for some in [parts] if joined else [[part] for part in parts]:
            rows = sum(entry.shape[0] for entry in some)
            kind = kind_there(some[0].kind, floats)
            found[kind, (rows, some[0].shape[1]), gated and joined] += 1
    return dict(found)


def experts(model: Described) -> dict[ExpertShape, int]:
    """What layers with experts have, and how many have it. Experts of several kinds are floats on a
    GPU, and so are gates and ups that differ."""
    moe = model.config.moe
    if moe is None:
        return {}
    floats = model.floats
    kinds: dict[str, dict[str, set[str]]] = {}
    for entry in model.entries:
        layer, there, rest = entry.name.partition(".experts.")
        part = rest.rpartition(".")[2]
        if there and len(entry.shape) == 2:
            of_layer = kinds.setdefault(layer, {})
            of_layer.setdefault(part, set()).add(kind_there(entry.kind, floats))
    found: Counter[ExpertShape] = Counter()
    for parts in kinds.values():
        both = parts["gate"] | parts["up"]
        up, down = (
            next(iter(some)) if len(some) == 1 else floats for some in (both, parts["down"])
        )
        shape = moe.num_experts, moe.top_k, model.config.dim, moe.ff_dim
        found[ExpertShape(up, down, *shape)] += 1
    return dict(found)


def _floats(entries: Sequence[Entry]) -> Floats:
    return activations((e.kind, e.nbytes) for e in entries if e.kind != "vector")
