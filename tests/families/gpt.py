"""GPT-2 and NeoX, and those with their layers."""

from __future__ import annotations

from dataclasses import replace

from elinvar.base.config import RopeConfig
from families.base import LLAMA, YARN, Case
from families.llama import MISTRAL

NEOX = replace(
    LLAMA,
    family="gpt_neox",
    num_kv_heads=4,
    rope={"full": RopeConfig(10000.0, 4)},
    activation="gelu",
    parallel=True,
)

PHI = replace(NEOX, family="phi", activation="gelu_tanh", num_kv_heads=2)

STARCODER2 = replace(MISTRAL, family="starcoder2", activation="gelu_tanh", tied_head=True)

GPT2 = replace(
    PHI, family="gpt2", num_kv_heads=4, rope={"full": RopeConfig(1.0, 0)}, parallel=False
)

GPT2_SIZES = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}

ENGINES = (
    STARCODER2,
    PHI,
    NEOX,
    GPT2,
)

CASES = {
    "starcoder2": Case(
        "starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", {"sliding_window": 8}
    ),
    "starcoder2-plain": Case(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        {"use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"},
    ),
    "starcoder2-full": Case("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config"),
    "phi": Case("phi", "PhiForCausalLM", "PhiConfig", {"partial_rotary_factor": 0.25}),
    "phi-yarn": Case(
        "phi", "PhiForCausalLM", "PhiConfig", {"rope_parameters": YARN, "hidden_act": "relu2"}
    ),
    "gpt-neox": Case("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "gpt-neox-serial": Case(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0},
    ),
    "gpt2": Case("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2_SIZES),
    "gpt2-untied": Case(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2_SIZES | {"tie_word_embeddings": False, "n_inner": 112, "activation_function": "relu2"},
    ),
}
