"""DeepSeek V2 and V3, R1 too (DeepSeek-AI, 2024): latent attention, and after the first layers
mixtures of experts with shared ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import LatentConfig, ModelConfig, MoEConfig
from elinvar.models.deepseek_gguf import config_from_gguf
from elinvar.models.experts import MAX_EXPERTS, dense_rules, expert_rules, feeds
from elinvar.models.family import Family
from elinvar.models.keys import MAX_LAYERS, Keys, checked
from elinvar.models.llama import NORMS
from elinvar.models.mtp import NEXTN, decoder
from elinvar.models.shared import (
    FULL,
    GGUF,
    HF,
    TO,
    by_layer,
    mlp_rules,
    norm_rules,
    one_rope_from_hf,
    outer_rules,
)
from elinvar.nn.decoder import Block, Decoder
from elinvar.nn.mla import LatentAttention, LatentWeights
from elinvar.nn.norm import RMSNorm
from elinvar.nn.rope import MAX_POSITIONS, yarn_mscale
from elinvar.ops.api import Ops
from elinvar.ops.layout import PANEL
from elinvar.weights.fixes import Fix, TransposeHeads, UnpermuteRows
from elinvar.weights.rules import Part, Rule


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    def norm(gain: Any) -> RMSNorm:
        return RMSNorm(gain, config.norm_eps, ops)

    def block(w: dict[str, Any]) -> Block:
        latent = LatentWeights(**{name: w[name] for name in ATTENTION if name in w})
        attention = LatentAttention(config, latent, ops)
        return Block(norm(w["attn_norm"]), attention, norm(w["mlp_norm"]), feeds(config, w, ops))

    blocks = [block(w) for w in by_layer(weights, config.num_layers)]
    return decoder(config, weights, ops, blocks, norm, block)


ATTENTION = ("kv_a", "kv_norm", "k_b", "v_b", "o", "q", "q_a", "q_norm")


def rules(config: ModelConfig) -> list[Rule]:
    mlps = mlp_rules(config)
    if config.moe is not None:
        mlps = [*dense_rules(config), *expert_rules(config, shared="shared_experts")]
    outer = outer_rules(config)
    return [*norm_rules(NORMS, config.dim), *latent_rules(config), *mlps, *outer]


def latent_rules(config: ModelConfig) -> list[Rule]:
    """What is rotated lies in interleaved pairs. kv_b_proj holds W_uk and W_uv of each head."""
    assert config.latent is not None
    c, d, h, attn = config.latent, config.dim, config.num_heads, HF + "self_attn."
    nope, value, rank = c.nope_dim, c.value_dim, c.rank
    both = h * (nope + value), rank
    of_k = Part(both, 0, nope, nope + value)
    of_v = Part(both, nope, value, nope + value)
    q_fix, k_fix = (UnpermuteRows(n, c.rope_dim, last=True) for n in (h, 1))
    turn = TransposeHeads(h)

    def rule(name: str, hf: str, gguf: str, shape: tuple[int, ...], fix: Fix | None = None) -> Rule:
        stored = f"{attn}{hf}.weight", f"{GGUF}{gguf}.weight"
        return Rule(TO + name, *stored, shape, hf_fix=fix, gguf_fix=fix)

    k_b = rule("k_b", "kv_b_proj", "attn_kv_b", (h * rank, nope), turn)
    v_b = rule("v_b", "kv_b_proj", "attn_kv_b", (h * value, rank))
    table = [
        rule("kv_a", "kv_a_proj_with_mqa", "attn_kv_a_mqa", (rank + c.rope_dim, d), k_fix),
        rule("kv_norm", "kv_a_layernorm", "attn_kv_a_norm", (rank,)),
        replace(k_b, hf_part=of_k, gguf_part=of_k),
        replace(v_b, hf_part=of_v, gguf_part=of_v),
        # Newer GGUF files hold the two apart, W_uk turned.
        Rule(k_b.name, None, f"{GGUF}attn_k_b.weight", k_b.shape, gguf_part=Part((h, rank, nope))),
        Rule(v_b.name, None, f"{GGUF}attn_v_b.weight", v_b.shape, gguf_part=Part((h, value, rank))),
        rule("o", "o_proj", "attn_output", (d, h * value)),
    ]
    q_rows = h * (nope + c.rope_dim)
    if c.q_rank is None:
        return [*table, rule("q", "q_proj", "attn_q", (q_rows, d), q_fix)]
    return [
        *table,
        rule("q_a", "q_a_proj", "attn_q_a", (c.q_rank, d)),
        rule("q_norm", "q_a_layernorm", "attn_q_a_norm", (c.q_rank,)),
        rule("q", "q_b_proj", "attn_q_b", (q_rows, c.q_rank), q_fix),
    ]


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("rope_interleave", True)
    num_layers = keys.size("num_hidden_layers", largest=MAX_LAYERS)
    latent = LatentConfig(
        rank=whole_panels(keys, "kv_lora_rank"),
        nope_dim=keys.size("qk_nope_head_dim"),
        rope_dim=keys.size("qk_rope_head_dim"),
        value_dim=whole_panels(keys, "v_head_dim"),
        q_rank=keys.size("q_lora_rank") if keys.has("q_lora_rank") else None,
    )
    config = ModelConfig(
        family="deepseek",
        vocab_size=keys.size("vocab_size"),
        dim=keys.size("hidden_size"),
        num_layers=num_layers,
        num_heads=keys.size("num_attention_heads"),
        num_kv_heads=1,
        head_dim=latent.rank + latent.rope_dim,
        ff_dim=keys.size("intermediate_size"),
        max_context=min(keys.size("max_position_embeddings"), MAX_POSITIONS),
        norm_eps=keys.number("rms_norm_eps"),
        layer_kinds=FULL * num_layers,
        rope={"full": one_rope_from_hf(keys, latent.rope_dim)},
        attn_scale=_scale(keys, latent),
        tied_head=keys.flag("tie_word_embeddings", False),
        moe=moe_from_hf(keys, num_layers),
        latent=latent,
        mtp_layers=keys.count("num_nextn_predict_layers"),
    )
    return checked(config, "config.json")


def whole_panels(keys: Keys, key: str) -> int:
    """Outputs of a head's own matrix: ops.head_linear takes heads that fill whole panels."""
    size = keys.size(key)
    if size % PANEL:
        raise keys.bad(key, f"a multiple of {PANEL}")
    return size


def _scale(keys: Keys, latent: LatentConfig) -> float:
    """YaRN (Peng et al., 2023) as DeepSeek has it sharpens all dims of a score, not the rotated
    ones alone."""
    scale = (latent.nope_dim + latent.rope_dim) ** -0.5
    scaling = keys.part("rope_parameters" if keys.has("rope_parameters") else "rope_scaling")
    factor = scaling.number("factor", 1.0, smallest=1)
    mscale = yarn_mscale(factor, scaling.number("mscale_all_dim", 0.0, smallest=0))
    return scale * mscale * mscale


def moe_from_hf(keys: Keys, num_layers: int, default: str | None = None) -> MoEConfig | None:
    """V3 scores by sigmoid and chooses with a bias, V2 by softmax; both may choose groups first.
    default: the method where the file gives none; otherwise its model type tells."""
    first = keys.count("first_k_dense_replace")
    step = keys.size("moe_layer_freq", 1)
    layers = tuple(i for i in range(first, num_layers) if i % step == 0)
    if not layers:
        return None
    keys.only("topk_method", "greedy", "group_limited_greedy", "noaux_tc")
    v3_types = "deepseek_v3", "deepseek_v32", "glm_moe_dsa"
    of_type = "noaux_tc" if keys.raw("model_type") in v3_types else "greedy"
    method = keys.raw("topk_method") or default or of_type
    v3 = method == "noaux_tc"
    keys.only("scoring_func", "sigmoid" if v3 else "softmax")
    if not v3:
        keys.only("norm_topk_prob", False)
    num_experts = keys.size("n_routed_experts", largest=MAX_EXPERTS)
    num_groups = 1 if method == "greedy" else keys.size("n_group", 1)
    if num_experts % num_groups:
        raise keys.bad("n_group", f"a divisor of {num_experts} experts")
    top_groups = 1 if method == "greedy" else keys.size("topk_group", num_groups, num_groups)
    ff_dim = keys.size("moe_intermediate_size")
    shared = keys.count("n_shared_experts", largest=MAX_EXPERTS)
    return MoEConfig(
        num_experts,
        top_k=keys.size("num_experts_per_tok", largest=num_experts // num_groups * top_groups),
        ff_dim=ff_dim,
        layers=layers,
        scoring="sigmoid" if v3 else "softmax",
        renormalise=keys.flag("norm_topk_prob", v3),
        scaling=keys.number("routed_scaling_factor", 1.0),
        biased=v3,
        num_groups=num_groups,
        top_groups=top_groups,
        shared_ff_dim=shared * ff_dim,
    )


FAMILIES = (
    Family(
        name="deepseek",
        models="DeepSeek V2, V2 Lite, V3, V3.1, R1",
        hf_architectures=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        gguf_architectures=("deepseek2",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
        mtp=NEXTN,
    ),
)
