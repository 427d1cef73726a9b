"""Heads that draft, of folders of their own: which kind a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elinvar.base.errors import ModelError
from elinvar.models.eagle import is_eagle, load_eagle
from elinvar.models.medusa import is_medusa, load_medusa
from elinvar.nn.decoder import Decoder
from elinvar.nn.eagle import EagleHead
from elinvar.nn.medusa import MedusaHeads
from elinvar.ops.api import Ops
from elinvar.weights.checkpoint import Checkpoint


def are_heads(checkpoint: Checkpoint) -> bool:
    """Whether it is a part for a model, and none of its own."""
    return is_eagle(checkpoint) or is_medusa(checkpoint)


def load_heads(
    checkpoint: Checkpoint,
    target: Any,
    ops: Ops,
    weight_format: Any = "auto",
    cache_dir: Path | None = None,
) -> EagleHead | MedusaHeads:
    """Heads for `target`, before its cache is made: EAGLE heads have a part of it. `auto` takes matrices of
    floats in 8 bits: a guess need not be exact, and half of the bytes is half of its time. Raises
    ModelError where they do not fit the target."""
    if not isinstance(target, Decoder) or not target.layers:
        raise ModelError(f"{checkpoint.path} holds heads, and this model's family cannot have any.")
    load: Any = load_eagle if is_eagle(checkpoint) else load_medusa
    form = "q8" if weight_format == "auto" else weight_format
    heads: EagleHead | MedusaHeads = load(checkpoint, target, ops, form, cache_dir)
    return heads
