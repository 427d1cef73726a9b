"""Drafters that do harm change no answer, end no request, and those that fail are asked no more."""

from __future__ import annotations

from typing import Any

import pytest

from adversaries import ADVERSARIES, HANGING
from elinvar.engine.drafts import Given
from elinvar.run.drafters.aside import Aside
from engines import answers, tiny_engine
from oracles import verify_all
from test_speculation import plain, sixteen

FAIL = {"Raises", "RaisesElsewhere", "WrongCount", "NoGuesses"}


@pytest.mark.parametrize("kind", ["warm", "schema", "penalties", "logprobs"])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_bits_are_equal(adversary: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verify_all(monkeypatch)
    prompts, params = sixteen(kind)
    make = Given(lambda runner: adversary(runner.rows))
    engine = tiny_engine("llama", max_rows=16, drafting=make)
    assert answers(engine, prompts, params) == plain(prompts, params)
    assert bool(engine.runner.speculator._sources) == (adversary.__name__ not in FAIL)
    engine.close()


@pytest.mark.parametrize("adversary", HANGING)
def test_one_beside_the_engine_is_not_waited_for(
    adversary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_all(monkeypatch)
    prompts, params = sixteen("warm")
    make = Given(lambda runner: Aside(runner.rows, adversary, patience_s=0.05))
    engine = tiny_engine("llama", max_rows=16, drafting=make)
    assert answers(engine, prompts, params) == plain(prompts, params)
    engine.close()
