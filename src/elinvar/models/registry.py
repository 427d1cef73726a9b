"""The families that can be run, and the way from a checkpoint to a model.

A new family is one file beside llama.py, and its name in _FILES.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import ModelConfig
from elinvar.base.errors import ModelError
from elinvar.models import (
    deepseek,
    gemma2,
    gemma3,
    glm,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    llama4,
    mistral,
    mixtral,
    olmo2,
    phi,
    phi3,
    qwen2,
    qwen3,
    qwen_moe,
    starcoder2,
)
from elinvar.models.family import Family, Model
from elinvar.nn.decoder import Decoder
from elinvar.ops.api import Ops
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.load import Log, Progress, load_weights
from elinvar.weights.push import pushed
from elinvar.weights.rules import Rule, as_published

_FILES = (
    llama,
    llama4,
    mistral,
    qwen2,
    qwen3,
    mixtral,
    qwen_moe,
    phi3,
    granite,
    glm,
    starcoder2,
    phi,
    gpt_neox,
    gpt2,
    gpt_oss,
    gemma2,
    gemma3,
    deepseek,
    olmo2,
    glm4_moe,
)
FAMILIES = tuple(family for file in _FILES for family in file.FAMILIES)


def find_family(checkpoint: Checkpoint) -> Family:
    """The family that runs `checkpoint`. Raises ModelError listing the known ones."""
    gguf = checkpoint.format == "gguf"
    known = {
        name: family
        for family in FAMILIES
        for name in (family.gguf_architectures if gguf else family.hf_architectures)
    }
    name = checkpoint.architecture
    num_experts = checkpoint.metadata.get(f"{name}.expert_count") if gguf else None
    if isinstance(num_experts, int) and num_experts > 0 and f"{name} with experts" in known:
        name = f"{name} with experts"
    if name in known:
        return known[name]
    raise ModelError(
        f"{checkpoint.path} has the architecture {checkpoint.architecture}, which is not "
        f"supported; there are {', '.join(known)}, and docs/adding-a-model.md shows how to add one."
    )


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model's shape. Raises ModelError naming a key that is missing, wrong or unsupported."""
    family = find_family(checkpoint)
    if checkpoint.format == "gguf":
        assert family.config_from_gguf is not None, "it names no GGUF architecture"
        return family.config_from_gguf(checkpoint.metadata, checkpoint.tensors)
    return family.config_from_hf(checkpoint.metadata)


def load_model(
    checkpoint: Checkpoint,
    ops: Ops,
    weight_format: Literal["auto", "f32"] = "auto",
    cache_dir: Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
) -> Model:
    """Reads the configuration, loads the weights (see load_weights) and builds the model."""
    family, config = find_family(checkpoint), read_config(checkpoint)
    rules = as_published(family.rules(config), checkpoint.tensors)
    weights = load_weights(checkpoint, rules, config, weight_format, cache_dir, log, progress)
    return family.build(config, weights, ops)


def rebuilt(
    model: Model,
    arrays: Mapping[str, NDArray[Any]],
    ops: Ops,
    weight_format: Literal["auto", "f32"] = "auto",
) -> Model:
    """The same model with other weights, by the names of its checkpoints or by canonical ones; all of
    them. Raises ModelError as weights.push does."""
    config = model.config
    family = next(family for family in FAMILIES if family.name == config.family)
    rules = as_published(family.rules(config), arrays)
    if config.tied_head:
        arrays = _without_tied_head(arrays, rules, family.rules(replace(config, tied_head=False)))
    present = model.weight_names if isinstance(model, Decoder) else ()
    checkpoint, rules = pushed(arrays, rules, config.num_layers, present)
    return family.build(config, load_weights(checkpoint, rules, config, weight_format), ops)


def _without_tied_head(
    arrays: Mapping[str, NDArray[Any]], rules: Sequence[Rule], untied: Sequence[Rule]
) -> Mapping[str, NDArray[Any]]:
    """A trainer's state names a tied head twice."""
    embed, head = (
        next((rule.hf for rule in table if rule.name == name and rule.hf in arrays), None)
        for name, table in (("embed", rules), ("head", untied))
    )
    if embed is None or head is None or not np.array_equal(arrays[embed], arrays[head]):
        return arrays
    return {name: array for name, array in arrays.items() if name != head}
