"""Replay and exits: what drafters are worth, measured on recorded answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from elinvar.base.sampling import SamplingParams
from elinvar.engine.exits import Exit, best_exit, known_exit, measure_exits, remember_exit
from elinvar.nn.decoder import Decoder
from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.drafters.early_exit import EarlyExitDrafter
from elinvar.run.replay import Recorded, Replay
from elinvar.run.rows import Rows
from engines import answers as engine_answers
from engines import provider, tiny_engine, tiny_model

PARAMS = [SamplingParams(max_tokens=30, temperature=t, seed=i) for i, t in enumerate((0.0, 0.9))]


def target() -> Decoder:
    model = tiny_model(provider())
    assert isinstance(model, Decoder)
    return model


@cache
def recorded() -> list[Recorded]:
    prompts = [np.random.default_rng(i).integers(0, 256, 20 + i).tolist() for i in range(2)]
    found = engine_answers(tiny_engine(speculation="off"), prompts, PARAMS)
    return [
        Recorded([*prompt, *answer[0]], len(prompt), params)
        for prompt, answer, params in zip(prompts, found, PARAMS, strict=True)
    ]


def num_tokens() -> int:
    """Of all answers, but for their first ones, which come with the prompts."""
    return sum(len(one.token_ids) - one.num_prompt - 1 for one in recorded())


class Knowing:
    """Right for the first `right` drafts, wrong behind them."""

    name, is_instant, reads_hidden = "knowing", True, False

    def __init__(self, rows: Rows, right: int) -> None:
        self._rows, self._right = rows, right

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        guesses = []
        for ask in asks:
            ids = next(o.token_ids for o in recorded() if list(o.token_ids[:8]) == self.seen[:8])
            tokens = list(ids[ask.num_tokens : ask.num_tokens + ask.most])
            tokens[self._right :] = [(token + 1) % 256 for token in tokens[self._right :]]
            guesses.append(Guess(tokens, [0.5] * len(tokens)))
        return guesses

    def observe(self, seen: Seen) -> None:
        if seen.items[0].start == 0:
            [item] = seen.items
            self.seen = self._rows.token_ids[item.row, item.start :][: item.num_tokens].tolist()

    def forget(self, row: int) -> None:
        pass


def test_what_is_right_is_counted() -> None:
    replay = Replay(target(), provider(), 64)
    worth = replay.measure(lambda rows, kv: Knowing(rows, 2), recorded(), 3, 100)
    assert worth.num_tokens == num_tokens()
    assert worth.chances[:2] == [1.0, 1.0] and worth.chances[2] == 0.0
    assert 2.5 < worth.tokens_a_step <= 3
    nothing = replay.measure(lambda rows, kv: None, recorded(), 0, 100)
    assert nothing.tokens_a_step == 1 and nothing.num_tokens == num_tokens()


def test_all_layers_know_what_was_recorded() -> None:
    """The replayed target is the one that answered: with its caches and its noise."""
    model = target()
    replay = Replay(model, provider(), 64)
    worth = replay.measure(
        lambda rows, kv: EarlyExitDrafter(model, 2, provider(), kv, rows), recorded(), 2, 100
    )
    assert worth.chances == [1.0, 1.0]


def test_exits_are_measured_and_remembered(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    exits = measure_exits(
        target(), provider(), recorded(), 12, [1, 2], lambda *step: not told.append(step)
    )
    assert [one.num_layers for one in exits] == [1, 2]
    assert exits[1].chances == [1.0] * 3
    assert told == [(1, 2), (2, 2)]
    slow, fast = Exit(1, [0.1], 0.9, 1), Exit(2, [0.9], 1.3, 2)
    assert best_exit([slow, fast]) == 2 and best_exit([slow]) is None
    assert known_exit(tmp_path, "model") is None
    path = remember_exit(tmp_path, "model", [slow, fast])
    assert known_exit(tmp_path, "model") == 2
    remember_exit(tmp_path, "model", [slow])
    assert known_exit(tmp_path, "model") is None
    assert json.loads(path.read_text())["measured"][0]["speed_up"] == 0.9
    path.write_text("[torn")
    assert known_exit(tmp_path, "model") is None
