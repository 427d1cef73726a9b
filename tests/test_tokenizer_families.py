"""Every family's kind of tokenizer on 5,000 hard texts: equal to transformers, whole and in pieces."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chat_templates import CONVERSATIONS, TEMPLATES
from elinvar.base.errors import ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.engine.detokenize import IncrementalDetokenizer
from elinvar.engine.text import AnswerText
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from hard_text import hard_texts
from tokenizer_families import FAMILIES, write_folder

TEXTS = hard_texts()


def load(folder: Path, **config: Any) -> Tokenizer:
    stand_in: Any = SimpleNamespace(format="safetensors", path=folder, metadata=config)
    return load_tokenizer(stand_in)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def test_equals_transformers(ours: Tokenizer, reference: Any) -> None:
    encoded = reference(TEXTS)["input_ids"]
    wrong = [t for t, ids in zip(TEXTS, encoded, strict=True) if ours.encode(t) != ids]
    assert not wrong, f"{len(wrong)} of {len(TEXTS)} texts, such as {wrong[:3]!r}"
    for skip in (True, False):
        decoded = reference.batch_decode(
            encoded, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        # We keep the space that a tokenizer puts before the first word.
        wrong = [
            (own, text)
            for ids, text in zip(encoded, decoded, strict=True)
            if (own := ours.decode(ids, skip_special=skip)) not in (text, f" {text}")
        ]
        assert not wrong, f"{len(wrong)} of {len(TEXTS)} texts, such as {wrong[:3]!r}"


def test_random_ids_come_out_in_whole_characters(ours: Tokenizer) -> None:
    """Most of them are broken UTF-8: bytes come in any order."""
    rng = random.Random(5)
    single = [i for i in range(ours.vocab_size) if len(ours.token_bytes(i)) == 1] or [0]
    for _ in range(1000):
        pool = rng.choice((range(ours.vocab_size + 2), single))
        ids = [rng.choice(pool) for _ in range(rng.randint(1, 24))]
        detokenizer = IncrementalDetokenizer(ours)
        said = ""
        for i, token_id in enumerate(ids):
            piece = detokenizer.push([token_id])
            said += piece
            # What is out is certain: it begins the text of any continuation.
            whole = ours.decode(ids[: i + 1])
            assert whole.startswith(said)
            assert len(whole) - len(said) <= 3
        assert said + detokenizer.finish() == ours.decode(ids)


def test_stop_texts_end_random_ids_where_they_end_the_whole(ours: Tokenizer) -> None:
    rng = random.Random(6)
    stopped = 0
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randint(4, 30))]
        whole = ours.decode(ids)
        at = rng.randrange(len(whole) + 1)
        stops = [whole[at : at + rng.randint(1, 4)] or "never", "\ufffd\ufffd\ufffd"]
        answer = AnswerText(ours, SamplingParams(stop=stops))
        said, ended = "", False
        for token_id in ids:
            text, _, ended = answer.push([token_id])
            said += text
            assert not any(stop in said for stop in stops)
            if ended:
                break
        if not ended:
            text, ended = answer.finish()
            said += text
        # The stop that is complete first counts, and of those the longest.
        ends = [(whole.find(stop) + len(stop), -len(stop)) for stop in stops if stop in whole]
        assert (ended is not None) == bool(ends)
        assert said == (whole[: sum(min(ends))] if ends else whole)
        stopped += ended is not None
    assert stopped > 100


HOSTILE: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("llama3", lambda file: file.pop("model"), "missing required field"),
    ("llama3", lambda file: file.update(model=[1]), "Expected"),
    ("llama3", lambda file: file["model"].update(type="Nope"), "tokenizer.json cannot be read"),
    ("llama3", lambda file: file["model"].update(continuing_subword_prefix="\0"), "WordPiece"),
    ("llama3", lambda file: file["model"]["merges"].append(["zz", "yy"]), "cannot be read"),
    ("llama3", lambda file: file["post_processor"].update(special_tokens={}), "does not describe"),
    ("llama3", lambda file: file["added_tokens"][0].update(id=-1), "cannot be read"),
    ("llama3", lambda file: file["pre_tokenizer"].update(pretokenizers=[{}]), "cannot be read"),
    ("llama3", lambda file: file.update(decoder=None), r"decoder \(None\) is not supported"),
    ("llama3", lambda file: file.update(decoder={"type": "CTC"}), "cannot be read"),
    ("bert", lambda file: file["model"].update(vocab=[]), "cannot be read"),
    ("xlm_roberta", lambda file: file["model"].update(unk_id=None), "no unk_id"),
    ("xlm_roberta", lambda file: file["model"].update(unk_id=10**6), "cannot be read"),
    ("xlm_roberta", lambda file: file["model"]["vocab"].append(["x", "y"]), "cannot be read"),
]


@pytest.mark.parametrize(("name", "spoil", "reason"), HOSTILE)
def test_hostile_tokenizer_files(
    tmp_path: Path, name: str, spoil: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    """Some of these end the process when the library sees them."""
    path = write_folder(tmp_path, name) / "tokenizer.json"
    described = json.loads(path.read_text())
    spoil(described)
    path.write_text(json.dumps(described))
    with pytest.raises(ModelError, match=reason) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"model": NaN}', b"{}"])
def test_what_is_no_tokenizer_json(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["parts", "chatml"])
def test_chats_have_the_ids_of_transformers(folder: Path, tmp_path: Path, template: str) -> None:
    """`parts` writes BOS and `chatml` does not; nobody adds one."""
    transformers = pytest.importorskip("transformers")
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[template])
    ours, theirs = load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.chat_template is not None
    for messages in CONVERSATIONS[:4]:
        text = ours.chat_template.render(messages)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert ours.encode_chat(text) == expected["input_ids"]


TOOL, NEW = "<tool_call>", "<|new|>"
BESIDE: dict[str, dict[str, Any]] = {
    "becomes_special": {"added_tokens_decoder": {"TOOL": {"content": TOOL, "special": True}}},
    "new": {"added_tokens_decoder": {"NEXT": {"content": NEW, "special": True, "rstrip": True}}},
    "new_plain": {"added_tokens_decoder": {"NEXT": {"content": NEW, "lstrip": True}}},
    "additional": {"additional_special_tokens": [TOOL, "<|im_start|>"]},
    "extra": {"extra_special_tokens": [TOOL]},
    "extra_named": {"extra_special_tokens": {"tool_token": TOOL}},
    "named": {"mask_token": TOOL, "unk_token": "<think>"},
    "add_bos": {"add_bos_token": True, "bos_token": "<|im_start|>"},
    "legacy": {
        "legacy": False,
        "clean_up_tokenization_spaces": True,
        "split_special_tokens": False,
    },
}


@pytest.mark.parametrize("beside", BESIDE)
def test_settings_beside_a_tokenizer_json_equal_transformers(tmp_path: Path, beside: str) -> None:
    transformers = pytest.importorskip("transformers")
    write_folder(tmp_path, "qwen3")
    plain = load(tmp_path)
    ids = {"TOOL": plain.encode(TOOL)[0], "NEXT": plain.vocab_size}
    path = tmp_path / "tokenizer_config.json"
    changes = BESIDE[beside] | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, token in changes.get("added_tokens_decoder", {}).items():
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
        changes["added_tokens_decoder"] = {str(ids[key]): flags | token}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (tmp_path / "chat_template.jinja").write_text(
        "{{ mask_token }}|{{ tool_token }}|{{ bos_token }}"
    )
    ours, theirs = load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [f"a {TOOL} b {NEW} c", f"{NEW}\n", *TEXTS[:400]]
    encoded = theirs(texts)["input_ids"]
    assert [ours.encode(text) for text in texts] == encoded
    decoded = theirs.batch_decode(encoded, skip_special_tokens=True)
    assert [ours.decode(each) for each in encoded] == decoded
    messages = [{"role": "user", "content": "x"}]
    assert ours.chat_template is not None
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert ours.chat_template.render(messages) == text
