"""GLM-4 (Zeng et al., 2024) and GLM-4-0414: biases on q, k and v, rotary pairs (2i, 2i + 1) on half of
each head, gate and up in one matrix; the later one has norms behind attention and MLP, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.shared import (
    FULL,
    GGUF,
    HF,
    TO,
    bias_rules,
    by_layer,
    norm_rules,
    one_rope_from_gguf,
    one_rope_from_hf,
    outer_rules,
    qkv_bias,
    sizes_from_gguf,
    sizes_from_hf,
)
from elinvar.nn.attention import Attention
from elinvar.nn.decoder import Block, Decoder
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.norm import RMSNorm
from elinvar.ops.api import Ops
from elinvar.weights.fixes import UnpermuteRows
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor

POST_NORMS = {
    "attn_post_norm": ("post_self_attn_layernorm", "post_attention_norm"),
    "mlp_post_norm": ("post_mlp_layernorm", "post_ffw_norm"),
}


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(i: int, w: dict[str, Any]) -> Block:
        qkv = (w["q"], w["k"], w["v"])
        posts = [norm(w[name]) if name in w else None for name in POST_NORMS]
        return Block(
            norm(w["attn_norm"]),
            Attention(config, i, qkv, w["o"], ops, qkv_bias=qkv_bias(w)),
            norm(w["mlp_norm"]),
            GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops),
            *posts,
        )

    blocks = [block(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return Decoder(config, weights, ops, blocks, norm(weights["norm"]))


def rules(config: ModelConfig) -> list[Rule]:
    d, f, mlp = config.dim, config.ff_dim, HF + "mlp."
    nq, nk = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rotary = config.rope["full"].dim
    fixes = {
        "q": UnpermuteRows(config.num_heads, rotary),
        "k": UnpermuteRows(config.num_kv_heads, rotary),
    }

    def half(name: str, start: int) -> Rule:
        stored, part = (
            (mlp + "gate_up_proj.weight", GGUF + "ffn_up.weight"),
            Part((2 * f, d), start),
        )
        return Rule(TO + name, *stored, (f, d), hf_part=part, gguf_part=part)

    def rule(name: str, hf: str, gguf: str, shape: tuple[int, ...]) -> Rule:
        fix = fixes.get(name)
        stored = f"{HF}{hf}.weight", f"{GGUF}{gguf}.weight"
        return Rule(TO + name, *stored, shape, hf_fix=fix, gguf_fix=fix)

    return [
        *norm_rules(NORMS, d),
        *(norm_rules(POST_NORMS, d) if config.family == "glm4" else []),
        rule("q", "self_attn.q_proj", "attn_q", (nq, d)),
        rule("k", "self_attn.k_proj", "attn_k", (nk, d)),
        rule("v", "self_attn.v_proj", "attn_v", (nk, d)),
        *bias_rules(config, fixes, fixes, optional=True),
        rule("o", "self_attn.o_proj", "attn_output", (d, nq)),
        half("gate", 0),
        half("up", f),
        rule("down", "mlp.down_proj", "ffn_down", (d, f)),
        *outer_rules(config),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    sizes = sizes_from_hf(keys)
    config = ModelConfig(
        family="glm4" if metadata["architectures"][0] == "Glm4ForCausalLM" else "glm",
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"], partial=0.5)},
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "glm4.")
    keys.only("rope.dimension_sections")
    keys.only("nextn_predict_layers", 0)
    sizes = sizes_from_gguf(keys, tensors)
    config = ModelConfig(
        family="glm4",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="glm",
        models="GLM-4-9B (glm-4-9b-chat-hf)",
        hf_architectures=("GlmForCausalLM",),
        gguf_architectures=(),  # chatglm reads them
        config_from_hf=config_from_hf,
        config_from_gguf=None,
        rules=rules,
        build=build,
    ),
    Family(
        name="glm4",
        models="GLM-4-0414, GLM-Z1",
        hf_architectures=("Glm4ForCausalLM",),
        gguf_architectures=("glm4",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
