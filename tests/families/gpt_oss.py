"""gpt-oss: sinks, windows, experts with biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elinvar.base.config import MoEConfig, RopeConfig, YarnConfig
from families.base import FULL_AND_SLIDING, LLAMA, YARN, Case

GPT_OSS = replace(
    LLAMA,
    family="gpt_oss",
    layer_kinds=("sliding", "full"),
    rope=dict.fromkeys(
        ("full", "sliding"), RopeConfig(10000.0, 16, yarn=YarnConfig(4.0, 64, truncate=False))
    ),
    window=40,
    activation="swiglu_oai",
    moe=MoEConfig(6, 2, 96, (0, 1), renormalise=True),
)


def _gpt_oss(**settings: Any) -> Case:
    plain = {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8}
    return Case("gpt_oss", "GptOssForCausalLM", "GptOssConfig", plain | settings)


ENGINES = (GPT_OSS,)

CASES = {
    "gpt-oss": _gpt_oss(rope_parameters=YARN | {"beta_fast": 8.0, "truncate": False}),
    "gpt-oss-plain": _gpt_oss(
        num_experts_per_tok=1,
        attention_bias=False,
        tie_word_embeddings=True,
        head_dim=32,
        layer_types=FULL_AND_SLIDING,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
}
