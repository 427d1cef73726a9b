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
    bert,
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
from elinvar.models.family import Built, Family, Model
from elinvar.models.mtp import mtp_copies, mtp_rules
from elinvar.nn.decoder import Decoder
from elinvar.nn.encoder import Encoder
from elinvar.ops.api import Ops
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.load import Log, Progress, load_weights
from elinvar.weights.push import pushed
from elinvar.weights.rules import Rule, as_published

_FILES = (
    llama,
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
FAMILIES: tuple[Family[Model], ...] = tuple(f for file in _FILES for f in file.FAMILIES)
ENCODERS: tuple[Family[Encoder], ...] = bert.ENCODERS
"""Those that make vectors and scores of texts, and generate nothing."""


def find_family(checkpoint: Checkpoint) -> Family[Model]:
    """The family that generates with `checkpoint`. Raises ModelError listing the known ones."""
    if find_encoder(checkpoint):
        raise ModelError(
            f"{checkpoint.path} is an encoder ({checkpoint.architecture}): it makes vectors or scores "
            "of texts and generates none; use 'elinvar embed' or 'elinvar rerank'."
        )
    known, name = _known(FAMILIES, checkpoint), checkpoint.architecture
    num_experts = checkpoint.metadata.get(f"{name}.expert_count")
    if isinstance(num_experts, int) and num_experts > 0 and f"{name} with experts" in known:
        name = f"{name} with experts"
    if name in known:
        return known[name]
    raise ModelError(
        f"{checkpoint.path} has the architecture {checkpoint.architecture}, which is not "
        f"supported; there are {', '.join(known)}, and docs/adding-a-model.md shows how to add one."
    )


def find_encoder(checkpoint: Checkpoint) -> Family[Encoder] | None:
    """The family of encoders that runs `checkpoint`; None where there is none."""
    return _known(ENCODERS, checkpoint).get(checkpoint.architecture)


def _known(families: tuple[Family[Built], ...], checkpoint: Checkpoint) -> dict[str, Family[Built]]:
    """By the architecture's name in files of this format."""
    gguf = checkpoint.format == "gguf"
    return {
        name: family
        for family in families
        for name in (family.gguf_architectures if gguf else family.hf_architectures)
    }


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model's shape. Raises ModelError naming a key that is missing, wrong or unsupported."""
    family = find_encoder(checkpoint) or find_family(checkpoint)
    if checkpoint.format == "gguf":
        assert family.config_from_gguf is not None, "it names no GGUF architecture"
        return family.config_from_gguf(checkpoint.metadata, checkpoint.tensors)
    return family.config_from_hf(checkpoint.metadata)


def rules_to_save(family: Family, config: ModelConfig) -> list[Rule]:
    """Of a model that was loaded with its heads, if it has any."""
    rules = family.rules(config)
    if family.mtp is None:
        return rules
    return [*rules, *mtp_rules(config, family.rules, family.mtp), *mtp_copies(config, family.mtp)]


def mtp_heads(checkpoint: Checkpoint) -> int:
    """How many heads that predict further tokens the checkpoint holds; conversions often drop them,
    whatever the configuration says."""
    family, config = find_family(checkpoint), read_config(checkpoint)
    if family.mtp is None:
        return 0
    rules = mtp_rules(config, family.rules, family.mtp)
    joins = [rule for rule in rules if rule.name.endswith(".join")]
    return sum(rule.hf in checkpoint.tensors or rule.gguf in checkpoint.tensors for rule in joins)


def load_model(
    checkpoint: Checkpoint,
    ops: Ops,
    weight_format: Literal["auto", "f32"] = "auto",
    cache_dir: Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
    drafts: bool = False,
) -> Model:
    """Reads the configuration, loads the weights (see load_weights) and builds the model.

    drafts: with the heads that predict further tokens; the model is then an nn.mtp.MTPDecoder. Their
    weights are packed by themselves, so that those of the model are the same with them and without."""
    family, config = find_family(checkpoint), read_config(checkpoint)
    rules = as_published(family.rules(config), checkpoint.tensors)
    weights = load_weights(checkpoint, rules, config, weight_format, cache_dir, log, progress)
    if drafts:
        if not mtp_heads(checkpoint):
            raise ModelError(
                f"{checkpoint.path} holds no heads that predict further tokens; load it without "
                "drafts, or a checkpoint that has them."
            )
        assert family.mtp is not None
        rules = as_published(mtp_rules(config, family.rules, family.mtp), checkpoint.tensors)
        weights |= load_weights(
            checkpoint, rules, config, weight_format, cache_dir, log, progress, part="mtp"
        )
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


def load_encoder(
    checkpoint: Checkpoint,
    ops: Ops,
    weight_format: Literal["auto", "f32"] = "auto",
    cache_dir: Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
) -> Encoder | Decoder:
    """The same for a model that turns texts into vectors. A decoder that was published for that may
    lack its head, which is then not loaded. Raises ModelError where the layers keep more than
    keys and values of one shape."""
    family = find_encoder(checkpoint) or find_family(checkpoint)
    config = read_config(checkpoint)
    rules = as_published(family.rules(config), checkpoint.tensors)
    if config.encoder is None and not any(
        r.hf in checkpoint.tensors for r in rules if r.name == "head"
    ):
        config = replace(config, tied_head=True)
        rules = [rule for rule in rules if rule.name != "head"]
    weights = load_weights(checkpoint, rules, config, weight_format, cache_dir, log, progress)
    model = family.build(config, weights, ops)
    if not isinstance(model, Encoder | Decoder):
        raise ModelError(
            f"{checkpoint.path} cannot make vectors: its family, {family.name}, keeps more of a text "
            "than keys and values; use an embedding model."
        )
    return model
