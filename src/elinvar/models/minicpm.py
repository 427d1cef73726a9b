"""MiniCPM (Hu et al., 2024), published with code of its own: Llama's blocks with Granite's factors, which
it derives from other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import granite, llama
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import FULL, one_rope_from_hf, sizes_from_hf
from elinvar.weights.tensor import HostTensor

EMBED_SCALE, DEPTH_SCALE, BASE_DIM = 12.0, 1.4, 256


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("num_experts", 0)
    keys.only("sparse_config")
    sizes = sizes_from_hf(keys, tied=True)
    config = ModelConfig(
        family="minicpm",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"])},
        **scales_from_hf(keys, sizes["num_layers"], sizes["dim"]),
        **sizes,
    )
    return checked(config, "config.json")


def scales_from_hf(keys: Keys, num_layers: int, dim: int) -> dict[str, Any]:
    return {
        "embed_scale": keys.number("scale_emb"),
        "residual_scale": keys.number("scale_depth") / num_layers**0.5,
        "logit_scale": keys.number("dim_model_base") / dim,
    }


def first_scales(num_layers: int, dim: int) -> dict[str, Any]:
    """Where a file does not say: every MiniCPM has the same."""
    return {
        "embed_scale": EMBED_SCALE,
        "residual_scale": DEPTH_SCALE / num_layers**0.5,
        "logit_scale": BASE_DIM / dim,
    }


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors: Granite's."""
    config = granite.config_from_gguf(metadata, tensors, "minicpm.")
    keys = Keys(metadata, "The GGUF file", "minicpm.")
    if not keys.has("embedding_scale"):
        config = replace(config, **first_scales(config.num_layers, config.dim))
    return replace(config, family="minicpm")


FAMILIES = (
    Family(
        name="minicpm",
        models="MiniCPM 1B and 2B, MiniCPM4",
        hf_architectures=("MiniCPMForCausalLM",),
        gguf_architectures=("minicpm",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=llama.rules,
        build=granite.build,
    ),
)
