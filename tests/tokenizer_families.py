"""Tokenizers as the families publish them, with vocabularies trained here on hard text.

The kind is the family's own: its normaliser, expressions, decoder, control tokens and settings. Only
the words are ours, since no published vocabulary can be had where the tests run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from hard_text import hard_texts

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = (
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]


def _byte_level(expressions: Sequence[str], **model: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(**model))
    steps = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, level])
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _trained(backend: Tokenizer, **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, **options)
    # No published vocabulary joins pieces to what is the name of a byte.
    texts = [text for text in hard_texts(1500, seed=1) if "<0x" not in text]
    backend.train_from_iterator(texts, trainer)
    return backend


def _special(backend: Tokenizer, *tokens: str) -> None:
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])


def _before(backend: Tokenizer, *tokens: str) -> None:
    """The post-processor puts `tokens` before a text."""
    pairs = [(token, backend.token_to_id(token)) for token in tokens]
    backend.post_processor = processors.TemplateProcessing(
        single=[*(f"{t}:0" for t in tokens), "$A:0"], special_tokens=pairs
    )


Family = tuple[Tokenizer, dict[str, Any]]
"""tokenizer.json and tokenizer_config.json."""


def llama3() -> Family:
    backend = _byte_level([LLAMA3], ignore_merges=True)
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
    _special(backend, *names, "<|eot_id|>")
    _before(backend, "<|begin_of_text|>")
    return backend, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
    }


def qwen3() -> Family:
    backend = _byte_level([QWEN2])
    backend.normalizer = normalizers.NFC()
    _special(backend, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    plain = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    return backend, {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }


def deepseek3() -> Family:
    backend = _byte_level(DEEPSEEK3)
    _special(backend, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    backend.add_tokens([AddedToken("<｜User｜>", normalized=False), "<think>"])
    return backend, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # With a tokenizer.json its post-processor decides on BOS, and this has none.
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"},
        "eos_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>"},
    }


def gpt_oss() -> Family:
    backend = _byte_level([O200K])
    names = (
        "<|startoftext|>",
        "<|endoftext|>",
        "<|return|>",
        "<|channel|>",
        "<|start|>",
        "<|end|>",
    )
    _special(backend, *names, "<|message|>", "<|call|>")
    return backend, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
    }


def glm4() -> Family:
    backend = _byte_level([LLAMA3])
    _special(backend, "<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>")
    _before(backend, "[gMASK]", "<sop>")
    return backend, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}


def gpt2() -> Family:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _trained(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    _special(backend, "<|endoftext|>")
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return backend, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **names}


def starcoder2() -> Family:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    _trained(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    _special(backend, "<|endoftext|>", "<fim_prefix>", "<file_sep>")
    return backend, {"tokenizer_class": "TokenizersBackend", "eos_token": "<|endoftext|>"}


def gpt_neox() -> Family:
    """With runs of spaces as tokens that are not special."""
    backend, settings = gpt2()
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return backend, {**settings, "tokenizer_class": "GPTNeoXTokenizer"}


_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _sentencepiece(normaliser: Any, pre_tokenizer: Any, decoder: Any, *first: str) -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normaliser
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *decoder]
    )
    special = [AddedToken(t, normalized=False, special=True) for t in first]
    # The trainer keeps few characters: the others must come out as bytes.
    _trained(backend, special_tokens=[*special, *_BYTES], limit_alphabet=200)
    described = json.loads(backend.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] not in _BYTES]
    return Tokenizer.from_str(json.dumps(described))


def llama2() -> Family:
    normaliser = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)]
    backend = _sentencepiece(normaliser, None, strip, "<unk>", "<s>", "</s>")
    _before(backend, "<s>")
    return backend, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }


def gemma() -> Family:
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    first = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    backend = _sentencepiece(normalizers.Replace(" ", "▁"), split, [], *first)
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("\n\n", "  ", "<td>")])
    _before(backend, "<bos>")
    return backend, {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }


def xlm_roberta() -> Family:
    """Unigram without bytes: what it does not know is <unk>."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    first = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=first, unk_token="<unk>", show_progress=False
    )
    known = [text for text in hard_texts(1500, seed=1) if max(text, default="") < "\u1000"]
    known = [text for text in known if "<" not in text]
    backend.train_from_iterator(known, trainer)
    _before(backend, "<s>")
    return backend, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True},
    }


def bert() -> Family:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=first, show_progress=False)
    backend.train_from_iterator(hard_texts(1500, seed=1), trainer)
    _before(backend, "[CLS]")
    return backend, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "mask", "pad", "unk")},
    }


FAMILIES: dict[str, Callable[[], Family]] = {
    make.__name__: make
    for make in (
        *(llama3, qwen3, deepseek3, gpt_oss, glm4, gpt2, starcoder2, gpt_neox),
        *(llama2, gemma, xlm_roberta, bert),
    )
}


def write_folder(folder: Path, name: str) -> Path:
    """tokenizer.json and the settings beside it, as the family publishes them."""
    described, settings = _made(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(described)
    (folder / "tokenizer_config.json").write_text(settings)
    return folder


@functools.cache
def _made(name: str) -> tuple[str, str]:
    backend, settings = FAMILIES[name]()
    return str(backend.to_str()), json.dumps(settings)
