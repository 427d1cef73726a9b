"""BERT (Devlin et al., 2018) and RoBERTa (Liu et al., 2019), with the embedding models and rerankers made
of them: encoders with learned positions, norms behind each part, and an exact GELU.

RoBERTa's table of positions begins behind the row of its padding token, and it has one type of token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elinvar.base.config import EncoderConfig, ModelConfig
from elinvar.base.errors import ModelError
from elinvar.models.family import Family
from elinvar.models.keys import Keys, checked
from elinvar.models.shared import (
    FULL,
    GGUF,
    NO_ROPE,
    TO,
    activation_from_hf,
    by_layer,
    qkv_bias,
    sizes_from_gguf,
    sizes_from_hf,
    with_bias,
)
from elinvar.nn.attention import Attention
from elinvar.nn.encoder import Encoder, EncoderLayer
from elinvar.nn.mlp import MLP
from elinvar.nn.norm import LayerNorm
from elinvar.ops.api import Ops
from elinvar.weights.rules import Rule
from elinvar.weights.tensor import HostTensor

_HEADS = {"bert": ("bert.pooler.dense", "classifier")}
_HEADS["roberta"] = "classifier.dense", "classifier.out_proj"
"""Of classifiers: the layer with a tanh, and the last one."""
_CLASSIFIER = "ForSequenceClassification"


def build(config: ModelConfig, weights: Mapping[str, Any], ops: Ops) -> Encoder:
    def norm(w: Mapping[str, Any], name: str) -> LayerNorm:
        return LayerNorm(w[name], w.get(f"{name}_bias"), config.norm_eps, ops)

    def layer(i: int, w: dict[str, Any]) -> EncoderLayer:
        qkv = (w["q"], w["k"], w["v"])
        attention = Attention(
            config, i, qkv, w["o"], ops, qkv_bias=qkv_bias(w), out_bias=w.get("o_bias")
        )
        biases = w.get("up_bias"), w.get("down_bias")
        mlp = MLP(w["up"], w["down"], config.activation, ops, *biases)
        return EncoderLayer(attention, norm(w, "attn_norm"), mlp, norm(w, "mlp_norm"))

    layers = [layer(*one) for one in enumerate(by_layer(weights, config.num_layers))]
    return Encoder(config, weights, ops, layers, norm(weights, "embed_norm"))


def rules(config: ModelConfig) -> list[Rule]:
    assert config.encoder is not None
    d, f, encoder = config.dim, config.ff_dim, config.encoder
    hf, attention = f"{config.family}.encoder.layer.{{i}}.", "attention.self."
    embeddings = f"{config.family}.embeddings."
    rows = config.max_context + encoder.first_position
    table = [
        *(
            rule
            for name, (at, gguf, shape) in {
                "q": (attention + "query", "attn_q", (d, d)),
                "k": (attention + "key", "attn_k", (d, d)),
                "v": (attention + "value", "attn_v", (d, d)),
                "o": ("attention.output.dense", "attn_output", (d, d)),
                "attn_norm": ("attention.output.LayerNorm", "attn_output_norm", (d,)),
                "up": ("intermediate.dense", "ffn_up", (f, d)),
                "down": ("output.dense", "ffn_down", (d, f)),
                "mlp_norm": ("output.LayerNorm", "layer_output_norm", (d,)),
            }.items()
            for rule in with_bias(TO + name, hf + at, GGUF + gguf, shape)
        ),
        Rule(
            "embed",
            f"{embeddings}word_embeddings.weight",
            "token_embd.weight",
            (config.vocab_size, d),
        ),
        Rule(
            "types",
            f"{embeddings}token_type_embeddings.weight",
            "token_types.weight",
            (encoder.num_types, d),
        ),
        Rule(
            "positions",
            f"{embeddings}position_embeddings.weight",
            "position_embd.weight",
            (rows, d),
        ),
        *with_bias("embed_norm", f"{embeddings}LayerNorm", "token_embd_norm", (d,)),
    ]
    if encoder.num_labels:
        first, last = _HEADS[config.family]
        table += with_bias("pooler", first, "cls", (d, d))
        table += with_bias("labels", last, "cls.output", (encoder.num_labels, d))
    return table


def config_from_hf(metadata: Mapping[str, Any]) -> ModelConfig:
    """From config.json. Raises ModelError naming the key that is missing, wrong or unsupported."""
    keys = Keys(metadata, "config.json")
    keys.only("position_embedding_type", "absolute")
    keys.only("is_decoder", False)
    keys.only("add_cross_attention", False)
    architecture: str = metadata["architectures"][0]
    roberta = not architecture.startswith("Bert")
    first = keys.size("pad_token_id", 1) + 1 if roberta else 0
    sizes = sizes_from_hf(keys)
    if sizes["max_context"] <= first:
        raise keys.bad("max_position_embeddings", f"above {first}")
    sizes["max_context"] -= first
    config = ModelConfig(
        family="roberta" if roberta else "bert",
        norm_eps=keys.number("layer_norm_eps"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": NO_ROPE},
        activation=activation_from_hf(keys, "hidden_act", "gelu"),
        encoder=EncoderConfig(
            num_types=keys.size("type_vocab_size", 2),
            first_position=first,
            num_labels=num_labels(keys) if architecture.endswith(_CLASSIFIER) else 0,
        ),
        **sizes,
    )
    return checked(config, "config.json")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, HostTensor]) -> ModelConfig:
    """From a GGUF file's keys and its tensors. llama.cpp's converter cuts what is before the first
    position off the table, so that RoBERTa is BERT there."""
    keys = Keys(metadata, "The GGUF file", "bert.")
    keys.only("attention.causal", False)
    sizes = sizes_from_gguf(keys, tensors)
    types, labels = (tensors.get(f"{name}.weight") for name in ("token_types", "cls.output"))
    if ("cls.weight" in tensors) != (labels is not None):
        raise ModelError("The GGUF file holds half of a head that scores; convert the model again.")
    config = ModelConfig(
        family="bert",
        norm_eps=keys.number("attention.layer_norm_epsilon"),
        layer_kinds=FULL * sizes["num_layers"],
        rope={"full": NO_ROPE},
        activation="gelu",
        encoder=EncoderConfig(
            num_types=1 if types is None else len(types.data),
            num_labels=0 if labels is None else len(labels.data),
        ),
        **sizes,
    )
    return checked(config, "The GGUF file")


def num_labels(keys: Keys) -> int:
    """A file names its labels unless they are two."""
    labels = keys.raw("id2label")
    if labels is not None and not (isinstance(labels, Mapping) and labels):
        raise keys.bad("id2label", "an object with a name for each label")
    return 2 if labels is None else len(labels)


_CLASSES = ("Model", "ForMaskedLM", "ForSequenceClassification")

ENCODERS = (
    Family(
        name="bert",
        models="BERT; all-MiniLM, BGE, E5, GTE, mxbai; ms-marco cross-encoders",
        hf_architectures=tuple(f"Bert{c}" for c in _CLASSES),
        gguf_architectures=("bert",),
        config_from_hf=config_from_hf,
        config_from_gguf=config_from_gguf,
        rules=rules,
        build=build,
        tested="random weights against transformers, and all-MiniLM-L6-v2 itself",
    ),
    Family(
        name="roberta",
        models="RoBERTa, XLM-RoBERTa; BGE-M3 (dense), multilingual E5, BGE reranker",
        hf_architectures=tuple(f"{c}{k}" for c in ("Roberta", "XLMRoberta") for k in _CLASSES),
        gguf_architectures=(),
        config_from_hf=config_from_hf,
        config_from_gguf=None,
        rules=rules,
        build=build,
    ),
)
