"""GPT-2 (Radford et al., 2019): learned positions, layer norms, q, k and v in one matrix that is stored
as (in, out), an MLP without a gate, a tied head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import ModelConfig
from elinvar.models import gpt_neox
from elinvar.models.family import Family
from elinvar.models.keys import MAX_LAYERS, Keys, checked, head_dim_of
from elinvar.models.shared import (
    FULL,
    GGUF,
    NO_ROPE,
    TO,
    activation_from_hf,
    sizes_from_gguf,
    with_bias,
)
from elinvar.nn.decoder import Decoder, Layer
from elinvar.nn.norm import Norm
from elinvar.nn.rope import MAX_POSITIONS
from elinvar.ops.api import F32, Ops
from elinvar.weights.rules import Part, Rule
from elinvar.weights.tensor import HostTensor


class GPT2(Decoder):
    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        ops: Ops,
        layers: Sequence[Layer],
        norm: Norm,
    ) -> None:
        super().__init__(config, weights, ops, layers, norm)
        self.positions = weights["positions"]

    def embedded(self, batch: ForwardBatch) -> F32:
        position_TD = self.ops.embed(batch.positions, self.positions, 1.0)
        return self.ops.add(super().embedded(batch), position_TD)


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Decoder:
    return gpt_neox.build(config, weights, ops, GPT2)


def rules(config: ModelConfig) -> list[Rule]:
    d, f, v = config.dim, config.ff_dim, config.vocab_size
    hf = "transformer.h.{i}."
    c_attn, attn_qkv = hf + "attn.c_attn", GGUF + "attn_qkv"
    parts = [Part((3 * d,), at * d) for at in range(3)]
    table = [
        *with_bias(TO + "attn_norm", hf + "ln_1", GGUF + "attn_norm", (d,)),
        *(
            rule
            for name, part in zip("qkv", parts, strict=True)
            for rule in with_bias(TO + name, c_attn, attn_qkv, (d, d), True, part, part)
        ),
        *with_bias(TO + "o", hf + "attn.c_proj", GGUF + "attn_output", (d, d), True),
        *with_bias(TO + "mlp_norm", hf + "ln_2", GGUF + "ffn_norm", (d,)),
        *with_bias(TO + "up", hf + "mlp.c_fc", GGUF + "ffn_up", (f, d), True),
        *with_bias(TO + "down", hf + "mlp.c_proj", GGUF + "ffn_down", (d, f), True),
        *with_bias("norm", "transformer.ln_f", "output_norm", (d,)),
        Rule("embed", "transformer.wte.weight", "token_embd.weight", (v, d)),
        Rule(
            "positions", "transformer.wpe.weight", "position_embd.weight", (config.max_context, d)
        ),
    ]
    if not config.tied_head:
        table.append(Rule("head", "lm_head.weight", "output.weight", (v, d)))
    return table


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("scale_attn_weights", True)
    keys.only("scale_attn_by_inverse_layer_idx", False)
    keys.only("add_cross_attention", False)
    dim, heads, num_layers = (
        keys.size("n_embd"),
        keys.size("n_head"),
        keys.size("n_layer", largest=MAX_LAYERS),
    )
    head_dim = head_dim_of(keys, "head_dim", dim, heads)
    config = ModelConfig(
        family="gpt2",
        vocab_size=keys.size("vocab_size"),
        dim=dim,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        ff_dim=keys.size("n_inner", 4 * dim),
        max_context=keys.size("n_positions", largest=MAX_POSITIONS),
        norm_eps=keys.number("layer_norm_epsilon"),
        layer_kinds=FULL * num_layers,
        rope={"full": NO_ROPE},
        attn_scale=head_dim**-0.5,
        activation=activation_from_hf(keys, "activation_function", "gelu_new"),
        tied_head=keys.flag("tie_word_embeddings", True),
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors; without output.weight the head is tied."""
    keys = Keys(metadata, "The GGUF file", "gpt2.")
    sizes = sizes_from_gguf(keys, tensors)
    config = ModelConfig(
        family="gpt2",
        norm_eps=keys.number("attention.layer_norm_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": NO_ROPE},
        activation="gelu_tanh",
        **sizes,
    )
    return checked(config, "The GGUF file")


FAMILIES = (
    Family(
        name="gpt2",
        models="GPT-2, DistilGPT2",
        hf_architectures=("GPT2LMHeadModel",),
        gguf_architectures=("gpt2",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
    ),
)
