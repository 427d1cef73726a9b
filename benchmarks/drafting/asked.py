"""The engine's own drafters, asked along answers that are known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from drafting.work import Task
from elinvar.base.plan import RowStart
from elinvar.engine.core import Engine
from elinvar.run.drafters.api import Ask, Drafter, Guess
from elinvar.run.drafters.forced import ForcedDrafter
from elinvar.run.drafters.suffix import SuffixDrafter
from elinvar.run.grammar import Masks
from elinvar.run.rows import Rows


def ask(
    engine: Engine,
    name: str,
    tasks: Sequence[Task],
    sequences: Sequence[tuple[list[int], int]],
    lengths: Sequence[int] = (4, 8, 16),
) -> dict[str, Any]:
    """With each number of drafts: tokens a step. With the last one, too: microseconds of a guess, and how
    many drafts came for each that was said to."""
    fixed = {most: _Harness(engine, name) for most in lengths}
    for most, harness in fixed.items():
        for task, (whole, num_prompt) in zip(tasks, sequences, strict=True):
            harness.follow(task, whole, num_prompt, most)
    last = fixed[lengths[-1]]
    return {
        "fixed": {most: harness.tokens / harness.steps for most, harness in fixed.items()},
        "us": 1e6 * last.seconds / last.steps,
        "came": last.came / last.said if last.said else 0.0,
    }


class _Harness:
    """One row, and drafters: `suffix, own text` has no answers of others; `forced` is both."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._rows = Rows(1, 4096, ())
        self._masks = Masks(engine.model_config.vocab_size, engine.grammars.matcher)
        suffix = SuffixDrafter(self._rows, most_kept=0 if "own" in name else 1 << 19)
        self._drafters: list[Drafter] = [suffix]
        if name == "forced":
            self._drafters.append(ForcedDrafter(self._rows, self._masks, suffix))
        self.tokens = self.steps = self.came = 0
        self.seconds = self.said = 0.0

    def follow(self, task: Task, whole: list[int], num_prompt: int, most: int) -> None:
        prompt, known = whole[:num_prompt], num_prompt + 1
        started = RowStart("", 0, prompt, task.params, [], -1, num_prompt)
        self._rows.start(started)
        self._masks.start(started)
        self._rows.token_ids[0, num_prompt] = whole[num_prompt]
        while known < len(whole):
            guess, rest = self._guess(known, most), whole[known:]
            accepted = 0
            while accepted < min(len(guess.tokens), len(rest)) and (
                guess.tokens[accepted] == rest[accepted]
            ):
                accepted += 1
            tried = guess.chances[: accepted + 1]
            self.said, self.came = self.said + sum(tried), self.came + accepted
            came = min(accepted + 1, len(rest))
            self._rows.token_ids[0, known : known + came] = rest[:came]
            known, self.tokens, self.steps = known + came, self.tokens + came, self.steps + 1
        for drafter in self._drafters:
            drafter.forget(0)

    def _guess(self, known: int, most: int) -> Guess:
        began = time.perf_counter()
        guesses = [drafter.propose([Ask(0, known, most)])[0] for drafter in self._drafters]
        self.seconds += time.perf_counter() - began
        best = max(guesses, key=_expected)
        valid = self._masks.num_valid(0, known, best.tokens, self._rows.token_ids)
        return Guess(best.tokens[:valid], best.chances[:valid])


def _expected(guess: Guess) -> float:
    chance, tokens = 1.0, 0.0
    for value in guess.chances:
        chance *= value
        tokens += chance
    return tokens
