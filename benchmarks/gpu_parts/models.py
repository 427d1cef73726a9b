"""Models of real shapes with random weights that are made on the device, where each is first used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

from elinvar.base.config import EngineConfig
from elinvar.engine.core import Engine
from elinvar.engine.described import Described
from elinvar.models.family import Model
from elinvar.models.registry import find_family, read_config
from elinvar.ops import Weight, load_provider
from elinvar.ops.layout import packed_bytes
from elinvar.ops.triton import weights as on_device
from elinvar.ops.triton.samples import random_matrix
from elinvar.ops.triton.sizes import TAKEN
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.described import described_entries
from elinvar.weights.rules import as_published

SHAPES = Path(__file__).with_name("models.json")
"""config.json of each, with what `--small` makes of it."""


class Unmade(Weight):
    """A matrix of which there is no more than a seed."""

    @property
    def nbytes(self) -> int:
        return packed_bytes(self.kind, self.shape)

    @property
    def seed(self) -> int:
        return int(self.data.view(np.uint32)[0])


def unmade(kind: Any, shape: Any, name: str) -> Unmade:
    return Unmade(kind, shape, np.array([crc32(name.encode())], np.uint32).view(np.uint8))


def settings(name: str, small: bool) -> dict[str, Any]:
    both = json.loads(SHAPES.read_text())[name]
    return {**both["config"], **(both["small"] if small else {})}


def random_model(
    name: str, small: bool, tables: Path | None = None
) -> tuple[Model, Any, Described]:
    """The model on the provider for GPUs, that provider, and what the model is made of. tables: a cache
    folder with what was tuned."""
    config_json = settings(name, small)
    checkpoint = Checkpoint(
        Path("config.json"), "safetensors", config_json["architectures"][0], config_json, {}, ""
    )
    family, config = find_family(checkpoint), read_config(checkpoint)
    rules = as_published(family.rules(config), ())
    entries = described_entries(checkpoint, rules, config.num_layers, TAKEN)
    weights: dict[str, Any] = {}
    for entry in entries:
        if entry.kind != "vector":
            weights[entry.name] = unmade(entry.kind, entry.shape, entry.name)
        else:
            one = float(entry.name.endswith("norm"))
            weights[entry.name] = np.full(entry.shape, one, np.float32)
    ops: Any = load_provider("cuda", cache=tables)
    make_on_device()
    ops.prepare(weights)
    return family.build(config, weights, ops), ops, Described(config, entries, False)


def make_on_device() -> None:
    """The provider's matrices are made of the seeds of those that are not there."""
    given = on_device.from_weight

    def made(w: Weight, dtype: torch.dtype, device: Any) -> Any:
        if not isinstance(w, Unmade):
            return given(w, dtype, device)
        kind: Any = w.kind if w.kind not in ("bf16", "f16") else _KINDS[dtype]
        return random_matrix(kind, *w.shape, device, w.seed)

    on_device.from_weight = made


_KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


class Mute:
    """A tokenizer whose tokens have no text, and of which none ends an answer."""

    eos_ids: frozenset[int] = frozenset()
    special_ids: frozenset[int] = frozenset()
    bos_id = chat_template = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def spellings(self, count: int) -> list[bytes]:
        return [b""] * count

    def text_bytes(self, ids: Any, hidden: Any = None) -> bytes:
        return b""

    def decode(self, ids: Any) -> str:
        return ""


def engine_of(model: Model, ops: Any, **options: Any) -> Engine:
    config: Mapping[str, Any] = {"device": "cuda", "kv_dtype": "bf16", **options}
    tokenizer: Any = Mute(model.config.vocab_size)
    return Engine(model, ops, tokenizer, EngineConfig(**config), "random")
