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
from elinvar.models import deepseek, gemma2, gemma3, llama, mistral, mixtral, qwen3, qwen_moe
from elinvar.ops.api import F32, KVLayer, Ops
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.load import Log, Progress, load_weights
from elinvar.weights.rules import Rule
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
    rules = family.rules(config)
    weights = load_weights(checkpoint, rules, config, weight_format, cache_dir, log, progress)
    return family.build(config, weights, ops)
