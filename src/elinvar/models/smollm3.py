"""SmolLM3 (Hugging Face, 2025): Llama's blocks, of which every fourth layer has no positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import LayerKind, ModelConfig
from elinvar.models import llama
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    kinds_from_hf,
    one_rope_from_gguf,
    one_rope_from_hf,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.weights.tensor import HostTensor

PERIOD, BASE = 4, 2_000_000.0


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("mlp_bias", False)
    sizes = sizes_from_hf(keys, tied=True)
    unrotated = _unrotated(keys, sizes["num_layers"])
    kinds: tuple[LayerKind, ...] = FULL * sizes["num_layers"]
    if keys.flag("use_sliding_window", False) and keys.has("sliding_window"):
        every = range(sizes["num_layers"])
        kinds = kinds_from_hf(keys, ["sliding" if i in unrotated else "full" for i in every])
    config = ModelConfig(
        family="smollm3",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=kinds,
        rope=dict.fromkeys(kinds, one_rope_from_hf(keys, sizes["head_dim"], BASE)),
        window=keys.size("sliding_window") if "sliding" in kinds else None,
        unrotated=unrotated,
        **sizes,
    )
    return checked(config, "config.json")


def _unrotated(keys: Keys, num_layers: int) -> tuple[int, ...]:
    """no_rope_layers has a 1 for each layer *with* rotary positions."""
    flags = keys.raw("no_rope_layers")
    if flags is None:
        period = keys.size("no_rope_layer_interval", PERIOD)
        return tuple(range(period - 1, num_layers, period))
    if not isinstance(flags, list) or len(flags) != num_layers or {*flags} - {0, 1}:
        raise keys.bad("no_rope_layers", f"a list of {num_layers} times 0 or 1")
    return tuple(i for i, flag in enumerate(flags) if not flag)


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "smollm3.")
    sizes = sizes_from_gguf(keys, tensors)
    config = ModelConfig(
        family="smollm3",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"], BASE)},
        unrotated=tuple(range(PERIOD - 1, sizes["num_layers"], PERIOD)),
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="smollm3",
        models="SmolLM3-3B",
        hf_architectures=("SmolLM3ForCausalLM",),
        gguf_architectures=("smollm3",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=llama.rules,
        build=llama.build,
    ),
)
