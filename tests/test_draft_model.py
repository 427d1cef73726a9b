"""A draft model guesses what it would sample in the target's place: never less for what it was asked
before, what others ask, how much memory it has, or which drafts were wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafting import MAX_CONTEXT, come, draft_model, guess, rows_for, start
from elinvar.base.errors import ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.run.drafters.api import Ask
from elinvar.run.drafters.model import CATCH_UP
from engines import answers, provider, tiny_engine, tiny_model
from families.base import VOCAB

FAMILIES = ["llama", "gemma3"]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.2, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_tokens": 9},
]


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(31 * i + i * i // 7 + salt) % 256 for i in range(length)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_target_itself_guesses_every_token(family: str, params: dict[str, Any]) -> None:
    prompt = prompt_of(70)
    chosen = SamplingParams(seed=7, max_tokens=40, ignore_eos=True, **params)
    [(answer, _, _)] = answers(tiny_engine(family), [prompt], [chosen])
    rows = rows_for()
    start(rows, 0, prompt, max_tokens=40, ignore_eos=True, **params)
    drafter, known = draft_model(rows, family), len(prompt)
    while len(answer) > 5:
        # As many are right as the row is given, and the one after them is the target's.
        found = guess(drafter, 0, known, 4)
        assert found.tokens == answer[:4]
        assert all(0 < chance <= 1 for chance in found.chances)
        known = come(rows, 0, known, answer[:5])
        answer = answer[5:]


def test_a_long_prompt_is_read_in_parts() -> None:
    rows = rows_for()
    start(rows, 0, prompt_of(2 * CATCH_UP + 9))
    start(rows, 1, prompt_of(20))
    drafter = draft_model(rows)
    asks = [Ask(0, 2 * CATCH_UP + 9, 3), Ask(1, 20, 3)]
    found = [drafter.propose(asks) for _ in range(3)]
    assert [len(long.tokens) for long, _ in found] == [0, 0, 3]
    assert all(short.tokens == found[0][1].tokens for _, short in found)


def test_what_others_have_read_is_not_read_again() -> None:
    rows = rows_for()
    for row, namespace in enumerate([b"", b"", b"another"]):
        start(rows, row, [*prompt_of(CATCH_UP), row], namespace)
    drafter = draft_model(rows)
    known = CATCH_UP + 1
    assert not guess(drafter, 0, known, 1).tokens
    assert guess(drafter, 0, known, 1).tokens
    drafter.forget(0)
    assert guess(drafter, 1, known, 1).tokens, "all but its last token was there"
    assert not guess(drafter, 2, known, 1).tokens, "texts of others are not compared with"


def test_memory_is_bounded_and_goes_to_who_asks() -> None:
    rows = rows_for()
    for row in range(3):
        start(rows, row, prompt_of(90, salt=row))
    drafter = draft_model(rows, num_blocks=6)
    fresh = [guess(draft_model(rows), row, 90, 3).tokens for row in range(3)]
    for _ in range(2):
        for row in range(3):
            assert guess(drafter, row, 90, 3).tokens == fresh[row]
    together = drafter.propose([Ask(row, 90, 3) for row in range(3)])
    assert sorted(bool(found.tokens) for found in together) == [False, True, True]
    assert guess(draft_model(rows, num_blocks=2), 0, 90, 3).tokens == []


def test_it_ends_where_its_context_does() -> None:
    rows = rows_for()
    drafter = draft_model(rows)
    start(rows, 0, prompt_of(100))
    drafter._longest = 102
    assert len(guess(drafter, 0, 100, 8).tokens) == 2
    drafter._longest = 100
    assert guess(drafter, 0, 100, 8).tokens == []


@pytest.mark.parametrize("vocab", [VOCAB - 8, VOCAB + 8])
def test_ids_are_the_targets(vocab: int) -> None:
    rows = rows_for()
    drafter = draft_model(rows, vocab_size=vocab)
    start(rows, 0, [*prompt_of(9), VOCAB + 5], temperature=50.0, repetition_penalty=1.5)
    if vocab < VOCAB:
        rows.token_ids[0, 9] = 3
    found = guess(drafter, 0, 10, 64).tokens
    assert len(found) == 64 and max(found) < min(vocab, VOCAB)


def test_a_model_that_cannot_go_back_is_refused() -> None:
    rows, ops = rows_for(), provider()
    model = tiny_model(ops, "qwen3_next")
    from elinvar.run.drafters.model import DraftModel

    specs = model.kv_specs("f16")
    with pytest.raises(ModelError, match="recurrent"):
        DraftModel(rows, model, ops, specs, [4] * len(specs), MAX_CONTEXT, VOCAB)


STEP = st.tuples(
    st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    st.integers(1, 6),
    st.lists(st.integers(0, 255), min_size=1, max_size=2),
    st.sampled_from(["go on", "go on", "begin anew"]),
)


@settings(max_examples=30)
@given(st.sampled_from(FAMILIES), st.lists(STEP, min_size=1, max_size=8), st.integers(3, 40))
def test_what_was_before_changes_no_guess(
    family: str,
    steps: list[tuple[list[int], int, list[int], str]],
    num_blocks: int,
) -> None:
    rows = rows_for()
    drafter = draft_model(rows, family, num_blocks=num_blocks)
    known = {}
    for count, (asked, most, wrong, what) in enumerate(steps):
        for row in asked:
            if row not in known or what == "begin anew":
                drafter.forget(row)
                known[row] = 20 + 7 * row
                start(rows, row, prompt_of(known[row]), temperature=0.9, presence_penalty=0.3)
        asks = [Ask(row, known[row], most) for row in asked]
        found = drafter.propose(asks)
        drafter._lanes.check()
        for ask, some in zip(asks, found, strict=True):
            alone = guess(draft_model(rows, family), ask.row, ask.num_tokens, most)
            assert some.tokens in ([], alone.tokens[: len(some.tokens)])
            assert len(some.tokens) == most or num_blocks < 30
            # A part of them was right; then came something else.
            right = alone.tokens[: count % (most + 1)]
            known[ask.row] = come(rows, ask.row, ask.num_tokens, [*right, *wrong])


def test_an_ask_is_no_more_than_a_question() -> None:
    rows = rows_for()
    start(rows, 0, prompt_of(33))
    drafter = draft_model(rows)
    ask = Ask(0, 33, 5)
    [before] = drafter.propose([ask])
    [after] = drafter.propose([replace(ask)])
    assert before == after
    drafter.forget(0)
    drafter.forget(3)
    assert drafter._lanes.num_held == 0
