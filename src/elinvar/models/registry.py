"""The families that can be run, and the way from a checkpoint to a model.

A new family is one file beside llama.py, and its name in _FILES.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from elinvar.base.config import ModelConfig
from elinvar.base.errors import ModelError
from elinvar.models import (
    deepseek,
    gemma2,
    gemma3,
    glm,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    mixtral,
    phi,
    phi3,
    qwen2,
    qwen3,
    qwen_moe,
    starcoder2,
)
from elinvar.models.family import Family, Model
from elinvar.models.mtp import mtp_copies, mtp_rules
from elinvar.ops.api import Ops
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.load import Log, Progress, load_weights
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
    gemma2,
    gemma3,
    deepseek,
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
