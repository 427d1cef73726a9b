"""Llama 4: chunks and layers without positions, experts that see a part of their input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elinvar.base.config import MoEConfig, RopeConfig, TemperatureConfig
from families.base import LLAMA, LLAMA3, VISION, Case

LLAMA4 = replace(
    LLAMA,
    family="llama4",
    num_layers=3,
    layer_kinds=("chunked", "full", "chunked"),
    rope={"chunked": RopeConfig(10000.0, 16), "full": RopeConfig(10000.0, 0)},
    temperature={"full": TemperatureConfig(0.5, 16, offset=1)},
    attn_chunk=40,
    unit_heads=True,
    moe=MoEConfig(5, 1, 32, (1, 2), scoring="sigmoid", shared_ff_dim=32, scale_inputs=True),
)


def _llama4(**settings: Any) -> Case:
    plain = {
        "intermediate_size_mlp": 96,
        "num_local_experts": 5,
        "num_hidden_layers": 5,
        "attention_chunk_size": 24,
        "floor_scale": 8,
        "attn_scale": 0.5,
    }
    return Case("llama4", "Llama4ForCausalLM", "Llama4TextConfig", plain | settings)


ENGINES = (LLAMA4,)

CASES = {
    "llama4": _llama4(rope_parameters=LLAMA3, interleave_moe_layer_step=2),
    "llama4-plain": _llama4(
        use_qk_norm=False,
        attn_temperature_tuning=False,
        no_rope_layers=[0, 1, 1, 0, 1],
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    ),
    # What GGUF files do not say of the models that exist.
    "llama4-gguf": _llama4(
        rope_parameters=LLAMA3,
        interleave_moe_layer_step=2,
        attention_chunk_size=8192,
        floor_scale=8192,
        attn_scale=0.1,
    ),
    "llama4-sees": replace(
        _llama4(num_hidden_layers=4),
        architecture="Llama4ForConditionalGeneration",
        config="Llama4Config",
        around={
            "vision_config": VISION
            | {"vision_output_dim": 64, "projector_input_dim": 32, "projector_output_dim": 64}
        },
    ),
}
