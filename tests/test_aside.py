"""A drafter beside the engine: what it guesses is used while it holds, and nothing that it does, or does
not do, is waited for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adversaries
from drafting import MAX_CONTEXT, come, draft_model, guess, rows_for, start
from elinvar.run.drafters.ahead import AHEAD, TRIES, Ahead, News
from elinvar.run.drafters.api import Ask, Guess
from elinvar.run.drafters.aside import Aside
from elinvar.run.rows import Rows

LONG_S = 60.0
"""No machine is that slow."""


class Counting(adversaries.Adversary):
    """After 5 comes 6."""

    def guess(self, ask: Ask) -> Guess:
        last = self.rows.token_ids.item(ask.row, ask.num_tokens - 1)
        tokens = [(last + 1 + i) % 200 for i in range(ask.most)]
        return Guess(tokens, [0.5] * ask.most)


class Silent(adversaries.Adversary):
    def guess(self, ask: Ask) -> Guess:
        return Guess()


def until(happens: Callable[[], Any]) -> Any:
    """What it then is."""
    end = time.monotonic() + LONG_S
    while not (found := happens()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)
    return found


@pytest.fixture(params=[False, True], ids=["thread", "process"])
def aside(request: pytest.FixtureRequest) -> Iterator[Callable[..., Aside]]:
    made: list[Aside] = []

    def make(rows: Rows, drafter: Any, **options: Any) -> Aside:
        made.append(Aside(rows, drafter, in_process=request.param, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
        one.close()
        assert one._process is None or one._process.returncode is not None


def test_it_runs_ahead_and_what_held_is_kept(aside: Callable[..., Aside]) -> None:
    rows = rows_for()
    start(rows, 0, [1, 2, 3])
    start(rows, 2, [7])
    drafter = aside(rows, Counting)
    assert guess(drafter, 0, 3, 4).tokens == [], "nothing is waited for"
    until(lambda: len(guess(drafter, 0, 3, AHEAD).tokens) == AHEAD)
    # Three were right: the others are used at once, whether or not it knows.
    known = come(rows, 0, 3, [4, 5, 6])
    assert guess(drafter, 0, known, 4).tokens == [7, 8, 9, 10]
    known = come(rows, 0, known, [50])
    assert guess(drafter, 0, known, 4).tokens == [], "it was wrong"
    assert until(lambda: guess(drafter, 0, known, 4).tokens) == [51, 52, 53, 54]
    assert until(lambda: guess(drafter, 2, 1, 2).tokens) == [8, 9]


def test_a_row_that_another_has_gets_nothing_of_before(aside: Callable[..., Aside]) -> None:
    rows = rows_for()
    start(rows, 0, [1, 2, 3])
    drafter = aside(rows, Counting)
    until(lambda: guess(drafter, 0, 3, 4).tokens)
    drafter.forget(0)
    start(rows, 0, [1, 2, 3])
    assert guess(drafter, 0, 3, 4).tokens == []
    until(lambda: guess(drafter, 0, 3, 4).tokens)


def test_a_draft_model_samples_there_as_it_does_here(aside: Callable[..., Aside]) -> None:
    rows = rows_for()
    start(rows, 1, range(40), temperature=0.8, repetition_penalty=1.2, logit_bias={9: 3.0})
    want = guess(draft_model(rows), 1, 40, 6).tokens
    drafter = aside(rows, partial(draft_model, num_blocks=16))
    assert until(lambda: guess(drafter, 1, 40, 6).tokens)[:4] == want[:4]


@pytest.mark.parametrize("adversary", adversaries.ADVERSARIES)
def test_garbage_harms_nobody(adversary: Any) -> None:
    rows = rows_for()
    start(rows, 0, [1, 2, 3])
    drafter = Aside(rows, adversary, in_process=False)
    for step in range(20):
        for found in drafter.propose([Ask(0, 3 + step, 4), Ask(1, 1, 4)]):
            assert len(found.tokens) <= 4
        come(rows, 0, 3 + step, [step])
    drafter.forget(0)
    drafter.close()


@pytest.mark.parametrize("kind", adversaries.HANGING)
def test_who_hangs_or_ends_costs_nothing(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rows = rows_for()
    start(rows, 0, [1, 2, 3])
    drafter = Aside(rows, kind, patience_s=0.2)

    def asked() -> bool:
        assert guess(drafter, 0, 3, 4).tokens == []
        return not drafter.is_alive

    if kind is adversaries.hangs_at_once:
        for _ in range(100):
            asked()
    else:
        until(asked)
        until(lambda: caplog.records)
        asked()
    drafter.close()
    assert drafter._process is not None and drafter._process.returncode is not None
    assert len(caplog.records) == (kind is not adversaries.hangs_at_once)


def test_who_does_not_listen_is_not_waited_for() -> None:
    """Far more is to be told than a pipe holds, and it stays one piece of news a row."""
    rows = rows_for()
    start(rows, 0, range(100))
    drafter = Aside(rows, adversaries.Hangs, patience_s=1e9)
    for round_ in range(2000):
        drafter.forget(0)
        guess(drafter, 0, MAX_CONTEXT - 1 - round_ % 2, 4)
    assert len(drafter._news) <= 1
    drafter.close()


def test_nobody_stays_behind() -> None:
    before = threading.active_count()
    for in_process in (False, True):
        drafter = Aside(rows_for(), Counting, in_process=in_process)
        drafter.close()
    until(lambda: threading.active_count() == before)


# ---- what runs there ------------------------------------------------------------------------


def ahead_of(rows: Rows, drafter: Any) -> tuple[Ahead, News]:
    ahead = Ahead(4, MAX_CONTEXT, drafter)
    news = News(1, 0, 0, 0, [1, 2, 3], rows.sampling_of(0))
    ahead.take(news)
    return ahead, news


@given(st.lists(st.one_of(st.integers(1, 9), st.none()), max_size=12))
def test_a_chain_follows_what_is_known(steps: Sequence[int | None]) -> None:
    """A number: so many drafts were right; none: the next one was wrong."""
    rows = rows_for()
    ahead, _ = ahead_of(rows, Counting)
    known = [1, 2, 3]
    for step in steps:
        for chain in ahead.go_on():
            assert chain.first == len(known) and len(chain.tokens) <= AHEAD
            assert chain.tokens == [(known[-1] + 1 + i) % 200 for i in range(len(chain.tokens))]
        last = known[-1]
        new = [last + 5] if step is None else [last + 1 + i for i in range(step)]
        new = [token % 200 for token in new]
        ahead.take(News(2, 0, 0, len(known), new))
        known += new


def test_who_has_nothing_to_say_is_left_alone() -> None:
    ahead, _ = ahead_of(rows_for(), Silent)
    rounds = 0
    while ahead.has_work:
        assert ahead.go_on() == []
        rounds += 1
    assert rounds == TRIES
    ahead.take(News(2, 0, 0, 3, [4]))
    assert ahead.has_work
    ahead.take(News(3, 0, 1))
    assert not ahead.has_work
