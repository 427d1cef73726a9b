"""Gemma."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elinvar.base.config import RopeConfig
from families.base import FULL_AND_SLIDING, LLAMA, VISION, Case

GEMMA3 = replace(
    LLAMA,
    family="gemma3",
    num_layers=3,
    layer_kinds=("sliding", "full", "sliding"),
    rope={"full": RopeConfig(10000.0, 16), "sliding": RopeConfig(1000.0, 16)},
    window=40,
    embed_scale=0.5,
    activation="gelu_tanh",
    tied_head=True,
)

GEMMA2 = replace(
    GEMMA3,
    family="gemma2",
    rope=dict.fromkeys(("full", "sliding"), RopeConfig(10000.0, 16)),
    attn_softcap=1.5,
    final_softcap=2.5,
)

LINEAR8 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


def _gemma2(**settings: Any) -> Case:
    plain = {"sliding_window": 8, "query_pre_attn_scalar": 24}
    return Case("gemma2", "Gemma2ForCausalLM", "Gemma2Config", plain | settings)


def _gemma3(**settings: Any) -> Case:
    plain = {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 24}
    return Case("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", plain | settings)


ENGINES = (
    GEMMA2,
    GEMMA3,
)

CASES = {
    "gemma2": _gemma2(attn_logit_softcapping=1.5, final_logit_softcapping=2.5),
    "gemma2-no-caps": _gemma2(
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        head_dim=32,
        layer_types=FULL_AND_SLIDING,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "gemma3": _gemma3(),
    "gemma3-linear": _gemma3(rope_parameters=LINEAR8, head_dim=32),
    "gemma3-types": _gemma3(num_hidden_layers=3, layer_types=FULL_AND_SLIDING),
    "gemma3-sees": replace(
        _gemma3(rope_parameters=LINEAR8),
        architecture="Gemma3ForConditionalGeneration",
        config="Gemma3Config",
        around={"vision_config": VISION, "mm_tokens_per_image": 4},
    ),
}
