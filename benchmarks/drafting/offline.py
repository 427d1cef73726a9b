"""Answers recorded once; then what chains and trees of drafts would have come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from drafting import asked, costs, trees, work
from drafting.live import Run, in_turn, load
from drafting.trees import Grown, Text
from elinvar.engine.core import Engine
from elinvar.run.drafters.suffix import SuffixDrafter

# Those of the tests.
from oracles import Clock
from policy import Replay, line

MOST = 16
SHARES = 0.05, 0.065, 0.08, 0.1
"""Of a step of 8 rows, what a draft costs."""
SHAPES: dict[str, Callable[[Text, int], Grown]] = {
    "chain": trees.chain,
    "fork of 2": trees.fork(2),
    "fork of 4": trees.fork(4),
    "tree": trees.best_first,
}
DRAFTERS = "suffix, own text", "suffix", "forced"
Line = dict[str, Any]
Sequences = list[tuple[list[int], int]]
"""Whole texts, and how long their prompts are."""


def measure(model: str, kinds: Sequence[str], threads: int | None) -> Iterator[Line]:
    """Of each kind of work, drafter (asked.ask) and shape: tokens a step with 4, 8 and 16 drafts, and the
    speed over that without drafts where each step takes as many as promise most, at 1 and 8 requests.
    And what the policy that engines have makes of `suffix` at 8 requests, from one kind to the next."""
    engine = load(model, "off", threads, 8 * max(costs.BRANCHES))
    curves = {requests: costs.measure(engine, requests) for requests in (1, 8)}
    yield {"model": model, "costs": curves, "tokens": costs.TOKENS}
    with pytest.MonkeyPatch.context() as patch:
        replays = {
            share: Replay(patch, lambda rows: [SuffixDrafter(rows)], line(share), Clock(0.0))
            for share in SHARES
        }
        yield from _kinds(engine, kinds, curves, replays)
    engine.close()


def _kinds(
    engine: Engine,
    kinds: Sequence[str],
    curves: dict[int, costs.Costs],
    replays: dict[float, Replay],
) -> Iterator[Line]:
    for kind in kinds:
        tasks = work.some(kind, work.FEW)
        run = Run(engine, tasks, 8, kind)
        in_turn([run], 8)
        answers = run.answers
        prompts = [engine.tokenizer.encode(task.prompt) for task in tasks]
        sequences = [(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)]
        for name in DRAFTERS:
            yield {"work": kind, "drafters": name, **asked.ask(engine, name, tasks, sequences)}
        for name, shape in SHAPES.items():
            yield {
                "work": kind,
                "shape": name,
                "fixed": {most: _fixed(sequences, shape, most) for most in (4, 8, MOST)},
                "speed": {
                    requests: _adaptive(sequences, shape, curve)
                    for requests, curve in curves.items()
                },
            }
        told = [(p, a) for p, a in zip(prompts, answers, strict=True)]
        yield {
            "work": kind,
            "policy": {share: replay.gain(told) for share, replay in replays.items()},
        }


def _fixed(sequences: Sequences, shape: Callable[[Text, int], Grown], most: int) -> float:
    """Tokens a step."""
    tokens = steps = 0
    for whole, num_prompt in sequences:
        text = Text(whole, num_prompt + 1)
        while text.known < len(whole):
            came = min(1 + text.accepted(shape(text, most)), len(whole) - text.known)
            text.grow(text.known + came)
            tokens, steps = tokens + came, steps + 1
    return tokens / max(1, steps)


def _adaptive(
    sequences: Sequences, shape: Callable[[Text, int], Grown], curve: costs.Costs
) -> float:
    """Tokens a second, over those of steps without drafts."""
    plain = costs.seconds(curve, 1, 1)
    tokens, spent = 0, 0.0
    for whole, num_prompt in sequences:
        text = Text(whole, num_prompt + 1)
        while text.known < len(whole):
            tree, cost = _worth(shape(text, MOST), curve)
            came = min(1 + text.accepted(tree), len(whole) - text.known)
            text.grow(text.known + came)
            tokens, spent = tokens + came, spent + cost
    return tokens * plain / spent


def _worth(tree: Grown, curve: costs.Costs) -> tuple[Grown, float]:
    """The beginning of it that promises the most tokens a second, and its seconds."""
    best, promised = (list[trees.Node](), costs.seconds(curve, 1, 1)), 1.0
    for count in range(1, len(tree) + 1):
        promised += tree[count - 1].chance
        cost = costs.seconds(curve, *trees.size(tree[:count]))
        if promised / cost > (1 + sum(node.chance for node in best[0])) / best[1]:
            best = tree[:count], cost
    return best


def show(line: Line) -> str:
    if "costs" in line:
        return "\n".join(
            f"| cost | {requests} x {branches} | "
            + ", ".join(f"{n}: {1e3 * s:.2f}" for n, s in zip(line["tokens"], row, strict=True))
            + " ms |"
            for requests, curve in line["costs"].items()
            for branches, row in curve.items()
        )
    if "drafters" in line:
        fixed = [f"{value:.2f}" for value in line["fixed"].values()]
        return (
            f"| {line['work']} | {line['drafters']} | {' | '.join(fixed)} | {line['us']:.0f} us a row, "
            f"came / said {line['came']:.2f} | |"
        )
    if "policy" in line:
        gains = ", ".join(f"{gain:.2f} at {share}" for share, gain in line["policy"].items())
        return f"| {line['work']} | policy, of 8 requests, by the cost of a draft | {gains} | | | |"
    fixed, speed = line["fixed"], line["speed"]
    return (
        f"| {line['work']} | {line['shape']} | "
        + " | ".join(f"{value:.2f}" for value in [*fixed.values(), *speed.values()])
        + " |"
    )


HEAD = (
    "| work | shape | tokens a step with 4 | 8 | 16 drafts | speed of 1 request | of 8 |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)
