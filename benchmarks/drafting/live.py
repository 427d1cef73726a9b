"""Engines with and without speculation answer the same tasks, a few steps each in turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import add, truediv
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from drafting import work
from drafting.work import Task

# Those of the tests.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from adversaries import ADVERSARIES
from drafting.right import Right
from elinvar.base.batch import I32
from elinvar.base.config import EngineConfig
from elinvar.base.handling import OFFLINE
from elinvar.base.plan import RowStart
from elinvar.engine.core import Engine
from elinvar.engine.drafts import Drafting, Given

Line = dict[str, Any]
RIGHT = "right"
OFF, TWIN = "off", "off again"
"""Loaded first and last: of engines in one process those loaded earlier are quicker by up to 2 %."""
HARMFUL = {make.__name__: make for make in ADVERSARIES}


def load(
    model: str,
    speculation: str,
    threads: int | None,
    max_rows: int = 8,
    draft_model: str | None = None,
    coming: Sequence[I32] = (),
) -> Engine:
    """speculation: as --speculation takes it, "right" for one that knows what is coming, or the name of a
    drafter that does harm."""
    given: Drafting | None = None
    if speculation == RIGHT:
        given = Given(lambda runner: Right(runner.rows, coming))
    elif speculation in HARMFUL:
        given = Given(lambda runner: HARMFUL[speculation](runner.rows))
    config = EngineConfig(
        kv_memory=2**29,
        max_rows=max_rows,
        num_threads=threads,
        max_context=4096,
        speculation="auto" if given else speculation,
        draft_model=None if speculation == "off" else draft_model,
    )
    return Engine.load(model, config, drafting=given)


class Run:
    """Tasks that an engine answers, `batch` at a time: where one ends the next begins; group: answers of
    others are drafted from in the same one alone, prompts are cached for all. They and first tokens are not
    timed, nor is what is left when no task comes any more: the clock runs while `batch` have begun."""

    def __init__(self, engine: Engine, tasks: Sequence[Task], batch: int, group: str) -> None:
        self.answers: list[list[int]] = []
        self.sequences: list[list[int]] = []
        """With their prompts."""
        self.tokens, self.seconds = 0, 0.0
        """Of what is timed."""
        self._group = group.encode()
        self._steps = self._answer(engine, tasks, batch)

    def go_on(self, tokens: int) -> bool:
        """Until it has so many; False: no more come."""
        while self.tokens < tokens:
            if not next(self._steps, False):
                return False
        return True

    def _answer(self, engine: Engine, tasks: Sequence[Task], batch: int) -> Iterator[bool]:
        rows = engine.runner.rows
        start = type(rows).start

        def start_in_group(started: RowStart) -> None:
            start(rows, replace(started, namespace=self._group))

        rows.start = start_in_group  # type: ignore[method-assign]
        prompts = [engine.tokenizer.encode(task.prompt) for task in tasks]
        own: dict[str, list[int]] = {}
        waiting, live = list(zip(prompts, tasks, strict=True))[::-1], set[str]()
        while waiting or live:
            while waiting and len(live) < batch:
                ids, task = waiting.pop()
                live.add(request := engine.add(ids, task.params, handling=OFFLINE))
                own[request] = []
            is_timed = len(live) == batch and all(own[request] for request in live)
            began = time.perf_counter()
            deltas = engine.step()
            if is_timed:
                self.seconds += time.perf_counter() - began
                self.tokens += sum(len(delta.token_ids) for delta in deltas)
            for delta in deltas:
                own[delta.request_id] += delta.token_ids
                if delta.finish_reason is not None:
                    live.discard(delta.request_id)
            yield True
        self.answers = list(own.values())
        self.sequences = list(map(add, prompts, self.answers))


SLICE = 16
"""Steps without drafts for which an engine computes before the other does."""


def in_turn(runs: Sequence[Run], batch: int) -> None:
    """All to their ends, a slice each: a machine that is slower for a second is so for all of them."""
    going, tokens = list(runs), 0
    while going:
        tokens += SLICE * batch
        going = [run for run in going if run.go_on(tokens)]


def measure(
    model: str,
    drafters: Sequence[str],
    kinds: Sequence[str],
    batches: Sequence[int],
    rounds: int,
    threads: int | None,
    draft_model: str | None = None,
) -> Iterator[Line]:
    """A line for each kind of work, number of rows and set of drafters. Ratios are of engines that took
    turns, to the mean of two without speculation; the first round is not counted. Raises AssertionError
    where an answer differs."""
    coming: list[I32] = []
    engines = {
        name: load(
            model, OFF if name == TWIN else name, threads, draft_model=draft_model, coming=coming
        )
        for name in (OFF, *drafters, TWIN)
    }
    for kind in kinds:
        for batch in batches:
            tasks = work.some(kind, work.FEW if batch == 1 else work.MOST)
            rates: dict[str, list[float]] = {name: [] for name in engines}
            drafted = {name: _counts(engine) for name, engine in engines.items()}
            for number in range(rounds + 1):
                group = f"{kind} {batch} {number}"
                runs = {n: Run(engine, tasks, batch, group) for n, engine in engines.items()}
                in_turn(list(runs.values()), batch)
                coming[:] = [np.array(ids, np.int32) for ids in runs[OFF].sequences]
                for name, run in runs.items():
                    assert run.answers == runs[OFF].answers, f"{name} changed an answer of {kind}"
                    if number:
                        rates[name].append(run.tokens / run.seconds)
            off = [mean(both) for both in zip(rates[OFF], rates[TWIN], strict=True)]
            twin = median(map(truediv, rates[TWIN], rates[OFF]))
            for name in drafters:
                tried, kept = (
                    now - then
                    for now, then in zip(_counts(engines[name]), drafted[name], strict=True)
                )
                ratios = sorted(map(truediv, rates[name], off))
                yield {
                    "model": model,
                    "work": kind,
                    "batch": batch,
                    "drafters": name,
                    "off": median(off),
                    "on": median(rates[name]),
                    "ratio": median(ratios),
                    "range": [ratios[0], ratios[-1]],
                    "twin": twin,
                    "accepted": kept / tried if tried else None,
                }
    for engine in engines.values():
        engine.close()


def _counts(engine: Engine) -> tuple[int, int]:
    """Drafts that were verified, and accepted."""
    stats = engine.metrics.drafters
    return sum(s.num_drafted for s in stats), sum(s.num_accepted for s in stats)


def show(line: Line) -> str:
    low, high = line["range"]
    accepted = "-" if line["accepted"] is None else f"{line['accepted']:.0%}"
    return (
        f"| {line['work']} | {line['batch']} | {line['drafters']} | {line['off']:.0f} | {line['on']:.0f} "
        f"| {line['ratio']:.2f} | {low:.2f} - {high:.2f} | {accepted} | {line['twin']:.2f} |"
    )


HEAD = (
    "| work | rows | drafters | off, tokens/s | on | ratio | range | accepted | off again / off |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
