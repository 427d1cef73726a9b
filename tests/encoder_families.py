"""Encoders: BERT and RoBERTa, in miniature. They generate nothing: their tables are not among families."""

from __future__ import annotations

from dataclasses import replace

from elinvar.base.config import EncoderConfig, ModelConfig, RopeConfig
from families.base import LLAMA, Case

BERT = replace(
    LLAMA,
    family="bert",
    num_kv_heads=4,
    rope={"full": RopeConfig(1.0, 0)},
    activation="gelu",
    norm_eps=1e-12,
    encoder=EncoderConfig(num_types=2, num_labels=1),
)

ENGINES: tuple[ModelConfig, ...] = (
    BERT,
    replace(BERT, family="roberta", encoder=EncoderConfig(first_position=2, num_labels=3)),
    replace(
        BERT,
        family="nomic_bert",
        rope={"full": RopeConfig(1000.0, 16)},
        activation="silu",
        encoder=EncoderConfig(num_types=2),
    ),
)

_XLM = {"max_position_embeddings": 258, "type_vocab_size": 1, "pad_token_id": 1}
_ODD = {"hidden_act": "gelu_new", "type_vocab_size": 3, "num_labels": 3}

CASES = {
    "bert": Case("bert", "BertModel", "BertConfig"),
    "bert-odd": Case("bert", "BertModel", "BertConfig", _ODD),
    "bert-masked": Case("bert", "BertForMaskedLM", "BertConfig"),
    "bert-scores": Case("bert", "BertForSequenceClassification", "BertConfig", {"num_labels": 1}),
    "bert-labels": Case("bert", "BertForSequenceClassification", "BertConfig", _ODD),
    "roberta": Case("roberta", "RobertaModel", "RobertaConfig", _XLM),
    "roberta-masked": Case("roberta", "RobertaForMaskedLM", "RobertaConfig", _XLM),
    "roberta-two-labels": Case(
        "roberta", "RobertaForSequenceClassification", "RobertaConfig", _XLM
    ),
    "xlm-roberta": Case("roberta", "XLMRobertaModel", "XLMRobertaConfig", _XLM),
    "xlm-roberta-masked": Case("roberta", "XLMRobertaForMaskedLM", "XLMRobertaConfig", _XLM),
    "xlm-roberta-scores": Case(
        "roberta",
        "XLMRobertaForSequenceClassification",
        "XLMRobertaConfig",
        _XLM | {"num_labels": 1},
    ),
    "nomic-bert": Case("nomic_bert", "NomicBertModel", "NomicBertConfig"),
    "nomic-bert-base": Case(
        "nomic_bert",
        "NomicBertModel",
        "NomicBertConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "type_vocab_size": 1},
    ),
}
