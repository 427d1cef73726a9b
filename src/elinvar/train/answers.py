"""What a head learns from: the target's own answers, and what the target's layers make of them.

Both are written to the work folder as they come, and what is there is not made again. Owns the layout of
that folder: answers.jsonl, a line an answer, and features-N.npz, the states of SHARD answers each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from elinvar.base.errors import EngineError
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.output import CompletionBuilder
from elinvar.run.replay import Recorded, Replay
from elinvar.weights.atomic import atomic_file

SHARD = 32
Progress = Callable[[int, int], bool]
"""(done, in all) -> whether to go on."""


def record_answers(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    work: Path,
    progress: Progress,
) -> list[Recorded]:
    """The engine's answers to all prompts, in their order; fewer where `progress` said stop. params:
    with seeds, so that an answer is the same whenever it is made. Raises EngineError where a step fails:
    what came before is kept."""
    path, total = work / "answers.jsonl", len(prompts)
    known = _read(path)
    builders = {
        engine.add(prompt, one): (i, CompletionBuilder(list(prompt)))
        for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        if i not in known
    }
    go_on = progress(len(known), total)
    with path.open("a", encoding="ascii") as file:
        while engine.has_work and go_on:
            for delta in engine.step():
                if delta.error is not None:
                    raise EngineError(f"A step of the engine failed: {delta.error}")
                i, builder = builders[delta.request_id]
                if completion := builder.push(delta):
                    known[i] = completion.token_ids
                    file.write(json.dumps({"prompt": i, "ids": known[i]}) + "\n")
                    file.flush()
                    go_on = progress(len(known), total)
    for request_id in builders:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
    return [
        Recorded([*prompt, *known[i]], len(prompt), one)
        for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        if i in known
    ]


def _read(path: Path) -> dict[int, list[int]]:
    """By the number of the prompt; a last line that was torn is left out."""
    known: dict[int, list[int]] = {}
    if path.exists():
        for line in path.read_text("ascii").splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                continue
            known[told["prompt"]] = told["ids"]
    return known


def write_features(
    replay: Replay, answers: Sequence[Recorded], work: Path, progress: Progress
) -> list[Path]:
    """Files of what `hidden` gives of all tokens, as f16; fewer where `progress` said stop."""
    paths = []
    for first in range(0, len(answers), SHARD):
        paths.append(work / f"features-{first // SHARD}.npz")
        some = answers[first : first + SHARD]
        if not paths[-1].exists():
            states = [replay.states(answer.token_ids).astype(np.float16) for answer in some]
            _write(paths[-1], some, states)
        if not progress(first + len(some), len(answers)):
            break
    return paths


def _write(path: Path, answers: Sequence[Recorded], states: Sequence[Any]) -> None:
    arrays = {
        "ids": np.concatenate([np.array(answer.token_ids, np.int32) for answer in answers]),
        "lengths": np.array([len(answer.token_ids) for answer in answers]),
        "prompts": np.array([answer.num_prompt for answer in answers]),
        "states": np.concatenate(states),
    }
    with atomic_file(path, sum(array.nbytes for array in arrays.values())) as file:
        np.savez(file, allow_pickle=False, **arrays)


def seeded(params: SamplingParams, count: int) -> list[SamplingParams]:
    """By turns greedy and at temperature 1, which is what heads are asked for."""
    return [replace(params, temperature=float(i % 2), seed=i) for i in range(count)]
