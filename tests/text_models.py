"""Tiny embedding models and rerankers as folders, as transformers and sentence-transformers write them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing

PROSE = Path(__file__).parent / "data" / "prose.txt"
TEXTS = [
    "hello world",
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "Naïve café, jalapeño — Ünïcödé!",
    "日本語のテキストは空白で区切られない。",
    "Привет, как дела?",
    "مرحبا بالعالم",
    "나는 학생입니다",
    "def f(x):\n\treturn x ** 2  # code",
    "🙂🙃 emoji 👩‍👩‍👧‍👦 family",
    "A" * 120,
    "[CLS] and [SEP], <s> and </s>, <|im_end|>",
    "\x00\x01 control \u200b zero width \ufffd",
    "x",
    "lone \ud800 surrogate",
    *(" ".join(["the metal that does not grow"] * n) for n in (2, 7, 40, 300)),
]
"""Of many kinds, of which the last are long."""


@cache
def _trained(kind: str) -> str:
    """A tokenizer of 300 tokens, as tokenizer.json."""
    special = {
        "wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        "unigram": ["<s>", "<pad>", "</s>", "<unk>"],
        "bytes": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    }[kind]
    kinds: dict[str, Any] = {"vocab_size": 400, "show_progress": False, "special_tokens": special}
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(**kinds)
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **kinds)
        single, pair = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
    else:
        backend = Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        kinds["initial_alphabet"] = pre.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(**kinds)
        single, pair = "$A <|endoftext|>", "$A $B <|endoftext|>"
    backend.train([str(PROSE)], trainer)
    if kind == "bytes":
        words = [
            AddedToken(word, normalized=False, single_word=True)
            for word in ("yes", "no", "<think>")
        ]
        backend.add_tokens(words)
    backend.post_processor = TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, backend.token_to_id(token)) for token in special],
    )
    return backend.to_str()


def save_tokenizer(folder: Path, kind: str, max_length: int = 64) -> int:
    """tokenizer.json and tokenizer_config.json; returns the number of tokens."""
    names = {
        "wordpiece": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "unigram": {"pad_token": "<pad>", "unk_token": "<unk>"},
        "bytes": {"pad_token": "<|endoftext|>"},
    }[kind]
    types = ["token_type_ids"] if kind == "wordpiece" else []
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind)),
        model_max_length=max_length,
        model_input_names=["input_ids", *types, "attention_mask"],
        **names,
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


_MODELS = {
    "bert": ("BertConfig", "wordpiece"),
    "nomic": ("NomicBertConfig", "wordpiece"),
    "xlm-roberta": ("XLMRobertaConfig", "unigram"),
    "qwen3": ("Qwen3Config", "bytes"),
}


def save_model(folder: Path, kind: str, architecture: str, **settings: Any) -> Any:
    """Model and tokenizer; returns the model. Without a head a decoder is saved bare, as embedding
    models are."""
    config_class, tokenizer = _MODELS[kind]
    sizes = {
        "vocab_size": save_tokenizer(folder, tokenizer),
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 130,
    }
    if kind == "qwen3":
        sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 400}
    if kind == "xlm-roberta":
        sizes |= {"pad_token_id": 1, "type_vocab_size": 1}
    torch.manual_seed(5)
    config = getattr(transformers, config_class)(**sizes | settings)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.dim() > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.1
            )
    model.save_pretrained(folder)
    if kind == "qwen3":  # which is how Qwen3-Embedding names itself
        change(folder / "config.json", architectures=["Qwen3ForCausalLM"])
    return model.eval()


def save_recipe(
    folder: Path, pooling: dict[str, Any], *more: str, dims: int = 48, **config: Any
) -> None:
    """The files of sentence-transformers: modules.json with Pooling and `more` (Dense, Normalize)."""
    names = ["Transformer", "Pooling", *more]
    write(
        folder / "modules.json",
        [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{name}" if i else "",
                "type": f"sentence_transformers.models.{name}",
            }
            for i, name in enumerate(names)
        ],
    )
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dims} | pooling)
    write(folder / "config_sentence_transformers.json", config)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 50, "do_lower_case": False})
    for i, name in enumerate(names):
        (folder / f"{i}_{name}").mkdir(exist_ok=True) if i else None
        if name == "Dense":
            kinds = {"in_features": dims, "out_features": 20, "bias": True}
            function = "torch.nn.modules.activation.Tanh"
            write(folder / f"{i}_{name}" / "config.json", kinds | {"activation_function": function})
            rng = np.random.default_rng(1)
            save_file(
                {
                    "linear.weight": rng.normal(0, 0.2, (20, dims)).astype(np.float32),
                    "linear.bias": rng.normal(0, 0.2, 20).astype(np.float32),
                },
                folder / f"{i}_{name}" / "model.safetensors",
            )


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def change(path: Path, **values: Any) -> None:
    write(path, json.loads(path.read_text()) | values)


def reference_vectors(
    folder: Path, model: Any, texts: list[str], modes: list[str], max_length: int
) -> Any:
    """By transformers and the formulas of pooling, a text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        text = text.encode("utf-8", "replace").decode()
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0].numpy()
        n = np.arange(1, len(hidden) + 1, dtype=np.float64)[:, None]
        pooled = {
            "cls": hidden[0],
            "max": hidden.max(0),
            "mean": hidden.mean(0),
            "mean_sqrt_len_tokens": hidden.sum(0) / np.sqrt(len(hidden)),
            "weightedmean": (hidden * n).sum(0) / n.sum(),
            "lasttoken": hidden[-1],
        }
        vectors.append(np.concatenate([pooled[mode] for mode in modes]))
    return np.stack(vectors)
