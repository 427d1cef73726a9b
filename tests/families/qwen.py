"""Qwen, dense."""

from __future__ import annotations

from dataclasses import replace

from families.base import LLAMA, LLAMA3, YARN, Case

QWEN3 = replace(LLAMA, family="qwen3")

ENGINES = (
    replace(LLAMA, family="qwen2"),
    QWEN3,
)

CASES = {
    "qwen2": Case("qwen2", "Qwen2ForCausalLM", "Qwen2Config"),
    "qwen2-sliding": Case(
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
            "rope_parameters": YARN,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": Case("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {"rope_parameters": LLAMA3}),
    "qwen3-tied": Case("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3-sliding": Case(
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
            "head_dim": 32,
        },
    ),
}
