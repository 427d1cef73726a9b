"""What an online benchmark sends: when each request arrives, how long it is, which tokens it has.

Everything follows from the seed: two runs, and two servers, get the same requests.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elinvar.base.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREFIX_BLOCK = 512
"""Tokens that one of a trace's `hash_ids` stands for."""
TOKEN_IDS = (100, 1100)
"""Prompts are made of these ids: every vocabulary has them, and few are special tokens."""


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    """Seconds after the first request."""
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    """Ids of the prompt's blocks; prompts that begin with equal ids begin with equal tokens."""


def poisson(lengths: Sequence[Arrival], rate: float, seed: int) -> list[Arrival]:
    """The same requests, arriving independently of each other, `rate` a second on average;
    infinity: all at once."""
    rng, at, arrivals = random.Random(seed), 0.0, []
    for one in lengths:
        arrivals.append(replace(one, at=at))
        at += 0.0 if math.isinf(rate) else rng.expovariate(rate)
    return arrivals


def uniform(
    count: int, prompt: tuple[int, int], output: tuple[int, int], seed: int
) -> list[Arrival]:
    """Requests whose lengths lie anywhere between the bounds."""
    rng = random.Random(f"lengths {seed}")
    return [Arrival(0.0, rng.randint(*prompt), rng.randint(*output)) for _ in range(count)]


def read_trace(path: Path, count: int | None, speed: float, scale: float) -> list[Arrival]:
    """The first `count` requests of a trace, arriving `speed` times as fast, all lengths times
    `scale`. Two public formats are known: JSONL with `timestamp` (ms), `input_length`,
    `output_length` and perhaps `hash_ids` (Mooncake), and CSV with `TIMESTAMP`, `ContextTokens`
    and `GeneratedTokens` (Azure). Raises InputError naming the first line that is neither."""
    arrivals: list[Arrival] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.read(1)
            file.seek(0)
            rows: Iterable[Any] = file if first == "{" else csv.DictReader(file)
            parse: Callable[[Any], Arrival] = _mooncake if first == "{" else _azure
            for number, row in enumerate(rows, 1 if first == "{" else 2):
                if len(arrivals) == count:
                    break
                try:
                    arrivals.append(parse(row))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        "trace", f"Line {number} of {path} is no request of a known trace: {error}."
                    ) from None
    except UnicodeDecodeError:
        raise InputError("trace", f"{path} is not a UTF-8 text file.") from None
    if not arrivals:
        raise InputError("trace", f"{path} holds no request.")
    start = min(one.at for one in arrivals)
    scaled = (
        replace(
            one,
            at=(one.at - start) / speed,
            prompt_tokens=max(1, round(one.prompt_tokens * scale)),
            output_tokens=max(1, round(one.output_tokens * scale)),
        )
        for one in arrivals
    )
    return sorted(scaled, key=lambda one: one.at)


def _mooncake(line: str) -> Arrival:
    values = json.loads(line)
    return Arrival(
        float(values["timestamp"]) / 1000,
        int(values["input_length"]),
        int(values["output_length"]),
        tuple(values.get("hash_ids", ())),
    )


def _azure(row: dict[str, str]) -> Arrival:
    # Seven digits of a second are written; fromisoformat reads six and drops the rest.
    at = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
    return Arrival(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def prompts(arrivals: Sequence[Arrival], seed: int, vocab_size: int) -> list[NDArray[Any]]:
    """Token ids of each prompt, random but where prefixes are shared."""
    import numpy as np

    low, high = TOKEN_IDS if vocab_size >= TOKEN_IDS[1] else (0, vocab_size)

    def tokens(count: int, *key: int) -> NDArray[Any]:
        return np.random.default_rng([seed, *key]).integers(low, high, count, np.int32)

    made = []
    for i, one in enumerate(arrivals):
        shared = [tokens(PREFIX_BLOCK, 1, block) for block in one.prefix]
        own = tokens(max(0, one.prompt_tokens - PREFIX_BLOCK * len(shared)), 2, i)
        made.append(np.concatenate([*shared, own])[: one.prompt_tokens])
    return made
