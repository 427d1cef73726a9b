"""The long tail: families that put known parts together otherwise."""

from __future__ import annotations

from dataclasses import replace

from families.base import FULL_AND_SLIDING, YARN, Case
from families.gemma import GEMMA3

OLMO2 = replace(GEMMA3, family="olmo2", embed_scale=1.0, activation="silu", tied_head=False)

ENGINES = (OLMO2,)

CASES = {
    "olmo2": Case("olmo2", "Olmo2ForCausalLM", "Olmo2Config"),
    "olmo2-tied": Case(
        "olmo2",
        "Olmo2ForCausalLM",
        "Olmo2Config",
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_parameters": YARN},
    ),
    "olmo3": Case(
        "olmo2", "Olmo3ForCausalLM", "Olmo3Config", {"num_hidden_layers": 5, "sliding_window": 8}
    ),
    "olmo3-yarn": Case(
        "olmo2",
        "Olmo3ForCausalLM",
        "Olmo3Config",
        {
            "sliding_window": 40,
            "layer_types": FULL_AND_SLIDING,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
}
