"""The families that can be run, and the way from a checkpoint to a model.

A new family is one file beside llama.py, and one line of FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import KVDtype, KVSpec, ModelConfig
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
from elinvar.ops.api import F32, KVLayer, Ops
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.load import Log, Progress, load_weights
from elinvar.weights.rules import Rule, as_published
from elinvar.weights.tensor import HostTensor


class Model(Protocol):
    """What the runner sees of any family."""

    config: ModelConfig

    def kv_specs(self, kv_dtype: KVDtype) -> tuple[KVSpec, ...]:
        """The cache it needs, one spec a layer kind, "full" first; the batch's block tables and
        slot mappings come in this order."""
        ...

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> F32:
        """Logits [L, V] of batch.logit_rows; kv holds one KVLayer a layer and is written to."""
        ...


@dataclass(frozen=True, slots=True)
class Family:
    """A family's file: how its configuration is read, its weights named, its model built."""

    name: str
    models: str
    """Those that people know, for the table of what is supported."""
    hf_architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    config_from_gguf: Callable[[Mapping[str, Any], Mapping[str, HostTensor]], ModelConfig] | None
    """None: there are no GGUF files of it, or another family reads them."""
    rules: Callable[[ModelConfig], list[Rule]]
    build: Callable[[ModelConfig, Mapping[str, Any], Ops], Model]
    tested: str = "random weights against transformers"


FAMILIES = (
    Family(
        "llama",
        "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2",
        ("LlamaForCausalLM",),
        ("llama",),
        llama.config_from_hf,
        llama.config_from_gguf,
        llama.rules,
        llama.build,
        "random weights against transformers, and SmolLM2-135M itself",
    ),
    Family(
        "mistral",
        "Mistral 7B, Small, Nemo; Ministral 8B",
        ("MistralForCausalLM", "MinistralForCausalLM"),
        (),  # llama.cpp calls them llama
        mistral.config_from_hf,
        None,
        llama.rules,
        llama.build,
    ),
    Family(
        "qwen2",
        "Qwen2, Qwen2.5 (dense)",
        ("Qwen2ForCausalLM",),
        ("qwen2",),
        qwen2.config_from_hf,
        qwen2.config_from_gguf,
        qwen2.rules,
        llama.build,
    ),
    Family(
        "qwen3",
        "Qwen3 (dense)",
        ("Qwen3ForCausalLM",),
        ("qwen3",),
        qwen3.config_from_hf,
        qwen3.config_from_gguf,
        qwen3.rules,
        llama.build,
    ),
    Family(
        "mixtral",
        "Mixtral 8x7B, 8x22B",
        ("MixtralForCausalLM",),
        ("llama with experts",),
        mixtral.config_from_hf,
        mixtral.config_from_gguf,
        mixtral.rules,
        llama.build,
    ),
    Family(
        "qwen2_moe",
        "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
        ("Qwen2MoeForCausalLM",),
        ("qwen2moe",),
        qwen_moe.qwen2_from_hf,
        qwen_moe.qwen2_from_gguf,
        qwen_moe.rules,
        llama.build,
    ),
    Family(
        "qwen3_moe",
        "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
        ("Qwen3MoeForCausalLM",),
        ("qwen3moe",),
        qwen_moe.qwen3_from_hf,
        qwen_moe.qwen3_from_gguf,
        qwen_moe.rules,
        llama.build,
    ),
    Family(
        "phi3",
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        ("Phi3ForCausalLM",),
        (),
        phi3.config_from_hf,
        None,
        phi3.rules,
        llama.build,
    ),
    Family(
        "granite",
        "Granite 3 (dense)",
        ("GraniteForCausalLM",),
        (),
        granite.config_from_hf,
        None,
        granite.rules,
        granite.build,
    ),
    Family(
        "glm",
        "GLM-4-9B (glm-4-9b-chat-hf)",
        ("GlmForCausalLM",),
        (),
        glm.config_from_hf,
        None,
        glm.rules,
        glm.build,
    ),
    Family(
        "glm4",
        "GLM-4-0414, GLM-Z1",
        ("Glm4ForCausalLM",),
        (),
        glm.config_from_hf,
        None,
        glm.rules,
        glm.build,
    ),
    Family(
        "starcoder2",
        "StarCoder2",
        ("Starcoder2ForCausalLM",),
        ("starcoder2",),
        starcoder2.config_from_hf,
        starcoder2.config_from_gguf,
        starcoder2.rules,
        gpt_neox.build,
    ),
    Family(
        "phi",
        "Phi-1, Phi-1.5, Phi-2",
        ("PhiForCausalLM",),
        ("phi2",),
        phi.config_from_hf,
        phi.config_from_gguf,
        phi.rules,
        gpt_neox.build,
    ),
    Family(
        "gpt_neox",
        "GPT-NeoX, Pythia",
        ("GPTNeoXForCausalLM",),
        ("gptneox",),
        gpt_neox.config_from_hf,
        gpt_neox.config_from_gguf,
        gpt_neox.rules,
        gpt_neox.build,
    ),
    Family(
        "gpt2",
        "GPT-2, DistilGPT2",
        ("GPT2LMHeadModel",),
        ("gpt2",),
        gpt2.config_from_hf,
        gpt2.config_from_gguf,
        gpt2.rules,
        gpt2.build,
    ),
    Family(
        "gemma2",
        "Gemma 2",
        ("Gemma2ForCausalLM",),
        ("gemma2",),
        gemma2.config_from_hf,
        gemma2.config_from_gguf,
        gemma2.rules,
        gemma3.build,
    ),
    Family(
        "gemma3",
        "Gemma 3, text",
        ("Gemma3ForCausalLM",),
        ("gemma3",),
        gemma3.config_from_hf,
        gemma3.config_from_gguf,
        gemma3.rules,
        gemma3.build,
        "random weights against transformers, and Gemma 3 270M itself",
    ),
    Family(
        "deepseek",
        "DeepSeek V2, V2 Lite, V3, V3.1, R1",
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        (),
        deepseek.config_from_hf,
        None,
        deepseek.rules,
        deepseek.build,
    ),
)


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
