"""Phi 3 and 4 (Microsoft, 2024): Llama's blocks, stored with q, k and v in one matrix and gate and up in
another; perhaps a sliding window, rotary positions on a part of each head, LongRoPE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import LayerKind, ModelConfig
from elinvar.models import llama
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.shared import (
    GGUF,
    HF,
    TO,
    norm_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.nn.rope import MAX_POSITIONS
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor


def rules(config: ModelConfig) -> list[Rule]:
    d, f = config.dim, config.ff_dim
    nq, nk = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv, both = (nq + 2 * nk, d), (2 * f, d)

    def part(name: str, hf: str, gguf: str, rows: int, whole: tuple[int, int], start: int) -> Rule:
        one = Part(whole, start)
        return Rule(
            TO + name,
            f"{HF}{hf}.weight",
            f"{GGUF}{gguf}.weight",
            (rows, d),
            hf_part=one,
            gguf_part=one,
        )

    return [
        *norm_rules(NORMS, d),
        part("q", "self_attn.qkv_proj", "attn_qkv", nq, qkv, 0),
        part("k", "self_attn.qkv_proj", "attn_qkv", nk, qkv, nq),
        part("v", "self_attn.qkv_proj", "attn_qkv", nk, qkv, nq + nk),
        Rule(TO + "o", HF + "self_attn.o_proj.weight", GGUF + "attn_output.weight", (d, nq)),
        part("gate", "mlp.gate_up_proj", "ffn_up", f, both, 0),
        part("up", "mlp.gate_up_proj", "ffn_up", f, both, f),
        Rule(TO + "down", HF + "mlp.down_proj.weight", GGUF + "ffn_down.weight", (d, f)),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    sizes = sizes_from_hf(keys)
    kind: LayerKind = "sliding" if keys.has("sliding_window") else "full"
    config = ModelConfig(
        family="phi3",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=(kind,) * sizes["num_layers"],
        rope={kind: one_rope_from_hf(keys, sizes["head_dim"], partial=1.0)},
        window=keys.size("sliding_window") if kind == "sliding" else None,
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied. A window of 0
    is none."""
    keys = Keys(metadata, "The GGUF file", "phi3.")
    sizes = sizes_from_gguf(keys, tensors)
    window = keys.count("attention.sliding_window", MAX_POSITIONS)
    kind: LayerKind = "sliding" if window else "full"
    config = ModelConfig(
        family="phi3",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=(kind,) * sizes["num_layers"],
        rope={kind: one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        window=window or None,
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="phi3",
        models="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        hf_architectures=("Phi3ForCausalLM",),
        gguf_architectures=("phi3",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=llama.build,
    ),
)
