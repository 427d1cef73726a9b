"""A model as its files describe it: its shape and its weights' sizes, of which nothing is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elinvar.base.config import ModelConfig
from elinvar.models.registry import find_family, read_config
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


def describe(path: Path, weight_format: Literal["auto", "f32"] = "auto") -> Described:
    """Raises ModelError for what is no model, or one that cannot be run."""
    alone = config_alone(path)
    checkpoint = described_checkpoint(alone) if alone else open_checkpoint(path)
    try:
        return _describe(checkpoint, weight_format, exact=alone is None)
    finally:
        checkpoint.close()


def _describe(
    checkpoint: Checkpoint, weight_format: Literal["auto", "f32"], exact: bool
) -> Described:
    family, config = find_family(checkpoint), read_config(checkpoint)
    rules = as_published(family.rules(config), checkpoint.tensors)
    if exact:
        return Described(config, packed_entries(checkpoint, rules, config, weight_format), True)
    entries = described_entries(checkpoint, rules, config.num_layers)
    if weight_format == "f32":
        entries = [Entry(e.name, e.kind if e.kind == "vector" else "f32", e.shape) for e in entries]
    return Described(config, entries, False)
