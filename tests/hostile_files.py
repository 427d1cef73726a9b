"""A model of two shards, and ways to break it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from elinvar.models.registry import FAMILIES
from elinvar.weights.rules import bind
from elinvar.weights.safetensors import INDEX

CONFIG: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 32},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"intermediate_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
}
LLAMA = next(family for family in FAMILIES if family.name == "llama")
BINDINGS = bind(LLAMA.rules(LLAMA.config_from_hf(CONFIG)), "safetensors", 1)
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


@dataclass
class Folder:
    """A model of two shards; tests break it before it is written."""

    path: Path
    config: Any = field(default_factory=lambda: deepcopy(CONFIG))
    index: Any = None
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """File -> header."""
    data: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at = dict.fromkeys(SHARDS, 0)
        weight_map = {}
        for i, binding in enumerate(BINDINGS):
            file, shape = SHARDS[i % 2], binding.stored_shape or ()
            end = at[file] + 4 * int(np.prod(shape))
            info = {"dtype": "F32", "shape": list(shape), "data_offsets": [at[file], end]}
            self.shards.setdefault(file, {})[binding.source] = info
            weight_map[binding.source], at[file] = file, end
        self.data = {file: bytes(size) for file, size in at.items()}
        self.index = {"metadata": {}, "weight_map": weight_map}

    def info(self, name: str) -> dict[str, Any]:
        return next(shard[name] for shard in self.shards.values() if name in shard)

    def write(self) -> Path:
        self.path.mkdir()
        for file, shard in self.shards.items():
            raw = shard if isinstance(shard, bytes) else json.dumps(shard).encode()
            (self.path / file).write_bytes(struct.pack("<Q", len(raw)) + raw + self.data[file])
        for name, value in (("config.json", self.config), (INDEX, self.index)):
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            (self.path / name).write_bytes(raw)
        return self.path


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def put(key: str, value: Any) -> Callable[[Folder], None]:
    return lambda m: m.config.update({key: value})


def tell(name: str, shard: Any) -> Callable[[Folder], None]:
    return lambda m: m.index["weight_map"].update({name: shard})


def say(name: str, **changes: Any) -> Callable[[Folder], None]:
    return lambda m: m.info(name).update(changes)


def twice(m: Folder) -> None:
    first = next(iter(m.shards[SHARDS[0]]))
    end = len(m.data[SHARDS[1]])
    info = m.info(first)
    size = info["data_offsets"][1] - info["data_offsets"][0]
    m.shards[SHARDS[1]][first] = info | {"data_offsets": [end, end + size]}
    m.data[SHARDS[1]] += bytes(size)


def nested_twice(m: Folder) -> None:
    m.config = {"architectures": ["LlamaForCausalLM"], "text_config": CONFIG}
    name, end = "language_model.model.norm.weight", len(m.data[SHARDS[1]])
    info = {"dtype": "F32", "shape": [32], "data_offsets": [end, end + 128]}
    m.shards[SHARDS[1]][name] = info
    m.data[SHARDS[1]] += bytes(128)


def lose(name: str) -> Callable[[Folder], None]:
    """Under another name nobody misses the bytes."""

    def change(m: Folder) -> None:
        shard = next(shard for shard in m.shards.values() if name in shard)
        shard["other"] = shard.pop(name)
        m.index["weight_map"]["other"] = m.index["weight_map"].pop(name)

    return change


def whole(attribute: str, value: Any) -> Callable[[Folder], None]:
    return lambda m: setattr(m, attribute, value)


def shard_header(raw: bytes) -> Callable[[Folder], None]:
    return lambda m: m.shards.update({SHARDS[0]: raw})


def overlap(m: Folder) -> None:
    for name, info in list(m.shards[SHARDS[0]].items())[1:2]:
        begin, end = info["data_offsets"]
        m.shards[SHARDS[0]][name] = info | {"data_offsets": [begin - 4, end - 4]}


def swap_shards(m: Folder) -> None:
    weight_map = m.index["weight_map"]
    weight_map[Q] = next(file for file in SHARDS if file != weight_map[Q])
