"""Medusa heads (nn/medusa.py) as they are published: a folder with a config.json that says how many, and
one file of theirs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elinvar.base.errors import ModelError
from elinvar.models.keys import Keys
from elinvar.nn.decoder import Decoder
from elinvar.nn.medusa import MedusaHead, MedusaHeads
from elinvar.ops.api import Ops
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.load import load_weights
from elinvar.weights.rules import Rule

MOST = 64
"""Heads, and blocks of each; no model comes near."""
_PREFIXES = ("medusa_head.", "")


def is_medusa(checkpoint: Checkpoint) -> bool:
    return "medusa_num_heads" in checkpoint.metadata


def load_medusa(
    checkpoint: Checkpoint,
    target: Decoder,
    ops: Ops,
    weight_format: Any = "auto",
    cache_dir: Path | None = None,
) -> MedusaHeads:
    """The heads for `target`. Raises ModelError where they do not fit."""
    keys, config = Keys(checkpoint.metadata, "config.json"), target.config
    num_heads = keys.size("medusa_num_heads", largest=MOST)
    num_blocks = keys.size("medusa_num_layers", 1, largest=MOST)
    for key, size in (("hidden_size", config.dim), ("vocab_size", config.vocab_size)):
        if keys.has(key) and keys.size(key) != size:
            raise ModelError(
                f"{checkpoint.path} has {key} = {keys.size(key)}, and heads for this model need "
                f"{size}; take those that were trained for it."
            )
    first = f"0.{num_blocks}.weight"
    prefix = next((p for p in _PREFIXES if p + first in checkpoint.tensors), "")
    rules = medusa_rules(num_heads, num_blocks, config.dim, config.vocab_size, prefix)
    also = weight_format, cache_dir
    w: dict[str, Any] = {**load_weights(checkpoint, rules, config, *also, stored=ops.stored)}
    ops.prepare(w, beside=True)
    heads = [
        MedusaHead(
            [(w[f"{n}.{i}"], w.get(f"{n}.{i}_bias")) for i in range(num_blocks)], w[f"{n}.head"]
        )
        for n in range(num_heads)
    ]
    return MedusaHeads(heads, ops)


def medusa_rules(
    num_heads: int, num_blocks: int, dim: int, vocab_size: int, prefix: str
) -> list[Rule]:
    rules = []
    for n in range(num_heads):
        for i in range(num_blocks):
            block = f"{prefix}{n}.{i}.linear."
            rules.append(Rule(f"{n}.{i}", f"{block}weight", None, (dim, dim)))
            rules.append(Rule(f"{n}.{i}_bias", f"{block}bias", None, (dim,), optional=True))
        head = f"{prefix}{n}.{num_blocks}.weight"
        rules.append(Rule(f"{n}.head", head, None, (vocab_size, dim)))
    return rules
