"""Phi 1, 1.5 and 2 (Microsoft, 2023): one layer norm before attention and MLP, which lie side by side;
rotary positions on a part of each head, biases everywhere, on the head too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models import gpt_neox
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    GGUF,
    HF,
    TO,
    activation_from_hf,
    one_rope_from_gguf,
    one_rope_from_hf,
    sizes_from_gguf,
    sizes_from_hf,
    with_bias,
)
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor


def rules(config: ModelConfig) -> list[Rule]:
    d, f, v = config.dim, config.ff_dim, config.vocab_size
    n = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    attn = HF + "self_attn."
    table = [
        *with_bias(TO + "attn_norm", HF + "input_layernorm", GGUF + "attn_norm", (d,)),
        *(
            rule
            for q, heads in n.items()
            for rule in with_bias(
                TO + q, f"{attn}{q}_proj", f"{GGUF}attn_{q}", (heads * config.head_dim, d)
            )
        ),
        *with_bias(TO + "o", attn + "dense", GGUF + "attn_output", (d, n["q"] * config.head_dim)),
        *with_bias(TO + "up", HF + "mlp.fc1", GGUF + "ffn_up", (f, d)),
        *with_bias(TO + "down", HF + "mlp.fc2", GGUF + "ffn_down", (d, f)),
        *with_bias("norm", "model.final_layernorm", "output_norm", (d,)),
        Rule("embed", "model.embed_tokens.weight", "token_embd.weight", (v, d)),
        Rule("head_bias", "lm_head.bias", "output.bias", (v,)),
    ]
    if not config.tied_head:
        table.append(Rule("head", "lm_head.weight", "output.weight", (v, d)))
    return table


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("qk_layernorm", False)
    sizes = sizes_from_hf(keys)
    config = ModelConfig(
        family="phi",
        norm_eps=keys.number("layer_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_hf(keys, sizes["head_dim"], partial=0.5)},
        activation=activation_from_hf(keys, "hidden_act", "gelu_new"),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors."""
    keys = Keys(metadata, "The GGUF file", "phi2.")
    sizes = sizes_from_gguf(keys, tensors)
    config = ModelConfig(
        family="phi",
        norm_eps=keys.number("attention.layer_norm_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": one_rope_from_gguf(keys, tensors, sizes["head_dim"])},
        activation="gelu_tanh",
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="phi",
        models="Phi-1, Phi-1.5, Phi-2",
        hf_architectures=("PhiForCausalLM",),
        gguf_architectures=("phi2",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=gpt_neox.build,
    ),
)
