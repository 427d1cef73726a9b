"""ChatGLM 2 and 3, and GLM-4 as it was first published (Zeng et al., 2024), all with code of their own
beside the weights: GLM-4's layers under other names, with q, k and v in one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elinvar.base.config import ModelConfig, RopeConfig
from elinvar.models import glm
from elinvar.models.family import Family
from elinvar.models.keys import MAX_LAYERS, Keys, checked
from elinvar.models.shared import FULL, GGUF, TO, one_rope_from_gguf, sizes_from_gguf
from elinvar.nn.rope import MAX_POSITIONS
from elinvar.weights.fixes import UnpermuteRows
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor

HF = "transformer.encoder.layers.{i}."


def rules(config: ModelConfig) -> list[Rule]:
    d, f, v, attn = config.dim, config.ff_dim, config.vocab_size, HF + "self_attention."
    both, mlp = (2 * f, d), HF + "mlp.dense_"
    nq = config.num_heads * config.head_dim
    table: list[tuple[str, str, str, tuple[int, ...], Part | None]] = [
        (TO + "attn_norm", HF + "input_layernorm", GGUF + "attn_norm", (d,), None),
        (TO + "mlp_norm", HF + "post_attention_layernorm", GGUF + "ffn_norm", (d,), None),
        (TO + "o", attn + "dense", GGUF + "attn_output", (d, nq), None),
        (TO + "gate", mlp + "h_to_4h", GGUF + "ffn_up", (f, d), Part(both)),
        (TO + "up", mlp + "h_to_4h", GGUF + "ffn_up", (f, d), Part(both, f)),
        (TO + "down", mlp + "4h_to_h", GGUF + "ffn_down", (d, f), None),
        ("embed", "transformer.embedding.word_embeddings", "token_embd", (v, d), None),
        ("norm", "transformer.encoder.final_layernorm", "output_norm", (d,), None),
        ("head", "transformer.output_layer", "output", (v, d), None),
    ]
    return [
        *_qkv_rules(config, attn + "query_key_value"),
        *(
            Rule(to, f"{hf}.weight", f"{gguf}.weight", shape, hf_part=part, gguf_part=part)
            for to, hf, gguf, shape, part in table
            if to != "head" or not config.tied_head
        ),
    ]


def _qkv_rules(config: ModelConfig, hf: str) -> list[Rule]:
    """GGUF files hold them in one matrix, or those of GLM-4's later form apart."""
    dim, rotary = config.head_dim, config.rope["full"].dim
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    rows, start, table = sum(heads.values()) * dim, 0, []
    for name, num in heads.items():
        fix = UnpermuteRows(num, rotary) if name != "v" else None
        weight, bias = Part((rows, config.dim), start), Part((rows,), start)
        for suffix, kind, part in (("", "weight", weight), ("_bias", "bias", bias)):
            to, apart = f"{TO}{name}{suffix}", f"{GGUF}attn_{name}.{kind}"
            rule = Rule(to, None, apart, (num * dim, *part.of[1:]), fix, fix, kind == "bias")
            stored = replace(rule, hf=f"{hf}.{kind}", gguf=f"{GGUF}attn_qkv.{kind}")
            table += [replace(stored, hf_part=part, gguf_part=part), rule]
        start += num * dim
    return table


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    for key in ("multi_query_attention", "rmsnorm", "post_layer_norm", "original_rope"):
        keys.only(key, True)
    for key in ("add_bias_linear", "apply_residual_connection_post_layernorm"):
        keys.only(key, False)
    keys.only("pre_seq_len")
    keys.only("quantization_bit", 0)
    heads, head_dim = keys.size("num_attention_heads"), keys.size("kv_channels")
    num_layers = keys.size("num_layers", largest=MAX_LAYERS)
    base = 10_000.0 * keys.number("rope_ratio", 1.0)
    config = ModelConfig(
        family="chatglm",
        vocab_size=keys.size("padded_vocab_size"),
        dim=keys.size("hidden_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=keys.size("multi_query_group_num", heads),
        head_dim=head_dim,
        ff_dim=keys.size("ffn_hidden_size"),
        max_context=min(keys.size("seq_length"), MAX_POSITIONS),
        norm_eps=keys.number("layernorm_epsilon"),
        layer_kinds=FULL * num_layers,
        rope={"full": RopeConfig(base, head_dim // 2)},
        attn_scale=head_dim**-0.5,
        tied_head=keys.flag("tie_word_embeddings", False),
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "chatglm.")
    sizes = sizes_from_gguf(keys, tensors)
    config = ModelConfig(
        family="chatglm",
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="chatglm",
        models="ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B (glm-4-9b-chat)",
        hf_architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        gguf_architectures=("chatglm",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=glm.build,
    ),
)
