"""Who follows whom: a drafter that reads states costs before it gains, and costs a set share at most."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adversaries import Reader
from drafting import rows_for
from elinvar.base.plan import PlanItem
from elinvar.engine.drafts import Given
from elinvar.run import sources
from elinvar.run.accounts import CREDIT_TO_FOLLOW
from elinvar.run.costs import FIRST, OLD
from elinvar.run.drafters.api import Drafter, Seen
from elinvar.run.runner import Runner
from elinvar.run.sources import Source
from engines import answers, tiny_engine
from oracles import Clock
from test_invariance import PARAMS, PROMPTS


def seen(row: int, start: int) -> Seen:
    """A step of one token."""
    item = PlanItem("r", row, start, 1, True, [])
    return Seen([item], [[1]], np.zeros((1, 4), np.float32), [0])


def follow(
    source: Source, steps: int, gained: float, length: int = 200
) -> tuple[float, list[bool]]:
    """Answers of so many tokens, one after the other, in steps of a second. The seconds of looking, and
    of each answer whether it was followed to its end."""
    took, followed = 0.0, []
    for step in range(steps):
        place = step % length
        if place == 0:
            source.forget(0)
            source.start(0)
        took += source.observe(seen(0, place), 0.0)
        if source.reads(0):
            source.account.book(gained)
        source.pass_by(1.0, 1.0)
        if place == length - 1:
            followed.append(source.reads(0))
    return took, followed


def test_who_gains_nothing_costs_a_set_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "time", Clock(0.1))
    steps = 20_000
    took, followed = follow(Source(Reader(rows_for())), steps, 0.0)
    assert took < 0.006 * steps + CREDIT_TO_FOLLOW + 1
    assert not any(followed[:8])
    assert took > CREDIT_TO_FOLLOW + 20, "it is tried again now and then"


def test_who_gains_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "time", Clock(0.1))
    _, followed = follow(Source(Reader(rows_for())), 2_000, 0.2)
    assert all(followed)


def test_a_row_is_followed_from_its_beginning_or_not_at_all() -> None:
    reader = Reader(rows_for())
    source = Source(reader)
    source.start(0)
    source.pass_by(1.0, 1.0)
    source.account.book(-CREDIT_TO_FOLLOW - 1)
    source.pass_by(1.0, 1.0)
    assert not source.reads(0)
    source.start(1)
    source.account.book(CREDIT_TO_FOLLOW)
    source.pass_by(1.0, 1.0)
    source.start(2)
    assert [source.follows(row) for row in (0, 1, 2)] == [False, False, True]
    both = [PlanItem("r", row, 0, 3, True, []) for row in (1, 2)]
    source.observe(Seen(both, [[1], [1]], np.zeros((6, 4), np.float32), [0, 3]), 0.0)
    assert reader.num_seen == 3


def test_states_are_read_only_while_they_may_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose drafter looks for longer than it can ever gain computes as if there were none."""
    monkeypatch.setattr(sources, "time", Clock(1000.0))
    want = answers(tiny_engine(speculation="off"), PROMPTS, PARAMS)
    readers: list[Reader] = []

    def make(runner: Runner) -> Drafter:
        readers.append(Reader(runner.rows))
        return readers[-1]

    engine: Any = tiny_engine(drafting=Given(make))
    for prompt, params, expected in zip(PROMPTS, PARAMS, want, strict=True):
        shown = readers[-1].num_seen
        assert answers(engine, [prompt], [params]) == [expected]
        first = prompt is PROMPTS[0]
        assert (readers[-1].num_seen > shown) == first, "nobody is followed after the first"


def test_what_drafts_take_is_believed_after_some_and_forgotten_when_old() -> None:
    source = Source(Reader(rows_for()))
    for seconds in (90.0, 20.0, 24.0)[:FIRST]:
        assert source.draft_s() == 0
        source.drafted(seconds, 4)
    assert source.draft_s() == 5.0
    for _ in range(OLD):
        source.draft_s()
    assert source.draft_s() == 0
