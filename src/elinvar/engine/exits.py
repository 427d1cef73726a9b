"""Exits: how many of a model's first layers are worth drafting with, by measurement, and remembering it.

Kept in the cache folder by the model's fingerprint. Most small models are not worth it: their head takes a
large part of a step, and layers before the last ones do not know the answer yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from elinvar.nn.decoder import Decoder
from elinvar.ops.api import Ops
from elinvar.run.drafters.early_exit import EarlyExitDrafter
from elinvar.run.replay import Recorded, Replay
from elinvar.weights.atomic import atomic_file

MOST_DRAFTS = 3
MARGIN = 1.05
"""A speed-up below is noise."""


@dataclass(frozen=True, slots=True)
class Exit:
    num_layers: int
    chances: list[float]
    """Of being right where all drafts before were, by place."""
    speed_up: float
    """One request alone, with the best number of drafts, against none."""
    num_drafts: int
    """That number."""


def measure_exits(
    model: Decoder,
    ops: Ops,
    answers: Sequence[Recorded],
    num_tokens: int,
    candidates: Sequence[int],
    progress: Callable[[int, int], bool],
) -> list[Exit]:
    """One for each number of layers of `candidates`, fewer where `progress` said stop. num_tokens: of
    each answer, at most."""
    longest = max(answer.num_prompt for answer in answers) + num_tokens
    replay = Replay(model, ops, longest)
    replay.measure(
        lambda rows, kv: None, answers[:1], 0, num_tokens
    )  # threads and tables are there
    plain = replay.measure(lambda rows, kv: None, answers, 0, num_tokens).tokens_a_second
    found = []
    for done, layers in enumerate(candidates, 1):

        def make(rows, kv, layers=layers):  # type: ignore[no-untyped-def]
            return EarlyExitDrafter(model, layers, ops, kv, rows)

        tries = [replay.measure(make, answers, k, num_tokens) for k in range(1, MOST_DRAFTS + 1)]
        rates = [one.tokens_a_second / plain for one in tries]
        best = max(range(MOST_DRAFTS), key=rates.__getitem__)
        found.append(Exit(layers, tries[-1].chances, rates[best], best + 1))
        if not progress(done, len(candidates)):
            break
    return found


def best_exit(exits: Sequence[Exit]) -> int | None:
    """Its layers; None where no exit is worth it."""
    best = max(exits, key=lambda one: one.speed_up)
    return best.num_layers if best.speed_up > MARGIN else None


def remember_exit(cache: Path, fingerprint: str, exits: Sequence[Exit]) -> Path:
    """Raises ModelError where the cache folder cannot be written."""
    path = cache / "drafts" / f"{fingerprint}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"num_layers": best_exit(exits), "measured": [asdict(one) for one in exits]}
    text = json.dumps(told, indent=2).encode()
    with atomic_file(path, len(text)) as file:
        file.write(text)
    return path


def known_exit(cache: Path, fingerprint: str) -> int | None:
    """What was found to be worth it; None where nothing was, or nobody looked."""
    try:
        told = json.loads((cache / "drafts" / f"{fingerprint}.json").read_bytes())
    except (OSError, ValueError):
        return None
    layers = told.get("num_layers") if isinstance(told, dict) else None
    return layers if isinstance(layers, int) and layers > 0 else None
