"""LoRA adapters for tests: random ones of tiny engines, folders as PEFT saves them, and a model that
runs with one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from elinvar.base.batch import ForwardBatch
from elinvar.engine.core import Engine
from elinvar.models.family import Model
from elinvar.models.load import Loaded
from elinvar.ops import KVLayer, Ops, Weight
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.api import F32
from elinvar.ops.arguments import LoraPair
from elinvar.weights.peft import ADAPTED, Adapter
from engines import provider, random_weight, tiny_engine, tiny_parts


def adaptable(parts: Loaded) -> dict[str, Weight]:
    """By canonical name: every matrix that adapters may change."""
    return {
        name: weight
        for name, weight in parts.weights.items()
        if isinstance(weight, Weight)
        and (name == "head" or (name.count(".") == 2 and name.rpartition(".")[2] in ADAPTED))
    }


def random_adapter(
    parts: Loaded, seed: int, rank: int = 5, kind: str = "f16", names: Sequence[str] | None = None
) -> Adapter:
    """Of the matrices `names`, or of all that can be adapted."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for name, w in adaptable(parts).items():
        if names is None or name in names:
            n, k = w.shape
            half = random_weight(rng, kind, rank, k), random_weight(rng, kind, n, rank)
            pairs[w] = LoraPair(*half, 0.75)
    return Adapter(Path("random"), pairs, rng.bytes(32))


def adapted_engine(
    family: str = "llama", kind: str = "q4", inner: Ops | None = None, **options: Any
) -> Engine:
    """With the adapters "one", of everything, and "two", of some matrices and another rank."""
    engine = tiny_engine(family, kind, AdaptedOps(inner or provider()), **options)  # type: ignore[arg-type]
    parts = tiny_parts(family, kind)
    some = [name for name in adaptable(parts) if name.endswith((".q", ".v", ".up"))]
    engine.add_adapter("one", random_adapter(parts, 1))
    engine.add_adapter("two", random_adapter(parts, 2, 17, "bf16", some))
    return engine


class AdaptedModel:
    """A model of which every token runs with adapter 0."""

    def __init__(self, model: Model, ops: AdaptedOps) -> None:
        self.model, self.ops, self.config = model, ops, model.config
        self.kv_specs = model.kv_specs

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> F32:
        batch = replace(batch, adapters=np.zeros(len(batch.input_ids), np.int32))
        with self.ops.applied(batch):
            return self.model.forward(batch, kv)


def save_adapter(
    folder: Path, modules: dict[str, tuple[int, int]], r: int = 4, seed: int = 0, **config: Any
) -> Path:
    """A folder with random A and B for modules of (inputs, outputs); `config` goes over PEFT's
    defaults."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (inputs, outputs) in modules.items():
        for half, shape in (("A", (r, inputs)), ("B", (outputs, r))):
            values = rng.standard_normal(shape).astype(np.float32) / 2
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
