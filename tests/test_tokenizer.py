"""Encoding equals the reference: transformers for byte-level BPE, SentencePiece's own rule for SPM."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elinvar.base.errors import ModelError
from elinvar.engine.gguf_vocab import build_backend
from elinvar.engine.patterns import PRE_TOKENIZERS
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.engine.vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    merges_from_scores,
)
from elinvar.weights.checkpoint import open_checkpoint
from hard_text import hard_texts

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   three    four",
    "tabs\t\tand\r\nlines\n\n\nand more \n ",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    "I'm you're he'll THEY'VE don't 'quoted'",
    "1234567890 3.14159 1,000,000 ½ ²³ ٣٤ Ⅷ 一二三",
    "naïve café façade Ångström ﬁ Ǆ ǅ",
    "combining e\u0301 a\u0308 and zero\u200bwidth and \ufeffbom",
    "日本語のテキスト、中文字符。한국어 텍스트",
    "Здравствуй, мир! Γειά σου Κόσμε! שלום עולם مرحبا بالعالم",
    "😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 e🇩🇪 🤽",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|><|im_end|> <|endoftext|>x<|im_start",
    "<start_of_turn>user\nHi<end_of_turn>\n<bos> <eos>",
    "a" * 300 + " " * 100 + "\n" * 70 + "=" * 90,
    "\x00\x01\x7f\x80\xa0\xad control",
    "https://example.org/a?b=c&d=%20#e user@example.org $5.00 €7 #tag C++ <html></html>",
    '{"a": [1, 2, {"b": null}], "c": "\\u00e9"}',
]
PIECES = st.sampled_from(
    [
        "the",
        " the",
        "aaa",
        "ab",
        "é",
        "é",
        "😀",
        "日本",
        "'s",
        "12",
        "_",
        "</",
        ">",
        "YYYY",
        "::::",
        "<0x41>",
        "<bos>",
        "<end_of_turn>",
        "<0x0A>",
        " ",
        "  ",
        "▁",
        "\n",
        "\n\n",
        "\t",
    ]
)
MIXED = st.one_of(st.text(), st.lists(PIECES | st.text(max_size=3)).map("".join))
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def tokenizer_of(path: Path, cache: Path | None = None) -> Tokenizer:
    checkpoint = open_checkpoint(path)
    try:
        return load_tokenizer(checkpoint, cache)
    finally:
        checkpoint.close()


# Byte-level BPE: SmolLM2, against transformers' reading of the same file.


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return tokenizer_of(smollm2_gguf)


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers

    reference = transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )
    # transformers reads a GGUF file's merges and does not look at its pre-tokenizer. This is the one
    # in the model's own tokenizer.json.
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return reference


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_equals_transformers(smollm2: Tokenizer, smollm2_reference: Any, text: str) -> None:
    ids = smollm2.encode(text)
    assert ids == smollm2_reference.encode(text)
    assert smollm2.decode(ids, skip_special=False) == text
    assert smollm2.decode(ids) == smollm2_reference.decode(ids, skip_special_tokens=True)


def test_smollm2_equals_transformers_on_hard_texts(
    smollm2: Tokenizer, smollm2_reference: Any
) -> None:
    texts = hard_texts()
    expected = smollm2_reference(texts)["input_ids"]
    assert [smollm2.encode(text) for text in texts] == expected


@given(text=MIXED)
@MANY
def test_smollm2_equals_transformers_on_any_text(
    smollm2: Tokenizer, smollm2_reference: Any, text: str
) -> None:
    ids = smollm2.encode(text)
    assert ids == smollm2_reference.encode(text)
    # Not always the text: this vocabulary has no token for U+0006 and a few more.
    assert smollm2.decode(ids) == smollm2_reference.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(0, 49151), max_size=12))
@MANY
def test_smollm2_decodes_any_ids_as_transformers(
    smollm2: Tokenizer, smollm2_reference: Any, ids: list[int]
) -> None:
    expected = smollm2_reference.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert smollm2.decode(ids, skip_special=False) == expected


def test_smollm2_facts(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_id == 1
    assert smollm2.eos_ids == {0, 2}  # <|endoftext|> and <|im_end|>
    assert smollm2.encode("Hi")[0] != smollm2.bos_id  # add_bos_token is false
    assert smollm2.token_text(2) == "<|im_end|>"
    assert smollm2.decode([2]) == ""
    assert smollm2.token_bytes(10**6) == b"" == smollm2.token_bytes(-1)
    assert smollm2.chat_template is not None


# SentencePiece BPE: against its definition, written down naively.


class NaiveSentencePiece:
    """Greedy merging by score as SentencePiece and llama.cpp define it, quadratic and plain."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        tokens = list(metadata["tokenizer.ggml.tokens"])
        types = [int(t) for t in metadata["tokenizer.ggml.token_type"]]
        scores = [float(s) for s in metadata["tokenizer.ggml.scores"]]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.scores = {
            token: score
            for token, score, kind in zip(tokens, scores, types, strict=True)
            if kind == NORMAL
        }
        whole = [
            token
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]
        self.whole = re.compile(
            "(" + "|".join(re.escape(t) for t in sorted(whole, key=len, reverse=True)) + ")"
        )
        self.prefix = " " if metadata.get("tokenizer.ggml.add_space_prefix", True) else ""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(self.whole.split(text)):
            if i % 2:
                ids.append(self.ids[piece])
            elif piece:
                ids += self.merge((self.prefix + piece).replace(" ", "▁"))
        return ids

    def merge(self, text: str) -> list[int]:
        parts = list(text)
        while True:
            scored = [
                (self.scores[a + b], -i)
                for i, (a, b) in enumerate(itertools.pairwise(parts))
                if a + b in self.scores
            ]
            if not scored:
                break
            at = -max(scored)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [i for part in parts for i in self.ids_of(part)]

    def ids_of(self, part: str) -> list[int]:
        if part in self.scores:
            return [self.ids[part]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in part.encode()]


@pytest.fixture(scope="module")
def gemma(gemma_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    cache = tmp_path_factory.mktemp("cache")
    tokenizer_of(gemma_gguf, cache)
    return tokenizer_of(gemma_gguf, cache)  # the warm start is what users get


@pytest.fixture(scope="module")
def gemma_reference(gemma_gguf: Path) -> NaiveSentencePiece:
    checkpoint = open_checkpoint(gemma_gguf)
    reference = NaiveSentencePiece(checkpoint.metadata)
    checkpoint.close()
    return reference


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Tokenizer:
    return tokenizer_of(tiny_gguf)


@pytest.fixture(scope="module")
def tiny_reference(tiny_gguf: Path) -> NaiveSentencePiece:
    checkpoint = open_checkpoint(tiny_gguf)
    reference = NaiveSentencePiece(checkpoint.metadata)
    checkpoint.close()
    return reference


@pytest.mark.parametrize("text", TEXTS)
def test_gemma_equals_sentencepiece(
    gemma: Tokenizer, gemma_reference: NaiveSentencePiece, text: str
) -> None:
    ids = gemma.encode(text, add_special=False)
    assert ids == gemma_reference.encode(text)
    assert gemma.encode(text) == [2, *ids]
    assert gemma.decode(ids, skip_special=False) == text


def test_gemma_equals_sentencepiece_on_hard_texts(
    gemma: Tokenizer, gemma_reference: NaiveSentencePiece
) -> None:
    for text in hard_texts():
        assert gemma.encode(text, add_special=False) == gemma_reference.encode(text)


@given(text=MIXED)
@MANY
def test_gemma_equals_sentencepiece_on_any_text(
    gemma: Tokenizer, gemma_reference: NaiveSentencePiece, text: str
) -> None:
    assert gemma.encode(text, add_special=False) == gemma_reference.encode(text)


@given(text=MIXED)
@MANY
def test_space_prefix_equals_sentencepiece_on_any_text(
    tiny: Tokenizer, tiny_reference: NaiveSentencePiece, text: str
) -> None:
    assert tiny.encode(text) == [1, *tiny_reference.encode(text)]


def test_gemma_facts(gemma: Tokenizer) -> None:
    assert gemma.vocab_size == 262144
    assert gemma.bos_id == 2
    assert gemma.eos_ids == {1, 106}  # <eos> and <end_of_turn>
    assert gemma.encode_chat("<bos>Hi") == gemma.encode_chat("Hi") == gemma.encode("Hi")
    assert gemma.chat_template is None


@given(
    words=st.lists(st.text("abc▁", min_size=1, max_size=8), max_size=40, unique=True),
    text=st.text("abc ", max_size=40),
)
@MANY
def test_one_merge_a_piece_is_enough(words: list[str], text: str) -> None:
    """Any vocabulary with distinct scores, with no care for how it could have been trained."""
    metadata = small_sentencepiece([*"abc▁", *(w for w in words if len(w) > 1)])
    ids = build_backend(metadata).encode(text).ids
    assert ids == NaiveSentencePiece(metadata).encode(text)


def small_sentencepiece(pieces: list[str], **keys: Any) -> dict[str, Any]:
    """GGUF key-values of a vocabulary of <unk>, <s>, </s>, the bytes and `pieces`."""
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    scores = [0.0] * len(head) + [-float(i) for i in range(len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": head + pieces,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


# The file's key-values, and what is wrong with them.


def load(metadata: dict[str, Any], cache: Path | None = None) -> Tokenizer:
    stand_in: Any = SimpleNamespace(format="gguf", metadata=metadata, fingerprint="f" * 64)
    return load_tokenizer(stand_in, cache)


def test_defaults_of_sentencepiece() -> None:
    tokenizer = load(small_sentencepiece(["▁", "a", "▁a"]))
    assert tokenizer.encode("a") == [1, tokenizer.encode("a", add_special=False)[0]]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert tokenizer.decode(tokenizer.encode("a é")) == " a é"


def test_ids_beyond_the_vocabulary_are_not_used() -> None:
    metadata = small_sentencepiece(["▁", "a"], bos_token_id=2**63, eos_token_id=-1)
    tokenizer = load({**metadata, "tokenizer.ggml.unknown_token_id": 10**9})
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, frozenset())
    assert tokenizer.decode(tokenizer.encode("a")) == " a"


def test_eot_token_ends_an_answer() -> None:
    metadata = small_sentencepiece(["▁", "a"], eot_token_id=260, add_bos_token=False)
    tokenizer = load(metadata)
    assert tokenizer.eos_ids == {2, 260}
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_compiles_and_loses_nothing(pre: str) -> None:
    tokenizer = load(small_byte_level(pre))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def small_byte_level(pre: str = "gpt-2") -> dict[str, Any]:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "he", "Ġhe", "<|end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([NORMAL] * 258 + [CONTROL], np.int32),
        "tokenizer.ggml.merges": ["h e", "Ġ he"],
    }


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer.ggml.model": None}, "no tokenizer"),
    ({"tokenizer.ggml.tokens": None}, "tokens is not a list of texts"),
    ({"tokenizer.ggml.tokens": np.zeros(259, np.int32)}, "tokens is not a list of texts"),
    ({"tokenizer.ggml.pre": 7}, "tokenizer.ggml.pre is of type int, not str"),
    ({"tokenizer.ggml.merges": "h e"}, "merges is not a list of texts"),
    ({"tokenizer.ggml.token_type": ["a"] * 259}, "not one number a token"),
    ({"tokenizer.ggml.model": "bert"}, "'bert'"),
    ({"tokenizer.ggml.pre": "klingon"}, "'klingon'"),
    ({"tokenizer.ggml.merges": ["h zz"]}, "cannot be built"),
    ({"tokenizer.ggml.merges": ["nospace"]}, "cannot be built"),
    ({"tokenizer.ggml.token_type": np.zeros(3, np.int32)}, "inconsistent"),
]


@pytest.mark.parametrize(("change", "named"), WRONG)
def test_wrong_key_values_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=re.escape(named)):
        load({**small_byte_level(), **change})


STRAY: list[Any] = [
    *(True, -1, 0, 3, 2**40, 1.5, "x", "", [], ["a"], ["a", "a"], ["a b", " b", ""]),
    *(np.zeros(0), np.zeros(259, np.int32), np.full(262, np.nan), np.array([["a"]])),
]
KEYS = (
    *("tokens", "token_type", "scores", "merges", "model", "pre", "bos_token_id", "eos_token_id"),
    *("unknown_token_id", "add_bos_token", "add_space_prefix", "eot_token_id"),
)


@given(
    base=st.sampled_from([0, 1]),
    changes=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(STRAY), max_size=3),
    template=st.sampled_from(["{{ bos_token }}", *STRAY]),
)
@MANY
def test_any_key_values_make_a_tokenizer_or_a_model_error(
    base: int, changes: dict[str, Any], template: Any
) -> None:
    metadata = small_sentencepiece([*"▁ab"]) if base else small_byte_level()
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    try:
        tokenizer = load({**metadata, "tokenizer.chat_template": template})
        tokenizer.decode(tokenizer.encode("a b<|end|>"))
    except ModelError as error:
        assert "\n" not in str(error)


def test_a_huge_piece_is_refused() -> None:
    with pytest.raises(ModelError, match="5000 characters"):
        merges_from_scores([("a" * 5000, 0.0)])


def test_the_built_tokenizer_is_kept_and_a_broken_copy_is_made_again(tmp_path: Path) -> None:
    metadata = small_byte_level()
    first = load(metadata, tmp_path).encode("he said")
    (kept,) = (tmp_path / "tokenizers").iterdir()
    # A warm start does not look at the vocabulary.
    warm = {k: v for k, v in metadata.items() if k != "tokenizer.ggml.tokens"}
    assert load(warm, tmp_path).encode("he said") == first
    kept.write_text(kept.read_text()[:1000])
    assert load(metadata, tmp_path).encode("he said") == first
    assert load(warm, tmp_path).encode("he said") == first


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "tokenizers").write_text("a file where a folder should be")
    assert load(small_byte_level(), tmp_path).decode([0])


def test_lone_surrogates_are_replaced(smollm2: Tokenizer) -> None:
    assert smollm2.decode(smollm2.encode("a\ud800b")) == "a?b"
