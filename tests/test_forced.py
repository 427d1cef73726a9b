"""Drafts of what a grammar forces are texts that must come, and a chain of drafts is always allowed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drafting import guess, rows_for, start
from elinvar.base.grammar import JsonSchema
from elinvar.base.plan import RowStart
from elinvar.base.sampling import SamplingParams
from elinvar.engine.grammars import Grammars
from elinvar.run.drafters.forced import DEAR, ForcedDrafter
from elinvar.run.drafters.suffix import SuffixDrafter
from elinvar.run.grammar import Masks
from elinvar.run.rows import Rows
from elinvar.run.sources import Source
from test_grammars import NUM_TOKENS, SCHEMAS, SPELLINGS, allowed, grammars

__all__ = ["grammars"]

QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@settings(max_examples=40, deadline=None, suppress_health_check=QUIET)
@given(SCHEMAS, st.integers(0, 2**32))
def test_a_forced_text_is_the_only_one(grammars: Grammars, schema: Any, seed: int) -> None:
    matcher, rng = grammars.matcher(JsonSchema(json.dumps(schema))), np.random.default_rng(seed)
    for _ in range(30):
        tokens, ahead = matcher.forced(), matcher.copy()
        for byte in b"".join(SPELLINGS[token] for token in tokens):
            assert {SPELLINGS[token][0] for token in allowed(ahead)} == {byte}
            ahead.accept([byte])
        here = sorted(token for token in allowed(matcher) if token < 256)
        if not here:
            break
        matcher.accept([int(rng.choice(here))])


def forced_of(grammars: Grammars, rows: Rows, schema: Any, prompt: Sequence[int]) -> ForcedDrafter:
    """Asked for row 0, with this prompt and schema."""
    masks, suffix = Masks(NUM_TOKENS, grammars.matcher), SuffixDrafter(rows)
    grammar = JsonSchema(json.dumps(schema))
    start(rows, 0, prompt, grammar=grammar)
    params = SamplingParams(seed=0, grammar=grammar)
    masks.start(RowStart("", 0, list(prompt), params, [], -1, len(prompt)))
    return ForcedDrafter(rows, masks, suffix)


@settings(max_examples=40, deadline=None, suppress_health_check=QUIET)
@given(SCHEMAS, st.integers(0, 2**32), st.integers(1, 16))
def test_drafts_are_allowed(grammars: Grammars, schema: Any, seed: int, most: int) -> None:
    rows, rng = rows_for(1), np.random.default_rng(seed)
    drafter = forced_of(grammars, rows, schema, b'[{"a": 12, "a b": [true, "a b"]}] ')
    known, matcher = 34, grammars.matcher(JsonSchema(json.dumps(schema)))
    for _ in range(30):
        chain = guess(drafter, 0, known, most)
        assert len(chain.tokens) == len(chain.chances) <= most
        assert matcher.num_valid(chain.tokens) == len(chain.tokens)
        tokens = sorted(token for token in allowed(matcher) if token < 256)
        if not tokens:
            break
        # Half of the time what was drafted comes.
        token = int(rng.choice(tokens))
        if chain.tokens and chain.tokens[0] < 256 and rng.random() < 0.5:
            token = chain.tokens[0]
        rows.token_ids[0, known] = token
        matcher.accept([token])
        known += 1


def test_a_name_its_value_and_the_next_name(grammars: Grammars) -> None:
    """The names are forced; what is between them was in the prompt."""
    names = "customer", "street"
    schema = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    rows, prompt = rows_for(1), b'{"customer": "Ada", "place": "x"} '
    drafter = forced_of(grammars, rows, schema, prompt)
    answer = b'{"customer'
    rows.token_ids[0, len(prompt) : len(prompt) + len(answer)] = list(answer)
    chain = guess(drafter, 0, len(prompt) + len(answer), 20)
    assert bytes(chain.tokens) == b'": "Ada", "street": '[: len(chain.tokens)]
    assert len(chain.tokens) > len(b'": "Ada", "stree')
    assert guess(drafter, 0, len(prompt) + len(answer), 4).tokens == chain.tokens[:4]


def both(grammars: Grammars) -> tuple[Rows, bytes, ForcedDrafter, SuffixDrafter, int]:
    """Who look ahead through a grammar and in the text, amid a word that the prompt has."""
    rows, prompt = rows_for(2), b'"one two" '
    drafter = forced_of(grammars, rows, {"type": "string"}, prompt)
    known = len(prompt) + 2
    rows.token_ids[0, len(prompt) : known] = list(b'"o')
    assert drafter._suffix is not None
    return rows, prompt, drafter, drafter._suffix, known


def test_a_row_is_drafted_for_once(grammars: Grammars) -> None:
    """Who looks ahead asks the other drafter, which has no more to say then; alone it speaks for itself."""
    rows, prompt, drafter, suffix, known = both(grammars)
    alone = guess(suffix, 0, known, 6).tokens
    assert alone == list(b"ne two")
    assert guess(drafter, 0, known, 6).tokens == alone
    assert guess(suffix, 0, known, 6).tokens == []
    rows.token_ids[0, known] = ord("n")
    assert guess(suffix, 0, known + 1, 5).tokens == alone[1:]
    # Of a row without a grammar the other has nothing to say, and is not asked in steps of such rows.
    start(rows, 1, prompt + b'"o')
    assert [Source(drafter).may_guess(row) for row in (0, 1)] == [True, False]
    assert Source(suffix).may_guess(1)
    assert guess(drafter, 1, known, 6).tokens == []
    assert guess(suffix, 1, known, 6).tokens == alone


def test_where_drafts_are_dear_the_other_speaks(grammars: Grammars) -> None:
    rows, prompt, drafter, suffix, known = both(grammars)
    assert guess(drafter, 0, known, 6, least=1.1 * DEAR).tokens == []
    assert guess(suffix, 0, known, 6, least=1.1 * DEAR).tokens == list(b"ne two")
    assert guess(drafter, 0, known, 6, least=0.9 * DEAR).tokens == list(b"ne two")
    # Alone it speaks at any price.
    alone = ForcedDrafter(rows, drafter._masks)
    start(rows, 0, prompt, grammar=(grammar := JsonSchema('{"const": "one two"}')))
    params = SamplingParams(seed=0, grammar=grammar)
    drafter._masks.start(RowStart("", 0, list(prompt), params, [], -1, len(prompt)))
    assert guess(alone, 0, len(prompt), 6, least=1.1 * DEAR).tokens == list(b'"one t')


def test_what_was_seen_ahead_serves_while_it_comes_true(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = {"enum": ["one long word", "another"]}
    rows, looked = rows_for(1), 0
    drafter = forced_of(grammars, rows, schema, b"x ")
    look = drafter._look

    def counted(ask: Any) -> Any:
        nonlocal looked
        looked += 1
        return look(ask)

    monkeypatch.setattr(drafter, "_look", counted)
    known = 2 + len(b'"o')
    rows.token_ids[0, 2:known] = list(b'"o')
    chain = guess(drafter, 0, known, 8).tokens
    for done, token in enumerate(chain[:3], 1):
        rows.token_ids[0, known + done - 1] = token
        assert guess(drafter, 0, known + done, 8).tokens == chain[done:]
    assert looked == 1
    rows.token_ids[0, known + 2] ^= 1  # something else came
    assert not drafter._ahead[0].serves(rows.token_ids[0, known : known + 3].tolist())


def test_a_row_without_a_grammar_has_none(grammars: Grammars) -> None:
    rows = rows_for(1)
    start(rows, 0, b"abab")
    drafter = ForcedDrafter(rows, Masks(NUM_TOKENS, grammars.matcher), SuffixDrafter(rows))
    assert guess(drafter, 0, 4, 8).tokens == []
