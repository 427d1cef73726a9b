"""The families that can be run, and which of them a checkpoint is of.

A new family is one file beside llama.py, and its name in _FILES.
"""

from __future__ import annotations

from elinvar.base.config import ModelConfig
from elinvar.base.errors import ModelError
from elinvar.models import (
    bert,
    chatglm,
    cohere,
    deepseek,
    deepseek_v32,
    ernie,
    ernie_moe,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    gemma3n,
    glm,
    glm4_moe,
    glm4_moe_lite,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granite_moe,
    hunyuan,
    internlm,
    llama,
    llama4,
    minicpm,
    minicpm3,
    minimax_m2,
    mistral,
    mixtral,
    nomic_bert,
    olmo2,
    olmoe,
    phi,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_next,
    qwen_moe,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from elinvar.models.family import Built, Family, Model
from elinvar.nn.encoder import Encoder
from elinvar.weights.checkpoint import Checkpoint

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
    gemma3n,
    deepseek,
    deepseek_v32,
    olmo2,
    glm4_moe,
    chatglm,
    qwen3_next,
    qwen3_5,
    internlm,
    minicpm,
    minicpm3,
    smollm3,
    seed_oss,
    exaone4,
    cohere,
    minimax_m2,
    granite_moe,
    ernie,
    stablelm,
    gemma,
    glm4_moe_lite,
    olmoe,
    ernie_moe,
    hunyuan,
)
MAX_EXPERTS_IN_ALL = 1 << 18
"""No model comes near; rules for many more would take all memory."""
FAMILIES: tuple[Family[Model], ...] = tuple(f for file in _FILES for f in file.FAMILIES)
ENCODERS: tuple[Family[Encoder], ...] = bert.ENCODERS + nomic_bert.ENCODERS
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
        f"{checkpoint.path} has the architecture {checkpoint.architecture}, which is not supported; "
        f"there are the families {', '.join(family.name for family in FAMILIES)}; "
        "'elinvar models support' lists their models, docs/adding-a-model.md shows how to add one."
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
        config = family.config_from_gguf(checkpoint.metadata, checkpoint.tensors)
    else:
        config = family.config_from_hf(checkpoint.metadata)
    if config.moe and config.num_layers * config.moe.num_experts > MAX_EXPERTS_IN_ALL:
        raise ModelError(
            f"{checkpoint.path} describes {config.num_layers} layers of {config.moe.num_experts} "
            f"experts, and more than {MAX_EXPERTS_IN_ALL} experts in all are not supported."
        )
    return config
