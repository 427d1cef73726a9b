"""Engines with and without speculation answer the same tasks in turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from drafting.work import WORK, Task

# Those of the tests.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from adversaries import ADVERSARIES
from elinvar.base.config import EngineConfig
from elinvar.base.handling import OFFLINE
from elinvar.engine.core import Engine
from elinvar.engine.drafts import Given

Line = dict[str, Any]


def load(
    model: str,
    speculation: str,
    threads: int | None,
    max_rows: int = 8,
    draft_model: str | None = None,
) -> Engine:
    """speculation: as --speculation takes it, or the name of a drafter that does harm."""
    harmful = {make.__name__: make for make in ADVERSARIES}.get(speculation)
    config = EngineConfig(
        kv_memory=2**29,
        max_rows=max_rows,
        num_threads=threads,
        max_context=4096,
        prefix_cache=False,
        speculation=speculation if harmful is None else "auto",
        draft_model=None if speculation == "off" else draft_model,
    )
    given = None if harmful is None else Given(lambda runner: harmful(runner.rows))
    return Engine.load(model, config, drafting=given)


def decode(
    engine: Engine, tasks: Sequence[Task], batch: int, tenant: str
) -> tuple[float, list[list[int]]]:
    """Tokens a second and the answers, `batch` at a time. Prompts and first tokens are left out: the
    clock runs from when all have begun, which nobody who reads along delays. tenant: a new one has no answers of others to draft from."""
    answers: list[list[int]] = []
    seconds, tokens = 0.0, 0
    for at in range(0, len(tasks), batch):
        own: dict[str, list[int]] = {}
        for task in tasks[at : at + batch]:
            ids = engine.tokenizer.encode(task.prompt)
            own[engine.add(ids, task.params, handling=replace(OFFLINE, tenant=tenant))] = []
        while engine.has_work:
            is_decoding, began = all(own.values()), time.perf_counter()
            deltas = engine.step()
            if is_decoding:
                seconds += time.perf_counter() - began
                tokens += sum(len(delta.token_ids) for delta in deltas)
            for delta in deltas:
                own[delta.request_id] += delta.token_ids
        answers += own.values()
    return tokens / seconds, answers


def measure(
    model: str,
    drafters: Sequence[str],
    kinds: Sequence[str],
    batches: Sequence[int],
    rounds: int,
    threads: int | None,
    draft_model: str | None = None,
) -> Iterator[Line]:
    """A line for each kind of work, number of rows and set of drafters. Ratios are of neighbours in
    time; the first round is not counted. Raises AssertionError where an answer differs."""
    engines = {
        name: load(model, name, threads, draft_model=draft_model) for name in ("off", *drafters)
    }
    for kind in kinds:
        tasks = list(WORK[kind]())
        for batch in batches:
            rates: dict[str, list[float]] = {name: [] for name in engines}
            drafted = {name: _counts(engine) for name, engine in engines.items()}
            for number in range(rounds + 1):
                expected: list[list[int]] = []
                for name, engine in engines.items():
                    rate, answers = decode(engine, tasks, batch, f"{kind} {batch} {number}")
                    expected = expected or answers
                    assert answers == expected, f"{name} changed an answer of {kind}"
                    if number:
                        rates[name].append(rate)
            for name in drafters:
                tried, kept = (
                    now - then
                    for now, then in zip(_counts(engines[name]), drafted[name], strict=True)
                )
                ratios = sorted(on / off for on, off in zip(rates[name], rates["off"], strict=True))
                yield {
                    "model": model,
                    "work": kind,
                    "batch": batch,
                    "drafters": name,
                    "off": median(rates["off"]),
                    "on": median(rates[name]),
                    "ratio": median(ratios),
                    "range": [ratios[0], ratios[-1]],
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
        f"| {line['ratio']:.2f} | {low:.2f} - {high:.2f} | {accepted} |"
    )


HEAD = (
    "| work | rows | drafters | off, tokens/s | on | ratio | range | accepted |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)
