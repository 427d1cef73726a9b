"""Every family's kind of tokenizer on 5,000 hard texts: equal to transformers, whole and in pieces."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elinvar.engine.detokenize import IncrementalDetokenizer
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
