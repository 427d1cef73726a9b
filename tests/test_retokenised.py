"""Drafts across tokenizers: the draft model reads the text that the target has, and what is proposed are
target tokens that continue it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, trainers
from tokenizers import pre_tokenizers as pre

from drafting import come, draft_model, rows_for, start
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.engine.vocab import Parts
from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.drafters.retokenised import EXTRA, Retokenised, spell
from elinvar.run.rows import Rows
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import open_checkpoint
from engines import ByteTokenizer
from hard_text import hard_texts

PROSE = (Path(__file__).parent / "data/prose.txt").read_text(encoding="utf-8")


@cache
def trained(size: int, metaspace: bool = False) -> Tokenizer:
    """Byte-level BPE, or one that puts a space before a text and has names for bytes."""
    backend = Backend(models.BPE(byte_fallback=metaspace))
    alphabet: Any = []
    special = ["<s>", "</s>"]
    if metaspace:
        backend.pre_tokenizer = pre.Metaspace()
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([PROSE], trainer)
    made = json.loads(backend.to_str())
    made["added_tokens"] = made["added_tokens"][:2]  # names of bytes are tokens like others
    backend = Backend.from_str(json.dumps(made))
    return Tokenizer(Parts(backend, 0, [1], [0], [], {}, {}))


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(i) for i in ids if i != tokenizer.bos_id)


class Oracle:
    """Knows the text, and checks what it is given to read of it."""

    name = "oracle"
    is_instant = reads_hidden = False

    def __init__(self, rows: Rows, tokenizer: Tokenizer, text: str) -> None:
        self.rows, self.tokenizer, self.text = rows, tokenizer, text.encode()

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [self._continue(ask) for ask in asks]

    def _continue(self, ask: Ask) -> Guess:
        known = text_of(self.tokenizer, self.rows.token_ids[ask.row, : ask.num_tokens].tolist())
        if known[:1] == b" " != self.text[:1]:
            known = known[1:]
        assert self.text.startswith(known)
        rest = self.text[len(known) :].decode()[:99].encode()
        tokens = (spell(self.tokenizer, rest) or [])[: ask.most]
        return Guess(tokens, [0.5] * len(tokens))

    def observe(self, seen: Seen) -> None: ...

    def forget(self, row: int) -> None: ...


def drafter_for(rows: Rows, target: Tokenizer, draft: Tokenizer, text: str) -> Retokenised:
    return Retokenised(rows, 2048, target, draft, lambda own: Oracle(own, draft, text))


@pytest.mark.parametrize(("target", "draft"), [(600, 400), (400, 600), (500, 500)])
def test_nearly_all_of_what_is_proposed_is_what_comes(target: int, draft: int) -> None:
    whole, own = trained(target), trained(draft)
    rows = rows_for()
    ids = whole.encode(PROSE[:1500])
    drafter = drafter_for(rows, whole, own, PROSE)
    prompt = 40
    start(rows, 0, ids[:prompt])
    known, proposed, right = prompt, 0, 0
    while known < len(ids) - 16 and known < 480:
        [found] = drafter.propose([Ask(0, known, 6)])
        proposed += len(found.tokens)
        right += sum(np.array(found.tokens) == ids[known : known + len(found.tokens)])
        known = come(rows, 0, known, ids[known : known + 1 + known % 3])
    assert right > 0.97 * proposed
    assert proposed > 2 * (known - prompt) / 2


@settings(max_examples=60)
@given(
    st.sampled_from(hard_texts(2000)),
    st.booleans(),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_whatever_the_text_it_is_read_and_continued(
    text: str, metaspace: bool, steps: list[int]
) -> None:
    text = text[:200].strip().replace("▁", "_") + " x"  # which stands for a space
    target, draft = trained(400), trained(560, metaspace)
    rows, ids = rows_for(), target.encode(text)[:400]
    if text_of(target, ids) != text.encode():
        return  # control tokens are in it
    start(rows, 0, ids)
    drafter = drafter_for(rows, target, draft, text)
    known = 1
    for step in steps:
        known = min(known + step, len(ids))
        [found] = drafter.propose([Ask(0, known, 5)])
        assert len(found.tokens) == len(found.chances) <= 5
        rest = text_of(target, ids[known:])
        assert rest.startswith(text_of(target, found.tokens))


def test_what_a_chance_is() -> None:
    target, draft = trained(600), trained(400)
    rows = rows_for()
    text = "the scheduler of the engine"
    ids = target.encode(text)
    start(rows, 0, ids)
    [found] = drafter_for(rows, target, draft, text).propose([Ask(0, 2, 8)])
    parts = [target.token_bytes(i) for i in found.tokens]
    rest = draft.encode(text_of(target, ids[2:]).decode(), add_special=False)[: 8 + EXTRA]
    ends = np.cumsum([0, *(len(draft.token_bytes(i)) for i in rest)])
    at = 0
    for part, chance in zip(parts, found.chances, strict=True):
        begins = sum(at <= end < at + len(part) for end in ends)
        assert chance == 0.5**begins
        at += len(part)


def test_a_draft_model_of_bytes_drafts_for_words() -> None:
    """And what it computed for a text that was cut anew is computed again."""
    target: Any = trained(600)
    rows, ids = rows_for(), target.encode(PROSE[300:400])
    start(rows, 0, ids)

    def make() -> Retokenised:
        own: Any = ByteTokenizer()
        return Retokenised(rows, 512, target, own, lambda r: draft_model(r, unsettled=16))

    drafter = make()
    for known in range(3, len(ids), 2):
        asks = [Ask(0, known, 4)]
        assert drafter.propose(asks) == make().propose(asks)
    drafter.forget(0)


def test_real_tokenizers(smollm2_gguf: Path, gemma_gguf: Path) -> None:
    tokenizers = []
    for path in (smollm2_gguf, gemma_gguf):
        checkpoint = open_checkpoint(path)
        tokenizers.append(load_tokenizer(checkpoint, cache_root()))
        checkpoint.close()
    for target, draft in (tokenizers, tokenizers[::-1]):
        rows, ids = rows_for(), target.encode(PROSE[:1200])
        drafter = drafter_for(rows, target, draft, PROSE)
        start(rows, 0, ids)
        proposed = right = 0
        for known in range(20, len(ids) - 8, 3):
            [found] = drafter.propose([Ask(0, known, 6)])
            proposed += len(found.tokens)
            right += sum(np.array(found.tokens) == ids[known : known + len(found.tokens)])
        assert right > 0.97 * proposed and proposed > len(ids) / 2
